"""What people read about a share."""

import pytest
from leasehold.core.budget import model, quantity, shares

MICRO = quantity.MICRO
QUANTA = {"num_workers": MICRO, "rpm_limit": 1}


def reasons(
    *some: shares.Claim, policy: str = "active_share", expected: int = 4, scaling: bool = True, **limits: float
) -> dict[str, str]:
    """The reason of each holder's first dimension."""
    micros = {name: round(limit * MICRO) for name, limit in limits.items()}
    division = shares.divide(shares.Rules(model.Policy(policy), micros, QUANTA, expected, scaling), some)
    return {one.name: division.reason(one.name, next(iter(limits))) for one in some}


def rpm(name: str, demand: float, *, weight: float = 1.0, priority: int = 0) -> shares.Claim:
    return shares.Claim(name, weight=weight, priority=priority, demand={"rpm_limit": round(demand * MICRO)})


def idle(name: str) -> shares.Claim:
    return shares.Claim(name, is_active=False)


def test_an_equal_part() -> None:
    assert reasons(*map(shares.Claim, "abcd"), rpm_limit=80)["a"] == "20 = 1/4 of 80"


def test_a_fraction_of_a_unit_has_two_decimals() -> None:
    assert reasons(*map(shares.Claim, "abc"), rpm_limit=80)["a"] == "26.67 = 1/3 of 80"


def test_a_part_in_whole_units() -> None:
    told = reasons(*map(shares.Claim, "abc"), num_workers=40)

    assert told["a"] == "14 = 1/3 of 40, in whole units"
    assert told["c"] == "13 = 1/3 of 40, in whole units"


def test_a_demand_that_is_met_and_what_it_leaves() -> None:
    assert reasons(rpm("a", 1000), rpm("b", 60), rpm("c", 10), rpm_limit=120) == {
        "a": "55 = (120 - 10 for c) / 2",
        "b": "55 = (120 - 10 for c) / 2",
        "c": "10 = its demand",
    }


def test_up_to_two_others_are_named_and_more_are_counted() -> None:
    small = [rpm(name, 10) for name in "bcd"]

    assert reasons(shares.Claim("a"), *small[:2], rpm_limit=120)["a"] == "100 = 120 - 20 for b and c"
    assert reasons(shares.Claim("a"), *small, rpm_limit=120)["a"] == "90 = 120 - 30 for 3 others"


def test_parts_by_weight() -> None:
    told = reasons(shares.Claim("a", weight=3), shares.Claim("b"), rpm("c", 20), rpm_limit=100)

    assert told["a"] == "60 = 3/4 of (100 - 20 for c) by weight"
    assert told["b"] == "20 = 1/4 of (100 - 20 for c) by weight"


def test_equal_weights_other_than_one_are_not_mentioned() -> None:
    assert (
        reasons(shares.Claim("a", weight=7), shares.Claim("b", weight=7), rpm_limit=10)["a"] == "5 = 1/2 of 10"
    )


def test_the_only_active_holder_and_an_idle_one() -> None:
    assert reasons(shares.Claim("a"), idle("b"), rpm_limit=800) == {
        "a": "all of 800: the only active holder",
        "b": "0: idle; its share starts with its first task",
    }


def test_alone_among_active_ones_that_ask_for_nothing_of_it() -> None:
    told = reasons(shares.Claim("a"), rpm("b", 0), policy="max_min", rpm_limit=800)

    assert told == {"a": "all of 800: nobody else asks for any", "b": "0 = its demand"}


def test_an_idle_one_that_declares_nothing_under_max_min() -> None:
    assert (
        reasons(shares.Claim("a"), idle("b"), policy="max_min", rpm_limit=800)["b"]
        == "0: idle and asks for nothing"
    )


def test_the_base() -> None:
    assert reasons(idle("a"), rpm_limit=800)["a"] == "base: 200 = 800 / 4 expected workers, nobody is active"
    assert reasons(idle("a"), rpm_limit=800, expected=1)["a"].startswith("base: 800 = 800 / 1 expected worker,")
    assert (
        reasons(*map(idle, "abcde"), rpm_limit=800)["a"] == "base: 160 = 800 / 5 registered, nobody is active"
    )
    assert reasons(idle("a"), num_workers=10)["a"].startswith(
        "base: 3 = 10 / 4 expected workers, in whole units"
    )


def test_the_base_while_an_active_one_asks_for_nothing() -> None:
    told = reasons(rpm("a", 0), idle("b"), policy="max_min", rpm_limit=800)

    assert told == {"a": "0 = its demand", "b": "base: 200 = 800 / 4 expected workers, nobody asks for more"}


def test_static_and_scaling_off() -> None:
    assert (
        reasons(idle("a"), policy="static", rpm_limit=800)["a"]
        == "200 = 800 / 4 expected workers, whatever others do"
    )
    assert (
        reasons(shares.Claim("a"), scaling=False, rpm_limit=800)["a"]
        == "200 = 800 / 4 expected workers; scaling is off"
    )
    assert reasons(rpm("a", 50), scaling=False, rpm_limit=800)["a"] == "50 = its demand"


def test_proportional() -> None:
    told = reasons(rpm("a", 120), rpm("b", 60), rpm("c", 10), policy="proportional", rpm_limit=120)

    assert told["a"] == "64 = 1/3 of 120 + 24 of the 30 that others leave, by demand"
    assert told["c"] == "10 = its demand"
    assert reasons(*map(shares.Claim, "abc"), policy="proportional", rpm_limit=120)["a"] == "40 = 1/3 of 120"


def test_bands() -> None:
    told = reasons(
        rpm("a", 500, priority=5),
        rpm("b", 100, priority=4),
        shares.Claim("c"),
        shares.Claim("d"),
        rpm_limit=800,
    )

    assert told["c"] == "100 = 1/2 of 200, after higher priorities took 600 of 800"
    told = reasons(rpm("a", 600, priority=5), shares.Claim("c"), rpm_limit=800)
    assert told["c"] == "all of 200, after priority 5 took 600 of 800"
    told = reasons(shares.Claim("a", priority=5), shares.Claim("c"), rpm_limit=800)
    assert told == {"a": "all of 800: priority 5 comes first", "c": "0: priority 5 took all of 800"}


def test_turns() -> None:
    some = [shares.Claim(name, need={"num_workers": MICRO}) for name in "abcde"]

    told = reasons(*some, num_workers=2)
    assert told["a"] == "1 = 1/2 of 2; 3 wait for a turn"
    assert told["c"] == "0: waits its turn, 2 of 5 are served at a time"
    told = reasons(*some[:2], num_workers=1)
    assert told["a"] == "all of 1; 1 waits for a turn"
    assert told["b"] == "0: waits its turn, 1 of 2 is served at a time"


def test_a_need_above_the_fair_share_and_one_that_nothing_is_left_for() -> None:
    needy = shares.Claim("a", need={"rpm_limit": 50 * MICRO})

    told = reasons(needy, shares.Claim("b"), shares.Claim("c"), rpm_limit=90)
    assert told["a"] == "50 = the least that is of use to it, more than its fair share"
    assert told["b"] == "20 = (90 - 50 for a) / 2"
    told = reasons(rpm("z", 60, priority=1), needy, rpm_limit=90)
    assert told["a"] == "0: needs 50 rpm_limit, 30 left by priority 1"


@pytest.mark.parametrize(
    ("limit", "reason"), [(0, "0: the limit is 0"), (0.5, "0: the limit is 0.5, less than one unit")]
)
@pytest.mark.parametrize("policy", ["active_share", "max_min", "proportional"])
def test_no_limit_to_share(policy: str, limit: float, reason: str) -> None:
    told = reasons(shares.Claim("a"), shares.Claim("b"), policy=policy, num_workers=limit)

    assert set(told.values()) == {reason}


def test_a_demand_for_a_part_of_a_unit() -> None:
    told = reasons(shares.Claim("a", demand={"num_workers": 2_500_000}), shares.Claim("b"), num_workers=10)

    assert told == {"a": "2 = its demand of 2.5, in whole units", "b": "8 = 10 - 2 for a"}
