"""An auditor of a simulated budget: what the provider counts, and what holders physically have.

It imports nothing of what it judges. It is told raw facts (an admission and the instant at which it arrives at
the provider, a completion, a death, a limit) in true time, and raises `Violation` at the first instant at which

* the units counted in a true window (t - W, t] over all holders exceed the limit in force;
* the calls in flight at the provider exceed the limit in force;
* a holder physically has more of a dimension than the allocator's book, or etcd, believes possible;
* what holders physically have and the pool together exceed the limit in force.

A limit that is lowered may be exceeded up to its old value for `grace_seconds`, no longer. Units settled above
the reserve are overdraft: counted apart, never as a violation. Amounts are whole micro-units, instants seconds.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

#: Book entry of units granted under an etcd that was lost: they belong to nobody in particular.
ANYBODY = ""


class Violation(AssertionError):
    """A safety claim is broken."""


@dataclass(slots=True, eq=False)
class Entry:
    """Units of one admission in one dimension."""

    amount: int
    #: Instant from which the provider counts them.
    counted_from: float
    is_counted: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """One admission."""

    incarnation: str
    entries: dict[str, Entry]
    calls: dict[str, int]
    is_over: bool = False


@dataclass(slots=True)
class _Rate:
    window_seconds: float
    counted: deque[Entry] = field(default_factory=deque)
    total: int = 0
    peak: int = 0


@dataclass(slots=True)
class _Use:
    """What one incarnation has spent and the provider may still count."""

    rates: dict[str, deque[Entry]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    overdraft: dict[str, int] = field(default_factory=dict)


class BudgetAuditor:
    """The provider's counters of one budget."""

    def __init__(self, *, windows: Mapping[str, float], is_charged_at_completion: bool = False) -> None:
        """`windows`: seconds by rate dimension; any other dimension counts calls in flight."""
        self._rates = {name: _Rate(seconds) for name, seconds in windows.items()}
        self._is_charged_at_completion = is_charged_at_completion
        self._calls: dict[str, int] = {}
        self._limits: dict[str, list[tuple[float, int]]] = {}
        self._pending: list[tuple[float, int, str, Entry]] = []
        self._count = 0
        self._uses: dict[str, _Use] = {}
        self.admissions = 0
        self.overdraft_total = 0
        #: Units counted by dimension since the beginning.
        self.counted_total: dict[str, int] = {}

    # Limits

    def set_limit(self, now: float, dimension: str, limit: int, *, grace_seconds: float) -> None:
        """From `now` the limit is `limit`; a higher one before it is allowed for `grace_seconds` more."""
        kept = [(until, old) for until, old in self._limits.get(dimension, []) if until > now and old > limit]
        for index, (until, old) in enumerate(kept):
            if until == float("inf"):
                kept[index] = (now + grace_seconds, old)
        self._limits[dimension] = [*kept, (float("inf"), limit)]

    def allowed(self, now: float, dimension: str) -> int:
        """Most that may be counted at `now`."""
        return max((limit for until, limit in self._limits.get(dimension, ()) if until >= now), default=0)

    def add_window(self, dimension: str, window_seconds: float) -> None:
        """A rate dimension that was not there before."""
        self._rates.setdefault(dimension, _Rate(window_seconds))

    # Raw facts

    def admitted(self, now: float, incarnation: str, amounts: Mapping[str, int], arrives_at: float) -> Ticket:
        """A holder let a request go that reaches the provider at `arrives_at`."""
        self.advance(now)
        self.admissions += 1
        use = self._use(incarnation)
        ticket = Ticket(incarnation, {}, {})
        for name, amount in amounts.items():
            if not amount:
                continue
            if name in self._rates:
                at = float("inf") if self._is_charged_at_completion else arrives_at
                entry = Entry(amount, at)
                ticket.entries[name] = entry
                use.rates.setdefault(name, deque()).append(entry)
                if not self._is_charged_at_completion:
                    self._later(arrives_at, name, entry)
            else:
                ticket.calls[name] = amount
                self._calls[name] = self._calls.get(name, 0) + amount
                use.calls[name] = use.calls.get(name, 0) + amount
                self._check_calls(now, name)
        return ticket

    def completed(self, now: float, ticket: Ticket, actual: Mapping[str, int]) -> None:
        """The provider finished a request; `actual` corrects what was reserved (left out: as reserved)."""
        self.advance(now)
        for name, entry in ticket.entries.items():
            used = actual.get(name, entry.amount)
            if used > entry.amount:
                self.overdraft_total += used - entry.amount
                use = self._use(ticket.incarnation)
                use.overdraft[name] = use.overdraft.get(name, 0) + used - entry.amount
            corrected = min(used, entry.amount)
            if entry.is_counted:
                self._rates[name].total += corrected - entry.amount
            entry.amount = corrected
        self._over(now, ticket)

    def disconnected(self, now: float, ticket: Ticket) -> None:
        """The provider gives up a request whose holder is gone: the reserve stays counted, the call ends."""
        self.advance(now)
        self._over(now, ticket)

    def _over(self, now: float, ticket: Ticket) -> None:
        if ticket.is_over:
            return
        ticket.is_over = True
        for name, amount in ticket.calls.items():
            self._calls[name] -= amount
            self._use(ticket.incarnation).calls[name] -= amount
        if self._is_charged_at_completion:
            for name, entry in ticket.entries.items():
                entry.counted_from = now
                self._later(now, name, entry)
            self.advance(now)

    # Counting

    def _use(self, incarnation: str) -> _Use:
        use = self._uses.get(incarnation)
        if use is None:
            use = self._uses[incarnation] = _Use()
        return use

    def _later(self, at: float, name: str, entry: Entry) -> None:
        self._count += 1
        heapq.heappush(self._pending, (at, self._count, name, entry))

    def advance(self, now: float) -> None:
        """Let requests arrive that do so by `now`."""
        while self._pending and self._pending[0][0] <= now:
            at, _, name, entry = heapq.heappop(self._pending)
            rate = self._rates[name]
            entry.is_counted = True
            rate.counted.append(entry)
            rate.total += entry.amount
            self.counted_total[name] = self.counted_total.get(name, 0) + entry.amount
            edge = at - rate.window_seconds
            while rate.counted and rate.counted[0].counted_from <= edge:
                gone = rate.counted.popleft()
                gone.is_counted = False
                rate.total -= gone.amount
            rate.peak = max(rate.peak, rate.total)
            allowed = self.allowed(at, name)
            if rate.total > allowed:
                raise Violation(
                    f"t={at:.4f}: {name}: {rate.total / 1e6:g} counted in {rate.window_seconds:g} s, "
                    f"the limit in force is {allowed / 1e6:g}"
                )

    def _check_calls(self, now: float, name: str) -> None:
        if self._calls[name] > self.allowed(now, name):
            raise Violation(
                f"t={now:.4f}: {name}: {self._calls[name] / 1e6:g} in flight, "
                f"the limit in force is {self.allowed(now, name) / 1e6:g}"
            )

    def peak(self, dimension: str) -> int:
        """Highest count in any window so far."""
        return self._rates[dimension].peak

    # The conserved stock

    def spent(self, now: float, incarnation: str) -> dict[str, int]:
        """What the provider may count now, or will when it arrives, of an incarnation."""
        use = self._uses.get(incarnation)
        if use is None:
            return {}
        spent = {name: amount for name, amount in use.calls.items() if amount}
        for name, entries in use.rates.items():
            edge = now - self._rates[name].window_seconds
            while entries and entries[0].counted_from <= edge:
                entries.popleft()
            spent[name] = sum(entry.amount for entry in entries if entry.counted_from > edge)
        return spent

    def overdraft(self, incarnation: str) -> Mapping[str, int]:
        """Units settled above the reserve by an incarnation, ever."""
        use = self._uses.get(incarnation)
        return use.overdraft if use is not None else {}

    def incarnations(self) -> Iterable[str]:
        """Everyone who ever spent."""
        return self._uses.keys()

    def check_bounds(
        self,
        now: float,
        whose: str,
        physical: Mapping[str, Mapping[str, int]],
        believed: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Each incarnation physically has at most what `believed` (a book, or etcd) says.

        An entry for `ANYBODY` in `believed` is added to each incarnation's.
        """
        anybody = believed.get(ANYBODY, {})
        for incarnation, amounts in physical.items():
            bound = believed.get(incarnation, {})
            overdraft = self.overdraft(incarnation)
            for name, amount in amounts.items():
                most = bound.get(name, 0) + anybody.get(name, 0) + overdraft.get(name, 0)
                if amount > most:
                    raise Violation(
                        f"t={now:.4f}: {incarnation} physically has {amount / 1e6:g} of {name}, "
                        f"{whose} believes at most {most / 1e6:g}"
                    )

    def check_stock(
        self,
        now: float,
        physical: Mapping[str, Mapping[str, int]],
        pool: Mapping[str, int],
        in_force: Mapping[str, int],
    ) -> None:
        """What all physically have, and the pool if it has any, are at most the limit in force."""
        for name, free in pool.items():
            if free <= 0:
                continue
            held = sum(
                max(0, amounts.get(name, 0) - self.overdraft(incarnation).get(name, 0))
                for incarnation, amounts in physical.items()
            )
            if held + free > in_force[name]:
                raise Violation(
                    f"t={now:.4f}: {name}: holders physically have {held / 1e6:g} and the pool {free / 1e6:g}, "
                    f"the limit in force is {in_force[name] / 1e6:g}"
                )
            if in_force[name] > self.allowed(now, name):
                raise Violation(f"t={now:.4f}: {name}: {in_force[name] / 1e6:g} in force is above the limit")
