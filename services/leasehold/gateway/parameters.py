"""What a query may say: each parameter by its name, once, and nothing else."""

import difflib
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

from leasehold.core import errors
from leasehold.core.budget import model as budget_model
from leasehold.core.node import model
from starlette import requests

HOLD_SECONDS_MAX: Final = 30 * 86_400.0
_WHOLE: Final = re.compile(r"-?[0-9]{1,9}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,64}")


def read(request: requests.Request, names: Sequence[str]) -> Mapping[str, str]:
    """The query's parameters. Raises `InvalidArgument` for one that is not known, empty, or given twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            taken = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names) or 'none'}"
            name = name[:60]
            raise errors.InvalidArgument(f"{name!r} is no parameter of this route; {taken}", field=name)
        if name in found:
            raise errors.InvalidArgument(f"{name}: is given twice", field=name)
        if not value:
            raise errors.InvalidArgument(f"{name}: is empty; leave it out, or give a value", field=name)
        found[name] = value
    return found


def node(found: Mapping[str, str]) -> str:
    """The node's name; empty: left out. Raises `InvalidArgument`."""
    return model.checked_node_name(found["node"]) if "node" in found else ""


def pool(found: Mapping[str, str]) -> str:
    """The pool's name; empty: left out. Raises `InvalidArgument`."""
    return model.checked_pool_name(found["pool"]) if "pool" in found else ""


def budget(found: Mapping[str, str]) -> str:
    """The budget's name; empty: left out. Raises `InvalidArgument`."""
    return budget_model.checked_budget_name(found["budget"], field_name="budget") if "budget" in found else ""


def worker_id(found: Mapping[str, str]) -> str:
    """A holder's name; empty: left out. Raises `InvalidArgument`."""
    if "worker_id" not in found:
        return ""
    return budget_model.checked_holder_name(found["worker_id"], field_name="worker_id")


def request_id(found: Mapping[str, str]) -> str:
    """As given, else a new one. Raises `InvalidArgument`."""
    given = found.get("request_id")
    if given is None:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(given):
        raise errors.InvalidArgument(
            "request_id: it has 1 to 64 printable ASCII characters without spaces", field="request_id"
        )
    return given


def target_workers(found: Mapping[str, str]) -> int | None:
    """How many workers are wanted; None: mode=auto. Raises `InvalidArgument` unless it is one of the two."""
    mode, given = found.get("mode"), found.get("target_workers")
    if mode not in (None, "auto", "manual"):
        raise errors.InvalidArgument(f"mode: {mode[:60]!r} is neither auto nor manual", field="mode")
    if mode == "auto":
        if given is not None:
            raise errors.InvalidArgument(
                "mode: auto ends a target by hand, so it takes no target_workers", field="mode"
            )
        return None
    if given is None:
        raise errors.InvalidArgument(
            "target_workers: is missing (in the query, as ?target_workers=4); or give mode=auto",
            field="target_workers",
        )
    if not _WHOLE.fullmatch(given):
        raise errors.InvalidArgument(
            f"target_workers: {given[:60]!r} is not a whole number", field="target_workers"
        )
    if int(given) < 0 or int(given) > model.WORKERS_MAX:
        raise errors.InvalidArgument(
            f"target_workers: {given} is not 0 to {model.WORKERS_MAX}", field="target_workers"
        )
    return int(given)


def hold_seconds(found: Mapping[str, str]) -> float | None:
    """How long a target by hand holds; None: until it is ended. Raises `InvalidArgument`."""
    if "hold_seconds" not in found:
        return None
    if found.get("mode") == "auto":
        raise errors.InvalidArgument("hold_seconds: mode=auto has no end to hold for", field="hold_seconds")
    try:
        seconds = float(found["hold_seconds"])
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= HOLD_SECONDS_MAX:
        raise errors.InvalidArgument(
            f"hold_seconds: {found['hold_seconds'][:60]!r} is not above 0 and at most {HOLD_SECONDS_MAX:.0f}",
            field="hold_seconds",
        )
    return seconds
