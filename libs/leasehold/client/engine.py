"""One budget of one worker in this process: the lock around the pure holder, and who waits.

Threads of the user admit and release here, the I/O thread brings grants and takes reports. The rules are the
core's (`core.budget.holder`, `core.budget.limiter`); this adds the lock, the clock and the waking. No code of
the user runs while the lock is held.
"""

import functools
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from leasehold.client import allocation as allocations
from leasehold.client import failures, gates
from leasehold.core import errors, processes
from leasehold.core.budget import holder as holders
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import messages, quantity
from leasehold.observe import logs

_log = logs.get_logger(__name__)

#: CLOCK_BOOTTIME: a lease must be found expired by a host that slept through it.
boot_seconds: Callable[[], float] = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)

#: An instant so much sooner than the planned one is worth waking the I/O thread for.
_SOONER_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Request:
    """What one acquire asks for, in units; see `Limiter.cost`."""

    requests: float = 1
    tokens: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Ticket:
    """One acquire on the exact path, from asking to admission."""

    request: Request
    gate: gates.Gate | None
    limiter: limiters.Limiter
    #: None until the budget's terms are known.
    waiter: limiters.Waiter | None = None
    #: The shape it was admitted under.
    shape: limiters.Shape | None = None
    error: errors.LeaseholdError | None = None

    @property
    def is_admitted(self) -> bool:
        """Whether its units have been taken."""
        return self.waiter is not None and self.waiter.admitted_at is not None


class Engine:
    """Admission and lease of one worker on one budget. Safe to use from any thread.

    ``start`` connects, and sets ``poke``, which wakes the I/O thread, which then calls `turn`; it may be called
    under the lock.
    """

    def __init__(
        self,
        *,
        budget: str,
        name: str,
        process: processes.ProcessKey | None = None,
        now: Callable[[], float] = boot_seconds,
        start: "Callable[[Engine], None] | None" = None,
    ) -> None:
        self.budget = budget
        self._start = start
        self.now = now
        self.poke: Callable[[], None] | None = None
        self.is_closed = False
        self._subscription: allocations.Subscription | None = None
        self._listeners: list[Callable[[], None]] = []
        self._begin(name, process)

    def _begin(self, name: str, process: processes.ProcessKey | None) -> None:
        self.lock = threading.Lock()
        self.name = name
        self.holder = holders.Holder(
            budget=self.budget, name=name, incarnation=uuid.uuid4().hex, process=process
        )
        self.limiter = self.holder.limiter
        self._unpriced: deque[Ticket] = deque()
        self._watchers: set[gates.Gate] = set()
        self._planned_at = float("inf")
        self._warned_of = ""

    def begin_anew(self, name: str, process: processes.ProcessKey | None) -> None:
        """In the child of a fork: an incarnation of its own, with nothing of the parent's lease.

        The parent's lock may be held by a thread that does not exist here, its stocks half-changed: neither is
        touched. What the parent's threads waited for, and what the parent declared, is the parent's.
        """
        self.poke = None
        self._listeners = []
        if isinstance(self._subscription, allocations.ThreadSubscription):
            self._subscription = allocations.ThreadSubscription(self._subscription.callback)
        self._begin(name, process)

    def ensure_started(self) -> None:
        """Connect and join, with the first use of a budget."""
        if self.poke is None and self._start is not None:
            self._start(self)

    # Acquiring

    def submit(self, request: Request, gate: gates.Gate) -> Ticket:
        """Ask for `request`: admitted at once, or in its turn, when `gate` opens.

        Raises what `Limiter.cost` does, and what ended the lease for good.
        """
        with self.lock:
            now = self.now()
            self._require_usable()
            ticket = Ticket(request, gate, self.limiter)
            self._enter(ticket, now)
            if not ticket.is_admitted:
                self.holder.ask_again()
            self._plan(now)
        return ticket

    def try_submit(self, request: Request) -> Ticket | None:
        """Ask for `request` now or never. None where it is refused: then nothing was taken."""
        with self.lock:
            now = self.now()
            self._require_usable()
            limiter = self.limiter
            ticket = Ticket(request, None, limiter)
            if limiter.terms is not None:
                waiter = ticket.waiter = limiters.Waiter(self._cost(request), ticket)
                if limiter.try_admit(waiter.cost, now):
                    waiter.admitted_at, ticket.shape = now, limiter.shape
            else:
                self._raise_lasting_refusal()
                limiter.last_refusal = now
            if not ticket.is_admitted:
                self.holder.ask_again()
            self._plan(now)
        return ticket if ticket.is_admitted else None

    def claim(self, ticket: Ticket) -> bool:
        """Whoever waits has woken: whether it may go on now. Raises what ended the wait.

        A lease that ran out between admission and waking admits nobody: the ticket gives back and is the first
        in the queue again. One that woke late is charged from now on, when its request is really sent.
        """
        admitted: list[limiters.Waiter] = []
        with self.lock:
            if ticket.error is not None:
                raise ticket.error
            waiter, limiter = ticket.waiter, ticket.limiter
            if waiter is None or waiter.admitted_at is None:
                return False
            now = self.now()
            is_usable = now < limiter.expires_at and ticket.shape is limiter.shape
            if limiter is self.limiter and is_usable and limiter.restamp(waiter, now):
                return True
            self._give_back(ticket, now)
            try:
                self._reenter(ticket, now)
            except errors.LeaseholdError as error:
                ticket.error = error
            admitted = self._admit(now)
            self._plan(now)
        self._wake(admitted)
        if ticket.error is not None:
            raise ticket.error
        return ticket.is_admitted

    def abandon(self, ticket: Ticket) -> None:
        """Whoever waited has gone: leave the queue, or give back what was just admitted."""
        with self.lock:
            now = self.now()
            if ticket.limiter is not self.limiter or ticket.error is not None:
                return
            if ticket.waiter is None:
                self._unpriced.remove(ticket)
                self.limiter.unpriced -= 1
            elif not self.limiter.withdraw(ticket.waiter):
                self._give_back(ticket, now)
            admitted = self._admit(now)
            self._plan(now)
        self._wake(admitted)

    def release(
        self,
        limiter: limiters.Limiter,
        shape: limiters.Shape,
        cost: limiters.Cost,
        actual: Mapping[str, int],
        admitted_at: float,
        window: int,
    ) -> None:
        """End an admitted call on the exact path; nothing happens if `limiter` is of an earlier incarnation."""
        with self.lock:
            if limiter is not self.limiter:
                return
            now = self.now()
            limiter.release(cost, actual, admitted_at, now, shape, window)
            admitted = self._admit(now)
            self._plan(now)
        self._wake(admitted)

    def opening(self, limiter: limiters.Limiter, window: int) -> limiters.Opening:
        """See `Limiter.opening`."""
        with self.lock:
            return limiter.opening(window)

    def _require_usable(self) -> None:
        if self.is_closed:
            raise errors.FailedPrecondition(f"budget {self.budget}: the client is closed")
        end = self.holder.end
        if end is messages.LeaseEnd.BUDGET_DELETED:
            # It may have been made anew: that takes a holder that was never told its last word.
            self.holder = holders.Holder(
                budget=self.budget,
                name=self.name,
                incarnation=uuid.uuid4().hex,
                process=self.holder.process,
                session=self.holder.session,
            )
            self.limiter = self.holder.limiter
        elif end is not None:
            raise failures.ended(self.budget, end)

    def _raise_lasting_refusal(self) -> None:
        if self.holder.refusal is not None:
            error = failures.error_of(self.holder.refusal)
            if failures.is_lasting(error):
                raise error

    def _cost(self, request: Request) -> limiters.Cost:
        return self.limiter.cost(request.requests, request.tokens, request.costs)

    def _enter(self, ticket: Ticket, now: float, *, is_first: bool = False) -> None:
        limiter = ticket.limiter = self.limiter
        ticket.waiter = ticket.shape = None
        if limiter.terms is None:
            self._unpriced.append(ticket)
            limiter.unpriced += 1
            return
        waiter = limiters.Waiter(self._cost(ticket.request), ticket)
        ticket.waiter = waiter
        if limiter.try_admit(waiter.cost, now):
            waiter.admitted_at, ticket.shape = now, limiter.shape
        else:
            limiter.enqueue(waiter, is_first=is_first)

    def _reenter(self, ticket: Ticket, now: float) -> None:
        """As `_enter`, for one that was admitted; raises if nobody who waits is served any more."""
        if self.holder.end is not None:
            # Those in the queue have been told already: nobody would wake this one.
            raise failures.ended(self.budget, self.holder.end)
        self._enter(ticket, now, is_first=True)

    def _give_back(self, ticket: Ticket, now: float) -> None:
        waiter, shape = ticket.waiter, ticket.shape
        assert waiter is not None and waiter.admitted_at is not None and shape is not None
        if ticket.limiter is self.limiter:
            nothing = dict.fromkeys(shape.stocks, 0)
            self.limiter.release(waiter.cost, nothing, waiter.admitted_at, now, shape)
        waiter.admitted_at = None

    def _admit(self, now: float) -> list[limiters.Waiter]:
        admitted = self.limiter.admit_waiting(now)
        for waiter in admitted:
            ticket = waiter.payload
            assert isinstance(ticket, Ticket)
            ticket.shape = self.limiter.shape
        return admitted

    def _wake(self, waiters: Iterable[limiters.Waiter]) -> None:
        for waiter in waiters:
            ticket = waiter.payload
            assert isinstance(ticket, Ticket) and ticket.gate is not None
            if not ticket.gate.open():
                self.abandon(ticket)

    # Slots of executors

    def try_take_slot(self, name: str) -> limiters.Shape | None:
        """Take one slot of the dimension `name`; the shape to give it back under, None where none is free."""
        with self.lock:
            now = self.now()
            self._require_usable()
            self._check_dimension(name, "executor")
            limiter = self.limiter
            is_taken = limiter.try_take_slots(name, quantity.MICRO, now)
            self._plan(now)
            return limiter.shape if is_taken else None

    def return_slot(self, name: str, shape: limiters.Shape) -> None:
        """Give back what `try_take_slot` took."""
        with self.lock:
            now = self.now()
            self.limiter.return_slots(name, quantity.MICRO, shape)
            admitted = self._admit(now)
            self._plan(now)
        self._wake(admitted)

    def set_backlog(self, name: str, tasks: int) -> None:
        """So many tasks wait for a slot of `name`. Raises `InvalidArgument` if there is no such dimension."""
        with self.lock:
            now = self.now()
            if tasks:
                self._require_usable()
                self._check_dimension(name, "executor")
                self.limiter.backlog[name] = quantity.MICRO
                self.holder.ask_again()
            else:
                self.limiter.backlog.pop(name, None)
            self._plan(now)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the I/O thread after each change of the allocation; it must not block."""
        self._listeners.append(listener)

    # The user's word

    def update_activity(self, *, is_active: bool, current_load: float, active_tasks: int) -> None:
        """See `Holder.declare_activity`."""
        with self.lock:
            self._require_usable()
            self.holder.declare_activity(
                is_active=is_active, current_load=current_load, active_tasks=active_tasks
            )
            self._plan(self.now())

    def declare_demand(self, demand: Mapping[str, float]) -> None:
        """See `Holder.declare_demand`; `demand` in units. Raises `InvalidArgument`, naming the dimension."""
        micros = {name: quantity.to_micros(units, field=f"demand.{name}") for name, units in demand.items()}
        with self.lock:
            self._require_usable()
            for name in micros:
                self._check_dimension(name, "demand")
            self.holder.declare_demand(micros)
            self._plan(self.now())

    def report_throttled(self, throttle: messages.Throttle) -> None:
        """See `Holder.throttled`. Raises `InvalidArgument` for a dimension that the budget does not have."""
        with self.lock:
            self._require_usable()
            if throttle.dimension:
                self._check_dimension(throttle.dimension, "dimension")
            self.holder.throttled(throttle)
            self._plan(self.now())

    def _check_dimension(self, name: str, where: str) -> None:
        limiter = self.limiter
        if limiter.terms is not None and name not in limiter.stocks:
            known = ", ".join(limiter.dimension_names)
            raise errors.InvalidArgument(
                f"{where}: budget {self.budget} has no dimension {name[:63]!r} (it has {known})", field=where
            )

    # Allocation

    def allocation(self) -> allocations.Allocation:
        """What this worker owns now."""
        with self.lock:
            self.holder.tick(self.now())
            return allocations.of_change(self.holder.allocation())

    def is_allocated(self) -> bool:
        """Whether a lease is held that is worth something. Raises what keeps it away for good."""
        with self.lock:
            self._require_usable()
            self._raise_lasting_refusal()
            holder = self.holder
            is_valid = holder.state is holders.HolderState.HELD and self.now() < self.limiter.expires_at
            return is_valid and any(self.limiter.amounts().values())

    def situation(self) -> str:
        """One line for people: why an acquire may have to wait."""
        with self.lock:
            holder, limiter = self.holder, self.limiter
            if holder.refusal is not None:
                return f"the allocator refuses: {holder.refusal.message}"
            if holder.state is not holders.HolderState.HELD:
                where = "no allocator answers" if holder.session is None else "the allocator has not answered"
                return f"no lease is held: {where}"
            share = ", ".join(f"{name} {quantity.text(micros)}" for name, micros in limiter.amounts().items())
            return f"{len(limiter.waiters)} in the queue; this worker's share is {share}"

    def watch(self, gate: gates.Gate) -> None:
        """Open `gate` at every change of the allocation, and when a report is refused."""
        with self.lock:
            self._watchers.add(gate)

    def unwatch(self, gate: gates.Gate) -> None:
        """No longer."""
        with self.lock:
            self._watchers.discard(gate)

    def subscribe(self, subscription: allocations.Subscription | None) -> None:
        """Publish every change to `subscription`, beginning with the present allocation if there is a lease."""
        with self.lock:
            self._subscription = subscription
            if subscription is None or self.holder.state is not holders.HolderState.HELD:
                return
            present = allocations.of_change(self.holder.allocation())
        subscription.publish(present)

    # The I/O thread's side

    def connected(self, session: int) -> None:
        """Stream number `session` is open, the one before it left."""
        with self.lock:
            self.holder.connected(session)

    def disconnected(self, session: int) -> None:
        """That stream is gone."""
        with self.lock:
            self.holder.disconnected(session)

    def turn(self) -> tuple[messages.Report | None, float]:
        """Do what is due: a report to send now, if any, and the instant of the next turn."""
        with self.lock:
            now = self.now()
            holder, limiter = self.holder, self.limiter
            holder.tick(now)
            admitted = self._admit(now)
            report = holder.make_report(now) if holder.wants_report(now) else None
            self._planned_at = self._due(now)
            if now < limiter.expires_at:
                self._planned_at = min(self._planned_at, limiter.expires_at)
            planned_at = self._planned_at
            changes = holder.take_events()
        self._wake(admitted)
        self._publish(changes)
        return report, planned_at

    def granted(self, session: int, grant: messages.Grant) -> None:
        """A grant came on stream `session`."""
        with self.lock:
            now = self.now()
            shape = self.limiter.shape
            self.holder.granted(session, grant, now)
            woken: list[limiters.Waiter] = []
            failed: list[Ticket] = []
            if self.limiter.shape is not shape:
                failed = self._price(now)
            woken = self._admit(now)
            if self.holder.end is not None:
                failed += self._fail_all(functools.partial(failures.ended, self.budget, self.holder.end))
            changes = self.holder.take_events()
        self._wake(woken)
        self._open(failed)
        self._publish(changes)

    def refused(self, session: int, refusal: messages.Refusal) -> None:
        """A report was refused on stream `session`."""
        with self.lock:
            self.holder.refused(session, refusal, self.now())
            failed: list[Ticket] = []
            make_error = functools.partial(failures.error_of, refusal)
            is_telling = self.holder.refusal is refusal and failures.is_lasting(make_error())
            if is_telling and self.holder.state is not holders.HolderState.HELD:
                failed = self._fail_all(make_error)
            changes = self.holder.take_events()
            is_news = self._warned_of != refusal.message
            self._warned_of = refusal.message
        if is_news:
            _log.warning("report_refused", budget=self.budget, reason=refusal.reason, message=refusal.message)
        self._open(failed)
        self._publish(changes, is_refusal=True)

    def close(self) -> messages.Release | None:
        """Admit nothing more and fail who waits; the lease to give back, if one is held."""
        with self.lock:
            if self.is_closed:
                return None
            self.is_closed = True
            release = None
            if self.holder.end is None:
                release = self.holder.make_release(self.now())
            failed = self._fail_all(functools.partial(failures.ended, self.budget, messages.LeaseEnd.RELEASED))
            changes = self.holder.take_events()
        self._open(failed)
        self._publish(changes)
        return release if release is not None and release.lease_id else None

    def _price(self, now: float) -> list[Ticket]:
        """The terms are new: what everyone in the queue costs, in the old order. Those it fails for."""
        limiter = self.limiter
        queue: list[Ticket] = []
        for waiter in limiter.waiters:
            assert isinstance(waiter.payload, Ticket)
            queue.append(waiter.payload)
        queue += self._unpriced
        limiter.waiters.clear()
        self._unpriced.clear()
        limiter.unpriced = 0
        failed = []
        for ticket in queue:
            try:
                cost = self._cost(ticket.request)
            except errors.LeaseholdError as error:
                ticket.error = error
                failed.append(ticket)
                continue
            ticket.waiter = limiters.Waiter(cost, ticket)
            limiter.enqueue(ticket.waiter)
        if not limiter.waiters:
            limiter.reopen(now)
        return failed

    def _fail_all(self, make_error: Callable[[], errors.LeaseholdError]) -> list[Ticket]:
        failed = list(self._unpriced)
        for waiter in self.limiter.waiters:
            assert isinstance(waiter.payload, Ticket)
            failed.append(waiter.payload)
        for ticket in failed:
            ticket.error = make_error()
        self._unpriced.clear()
        self.limiter.waiters.clear()
        self.limiter.unpriced = 0
        return failed

    @staticmethod
    def _open(tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if ticket.gate is not None:
                ticket.gate.open()

    def _publish(self, changes: list[holders.AllocationChanged], *, is_refusal: bool = False) -> None:
        if not changes and not is_refusal:
            return
        with self.lock:
            subscription, watchers = self._subscription, list(self._watchers)
        for change in changes:
            _log.debug("allocation_changed", budget=self.budget, state=change.state.value, reason=change.reason)
            if subscription is not None:
                subscription.publish(allocations.of_change(change))
        for gate in watchers:
            gate.open()
        for listener in self._listeners:
            try:
                listener()
            except Exception:  # noqa: BLE001  an executor's trouble must not stop the renewals
                _log.exception("allocation_listener_failed", budget=self.budget)

    def _due(self, now: float) -> float:
        return min(self.holder.report_due(now), now + self.limiter.seconds_until_head(now))

    def _plan(self, now: float) -> None:
        """Wake the I/O thread if something is due sooner than it will look by itself."""
        if self.poke is None:
            return
        due = self._due(now)
        if due < self._planned_at - _SOONER_SECONDS:
            self._planned_at = due
            self.poke()


def own_process() -> processes.ProcessKey | None:
    """Identity of this process, by which its death can be certified; None where /proc does not tell."""
    # Here, because psutil-free start-up matters to short-lived workers, and only joining ones need it.
    from leasehold.runtime import identity

    try:
        known = identity.identify(os.getpid())
    except (errors.LeaseholdError, OSError, ValueError):
        return None
    return processes.ProcessKey(known.boot_id, known.pid_namespace, known.pid, known.start_time_ticks)
