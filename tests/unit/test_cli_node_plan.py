"""`leasehold node plan`: a document in, the optimum and reasons out, no server; what it says of bad input."""

import io
import json
from collections.abc import Callable

import pytest
import yaml
from leasehold.cli import main

Plan = Callable[..., int]

EXAMPLE = {
    "formula": "managed",
    "available_gb": 32.1,
    "reserve_gb": 4,
    "worker_limit_gb": 6,
    "threshold_gb": 12,
    "min": 2,
    "max": 8,
    "workers": [{"held_gb": 3.5, "state": "running"}],
}


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Run `node plan` with a document, or the text of one, on standard input; its exit code."""

    def run(document: object, *arguments: str) -> int:
        text = document if isinstance(document, str) else json.dumps(document)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return main.run(["node", "plan", *arguments])

    return run


def test_the_answer_has_the_optimum_and_its_reasons_with_their_numbers(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(EXAMPLE) == 0

    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "optimal": 5,
        "reasons": [
            "free 35.6 GB (available 32.1 GB + held 3.5 GB) - reserve 4.0 GB - charge 6.0 GB = 25.6 GB, "
            "/ 6.0 GB beside 1 live = 5"
        ],
    }
    assert err == ""


def test_yaml_has_the_same_answer_a_table_begins_with_the_number_and_the_name_is_it(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(EXAMPLE, "-o", "json") == 0
    as_json = json.loads(capsys.readouterr().out)
    assert plan(EXAMPLE, "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_json
    assert plan(EXAMPLE, "-o", "table") == 0
    assert capsys.readouterr().out.splitlines() == ["optimal  5", f"  {as_json['reasons'][0]}"]
    assert plan(EXAMPLE, "-o", "name") == 0
    assert capsys.readouterr().out == "5\n"


def test_what_is_left_out_has_the_defaults_of_the_settings(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reserve 4, limit 4, threshold 8, 1 to 6, nobody runs, managed."""
    counts = {}
    for available_gb in (64, 20, 12, 8, 7.9, 0):
        assert plan({"available_gb": available_gb}) == 0
        counts[available_gb] = json.loads(capsys.readouterr().out)["optimal"]

    assert counts == {64: 6, 20: 4, 12: 2, 8: 1, 7.9: 1, 0: 1}


def test_a_worker_that_has_ended_counts_for_nothing(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    ended = {"held_gb": 5, "state": "exited"}

    answers = []
    for workers in ([], [ended]):
        assert plan({**EXAMPLE, "workers": workers}) == 0
        answers.append(capsys.readouterr().out)

    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "document: is not JSON"),
        ("", "document: is not JSON"),
        ("[]", "document: is not an object"),
        ("{}", "available_gb: is missing: how much memory is available?"),
        ('{"available_gb": NaN}', "available_gb: nan is not a number of at least 0"),
        ('{"available_gb": -Infinity}', "available_gb: -inf is not a number of at least 0"),
        ('{"available_gb": 1, "available_gb": 2}', "'available_gb' is given twice"),
        ({"available": 30}, "available: is no key; available_gb was probably meant"),
        ({"available_gb": 30, "MAX": 3}, "MAX: is no key; max was probably meant"),
        ({"available_gb": 30, "zz\nz": 3}, "zz\\nz: is no key; known are formula, "),
        ({"available_gb": 30, "min": 7}, "min: 7 is above max, which is 6 by default"),
        ({"available_gb": 30, "min": 7, "max": 6}, "min: 7 is above max, which is 6\n"),
        ({"available_gb": 30, "max": -1}, "max: -1 is not a number of at least 0"),
        ({"available_gb": 30, "reserve_gb": None}, "reserve_gb: 'None' is not a number"),
        ({"available_gb": 30, "reserve_gb": -4}, "reserve_gb: -4 is not a number of at least 0"),
        ({"available_gb": 30, "worker_limit_gb": 1e-300}, "worker_limit_gb: must be above 0"),
        ({"available_gb": 2e6}, "available_gb: 2e+06 is more than 1.04858e+06"),
        (
            {"available_gb": 30, "formula": "manged"},
            "'manged' is none of managed, literal; managed was probably",
        ),
        ({"available_gb": 30, "formula": ["managed"]}, "formula: \"['managed']\" is none of managed, literal"),
        ({"available_gb": 30, "workers": "ab"}, "workers: is not a list"),
        ({"available_gb": 30, "workers": [1]}, "workers[0]: is not an object"),
        ({"available_gb": 30, "workers": [{}, {"held_gb": -1}]}, "workers[1].held_gb: -1 is not a number"),
        (
            {"available_gb": 30, "workers": [{"state": "runing"}]},
            "workers[0].state: 'runing' is none of starting",
        ),
        (
            {"available_gb": 30, "workers": [{"state": {}}]},
            "workers[0].state: '{}' is none of starting, running",
        ),
        (
            {"available_gb": 30, "workers": [{"held": 1}]},
            "workers[0].held: is no key; held_gb was probably meant",
        ),
        ({"available_gb": 30, "workers": [{}] * 1001}, "workers: has 1001 entries; at most 1000"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(
    document: object, said: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(document) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("leasehold: ")
    assert said in err


def test_a_file_that_is_not_there_is_named(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "-f", "/no/such/plan.json") == 1

    assert "/no/such/plan.json" in capsys.readouterr().err
