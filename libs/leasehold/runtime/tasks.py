"""Background tasks whose failure ends the service: none may die while the rest lives on without it."""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from leasehold.core import errors
from leasehold.observe import logs

_log = logs.get_logger(__name__)


class BackgroundTasks:
    """The tasks that a service keeps running. One that fails is logged with its traceback and sets `failed`.

    Unlike ``asyncio.TaskGroup`` it does not cancel the block that it surrounds: the service sees `failed`,
    drains as on a signal, and `raise_failure` (or the end of the ``async with``) raises the first failure, so
    that the process ends with a non-zero code.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: BaseException | None = None
        self._is_closing = False
        self.failed = asyncio.Event()

    def start(
        self, coroutine: Coroutine[Any, Any, Any], *, name: str, may_end: bool = False
    ) -> asyncio.Task[Any]:
        """Run a coroutine in the background. Without `may_end`, to return is a failure too: loops run for ever.

        A reference is kept: asyncio alone would let a task be garbage-collected while it runs.
        """
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended if may_end else self._ended_for_ever)
        return task

    def raise_failure(self) -> None:
        """Raise the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Cancel what still runs and wait for it. A task that fails while it is cancelled counts as failed."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if error is None:
            self.raise_failure()

    def _ended_for_ever(self, task: asyncio.Task[Any]) -> None:
        self._ended(task)
        if self._is_closing or task.cancelled() or task.exception() is not None:
            return
        self._fail(task, errors.LeaseholdError(f"background task {task.get_name()} ended by itself"))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._fail(task, failure)

    def _fail(self, task: asyncio.Task[Any], failure: BaseException) -> None:
        _log.error("background_task_failed", task=task.get_name(), exc_info=failure)
        if self._failure is None:
            self._failure = failure
        self.failed.set()
