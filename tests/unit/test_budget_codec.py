"""Budget definitions as plain data: what round-trips, what a file may say, what is refused and how."""

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from leasehold.core import errors
from leasehold.core.budget import codec, model, quantity

MICRO = quantity.MICRO

FULL = model.BudgetSpec(
    name="openai",
    dimensions=(
        model.Dimension(name="tpm_limit", kind=model.DimensionKind.RATE, limit=40_000 * MICRO),
        model.Dimension(
            name="image_limit", kind=model.DimensionKind.RATE, limit=12_500_000, window_seconds=30.0
        ),
        model.Dimension(name="num_workers", kind=model.DimensionKind.SLOTS, limit=40 * MICRO),
    ),
    policy=model.Policy.MAX_MIN,
    holder_classes=(
        model.HolderClass(pattern="batch-*", weight=0.5, safe_capacity={"tpm_limit": 10 * MICRO}),
        model.HolderClass(pattern="*", priority=-3),
    ),
    expected_workers=7,
    scaling_enabled=False,
    activity_timeout_seconds=12.5,
    ttl_seconds=20.0,
    refresh_seconds=5.0,
    window_seconds=60.0,
    arrival_jitter_seconds=0.5,
    max_call_seconds=120.0,
    orphan_seconds=0.0,
    max_tokens_per_request=4000 * MICRO,
    charged_at=model.ChargedAt.COMPLETION,
    safe_ttl_seconds=45.0,
)


def rate(limit: float = 800) -> dict[str, Any]:
    return {"name": "openai", "dimensions": {"rpm_limit": limit}}


def refusal(value: object, path: str = "") -> errors.InvalidArgument:
    with pytest.raises(errors.InvalidArgument) as caught:
        codec.decode_budget(value, path)
    return caught.value


def file_refusal(text: str) -> errors.InvalidArgument:
    with pytest.raises(errors.InvalidArgument) as caught:
        codec.decode_budget_file(yaml.safe_load(text))
    return caught.value


def test_every_field_survives_json_and_back() -> None:
    assert codec.decode_budget(json.loads(json.dumps(codec.encode_budget(FULL), allow_nan=False))) == FULL


def test_encoding_names_units_and_says_whole_numbers_plainly() -> None:
    encoded = codec.encode_budget(FULL)
    assert encoded["dimensions"] == [
        {"name": "tpm_limit", "kind": "rate", "limit": 40000, "window_seconds": 60},
        {"name": "image_limit", "kind": "rate", "limit": 12.5, "window_seconds": 30},
        {"name": "num_workers", "kind": "slots", "limit": 40},
    ]
    assert encoded["holder_classes"][0] == {
        "pattern": "batch-*",
        "weight": 0.5,
        "priority": 0,
        "safe_capacity": {"tpm_limit": 10},
    }
    assert encoded["max_tokens_per_request"] == 4000
    assert encoded["orphan_seconds"] == 0


def test_encoding_writes_defaults_out_so_that_later_defaults_do_not_change_stored_budgets() -> None:
    encoded = codec.encode_budget(codec.decode_budget(rate()))
    assert set(encoded) == {
        "name",
        "dimensions",
        "policy",
        "holder_classes",
        "expected_workers",
        "scaling_enabled",
        "activity_timeout_seconds",
        "ttl_seconds",
        "refresh_seconds",
        "window_seconds",
        "arrival_jitter_seconds",
        "max_call_seconds",
        "safe_ttl_seconds",
        "max_tokens_per_request",
        "charged_at",
    }


def test_an_orphan_time_that_is_left_out_or_empty_follows_max_call() -> None:
    assert codec.decode_budget(rate()).orphan_seconds is None
    assert codec.decode_budget({**rate(), "orphan_seconds": None}).orphan_seconds is None
    assert "orphan_seconds" not in codec.encode_budget(codec.decode_budget(rate()))


def test_short_and_long_forms_of_a_dimension_mean_the_same() -> None:
    short = codec.decode_budget(rate(800))
    long = codec.decode_budget(
        {
            "name": "openai",
            "dimensions": {"rpm_limit": {"kind": "rate", "limit": 800.0, "window_seconds": 60}},
        }
    )
    listed = codec.decode_budget({"name": "openai", "dimensions": [{"name": "rpm_limit", "limit": 800}]})
    assert short == long == listed


@pytest.mark.parametrize(("name", "kind"), model.STANDARD_KINDS.items())
def test_the_standard_names_imply_their_kinds(name: str, kind: model.DimensionKind) -> None:
    spec = codec.decode_budget({"name": "a", "dimensions": {name: 40}})
    assert spec.dimensions == (model.Dimension(name=name, kind=kind, limit=40 * MICRO),)


def test_a_rate_takes_the_budgets_window_unless_it_has_its_own() -> None:
    spec = codec.decode_budget(
        {
            "name": "a",
            "window_seconds": 10,
            "dimensions": {"rpm_limit": 5, "tpm_limit": {"limit": 9, "window_seconds": 3}, "num_workers": 2},
        }
    )
    assert [dimension.window_seconds for dimension in spec.dimensions] == [10.0, 3.0, 60.0]


def test_dimensions_keep_the_order_of_the_file() -> None:
    spec = codec.decode_budget({"name": "a", "dimensions": {"tpm_limit": 1, "num_workers": 2, "rpm_limit": 3}})
    assert [dimension.name for dimension in spec.dimensions] == ["tpm_limit", "num_workers", "rpm_limit"]


@given(st.integers(min_value=0, max_value=10**15))
def test_any_limit_in_micro_units_survives(micros: int) -> None:
    dimension = model.Dimension(name="rpm_limit", kind=model.DimensionKind.RATE, limit=micros)
    spec = model.BudgetSpec(name="a", dimensions=(dimension,))
    assert codec.decode_budget(json.loads(json.dumps(codec.encode_budget(spec)))) == spec


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=20), children, max_size=4)
    ),
    max_leaves=10,
)
budget_keys = st.sampled_from(sorted(codec.encode_budget(FULL)))


@given(st.dictionaries(budget_keys, json_values, max_size=6))
def test_whatever_a_definition_says_it_is_read_or_refused_by_name(definition: dict[str, Any]) -> None:
    try:
        spec = codec.decode_budget({**rate(), **definition}, "budgets[0]")
    except errors.InvalidArgument as error:
        assert error.field is not None and error.field.startswith("budgets[0].")
        assert error.message.startswith("budgets[0].")
        assert "\n" not in error.message
    else:
        assert codec.decode_budget(codec.encode_budget(spec)) == spec


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"expected_worker": 4}, "expected_worker", "did you mean expected_workers?"),
        ({"zzz": 4}, "zzz", "there is no such key"),
        ({"policy": "maxmin"}, "policy", "did you mean max_min?"),
        ({"policy": 3}, "policy", "is a number, not text"),
        ({"charged_at": "departure"}, "charged_at", "arrival, completion"),
        ({"expected_workers": 4.5}, "expected_workers", "not a whole number"),
        ({"expected_workers": True}, "expected_workers", "is true or false, not a whole number"),
        ({"expected_workers": 0}, "expected_workers", "1 to 100000"),
        ({"scaling_enabled": 1}, "scaling_enabled", "not true or false"),
        ({"ttl_seconds": "10"}, "ttl_seconds", "without quotes"),
        ({"ttl_seconds": math.nan}, "ttl_seconds", "finite"),
        ({"ttl_seconds": 10**400}, "ttl_seconds", "finite"),
        ({"ttl_seconds": None}, "ttl_seconds", "is empty, not a number"),
        ({"refresh_seconds": 6}, "refresh_seconds", "longer than half of ttl_seconds"),
        ({"max_tokens_per_request": -1}, "max_tokens_per_request", "negative"),
        ({"name": "a/b"}, "name", "is not a name"),
        ({"name": 7}, "name", "is a number, not text"),
        ({"dimensions": {}}, "dimensions", "1 to 16"),
        ({"dimensions": 800}, "dimensions", "is a number, not a list"),
        ({"dimensions": {"rpm_limit": math.nan}}, "dimensions.rpm_limit.limit", "finite"),
        ({"dimensions": {"rpm_limit": -5}}, "dimensions.rpm_limit.limit", "negative"),
        ({"dimensions": {"rpm_limit": "1e9"}}, "dimensions.rpm_limit.limit", "1.0e+9"),
        ({"dimensions": {"num_workers": 2.5}}, "dimensions.num_workers.limit", "whole number"),
        ({"dimensions": {"rpm": 800}}, "dimensions.rpm.kind", "did you mean rpm_limit?"),
        ({"dimensions": {"rpm_limits": 8}}, "dimensions.rpm_limits.kind", "did you mean rpm_limit?"),
        ({"dimensions": {"x": {"kind": "rates", "limit": 1}}}, "dimensions.x.kind", "did you mean rate?"),
        ({"dimensions": {"rpm_limit": {"limt": 8}}}, "dimensions.rpm_limit.limt", "did you mean limit?"),
        ({"dimensions": {"rpm_limit": {}}}, "dimensions.rpm_limit.limit", "is missing"),
        (
            {"dimensions": {"num_workers": {"limit": 4, "window_seconds": 60}}},
            "dimensions.num_workers.window_seconds",
            "only a rate has a window",
        ),
        ({"dimensions": {"rpm_limit": {"name": "x", "limit": 1}}}, "dimensions.rpm_limit.name", "the key is"),
        ({"dimensions": {7: 1}}, "dimensions", "is a number, not text"),
        ({"dimensions": [{"limit": 1}]}, "dimensions[0].name", "is missing"),
        ({"dimensions": [800]}, "dimensions[0]", "not a mapping"),
        (
            {"dimensions": [{"name": "rpm_limit", "limit": 1}, {"name": "rpm_limit", "limit": 2}]},
            "dimensions",
            "rpm_limit is given twice",
        ),
        ({"holder_classes": {}}, "holder_classes", "is a mapping, not a list"),
        ({"holder_classes": [{}]}, "holder_classes[0].pattern", "is missing"),
        ({"holder_classes": [{"pattern": "*", "wieght": 2}]}, "holder_classes[0].wieght", "mean weight?"),
        (
            {"holder_classes": [{"pattern": "a"}, {"pattern": "*", "weight": 0}]},
            "holder_classes[1].weight",
            "0.001",
        ),
        (
            {"holder_classes": [{"pattern": "*", "safe_capacity": {"tpm_limit": 1}}]},
            "holder_classes.safe_capacity.tpm_limit",
            "no such dimension",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_and_a_hint(
    change: dict[str, Any], field: str, words: str
) -> None:
    error = refusal({**rate(), **change})
    assert error.field == field
    assert error.message.startswith(field)
    assert words in error.message


@pytest.mark.parametrize("missing", ["name", "dimensions"])
def test_name_and_dimensions_are_needed(missing: str) -> None:
    definition = {key: value for key, value in rate().items() if key != missing}
    assert refusal(definition, "budgets[3]").field == f"budgets[3].{missing}"


@pytest.mark.parametrize("value", [None, 3, "text", [], True])
def test_a_definition_that_is_no_mapping_is_refused(value: object) -> None:
    assert refusal(value).field == "budget"


def test_a_key_of_many_lines_does_not_break_the_message() -> None:
    error = refusal({**rate(), "a\nb" * 100: 1})
    assert "\n" not in error.message
    assert len(error.message) < 300


FILE = """
budgets:
  - name: openai
    dimensions:
      rpm_limit: 800
      tpm_limit: {limit: 40000, window_seconds: 30}
      image_limit: {kind: rate, limit: 50}
    policy: max_min
    holder_classes:
      - {pattern: "batch-*", weight: 0.5, safe_capacity: {rpm_limit: 10}}
  - name: local
    dimensions: {num_workers: 4}
"""


def test_a_file_gives_its_budgets_in_order() -> None:
    openai, local = codec.decode_budget_file(yaml.safe_load(FILE))
    assert [dimension.limit // MICRO for dimension in openai.dimensions] == [800, 40000, 50]
    assert [dimension.window_seconds for dimension in openai.dimensions] == [60.0, 30.0, 60.0]
    assert openai.policy is model.Policy.MAX_MIN
    assert openai.holder_class("batch-7").safe_capacity == {"rpm_limit": 10 * MICRO}
    assert local.dimensions[0].kind is model.DimensionKind.SLOTS


def test_a_file_of_no_budgets_says_so() -> None:
    assert codec.decode_budget_file({"budgets": []}) == ()


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("", "budgets", "`budgets: []` means none"),
        ("- a", "budgets", "is a list, not a mapping"),
        ("budget: []", "budget", "did you mean budgets?"),
        ("{}", "budgets", "is missing"),
        ("budgets: {}", "budgets", "is a mapping, not a list"),
        ("budgets: [3]", "budgets[0]", "is a number, not a mapping"),
        (FILE + "  - {name: local, dimensions: {rpm_limit: 1}}", "budgets[2].name", "defined in budgets[1]"),
        (
            FILE + "  - {name: c, dimensions: {rpm_limit: 1}, ttl: 3}",
            "budgets[2].ttl",
            "did you mean ttl_seconds?",
        ),
        (
            FILE + "  - {name: c, dimensions: {rpm_limit: .nan}}",
            "budgets[2].dimensions.rpm_limit.limit",
            "finite",
        ),
        (
            FILE + "  - {name: c, dimensions: {rpm_limit: 1}, refresh_seconds: 9}",
            "budgets[2].refresh_seconds",
            "half of ttl_seconds",
        ),
    ],
)
def test_a_wrong_file_is_refused_whole_and_names_the_place(text: str, field: str, words: str) -> None:
    error = file_refusal(text)
    assert error.field == field
    assert words in error.message
