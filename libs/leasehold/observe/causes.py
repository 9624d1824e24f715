"""Cause ids: which request, signal or timer set a chain of events going.

A cause is a short text in a context variable. It follows ``await`` and new asyncio tasks by itself, is written
on every log line (`observe.logs`), and crosses to another process as gRPC metadata under `METADATA_KEY`.
"""

import contextlib
import itertools
import re
import secrets
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

METADATA_KEY: Final = "leasehold-cause-id"

_VALID: Final = re.compile(r"[A-Za-z0-9._:/-]{1,64}")

_current: ContextVar[str | None] = ContextVar("leasehold_cause", default=None)

# A random part for each process and a counter: unique, and much cheaper than a UUID for each call. A forked
# child would repeat its parent's ids, which misleads a reader but decides nothing.
_prefix: Final = secrets.token_hex(4)
_numbers = itertools.count(1)


def new(kind: str = "") -> str:
    """A cause id not used before, such as ``rpc-9f86d081-2a`` for the kind ``rpc``."""
    number = f"{_prefix}-{next(_numbers):x}"
    return f"{kind}-{number}" if kind else number


def is_valid(text: str) -> bool:
    """Whether a cause id from outside may be adopted: 1 to 64 plain characters, none that breaks a log."""
    return _VALID.fullmatch(text) is not None


def current() -> str | None:
    """The cause of what runs now, if one is set."""
    return _current.get()


def adopt(cause: str) -> None:
    """Set the cause for the rest of this task (or thread)."""
    _current.set(cause)


@contextlib.contextmanager
def bound(cause: str) -> Iterator[str]:
    """Set the cause inside a ``with`` block."""
    token = _current.set(cause)
    try:
        yield cause
    finally:
        _current.reset(token)
