"""A holder's part of the conserved stock, one object for each dimension.

Rule (design: budget leases, section 1): free + in use + cooling = what the holder owns. Only free units move.
`held` is the sum that counts against the limit; between two grants it never grows.
"""

from collections.abc import Iterator

#: A cooling window is kept in so many buckets; a spent unit returns at the end of its bucket, so at most
#: 1/512 of the window late and never early.
BUCKETS = 512
_RING = BUCKETS + 8

#: Pacing: in any dt seconds a holder admits at most share * (BURST + SPEED * dt / window), plus one request's
#: debt, so that whoever joins finds free units soon. With a window of 60 s: share * (6 + 1.25 dt) / 60.
PACE_BURST = 0.1
PACE_SPEED = 1.25


def pace_share(limit: int, active_workers: int) -> int:
    """The share that an active holder is paced by even while it owns less, as a joiner does at first.

    Its units come to it one by one as others' cool: paced by what it owns it would leave most of them unused.
    """
    return limit // active_workers if active_workers > 0 else 0


def pace_bound(share: int, elapsed_seconds: float, window_seconds: float) -> int:
    """Most micro-units that a holder of `share` admits in `elapsed_seconds`, without the one request's debt."""
    return int(share * (PACE_BURST + PACE_SPEED * max(0.0, elapsed_seconds) / window_seconds)) + 1


class CallStock:
    """A concurrency or slots dimension: a unit is in use while the call runs, then free."""

    __slots__ = ("cap", "in_use")

    def __init__(self) -> None:
        self.cap = 0
        self.in_use = 0

    @property
    def free(self) -> int:
        """Units that may be taken now; negative while a shrink waits for calls to end."""
        return self.cap - self.in_use

    @property
    def held(self) -> int:
        """Units that count against the limit."""
        return max(self.cap, self.in_use)

    def set_cap(self, cap: int) -> None:
        """Own `cap` units from now on; calls in flight above it go on and count until they end."""
        self.cap = cap


class RateStock:
    """A rate dimension: a unit cools from admission (or settle) until window + jitter later."""

    __slots__ = (
        "_first",
        "_kept",
        "_level_at",
        "_returning",
        "admitted_total",
        "cap",
        "cooling_seconds",
        "credit_max",
        "free",
        "in_use",
        "left_late",
        "level",
        "owed",
        "pace_share",
        "respend_until",
        "returning",
        "width",
        "window_seconds",
        "withheld",
    )

    def __init__(self, *, window_seconds: float, jitter_seconds: float, now: float) -> None:
        self.window_seconds = window_seconds
        self.cooling_seconds = window_seconds + jitter_seconds
        self.width = self.cooling_seconds / BUCKETS
        #: Units owned: free + withheld + in use (less owed) + cooling that stays.
        self.cap = 0
        #: Negative while the holder pays off an overdraft.
        self.free = 0
        #: Reserved, not cooling yet (only where the provider charges at completion).
        self.in_use = 0
        #: Part of in_use that leaves once it has cooled.
        self.owed = 0
        #: Cooling units that leave, rather than turn free, when they have cooled.
        self.returning = 0
        #: What has cooled later than this is withheld; see `let_respend`.
        self.respend_until = float("inf")
        #: Units that have cooled, and are not to be spent yet.
        self.withheld = 0
        #: Units that have left, and cooled later than that: if they come back they are withheld.
        self.left_late = 0
        self.admitted_total = 0
        #: Paced by this share where less is owned, micro-units; see `set_pace`.
        self.pace_share = 0
        #: Largest cost that may go into pacing debt; None is no bound.
        self.credit_max: int | None = None
        self.level = 0.0
        self._level_at = now
        self._kept = [0] * _RING
        self._returning = [0] * _RING
        self._first = self.bucket(now)

    @property
    def held(self) -> int:
        """Units that count against the limit."""
        return self.cap + self.returning + self.owed

    @property
    def burst(self) -> float:
        """Most that pacing lets through at one instant, micro-units."""
        return self._share * PACE_BURST

    @property
    def _share(self) -> int:
        return self.cap if self.cap > self.pace_share else self.pace_share

    def set_pace(self, share: int) -> None:
        """Be paced by `share` while less is owned; `advance` first."""
        before = self._share
        self.pace_share = share
        self._repace(before)

    def _repace(self, before: int) -> None:
        share = self._share
        if share > before:
            self.level += (share - before) * PACE_BURST
        elif self.level > 0:
            # A debt is not forgiven.
            self.level = self.level * share / before

    def bucket(self, instant: float) -> int:
        """Number of the bucket that an admission at `instant` cools in."""
        return int(instant / self.width)

    def bucket_end(self, instant: float) -> float:
        """First instant that is not in the bucket of `instant`."""
        return (self.bucket(instant) + 1) * self.width

    def advance(self, now: float) -> None:
        """Let cooled units return and the pace refill."""
        last = self.bucket(now) - BUCKETS - 1
        first = self._first
        if last >= first:
            if last - first >= _RING:
                first = last - _RING + 1
            for number in range(first, last + 1):
                slot = number % _RING
                if self._cooled_at(number) > self.respend_until:
                    self.withheld += self._kept[slot]
                    self.left_late += self._returning[slot]
                else:
                    self.free += self._kept[slot]
                self.returning -= self._returning[slot]
                self._kept[slot] = self._returning[slot] = 0
            self._first = last + 1
        if now > self._level_at:
            speed = self._share * PACE_SPEED / self.window_seconds
            self.level = min(self.burst, self.level + speed * (now - self._level_at))
            self._level_at = now

    def _cooled_at(self, number: int) -> float:
        """First instant at which what was charged in that bucket has cooled."""
        return (number + 1 + BUCKETS) * self.width

    def let_respend(self, until: float, now: float) -> None:
        """What cools up to `until` may be spent anew, what cools later is withheld; `advance` first."""
        self.respend_until = until
        if now <= until:
            self.free += self.withheld
            self.withheld = self.left_late = 0

    def can_admit(self, cost: int) -> bool:
        """Whether `cost` micro-units may be taken now; `advance` first."""
        if cost == 0:
            return True
        if cost > self.free:
            return False
        if cost <= self.level:
            return True
        is_allowed_debt = self.credit_max is None or cost <= self.credit_max
        return cost > self.burst and self.level >= self.burst and is_allowed_debt

    def charge(self, instant: float, cost: int) -> None:
        """Take `cost` at `instant`: it cools from then. May make `free` negative (an overdraft)."""
        self.free -= cost
        self.level -= cost
        self.admitted_total += cost
        self._kept[self.bucket(instant) % _RING] += cost

    def reserve(self, cost: int) -> None:
        """Take `cost` that cools only from `settle_reserved` on."""
        self.free -= cost
        self.level -= cost
        self.admitted_total += cost
        self.in_use += cost

    def settle_reserved(self, instant: float, reserved: int, actual: int) -> None:
        """Of `reserved`, `actual` was used and cools from `instant`; the rest is free, more is debt."""
        self.in_use -= reserved
        self.admitted_total += max(0, actual - reserved)
        leaving = min(self.owed, reserved)
        self.owed -= leaving
        slot = self.bucket(instant) % _RING
        self._returning[slot] += min(leaving, actual)
        self.returning += min(leaving, actual)
        self._kept[slot] += actual - min(leaving, actual)
        self.free += (reserved - leaving) - (actual - min(leaving, actual))
        self.level = min(self.burst, self.level + max(0, reserved - actual))

    def is_cooling(self, admitted_at: float) -> bool:
        """Whether what was charged at `admitted_at` has not turned free again; `advance` first."""
        return self.bucket(admitted_at) >= self._first

    def recharge(self, admitted_at: float, instant: float, cost: int) -> None:
        """What was charged at `admitted_at`, and is cooling, cools from `instant` on, not earlier.

        A part that was to leave once it has cooled still does: until then it counts.
        """
        old, new = self.bucket(admitted_at) % _RING, self.bucket(instant) % _RING
        leaving = self._leaving(old, cost)
        self._returning[old] -= leaving
        self._returning[new] += leaving
        self._kept[old] -= cost - leaving
        self._kept[new] += cost - leaving

    def _leaving(self, slot: int, amount: int) -> int:
        """Of `amount` that cools in a bucket, the part that leaves when it has cooled."""
        returning = self._returning[slot]
        return min(amount * returning // max(1, self._kept[slot] + returning), returning)

    def take_over(self, old: "RateStock", now: float) -> None:
        """Own what `old` owned; what is not free there cools here from `now` on, over the whole new window."""
        self.cap, self.free, self.returning = old.cap, old.free, old.returning + old.owed
        self.respend_until, self.left_late = old.respend_until, old.left_late
        self.pace_share = old.pace_share
        self.level = min(old.level, self.burst)
        self.admitted_total, self.credit_max = old.admitted_total, old.credit_max
        slot = self.bucket(now) % _RING
        self._kept[slot] = old.cap - old.free
        self._returning[slot] = self.returning

    def refund(self, admitted_at: float, amount: int) -> None:
        """Units charged at `admitted_at` were not used after all; a no-op once they have cooled."""
        number = self.bucket(admitted_at)
        if number < self._first:
            return
        slot = number % _RING
        leaving = 0
        if self.returning:
            leaving = self._leaving(slot, amount)
            self._returning[slot] -= leaving
            self.returning -= leaving
        self._kept[slot] -= amount - leaving
        self.free += amount - leaving
        self.level = min(self.burst, self.level + amount)

    def set_cap(self, cap: int) -> None:
        """Own `cap` micro-units from now on.

        A shrink gives up the same fraction of free units now and of each cooling unit as it cools; a growth
        first keeps what was about to leave, so `held` never exceeds the larger of the old `held` and `cap`.
        """
        if cap < self.cap:
            self._shrink(cap)
        elif cap > self.cap:
            self._grow(cap)

    def _shrink(self, cap: int) -> None:
        """Exact, so that `held` never grows by a rounding, nor by a debt: of a debt nothing can be given up."""
        delta, whole = self.cap - cap, self.cap
        free = max(0, self.free) * delta // whole
        self.free -= free
        left, total = delta - free, whole - self.free - free
        taken = self.withheld * left // total if total else 0
        self.withheld -= taken
        self.left_late += taken
        left, total = left - taken, total - self.withheld - taken
        busy = self.in_use - self.owed
        taken = busy * left // total if total else 0
        self.owed += taken
        left, total = left - taken, total - busy
        for slot in range(_RING):
            kept = self._kept[slot]
            if kept > 0 and left:
                taken = kept * left // total
                self._kept[slot] = kept - taken
                self._returning[slot] += taken
                self.returning += taken
                left, total = left - taken, total - kept
        before, self.cap = self._share, cap
        self._repace(before)

    def _grow(self, cap: int) -> None:
        left = cap - self.cap
        before, self.cap = self._share, cap
        self._repace(before)
        kept = min(left, self.owed)
        self.owed -= kept
        left -= kept
        if self.returning:
            for number in range(self._first, self._first + _RING):
                slot = number % _RING
                kept = min(left, self._returning[slot])
                self._returning[slot] -= kept
                self._kept[slot] += kept
                self.returning -= kept
                left -= kept
        late = min(left, self.left_late)
        self.left_late -= late
        self.withheld += late
        self.free += left - late

    def cooling(self, now: float) -> Iterator[tuple[float, int]]:
        """(seconds until it has cooled, micro-units) of what cools, soonest first."""
        for number in range(self._first, self.bucket(now) + 1):
            slot = number % _RING
            amount = self._kept[slot] + self._returning[slot]
            if amount > 0:
                yield max(0.0, self._cooled_at(number) - now), amount

    def seconds_until(self, cost: int, now: float) -> float:
        """Seconds until `cost` can be admitted if nothing else happens; infinity if time is not enough."""
        if self.credit_max is not None and cost > max(self.credit_max, self.burst):
            # It goes into debt, which waits for the answer to a report.
            return float("inf")
        pace_seconds = 0.0
        wanted = min(float(cost), self.burst)
        if self.level < wanted:
            speed = self._share * PACE_SPEED / self.window_seconds
            pace_seconds = (wanted - self.level) / speed if speed > 0 else float("inf")
        lacking = cost - self.free
        if lacking <= 0:
            return pace_seconds
        for number in range(self._first, self.bucket(now) + 1):
            cooled_at = self._cooled_at(number)
            if cooled_at > self.respend_until:
                break
            lacking -= self._kept[number % _RING]
            if lacking <= 0:
                return max(pace_seconds, cooled_at - now)
        return float("inf")

    def audit(self) -> None:
        """Assert the stock's own sums; for tests and `doctor`."""
        kept, returning = sum(self._kept), sum(self._returning)
        own = self.free + self.withheld + (self.in_use - self.owed) + kept
        assert own == self.cap, "free + withheld + in use + cooling = cap"
        assert returning == self.returning, "returning is the sum of its buckets"
        assert min(self._returning) >= 0, "nothing returns twice"
        assert 0 <= self.owed <= max(0, self.in_use), "owed is part of in use"


def merge_parts(
    parts: list[tuple[float, int]], parts_max: int, edge_seconds: float = 0.0
) -> list[tuple[float, int]]:
    """At most `parts_max` (seconds, amount) steps: neighbours are merged to the later, never the earlier.

    None spans `edge_seconds`: an eighth of the steps is for what cools before that.
    """
    early = [part for part in parts if part[0] <= edge_seconds]
    if early and len(early) < len(parts) and parts_max > 1:
        late = parts[len(early) :]
        early = merge_parts(early, max(1, parts_max // 8, parts_max - len(late)))
        return early + merge_parts(late, parts_max - len(early))
    if len(parts) <= parts_max:
        return parts
    size = -(-len(parts) // parts_max)
    return [
        (parts[min(start + size, len(parts)) - 1][0], sum(amount for _, amount in parts[start : start + size]))
        for start in range(0, len(parts), size)
    ]
