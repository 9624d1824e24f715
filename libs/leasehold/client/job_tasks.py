"""Functions that hold an allocation while they run: RQ jobs, Celery tasks, anything.

::

    @client.allocated(cpus=2, memory_gb=4, wait_seconds=600)
    def transcribe(path):
        ...

For Celery, `leasehold.client.celery.allocated` puts a task off that is not placed in time.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, ParamSpec, TypeVar, cast

from leasehold.client import environment, job_allocations, jobs, runtime
from leasehold.core import errors

P = ParamSpec("P")
R = TypeVar("R")

WAIT_SECONDS: Final = 30.0

_allocation: contextvars.ContextVar[job_allocations.Allocation | job_allocations.AsyncAllocation] = (
    contextvars.ContextVar("leasehold_allocation")
)
_faces: dict[tuple[type, tuple[str, ...]], Any] = {}


def current_allocation() -> job_allocations.Allocation | job_allocations.AsyncAllocation:
    """The allocation of the function that runs: its node, and whether it is still held.

    Raises `FailedPrecondition` outside of an `allocated` function.
    """
    try:
        return _allocation.get()
    except LookupError:
        raise errors.FailedPrecondition("no function with an allocation runs here") from None


def allocated(
    *,
    cpus: int,
    memory_gb: float | None = None,
    memory: str | int | None = None,
    wait_seconds: float = WAIT_SECONDS,
    on_lapse: Callable[[], None] | None = None,
    addresses: str | Sequence[str] | None = None,
    **more: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a function, or a coroutine function, only while it has CPUs and memory of a node.

    Each call waits up to `wait_seconds` in the line of all jobs, then raises `NotPlaced`. Where the allocation
    lapses, the function is interrupted: see `job_allocations.Allocation`. `addresses` are as of `connect`; the
    rest is as of `Jobs.allocation`. Raises `InvalidArgument` for what can never be right.
    """
    given = {"cpus": cpus, "memory_gb": memory_gb, "memory": memory, "wait_seconds": wait_seconds, **more}
    # What is wrong is told where it is written, not by the first task.
    jobs.Jobs(runtime.Endpoint(environment.addresses(addresses))).allocation(**cast(Any, given))

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def held_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                face: jobs.AsyncJobs = _face(jobs.AsyncJobs, addresses)
                async with face.allocation(on_lapse=on_lapse, **cast(Any, given)) as allocation:
                    with _current(allocation):
                        return await function(*args, **kwargs)

            held = cast(Callable[P, R], held_async)
        else:

            @functools.wraps(function)
            def held_here(*args: P.args, **kwargs: P.kwargs) -> R:
                face: jobs.Jobs = _face(jobs.Jobs, addresses)
                with face.allocation(on_lapse=on_lapse, **cast(Any, given)) as allocation, _current(allocation):
                    return function(*args, **kwargs)

            held = held_here
        # Task queues look at the arguments of what they are given, not at what is wrapped.
        held.__signature__ = signature  # type: ignore[attr-defined]
        return held

    return decorate


@contextlib.contextmanager
def _current(allocation: job_allocations.Allocation | job_allocations.AsyncAllocation) -> Any:
    token = _allocation.set(allocation)
    try:
        yield
    finally:
        _allocation.reset(token)


def _face(kind: type, addresses: str | Sequence[str] | None) -> Any:
    """One for the process and its forks, kept until it ends."""
    endpoint = runtime.Endpoint(environment.addresses(addresses))
    with runtime.PROCESS.lock:  # which a fork holds: a child never finds it taken
        face = _faces.get((kind, endpoint.addresses))
        if face is None:
            face = _faces[kind, endpoint.addresses] = kind(endpoint)
        return face
