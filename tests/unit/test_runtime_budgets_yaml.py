"""The budgets file as text."""

import pytest
from leasehold.core import errors
from leasehold.core.budget import quantity
from leasehold.runtime import budgets_yaml


def test_a_short_file_is_a_budget() -> None:
    (spec,) = budgets_yaml.parse("budgets:\n  - name: api\n    dimensions: {rpm_limit: 800}\n")

    assert spec.name == "api"
    assert spec.dimensions[0].limit == 800 * quantity.MICRO


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "budgets:\n  - name: a\n    name: b\n    dimensions: {rpm_limit: 1}\n",
            "line 3: the key 'name' is given twice",
        ),
        ("budgets:\n  - name: a\n    dimensions: {rpm_limit: 1, rpm_limit: 2}\n", "'rpm_limit' is given twice"),
        ("budgets: [", "not YAML"),
        ("budgets:\n  - name: a\n    dimensions: {rpm_limit: 1}\n    ttl: 3\n", "did you mean ttl_seconds"),
        ("", "the file is empty"),
        ("budgets:\n  - name: 2020-13-45\n", "not YAML"),
        ("budgets: " + "9" * 5000, "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_line_or_field(text: str, said: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=said):
        budgets_yaml.parse(text)
