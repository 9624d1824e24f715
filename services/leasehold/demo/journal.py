"""Append-only logs of JSON lines, stamped with CLOCK_MONOTONIC, which all processes of a host share.

A line goes to the operating system in one write before the call returns, so it survives a SIGKILL of the
writer, and a reader in another process sees whole lines only.
"""

import json
import pathlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self


class Journal:
    """Writes one log. Use it as a context manager."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, *, at_ns: int | None = None, **fields: Any) -> int:
        """Appends one event; returns its instant in CLOCK_MONOTONIC nanoseconds (now, unless given)."""
        at_ns = time.monotonic_ns() if at_ns is None else at_ns
        record = {"mono_ns": at_ns, "event": event, **fields}
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        return at_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Tail:
    """Reads a log that another process is writing; a file that is not there yet is an empty one."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._offset = 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """The events appended since the last call, oldest first."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All events of a log that is no longer written to."""
    return list(Tail(path).new_events())
