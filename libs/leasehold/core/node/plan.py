"""The dry run of sizing: how many workers there would be, from a document of plain JSON values.

::

    {"formula": "managed", "available_gb": 32.1, "reserve_gb": 4, "worker_limit_gb": 6, "threshold_gb": 12,
     "min": 2, "max": 8, "workers": [{"held_gb": 3.5, "state": "running"}]}

Only `available_gb` is required; the rest has the defaults of `settings`. GB is 2**30 bytes.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from leasehold.core import errors
from leasehold.core.node import model, settings, sizing

_KEYS: Final = (
    "formula",
    "available_gb",
    "reserve_gb",
    "worker_limit_gb",
    "threshold_gb",
    "min",
    "max",
    "workers",
)
_WORKER_KEYS: Final = ("held_gb", "state")
_STATES: Final = tuple(state.value for state in model.WorkerState)


class Plan(TypedDict):
    """The answer: plain values, ready for JSON."""

    optimal: int
    reasons: list[str]


def run(document: object) -> Plan:
    """The optimum for what `document` describes.

    Raises `InvalidArgument` whose message and `field` name the path, such as `workers[1].held_gb`.
    """
    body = _mapping(document, "document")
    _check_keys(body, _KEYS, "")
    if "available_gb" not in body:
        raise _wrong("available_gb", "is missing: how much memory is available?")
    least = _count(body, "min", "MIN_WORKERS")
    most = _count(body, "max", "MAX_WORKERS")
    if least > most:
        raise _wrong("min", f"{least} is above max, which is {most}{'' if 'max' in body else ' by default'}")
    limit_bytes = _gb(body, "worker_limit_gb", default=settings.DEFAULTS["WORKER_MEMORY_LIMIT_GB"])
    if limit_bytes == 0:
        raise _wrong("worker_limit_gb", "must be above 0")
    found = sizing.optimal(
        formula=_formula(body.get("formula", settings.Formula.MANAGED.value)),
        available_bytes=_gb(body, "available_gb"),
        reserve_bytes=_gb(body, "reserve_gb", default=settings.DEFAULTS["SYSTEM_RESERVE_GB"]),
        limit_bytes=limit_bytes,
        threshold_bytes=_gb(body, "threshold_gb", default=settings.DEFAULTS["MEMORY_THRESHOLD_GB"]),
        min_workers=least,
        max_workers=most,
        workers=_workers(body.get("workers", [])),
    )
    return {"optimal": found.optimal, "reasons": list(found.reasons)}


def _workers(value: object) -> list[model.WorkerMemory]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _wrong("workers", "is not a list")
    if len(value) > model.WORKERS_MAX:
        raise _wrong("workers", f"has {len(value)} entries; at most {model.WORKERS_MAX}")
    return [_worker(item, f"workers[{index}]") for index, item in enumerate(value)]


def _worker(value: object, path: str) -> model.WorkerMemory:
    body = _mapping(value, path)
    _check_keys(body, _WORKER_KEYS, f"{path}.")
    state = body.get("state", model.WorkerState.RUNNING.value)
    if state not in _STATES:
        raise _wrong(f"{path}.state", _none_of(state, _STATES))
    held_bytes = _gb(body, "held_gb", default="0", path=f"{path}.held_gb")
    return model.WorkerMemory(name=path, state=model.WorkerState(state), held_bytes=held_bytes)


def _formula(value: object) -> settings.Formula:
    if not isinstance(value, str) or value not in list(settings.Formula):
        raise _wrong("formula", _none_of(value, tuple(settings.Formula)))
    return settings.Formula(value)


def _count(body: Mapping[str, Any], key: str, setting: str) -> int:
    value = _number(body.get(key, int(settings.DEFAULTS[setting])), key)
    if value != int(value) or value > model.WORKERS_MAX:
        raise _wrong(key, f"{value:g} is not a whole number of at most {model.WORKERS_MAX}")
    return int(value)


def _gb(body: Mapping[str, Any], key: str, *, default: str = "", path: str = "") -> int:
    value = _number(body.get(key, float(default) if default else None), path or key)
    if value > settings.GB_MAX:
        raise _wrong(path or key, f"{value:g} is more than {settings.GB_MAX:g}")
    return round(value * model.GIB)


def _number(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(path, f"{str(value)[:40]!r} is not a number")
    # A whole number of JSON may be too large for a float; it is out of every bound here, too.
    if (isinstance(value, float) and not math.isfinite(value)) or not 0 <= value <= 10**12:
        raise _wrong(path, f"{str(value)[:40]} is not a number of at least 0")
    return float(value)


def _mapping(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(path, "is not an object")
    return value


def _check_keys(body: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in body:
        if key not in known:
            hint = _meant(key, known) or f"; known are {', '.join(known)}"
            raise _wrong(f"{prefix}{_shown(key)}", f"is no key{hint}")


def _none_of(value: object, known: Sequence[str]) -> str:
    hint = _meant(value, known) if isinstance(value, str) else ""
    return f"{str(value)[:40]!r} is none of {', '.join(known)}{hint}"


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word[:64].lower(), known, n=1, cutoff=0.5)
    return f"; {near[0]} was probably meant" if near else ""


def _shown(key: object) -> str:
    """A key from outside, fit for one line of an error."""
    line = str(key).encode("unicode_escape").decode("ascii") or '""'
    return line if len(line) <= 60 else line[:57] + "..."


def _wrong(path: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"{path}: {why}", field=path)
