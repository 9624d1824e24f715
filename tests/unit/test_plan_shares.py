"""The dry run: what it answers, and what it refuses."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.core import errors
from leasehold.core.budget import model, plan, quantity

DOCUMENT: dict[str, Any] = {
    "policy": "max_min",
    "limits": {"rpm_limit": 120},
    "expected_workers": 4,
    "integer": ["num_workers"],
    "holders": [
        {"name": "a", "active": True, "weight": 1, "priority": 0, "demand": {"rpm_limit": 1000}},
        {"name": "b", "demand": {"rpm_limit": 60}},
        {"name": "c", "demand": {"rpm_limit": 10}},
    ],
}


def planned(**changes: Any) -> plan.Plan:
    return plan.run(plan.parse({"limits": {"rpm_limit": 120}} | changes))


def test_the_answer_has_a_grant_per_dimension_and_a_reason_for_each() -> None:
    assert plan.run(plan.parse(DOCUMENT)) == {
        "grants": {"a": {"rpm_limit": 55.0}, "b": {"rpm_limit": 55.0}, "c": {"rpm_limit": 10.0}},
        "reasons": {
            "a": ["55 = (120 - 10 for c) / 2"],
            "b": ["55 = (120 - 10 for c) / 2"],
            "c": ["10 = its demand"],
        },
    }


def test_what_is_left_out_has_its_default() -> None:
    request = plan.parse({"limits": {"rpm_limit": 120}, "holders": [{"name": "a"}]})

    assert request.rules.policy is model.Policy.ACTIVE_SHARE
    assert request.rules.expected_workers == 4
    assert request.rules.scaling_enabled
    assert request.rules.quanta == {"rpm_limit": 1}
    (claim,) = request.claims
    assert (claim.is_active, claim.weight, claim.priority, claim.demand) == (True, 1.0, 0, {})


def test_one_active_of_four_expected_has_all_and_grants_are_floats_in_the_documents_order() -> None:
    limits = {"max_concurrent_requests": 40, "rpm_limit": 800, "tpm_limit": 40000, "num_workers": 40}
    holders = [{"name": "z", "active": False}, {"name": "b"}, {"name": "a", "active": False}]

    answer = planned(limits=limits, holders=holders, integer=["max_concurrent_requests", "num_workers"])

    assert list(answer["grants"]) == list(answer["reasons"]) == ["z", "b", "a"]
    assert answer["grants"]["b"] == limits
    assert set(answer["grants"]["a"].values()) == {0}
    assert all(isinstance(units, float) for units in answer["grants"]["b"].values())
    assert answer["reasons"]["b"] == [f"all of {limit}: the only active holder" for limit in limits.values()]


def test_integer_dimensions_are_dealt_in_whole_units_and_others_are_not() -> None:
    holders = [{"name": name} for name in "abc"]

    answer = planned(limits={"slots": 10, "calls": 10}, integer=["slots"], holders=holders)

    assert [answer["grants"][name]["slots"] for name in "abc"] == [4, 3, 3]
    assert [answer["grants"][name]["calls"] for name in "abc"] == pytest.approx([10 / 3] * 3, abs=1e-6)


def test_weights_priorities_and_scaling_are_heeded() -> None:
    holders = [
        {"name": "a", "weight": 3},
        {"name": "b"},
        {"name": "c", "priority": 1, "demand": {"rpm_limit": 20}},
    ]

    assert planned(holders=holders)["grants"] == {
        "a": {"rpm_limit": 75},
        "b": {"rpm_limit": 25},
        "c": {"rpm_limit": 20},
    }
    off = planned(holders=holders, scaling_enabled=False, expected_workers=6)
    assert off["grants"] == {name: {"rpm_limit": 20} for name in "abc"}


@pytest.mark.parametrize("holders", [{}, {"holders": []}])
def test_no_holder_is_no_grant(holders: dict[str, Any]) -> None:
    assert planned(**holders) == {"grants": {}, "reasons": {}}


def holder(**fields: Any) -> dict[str, Any]:
    return {"holders": [{"name": "a"}, {"name": "b"} | fields]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "maxmin"}, "policy: 'maxmin' is not one of .* \\(did you mean max_min\\?\\)"),
        ({"policy": None}, "policy: null, where text is expected"),
        ({"polcy": "static"}, "polcy: unknown key \\(did you mean policy\\?\\)"),
        ({"zzz": 1}, "zzz: unknown key; known are policy, limits"),
        ({"limits": {}}, "limits: 0 dimensions given, 1 to 16 are allowed"),
        ({"limits": {f"d{index}": 1 for index in range(17)}}, "limits: 17 dimensions given"),
        ({"limits": [120]}, "limits: a list, where an object is expected"),
        ({"limits": {"rpm_limit": -1}}, "limits.rpm_limit: -1 is negative"),
        ({"limits": {"rpm_limit": float("nan")}}, "limits.rpm_limit: nan is not a finite number"),
        ({"limits": {"rpm_limit": float("inf")}}, "limits.rpm_limit: inf is not a finite number"),
        ({"limits": {"rpm_limit": 1e10}}, "limits.rpm_limit: 1e\\+10 is above the maximum"),
        ({"limits": {"rpm_limit": 10**400}}, "limits.rpm_limit: a number beyond 1e18"),
        ({"limits": {"rpm_limit": "120"}}, "limits.rpm_limit: text, where a number is expected"),
        ({"limits": {"rpm_limit": True}}, "limits.rpm_limit: true or false, where a number is expected"),
        ({"limits": {"RPM": 1}}, "limits.RPM: not a dimension that a budget can have"),
        ({"limits": {"a\nb": 1}}, "limits.a\\\\nb: not a dimension"),
        ({"limits": {1: 1}}, "limits: the key 1 is not text"),
        ({"expected_workers": 0}, "expected_workers: 0 is not in 1 to 100000"),
        ({"expected_workers": 2.5}, "expected_workers: 2.5 is not a whole number"),
        ({"expected_workers": True}, "expected_workers: true or false, where a number"),
        ({"integer": "num_workers"}, "integer: text, where a list is expected"),
        ({"integer": [1]}, "integer\\[0\\]: a number, where text is expected"),
        ({"scaling_enabled": "no"}, "scaling_enabled: text, where true or false is expected"),
        ({"holders": {"a": {}}}, "holders: an object, where a list is expected"),
        ({"holders": ["a"]}, "holders\\[0\\]: text, where an object is expected"),
        ({"holders": [{}]}, "holders\\[0\\].name: is missing"),
        (holder(name="a"), "holders\\[1\\].name: a is the name of holders\\[0\\] too"),
        (holder(name="x" * 300), "holders\\[1\\].name: 'xxx.* is not a name"),
        (holder(name="a/b"), "holders\\[1\\].name: 'a/b' is not a name"),
        (holder(name="a\nb"), "holders\\[1\\].name: 'a\\\\nb' is not a name"),
        (holder(name=7), "holders\\[1\\].name: a number, where text is expected"),
        (holder(active=1), "holders\\[1\\].active: a number, where true or false is expected"),
        (holder(wieght=2), "holders\\[1\\].wieght: unknown key \\(did you mean weight\\?\\)"),
        (holder(weight=0), "holders\\[1\\].weight: 0 is not in 0.001 to 1e6"),
        (holder(weight=float("nan")), "holders\\[1\\].weight: nan is not a finite number"),
        (holder(weight=[]), "holders\\[1\\].weight: a list, where a number is expected"),
        (holder(priority=1.5), "holders\\[1\\].priority: 1.5 is not a whole number"),
        (holder(priority=1001), "holders\\[1\\].priority: 1001 is not in -1000 to 1000"),
        (holder(demand=5), "holders\\[1\\].demand: a number, where an object is expected"),
        (holder(demand={"rpm_limit": -3}), "holders\\[1\\].demand.rpm_limit: -3 is negative"),
        (holder(demand={"rpm_limit": None}), "holders\\[1\\].demand.rpm_limit: null, where a number"),
        (holder(demand={"rpm": 3}), "holders\\[1\\].demand.rpm: no such dimension \\(did you mean rpm_limit"),
        (holder(demand={"disk": 3}), "holders\\[1\\].demand.disk: no such dimension; limits has rpm_limit"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_with_the_path_of_what_is_wrong(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"^{message}") as refusal:
        planned(**changes)

    assert refusal.value.field is not None
    assert str(refusal.value).startswith(refusal.value.field)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("document", [None, [], "text", 3])
def test_a_document_that_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"^document: .*, where an object is expected"):
        plan.parse(document)


def test_limits_are_required() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"^limits: is missing"):
        plan.parse({})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
entry = st.fixed_dictionaries(
    {},
    optional={
        "name": anything | st.sampled_from("ab"),
        "active": anything,
        "weight": anything,
        "demand": anything,
    },
)


@settings(deadline=None, max_examples=300)
@given(
    anything
    | st.fixed_dictionaries(
        {"limits": anything | st.just({"rpm_limit": 5})},
        optional={
            "policy": anything | st.sampled_from(list(model.Policy)).map(str),
            "holders": anything | st.lists(entry, max_size=3),
            "integer": anything,
            "expected_workers": anything,
        },
    )
)
def test_any_json_is_answered_or_refused_by_name(document: object) -> None:
    document = json.loads(json.dumps(document))

    try:
        answer = plan.run(plan.parse(document))
    except errors.InvalidArgument as refusal:
        assert refusal.field
    else:
        assert answer["grants"].keys() == answer["reasons"].keys()
        json.dumps(answer, allow_nan=False)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(model.Policy)),
    st.floats(0, 1e6),
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), min_size=1),
)
def test_grants_stay_within_limit_and_demand_to_a_millionth(
    policy: model.Policy, limit: float, demands: dict[str, float]
) -> None:
    holders = [{"name": name, "demand": {"rpm_limit": units}} for name, units in demands.items()]

    grants = planned(policy=policy.value, limits={"rpm_limit": limit}, holders=holders)["grants"]

    assert sum(grant["rpm_limit"] for grant in grants.values()) <= limit + 1 / quantity.MICRO
    assert all(grants[name]["rpm_limit"] <= units + 1 / quantity.MICRO for name, units in demands.items())
