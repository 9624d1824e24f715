"""One owner at a time for a data folder, and how others find it."""

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from leasehold.core import errors
from leasehold.devstack import identity

FILE_NAME = "owner.lock"
# For another process to write its name after it has locked; and for a child that a killed owner had just forked
# to get to its exec, which closes its copy of the lock.
_NAMELESS_SECONDS = 2.0


class Owner:
    """The exclusive right to start processes for a data folder; a context manager.

    The right is a flock(2) on ``owner.lock``, which the kernel drops when its holder ends, however it ends. The
    file is never removed (two could then lock two files of one name) and holds the owner's identity.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the folder; it is made if need be.

        Raises `FailedPrecondition` "already running, PID n" (metadata ``pid``) if it is taken, and if the
        folder cannot be made or written.
        """
        if self._file is not None:
            raise errors.FailedPrecondition(f"this process owns {self._path.parent} already")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = self._path.open("a+")  # not inheritable: a child must not keep the folder taken
        except OSError as error:
            raise errors.FailedPrecondition(
                f"cannot use the data folder {self._path.parent}: {error}"
            ) from error
        try:
            _lock(file, self._path.parent)
        except BaseException:
            file.close()
            raise
        self._file = file
        file.truncate(0)
        json.dump(_as_json(identity.of(os.getpid())), file)
        file.flush()

    def release(self) -> None:
        """Give the folder up; again is no error."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def find(data_dir: Path) -> identity.Identity | None:
    """The living owner of a data folder, or None. Raises `PermissionDenied` if the folder is another user's."""
    try:
        content = json.loads((data_dir / FILE_NAME).read_text())
        found = identity.Identity(content["boot_id"], content["pid"], content["start_time_ticks"])
    except PermissionError as error:
        raise errors.PermissionDenied(f"cannot see who owns the data folder: {error}") from error
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # never owned, given up, or another process is about to write its name
    return found if identity.is_alive(found) else None


def stop(data_dir: Path, grace_seconds: float) -> int | None:
    """Ask the owner of a data folder to end (SIGTERM) and wait; returns its PID, None if there is none.

    Raises `DeadlineExceeded` if it still runs after ``grace_seconds``: it is not killed, for it may be busy
    stopping its children in order. Raises `PermissionDenied` if it is another user's.
    """
    found = find(data_dir)
    if found is None or not identity.send(found, signal.SIGTERM):
        return None
    if not identity.wait(found, grace_seconds):
        raise errors.DeadlineExceeded(
            f"PID {found.pid} still runs {grace_seconds:g} s after SIGTERM", metadata={"pid": str(found.pid)}
        )
    return found.pid


def _lock(file: IO[str], data_dir: Path) -> None:
    deadline = time.monotonic() + _NAMELESS_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if (holder := find(data_dir)) is not None:
            raise errors.FailedPrecondition(
                f"already running, PID {holder.pid}, on {data_dir}", metadata={"pid": str(holder.pid)}
            )
        if time.monotonic() >= deadline:
            raise errors.FailedPrecondition(f"already running on {data_dir}: a process holds its lock")
        time.sleep(0.01)


def _as_json(holder: identity.Identity | None) -> dict[str, str | int]:
    if holder is None:
        raise errors.FailedPrecondition("/proc does not show this process; is /proc mounted?")
    return {"boot_id": holder.boot_id, "pid": holder.pid, "start_time_ticks": holder.start_time_ticks}
