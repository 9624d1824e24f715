"""Small JSON records on disk that outlive the process which wrote them, each with its version."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leasehold.core import errors

Document = dict[str, Any]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Damaged(Exception):
    """A record is there and cannot be read. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of record. Version N reads N - 1 through `upgrade`; at version 1 there is nothing to upgrade."""

    kind: str
    version: int
    upgrade: Callable[[Document], Document] | None = None

    def decode(self, data: bytes) -> Document:
        """The record without its version. Raises `Damaged`."""
        try:
            document = json.loads(data.strip(b"\0 \n"))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{self.kind}: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise Damaged(f"{self.kind}: no JSON object")
        version = document.pop("version", None)
        if version == self.version:
            return document
        if version == self.version - 1 and self.upgrade is not None:
            return self.upgrade(document)
        reads = f"{self.version - 1} or {self.version}" if self.upgrade is not None else f"{self.version}"
        raise Damaged(f"{self.kind}: version {version!r}, this agent reads {reads}")

    def read(self, path: Path) -> Document | None:
        """The record at `path`; None if there is none, or only its room. Raises `Damaged`."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Damaged(f"{self.kind}: {error.strerror}") from error
        return self.decode(data) if data.strip(b"\0 \n") else None

    def encode(self, record: Mapping[str, Any]) -> bytes:
        """The record with its version."""
        return json.dumps({"version": self.version, **record}, indent=1).encode() + b"\n"

    def write(self, path: Path, record: Mapping[str, Any]) -> None:
        """Replace the record at `path` as a whole; it is on disk when this returns.

        Raises `ResourceExhausted` on a full disk, `FailedPrecondition` where it may not be written. The former
        record is whole then.
        """
        draft = path.with_name(path.name + ".tmp")
        with told(f"{path} cannot be written"):
            try:
                write_synced(draft, self.encode(record))
                draft.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    draft.unlink()
                raise
            sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Create or cut the file and write it through to the disk; mode 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Write a folder's names through to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tell errors of the system as `ResourceExhausted` (no room) or `FailedPrecondition`."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {error.strerror}"
        if error.errno in _FULL or error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
            raise errors.ResourceExhausted(message) from error
        raise errors.FailedPrecondition(message) from error
