"""The agent's state folder: who may use it, and records that outlive the agent.

::

    STATE/agent.lock             flock: one agent a folder
          node.json, modes.json, orders.json
          workers/UUID/          one a worker: see `worker_folder`
          logs/NAME.log
          quarantine/            records that could not be read
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leasehold.core import errors
from leasehold.nodeagent import records
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_QUARANTINED_MAX = 1000


class StateFolder:
    """One agent's folder, locked for as long as this object is open. Mode 0700."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    @property
    def workers(self) -> Path:
        """Folder of the workers' folders."""
        return self.path / "workers"

    @property
    def logs(self) -> Path:
        """Folder of the workers' logs."""
        return self.path / "logs"

    @property
    def quarantine(self) -> Path:
        """Folder of records that could not be read."""
        return self.path / "quarantine"

    def open(self) -> None:
        """Create the folder where there is none, and lock it.

        Raises `FailedPrecondition` if another agent has it, or if it is another user's or open to others,
        `ResourceExhausted` on a full disk.
        """
        if self._lock is not None:
            raise errors.FailedPrecondition(f"{self.path} is open already")
        with records.told(f"the state folder {self.path} cannot be used"):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = self.path.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise errors.FailedPrecondition(
                    f"{self.path} must be this user's alone: chown it to uid {os.geteuid()} and chmod it 0700"
                )
            for folder in (self.workers, self.logs, self.quarantine):
                folder.mkdir(exist_ok=True, mode=0o700)
            self._lock = _locked(self.path / "agent.lock")

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read(self, name: str, kind: records.Format | None = None) -> dict[str, Any] | None:
        """The record ``NAME.json`` without its version; None if there is none.

        One that cannot be read is moved to `quarantine`, told in the log, and None.
        """
        path = self.path / f"{name}.json"
        try:
            return (kind or records.Format(name, 1)).read(path)
        except records.Damaged as damage:
            moved = self.set_aside(path)
            _log.error("record_quarantined", record=name, why=str(damage), path=str(moved))
            return None

    def write(self, name: str, record: Mapping[str, Any], kind: records.Format | None = None) -> None:
        """Replace the record ``NAME.json``; it is on disk when this returns.

        Raises `ResourceExhausted` on a full disk; the former record is whole then.
        """
        (kind or records.Format(name, 1)).write(self.path / f"{name}.json", record)

    def set_aside(self, path: Path) -> Path:
        """Move a file to `quarantine` under a name of its own; where it is now (unmoved if that fails)."""
        stem = "-".join(path.relative_to(self.path).parts)
        for number in range(1, _QUARANTINED_MAX + 1):
            target = self.quarantine / f"{stem}.{number}"
            if not target.exists():
                break
        try:
            self.quarantine.mkdir(exist_ok=True, mode=0o700)
            path.replace(target)
        except OSError as error:
            _log.error("quarantine_failed", path=str(path), why=error.strerror)
            return path
        return target


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise errors.FailedPrecondition(
            f"already running, PID {owner}, on {path.parent}", metadata={"pid": owner}
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError:  # a full disk: the PID is for people, the lock is what counts
        _log.warning("agent_pid_not_written", path=str(path))
    return descriptor
