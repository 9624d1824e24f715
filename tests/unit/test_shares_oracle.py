"""Shares against an oracle that tries every way in which claims could be settled, in exact fractions."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from leasehold.core.budget import model, shares

checked = settings(deadline=None, max_examples=300)


@dataclass(frozen=True)
class Party:
    """A claim in whole quanta of one dimension; demand None is as much as it can get."""

    weight: int
    demand: int | None
    need: int


@st.composite
def party(draw: st.DrawFn) -> Party:
    demand = draw(st.one_of(st.none(), st.integers(0, 20)))
    need = draw(st.one_of(st.just(0), st.integers(0, 8)))
    return Party(draw(st.sampled_from([1, 1, 2, 5])), demand, need if demand is None else min(need, demand))


parties = st.lists(party(), min_size=1, max_size=4)


def divided(policy: model.Policy, total: int, some: Sequence[Party], rotation: int = 0) -> list[int]:
    rules = shares.Rules(policy, {"rpm_limit": total}, {}, 4, rotation=rotation)
    claims = [
        shares.Claim(
            f"w{index}",
            weight=one.weight,
            demand={} if one.demand is None else {"rpm_limit": one.demand},
            need={"rpm_limit": one.need},
        )
        for index, one in enumerate(some)
    ]
    targets = shares.divide(rules, claims).targets
    return [targets[claim.name][0] for claim in claims]


def exact_max_min(total: int, some: Sequence[Party]) -> list[Fraction]:
    """The shares that one level explains, found by trying who is at its need, at its demand, or between."""
    demands = [Fraction(total if one.demand is None else one.demand) for one in some]
    needs = [Fraction(one.need) for one in some]
    if sum(demands) <= total:
        return demands
    for states in itertools.product(("need", "between", "demand"), repeat=len(some)):
        amounts = {"need": needs, "demand": demands, "between": [Fraction(0)] * len(some)}
        fixed = sum(amounts[state][index] for index, state in enumerate(states))
        weight = sum(one.weight for one, state in zip(some, states, strict=True) if state == "between")
        # Without anyone between, the highest demand that is met tells the level.
        met = [demands[index] / some[index].weight for index, state in enumerate(states) if state == "demand"]
        level = Fraction(total - fixed) / weight if weight else max(met, default=Fraction(0))
        result = [
            min(demand, max(need, level * one.weight))
            for one, need, demand in zip(some, needs, demands, strict=True)
        ]
        if sum(result) == total:
            return result
    raise AssertionError("no level explains it")


def exact_proportional(total: int, some: Sequence[Party]) -> list[Fraction]:
    """Doorman's formula, with the needs as floors while equal shares leave room for them, else max-min."""
    weight = sum(one.weight for one in some)
    demands = [Fraction(total if one.demand is None else one.demand) for one in some]
    equals = [Fraction(total * one.weight, weight) for one in some]
    start = [
        min(demand, max(equal, Fraction(one.need)))
        for one, demand, equal in zip(some, demands, equals, strict=True)
    ]
    if sum(demands) <= total or sum(start) > total:
        return exact_max_min(total, some)
    beyond = [max(demand - equal, Fraction(0)) for demand, equal in zip(demands, equals, strict=True)]
    for rising in itertools.product((True, False), repeat=len(some)):
        slope = sum(more for rises, more in zip(rising, beyond, strict=True) if rises)
        if not slope:
            continue
        fixed = sum(
            equal if rises and more else amount
            for rises, more, equal, amount in zip(rising, beyond, equals, start, strict=True)
        )
        ratio = Fraction(total - fixed) / slope
        result = [
            max(amount, equal + more * ratio) if more else amount
            for more, equal, amount in zip(beyond, equals, start, strict=True)
        ]
        if 0 <= ratio <= 1 and sum(result) == total:
            return result
    raise AssertionError("no ratio explains it")


def assert_rounded(actual: Sequence[int], exact: Sequence[Fraction]) -> None:
    """Each at its exact share rounded down or up, and the largest remainders are those rounded up."""
    remainders = [share - share.__floor__() for share in exact]
    raised = [amount - share.__floor__() for amount, share in zip(actual, exact, strict=True)]
    assert set(raised) <= {0, 1}
    assert sum(actual) == sum(exact)
    up = [remainder for remainder, step in zip(remainders, raised, strict=True) if step]
    down = [remainder for remainder, step in zip(remainders, raised, strict=True) if not step]
    assert min(up, default=Fraction(1)) >= max(down, default=Fraction(0))


@checked
@given(st.integers(0, 40), parties, st.integers(0, 9))
def test_max_min_is_the_one_level_that_explains_everybody(total: int, some: list[Party], rotation: int) -> None:
    assume(sum(one.need for one in some) <= total)

    for policy in (model.Policy.MAX_MIN, model.Policy.ACTIVE_SHARE):
        if policy is model.Policy.ACTIVE_SHARE or any(one.demand != 0 for one in some):
            assert_rounded(divided(policy, total, some, rotation), exact_max_min(total, some))


@checked
@given(st.integers(0, 40), parties, st.integers(0, 9))
def test_proportional_is_doormans_formula_with_floors(total: int, some: list[Party], rotation: int) -> None:
    assume(sum(one.need for one in some) <= total)
    assume(any(one.demand != 0 for one in some))

    assert_rounded(divided(model.Policy.PROPORTIONAL, total, some, rotation), exact_proportional(total, some))


@checked
@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**15), min_size=1, max_size=5))
def test_large_amounts_are_exact(total: int, demands: list[int]) -> None:
    some = [Party(1 + index, demand, 0) for index, demand in enumerate(demands)]
    assume(any(demands))

    assert_rounded(divided(model.Policy.MAX_MIN, total, some), exact_max_min(total, some))
    assert_rounded(divided(model.Policy.PROPORTIONAL, total, some), exact_proportional(total, some))


def test_under_proportional_needs_are_outgrown_in_the_order_of_what_is_left_over() -> None:
    # Equal shares of 20, of which three leave all. The first would outgrow its need at a ratio of 15/20, the
    # second does at 30/80; the ratio comes to 45/80.
    some = [Party(1, 40, 35), Party(1, 100, 50), *[Party(1, 0, 0)] * 3]

    assert divided(model.Policy.PROPORTIONAL, 100, some) == [35, 65, 0, 0, 0]
    assert_rounded([35, 65, 0, 0, 0], exact_proportional(100, some))


def test_ratios_that_floats_cannot_tell_apart_are_in_order() -> None:
    # 1e15 quanta over 1e9 and over 1e9 - 1e3 thousandths: the total meets the first demand, not the second.
    some = [Party(10**6, 10**15, 0), Party(10**6 - 1, 10**15, 0)]
    total = 2 * 10**15 - 1

    assert divided(model.Policy.MAX_MIN, total, some) == [10**15, 10**15 - 1]
