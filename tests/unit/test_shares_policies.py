"""The policies by example: the table of the README, and cases in which other allocators went wrong."""

import pytest
from leasehold.core import errors
from leasehold.core.budget import model, quantity, shares

MICRO = quantity.MICRO
LIMITS = {"max_concurrent_requests": 40, "rpm_limit": 800, "tpm_limit": 40_000, "num_workers": 40}
QUANTA = {"max_concurrent_requests": MICRO, "num_workers": MICRO}


def rules(
    policy: str = "active_share",
    limits: dict[str, float] | None = None,
    *,
    expected: int = 4,
    scaling: bool = True,
) -> shares.Rules:
    micros = {name: round(limit * MICRO) for name, limit in (limits or LIMITS).items()}
    return shares.Rules(model.Policy(policy), micros, QUANTA, expected, scaling)


def claim(name: str, rpm: float | None = None, *, active: bool = True, weight: float = 1.0) -> shares.Claim:
    demand = {} if rpm is None else {"rpm_limit": round(rpm * MICRO)}
    return shares.Claim(name, is_active=active, weight=weight, demand=demand)


def units(division: shares.Division) -> dict[str, tuple[float, ...]]:
    return {name: tuple(map(quantity.to_units, amounts)) for name, amounts in division.targets.items()}


def rpm_shares(policy: str, limit: float, demands: list[float | None]) -> list[float]:
    some = [claim(f"w{index:02}", demand) for index, demand in enumerate(demands)]
    division = shares.divide(rules(policy, {"rpm_limit": limit}), some)
    return [share for (share,) in units(division).values()]


@pytest.mark.parametrize(
    ("active", "idle", "each"),
    [
        (1, 0, (40, 800, 40_000, 40)),
        (1, 3, (40, 800, 40_000, 40)),
        (2, 2, (20, 400, 20_000, 20)),
        (4, 0, (10, 200, 10_000, 10)),
        (8, 1, (5, 100, 5_000, 5)),
    ],
)
def test_the_active_share_all_of_it_and_the_idle_have_nothing(
    active: int, idle: int, each: tuple[float, ...]
) -> None:
    some = [claim(f"w{index}", active=index < active) for index in range(active + idle)]

    shared = units(shares.divide(rules(), some))

    assert all(shared[one.name] == (each if one.is_active else (0, 0, 0, 0)) for one in some)


@pytest.mark.parametrize(
    ("registered", "each"),
    [
        (1, (10, 200, 10_000, 10)),
        (4, (10, 200, 10_000, 10)),
        (5, (8, 160, 8_000, 8)),
        (8, (5, 100, 5_000, 5)),
    ],
)
@pytest.mark.parametrize("policy", ["active_share", "max_min", "proportional"])
def test_while_nobody_is_active_everyone_has_its_base(
    policy: str, registered: int, each: tuple[float, ...]
) -> None:
    some = [claim(f"w{index}", active=False) for index in range(registered)]

    assert set(units(shares.divide(rules(policy), some)).values()) == {each}


def test_three_of_whole_units_differ_by_one_and_together_have_all() -> None:
    shared = units(shares.divide(rules(), [claim(name) for name in "abc"]))

    assert [shared[name][0] for name in "abc"] == [14, 13, 13]
    assert sum(shared[name][1] for name in "abc") == pytest.approx(800)


@pytest.mark.parametrize("policy", ["active_share", "max_min", "proportional"])
def test_demands_that_fit_are_met_and_never_exceeded(policy: str) -> None:
    # doorman's FAIR_SHARE gave 14 to the 12, and 113 to the 60.
    assert rpm_shares(policy, 24, [1, 9, 12]) == [1, 9, 12]
    assert rpm_shares(policy, 200, [60, 13, 2, 10, 30, 30, 2]) == [60, 13, 2, 10, 30, 30, 2]


def test_max_min_meets_small_demands_and_shares_the_rest() -> None:
    assert rpm_shares("max_min", 120, [1000, 60, 10]) == [55, 55, 10]
    assert rpm_shares("max_min", 100, [None, 10, None]) == [45, 10, 45]


def test_max_min_rises_in_proportion_to_weight() -> None:
    some = [claim("a", 1000, weight=3), claim("b", 1000), claim("c", 10, weight=2)]

    assert units(shares.divide(rules("max_min", {"rpm_limit": 110}), some)) == {
        "a": (75,),
        "b": (25,),
        "c": (10,),
    }


def test_proportional_shares_what_is_left_in_proportion_to_the_demand_beyond() -> None:
    # Equal shares of 40; 30 are left by the third; the others want 80 and 20 beyond theirs.
    assert rpm_shares("proportional", 120, [120, 60, 10]) == [64, 46, 10]
    assert rpm_shares("proportional", 120, [None, 60, 10]) == [64, 46, 10]
    assert rpm_shares("proportional", 120, [1000, 60, 10]) == pytest.approx([69.387755, 40.612245, 10])
    assert rpm_shares("proportional", 120, [None, None, None]) == [40, 40, 40]


def test_under_max_min_the_idle_count_with_what_they_declare_only() -> None:
    some = [claim("a"), claim("b", 30, active=False), claim("c", active=False)]

    assert units(shares.divide(rules("max_min", {"rpm_limit": 100}), some)) == {
        "a": (70,),
        "b": (30,),
        "c": (0,),
    }


@pytest.mark.parametrize(("policy", "scaling"), [("static", True), ("max_min", False), ("active_share", False)])
def test_static_and_scaling_off_give_the_base_whatever_others_do(policy: str, scaling: bool) -> None:
    some = [claim("a"), claim("b", 50, weight=9), claim("c", active=False)]

    shared = units(shares.divide(rules(policy, {"rpm_limit": 800}, scaling=scaling), some))

    assert shared == {"a": (200,), "b": (50,), "c": (200,)}


def test_a_higher_priority_is_served_wholly_before_the_next() -> None:
    some = [
        shares.Claim("a", priority=5, demand={"rpm_limit": 600 * MICRO}),
        shares.Claim("b", priority=-5),
        shares.Claim("c", priority=0, demand={"rpm_limit": 150 * MICRO}),
    ]

    assert units(shares.divide(rules(limits={"rpm_limit": 800}), some)) == {
        "a": (600,),
        "b": (50,),
        "c": (150,),
    }


def test_whole_units_are_dealt_from_the_whole_part_of_limit_and_demand() -> None:
    some = [shares.Claim("a", demand={"num_workers": 2_900_000}), shares.Claim("b")]

    assert units(shares.divide(rules(limits={"num_workers": 10.9}), some)) == {"a": (2,), "b": (8,)}


def test_a_demand_for_a_dimension_that_the_budget_lacks_is_ignored() -> None:
    some = [shares.Claim("a", demand={"disk": 1}), shares.Claim("b")]

    assert units(shares.divide(rules(limits={"rpm_limit": 10}), some)) == {"a": (5,), "b": (5,)}


@pytest.mark.parametrize(
    ("rule", "some", "field"),
    [
        (rules(limits={"rpm_limit": -1}), [], "limits.rpm_limit"),
        (rules(expected=0), [], "expected_workers"),
        (shares.Rules(model.Policy.STATIC, {}, {}, 4), [], "limits"),
        (shares.Rules(model.Policy.STATIC, {"rpm_limit": 1}, {"rpm_limit": 0}, 4), [], "quanta.rpm_limit"),
        (rules(), [claim("a", -1)], "rpm_limit"),
        (rules(), [shares.Claim("a", need={"rpm_limit": -1})], "rpm_limit"),
        (rules(), [claim("a", weight=0)], "weight"),
        (rules(), [claim("a", weight=float("nan"))], "weight"),
        (rules(), [claim("a"), claim("b"), claim("a")], "claims"),
    ],
)
def test_a_claim_or_rule_that_cannot_be_followed_is_refused(
    rule: shares.Rules, some: list[shares.Claim], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        shares.divide(rule, some)

    assert refusal.value.field == field


def test_a_reason_for_nobody_or_nothing_is_not_found() -> None:
    division = shares.divide(rules(), [claim("a")])

    with pytest.raises(errors.NotFound, match="z is not among the holders"):
        division.reason("z", "rpm_limit")
    with pytest.raises(errors.NotFound, match="disk is not among the dimensions"):
        division.reason("a", "disk")
