"""Moving shares: targets from the policy, shrinks asked first, growth only out of the pool."""

from dataclasses import dataclass

from leasehold.core.budget import growth, quantity, shares
from leasehold.core.budget.book import Book
from leasehold.core.budget.lease import Lease, LeaseState, Vector

#: Changes below this part of a share ride on the next renewal instead of being pushed.
PUSH_FRACTION = 0.05
#: From so many holders on, a step towards the target is pushed only if it doubles what is owned: a join of
#: thousands would otherwise set off wave after wave of small steps to all of them.
LARGE_FLEET = 1000
#: After a run comes a pause that is in proportion to its cost: so many seconds for each holder (fewer where
#: only units were moved), and for each that was told a new share, whose acknowledgement is to be heard first.
DIVIDE_SECONDS_PER_HOLDER = 20e-6
MOVE_SECONDS_PER_HOLDER = 5e-6
PUSH_SECONDS = 200e-6
#: Where needs let only some be served at a time, a served one keeps its turn for so many refresh intervals.
TURN_REFRESHES = 1.0
#: The quanta that do not divide evenly go to the next in turn so often.
ROTATION_SECONDS = 60.0


@dataclass(slots=True)
class Rebalancer:
    """Decides who should have what, and hands it out as it comes free."""

    division: shares.Division | None = None
    must_divide: bool = True
    #: Somebody has less than its target because the pool is empty.
    is_short: bool = False
    next_at: float = float("-inf")
    turn_ends_at: float = float("inf")
    served_count: int = 1
    rotation: int = 0
    #: (bound, target) of who is furthest from its target, by dimension; empty where no turns are taken.
    neediest: tuple[tuple[int, int], ...] = ()
    #: Active holders at the last division.
    active_count: int = 0

    def is_due(self, book: Book, now: float) -> bool:
        """Whether `run` has something to do at `now`."""
        return (self.must_divide or (book.has_gained and self.is_short)) and now >= self.next_at

    def due_at(self, book: Book) -> float:
        """Instant at which `run` must be called at the latest."""
        pending = self.must_divide or (book.has_gained and self.is_short)
        return min(self.turn_ends_at, self.next_at if pending else float("inf"))

    def tick(self, now: float) -> None:
        """Notice the end of a turn, and the next rotation."""
        rotation = int(now // ROTATION_SECONDS)
        if rotation != self.rotation or now >= self.turn_ends_at:
            self.rotation = rotation
            self.turn_ends_at = float("inf")
            self.must_divide = True

    def run(self, book: Book, now: float) -> list[Lease]:
        """Divide again if anything changed, move what can move; the leases whose change is worth a push."""
        seconds_per_holder = DIVIDE_SECONDS_PER_HOLDER if self.must_divide else MOVE_SECONDS_PER_HOLDER
        if self.must_divide:
            self._end_turns(book, now)
            self._divide(book)
            self.must_divide = False
        book.has_gained = False
        self._note_neediest(book)
        changed = self._move(book)
        if self.division is not None and self.division.waiting - self.division.blocked:
            self._keep_turns(book, now)
        self.next_at = now + seconds_per_holder * len(book.leases) + PUSH_SECONDS * len(changed)
        return changed

    # Targets

    def _divide(self, book: Book) -> None:
        book.update_limits()
        safe_total = self._safe_total(book)
        available = self._available(book, safe_total, excess=book.zero)
        division = self._division(book, available)
        excess = self._excess(book, division)
        if any(excess):
            division = self._division(book, self._available(book, safe_total, excess))
        self.division = division
        self.active_count = sum(held.is_active for held in book.leases.values())
        for held in book.leases.values():
            target = division.targets[held.holder]
            if any(safe_total):
                safe = book.spec.holder_class(held.holder).safe_capacity
                target = tuple(t + safe.get(n, 0) for t, n in zip(target, book.names, strict=True))
            if held.holder in book.stranded or (
                book.ghosts and self._ghost_bound(book, held.holder) != book.zero
            ):
                # What a dead incarnation may still have counts against its own name's share.
                own = self._stranded(book, held.holder)
                target = tuple(max(0, t - s) for t, s in zip(target, own, strict=True))
            held.target = target

    def _division(self, book: Book, available: Vector) -> shares.Division:
        units = {d.name: min(quantity.MICRO, d.limit) for d in book.spec.dimensions}
        has_classes = bool(book.spec.holder_classes)
        claims: list[shares.Claim] = []
        for held in book.leases.values():
            weight, priority = 1.0, 0
            if has_classes:
                holder_class = book.spec.holder_class(held.holder)
                weight, priority = holder_class.weight, holder_class.priority
            need = units
            if held.waiting_cost:
                need = {n: max(u, held.waiting_cost.get(n, 0)) for n, u in units.items()}
            claims.append(
                shares.Claim(held.holder, held.is_active, weight, priority, held.demand, need, held.last_served)
            )
        rules = shares.Rules(
            policy=book.spec.policy,
            limits=dict(zip(book.names, available, strict=True)),
            quanta=book.quanta,
            expected_workers=book.spec.expected_workers,
            scaling_enabled=book.spec.scaling_enabled,
            rotation=self.rotation,
        )
        return shares.divide(rules, claims)

    def _safe_total(self, book: Book) -> Vector:
        """Safe capacity kept back for all registered holders."""
        if not any(c.safe_capacity for c in book.spec.holder_classes):
            return book.zero
        totals = list(book.zero)
        for holder in book.leases:
            for name, amount in book.spec.holder_class(holder).safe_capacity.items():
                totals[book.index[name]] += amount
        return tuple(totals)

    def _available(self, book: Book, safe_total: Vector, excess: Vector) -> Vector:
        """Limits less what nobody present can be given."""
        gone = list(book.zero)
        for holder in book.stranded:
            if holder not in book.leases:
                for index, amount in enumerate(book.stranded_of(holder)):
                    gone[index] += amount
        for (holder, _), ghost in book.ghosts.items():
            if holder not in book.leases:
                for index, amount in enumerate(ghost.bound):
                    gone[index] += amount
        return tuple(
            max(0, limit - a - b - c)
            for limit, a, b, c in zip(book.target_limits(), gone, safe_total, excess, strict=True)
        )

    def _excess(self, book: Book, division: shares.Division) -> Vector:
        """Stranded units of those present beyond their own share: nobody can be given these either."""
        totals = list(book.zero)
        names = set(book.stranded) | {holder for holder, _ in book.ghosts}
        for holder in names & set(book.leases):
            target = division.targets[holder]
            for index, amount in enumerate(self._stranded(book, holder)):
                totals[index] += max(0, amount - target[index])
        return tuple(totals)

    def _stranded(self, book: Book, holder: str) -> Vector:
        own = book.stranded_of(holder)
        return tuple(a + b for a, b in zip(own, self._ghost_bound(book, holder), strict=True))

    @staticmethod
    def _ghost_bound(book: Book, holder: str) -> Vector:
        totals = list(book.zero)
        for (name, _), ghost in book.ghosts.items():
            if name == holder:
                for index, amount in enumerate(ghost.bound):
                    totals[index] += amount
        return tuple(totals)

    # Turns

    def _keep_turns(self, book: Book, now: float) -> None:
        """A served holder's turn begins once it has its target, and ends a refresh interval later."""
        assert self.division is not None
        length = book.spec.refresh_seconds * TURN_REFRESHES
        for held in book.leases.values():
            if held.holder in self.division.waiting or not any(held.target):
                held.served_since = None
            elif held.served_since is None and self._has_its_need(book, held):
                held.served_since = now
            if held.served_since is not None:
                self.turn_ends_at = min(self.turn_ends_at, held.served_since + length)

    @staticmethod
    def _has_its_need(book: Book, held: Lease) -> bool:
        for name, cap, target in zip(book.names, held.caps, held.target, strict=True):
            if cap < min(target, max(quantity.MICRO, held.waiting_cost.get(name, 0))):
                return False
        return True

    def _end_turns(self, book: Book, now: float) -> None:
        length = book.spec.refresh_seconds * TURN_REFRESHES
        if self.division is None or not self.division.waiting:
            return
        for held in book.leases.values():
            if held.served_since is not None and now >= held.served_since + length:
                self.served_count += 1
                held.last_served, held.served_since = self.served_count, None

    # Moving

    def _move(self, book: Book) -> list[Lease]:
        # Whoever is near its target gets there with its next renewal; in a large fleet nearly everybody is.
        moving = [
            held
            for held in book.leases.values()
            if held.caps != held.target and self._can_push(held) and self._is_worth_push(held, held.target)
        ]
        self.is_short = any(
            cap < target for held in moving for cap, target in zip(held.caps, held.target, strict=True)
        )
        if not moving:
            return []
        wanted: dict[int, list[int]] = {
            number: [min(cap, target) for cap, target in zip(held.caps, held.target, strict=True)]
            for number, held in enumerate(moving)
        }
        for index, free in enumerate(book.pool()):
            self._grow(book, index, free, moving, wanted)
        pushed: list[Lease] = []
        is_large = len(book.leases) >= LARGE_FLEET
        for number, held in enumerate(moving):
            caps = tuple(wanted[number])
            if caps != held.caps and self._is_worth_push(held, caps, is_large=is_large):
                held.set_caps(caps)
                book.count(held)
                pushed.append(held)
        return pushed

    @staticmethod
    def _can_push(held: Lease) -> bool:
        return held.state is LeaseState.LIVE and held.session is not None

    def _grow(
        self, book: Book, index: int, free: int, moving: list[Lease], wanted: dict[int, list[int]]
    ) -> None:
        growers: list[int] = []
        if book.is_overcommitted(index):
            return
        for number, held in enumerate(moving):
            target = held.target[index]
            if target <= held.caps[index]:
                continue
            if not self._gives_way(held, index):
                # Up to what it is bound by anyway, growth costs nothing.
                wanted[number][index] = max(held.caps[index], min(target, held.bound[index]))
            if target > held.bound[index]:
                growers.append(number)
        if not growers or not free:
            return
        pairs = [(moving[number].bound[index], moving[number].target[index]) for number in growers]
        quantum = book.quanta[book.names[index]]
        for number, amount in zip(growers, growth.raise_lowest(free, pairs, quantum), strict=True):
            if amount:
                wanted[number][index] = moving[number].bound[index] + amount

    @staticmethod
    def _is_worth_push(held: Lease, caps: Vector, *, is_large: bool = False) -> bool:
        for new, old, target in zip(caps, held.caps, held.target, strict=True):
            if new == old:
                continue
            if old == 0 or new == 0:
                return True
            if is_large and old < new < min(target, 2 * old):
                continue
            if abs(new - old) >= PUSH_FRACTION * (target if new > old else old):
                return True
        return False

    def _note_neediest(self, book: Book) -> None:
        """Where turns are taken: of each dimension, who has the least part of its target."""
        self.neediest = ()
        if self.division is None or not self.division.waiting:
            return
        neediest: list[tuple[int, int]] = []
        for index in range(len(book.names)):
            least = (1, 1)
            for held in book.leases.values():
                bound, target = held.bound[index], held.target[index]
                if target and bound * least[1] < least[0] * target and self._can_push(held):
                    least = (bound, target)
            neediest.append(least)
        self.neediest = tuple(neediest)

    def _gives_way(self, held: Lease, index: int) -> bool:
        """Whether what a holder is giving up must go to another first.

        A turn is over long before the units of a rate have cooled: if whoever had it kept them for the next
        one, those that wait for their first would never get theirs.
        """
        if not self.neediest:
            return False
        bound, target = self.neediest[index]
        return bound * held.target[index] < held.bound[index] * target

    def settle(self, book: Book, held: Lease) -> bool:
        """Bring one lease to its target as far as the pool allows, at its renewal; whether its caps changed."""
        if held.caps == held.target or held.state is not LeaseState.LIVE:
            return False
        caps: list[int] = []
        for index, free in enumerate(book.pool()):
            cap, target = held.caps[index], held.target[index]
            if target > cap and self._gives_way(held, index):
                target = cap
            elif target > cap:
                most = cap if book.is_overcommitted(index) else held.bound[index] + free
                target = max(cap, min(target, most))
            caps.append(target)
        if tuple(caps) == held.caps:
            return False
        held.set_caps(tuple(caps))
        book.count(held)
        return True
