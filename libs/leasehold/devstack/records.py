"""The list, on disk, of the processes that were started for a data folder and not yet seen to end.

The owner of the folder may be killed at any instant, and then nobody tells its children to stop. So each one is
written down before it runs (`leasehold.devstack.process` holds it at a gate until it is), and whoever takes the
folder over ends what is on the list, by identity: never a stranger that was given an old PID.
"""

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leasehold.core import errors
from leasehold.devstack import identity

FILE_NAME = "processes.json"
_VERSION = 1

# Held over each read-modify-write. Between processes the owner's lock on the folder does this: one writer.
_write_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A process that was started for this folder; ``stop_signal`` asks it to end in order."""

    name: str
    identity: identity.Identity
    command: tuple[str, ...]
    stop_signal: signal.Signals = signal.SIGTERM


class Records:
    """The file ``processes.json`` of one data folder. Safe to use from several threads of one process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME

    def read(self) -> list[Record]:
        """All records, oldest first. Raises `FailedPrecondition` if the file is not one of ours."""
        try:
            document = json.loads(self._path.read_bytes())
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']}")
            return [_decode(item) for item in document["processes"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise errors.FailedPrecondition(
                f"{self._path} is damaged ({error!r}): see that no etcd, postgres or leasehold process of this "
                "folder runs, then remove the file"
            ) from error

    def add(self, record: Record) -> None:
        """Write one more record; it is on disk when this returns."""
        with _write_lock:
            self._write([*self.read(), record])

    def remove(self, process: identity.Identity) -> None:
        """Forget a process that has ended. One that is not listed is no error."""
        with _write_lock:
            before = self.read()
            after = [record for record in before if record.identity != process]
            if len(after) != len(before):
                self._write(after)

    def end_all(self, grace_seconds: float, announce: Callable[[str], None]) -> list[Record]:
        """End every listed process that still runs, the last started first, and empty the list.

        Each gets its stop signal, then ``grace_seconds``, then SIGKILL. Returns those that were alive. Raises
        `FailedPrecondition` or `PermissionDenied` at the first that cannot be ended; it stays on the list.
        """
        ended = []
        for record in reversed(self.read()):
            if identity.end(record.identity, record.stop_signal, grace_seconds):
                announce(f"ended {record.name}, PID {record.identity.pid}, left by an earlier run")
                ended.append(record)
            self.remove(record.identity)
        return ended

    def _write(self, records: Sequence[Record]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self._path.with_suffix(".tmp")
        with draft.open("w") as file:
            json.dump(
                {"version": _VERSION, "processes": [_encode(record) for record in records]}, file, indent=1
            )
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        draft.replace(self._path)


def record_process(
    data_dir: Path, name: str, pid: int, *, stop_signal: signal.Signals = signal.SIGTERM
) -> identity.Identity:
    """Put a child of this process on its folder's list, so that it is ended if this process is killed.

    There is an instant between the start and this call at which a kill leaves it unrecorded;
    `leasehold.devstack.stack.Stack.spawn` has none. Raises `NotFound` if there is no such process.
    """
    found = identity.of(pid)
    if found is None:
        raise errors.NotFound(f"no process {pid}")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    Records(data_dir).add(Record(name, found, tuple(command), stop_signal))
    return found


def _encode(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        **dataclasses.asdict(record.identity),
        "command": list(record.command),
        "stop_signal": record.stop_signal.name,
    }


def _decode(item: dict[str, Any]) -> Record:
    return Record(
        name=str(item["name"]),
        identity=identity.Identity(str(item["boot_id"]), int(item["pid"]), int(item["start_time_ticks"])),
        command=tuple(item["command"]),
        stop_signal=signal.Signals[item["stop_signal"]],
    )
