"""Permits: what an acquire gives, in the form of a context manager.

The short path of `Limiter` is walked here, inline: an admission costs two lock round trips and a clock reading.
"""

import asyncio
import math
import operator
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from leasehold.client import engine as engines
from leasehold.client import gates
from leasehold.core import errors
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import quantity
from leasehold.observe import logs

_log = logs.get_logger(__name__)

# What `_window` says besides the number of the short path's opening in which the permit was admitted.
_NEW_WITH_COSTS: Final = -4
_NEW: Final = -3
_OVER: Final = -2
_EXACT: Final = limiters.EXACT


AnyPermit = TypeVar("AnyPermit", bound="BasePermit")


@dataclass(slots=True)
class _Exact:
    """What a permit needs to end on the exact path."""

    shape: limiters.Shape
    admitted_at: float
    cost: limiters.Cost
    #: Of the short path that it came through; `EXACT` if it did not.
    window: int
    #: What was really used, micro-units by dimension; as reserved where left out.
    actual: dict[str, int] = field(default_factory=dict)


class BasePermit:
    """One admitted request of a budget, from reserving to giving back. For one task or thread at a time.

    Reserved at entry: `requests` units of ``rpm_limit``, `tokens` of ``tpm_limit``, one unit of each
    concurrency dimension, and `costs` by dimension; all of them, or none. At exit the concurrency units
    come back; of the rate units what `settle` says was not used. Without `settle`, all that was reserved counts
    as used, also when the body raises: the provider may have counted it.
    """

    # Few, for each costs time at the birth and the death of every permit.
    __slots__ = ("_engine", "_exact", "_limiter", "_options", "_requests", "_tokens", "_used", "_window")

    _engine: engines.Engine
    # Costs of other dimensions, and the timeout; None where neither was given.
    _options: tuple[Mapping[str, float] | None, float | None] | None
    _window: int
    _limiter: limiters.Limiter
    _exact: _Exact
    # What the user gave, ints on the short path and checked on the exact one.
    _requests: Any
    _tokens: Any
    # Tokens used: as reserved, until settled.
    _used: Any

    # Entering and leaving

    def set_options(self, costs: Mapping[str, float] | None, timeout_seconds: float | None) -> None:
        """Costs of other dimensions, and how long entering may take. Raises `InvalidArgument`."""
        self._options = costs, checked_timeout(timeout_seconds)
        if costs is not None:
            self._window = _NEW_WITH_COSTS

    def _enter_short(self) -> bool:
        """Try the limiter's short path; False: nothing was done, take the exact one.

        Under the lock nothing is called: the interpreter switches threads at calls, and a thread that is
        switched away while it holds the lock makes all others queue for it. So the clock is read before; a
        stop in between is as one between admission and sending, which `arrival_jitter_seconds` is for.
        """
        engine = self._engine
        requests = self._requests
        tokens = self._tokens
        if tokens.__class__ is not int or requests.__class__ is not int or self._window != _NEW:
            return False
        clock = engine.now
        now = clock()
        with engine.lock:
            limiter = engine.limiter
            if (
                now < limiter.fast_until
                and requests >= 0
                and requests <= limiter.fast_requests
                and tokens >= 0
                and tokens <= limiter.fast_tokens
                and tokens <= limiter.token_bound
                and limiter.fast_calls > 0
            ):
                limiter.fast_requests -= requests
                limiter.fast_tokens -= tokens
                limiter.fast_calls -= 1
                self._window = limiter.window
                self._limiter = limiter
                return True
        return False

    def _exit_short(self) -> bool:
        """Undo the short path's counters if its opening is still the same; False: take the exact path."""
        limiter = self._limiter
        with self._engine.lock:
            if limiter.window != self._window:
                return False
            limiter.fast_calls += 1
            limiter.fast_tokens += self._tokens - self._used
            self._window = _OVER
        return True

    def _take_default(self) -> bool:
        """Try the short path with the tokens that the budget supposes where none are given."""
        default = self._engine.limiter.token_default
        if default < 0:
            return False
        self._tokens = self._used = default
        if self._enter_short():
            return True
        self._tokens = self._used = None
        return False

    def try_enter(self) -> bool:
        """Admit now or never, for `try_acquire`."""
        if self._enter_short() or (self._tokens is None and self._take_default()):
            return True
        ticket = self._engine.try_submit(self._request())
        if ticket is None:
            return False
        self._bind(ticket)
        return True

    def _request(self) -> engines.Request:
        """What is asked for, checked as far as it can be without the budget's terms."""
        requests, tokens = _plain(self._requests, "requests"), self._tokens
        quantity.to_micros(requests, field="requests")
        if tokens is not None:
            tokens = _plain(tokens, "tokens")
            quantity.to_micros(tokens, field="tokens")
        given = (self._options[0] if self._options else None) or {}
        costs = {name: _plain(units, name) for name, units in given.items()}
        for name, units in costs.items():
            quantity.to_micros(units, field=name)
        return engines.Request(requests, tokens, costs)

    def _bind(self, ticket: engines.Ticket) -> None:
        """Take over what an admitted ticket holds."""
        waiter = ticket.waiter
        assert waiter is not None and waiter.admitted_at is not None and ticket.shape is not None
        self._limiter = ticket.limiter
        self._exact = _Exact(ticket.shape, waiter.admitted_at, waiter.cost, _EXACT)
        self._window = _EXACT

    def _to_exact(self) -> _Exact:
        """From now on a permit of the exact path, as if it had been admitted there."""
        window = self._window
        if window >= 0:
            opening = self._engine.opening(self._limiter, window)
            cost = opening.shape.short_cost(self._requests, self._tokens)
            self._exact = _Exact(opening.shape, opening.opened_at, cost, window)
            if self._used != self._tokens:
                self._exact.actual[limiters.TOKENS] = self._used * quantity.MICRO
            self._window = _EXACT
        return self._exact

    def _exit_exact(self) -> None:
        if self._window == _OVER:
            return
        exact, overdue_seconds = self._to_exact(), -self.remaining_seconds
        self._window = _OVER
        self._engine.release(
            self._limiter, exact.shape, exact.cost, exact.actual, exact.admitted_at, exact.window
        )
        if overdue_seconds > 0:
            _log.warning(
                "call_overdue",
                budget=self._engine.budget,
                max_call_seconds=exact.shape.terms.max_call_seconds,
                overdue_seconds=round(overdue_seconds, 3),
            )

    # The user's word

    def settle(
        self,
        tokens: Any = None,
        requests: float | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        """Say what was really used, units; takes effect at exit, and the last word counts.

        What is left out counts as reserved. Less gives the rest back at once. More makes a debt, which is paid
        before this worker admits again and is told as overdraft: the sum of what is *reserved* is what stays
        within the limit. Raises `InvalidArgument` for a wrong number or dimension, `FailedPrecondition` after
        exit.
        """
        if (
            self._window >= 0
            and tokens.__class__ is int
            and tokens >= 0
            and tokens <= self._tokens
            and requests is None
            and costs is None
        ):
            self._used = tokens
        else:
            self._settle_exact(tokens, requests, costs)

    def _settle_exact(
        self, tokens: float | None, requests: float | None, costs: Mapping[str, float] | None
    ) -> None:
        if self._window <= _OVER:
            when = "after it was over" if self._window == _OVER else "before it was entered"
            raise errors.FailedPrecondition(f"a permit was settled {when}")
        given: dict[str, float] = dict(costs or {})
        if tokens is not None:
            given[limiters.TOKENS] = tokens
        if requests is not None:
            given[limiters.REQUESTS] = requests
        exact = self._to_exact()
        actual = {}
        for name, units in given.items():
            where = {limiters.TOKENS: "tokens", limiters.REQUESTS: "requests"}.get(name, name)
            if name not in exact.shape.stocks:
                raise errors.InvalidArgument(f"{where}: this budget has no dimension {name[:63]}", field=where)
            actual[name] = quantity.to_micros(_plain(units, where), field=where)
        exact.actual.update(actual)

    def refund(self) -> None:
        """The request was never sent: nothing of it was used. Raises `FailedPrecondition` after exit."""
        if self._window <= _OVER:
            self._settle_exact(None, None, None)
        exact = self._to_exact()
        exact.actual = dict.fromkeys(exact.shape.stocks, 0)

    @property
    def remaining_seconds(self) -> float:
        """Until this call must have ended (the budget's ``max_call_seconds``); negative when it is overdue.

        Infinity before it was entered, 0 when it is over.
        """
        if self._window <= _OVER:
            return math.inf if self._window != _OVER else 0.0
        if self._window >= 0:
            opening = self._engine.opening(self._limiter, self._window)
            admitted_at, terms = opening.opened_at, opening.shape.terms
        else:
            admitted_at, terms = self._exact.admitted_at, self._exact.shape.terms
        return admitted_at + terms.max_call_seconds - self._engine.now()


class Permit(BasePermit):
    """A permit for threads: ``with budget.acquire(tokens=1200) as permit: ...``.

    A thread cannot be stopped from outside: a body that outlasts ``max_call_seconds`` is told in the log
    when it ends; use `remaining_seconds` as the timeout of what it calls.
    """

    __slots__ = ()

    def __enter__(self) -> Self:
        # `_enter_short`, once more: a call less is a tenth of an admission.
        engine = self._engine
        requests = self._requests
        tokens = self._tokens
        if tokens.__class__ is int and requests.__class__ is int and self._window == -3:  # _NEW
            clock = engine.now
            now = clock()
            with engine.lock:
                limiter = engine.limiter
                if (
                    now < limiter.fast_until
                    and requests >= 0
                    and requests <= limiter.fast_requests
                    and tokens >= 0
                    and tokens <= limiter.fast_tokens
                    and tokens <= limiter.token_bound
                    and limiter.fast_calls > 0
                ):
                    limiter.fast_requests -= requests
                    limiter.fast_tokens -= tokens
                    limiter.fast_calls -= 1
                    self._window = limiter.window
                    self._limiter = limiter
                    return self
        self._enter_exact()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `_exit_short`, once more.
        limiter = self._limiter
        with self._engine.lock:
            if limiter.window == self._window:
                limiter.fast_calls += 1
                limiter.fast_tokens += self._tokens - self._used
                self._window = -2  # _OVER
                return
        self._exit_exact()

    def release(self) -> None:
        """As leaving the ``with`` block, for a permit of `try_acquire`. A second time does nothing."""
        if self._window <= _NEW:
            raise errors.FailedPrecondition("a permit was released before it was entered")
        if not self._exit_short():
            self._exit_exact()

    def _enter_exact(self) -> None:
        if self._window > _NEW:
            if self._window == _OVER:
                raise errors.FailedPrecondition("this permit is over; acquire another")
            return  # of try_acquire: admitted already
        if self._tokens is None and self._take_default():
            return
        engine, request = self._engine, self._request()
        engine.ensure_started()
        timeout_seconds = self._options[1] if self._options else None
        gate = gates.ThreadGate()
        ticket = engine.submit(request, gate)
        if not ticket.is_admitted:
            self._wait(ticket, gate, timeout_seconds)
        self._bind(ticket)

    def _wait(self, ticket: engines.Ticket, gate: gates.ThreadGate, timeout_seconds: float | None) -> None:
        engine = self._engine
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        try:
            while not engine.claim(ticket):
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise not_admitted(engine, timeout_seconds)
                gate.wait(remaining)
        except BaseException:
            engine.abandon(ticket)
            raise


class AsyncPermit(BasePermit):
    """A permit for asyncio: ``async with budget.acquire(tokens=1200) as permit: ...``.

    The body is cancelled when it outlasts ``max_call_seconds``, and the block raises `DeadlineExceeded`: the
    allocator counts a lost worker's call no longer than that.
    """

    __slots__ = ("_cancelling", "_is_overdue", "_task", "_timer")

    async def __aenter__(self) -> Self:
        if not self._enter_short():
            await self._enter_exact()
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._exit_short():
            self._exit_exact()
        # As asyncio.timeout does: a cancellation that came from elsewhere stays one.
        if self._is_overdue and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise errors.DeadlineExceeded(
                f"budget {self._engine.budget}: the call took longer than max_call_seconds allows"
            ) from error

    def release(self) -> None:
        """End a permit of `try_acquire` that was not entered. A second time does nothing."""
        if self._window <= _NEW:
            raise errors.FailedPrecondition("a permit was released before it was entered")
        if not self._exit_short():
            self._exit_exact()

    def _arm(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._task, self._cancelling, self._is_overdue = task, task.cancelling(), False
        self._timer = asyncio.get_running_loop().call_later(max(0.0, self.remaining_seconds), self._stop)

    def _stop(self) -> None:
        self._is_overdue = True
        self._task.cancel()

    async def _enter_exact(self) -> None:
        if self._window > _NEW:
            if self._window == _OVER:
                raise errors.FailedPrecondition("this permit is over; acquire another")
            return  # of try_acquire: admitted already
        if self._tokens is None and self._take_default():
            return
        engine, request = self._engine, self._request()
        engine.ensure_started()
        timeout_seconds = self._options[1] if self._options else None
        gate = gates.LoopGate()
        ticket = engine.submit(request, gate)
        if not ticket.is_admitted:
            try:
                async with asyncio.timeout(timeout_seconds):
                    while not engine.claim(ticket):
                        await gate.wait()
            except TimeoutError:
                engine.abandon(ticket)
                raise not_admitted(engine, timeout_seconds) from None
            except BaseException:
                engine.abandon(ticket)
                raise
        self._bind(ticket)


def checked_timeout(seconds: float | None) -> float | None:
    """`seconds` if it is None or a number not below 0; infinity is None. Raises `InvalidArgument`."""
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise errors.InvalidArgument(
            f"timeout_seconds: {seconds!r} is not a number of seconds", field="timeout_seconds"
        )
    return None if math.isinf(seconds) else float(seconds)


def not_admitted(engine: engines.Engine, timeout_seconds: float | None) -> errors.DeadlineExceeded:
    """The error of an acquire whose time was up."""
    return errors.DeadlineExceeded(
        f"budget {engine.budget}: not admitted within {timeout_seconds or 0:g} s; {engine.situation()}"
    )


def _plain(value: Any, field: str) -> float:
    """`value` as an int or float: numpy's and torch's scalars are numbers too. Raises `InvalidArgument`."""
    if isinstance(value, int | float):
        return value
    try:
        return operator.index(value)
    except TypeError:
        pass
    if hasattr(value, "__float__"):
        return float(value)
    raise errors.InvalidArgument(f"{field}: {str(value)[:60]!r} is not a number", field=field)


def prepare(
    permit: AnyPermit,
    engine: engines.Engine,
    requests: float,
    tokens: float | None,
    costs: Mapping[str, float] | None,
    timeout_seconds: float | None,
) -> AnyPermit:
    """A permit that can be entered."""
    permit._engine = engine
    permit._requests = requests
    permit._tokens = tokens
    permit._window = _NEW
    permit._used = tokens
    permit._options = None
    if costs is not None or timeout_seconds is not None:
        permit.set_options(costs, timeout_seconds)
    return permit
