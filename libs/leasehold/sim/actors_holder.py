"""A holder in a simulated world: the real core, and users who acquire, call, settle and go idle."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leasehold.core import errors, processes
from leasehold.core.budget import holder as holders
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import messages, quantity, stock
from leasehold.sim import actors, budget_auditor, network, world_time

if TYPE_CHECKING:
    from leasehold.sim.world import World

CONNECT_RETRY_SECONDS = 0.1
#: Before its bound a call is ended, for the provider to hear of it in time.
CALL_END_SECONDS = 0.05


@dataclass(slots=True, kw_only=True)
class Load:
    """What the users of a holder do. Times in seconds, tokens in units."""

    users: int = 4
    call_seconds_min: float = 0.02
    call_seconds_max: float = 0.6
    think_seconds_max: float = 0.1
    tokens_min: int = 10
    tokens_max: int = 120
    #: Of settled calls: below the reserve, above it; the rest is settled exactly.
    below_probability: float = 0.5
    above_probability: float = 0.0
    #: Of waiting acquires that give up.
    impatience: float = 0.02


class _Call:
    __slots__ = ("actual", "admitted_at", "cost", "is_orphan", "shape", "ticket", "tokens", "window")

    def __init__(
        self,
        cost: limiters.Cost,
        actual: dict[str, int],
        admitted_at: float,
        ticket: budget_auditor.Ticket,
        shape: limiters.Shape,
    ) -> None:
        self.cost = cost
        self.actual = actual
        self.admitted_at = admitted_at
        self.ticket = ticket
        self.shape = shape
        #: Number of the short path's opening, and the whole tokens it took; -1: the exact path.
        self.window = limiters.EXACT
        self.tokens = 0
        self.is_orphan = False


class HolderProcess(actors.Process):
    """One process life of a holder."""

    def __init__(
        self,
        world: World,
        *,
        name: str,
        incarnation: str,
        place: str,
        clock: world_time.Clock,
        process: processes.ProcessKey | None,
        load: Load,
    ) -> None:
        super().__init__(world.scheduler, place)
        self.world = world
        self.name = name
        self.incarnation = incarnation
        #: CLOCK_BOOTTIME.
        self.clock = clock
        self.process = process
        self.load = load
        self.core = holders.Holder(budget=world.spec.name, name=name, incarnation=incarnation, process=process)
        self.stream: network.Stream | None = None
        self.calls: dict[_Call, None] = {}
        self.admissions = 0
        self.waited_max_seconds = 0.0
        self.is_working = True
        self._early: deque[int] = deque()
        self._users_running = 0
        self._shape: limiters.Shape | None = None
        self._heard_at = 0.0
        self._is_connecting = False
        self._alarm = actors.Alarm(self, self.pump)
        self.wake_at(self.scheduler.now, self._begin)

    @property
    def now(self) -> float:
        """Seconds on its CLOCK_BOOTTIME."""
        return self.clock.at(self.scheduler.now)

    @property
    def limiter(self) -> limiters.Limiter:
        """The real limiter."""
        return self.core.limiter

    # Connection

    def _begin(self) -> None:
        self._connect()
        self._start_users()
        self._listen()

    def _listen(self) -> None:
        """Keepalive: a stream on which nothing is heard is left for another."""
        quiet_seconds = self.world.scenario.keepalive_seconds
        if self.stream is not None and self.scheduler.now - self._heard_at > quiet_seconds:
            self.leave_stream()
        self.wake_at(self.scheduler.now + quiet_seconds / 2, self._listen)

    def leave_stream(self) -> None:
        """Give the connection up and look for another."""
        stream = self.stream
        if stream is not None:
            self.stream = None
            self.core.disconnected(stream.number)
            self.world.break_stream(stream)
        self._connect()

    def _connect(self) -> None:
        if self._is_connecting or self.stream is not None or self.core.state is holders.HolderState.ENDED:
            return
        self._is_connecting = True
        self.wake_at(self.scheduler.now + self.world.network.latency(), self._connected)

    def _connected(self) -> None:
        self._is_connecting = False
        if self.core.state is holders.HolderState.ENDED:
            return
        stream = self.world.open_stream(self)
        if stream is None:
            seconds = CONNECT_RETRY_SECONDS * self.world.rng.uniform(0.8, 1.2)
            self._is_connecting = True
            self.wake_at(self.scheduler.now + seconds, self._connected)
            return
        self.stream = stream
        self._heard_at = self.scheduler.now
        self.core.connected(stream.number)
        self.pump()

    def lost(self, stream: network.Stream) -> None:
        """It hears that a stream is broken."""

        def handle() -> None:
            if self.stream is stream:
                self.leave_stream()

        self.do(handle)

    def heard(self, stream: network.Stream, message: Any) -> None:
        """A message on a stream; one that it has left may still bring some."""

        def handle() -> None:
            if self.stream is stream:
                self._heard_at = self.scheduler.now
            if isinstance(message, messages.Grant):
                self.core.granted(stream.number, message, self.now)
            else:
                self.core.refused(stream.number, message, self.now)
            if self.core.state is holders.HolderState.ENDED:
                self.world.holder_ended(self)
            self.pump()
            self.world.check_etcd()

        self.do(handle)

    # The shell's loop

    def pump(self) -> None:
        """Notice expiry, admit who waits, report what is due, and set the next alarm."""
        now = self.now
        core = self.core
        core.tick(now)
        if core.limiter.shape is not self._shape:
            self._reprice()
        if core.limiter.terms is not None:
            while self._early:
                self._acquire(self._early.popleft())
            for waiter in core.limiter.admit_waiting(now):
                self._admitted_waiter(waiter)
        stream = self.stream
        if stream is not None and core.wants_report(now):
            stream.up(core.make_report(now))
            if core.limiter.waiters:
                for waiter in core.limiter.admit_waiting(now):
                    self._admitted_waiter(waiter)
        due = min(core.report_due(now), now + core.limiter.seconds_until_head(now))
        if core.state is holders.HolderState.HELD:
            due = min(due, core.limiter.expires_at)
        self._alarm.set(float("inf") if due == float("inf") else self.clock.when(max(due, now)) + 1e-6)

    def _reprice(self) -> None:
        """The terms changed: costs of those who wait are of another shape."""
        limiter = self.limiter
        old, self._shape = self._shape, limiter.shape
        if old is None:
            return
        index = list(old.stocks).index(limiters.TOKENS) if limiters.TOKENS in old.stocks else None
        waiters = list(limiter.waiters)
        limiter.waiters.clear()
        for waiter in waiters:
            self._early.append(0 if index is None else waiter.cost[index] // quantity.MICRO)

    # Users

    def work(self, is_working: bool) -> None:
        """Its users start, or stop after the call they are in."""
        self.is_working = is_working
        if is_working and self.is_alive:
            self.do(self._start_users)

    def _start_users(self) -> None:
        while self.is_working and self._users_running < self.load.users:
            self._users_running += 1
            self.wake_at(
                self.scheduler.now + self.world.rng.uniform(0.0, self.load.think_seconds_max + 0.01), self._user
            )

    def _user(self) -> None:
        if not self.is_working or self.core.state is holders.HolderState.ENDED:
            self._users_running -= 1
            return
        tokens = self.world.rng.randint(self.load.tokens_min, self.load.tokens_max)
        if self.limiter.terms is None:
            self._early.append(tokens)
        else:
            self._acquire(tokens)

    def _acquire(self, tokens: int) -> None:
        limiter, now = self.limiter, self.now
        try:
            cost = limiter.cost(1, tokens if limiters.TOKENS in limiter.dimension_names else None)
        except errors.LeaseholdError:
            self.wake_at(self.scheduler.now + 1.0, self._user)
            return
        if self._take_short_path(tokens, now):
            call = self._admitted(cost, now)
            call.window, call.tokens = limiter.window, tokens
        elif limiter.try_admit(cost, now):
            self._admitted(cost, now)
        else:
            waiter = limiters.Waiter(cost, payload=self.scheduler.now)
            limiter.enqueue(waiter)
            if self.world.rng.random() < self.load.impatience:
                self.wake_at(self.scheduler.now + 0.3, lambda: self._give_up(waiter))
        self.pump()

    def _take_short_path(self, tokens: int, now: float) -> bool:
        """Three counters, as the client library does."""
        limiter = self.limiter
        if now >= limiter.fast_until or limiter.fast_calls < 1 or limiter.fast_requests < 1:
            return False
        if limiters.TOKENS not in limiter.dimension_names:
            tokens = 0
        if tokens > min(limiter.fast_tokens, limiter.token_bound):
            return False
        limiter.fast_calls -= 1
        limiter.fast_requests -= 1
        limiter.fast_tokens -= tokens
        return True

    def _give_up(self, waiter: limiters.Waiter) -> None:
        if waiter in self.limiter.waiters and self.limiter.withdraw(waiter):
            self._users_running -= 1
            self._start_users()
            self.pump()

    def _admitted_waiter(self, waiter: limiters.Waiter) -> None:
        assert isinstance(waiter.payload, float)
        self.waited_max_seconds = max(self.waited_max_seconds, self.scheduler.now - waiter.payload)
        self._admitted(waiter.cost, self.now)

    def _admitted(self, cost: limiters.Cost, now: float) -> _Call:
        world, rng, load = self.world, self.world.rng, self.load
        self.admissions += 1
        amounts = dict(zip(self.limiter.dimension_names, cost, strict=True))
        arrives_at = self.scheduler.now + rng.random() * world.arrival_seconds_max
        ticket = world.auditor.admitted(self.scheduler.now, self.incarnation, amounts, arrives_at)
        shape = self.limiter.shape
        assert shape is not None
        call = _Call(cost, self._actual(amounts), now, ticket, shape)
        self.calls[call] = None
        # A client ends its calls by the terms under which they began.
        longest = min(load.call_seconds_max, shape.terms.max_call_seconds - CALL_END_SECONDS)
        seconds = rng.uniform(load.call_seconds_min, longest)
        self.scheduler.after(max(seconds, arrives_at - self.scheduler.now), lambda: self._provider_done(call))
        return call

    def _actual(self, amounts: dict[str, int]) -> dict[str, int]:
        reserved = amounts.get(limiters.TOKENS, 0)
        draw = self.world.rng.random()
        if draw < self.load.below_probability:
            return {limiters.TOKENS: int(reserved * self.world.rng.random()) // quantity.MICRO * quantity.MICRO}
        if draw < self.load.below_probability + self.load.above_probability:
            return {limiters.TOKENS: reserved * 5 // 4}
        return {}

    def _provider_done(self, call: _Call) -> None:
        """The provider answers: it corrects what was reserved, whether or not the holder can hear it."""
        if call.ticket.is_over or call.is_orphan:
            return
        self.world.auditor.completed(self.scheduler.now, call.ticket, call.actual)
        self.do(lambda: self._settle(call))

    def _settle(self, call: _Call) -> None:
        del self.calls[call]
        limiter = self.limiter
        used = call.actual.get(limiters.TOKENS, call.tokens * quantity.MICRO) // quantity.MICRO
        if call.window == limiter.window and used <= call.tokens:
            limiter.fast_calls += 1
            limiter.fast_tokens += call.tokens - used
        else:
            limiter.release(call.cost, call.actual, call.admitted_at, self.now, call.shape, call.window)
        self.wake_at(self.scheduler.now + self.world.rng.random() * self.load.think_seconds_max, self._user)
        self.pump()

    # What is true of it

    @property
    def is_over(self) -> bool:
        """Whether it can never admit again."""
        return not self.is_alive or self.core.state is holders.HolderState.ENDED

    def physical(self) -> dict[str, int]:
        """Micro-units that it has spent and the provider may count, or that it may still spend."""
        now = self.now
        limiter = self.limiter
        if self.is_over or limiter.terms is None or now >= limiter.expires_at:
            return self.world.auditor.spent(self.scheduler.now, self.incarnation)
        for held in limiter.stocks.values():
            if isinstance(held, stock.RateStock):
                held.advance(now)
        return limiter.held()

    # Its end

    def crash(self, provider_frees_after: float) -> None:
        """SIGKILL: its calls end at the provider at the latest `provider_frees_after` seconds from now."""
        self.die()
        now = self.scheduler.now
        for call in self.calls:
            call.is_orphan = True
            at = now + self.world.rng.random() * provider_frees_after
            self.scheduler.at(
                at,
                lambda call=call: self.world.auditor.disconnected(  # type: ignore[misc]
                    self.scheduler.now, call.ticket
                ),
            )
        if self.stream is not None:
            self.world.break_stream(self.stream)
            self.stream = None
