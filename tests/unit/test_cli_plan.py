"""`leasehold budget plan`: a document in, grants and reasons out, no server; and what it says of bad input."""

import io
import json
import pathlib
from collections.abc import Callable

import pytest
import yaml
from leasehold.cli import main

Plan = Callable[..., int]

EXAMPLE = {
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


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Run `budget plan` with a document, or the text of one, on standard input; its exit code."""

    def run(document: object, *arguments: str) -> int:
        text = document if isinstance(document, str) else json.dumps(document)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return main.run(["budget", "plan", *arguments])

    return run


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said of an error, with nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("leasehold: ")
    return err


def test_the_rehearsal_of_three_demands_gives_what_two_of_them_leave(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(EXAMPLE) == 0

    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert list(answer) == ["grants", "reasons"]
    assert answer["grants"] == {"a": {"rpm_limit": 55.0}, "b": {"rpm_limit": 55.0}, "c": {"rpm_limit": 10.0}}
    assert {name: len(reasons) for name, reasons in answer["reasons"].items()} == {"a": 1, "b": 1, "c": 1}
    assert err == ""


def test_yaml_has_the_same_answer_and_names_are_one_a_line(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(EXAMPLE, "-o", "json") == 0
    as_json = json.loads(capsys.readouterr().out)
    assert plan(EXAMPLE, "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_json
    assert plan(EXAMPLE, "-o", "name") == 0
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_the_table_is_plain_text_off_a_terminal(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "-o", "table") == 0

    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading == "HOLDER  DIMENSION  GETS  WHY"
    assert [row.split()[:3] for row in rows] == [
        ["a", "rpm_limit", "55"],
        ["b", "rpm_limit", "55"],
        ["c", "rpm_limit", "10"],
    ]
    assert all(row == row.rstrip() for row in rows)
    assert "\x1b" not in "".join(rows)


def test_a_file_is_read_where_one_is_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(EXAMPLE))

    assert main.run(["budget", "plan", "-f", str(file), "-o", "name"]) == 0
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_no_holders_is_an_answer_too(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan({"limits": {"rpm_limit": 1}}) == 0
    assert json.loads(capsys.readouterr().out) == {"grants": {}, "reasons": {}}
    assert plan({"limits": {"rpm_limit": 1}}, "-o", "name") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"limits": {"rpm_limit": -1}}, "limits.rpm_limit"),
        ('{"limits": {"rpm_limit": NaN}}', "limits.rpm_limit"),
        ('{"limits": {"rpm_limit": 1e999}}', "limits.rpm_limit"),
        ('{"limits": {"rpm_limit": ' + "9" * 400 + "}}", "limits.rpm_limit"),
        ({"limits": {"rpm_limit": "120"}}, "limits.rpm_limit"),
        ({"limits": {}}, "limits"),
        ({}, "limits"),
        ([], "document"),
        ({**EXAMPLE, "polici": "max_min"}, "polici"),
        ({**EXAMPLE, "policy": "fairest"}, "policy"),
        ({**EXAMPLE, "expected_workers": 0}, "expected_workers"),
        ({**EXAMPLE, "holders": [{"name": "a", "demand": {"tpm_limit": 1}}]}, "holders[0].demand.tpm_limit"),
        ({**EXAMPLE, "holders": [{"name": "a" * 300}]}, "holders[0].name"),
        ({**EXAMPLE, "holders": [{"name": "a/b"}]}, "holders[0].name"),
        ({**EXAMPLE, "holders": [{"name": "a\nb"}]}, "holders[0].name"),
        ({**EXAMPLE, "holders": [{"name": "a"}, {"name": "a"}]}, "holders[1].name"),
        ({**EXAMPLE, "holders": [{"name": "a", "weight": 0}]}, "holders[0].weight"),
        ('{"limits": {"rpm_limit": 1, "rpm_limit": 2}}', "rpm_limit"),
        ("{", "document"),
        ("", "document"),
        ("[" * 100_000, "document"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_the_field(
    plan: Plan, document: object, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(document) == main.EXIT_FAILED

    assert field in refusal(capsys)


def test_standard_input_that_is_not_utf_8_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe{}")))

    assert main.run(["budget", "plan"]) == main.EXIT_FAILED
    assert "is not UTF-8" in refusal(capsys)


def test_standard_input_that_is_closed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)

    assert main.run(["budget", "plan"]) == main.EXIT_FAILED
    assert refusal(capsys) == "leasehold: file: standard input is closed\n"


@pytest.mark.parametrize("name", ["missing.json", "\0"])
def test_a_file_that_cannot_be_read_is_told(
    tmp_path: pathlib.Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["budget", "plan", "-f", f"{tmp_path}/{name}"]) == main.EXIT_FAILED
    assert "file: " in refusal(capsys)
