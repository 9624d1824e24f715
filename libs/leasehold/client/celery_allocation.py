"""Celery tasks that hold CPUs and memory while they run, and are put off where there is no room.

::

    @app.task
    @celery.allocated(cpus=2, memory_gb=4)
    def transcribe(path):
        ...
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from leasehold.client import celery_budget, job_tasks
from leasehold.core import errors

P = ParamSpec("P")
R = TypeVar("R")


def allocated(
    *,
    cpus: int,
    memory_gb: float | None = None,
    memory: str | int | None = None,
    wait_seconds: float = celery_budget.WAIT_SECONDS,
    retry_seconds: float = celery_budget.RETRY_SECONDS,
    give_up_seconds: float | None = None,
    on_lapse: Callable[[], None] | None = None,
    addresses: str | Sequence[str] | None = None,
    **more: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a task's body only while it has CPUs and memory of a node. Stands below ``@app.task``.

    As `leasehold.client.allocated`; but a task that is not placed within `wait_seconds` is put off, as one of
    `budgeted` is: queued again with an ETA of `retry_seconds`, more or less, and failing with `NotPlaced` after
    `give_up_seconds` (None: never). Where it is called as a function, or eagerly, it raises at once.
    """
    for name, seconds in (("wait_seconds", wait_seconds), ("retry_seconds", retry_seconds)):
        if not 0 <= seconds < float("inf"):
            raise errors.InvalidArgument(f"{name}: {seconds!r} is not a number of seconds", field=name)
    held = job_tasks.allocated(
        cpus=cpus,
        memory_gb=memory_gb,
        memory=memory,
        wait_seconds=wait_seconds,
        on_lapse=on_lapse,
        addresses=addresses,
        **more,
    )

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        allocating = held(function)

        @functools.wraps(function)
        def placed(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return allocating(*args, **kwargs)
            except errors.NotPlaced as error:
                celery_budget.put_off(error, retry_seconds, give_up_seconds)
                raise

        # Celery looks at the arguments of what it is given, not at what is wrapped.
        placed.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return placed

    return decorate
