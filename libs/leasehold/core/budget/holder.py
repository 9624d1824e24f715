"""The holder's side of one lease: when to report, what to believe.

The shell feeds events (connected, granted, refused, activity, tick) and asks for reports; time is an input,
seconds on CLOCK_BOOTTIME. Rules, each with what it prevents:

1. The TTL counts from the *send* instant of the answered report: the allocator, which counts from the receipt,
   always expires a lease later than its holder.
2. A push changes amounts, never the expiry, and is void for a lease that has expired or is not the present
   one: a delayed push cannot revive units that were given to others.
3. Messages of another connection than the present one are void, and a connection is left before the first
   report on the next one is made: a new leader can rely on that report being the whole truth.
4. A lower epoch is refused.
5. A holder whose lease expired gives up what is free and asks again with what it physically has.
6. A superseded incarnation never rejoins by itself.
7. What cools late in the TTL is not spent anew before a renewal is answered, as the report promised: it need
   not be quarantined if the holder is lost.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import messages, model, stock

#: A join or an urgent report that is not answered is repeated after so long.
RESEND_SECONDS = 1.0
#: A first report that is not answered for so long is on a connection of no use.
FIRST_ANSWER_SECONDS = 3.0
#: Units given back are told at once only if they are this part of the share, else with the next renewal.
TELL_FRACTION = 0.05
#: At most one report of returning units in so long.
TELL_SECONDS = 0.1
#: What cools later than this part of the TTL after a report is not spent anew before an answer, nor what cools
#: later than so many refreshes: nobody who is answered within half a refresh waits for it.
RESPEND_TTL_PART = 0.35
RESPEND_REFRESHES = 1.5
#: The holder keeps its promise by so much, for sums of instants are rounded.
RESPEND_ROUNDING_SECONDS = 1e-6


class HolderState(enum.StrEnum):
    """Where a holder stands with its lease.

    JOINING -> HELD (first grant) -> EXPIRED (not renewed in time) -> HELD (joined again);
    any -> ENDED (released, superseded, budget deleted): the last word.
    """

    JOINING = "joining"
    HELD = "held"
    EXPIRED = "expired"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AllocationChanged:
    """What the holder owns has changed; amounts in micro-units."""

    amounts: Mapping[str, int]
    state: HolderState
    total_workers: int
    active_workers: int
    reason: str


@dataclass(slots=True)
class _Sent:
    at: float
    lease_id: int
    largest_cost: Mapping[str, int]
    #: What cools later is not spent anew before an answer; infinity: that was not promised.
    respend_until: float


@dataclass(slots=True)
class _Declared:
    demand: dict[str, int] = field(default_factory=dict)
    is_active: bool = False
    current_load: float = 0.0
    active_tasks: int = 0


class Holder:
    """One holder of one budget in one process life."""

    def __init__(
        self,
        *,
        budget: str,
        name: str,
        incarnation: str,
        process: processes.ProcessKey | None = None,
        session: int | None = None,
    ) -> None:
        self.budget = budget
        self.name = name
        self.incarnation = incarnation
        self.process = process
        self.limiter = limiters.Limiter()
        self.state = HolderState.JOINING
        self.end: messages.LeaseEnd | None = None
        #: Why the last report was refused; None since one was answered.
        self.refusal: messages.Refusal | None = None
        self.epoch = epochs.ZERO
        self.lease_id = 0
        self.version = 0
        self.total_workers = 0
        self.active_workers = 0
        self.reason = ""
        self.refresh_seconds = 1.0
        #: Of the last answer; 0 before the first.
        self.ttl_seconds = 0.0
        #: The connection that reports are made for; None while there is none.
        self.session = session
        self._sequence = 0
        self._sent: dict[int, _Sent] = {}
        self._last_sent = float("-inf")
        self._last_told = float("-inf")
        self._is_urgent = False
        self._is_first_on_session = True
        self._has_held = False
        self._reported_held: dict[str, int] = {}
        self._reported_waiting: dict[str, int] = {}
        self._reported_largest: Mapping[str, int] = {}
        #: The latest instant up to which any report of this lease left it free to spend anew.
        self._promised_until = float("-inf")
        self._declared = _Declared()
        self._throttles: list[messages.Throttle] = []
        self._events: list[AllocationChanged] = []

    # Connection

    def connected(self, session: int) -> None:
        """A new connection is up; everything said on an earlier one is void from now on."""
        self.session = session
        self._sent.clear()
        self._reported_largest = {}
        self._is_first_on_session = True
        self._is_urgent = True

    def disconnected(self, session: int) -> None:
        """That connection is gone. The lease goes on until it expires."""
        if session == self.session:
            self.session = None
            self._sent.clear()

    # The user's word

    def declare_activity(self, *, is_active: bool, current_load: float, active_tasks: int) -> None:
        """The user's own statement; `is_active` False leaves the decision to what the limiter sees."""
        declared = self._declared
        if declared.is_active != is_active:
            self._is_urgent = True
        declared.is_active, declared.current_load, declared.active_tasks = is_active, current_load, active_tasks

    def declare_demand(self, demand: Mapping[str, int]) -> None:
        """Most that the holder can use, micro-units by dimension; a dimension left out is unbounded."""
        if demand != self._declared.demand:
            self._declared.demand = dict(demand)
            self._is_urgent = True

    def throttled(self, throttle: messages.Throttle) -> None:
        """The provider answered 429."""
        if len(self._throttles) < 100:
            self._throttles.append(throttle)
        self._is_urgent = True

    def ask_again(self) -> None:
        """Somebody wants units: ask now, rather than when the next report is due, if there is no lease."""
        if self.state is not HolderState.HELD and not self._sent:
            self._is_urgent = True

    @property
    def answer_timeout_seconds(self) -> float:
        """A connection on which a report is not answered for so long is of no use: time is left for another."""
        return self.refresh_seconds + self.ttl_seconds / 2 if self.ttl_seconds else FIRST_ANSWER_SECONDS

    # Reports

    def is_active(self, now: float) -> bool:
        """Whether this holder counts as active."""
        self.limiter.fold(now)
        active = self._declared.is_active or self.limiter.is_active(now)
        self.limiter.reopen(now)
        return active

    def wants_report(self, now: float) -> bool:
        """Whether a report should be sent at `now`."""
        return now >= self.report_due(now)

    def report_due(self, now: float) -> float:
        """Instant of the next report; infinity while there is no connection or nothing to say any more."""
        if self.session is None or self.state is HolderState.ENDED:
            return float("inf")
        if self._is_urgent:
            return now
        if self.state is not HolderState.HELD:
            return self._last_sent + RESEND_SECONDS
        due = self._last_sent + self.refresh_seconds
        limiter = self.limiter
        if limiter.is_idle_reported:
            if self.is_active(now):
                return now
        elif not self._declared.is_active and limiter.terms is not None:
            due = min(due, max(now, self._idle_at(now)))
        return min(due, self._tell_due(now))

    def _idle_at(self, now: float) -> float:
        limiter = self.limiter
        if self.is_active(now):
            if limiter.waiters or limiter.in_flight or limiter.calls_in_use():
                return float("inf")
            assert limiter.terms is not None
            return limiter.last_activity + limiter.terms.activity_timeout_seconds
        return now

    def _tell_due(self, now: float) -> float:
        limiter = self.limiter
        if limiter.waiters and self._is_waiting_news():
            return now
        if limiter.lacks_credit() and self._is_largest_news():
            return now
        for name, held in limiter.stocks.items():
            told = self._reported_held.get(name, 0)
            if isinstance(held, stock.CallStock):
                if told > held.cap and held.held < told:
                    return now
            elif told > held.cap:
                held.advance(now)
                if told - held.held >= max(1, int(held.cap * TELL_FRACTION)):
                    return max(now, self._last_told + TELL_SECONDS)
        return float("inf")

    def _is_largest_news(self) -> bool:
        """Whether a cost was seen that this connection has not been told: the answer gives credit for it."""
        told = self._reported_largest
        # Only rates are paced, so only their costs are ever told.
        return any(
            isinstance(held, stock.RateStock) and self.limiter.largest_cost.get(name, 0) > told.get(name, 0)
            for name, held in self.limiter.stocks.items()
        )

    def _is_waiting_news(self) -> bool:
        """Whether a waiting cost that does not fit the share has not been told yet."""
        limiter = self.limiter
        # Of the queue only what is new: this is asked at every step of a queue that may be long.
        for news in (limiter.largest_enqueued, limiter.backlog):
            for name, amount in news.items():
                held = limiter.stocks.get(name)
                if held is not None and amount > max(held.cap, self._reported_waiting.get(name, 0)):
                    return True
        return False

    def make_report(self, now: float) -> messages.Report:
        """The next report. The caller sends it on the present connection, or calls `disconnected`."""
        limiter = self.limiter
        respend_seconds = self._promise(now)
        holdings = (
            limiter.holdings(now, respend_seconds=respend_seconds)
            if limiter.terms
            else messages.Holdings(held={})
        )
        limiter.tighten_credit(holdings.largest_cost)
        is_active = self.is_active(now)
        limiter.is_idle_reported = not is_active
        # Opens the short path to one that is now known as active, and shuts it to one known as idle.
        limiter.fold(now)
        limiter.reopen(now)
        self._sequence += 1
        respend_until = self._promised_until if respend_seconds else float("inf")
        self._sent[self._sequence] = _Sent(now, self.lease_id, holdings.largest_cost, respend_until)
        while len(self._sent) > 64:
            del self._sent[next(iter(self._sent))]
        self._last_sent = self._last_told = now
        self._is_urgent = False
        self._reported_held = dict(holdings.held)
        self._reported_largest = holdings.largest_cost
        self._reported_waiting = limiter.waiting_cost()
        limiter.largest_enqueued.clear()
        report = messages.Report(
            budget=self.budget,
            holder=self.name,
            incarnation=self.incarnation,
            sequence=self._sequence,
            lease_id=self.lease_id,
            is_rejoin=self._has_held and self.lease_id == 0,
            grant_version=self.version,
            is_active=is_active,
            current_load=self._declared.current_load,
            active_tasks=self._declared.active_tasks,
            demand=self._declared.demand,
            waiting_cost=self._reported_waiting,
            holdings=holdings,
            throttles=tuple(self._throttles),
            # With every join: the allocator tells by it a late one, of a process that is gone.
            process=self.process if self._is_first_on_session or not self.lease_id else None,
            boottime_nanos=int(now * 1e9),
        )
        self._throttles = []
        self._is_first_on_session = False
        return report

    def _promise(self, now: float) -> float:
        """How long after a report made now what cools may be spent anew without an answer; 0: no promise.

        No promise is shorter than an earlier one of the lease, for either may have been the last to arrive.
        Where a window passes in a TTL all units cool early: a holder that promised would soon stand still.
        """
        limiter, terms = self.limiter, self.limiter.terms
        if self.state is not HolderState.HELD or terms is None:
            return 0.0
        windows = [dimension.window_seconds for dimension in terms.dimensions if dimension.is_rate]
        if terms.charged_at is not model.ChargedAt.ARRIVAL or min(windows, default=0.0) <= self.ttl_seconds:
            return 0.0
        seconds = max(RESPEND_TTL_PART * self.ttl_seconds, RESPEND_REFRESHES * self.refresh_seconds)
        self._promised_until = max(self._promised_until, now + seconds)
        if limiter.respend_until == float("inf"):
            self._let_respend(self._promised_until, now)
        return self._promised_until - now

    def _let_respend(self, until: float, now: float) -> None:
        self.limiter.fold(now)
        self.limiter.let_respend(until - RESPEND_ROUNDING_SECONDS, now)
        self.limiter.reopen(now)

    def make_release(self, now: float) -> messages.Release:
        """Give the lease back: the last message of this holder. Waiters stay the shell's to fail."""
        limiter = self.limiter
        limiter.set_amounts({}, now)
        limiter.expires_at = now
        release = messages.Release(
            budget=self.budget,
            holder=self.name,
            incarnation=self.incarnation,
            lease_id=self.lease_id,
            holdings=limiter.holdings(now) if limiter.terms else messages.Holdings(held={}),
        )
        self._ended(messages.LeaseEnd.RELEASED)
        return release

    # The allocator's word

    def granted(self, session: int, grant: messages.Grant, now: float) -> None:
        """Take a grant, or ignore it by the rules of the module."""
        if session != self.session or self.state is HolderState.ENDED:
            return
        if grant.incarnation != self.incarnation or grant.epoch < self.epoch:
            return
        self.epoch = grant.epoch
        if grant.answered_sequence:
            self._answered(grant, now)
        elif grant.lease_id == self.lease_id and self.state is HolderState.HELD:
            if grant.end is not None:
                self._end(grant, now)
            elif now < self.limiter.expires_at:
                self._apply(grant, now)

    def _answered(self, grant: messages.Grant, now: float) -> None:
        sent = self._sent.pop(grant.answered_sequence, None)
        if sent is None:
            return
        if grant.end is not None:
            self._end(grant, now)
            return
        is_new_lease = grant.lease_id != self.lease_id
        if is_new_lease and sent.lease_id != self.lease_id:
            return
        expires_at = sent.at + grant.ttl_seconds
        if expires_at <= now:
            return
        if is_new_lease:
            self.lease_id, self.version, self._has_held = grant.lease_id, 0, True
            self._sent = {number: s for number, s in self._sent.items() if s.lease_id == grant.lease_id}
        if grant.terms is not None:
            self.limiter.set_terms(grant.terms, now)
        if self.state is not HolderState.HELD:
            self.state = HolderState.HELD
            self.limiter.expires_at = expires_at
        else:
            self.limiter.expires_at = max(self.limiter.expires_at, expires_at)
        self.limiter.allow_credit(sent.largest_cost)
        # The last report that arrived was this one, or any later one.
        later = [s.respend_until for number, s in self._sent.items() if number > grant.answered_sequence]
        respend_until = min([sent.respend_until, *later])
        if respend_until > self.limiter.respend_until:
            self._let_respend(respend_until, now)
        self.refusal = None
        self.refresh_seconds, self.ttl_seconds = grant.refresh_seconds, grant.ttl_seconds
        self._apply(grant, now)

    def _apply(self, grant: messages.Grant, now: float) -> None:
        if grant.terms is not None and grant.answered_sequence == 0:
            self.limiter.set_terms(grant.terms, now)
        self.total_workers = grant.total_workers
        if grant.version >= self.version:
            # Another pace comes in a version of its own: by that the allocator knows which one is in force.
            if self.limiter.terms is not None and (grant.active_workers != self.active_workers or grant.terms):
                self.limiter.set_pace(grant.active_workers, now)
            self.active_workers = grant.active_workers
        # With new terms a dimension may be new, whose amount the same version has told in vain.
        is_known = grant.version == self.version and grant.terms is None
        if grant.version < self.version or is_known:
            self._reopen(now)
            return
        self.version = grant.version
        before = self.limiter.amounts()
        self.limiter.set_amounts(grant.amounts, now)
        after = self.limiter.amounts()
        if any(after[name] < before.get(name, 0) for name in after):
            self._is_urgent = True
        if after != before:
            self.reason = grant.reason
            self._changed()
        self._reopen(now)

    def _reopen(self, now: float) -> None:
        self.limiter.fold(now)
        self.limiter.reopen(now)

    def _end(self, grant: messages.Grant, now: float) -> None:
        if grant.end is messages.LeaseEnd.EXPIRED:
            self._expire(now, has_safe=False)
            self._is_urgent = True
            return
        self.limiter.set_amounts({}, now)
        self.limiter.expires_at = now
        assert grant.end is not None
        self._ended(grant.end)

    def _ended(self, end: messages.LeaseEnd) -> None:
        self.state, self.end = HolderState.ENDED, end
        self.lease_id = 0
        self._changed()

    def refused(self, session: int, refusal: messages.Refusal, now: float) -> None:
        """The allocator refused a report; kept for the user to see. The next one may pass.

        The exception is a refusal of a superseded incarnation, which ends the holder (rule 6).
        """
        if session != self.session or refusal.incarnation != self.incarnation:
            return
        if self._sent.pop(refusal.sequence, None) is None or self.state is HolderState.ENDED:
            return
        self.refusal = refusal
        if refusal.reason == errors.Superseded.reason:
            self.limiter.set_amounts({}, now)
            self.limiter.expires_at = now
            self._ended(messages.LeaseEnd.SUPERSEDED)

    def tick(self, now: float) -> None:
        """Notice expiry."""
        if self.state is HolderState.HELD and now >= self.limiter.expires_at:
            self._expire(now, has_safe=True)
            return
        is_over = self.state is HolderState.EXPIRED and now >= self.limiter.expires_at
        if is_over and any(self.limiter.amounts().values()):
            self.limiter.set_amounts({}, now)
            self._changed()

    def _expire(self, now: float, *, has_safe: bool) -> None:
        limiter = self.limiter
        safe: dict[str, int] = {}
        if has_safe and limiter.terms is not None:
            owned = limiter.amounts()
            safe = {n: min(owned.get(n, 0), amount) for n, amount in limiter.terms.safe_capacity.items()}
        limiter.set_amounts(safe, now)
        # Safe capacity is quarantined in full from when it ends: it may be spent again and again until then.
        self._promised_until = float("-inf")
        limiter.let_respend(float("inf"), now)
        if any(safe.values()):
            assert limiter.terms is not None
            limiter.expires_at += limiter.terms.safe_ttl_seconds
            limiter.reopen(now)
        self.state = HolderState.EXPIRED
        self.lease_id = self.version = 0
        self._sent.clear()
        self._is_urgent = True
        self._changed()

    def _changed(self) -> None:
        self._events.append(self.allocation())

    def allocation(self) -> AllocationChanged:
        """What is owned now, in the form of a change."""
        return AllocationChanged(
            self.limiter.amounts(), self.state, self.total_workers, self.active_workers, self.reason
        )

    def take_events(self) -> list[AllocationChanged]:
        """Changes since the last call, oldest first."""
        events, self._events = self._events, []
        return events
