"""An executor whose width is this worker's share of a slots dimension."""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from leasehold.client import engine as engines
from leasehold.core import errors
from leasehold.core.budget import limiter as limiters

P = ParamSpec("P")
T = TypeVar("T")

#: A thread that found no task for so long ends.
_IDLE_SECONDS: Final = 5.0


@dataclass(slots=True, eq=False)
class _Task:
    future: futures.Future[Any]
    run: Callable[[], Any]
    shape: limiters.Shape | None = None


class BudgetExecutor(futures.Executor):
    """Runs tasks in threads, in the order of submission, at most as many at a time as slots are owned.

    A task takes a slot when it starts and gives it back when it ends. When the share shrinks, running tasks go
    on to their end and no more start until the width fits. Waiting tasks are activity. A lease that is lost
    starts nothing; the tasks wait. Tasks submitted before a fork are the parent's.
    """

    def __init__(self, engine: engines.Engine, dimension: str) -> None:
        self._engine = engine
        self._dimension = dimension
        self._pid = os.getpid()
        self._condition = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._ready: deque[_Task] = deque()
        self._running = 0
        self._idle = 0
        self._is_shut = False
        self._numbers = itertools.count(1)
        engine.set_backlog(dimension, 0)
        engine.add_listener(self._dispatch)

    @property
    def width(self) -> int:
        """How many tasks may run at a time now."""
        return int(self._engine.allocation().amounts.get(self._dimension, 0.0))

    @property
    def queued(self) -> int:
        """How many tasks wait for a slot."""
        return len(self._waiting)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> futures.Future[T]:
        """Queue a call. Its future can be cancelled until it starts.

        Raises `InvalidArgument` if the budget has no such dimension, `FailedPrecondition` after `shutdown`.
        """
        if os.getpid() != self._pid:
            raise errors.FailedPrecondition("the executor was made before a fork; make another in the child")
        future: futures.Future[T] = futures.Future()
        with self._condition:
            if self._is_shut:
                raise errors.FailedPrecondition("the executor is shut down")
            self._engine.set_backlog(self._dimension, len(self._waiting) + 1)
            self._waiting.append(_Task(future, lambda: fn(*args, **kwargs)))
        self._dispatch()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; `wait` for those there are, which `cancel_futures` limits to the running ones."""
        cancelled: list[_Task] = []
        with self._condition:
            self._is_shut = True
            if cancel_futures:
                cancelled = list(self._waiting)
                self._waiting.clear()
                self._note_backlog()
        # Without the lock: what waits for these futures runs code of the user.
        for task in cancelled:
            task.future.cancel()
        with self._condition:
            self._condition.notify_all()
            while wait and (self._waiting or self._running):
                self._condition.wait()

    def _dispatch(self) -> None:
        """Start what slots allow. Called after each submission, end of a task, and change of allocation."""
        failed: list[_Task] = []
        error: errors.LeaseholdError | None = None
        with self._condition:
            while self._waiting:
                if self._waiting[0].future.cancelled():
                    self._waiting.popleft()
                    continue
                try:
                    shape = self._engine.try_take_slot(self._dimension)
                except errors.LeaseholdError as refusal:
                    failed, error = list(self._waiting), refusal
                    self._waiting.clear()
                    break
                if shape is None:
                    break
                task = self._waiting.popleft()
                task.shape = shape
                self._running += 1
                self._ready.append(task)
                if self._idle >= len(self._ready):
                    self._condition.notify()
                else:
                    name = f"leasehold-{self._engine.budget}-{next(self._numbers)}"
                    threading.Thread(target=self._work, name=name, daemon=True).start()
            self._note_backlog()
            self._condition.notify_all()
        # Without the lock: what waits for these futures runs code of the user.
        for task in failed:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(error)

    def _note_backlog(self) -> None:
        if not self._waiting or not (self._engine.is_closed or self._engine.holder.end):
            self._engine.set_backlog(self._dimension, len(self._waiting))

    def _work(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                has_task = self._condition.wait_for(lambda: bool(self._ready), _IDLE_SECONDS)
                self._idle -= 1
                if not has_task:
                    return
                task = self._ready.popleft()
            self._run(task)
            with self._condition:
                self._running -= 1
            self._dispatch()

    def _run(self, task: _Task) -> None:
        assert task.shape is not None
        try:
            if task.future.set_running_or_notify_cancel():
                try:
                    result = task.run()
                except BaseException as error:  # noqa: BLE001  whatever the task raises belongs to its future
                    task.future.set_exception(error)
                else:
                    task.future.set_result(result)
        finally:
            self._engine.return_slot(self._dimension, task.shape)
