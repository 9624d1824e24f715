"""Why each share is what it is, in words; made only when asked, so that dividing among thousands is cheap."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.core.budget.share_claims import Claim, Kind, Rules
from leasehold.core.budget.share_filling import Filling
from leasehold.core.budget.share_turns import Turn

#: More others than this are counted rather than named.
_NAMED_MAX = 2


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """How one priority band was served."""

    #: From 0, highest priority first.
    position: int
    priority: int
    turn: Turn
    #: By dimension.
    fillings: Sequence[Filling]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a claim was served, or not."""

    band: Band
    kind: Kind | None = None
    is_blocked: bool = False


@dataclass(frozen=True, slots=True)
class _Summary:
    """What the reasons of one band and dimension have in common."""

    capped: frozenset[Kind]
    floored: frozenset[Kind]
    #: Capped and floored ones that get more than nothing, such as "b and c" or "5 others".
    settled_names: str
    #: Exact shares in quanta, times the filling's denominator.
    numerators: dict[Kind, int]
    growing_count: int
    has_one_weight: bool
    #: The bands above that got anything, such as "priority 5".
    higher: str


@dataclass(slots=True, eq=False)
class Account:
    """All that a division was made of and came to. Ranks are positions in `claims`."""

    rules: Rules
    #: Quanta, in dimension order.
    limits: Sequence[int]
    #: In the order of names.
    claims: Sequence[Claim]
    #: Quanta by dimension and rank.
    columns: Sequence[list[int]]
    is_at_base: bool = False
    #: Highest priority first.
    bands: list[Band] = field(default_factory=list)
    active_count: int = 0
    _ranks: dict[str, int] = field(default_factory=dict)
    _places: dict[int, _Place] = field(default_factory=dict)
    _summaries: dict[tuple[int, int], _Summary] = field(default_factory=dict)

    def reason(self, name: str, dimension: str) -> str:
        """The reason of one share. Raises `NotFound` if there is no such holder or dimension."""
        if not self._ranks:
            self._look_up()
        if name not in self._ranks:
            raise errors.NotFound(f"{name} is not among the holders")
        if dimension not in self.rules.limits:
            raise errors.NotFound(f"{dimension} is not among the dimensions")
        words = _Words(self, self._ranks[name], list(self.rules.limits).index(dimension), dimension)
        if self.is_at_base:
            return words.base()
        place = self._places.get(words.rank)
        if place is None:
            return "0: idle; its share starts with its first task"
        return words.not_served(place) if place.kind is None else words.served(place.band, place.kind)

    def _look_up(self) -> None:
        self._ranks = {claim.name: rank for rank, claim in enumerate(self.claims)}
        self.active_count = sum(claim.is_active for claim in self.claims)
        for band in self.bands:
            served = {member: _Place(band, kind) for kind in band.turn.served for member in kind.members}
            self._places |= served
            self._places |= dict.fromkeys(band.turn.waiting, _Place(band))
            self._places |= dict.fromkeys(band.turn.blocked, _Place(band, is_blocked=True))

    def summary(self, band: Band, dimension: int) -> _Summary:
        """What the reasons of one band and dimension have in common; worked out once."""
        key = (band.position, dimension)
        if key not in self._summaries:
            filling = band.fillings[dimension]
            settled = [
                self.claims[member].name
                for kind in (*filling.capped, *filling.floored)
                for member in kind.members
                if self.columns[dimension][member]
            ]
            names = " and ".join(sorted(settled)) if len(settled) <= _NAMED_MAX else f"{len(settled)} others"
            self._summaries[key] = _Summary(
                capped=frozenset(filling.capped),
                floored=frozenset(filling.floored),
                settled_names=names,
                numerators=dict(zip(filling.growing, filling.numerators, strict=True)),
                growing_count=sum(kind.count for kind in filling.growing),
                has_one_weight=len({kind.weight for kind in filling.growing}) == 1,
                higher=self._higher(band, dimension),
            )
        return self._summaries[key]

    def _higher(self, band: Band, dimension: int) -> str:
        totals = [above.fillings[dimension].total for above in self.bands[: band.position + 1]]
        takers = [
            above.priority
            for above, (before, after) in zip(self.bands, itertools.pairwise(totals), strict=False)
            if after < before
        ]
        return f"priority {takers[0]}" if len(takers) == 1 else "higher priorities"


@dataclass(frozen=True, slots=True)
class _Words:
    """The reasons of one claim and dimension."""

    account: Account
    rank: int
    index: int
    dimension: str

    @property
    def _claim(self) -> Claim:
        return self.account.claims[self.rank]

    @property
    def _quantum(self) -> int:
        return self.account.rules.quanta.get(self.dimension, 1)

    @property
    def _amount(self) -> int:
        """Quanta."""
        return self.account.columns[self.index][self.rank]

    def _text(self, quanta: int) -> str:
        return quantity.text(quanta * self._quantum)

    def _equation(self, right: str, numerator: int, denominator: int) -> str:
        """The amount and how it comes about; `numerator` / `denominator` is the exact share in quanta."""
        rounded = ", in whole units" if self._quantum > 1 and numerator % denominator else ""
        return f"{self._text(self._amount)} = {right}{rounded}"

    def base(self) -> str:
        """The share of one who gets its base."""
        rules, registered = self.account.rules, len(self.account.claims)
        limit = self.account.limits[self.index]
        seats = max(rules.expected_workers, registered)
        demand = self._claim.demand.get(self.dimension)
        if demand is not None and demand * seats < limit * self._quantum:
            return self._demand_met(demand)
        workers = "worker" if seats == 1 else "workers"
        among = f"{seats} expected {workers}" if seats == rules.expected_workers else f"{seats} registered"
        equation = self._equation(f"{self._text(limit)} / {among}", limit, seats)
        if not rules.scaling_enabled:
            return f"{equation}; scaling is off"
        if rules.policy is model.Policy.STATIC:
            return f"{equation}, whatever others do"
        return f"base: {equation}, nobody {'asks for more' if self.account.active_count else 'is active'}"

    def not_served(self, place: _Place) -> str:
        """The reason of one who asks, and has nothing of any dimension."""
        turn = place.band.turn
        if place.is_blocked:
            return self._blocked(place.band)
        served = sum(kind.count for kind in turn.served)
        are = "is" if served == 1 else "are"
        return f"0: waits its turn, {served} of {served + len(turn.waiting)} {are} served at a time"

    def _blocked(self, band: Band) -> str:
        """Names the first dimension of which too little is left."""
        rules = self.account.rules
        for index, (dimension, limit) in enumerate(rules.limits.items()):
            quantum = rules.quanta.get(dimension, 1)
            need = self._claim.need.get(dimension, 0)
            left = band.fillings[index].total * quantum
            if min(need, limit) > left:
                amounts = f"{quantity.text(need)} {dimension}, {quantity.text(left)}"
                return f"0: needs {amounts} left by {self.account.summary(band, index).higher}"
        raise AssertionError(f"{self._claim.name} is not blocked")

    def served(self, band: Band, kind: Kind) -> str:
        """The share of one whom its band serves."""
        filling = band.fillings[self.index]
        summary = self.account.summary(band, self.index)
        if kind in summary.capped:
            return self._demand_met(self._claim.demand.get(self.dimension))
        if not filling.total:
            return self._nothing_left(summary)
        if kind in summary.floored:
            return f"{self._text(self._amount)} = the least that is of use to it, more than its fair share"
        tail = self._tail(band, summary)
        if summary.growing_count == 1:
            return self._all_that_is_left(band, summary, tail)
        if filling.surplus is not None:
            return self._proportional(filling, kind, summary) + tail
        return self._level(filling, kind, summary) + tail

    def _demand_met(self, demand: int | None) -> str:
        if demand is None:
            return "0: idle and asks for nothing"
        if demand % self._quantum:
            return f"{self._text(self._amount)} = its demand of {quantity.text(demand)}, in whole units"
        return f"{quantity.text(demand)} = its demand"

    def _nothing_left(self, summary: _Summary) -> str:
        limit = self.account.limits[self.index]
        if limit:
            return f"0: {summary.higher} took all of {self._text(limit)}"
        declared = self.account.rules.limits[self.dimension]
        return f"0: the limit is {quantity.text(declared)}" + (", less than one unit" if declared else "")

    def _level(self, filling: Filling, kind: Kind, summary: _Summary) -> str:
        """An equal or weighted part of what the settled leave."""
        left = self._left_by_settled(filling, summary)
        is_equal = summary.has_one_weight
        if is_equal and filling.growth < filling.total:
            right = f"({left}) / {summary.growing_count}"
        elif is_equal:
            right = f"1/{summary.growing_count} of {left}"
        else:
            left = f"({left})" if filling.growth < filling.total else left
            right = f"{_fraction(kind.weight, filling.weight)} of {left} by weight"
        return self._equation(right, summary.numerators[kind], filling.denominator)

    def _left_by_settled(self, filling: Filling, summary: _Summary) -> str:
        fixed = filling.total - filling.growth
        total = self._text(filling.total)
        return f"{total} - {self._text(fixed)} for {summary.settled_names}" if fixed else total

    def _all_that_is_left(self, band: Band, summary: _Summary, tail: str) -> str:
        """All that the settled and higher bands leave."""
        filling = band.fillings[self.index]
        left = self._left_by_settled(filling, summary)
        if filling.growth < filling.total:
            return f"{self._text(self._amount)} = {left}{tail}"
        if tail:
            return f"all of {left}{tail}"
        if self._claim.is_active and self.account.active_count == 1:
            return f"all of {left}: the only active holder"
        if band is not self.account.bands[-1]:
            return f"all of {left}: priority {band.priority} comes first"
        return f"all of {left}: nobody else asks for any"

    def _proportional(self, filling: Filling, kind: Kind, summary: _Summary) -> str:
        """The equal share and a part of what others leave, by demand."""
        right = f"{_fraction(kind.weight, filling.weight)} of {self._text(filling.total)}"
        if filling.surplus:
            surplus = filling.surplus // filling.weight
            extra = self._amount - filling.total * kind.weight // filling.weight
            right += f" + {self._text(extra)} of the {self._text(surplus)} that others leave, by demand"
        return self._equation(right, summary.numerators[kind], filling.denominator)

    def _tail(self, band: Band, summary: _Summary) -> str:
        """What came before: higher priorities; and those of the band whose turn comes later."""
        limit, total = self.account.limits[self.index], band.fillings[self.index].total
        tail = ""
        if total < limit:
            taken = f"{self._text(limit - total)} of {self._text(limit)}"
            tail = f", after {summary.higher} took {taken}"
        waiting = len(band.turn.waiting)
        if waiting:
            tail += f"; {waiting} wait{'s' if waiting == 1 else ''} for a turn"
        return tail


def _fraction(numerator: int, denominator: int) -> str:
    divisor = gcd(numerator, denominator)
    return f"{numerator // divisor}/{denominator // divisor}"
