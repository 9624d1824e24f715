"""Admission at the holder, from its lease alone: no call leaves the process.

The limiter is pure: the caller passes `now`, seconds on CLOCK_BOOTTIME, and serialises calls (the client
holds one lock). Waiting acquires are served in order: who comes later never overtakes.

Most admissions take a short path: three integer counters, good until `fast_until`. They are opened from the
stocks by `reopen` and folded back by `fold`; between the two the stocks lag behind by what the counters say.
What is folded is charged at the latest instant at which it can have happened, so the short path is never
looser than the exact one. A call that ends in the `window` it began in undoes its counters: it then was
never charged more than it used. Any other call ends by `release`. The short path, under the caller's lock:

- admit `r` requests and `t` tokens, plain ints and no other cost, if `now < fast_until`,
  `0 <= r <= fast_requests`, `0 <= t <= min(fast_tokens, token_bound)` and `fast_calls > 0`: take them off the
  counters and one off `fast_calls`, remember `window`;
- end it, having used `u <= t` tokens, if `window` is still the same: `fast_calls += 1`, `fast_tokens += t - u`;
  else by `release` with that `window`, and what `opening` tells of it.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core.budget import messages, model, quantity, stock
from leasehold.core.budget import shape as shapes
from leasehold.core.budget.shape import EXACT, REQUESTS, TOKENS, Cost, Opening, Shape, Waiter

__all__ = ("EXACT", "REQUESTS", "TOKENS", "Cost", "Limiter", "Opening", "Shape", "Waiter")

#: A counter that never binds: the budget has no such dimension. It is above any limit, and of one digit inside
#: the interpreter, which compares such integers quickly.
_UNBOUND = (1 << 30) - 1


@dataclass(slots=True)
class Totals:
    """What a holder did since it began, micro-units by dimension."""

    settled: dict[str, int] = field(default_factory=dict)
    overdraft: dict[str, int] = field(default_factory=dict)


class Limiter:
    """Admission control of one holder on one budget.

    It starts without a lease (everything waits). `set_terms` tells the dimensions, `set_amounts` what the
    holder owns, `expires_at` until when.
    """

    __slots__ = (
        "_call_stock",
        "_fast_base",
        "_fast_open_from",
        "_names",
        "_open_window",
        "_request_stock",
        "_token_stock",
        "_totals",
        "_unended",
        "backlog",
        "expires_at",
        "fast_calls",
        "fast_requests",
        "fast_tokens",
        "fast_until",
        "in_flight",
        "is_idle_reported",
        "largest_cost",
        "largest_enqueued",
        "last_admission",
        "last_refusal",
        "respend_until",
        "shape",
        "short_path",
        "stocks",
        "terms",
        "token_bound",
        "token_default",
        "unpriced",
        "waiters",
        "window",
    )

    def __init__(self) -> None:
        self.terms: messages.Terms | None = None
        #: What the terms make of the stocks; a permit is released against the shape it was admitted under.
        self.shape: Shape | None = None
        self.stocks: dict[str, stock.CallStock | stock.RateStock] = {}
        self._names: tuple[str, ...] = ()
        self._request_stock: stock.RateStock | None = None
        self._token_stock: stock.RateStock | None = None
        self._call_stock: stock.CallStock | None = None
        self._totals = Totals()
        #: Instant from which nothing may be admitted.
        self.expires_at = 0.0
        #: What cools later is not spent anew until a report is answered.
        self.respend_until = float("inf")
        self.waiters: deque[Waiter] = deque()
        #: Acquires that wait for the budget's terms, without which they have no cost.
        self.unpriced = 0
        #: Largest cost seen of each dimension, micro-units.
        self.largest_cost: dict[str, int] = {}
        #: Largest cost of those that began to wait since the last report, by dimension; the holder clears it.
        self.largest_enqueued: dict[str, int] = {}
        self.last_admission = float("-inf")
        #: When somebody who would not wait was last turned away.
        self.last_refusal = float("-inf")
        #: Work that waits outside the queue (an executor's tasks), micro-units by dimension; empty: none does.
        self.backlog: dict[str, int] = {}
        #: While the allocator believes that this holder is idle, every admission takes the exact path.
        self.is_idle_reported = True
        #: Permits in flight where no single concurrency dimension counts them (the exact path only).
        self.in_flight = 0
        #: Whether the budget's shape allows the short path at all.
        self.short_path = False
        #: Most whole tokens that one request on the short path may ask for.
        self.token_bound = 0
        #: Whole tokens of a request on the short path that names none; -1: the exact path decides.
        self.token_default = -1
        self.fast_until = 0.0
        self.fast_requests = self.fast_tokens = self.fast_calls = 0
        #: Number of the present opening of the short path; a permit of the same number may undo its counters.
        self.window = 0
        self._fast_base = (0, 0, 0)
        self._fast_open_from = 0.0
        #: What was taken through openings whose calls have not all ended: whole requests and tokens, and calls.
        self._unended: dict[int, Opening] = {}
        self._open_window = 0

    # Terms and lease

    def set_terms(self, terms: messages.Terms, now: float) -> None:
        """Take the budget's terms; dimensions that keep kind and window keep their state."""
        self.fold(now)
        old = self.shape
        self.terms = terms
        self.stocks = {
            dimension.name: shapes.stock_of(dimension, terms, old, now, settled=self._settled(dimension.name))
            for dimension in terms.dimensions
        }
        self.let_respend(self.respend_until, now)
        self._names = tuple(self.stocks)
        self.shape = Shape(terms, self.stocks)
        self._bind_roles()

    def _bind_roles(self) -> None:
        terms = self.terms
        assert terms is not None
        requests, tokens = self.stocks.get(REQUESTS), self.stocks.get(TOKENS)
        self._request_stock = requests if isinstance(requests, stock.RateStock) else None
        self._token_stock = tokens if isinstance(tokens, stock.RateStock) else None
        call_name = self.shape.call_name if self.shape is not None else None
        calls = self.stocks[call_name] if call_name is not None else None
        self._call_stock = calls if isinstance(calls, stock.CallStock) else None
        # A budget may give a standard name another kind; the counters know the standard ones only.
        has_standard_kinds = requests is self._request_stock and tokens is self._token_stock
        self.short_path = (
            self._call_stock is not None and has_standard_kinds and terms.charged_at is model.ChargedAt.ARRIVAL
        )
        if self._token_stock is None:
            self.token_bound = self.token_default = 0
            return
        micros = terms.max_tokens_per_request
        self.token_bound = micros // quantity.MICRO if micros else _UNBOUND
        self.token_default = -1 if not micros or micros % quantity.MICRO else self.token_bound

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Dimensions in the budget's order; empty before the first grant."""
        return self._names

    def set_amounts(self, amounts: Mapping[str, int], now: float) -> None:
        """Own `amounts` (micro-units by dimension; one left out is 0) from now on."""
        self.fold(now)
        for name, held in self.stocks.items():
            if isinstance(held, stock.RateStock):
                held.advance(now)
            held.set_cap(amounts.get(name, 0))

    def set_pace(self, active_workers: int, now: float) -> None:
        """Be paced as one of so many active holders, even while less is owned."""
        assert self.terms is not None
        self.fold(now)
        for dimension in self.terms.dimensions:
            held = self.stocks[dimension.name]
            if isinstance(held, stock.RateStock):
                held.advance(now)
                held.set_pace(stock.pace_share(dimension.limit, active_workers))

    def let_respend(self, until: float, now: float) -> None:
        """Spend anew what cools up to `until`, nothing that cools later. `fold` first, `reopen` after."""
        self.respend_until = until
        for held in self.stocks.values():
            if isinstance(held, stock.RateStock):
                held.advance(now)
                held.let_respend(until, now)

    def amounts(self) -> dict[str, int]:
        """What is owned now, micro-units by dimension."""
        return {name: held.cap for name, held in self.stocks.items()}

    def tighten_credit(self, largest: Mapping[str, int]) -> None:
        """A report promises that no cost above `largest` goes into pacing debt: keep to it from now on."""
        for name, amount in largest.items():
            held = self.stocks.get(name)
            if isinstance(held, stock.RateStock):
                held.credit_max = amount if held.credit_max is None else min(held.credit_max, amount)

    def allow_credit(self, largest: Mapping[str, int]) -> None:
        """The report that promised `largest` was answered: debt up to it is accounted for."""
        for name, amount in largest.items():
            held = self.stocks.get(name)
            if isinstance(held, stock.RateStock):
                held.credit_max = amount

    def lacks_credit(self) -> bool:
        """Whether a cost was seen that pacing lets through only after it has been reported."""
        return any(
            isinstance(held, stock.RateStock)
            and held.credit_max is not None
            and held.credit_max < self.largest_cost.get(name, 0)
            and held.burst < self.largest_cost.get(name, 0)
            for name, held in self.stocks.items()
        )

    # Costs

    def cost(
        self, requests: float = 1, tokens: float | None = None, others: Mapping[str, float] | None = None
    ) -> Cost:
        """Micro-units of one acquire under the present terms; see `Shape.cost`."""
        assert self.shape is not None, "the terms are known before a cost is computed"
        return self.shape.cost(requests, tokens, others)

    # Admission, exact path

    def try_admit(self, cost: Cost, now: float) -> bool:
        """Take `cost` in every dimension, or nothing in any. False while someone waits: no overtaking."""
        self.fold(now)
        self._advance(now)
        if self.waiters or not self._fits(cost, now):
            self._note_largest(cost)
            self.last_refusal = now
            self.reopen(now)
            return False
        self._take(cost, now)
        self.reopen(now)
        return True

    def enqueue(self, waiter: Waiter, *, is_first: bool = False) -> None:
        """Let `waiter` wait behind those already waiting; `is_first`: before them, where it was the head."""
        # The next release must look at the queue: it may not take the short path.
        self.fast_until = 0.0
        self.window += 1
        self._note_largest(waiter.cost)
        for name, amount in zip(self._names, waiter.cost, strict=True):
            if amount > self.largest_enqueued.get(name, 0):
                self.largest_enqueued[name] = amount
        if is_first:
            self.waiters.appendleft(waiter)
        else:
            self.waiters.append(waiter)

    def withdraw(self, waiter: Waiter) -> bool:
        """Stop waiting. False if it was admitted already (the caller must release it)."""
        if waiter.admitted_at is not None:
            return False
        self.waiters.remove(waiter)
        return True

    def admit_waiting(self, now: float) -> list[Waiter]:
        """Admit from the head of the queue what fits now; each gets `admitted_at`."""
        admitted: list[Waiter] = []
        if not self.waiters:
            return admitted
        self.fold(now)
        self._advance(now)
        while self.waiters and self._fits(self.waiters[0].cost, now):
            waiter = self.waiters.popleft()
            self._take(waiter.cost, now)
            waiter.admitted_at = now
            admitted.append(waiter)
        self.reopen(now)
        return admitted

    def seconds_until_head(self, now: float) -> float:
        """Seconds until the head of the queue fits by time alone; infinity if something else must happen."""
        if not self.waiters or now >= self.expires_at:
            return float("inf")
        seconds = 0.0
        for held, amount in zip(self.stocks.values(), self.waiters[0].cost, strict=True):
            if not amount:
                continue
            if isinstance(held, stock.RateStock):
                seconds = max(seconds, held.seconds_until(amount, now))
            elif amount > held.free:
                return float("inf")
        return seconds

    def try_take_slots(self, name: str, units: int, now: float) -> bool:
        """Take `units` micro-units of one slots dimension, past the queue: those who wait want other things.

        A task that holds a slot may itself wait in the queue, so slots must not be behind it there.
        """
        held = self.stocks.get(name)
        if now >= self.expires_at or not isinstance(held, stock.CallStock) or units > held.free:
            return False
        held.in_use += units
        self.last_admission = now
        return True

    def return_slots(self, name: str, units: int, shape: Shape) -> None:
        """Give back what `try_take_slots` took under `shape`."""
        held = shape.stocks.get(name)
        if held is self.stocks.get(name) and isinstance(held, stock.CallStock):
            held.in_use -= units

    def _fits(self, cost: Cost, now: float) -> bool:
        if now >= self.expires_at:
            return False
        for held, amount in zip(self.stocks.values(), cost, strict=True):
            if not amount:
                continue
            if isinstance(held, stock.RateStock):
                if not held.can_admit(amount):
                    return False
            elif amount > held.free:
                return False
        return True

    def _take(self, cost: Cost, now: float) -> None:
        assert self.terms is not None
        for held, amount in zip(self.stocks.values(), cost, strict=True):
            if isinstance(held, stock.CallStock):
                held.in_use += amount
            elif self.terms.charged_at is model.ChargedAt.ARRIVAL:
                held.charge(now, amount)
            else:
                held.reserve(amount)
        self._note_largest(cost)
        self.last_admission = now
        self.in_flight += self._call_stock is None

    def _note_largest(self, cost: Cost) -> None:
        for name, amount in zip(self._names, cost, strict=False):
            if amount > self.largest_cost.get(name, 0):
                self.largest_cost[name] = amount

    def _advance(self, now: float) -> None:
        for held in self.stocks.values():
            if isinstance(held, stock.RateStock):
                held.advance(now)

    # Settling, exact path

    def release(
        self,
        cost: Cost,
        actual: Mapping[str, int],
        admitted_at: float,
        now: float,
        shape: Shape | None = None,
        window: int = EXACT,
    ) -> None:
        """End an admitted call: `actual` (micro-units by dimension; left out: as reserved) is what it used.

        Below the reserve the rest turns free at once; above it the holder is in debt, told as overdraft.
        `shape` is the one that the call was admitted under, None the present one; `window` the opening of the
        short path that it came through, if it did.
        """
        shape = shape or self.shape
        assert shape is not None
        self.fold(now)
        if window != EXACT:
            self._end_unended(window, dict(zip(shape.stocks, cost, strict=True)))
        self._advance(now)
        at_arrival = shape.terms.charged_at is model.ChargedAt.ARRIVAL
        for (name, held), reserved in zip(shape.stocks.items(), cost, strict=True):
            is_present = self.stocks.get(name) is held
            if isinstance(held, stock.CallStock):
                if is_present:
                    held.in_use -= reserved
                continue
            used = actual.get(name, reserved)
            self._totals.settled[name] = self._totals.settled.get(name, 0) + reserved
            if used > reserved:
                self._totals.overdraft[name] = self._totals.overdraft.get(name, 0) + used - reserved
            if not is_present:
                self._release_replaced(name, reserved, used, at_arrival=at_arrival, now=now)
            elif not at_arrival:
                held.settle_reserved(now, reserved, used)
            elif used < reserved:
                held.refund(admitted_at, reserved - used)
            elif used > reserved:
                held.charge(now, used - reserved)
        self.in_flight -= shape.call_name is None
        self.reopen(now)

    def _end_unended(self, window: int, cost: Mapping[str, int]) -> None:
        """One call fewer of an opening; what the last one leaves was settled by those that ended in it."""
        left = self._unended[window]
        left.requests -= cost.get(REQUESTS, 0) // quantity.MICRO
        left.tokens -= cost.get(TOKENS, 0) // quantity.MICRO
        left.calls -= 1
        if not left.calls:
            del self._unended[window]
            self._settle_whole(left.requests, left.tokens)

    def _settle_whole(self, requests: int, tokens: int) -> None:
        settled = self._totals.settled
        for name, units in ((REQUESTS, requests), (TOKENS, tokens)):
            settled[name] = settled.get(name, 0) + units * quantity.MICRO

    def _release_replaced(self, name: str, reserved: int, used: int, *, at_arrival: bool, now: float) -> None:
        """The terms changed meanwhile: what it reserved cools already; charge what was not counted."""
        held = self.stocks.get(name)
        late = max(0, used - reserved) if at_arrival else used
        if isinstance(held, stock.RateStock) and late:
            held.charge(now, late)

    def restamp(self, waiter: Waiter, now: float) -> bool:
        """`waiter` was admitted a while ago and goes on only now: its request is sent from now on.

        False if that was so long ago that its units have cooled, and may be another's: it must be given back.
        """
        assert self.terms is not None and waiter.admitted_at is not None
        if self.terms.charged_at is model.ChargedAt.ARRIVAL:
            self.fold(now)
            self._advance(now)
            charged = [
                (held, amount)
                for held, amount in zip(self.stocks.values(), waiter.cost, strict=True)
                if amount and isinstance(held, stock.RateStock)
            ]
            is_cooling = all(held.is_cooling(waiter.admitted_at) for held, _ in charged)
            if is_cooling:
                for held, amount in charged:
                    held.recharge(waiter.admitted_at, now, amount)
            self.reopen(now)
            if not is_cooling:
                return False
        waiter.admitted_at = now
        return True

    # The short path's counters

    def opening(self, window: int) -> Opening:
        """The opening of the short path that a call came through which has not ended."""
        ended = self._unended.get(window)
        if ended is not None:
            return ended
        assert self.shape is not None
        return Opening(self.shape, self._fast_open_from)

    def fold(self, now: float) -> None:
        """Bring what the short path took into the stocks, and close it."""
        base_requests, base_tokens, base_calls = self._fast_base
        requests = base_requests - self.fast_requests
        tokens = base_tokens - self.fast_tokens
        calls = base_calls - self.fast_calls
        instant = min(now, self.fast_until) if self.fast_until > self._fast_open_from else now
        if requests and self._request_stock is not None:
            # The last instant before the bucket's end is in the bucket that the counters were opened in.
            self._request_stock.charge(
                min(instant, self._last_instant(self._request_stock)), requests * quantity.MICRO
            )
        if tokens and self._token_stock is not None:
            self._token_stock.charge(
                min(instant, self._last_instant(self._token_stock)), tokens * quantity.MICRO
            )
        if calls and self._call_stock is not None:
            self._call_stock.in_use += calls * quantity.MICRO
            assert self.shape is not None
            opened_at = self._fast_open_from
            self._unended[self._open_window] = Opening(self.shape, opened_at, requests, tokens, calls)
        elif requests or tokens:
            self._settle_whole(requests, tokens)
        if requests or tokens:
            self.last_admission = instant
        self.fast_until = 0.0
        self.window += 1
        self._fast_base = (self.fast_requests, self.fast_tokens, self.fast_calls)

    def _last_instant(self, held: stock.RateStock) -> float:
        return held.bucket_end(self._fast_open_from) - held.width / 4

    def reopen(self, now: float) -> None:
        """Open the short path from the stocks, until the first instant at which anything must be looked at."""
        terms = self.terms
        if terms is None or self.waiters or self.is_idle_reported or now >= self.expires_at:
            return
        if self._call_stock is None or not self.short_path:
            return
        until = self.expires_at
        requests = tokens = _UNBOUND
        # Advanced first: what is folded later is charged to the bucket of `now`, whose place must be clear.
        held = self._request_stock
        if held is not None:
            held.advance(now)
            requests = int(min(held.free, held.level)) // quantity.MICRO
            until = min(until, held.bucket_end(now))
        held = self._token_stock
        if held is not None:
            held.advance(now)
            tokens = int(min(held.free, held.level)) // quantity.MICRO
            until = min(until, held.bucket_end(now))
        self.fast_requests, self.fast_tokens = requests, tokens
        self.fast_calls = self._call_stock.free // quantity.MICRO
        self._fast_base = (requests, tokens, self.fast_calls)
        self._fast_open_from = now
        self._open_window = self.window
        self.fast_until = until

    # What reports say

    def is_active(self, now: float) -> bool:
        """Whether work waits or runs, or was admitted or refused within the activity timeout. `fold` first."""
        if self.waiters or self.unpriced or self.backlog or self.in_flight > 0 or self.calls_in_use() > 0:
            return True
        timeout = self.terms.activity_timeout_seconds if self.terms else float("inf")
        return now - self.last_activity < timeout

    @property
    def last_activity(self) -> float:
        """When something was last admitted, or turned away for want of units. `fold` first."""
        return max(self.last_admission, self.last_refusal)

    def calls_in_use(self) -> int:
        """Calls in flight as the concurrency dimension counts them, micro-units. `fold` first."""
        return max(
            (held.in_use for held in self.stocks.values() if isinstance(held, stock.CallStock)), default=0
        )

    def held(self) -> dict[str, int]:
        """Upper bound of what counts against the limit, micro-units by dimension. `fold` first."""
        return {name: held.held for name, held in self.stocks.items()}

    def waiting_cost(self) -> dict[str, int]:
        """Largest waiting cost of each dimension."""
        largest: dict[str, int] = {name: units for name, units in self.backlog.items() if name in self.stocks}
        for waiter in self.waiters:
            for name, amount in zip(self._names, waiter.cost, strict=False):
                if amount > largest.get(name, 0):
                    largest[name] = amount
        return largest

    def holdings(self, now: float, *, parts_max: int = 24, respend_seconds: float = 0.0) -> messages.Holdings:
        """The holder's statement of what it has; cooling is told in at most `parts_max` steps a dimension.

        `respend_seconds` is the promise that goes with it, which the caller keeps by `let_respend`.
        """
        self.fold(now)
        self._advance(now)
        cooling: list[messages.Cooling] = []
        refundable: dict[str, int] = {}
        for name, held in self.stocks.items():
            if not isinstance(held, stock.RateStock):
                continue
            parts = stock.merge_parts(list(held.cooling(now)), parts_max, respend_seconds)
            if parts:
                seconds, amounts = zip(*parts, strict=True)
                cooling.append(messages.Cooling(name, amounts, seconds))
            refundable[name] = max(0, held.admitted_total - self._settled(name))
        result = messages.Holdings(
            held=self.held(),
            cooling=tuple(cooling),
            refundable=refundable,
            largest_cost={n: self.largest_cost.get(n, quantity.MICRO) for n in refundable},
            admitted_total={
                n: h.admitted_total for n, h in self.stocks.items() if isinstance(h, stock.RateStock)
            },
            overdraft_total=dict(self._totals.overdraft),
            respend_seconds=respend_seconds,
        )
        self.reopen(now)
        return result

    def _settled(self, name: str) -> int:
        return self._totals.settled.get(name, 0) + self._totals.overdraft.get(name, 0)

    def audit(self) -> None:
        """Assert the sums of every stock."""
        for held in self.stocks.values():
            if isinstance(held, stock.RateStock):
                held.audit()
