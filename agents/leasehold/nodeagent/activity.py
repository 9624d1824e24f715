"""What workers tell of themselves in their run folders: files ``activity.PID.json``, each replaced whole.

::

    {"version": 1, "pid": 4711, "start_time_ticks": 123456, "is_ready": true,
     "tasks": [{"id": "…", "name": "…", "queue": "…", "since": 1700000000.0}]}

A file is read again only when it was replaced, so that each sample costs a few calls of `stat`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from leasehold.nodeagent.worker_values import UNKNOWN_ACTIVITY, Activity
from leasehold.runtime import identity as identities

_VERSION = 1
_BYTES_MAX = 2**20


@dataclass(frozen=True, slots=True)
class _Told:
    pid: int
    start_time_ticks: int
    is_ready: bool | None
    #: Id and name of each task, the oldest first.
    tasks: tuple[tuple[str, str], ...]

    @property
    def is_by_living(self) -> bool:
        return identities.start_time_ticks(self.pid) == self.start_time_ticks


class RunFolder:
    """The run folder of one worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        #: By file name: what tells one content from another, and what it said; None: not to be understood.
        self._read: dict[str, tuple[tuple[int, int, int], _Told | None]] = {}

    def activity(self) -> Activity:
        """What the worker says now, of the processes that live."""
        told = [one for one in self._files() if one.is_by_living]
        if not told:
            return UNKNOWN_ACTIVITY
        tasks = [task for one in told for task in one.tasks]
        ready = [one.is_ready for one in told if one.is_ready is not None]
        task_id, task_name = tasks[0] if tasks else ("", "")
        return Activity(bool(tasks), task_id, task_name, any(ready) if ready else None)

    def _files(self) -> list[_Told]:
        try:
            entries = [entry for entry in os.scandir(self._path) if entry.name.startswith("activity.")]
        except OSError:
            return []
        found: list[_Told] = []
        seen: dict[str, tuple[tuple[int, int, int], _Told | None]] = {}
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.endswith(".json"):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._read.get(entry.name)
            told = known[1] if known is not None and known[0] == version else _parsed(Path(entry.path))
            seen[entry.name] = (version, told)
            if told is not None:
                found.append(told)
        self._read = seen
        return found


def _parsed(path: Path) -> _Told | None:
    """None: a worker wrote what cannot be understood, which is as good as nothing."""
    try:
        if path.stat().st_size > _BYTES_MAX:
            return None
        document = json.loads(path.read_bytes())
        if document["version"] != _VERSION:
            return None
        tasks = sorted(document["tasks"], key=lambda task: float(task.get("since", 0.0)))
        ready = document.get("is_ready")
        return _Told(
            int(document["pid"]),
            int(document["start_time_ticks"]),
            ready if isinstance(ready, bool) else None,
            tuple((str(task["id"]), str(task.get("name", ""))) for task in tasks),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
