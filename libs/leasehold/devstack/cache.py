"""The folder where fetched programs are kept; all projects and concurrent starters of one user share it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from leasehold.core import errors
from leasehold.devstack import process

_POLL_SECONDS = 0.1
_WORKSHOP_PREFIX = ".new-"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``$LEASEHOLD_CACHE_DIR``, else ``$XDG_CACHE_HOME/leasehold``, else ``~/.cache/leasehold``."""
    if chosen := environ.get("LEASEHOLD_CACHE_DIR"):
        return Path(chosen)
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base) / "leasehold"
    return Path(environ.get("HOME") or Path.home()) / ".cache" / "leasehold"


@contextlib.contextmanager
def locked(folder: Path, *, announce: process.Announce, cancel: threading.Event) -> Iterator[None]:
    """Hold the lock of a cache folder, made if need be, so that one process fetches while others wait.

    Raises `FailedPrecondition` if the folder cannot be written, `DeadlineExceeded` if ``cancel`` is set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise errors.FailedPrecondition(
            f"cannot write the cache folder {folder}: {error}; choose another with LEASEHOLD_CACHE_DIR"
        ) from error
    with file:
        is_told = False
        while not _try_lock(file.fileno()):
            if not is_told:
                announce(f"waiting for another process that fetches into {folder}")
                is_told = True
            process.check_cancelled(cancel, "the fetch")
            cancel.wait(_POLL_SECONDS)
        yield


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A new folder beside the cached things, removed at the end; for the holder of the folder's lock.

    What is finished in it is renamed out of it, so that nobody ever sees half a program under its final name.
    """
    for left_behind in folder.glob(f"{_WORKSHOP_PREFIX}*"):  # by one that was killed at work
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_WORKSHOP_PREFIX, dir=folder, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
