"""Tells the node agent which task a Celery worker runs. Importing this module is enough: ``--include`` does it.

The agent gives each worker a folder, ``LEASEHOLD_RUN_DIR``. Every process of the worker keeps one file there,
``activity.PID.json``, replaced whole by rename::

    {"version": 1, "pid": 4711, "start_time_ticks": 123, "is_ready": true,
     "tasks": [{"id": "...", "name": "...", "queue": "...", "since": 1750000000.0}]}

The main process writes one when it is ready, a pool's child before and after each task. A worker is busy while
the file of a living process of it has a task. Started by anybody else than the agent, nothing is written. A
failure to write never harms a task: the file is taken away then, so that the agent knows nothing, not something
that is wrong.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from typing import Any, Final

from celery import signals
from leasehold.observe import logs
from leasehold.runtime import identity

RUN_DIR_VARIABLE: Final = "LEASEHOLD_RUN_DIR"
VERSION: Final = 1

_log = logs.get_logger(__name__)


class Activity:
    """What this process does, and its file. Safe to use from any thread, and after a fork."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._ticks: int | None = None
        self._tasks: dict[str, dict[str, Any]] = {}
        self._is_ready = False
        self._is_told = False

    def ready(self, is_ready: bool) -> None:
        """The worker takes tasks now, or no more."""
        with self._mine():
            self._is_ready = is_ready
            self._write()

    def began(self, task_id: str, name: str, queue: str) -> None:
        """A task runs in this process."""
        with self._mine():
            self._tasks[task_id] = {"id": task_id, "name": name, "queue": queue, "since": time.time()}
            self._write()

    def ended(self, task_id: str) -> None:
        """A task is over, however it went."""
        with self._mine():
            self._tasks.pop(task_id, None)
            self._write()

    def leave(self, pid: int | None = None) -> None:
        """A process ends (this one, where none is given): its file goes."""
        with contextlib.suppress(OSError):
            self._path(pid or os.getpid()).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _mine(self) -> Any:
        if self._pid != os.getpid():
            self._begin()  # in the child of a fork nothing of this is true, and the lock may be held for ever
        with self._lock:
            yield

    def _write(self) -> None:
        try:
            if self._ticks is None:
                self._ticks = identity.start_time_ticks(self._pid)
            document = {
                "version": VERSION,
                "pid": self._pid,
                "start_time_ticks": self._ticks,
                "is_ready": self._is_ready,
                "tasks": list(self._tasks.values()),
            }
            path = self._path(self._pid)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document), "utf-8")
            part.replace(path)
        except Exception as error:  # noqa: BLE001  whatever it is, the task goes on
            self.leave(self._pid)
            if not self._is_told:
                self._is_told = True
                _log.warning("activity_unwritten", folder=str(self._folder), error=str(error))

    def _path(self, pid: int) -> pathlib.Path:
        return self._folder / f"activity.{pid}.json"


def _of_environment() -> Activity | None:
    folder = os.environ.get(RUN_DIR_VARIABLE, "")
    return Activity(pathlib.Path(folder)) if folder else None


_activity: Final = _of_environment()


def _ready(**_: Any) -> None:
    if _activity is not None:
        _activity.ready(True)


def _shutting_down(**_: Any) -> None:
    # Runs in a signal handler of the main process, which may have been inside of `_write`: no lock is taken
    # here.
    if _activity is not None:
        _activity.leave()


def _began(task_id: Any = None, task: Any = None, **_: Any) -> None:
    if _activity is not None:
        delivery = getattr(getattr(task, "request", None), "delivery_info", None) or {}
        _activity.began(str(task_id), str(getattr(task, "name", "")), str(delivery.get("routing_key") or ""))


def _ended(task_id: Any = None, **_: Any) -> None:
    if _activity is not None:
        _activity.ended(str(task_id))


def _child_ended(pid: int | None = None, **_: Any) -> None:
    if _activity is not None:
        _activity.leave(pid)


def install() -> None:
    """Listen to Celery's signals. Importing this module did it; a second time does nothing."""
    for signal, receiver in (
        (signals.worker_ready, _ready),
        (signals.worker_shutting_down, _shutting_down),
        (signals.task_prerun, _began),
        (signals.task_postrun, _ended),
        (signals.worker_process_shutdown, _child_ended),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"leasehold.{receiver.__name__}")


install()
