"""What every division promises, whatever is claimed."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from leasehold.core.budget import model, quantity, shares

MICRO = quantity.MICRO
DIMENSIONS = ("rpm_limit", "num_workers")
QUANTA = {"rpm_limit": 1, "num_workers": MICRO}
SHARED = (model.Policy.ACTIVE_SHARE, model.Policy.MAX_MIN, model.Policy.PROPORTIONAL)

checked = settings(deadline=None, max_examples=200)
# Small numbers, so that ties, exact fits and leftovers are common; odd ones, so that fractions are.
units = st.one_of(st.integers(0, 12), st.sampled_from([0.5, 2.5, 1 / 3, 7.000001, 1e9]))
micros = units.map(lambda value: round(value * MICRO))
weights = st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5, 3.3, 0.001, 1e6])


@st.composite
def claim(draw: st.DrawFn, name: str, *, has_needs: bool) -> shares.Claim:
    demand = draw(st.dictionaries(st.sampled_from(DIMENSIONS), micros))
    need: dict[str, int] = {}
    if has_needs:
        need = draw(st.dictionaries(st.sampled_from(DIMENSIONS), micros))
        need = {dimension: min(least, demand.get(dimension, least)) for dimension, least in need.items()}
    return shares.Claim(
        name,
        is_active=draw(st.sampled_from([True, True, False])),
        weight=draw(weights),
        priority=draw(st.sampled_from([0, 0, 0, 1, -3])),
        demand=demand,
        need=need,
        last_served=draw(st.integers(0, 3)),
    )


@st.composite
def claims(draw: st.DrawFn, *, has_needs: bool = True, least: int = 0) -> list[shares.Claim]:
    count = draw(st.integers(least, 7))
    return [draw(claim(f"w{index}", has_needs=has_needs)) for index in range(count)]


@st.composite
def rules(draw: st.DrawFn, policies: Sequence[model.Policy] = tuple(model.Policy)) -> shares.Rules:
    return shares.Rules(
        policy=draw(st.sampled_from(policies)),
        limits={dimension: draw(micros) for dimension in DIMENSIONS},
        quanta=QUANTA,
        expected_workers=draw(st.integers(1, 6)),
        scaling_enabled=draw(st.sampled_from([True, True, True, False])),
        rotation=draw(st.integers(0, 20)),
    )


def dealt(division: shares.Division, dimension: str) -> dict[str, int]:
    index = DIMENSIONS.index(dimension)
    return {name: amounts[index] for name, amounts in division.targets.items()}


def demand_of(one: shares.Claim, dimension: str) -> int | None:
    """In whole quanta; None: as much as it can get."""
    demand = one.demand.get(dimension)
    return None if demand is None else demand - demand % QUANTA[dimension]


def is_shared(rule: shares.Rules, some: Sequence[shares.Claim]) -> bool:
    """Whether a policy, rather than the base, decides."""
    if not rule.scaling_enabled or rule.policy is model.Policy.STATIC:
        return False
    if rule.policy is model.Policy.ACTIVE_SHARE:
        return any(one.is_active for one in some)
    return any(asked(rule, one, dimension) != 0 for one in some for dimension in DIMENSIONS)


def asked(rule: shares.Rules, one: shares.Claim, dimension: str) -> int | None:
    """What counts as its demand, in whole quanta."""
    if not one.is_active and rule.policy is model.Policy.ACTIVE_SHARE:
        return 0
    demand = demand_of(one, dimension)
    return 0 if demand is None and not one.is_active else demand


@checked
@given(rules(), claims())
def test_shares_are_whole_quanta_that_together_stay_within_the_limit(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    division = shares.divide(rule, some)

    assert division.targets.keys() == {one.name for one in some}
    for dimension in DIMENSIONS:
        amounts = dealt(division, dimension).values()
        assert sum(amounts) <= rule.limits[dimension]
        assert all(amount >= 0 and amount % QUANTA[dimension] == 0 for amount in amounts)


@checked
@given(rules(), claims())
def test_nobody_gets_more_than_it_declares(rule: shares.Rules, some: list[shares.Claim]) -> None:
    division = shares.divide(rule, some)

    for one in some:
        for dimension in one.demand:
            assert dealt(division, dimension)[one.name] <= one.demand[dimension]


@checked
@given(rules(SHARED), claims())
def test_all_of_the_limit_is_used_if_the_served_ask_for_it(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    assume(is_shared(rule, some))

    division = shares.divide(rule, some)

    for dimension in DIMENSIONS:
        limit = rule.limits[dimension] - rule.limits[dimension] % QUANTA[dimension]
        wants = [asked(rule, one, dimension) for one in some if one.name not in division.waiting]
        wanted = sum(limit if want is None else want for want in wants)
        assert sum(dealt(division, dimension).values()) == min(limit, wanted)


@checked
@given(rules(SHARED), claims())
def test_the_idle_have_nothing_under_active_share_once_anyone_is_active(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    rule = replace(rule, policy=model.Policy.ACTIVE_SHARE)
    assume(is_shared(rule, some))

    division = shares.divide(rule, some)

    assert all(not any(division.targets[one.name]) for one in some if not one.is_active)


@checked
@given(rules(), claims(least=1), st.data())
def test_more_demand_never_brings_less(
    rule: shares.Rules, some: list[shares.Claim], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(some) - 1))
    one = some[index]
    assume(one.demand)
    dimension = data.draw(st.sampled_from(sorted(one.demand)))
    greater: Mapping[str, int] = {**one.demand, dimension: one.demand[dimension] + data.draw(micros)}
    is_within = rule.policy is not model.Policy.PROPORTIONAL or one.demand[dimension] <= rule.limits[dimension]
    if one.is_active and is_within and data.draw(st.booleans()):
        greater = {name: amount for name, amount in one.demand.items() if name != dimension}

    before = dealt(shares.divide(rule, some), dimension)[one.name]
    some[index] = replace(one, demand=greater)
    after = dealt(shares.divide(rule, some), dimension)[one.name]

    assert after >= before


@checked
@given(rules(SHARED[:2]), claims())
def test_equals_differ_by_at_most_one_quantum_unless_demand_or_need_says_otherwise(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    assume(is_shared(rule, some))
    division = shares.divide(rule, some)

    for dimension in DIMENSIONS:
        amounts, quantum = dealt(division, dimension), QUANTA[dimension]
        for poor in some:
            for rich in some:
                if poor.name in division.waiting or (poor.weight, poor.priority) != (
                    rich.weight,
                    rich.priority,
                ):
                    continue
                is_met = amounts[poor.name] == asked(rule, poor, dimension)
                needed = -(-min(rich.need.get(dimension, 0), rule.limits[dimension]) // quantum) * quantum
                if not is_met and amounts[rich.name] > needed:
                    assert amounts[rich.name] - amounts[poor.name] <= quantum


@checked
@given(rules((model.Policy.PROPORTIONAL,)), claims(has_needs=False))
def test_proportional_gives_equals_their_equal_part_and_the_one_who_asks_for_more_not_less(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    some = [replace(one, priority=0, weight=1.0) for one in some]
    assume(is_shared(rule, some))
    division = shares.divide(rule, some)

    for dimension in DIMENSIONS:
        amounts, quantum, limit = dealt(division, dimension), QUANTA[dimension], rule.limits[dimension]
        equal = limit // quantum // len(some) * quantum
        wants = {one.name: asked(rule, one, dimension) for one in some}
        # A demand left out counts as the limit.
        sizes = {name: limit if want is None else want for name, want in wants.items()}
        for name, size in sizes.items():
            assert amounts[name] >= min(size, equal)
            for other, other_size in sizes.items():
                assert size < other_size or amounts[name] >= amounts[other] - quantum


@checked
@given(rules(SHARED[:2]), claims(has_needs=False))
def test_what_grows_is_in_proportion_to_weight_within_a_quantum(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    assume(is_shared(rule, some))
    division = shares.divide(rule, some)

    for dimension in DIMENSIONS:
        amounts, quantum = dealt(division, dimension), QUANTA[dimension]
        for one in some:
            if amounts[one.name] == asked(rule, one, dimension):
                continue
            for other in some:
                if other.priority == one.priority:
                    # (other - 1 quantum) / its weight <= (one + 1 quantum) / its weight
                    excess = (amounts[other.name] - quantum) * round(one.weight * 1000)
                    assert excess <= (amounts[one.name] + quantum) * round(other.weight * 1000)


@checked
@given(rules(), claims(), st.randoms())
def test_the_order_of_the_claims_does_not_matter(
    rule: shares.Rules, some: list[shares.Claim], shuffler: random.Random
) -> None:
    shuffled = list(some)
    shuffler.shuffle(shuffled)

    one, other = shares.divide(rule, some), shares.divide(rule, shuffled)

    assert (one.targets, one.waiting, one.blocked) == (other.targets, other.waiting, other.blocked)


@checked
@given(rules(SHARED), claims())
def test_lower_priorities_take_nothing_from_higher_ones(rule: shares.Rules, some: list[shares.Claim]) -> None:
    highest = max((one.priority for one in some), default=0)
    upper = [one for one in some if one.priority == highest]
    assume(is_shared(rule, upper))

    alone, together = shares.divide(rule, upper), shares.divide(rule, some)

    assert all(together.targets[one.name] == alone.targets[one.name] for one in upper)


@checked
@given(rules(SHARED), claims(has_needs=False, least=2))
def test_over_rotations_equals_have_the_same(rule: shares.Rules, some: list[shares.Claim]) -> None:
    some = [replace(one, weight=1.0, priority=0, demand={}, is_active=True) for one in some]
    rounds = len(some)

    divisions = [shares.divide(replace(rule, rotation=rule.rotation + turn), some) for turn in range(rounds)]

    sums = {
        tuple(map(sum, zip(*(division.targets[one.name] for division in divisions), strict=True)))
        for one in some
    }
    if rule.scaling_enabled:
        assert len(sums) == 1


@checked
@given(st.integers(1, 7), st.integers(0, 30))
def test_each_of_n_equals_has_an_extra_unit_within_the_fewest_rotations(count: int, total: int) -> None:
    rule = shares.Rules(model.Policy.MAX_MIN, {"num_workers": total * MICRO}, QUANTA, 4)
    some = [shares.Claim(f"w{index}") for index in range(count)]
    extra = total % count
    assume(extra)

    for start in range(count):
        lucky: set[str] = set()
        for rotation in range(start, start + -(-count // extra)):
            targets = shares.divide(replace(rule, rotation=rotation), some).targets
            lucky |= {name for name, (amount,) in targets.items() if amount > total // count * MICRO}
        assert len(lucky) == count


@checked
@given(rules(), claims())
def test_every_share_has_a_reason_that_begins_with_the_amount(
    rule: shares.Rules, some: list[shares.Claim]
) -> None:
    division = shares.divide(rule, some)

    for one in some:
        for dimension in DIMENSIONS:
            amount = quantity.text(dealt(division, dimension)[one.name])
            reason = division.reason(one.name, dimension)
            assert reason.removeprefix("base: ").removeprefix("all of ").startswith(amount), reason
            assert "\n" not in reason
            assert len(reason) < 160


@pytest.mark.parametrize("policy", list(model.Policy))
def test_nobody_registered_is_no_error(policy: model.Policy) -> None:
    division = shares.divide(shares.Rules(policy, {"rpm_limit": MICRO}, QUANTA, 4), [])

    assert division.targets == {}
    assert division.waiting == frozenset()
