"""Celery tasks that keep to a shared budget: admitted before their body, settled after it.

::

    @app.task
    @celery.budgeted("llm-api", tokens=lambda prompt: 2 * len(prompt))
    def ask(prompt):
        answer = provider.ask(prompt)
        celery.current_permit().settle(tokens=answer.usage.total_tokens)
        return answer.text
"""

import contextlib
import contextvars
import functools
import inspect
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, ParamSpec, TypeVar, cast

import celery
from celery import exceptions, signals
from leasehold.client import budgets, clients, permits
from leasehold.core import errors
from leasehold.observe import logs

P = ParamSpec("P")
R = TypeVar("R")

#: A message header: when its task was first put off, wall clock.
WAITING_SINCE_HEADER: Final = "leasehold_waiting_since"
WAIT_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 30.0

_log = logs.get_logger(__name__)
_permit: contextvars.ContextVar[permits.Permit] = contextvars.ContextVar("leasehold_permit")
_lock = threading.Lock()
_clients: dict[tuple[Any, ...], clients.Client] = {}

#: A number, or what tells it from the task's own arguments.
Amount = float | Callable[..., float | None] | None


def current_permit() -> permits.Permit:
    """The permit of the task that runs: to settle, to refund, to know how long it may take.

    Raises `FailedPrecondition` outside of a budgeted task.
    """
    try:
        return _permit.get()
    except LookupError:
        raise errors.FailedPrecondition("no budgeted task runs here") from None


def budgeted(
    budget: str,
    *,
    requests: Amount = 1,
    tokens: Amount = None,
    costs: Mapping[str, float] | None = None,
    wait_seconds: float = WAIT_SECONDS,
    retry_seconds: float = RETRY_SECONDS,
    give_up_seconds: float | None = None,
    addresses: str | Sequence[str] | None = None,
    worker_id: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a task's body only while the budget admits it. Stands below ``@app.task``.

    `requests`, `tokens` and `costs` are as of `Budget.acquire`; the first two may be functions of the task's
    arguments (without ``self`` of a bound task). What the body does not settle (see `current_permit`) counts as
    reserved.

    The worker waits for admission up to `wait_seconds`. A task that was not admitted by then is put off: it
    is queued again with an ETA of `retry_seconds`, more or less (half to one and a half, so that they do not
    all come back together), under the same id, without using up one of its retries; the worker is free. After
    `give_up_seconds` since it was first put off, it fails with `DeadlineExceeded`; None: never. A task that
    is called as a function, or eagerly, raises at once.

    The process joins the budget with its first task, under its worker's name and its own PID. `addresses` and
    `worker_id` are as of `connect_blocking`. Raises `InvalidArgument` for a wrong number of seconds.
    """
    for name, seconds in (("wait_seconds", wait_seconds), ("retry_seconds", retry_seconds)):
        if not 0 <= seconds < float("inf"):
            raise errors.InvalidArgument(f"{name}: {seconds!r} is not a number of seconds", field=name)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        is_bound = next(iter(signature.parameters), "") == "self"

        @functools.wraps(function)
        def admitted(*args: P.args, **kwargs: P.kwargs) -> R:
            own = args[1:] if is_bound else args
            permit = _budget(budget, addresses, worker_id).acquire(
                requests=cast(float, _amount(requests, own, kwargs)),
                tokens=_amount(tokens, own, kwargs),
                timeout_seconds=wait_seconds,
                costs=costs,
            )
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(permit)
                except errors.DeadlineExceeded as error:
                    put_off(error, retry_seconds, give_up_seconds)
                token = _permit.set(permit)
                stack.callback(_permit.reset, token)
                return function(*args, **kwargs)

        # Celery looks at the arguments of what it is given, not at what is wrapped.
        admitted.__signature__ = signature  # type: ignore[attr-defined]
        return admitted

    return decorate


def _amount(amount: Amount, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    return amount(*args, **kwargs) if callable(amount) else amount


def put_off(error: errors.LeaseholdError, retry_seconds: float, give_up_seconds: float | None) -> None:
    """Queue the running task again, and leave it; raises `error` where that cannot be, or was long enough."""
    task = celery.current_task
    request = task.request if task else None
    if request is None or request.called_directly or request.is_eager:
        raise error
    now = time.time()
    headers = dict(request.headers or {})
    since = float(headers.setdefault(WAITING_SINCE_HEADER, now))
    if give_up_seconds is not None and now - since >= give_up_seconds:
        raise error
    countdown = retry_seconds * random.uniform(0.5, 1.5)  # noqa: S311  jitter, not a secret
    # Not Task.retry: that counts towards max_retries, and being put off is no failure of the task.
    again = task.signature_from_request(request, countdown=countdown, retries=request.retries, headers=headers)
    try:
        again.apply_async()
    except Exception as cause:
        raise exceptions.Reject(cause, requeue=True) from cause
    _log.info("task_put_off", task_id=request.id, task=task.name, countdown_seconds=round(countdown, 1))
    raise exceptions.Retry(exc=error, when=countdown, sig=again) from error


def _budget(name: str, addresses: str | Sequence[str] | None, worker_id: str | None) -> budgets.Budget:
    # One client is enough for a process and its forks: what was made before a fork begins anew in the child.
    key = (addresses if addresses is None or isinstance(addresses, str) else tuple(addresses), worker_id)
    with _lock:
        client = _clients.get(key)
        if client is None:
            client = _clients[key] = clients.connect_blocking(addresses, worker_id=worker_id)
        return client.budget(name)


def _begin(**_: Any) -> None:
    # The parent's lock may have been held when this child was forked.
    global _lock
    _lock = threading.Lock()


def _leave(**_: Any) -> None:
    """A pool's child ends past `atexit`: its leases are given back here, in a bounded time."""
    while _clients:
        _clients.popitem()[1].close()


signals.worker_process_init.connect(_begin, weak=False)
signals.worker_process_shutdown.connect(_leave, weak=False)
