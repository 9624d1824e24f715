"""Fair sharing: what each holder of a budget should have.

Pure and exact: amounts are whole micro-units, ratios are compared as whole numbers, and the result depends on
neither the order of the claims nor on floating point. For every policy and dimension

* the targets together are at most the limit, and each is at most the declared demand;
* bands of higher priority are served first, wholly (not under `static`, nor at the base);
* under `active_share`, `max_min` and `proportional`, claims that together want the limit get all of it, in
  whole quanta. Where needs let only some be served at a time, this holds for the served;
* under `active_share` and `max_min`, among equals in weight and priority nobody has more than a quantum less
  than another unless its demand is met, or the other has just its need;
* more demand never brings less. (Under `proportional` a demand left out counts as the limit, and so a demand
  declared beyond the limit as more than that.)

`share_filling` has the policies' formulas, `share_turns` the order of service, `share_dealing` the rounding and
`share_reasons` the words.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from leasehold.core import errors
from leasehold.core.budget import model, share_claims, share_dealing, share_filling, share_reasons, share_turns
from leasehold.core.budget.share_claims import Claim, Rules

__all__ = ["Claim", "Division", "Rules", "divide"]


@dataclass(frozen=True, slots=True)
class Division:
    """The result: target shares, and why."""

    #: Micro-units in dimension order, by holder.
    targets: Mapping[str, tuple[int, ...]]
    #: Not served in this turn, with 0 of everything.
    waiting: frozenset[str]
    #: Those of `waiting` whom taking turns does not help: higher priorities leave less than they need.
    blocked: frozenset[str]
    _account: share_reasons.Account

    def reason(self, name: str, dimension: str) -> str:
        """Why the share is what it is, for people, such as "20 = 1/4 of 80".

        Raises `NotFound` if there is no such holder or dimension.
        """
        if name not in self.targets:
            raise errors.NotFound(f"{name} is not among the holders")
        return self._account.reason(name, dimension)


def divide(rules: Rules, claims: Sequence[Claim]) -> Division:
    """Share the limits among `claims`, whose names must differ.

    Raises `InvalidArgument` for a negative amount, a weight out of range, no dimension or a name given twice.
    O(n) in claims that are alike, O(k log k) in kinds of claims.
    """
    limits = share_claims.limits_in_quanta(rules)
    ranked = sorted(claims, key=attrgetter("name"))
    kinds = share_claims.gather(rules, limits, ranked)
    columns = [[0] * len(ranked) for _ in limits]
    account = share_reasons.Account(rules, limits, ranked, columns)
    if _is_at_base(rules, kinds):
        _deal_base(rules, limits, kinds, columns)
        account.is_at_base = True
    else:
        _deal_bands(rules, limits, kinds, account)
    quanta = [rules.quanta.get(dimension, 1) for dimension in rules.limits]
    scaled = [
        column if quantum == 1 else [amount * quantum for amount in column]
        for column, quantum in zip(columns, quanta, strict=True)
    ]
    names = [claim.name for claim in ranked]
    targets = dict(zip(names, zip(*scaled, strict=True), strict=True))
    if len(targets) < len(ranked):
        twice = next(name for name, following in itertools.pairwise(names) if name == following)
        raise errors.InvalidArgument(f"claims: {twice} is given twice", field="claims")
    blocked = frozenset(names[rank] for band in account.bands for rank in band.turn.blocked)
    waiting = frozenset(names[rank] for band in account.bands for rank in band.turn.waiting)
    return Division(targets, waiting | blocked, blocked, account)


def _is_at_base(rules: Rules, kinds: Sequence[share_claims.Kind]) -> bool:
    """Whether everyone gets its base: by the rules, or because nobody could use more."""
    if not rules.scaling_enabled or rules.policy is model.Policy.STATIC:
        return True
    if rules.policy is model.Policy.ACTIVE_SHARE:
        return not any(kind.is_active for kind in kinds)
    return not any(kind.wants_anything for kind in kinds)


def _deal_base(
    rules: Rules, limits: Sequence[int], kinds: Sequence[share_claims.Kind], columns: list[list[int]]
) -> None:
    registered = len(columns[0])
    seats = max(rules.expected_workers, registered)
    for dimension, limit in enumerate(limits):
        column = columns[dimension]
        column[:] = share_dealing.deal_seats(limit, seats, rules.rotation, registered)
        for kind in kinds:
            demand = kind.demands[dimension]
            if demand is not None:
                for member in kind.members:
                    column[member] = min(column[member], demand)


def _deal_bands(
    rules: Rules, limits: Sequence[int], kinds: Sequence[share_claims.Kind], account: share_reasons.Account
) -> None:
    bands: dict[int, list[share_claims.Kind]] = {}
    for kind in kinds:
        if kind.is_active or rules.policy is not model.Policy.ACTIVE_SHARE:
            bands.setdefault(kind.priority, []).append(kind.asking())
    available = list(limits)
    for priority in sorted(bands, reverse=True):
        turn = share_turns.take_turn(bands[priority], available, account.claims)
        fillings = [
            share_filling.proportional(amount, turn.served, dimension, limit)
            if rules.policy is model.Policy.PROPORTIONAL
            else share_filling.max_min(amount, turn.served, dimension)
            for dimension, (amount, limit) in enumerate(zip(available, limits, strict=True))
        ]
        account.bands.append(share_reasons.Band(len(account.bands), priority, turn, fillings))
        for dimension, filling in enumerate(fillings):
            filling.deal(dimension, rules.rotation, account.columns[dimension])
            available[dimension] -= filling.dealt(dimension)
