"""Allocations as users hold them, in a block: for threads, and for asyncio."""

import asyncio
import ctypes
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent import futures
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from leasehold.core import errors
from leasehold.core.job import model
from leasehold.observe import logs

if TYPE_CHECKING:
    from leasehold.client import job_holding

_log = logs.get_logger(__name__)

#: Makes the holding, whose loss calls the function.
Make = Callable[[Callable[[], None]], "job_holding.Holding"]


class _BaseAllocation:
    def __init__(self, make: Make, on_lapse: Callable[[], None] | None) -> None:
        self._make = make
        self._on_lapse = on_lapse
        self._holding: job_holding.Holding | None = None
        self._ref: model.AttemptRef | None = None

    @property
    def job_id(self) -> str:
        """Of the job that stands for it. Raises `FailedPrecondition` before the block."""
        return self._entered()[1].job_id

    @property
    def attempt(self) -> int:
        """With the job's id, the token of the allocation."""
        return self._entered()[1].attempt

    @property
    def node(self) -> str:
        """Whose CPUs and memory these are."""
        return self._entered()[0].node

    @property
    def is_held(self) -> bool:
        """Whether the work may go on."""
        return self._holding is not None and self._ref is not None and self._holding.failure is None

    def check(self) -> None:
        """Raise `AllocationLapsed` if the work must stop; for loops, before each step that matters."""
        holding, _ = self._entered()
        if holding.failure is not None:
            raise holding.failure

    def _entered(self) -> tuple["job_holding.Holding", model.AttemptRef]:
        if self._holding is None or self._ref is None:
            raise errors.FailedPrecondition("the allocation is used before its block is entered")
        return self._holding, self._ref

    def _begin(self) -> "job_holding.Holding":
        if self._holding is not None:
            raise errors.FailedPrecondition("an allocation is entered once; make another one")
        self._holding = self._make(self._lost)
        return self._holding

    def _lost(self) -> None:
        if self._on_lapse is not None:
            try:
                self._on_lapse()
            except Exception:  # noqa: BLE001  the user's own fault: the work is interrupted all the same
                _log.exception("on_lapse_failed")
        self._interrupt()

    def _interrupt(self) -> None:
        """Stop the work; called on the I/O thread."""


def _detail(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


class Allocation(_BaseAllocation):
    """CPUs and memory of a node while a block runs: ``with jobs.allocation(cpus=2, memory_gb=4) as held: ...``.

    It is renewed in the background. If it lapses, or its job is cancelled, `on_lapse` is called on another
    thread (end child processes there), and `AllocationLapsed` is raised in the block once its thread runs
    Python code again: a call into C is not interrupted.
    """

    def __init__(
        self,
        make: Make,
        on_lapse: Callable[[], None] | None,
        run: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        super().__init__(make, on_lapse)
        self._run = run
        self._lock = threading.Lock()
        #: Whom to interrupt; None: outside of the block.
        self._thread_id: int | None = None
        self._is_interrupted = False

    def __enter__(self) -> Self:
        """Wait for room. Raises `NotPlaced` if there is none in time, and what the leader answers."""
        holding = self._begin()
        self._run(holding.begin())
        self._ref = holding.ref
        with self._lock:  # what is lost from now on interrupts this thread
            if holding.failure is None:
                self._thread_id = threading.get_ident()
                return self
        raise holding.failure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            thread_id, self._thread_id = self._thread_id, None
            if self._is_interrupted and thread_id is not None and kind is not errors.AllocationLapsed:
                _raise_in(thread_id, None)  # it has not been raised yet
        holding, _ = self._entered()
        self._run(holding.end(is_failed=error is not None, detail=_detail(error)))
        if holding.failure is not None and (error is None or kind is errors.AllocationLapsed):
            raise holding.failure from None

    def _interrupt(self) -> None:
        with self._lock:
            if self._thread_id is not None:
                self._is_interrupted = True
                _raise_in(self._thread_id, errors.AllocationLapsed)


def _raise_in(thread_id: int, kind: type[BaseException] | None) -> None:
    """Raise in another thread when it next runs Python code; None takes that back."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), raised)


class AsyncAllocation(_BaseAllocation):
    """The same for asyncio: ``async with jobs.allocation(cpus=2, memory_gb=4) as held: ...``.

    If it lapses, the task that entered the block is cancelled, and the block raises `AllocationLapsed`.
    """

    def __init__(
        self,
        make: Make,
        on_lapse: Callable[[], None] | None,
        run: Callable[[Coroutine[Any, Any, None]], Awaitable[None]],
    ) -> None:
        super().__init__(make, on_lapse)
        self._run = run
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_cancelling = False

    async def __aenter__(self) -> Self:
        """As of `Allocation`; a task that is cancelled while it waits holds nothing."""
        holding = self._begin()
        self._loop = asyncio.get_running_loop()
        await self._run(holding.begin())
        self._ref = holding.ref
        self._task = asyncio.current_task()
        if holding.failure is not None:
            self._cancel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        holding, _ = self._entered()
        is_others = False
        if self._is_cancelling and task is not None:
            is_others = task.uncancel() > 0
        end = asyncio.ensure_future(self._run(holding.end(is_failed=error is not None, detail=_detail(error))))
        try:
            await asyncio.shield(end)
        except asyncio.CancelledError:
            # Ours, if the block ended before it arrived; somebody else's is passed on, once all is given back.
            await end
            if not self._is_cancelling or is_others:
                raise
        is_ours = kind is None or (kind is asyncio.CancelledError and self._is_cancelling and not is_others)
        if holding.failure is not None and is_ours:
            raise holding.failure from None

    def _interrupt(self) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:  # the loop is closed, and the work with it
            return

    def _cancel(self) -> None:
        if self._task is not None and not self._is_cancelling:
            self._is_cancelling = True
            self._task.cancel("the allocation lapsed")


def result_of(future: "futures.Future[Any]") -> Any:
    """Its result; a caller that is interrupted cancels it."""
    try:
        return future.result()
    except futures.CancelledError:
        raise
    except BaseException:
        future.cancel()
        raise
