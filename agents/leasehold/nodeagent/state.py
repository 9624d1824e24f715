"""The agent's state folder: who may use it, and records that outlive the agent.

::

    STATE/agent.lock             flock: one agent a folder
          node.json, modes.json, orders.json
          workers/UUID/          one a worker: see `worker_folder`
          logs/NAME.log
          quarantine/            records that could not be read

Each record is a JSON object with its ``version``; version N reads N - 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leasehold.core import errors


class StateFolder:
    """One agent's folder, locked for as long as this object is open. Mode 0700."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

        Raises `FailedPrecondition` if another agent has it, or if its mode or owner lets others in.
        """
        raise errors.Unimplemented("the state folder cannot be opened yet")

    def close(self) -> None:
        """Give the lock back."""

    def read(self, name: str) -> dict[str, Any] | None:
        """The record ``NAME.json`` without its version; None if there is none.

        One that cannot be read is moved to `quarantine`, told in the log, and None.
        """
        raise errors.Unimplemented("the state folder cannot be read yet")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record ``NAME.json``; it is on disk when this returns. Raises `ResourceExhausted` on a
        full disk; the former record is whole then.
        """
        raise errors.Unimplemented("the state folder cannot be written yet")
