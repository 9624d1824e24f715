"""What goes into a division: the claims, the rules, and claims that are alike taken together.

Thousands of holders that ask for the same are one `Kind`, so the arithmetic runs over kinds and only dealing
touches each holder.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from leasehold.core import errors
from leasehold.core.budget import model

WEIGHT_MIN = 0.001
WEIGHT_MAX = 1e6
#: Weights are whole thousandths in all arithmetic, so that shares are exact.
_WEIGHT_SCALE = 1000

_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Claim:
    """What one holder asks for. Amounts are micro-units by dimension; negative ones are refused.

    A dimension that the budget does not have is ignored.
    """

    name: str
    is_active: bool = True
    #: 0.001 to 1e6, counted in thousandths.
    weight: float = 1.0
    #: Higher bands are served first, wholly.
    priority: int = 0
    #: The most it can use; a dimension left out: as much as it can get.
    demand: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    #: The least that is of use: one unit, or its largest waiting cost. A dimension left out: anything is.
    #: Counts as at most the demand and the limit.
    need: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    #: Order of service, lower is longer ago. Set it when a turn *ends*, else each division takes turns; start a
    #: newcomer at the present number, else newcomers overtake those who wait.
    last_served: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """How a budget is divided."""

    policy: model.Policy
    #: Micro-units by dimension; at least one. Their order is the order of the targets.
    limits: Mapping[str, int]
    #: Micro-units in which each dimension is dealt (`Dimension.quantum`); left out: 1.
    quanta: Mapping[str, int]
    #: Shares while nobody is active; at least 1.
    expected_workers: int
    #: False: everyone at its base, whatever the policy.
    scaling_enabled: bool = True
    #: Any whole number. Counting it up hands the quanta that do not divide evenly to the next in turn.
    rotation: int = 0


@dataclass(slots=True, eq=False)
class Kind:
    """Claims that are alike, as ranks in the order of names. Amounts are quanta in dimension order."""

    priority: int
    #: Thousandths.
    weight: int
    #: None: as much as it can get.
    demands: tuple[int | None, ...]
    #: At most the demand and the limit.
    needs: tuple[int, ...]
    is_active: bool
    members: list[int]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.members)

    @property
    def wants_anything(self) -> bool:
        """Whether it asks for a quantum of any dimension; what is left out counts only while active."""
        return any(self.is_active if demand is None else demand > 0 for demand in self.demands)

    def asking(self) -> "Kind":
        """The same kind with what an idle claim leaves out as nothing."""
        if self.is_active or None not in self.demands:
            return self
        demands = tuple(demand or 0 for demand in self.demands)
        needs = tuple(min(need, demand) for need, demand in zip(self.needs, demands, strict=True))
        return Kind(self.priority, self.weight, demands, needs, self.is_active, self.members)

    def part(self, members: list[int]) -> "Kind":
        """The same kind with only some of its members."""
        return Kind(self.priority, self.weight, self.demands, self.needs, self.is_active, members)


def limits_in_quanta(rules: Rules) -> tuple[int, ...]:
    """The limits in whole quanta, rounded down. Raises `InvalidArgument` on rules that cannot be followed."""
    if not rules.limits:
        raise errors.InvalidArgument("limits: at least one dimension is needed", field="limits")
    if rules.expected_workers < 1:
        raise errors.InvalidArgument(
            f"expected_workers: {rules.expected_workers} is below 1", field="expected_workers"
        )
    for dimension, limit in rules.limits.items():
        if limit < 0:
            raise errors.InvalidArgument(f"limits.{dimension} is negative", field=f"limits.{dimension}")
        if rules.quanta.get(dimension, 1) < 1:
            raise errors.InvalidArgument(f"quanta.{dimension} is below 1", field=f"quanta.{dimension}")
    return tuple(limit // rules.quanta.get(dimension, 1) for dimension, limit in rules.limits.items())


def gather(rules: Rules, limits: Sequence[int], claims: Iterable[Claim]) -> list[Kind]:
    """The kinds of `claims`, whose ranks are their positions. `limits` are in quanta.

    Raises `InvalidArgument` for a negative amount or a weight out of range.
    """
    dimensions = [
        (dimension, rules.quanta.get(dimension, 1), limit)
        for dimension, limit in zip(rules.limits, limits, strict=True)
    ]
    members_by_key: dict[object, tuple[Claim, list[int]]] = {}
    for rank, claim in enumerate(claims):
        demand = tuple(claim.demand.items()) if claim.demand else None
        need = tuple(claim.need.items()) if claim.need else None
        key = (claim.priority, claim.weight, claim.is_active, demand, need)
        alike = members_by_key.get(key)
        if alike is None:
            members_by_key[key] = (claim, [rank])
        else:
            alike[1].append(rank)
    return [_kind(dimensions, claim, members) for claim, members in members_by_key.values()]


def _kind(dimensions: Sequence[tuple[str, int, int]], claim: Claim, members: list[int]) -> Kind:
    """`dimensions` are names, quanta and limits."""
    if not (math.isfinite(claim.weight) and WEIGHT_MIN <= claim.weight <= WEIGHT_MAX):
        raise errors.InvalidArgument(
            f"weight: {claim.weight:g} of {claim.name} is not in 0.001 to 1e6", field="weight"
        )
    demands: list[int | None] = []
    needs: list[int] = []
    for dimension, quantum, limit in dimensions:
        demand = claim.demand.get(dimension)
        need = claim.need.get(dimension, 0)
        if need < 0 or (demand is not None and demand < 0):
            raise errors.InvalidArgument(f"{dimension} of {claim.name} is negative", field=dimension)
        if demand is not None:
            demand //= quantum
        if need:
            need = min(-(-need // quantum), limit if demand is None else min(demand, limit))
        demands.append(demand)
        needs.append(need)
    weight = round(claim.weight * _WEIGHT_SCALE)
    return Kind(claim.priority, weight, tuple(demands), tuple(needs), claim.is_active, members)
