"""Exact shares of one dimension in one priority band, as fractions of quanta.

Every claim has a floor (its need) and a ceiling (its demand). The floors together must fit the total, which
`share_turns` sees to. Ratios are compared as whole numbers, so no result depends on rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from leasehold.core.budget import share_dealing
from leasehold.core.budget.share_claims import Kind

# Two different ratios p/w, with w at most 1e9 (`share_claims.WEIGHT_MAX` in thousandths), differ by at least
# 1e-18, so 64 binary places keep their order and keep equal ones equal.
_RATIO_BITS = 64
# The same for the ratios of `proportional`, whose denominators are below 1e15 * 1e15.
_SLOPE_BITS = 224


@dataclass(slots=True)
class Filling:
    """How `total` quanta of one dimension are shared by some kinds."""

    total: int
    #: These get their whole demand.
    capped: list[Kind] = field(default_factory=list)
    #: These get their need, which is above their fair share.
    floored: list[Kind] = field(default_factory=list)
    #: These share `growth`, each by its exact numerator over `denominator`.
    growing: list[Kind] = field(default_factory=list)
    growth: int = 0
    numerators: list[int] = field(default_factory=list)
    denominator: int = 1
    #: Thousandths by which an equal level is shared: of those growing, or of all under `proportional`.
    weight: int = 0
    #: `proportional` only: what is shared in proportion to demand beyond the equal share, over `weight`.
    surplus: int | None = None

    def deal(self, dimension: int, rotation: int, column: list[int]) -> None:
        """Write the whole quanta of each member into `column`."""
        for kind in self.capped:
            demand = kind.demands[dimension]
            assert demand is not None
            for member in kind.members:
                column[member] = demand
        for kind in self.floored:
            for member in kind.members:
                column[member] = kind.needs[dimension]
        parts = [
            share_dealing.Part(kind.members, numerator)
            for kind, numerator in zip(self.growing, self.numerators, strict=True)
        ]
        share_dealing.deal(self.growth, parts, self.denominator, rotation, column)

    def dealt(self, dimension: int) -> int:
        """Quanta dealt in all."""
        demands = sum(kind.count * (kind.demands[dimension] or 0) for kind in self.capped)
        return demands + sum(kind.count * kind.needs[dimension] for kind in self.floored) + self.growth


def max_min(total: int, kinds: Sequence[Kind], dimension: int) -> Filling:
    """Weighted max-min: the level rises in proportion to weight, from the floors, until the total is used up.

    A claim joins in when the level reaches its need and drops out when it reaches its demand. O(k log k).
    """
    fixed = weight = 0
    same_weight = len({kind.weight for kind in kinds}) == 1
    joins: list[tuple[int, int, bool, Kind]] = []  # (order, amount, whether it drops out, who)
    drops: list[tuple[int, int, bool, Kind]] = []
    for kind in kinds:
        need, demand = kind.needs[dimension], kind.demands[dimension]
        if need:
            fixed += need * kind.count
            joins.append((need if same_weight else (need << _RATIO_BITS) // kind.weight, need, False, kind))
        else:
            weight += kind.weight * kind.count
        if demand is not None:
            order = demand if same_weight else (demand << _RATIO_BITS) // kind.weight
            drops.append((order, demand, True, kind))
    # The sort is stable, so that one whose need is its demand joins before it drops out.
    events = sorted(joins + drops, key=itemgetter(0))
    reached = 0
    for _, amount, drops_out, kind in events:
        if fixed * kind.weight + amount * weight > total * kind.weight:
            break
        if drops_out:
            fixed += amount * kind.count
            weight -= kind.weight * kind.count
        else:
            fixed -= amount * kind.count
            weight += kind.weight * kind.count
        reached += 1
    filling = Filling(total, growth=total - fixed, denominator=weight, weight=weight)
    filling.capped = [kind for _, _, drops_out, kind in events[:reached] if drops_out]
    filling.floored = [kind for _, _, drops_out, kind in events[reached:] if not drops_out]
    settled = {*filling.capped, *filling.floored}
    filling.growing = [kind for kind in kinds if kind not in settled]
    if not filling.growing:
        filling.growth, filling.denominator = 0, 1
    filling.numerators = [filling.growth * kind.weight for kind in filling.growing]
    return filling


@dataclass(slots=True)
class _Lines:
    """The sum of all shares as a line in r, scaled by the weight."""

    #: Demands within the equal share, and needs that are still above the line.
    fixed: int = 0
    equal: int = 0
    slope: int = 0

    def exceeds(self, target: int, numerator: int, denominator: int) -> bool:
        """Whether the sum at r = numerator / denominator is above `target`."""
        return (self.fixed + self.equal) * denominator + self.slope * numerator > target * denominator


def proportional(total: int, kinds: Sequence[Kind], dimension: int, limit: int) -> Filling:
    """Equal shares by weight; what some leave is shared in proportion to what the others want beyond them.

    With e the equal share, w the demand and r common to all, one gets min(w, e + (w - e) * r), or its need if
    that is more. Without needs this is doorman's PROPORTIONAL_SHARE with weights as subclients: r is the unused
    parts of equal shares over the demands beyond them. Where the needs leave no room for equal shares, the
    level sinks as in `max_min`, into which this passes without a step. A demand left out counts as `limit`.
    """
    weight = sum(kind.weight * kind.count for kind in kinds)
    target = total * weight
    filling = Filling(total, weight=weight)
    lines = _Lines()
    asked = 0
    slopes: list[int] = []
    late: list[tuple[int, int, Kind]] = []  # (need - equal, slope, who) where the need is above the equal share
    for kind in kinds:
        count = kind.count
        declared = kind.demands[dimension]
        demand = (limit if declared is None else declared) * weight
        equal = total * kind.weight
        need = kind.needs[dimension] * weight
        asked += demand * count
        if demand <= equal:
            filling.capped.append(kind)
            lines.fixed += demand * count
        elif need > equal:
            late.append((need - equal, demand - equal, kind))
            lines.fixed += need * count
        else:
            filling.growing.append(kind)
            slopes.append(demand - equal)
            lines.equal += equal * count
            lines.slope += (demand - equal) * count
    if not total or asked <= target or lines.exceeds(target, 0, 1):
        return max_min(total, kinds, dimension)
    late.sort(key=lambda entry: (entry[0] << _SLOPE_BITS) // entry[1])
    for joined, (above, slope, kind) in enumerate(late):
        if lines.exceeds(target, above, slope):
            filling.floored = [waiting for _, _, waiting in late[joined:]]
            break
        count, equal = kind.count, total * kind.weight
        lines.fixed -= (equal + above) * count
        lines.equal += equal * count
        lines.slope += slope * count
        filling.growing.append(kind)
        slopes.append(slope)
    filling.surplus = target - lines.fixed - lines.equal
    filling.growth = (target - lines.fixed) // weight
    filling.denominator = weight * lines.slope
    filling.numerators = [
        total * kind.weight * lines.slope + slope * filling.surplus
        for kind, slope in zip(filling.growing, slopes, strict=True)
    ]
    return filling
