"""What the environment of a worker says: where the allocator is, who the worker is, how many there are."""

import os
from collections.abc import Mapping, Sequence
from typing import Final

from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.rpc import addresses as rpc_addresses

ADDRESSES_VARIABLE: Final = "LEASEHOLD_ADDR"
WORKER_ID_VARIABLE: Final = "WORKER_ID"
WORKER_COUNT_VARIABLE: Final = "WORKER_COUNT"
DEFAULT_ADDRESS: Final = "127.0.0.1:7400"

_NAME_LENGTH_MAX: Final = 128
_WORKER_COUNT_MAX: Final = 100_000


def addresses(
    given: str | Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Addresses of the allocators: as given, else of ``LEASEHOLD_ADDR``, else ``127.0.0.1:7400``.

    A text may hold several, with commas between. Raises `InvalidArgument` on one that is malformed.
    """
    setting = "addresses"
    if given is None:
        given = environment.get(ADDRESSES_VARIABLE, "").strip() or DEFAULT_ADDRESS
        setting = ADDRESSES_VARIABLE
    text = given if isinstance(given, str) else ",".join(given)
    return rpc_addresses.parse_list(text, setting=setting)


def worker_id(given: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The worker's name: as given, else of ``WORKER_ID``; None where neither says. Raises `InvalidArgument`."""
    if given is not None:
        return model.checked_holder_name(given, field_name="worker_id")
    value = environment.get(WORKER_ID_VARIABLE, "")
    return model.checked_holder_name(value, field_name=WORKER_ID_VARIABLE) if value else None


def worker_count(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many workers the user expects, of ``WORKER_COUNT``; None where it is not set.

    Raises `InvalidArgument` unless it is 1 to 100000.
    """
    value = environment.get(WORKER_COUNT_VARIABLE, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= _WORKER_COUNT_MAX):
        raise errors.InvalidArgument(
            f"{WORKER_COUNT_VARIABLE}: {value[:60]!r} is not a whole number of 1 to {_WORKER_COUNT_MAX}",
            field=WORKER_COUNT_VARIABLE,
        )
    return int(value)


def holder_name(worker: str | None, *, pid: int, is_forked: bool) -> str:
    """Name under which process `pid` holds leases.

    Unnamed workers are ``worker_<pid>``. The child of a fork shares its parent's `worker` name, so it adds its
    PID: two processes under one name would take the lease from each other for ever.
    """
    if worker is None:
        return f"worker_{pid}"
    if not is_forked:
        return worker
    suffix = f"-{pid}"
    return worker[: _NAME_LENGTH_MAX - len(suffix)] + suffix
