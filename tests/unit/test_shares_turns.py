"""Needs: who is served, what the served get, and that all get their turn."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from leasehold.core.budget import model, quantity, shares

MICRO = quantity.MICRO
SHARED = (model.Policy.ACTIVE_SHARE, model.Policy.MAX_MIN, model.Policy.PROPORTIONAL)
checked = settings(deadline=None, max_examples=150)


def rules(policy: model.Policy = model.Policy.ACTIVE_SHARE, **limits: int) -> shares.Rules:
    return shares.Rules(policy, limits, {"num_workers": MICRO}, 4)


def after_turn(division: shares.Division, some: Sequence[shares.Claim], turn: int) -> list[shares.Claim]:
    return [one if one.name in division.waiting else replace(one, last_served=turn) for one in some]


@pytest.mark.parametrize("policy", SHARED)
def test_one_that_needs_more_than_its_share_gets_its_need_and_the_others_share_the_rest(
    policy: model.Policy,
) -> None:
    some = [shares.Claim(name) for name in "bcd"]
    some.append(shares.Claim("a", need={"tpm_limit": 12_000 * MICRO}))

    division = shares.divide(rules(policy, tpm_limit=40_000 * MICRO), some)

    assert division.targets["a"] == (12_000 * MICRO,)
    assert {division.targets[name][0] // 10**4 for name in "bcd"} == {933_333}
    assert sum(amount for (amount,) in division.targets.values()) == 40_000 * MICRO
    assert not division.waiting


@checked
@given(st.sampled_from(SHARED), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20))
def test_with_equal_needs_as_many_as_fit_are_served_and_all_within_the_fewest_turns(
    policy: model.Policy, count: int, need: int, limit: int
) -> None:
    assume(need <= limit)
    some = [shares.Claim(f"w{index}", need={"rpm_limit": need * MICRO}) for index in range(count)]
    at_a_time = min(count, limit // need)
    last = dict.fromkeys((one.name for one in some), 0)
    longest = 0

    for turn in range(1, 3 * count + 1):
        division = shares.divide(rules(policy, rpm_limit=limit * MICRO), some)
        served = last.keys() - division.waiting
        assert len(served) == at_a_time
        assert all(division.targets[name][0] >= need * MICRO for name in served)
        assert sum(amount for (amount,) in division.targets.values()) == limit * MICRO
        longest = max(longest, *(turn - last[name] for name in last))
        last |= dict.fromkeys(served, turn)
        some = after_turn(division, some, turn)

    assert longest <= -(-count // at_a_time)


needs = st.dictionaries(st.sampled_from(["num_workers", "rpm_limit"]), st.integers(0, 10))


@checked
@given(st.sampled_from(SHARED), st.lists(needs, min_size=1, max_size=7), st.integers(0, 12), st.integers(0, 12))
def test_with_any_needs_everyone_is_served_within_as_many_turns_as_there_are_claims(
    policy: model.Policy, some_needs: list[dict[str, int]], workers: int, rpm: int
) -> None:
    some = [
        shares.Claim(f"w{index}", need={name: least * MICRO for name, least in need.items()})
        for index, need in enumerate(some_needs)
    ]
    rule = rules(policy, num_workers=workers * MICRO, rpm_limit=rpm * MICRO)
    unserved = {one.name for one in some}

    for turn in range(1, len(some) + 1):
        division = shares.divide(rule, some)
        unserved &= division.waiting
        some = after_turn(division, some, turn)

    assert not unserved
    assert not division.blocked


@checked
@given(
    st.lists(st.tuples(needs, st.integers(0, 3)), min_size=1, max_size=7),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_the_served_have_their_needs_the_waiting_have_nothing_and_none_of_them_would_fit(
    some_needs: list[tuple[dict[str, int], int]], workers: int, rpm: int
) -> None:
    limits = {"num_workers": workers * MICRO, "rpm_limit": rpm * MICRO}
    some = [
        shares.Claim(
            f"w{index}", need={name: least * MICRO for name, least in need.items()}, last_served=last_served
        )
        for index, (need, last_served) in enumerate(some_needs)
    ]

    division = shares.divide(rules(num_workers=workers * MICRO, rpm_limit=rpm * MICRO), some)

    def need_of(one: shares.Claim, dimension: str) -> int:
        return min(one.need.get(dimension, 0), limits[dimension])

    served = [one for one in some if one.name not in division.waiting]
    left = {name: limit - sum(need_of(one, name) for one in served) for name, limit in limits.items()}
    for one in some:
        targets = dict(zip(limits, division.targets[one.name], strict=True))
        if one in served:
            assert all(targets[name] >= need_of(one, name) for name in limits)
        else:
            assert not any(targets.values())
            assert any(need_of(one, name) > left[name] for name in limits)


@checked
@given(
    st.sampled_from(SHARED),
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from([1.0, 2.0])), min_size=1, max_size=6
    ),
    st.integers(0, 60),
)
def test_needs_within_the_plain_share_change_nothing(
    policy: model.Policy, drawn: list[tuple[int, int, float]], limit: int
) -> None:
    rule = rules(policy, rpm_limit=limit * MICRO)
    plain = [
        shares.Claim(f"w{index}", demand={"rpm_limit": demand * MICRO}, weight=weight)
        for index, (demand, _, weight) in enumerate(drawn)
    ]
    targets = shares.divide(rule, plain).targets
    # A target may have been rounded up to a quantum above the exact share.
    needy = [
        replace(one, need={"rpm_limit": min(max(targets[one.name][0] - 1, 0), need * MICRO)})
        for one, (_, need, _) in zip(plain, drawn, strict=True)
    ]

    division = shares.divide(rule, needy)

    assert division.targets == targets
    assert not division.waiting


def test_who_was_served_longest_ago_comes_first_and_names_decide_between_equals() -> None:
    served_at = {"a": 3, "b": 1, "c": 2, "d": 1}
    some = [
        shares.Claim(name, need={"num_workers": MICRO}, last_served=turn) for name, turn in served_at.items()
    ]

    order: list[str] = []
    for workers in range(1, 5):
        division = shares.divide(rules(num_workers=workers * MICRO), some)
        order += sorted(served_at.keys() - division.waiting - set(order))

    assert order == ["b", "d", "c", "a"]


def test_the_same_division_twice_serves_the_same_while_no_turn_has_ended() -> None:
    some = [shares.Claim(f"w{index}", need={"num_workers": MICRO}) for index in range(5)]

    first = shares.divide(rules(num_workers=2 * MICRO), some)
    joined = shares.divide(
        rules(num_workers=2 * MICRO), [*some, shares.Claim("x", need={"num_workers": MICRO})]
    )

    assert joined.waiting == first.waiting | {"x"}


def test_a_part_of_a_unit_is_a_need_of_the_whole_unit() -> None:
    some = [shares.Claim(name, need={"num_workers": 1}) for name in "abc"]

    division = shares.divide(rules(num_workers=2 * MICRO), some)

    assert division.waiting == {"c"}
    assert division.targets["a"] == division.targets["b"] == (MICRO,)


def test_what_higher_priorities_leave_may_be_of_no_use_and_no_turn_helps() -> None:
    some = [
        shares.Claim("urgent", priority=1, demand={"tpm_limit": 30_000 * MICRO}),
        shares.Claim("big", need={"tpm_limit": 12_000 * MICRO}),
        shares.Claim("small", need={"tpm_limit": 6_000 * MICRO}),
        shares.Claim("small too", need={"tpm_limit": 6_000 * MICRO}),
    ]

    division = shares.divide(rules(tpm_limit=40_000 * MICRO), some)

    assert division.blocked == {"big"}
    assert division.waiting == {"big", "small too"}
    assert division.targets["small"] == (10_000 * MICRO,)


def test_no_turn_helps_where_one_of_several_dimensions_is_taken() -> None:
    some = [
        shares.Claim("urgent", priority=1, demand={"num_workers": 2 * MICRO, "rpm_limit": 5 * MICRO}),
        shares.Claim("late", need={"num_workers": MICRO, "rpm_limit": MICRO}),
    ]

    division = shares.divide(rules(num_workers=2 * MICRO, rpm_limit=10 * MICRO), some)

    assert division.blocked == {"late"}
    assert division.targets["late"] == (0, 0)


def test_a_need_above_a_limit_that_was_lowered_counts_as_the_limit() -> None:
    some = [shares.Claim(name, need={"tpm_limit": 12_000 * MICRO}) for name in "ab"]

    division = shares.divide(rules(tpm_limit=5_000 * MICRO), some)

    assert division.targets == {"a": (5_000 * MICRO,), "b": (0,)}
    assert division.waiting == {"b"}
    assert not division.blocked


@pytest.mark.parametrize("policy", [model.Policy.STATIC, model.Policy.MAX_MIN])
def test_needs_do_not_apply_at_the_base(policy: model.Policy) -> None:
    some = [shares.Claim(name, is_active=False, need={"num_workers": 3 * MICRO}) for name in "abcde"]

    division = shares.divide(rules(policy, num_workers=5 * MICRO), some)

    assert set(division.targets.values()) == {(MICRO,)}
    assert not division.waiting
