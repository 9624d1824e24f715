"""The allocator's book of one budget: the conserved stock, and its copy in etcd.

For each dimension, at every instant: pool + outstanding = limit in force, where outstanding is what every lease
is bound by plus what is stranded. Amounts are micro-units; vectors are in the order of the dimensions.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import effects, messages, model
from leasehold.core.budget import lease as leases
from leasehold.core.budget import throttle as throttles
from leasehold.core.budget.lease import Lease, Stranded, Vector

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Departed:
    """An incarnation whose lease is gone, remembered while messages of it may be under way."""

    held: Lease
    #: What ended it; None: it is certified dead.
    end: messages.LeaseEnd | None
    until: float


class Book:
    """Leases, ghosts, stranded units, and the sums over them."""

    def __init__(
        self, spec: model.BudgetSpec, now: float, *, aftermath: aftermaths.Aftermath = aftermaths.NOTHING
    ) -> None:
        self.leases: dict[str, Lease] = {}
        #: Superseded leases that have not run out, by (holder, incarnation).
        self.ghosts: dict[Key, Lease] = {}
        self.stranded: dict[str, list[Stranded]] = {}
        self.departed: dict[Key, Departed] = {}
        self.aftermath = aftermath
        self.throttles: dict[str, throttles.Throttle] = {}
        #: Units came back since the flag was last cleared.
        self.has_gained = False
        self._stranded_heap: list[tuple[float, int, Stranded]] = []
        self._stranded_count = 0
        self._departed_heap: list[tuple[float, Key]] = []
        self._recorded: dict[Key, effects.Record] = {}
        #: In the order in which they changed, so that a run can be repeated.
        self._unrecorded: dict[Key, None] = {}
        self._adopt(spec, now)
        self.outstanding = [0] * len(self.names)
        self.in_force = list(self.target_limits())

    def _adopt(self, spec: model.BudgetSpec, now: float) -> None:
        self.spec = spec
        self.rules = self.aftermath.rules(spec)
        self.names = tuple(dimension.name for dimension in spec.dimensions)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.quanta = {dimension.name: dimension.quantum for dimension in spec.dimensions}
        self.zero: Vector = (0,) * len(self.names)
        self.throttles = {
            d.name: self.throttles.get(d.name)
            or throttles.Throttle(d.window_seconds if d.is_rate else spec.window_seconds, recovered_at=now)
            for d in spec.dimensions
        }

    def redefine(self, spec: model.BudgetSpec, now: float) -> None:
        """Take a new definition; dimensions keep their units by name."""
        old_names, returning = self.names, self.aftermath.returning(spec)
        self.aftermath = self.aftermath.after(self.spec, spec, self.outstanding, now)
        self._adopt(spec, now)
        if self.names != old_names:
            self._remap(old_names)
        for removed in returning:
            self._quarantine_again(removed, now)
        self.update_limits()

    def _quarantine_again(self, removed: aftermaths.Removed, now: float) -> None:
        """A dimension is back whose units the provider may count yet, whoever used them."""
        whose, index = aftermaths.EARLIER_DEFINITION, self.index[removed.name]
        part = Stranded(whose, whose, index, removed.amount, removed.until, True)
        # What a successor waits for all units that cool is in its rules; here it may be more.
        more_seconds = removed.until - now - self.rules.lost_seconds(index)
        self.strand([part], now, ttl_seconds=max(0.0, more_seconds))

    def _remap(self, old_names: tuple[str, ...]) -> None:
        places = [old_names.index(name) if name in old_names else None for name in self.names]

        def moved(vector: Vector) -> Vector:
            return tuple(vector[p] if p is not None and p < len(vector) else 0 for p in places)

        limits = self.target_limits()
        self.in_force = [limits[i] if p is None else self.in_force[p] for i, p in enumerate(places)]
        for held in self.all_leases():
            held.caps, held.bound, held.held = moved(held.caps), moved(held.bound), moved(held.held)
            held.target, held.refundable, held.overdraft = (
                moved(held.target),
                moved(held.refundable),
                moved(held.overdraft),
            )
            held.unacknowledged = [(version, moved(caps)) for version, caps in held.unacknowledged]
            held.paces = [(version, moved(pace)) for version, pace in held.paces]
            held.largest_cost, held.safe = (), moved(held.safe)
            held.counted = held.bound
            self.touch(held)
        for parts in self.stranded.values():
            for part in parts:
                self._unrecorded[(part.holder, part.incarnation)] = None
                name = old_names[part.index]
                part.amount = part.amount if name in self.index else 0
                part.index = self.index.get(name, 0)
        self.outstanding = [sum(column) for column in zip(self.zero, *self._all_amounts(), strict=True)]

    def _all_amounts(self) -> Iterator[Vector]:
        for held in self.all_leases():
            yield held.bound
        for holder in self.stranded:
            yield self.stranded_of(holder)

    def all_leases(self) -> Iterator[Lease]:
        """Current leases, then ghosts."""
        yield from list(self.leases.values())
        yield from list(self.ghosts.values())

    def is_outstanding(self, held: Lease) -> bool:
        """Whether this very lease is still in the book."""
        return self.leases.get(held.holder) is held or self.ghosts.get((held.holder, held.incarnation)) is held

    # Limits

    def target_limits(self) -> Vector:
        """Defined limits times what AIMD leaves of them, in whole quanta."""
        limits: list[int] = []
        for dimension in self.spec.dimensions:
            factor = self.throttles[dimension.name].factor
            quantum = dimension.quantum
            limits.append(
                dimension.limit
                if factor >= throttles.SCALE
                else max(
                    min(quantum, dimension.limit),
                    dimension.limit * factor // throttles.SCALE // quantum * quantum,
                )
            )
        return tuple(limits)

    def update_limits(self) -> None:
        """A raised limit is in force at once; a lowered one falls as units come back."""
        for index, target in enumerate(self.target_limits()):
            if target >= self.in_force[index]:
                self.in_force[index] = target
            else:
                self.in_force[index] = max(target, min(self.in_force[index], self.outstanding[index]))

    def pool(self) -> list[int]:
        """Units that nobody has."""
        self.update_limits()
        return [max(0, limit - used) for limit, used in zip(self.in_force, self.outstanding, strict=True)]

    def is_overcommitted(self, index: int) -> bool:
        """Whether more is outstanding than the limit in force.

        A holder that slept may tell of calls whose units have been lent anew. No cap may be raised then, not
        even to what its lease is bound by: those units are not its own.
        """
        return self.outstanding[index] > self.in_force[index]

    # Leases

    def add(self, held: Lease) -> None:
        """Enter a lease as its holder's present one."""
        self.leases[held.holder] = held
        self.count(held)

    def ghost(self, held: Lease) -> None:
        """The lease is superseded: it counts, but is nobody's present one."""
        if self.leases.get(held.holder) is held:
            del self.leases[held.holder]
        held.state = leases.LeaseState.GHOST
        self.ghosts[(held.holder, held.incarnation)] = held
        self.count(held)
        self.touch(held)

    def touch(self, held: Lease) -> None:
        """The record of a lease must be looked at."""
        self._unrecorded[(held.holder, held.incarnation)] = None

    def count(self, held: Lease) -> None:
        """Bring the sums up to date after `held.bound` has changed."""
        if held.bound == held.counted:
            return
        counted = held.counted or self.zero
        for index, (new, old) in enumerate(zip(held.bound, counted, strict=True)):
            self.outstanding[index] += new - old
            if new < old:
                self.has_gained = True
        held.counted = held.bound
        self.touch(held)

    def drop(self, held: Lease, end: messages.LeaseEnd | None, until: float) -> None:
        """Take a lease out; the caller strands what it leaves. It is remembered up to `until`."""
        key = (held.holder, held.incarnation)
        if self.leases.get(held.holder) is held:
            del self.leases[held.holder]
        self.ghosts.pop(key, None)
        for index, amount in enumerate(held.counted or self.zero):
            self.outstanding[index] -= amount
        held.counted = self.zero
        self.has_gained = True
        self._unrecorded[key] = None
        self.departed[key] = Departed(held, end, until)
        heapq.heappush(self._departed_heap, (until, key))

    def forget_aftermath(self, now: float) -> bool:
        """Drop what is over of earlier definitions; whether anything was."""
        left = self.aftermath.at(now)
        if left == self.aftermath:
            return False
        self.aftermath = left
        self.rules = left.rules(self.spec)
        return True

    def forget_departed(self, now: float) -> None:
        """Nothing of those who left long ago can be under way any more."""
        while self._departed_heap and self._departed_heap[0][0] <= now:
            _, key = heapq.heappop(self._departed_heap)
            if key in self.departed and self.departed[key].until <= now:
                del self.departed[key]

    # Stranded units

    def strand(self, parts: Iterable[Stranded], now: float, *, ttl_seconds: float = 0.0) -> None:
        """Count `parts` until they have cooled; `ttl_seconds` if their lease may still be in use so long."""
        for part in parts:
            if part.until <= now or part.amount <= 0:
                continue
            part.ttl_seconds = ttl_seconds
            self._stranded_count += 1
            heapq.heappush(self._stranded_heap, (part.until, self._stranded_count, part))
            self.stranded.setdefault(part.holder, []).append(part)
            self.outstanding[part.index] += part.amount
            self._unrecorded[(part.holder, part.incarnation)] = None

    def release_stranded(self, now: float) -> None:
        """Units whose time has come return."""
        while self._stranded_heap and self._stranded_heap[0][0] <= now:
            _, _, part = heapq.heappop(self._stranded_heap)
            self._return(part)

    def forget_stranded(self, holder: str, incarnation: str) -> None:
        """The living holder itself tells what it has: its stranded units are part of that."""
        for part in [p for p in self.stranded.get(holder, ()) if p.incarnation == incarnation]:
            self._return(part)

    def _return(self, part: Stranded) -> None:
        parts = self.stranded.get(part.holder)
        if parts is None or not any(p is part for p in parts):
            return
        self.outstanding[part.index] -= part.amount
        self.stranded[part.holder] = [p for p in parts if p is not part]
        if not self.stranded[part.holder]:
            del self.stranded[part.holder]
        self.has_gained = True
        self._unrecorded[(part.holder, part.incarnation)] = None

    def stranded_of(self, holder: str, incarnation: str | None = None) -> Vector:
        """Stranded units of a holder (of one incarnation)."""
        totals = list(self.zero)
        for part in self.stranded.get(holder, ()):
            if incarnation is None or part.incarnation == incarnation:
                totals[part.index] += part.amount
        return tuple(totals)

    def next_return(self) -> float:
        """Instant at which stranded units return next."""
        return self._stranded_heap[0][0] if self._stranded_heap else float("inf")

    @property
    def is_settled(self) -> bool:
        """Nothing is outstanding."""
        return not (self.leases or self.ghosts or self.stranded or self.aftermath.removed)

    # etcd's copy

    def restored(self, record: effects.Record) -> None:
        """etcd has this record already."""
        self._recorded[(record.holder, record.incarnation)] = record

    def has_record(self, key: Key) -> bool:
        """Whether etcd has, or is about to have, a record of this book under `key`."""
        return key in self._recorded

    def take_record_effects(self) -> list[effects.Effect]:
        """Writes that bring etcd's records in line with the book."""
        if not self._unrecorded:
            return []
        writes: list[effects.Effect] = []
        for key in self._unrecorded:
            record = self._record(key)
            before = self._recorded.get(key)
            if record == before:
                continue
            if record is None:
                del self._recorded[key]
                writes.append(effects.DeleteRecord((self.spec.name, *key)))
            else:
                self._recorded[key] = record
                writes.append(effects.PutRecord(record))
        self._unrecorded.clear()
        return writes

    def _record(self, key: Key) -> effects.Record | None:
        holder, incarnation = key
        held = self.leases.get(holder)
        if held is None or held.incarnation != incarnation:
            held = self.ghosts.get(key)
        stranded = self.stranded_of(holder, incarnation) if holder in self.stranded else self.zero
        if held is None and not any(stranded):
            return None
        bound = held.bound if held is not None else self.zero
        return effects.Record(
            budget=self.spec.name,
            holder=holder,
            incarnation=incarnation,
            lease_id=held.lease_id if held is not None else 0,
            amounts={n: b + s for n, b, s in zip(self.names, bound, stranded, strict=True)},
            ttl_seconds=held.ttl_seconds if held is not None else self._stranded_ttl(key),
            is_cooling=held is None,
            is_tracked=held is None or held.is_tracked,
            is_superseded=held is not None and held.state is leases.LeaseState.GHOST,
        )

    def _stranded_ttl(self, key: Key) -> float:
        holder, incarnation = key
        return max(part.ttl_seconds for part in self.stranded[holder] if part.incarnation == incarnation)

    def amounts(self, vector: Iterable[int]) -> Mapping[str, int]:
        """A vector by dimension name."""
        return dict(zip(self.names, vector, strict=True))

    def audit(self) -> None:
        """Assert the invariants: the sums are what they sum, and the stock is conserved."""
        for held in self.all_leases():
            assert held.counted == held.bound, f"{held.holder} is counted as it is bound"
            for index, amount in enumerate(held.bound):
                assert amount >= held.caps[index] >= 0, f"{held.holder} is bound by at least its caps"
        totals = [sum(column) for column in zip(self.zero, *self._all_amounts(), strict=True)]
        assert totals == self.outstanding, "outstanding is the sum of leases and stranded units"
        for key, record in self._recorded.items():
            if key not in self._unrecorded:
                assert record == self._record(key), "etcd's record is the book's"
