"""The command line itself: exit codes, help, completion, and what is refused before any server is asked."""

import json
import pathlib
import subprocess
import sys

import pytest
from leasehold.cli import main, options

#: Nobody listens there; a command that is refused earlier does not try.
NOWHERE = "127.0.0.1:9"


def test_version_is_told_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["version", "-o", "name"]) == 0
    version = capsys.readouterr().out.strip()
    assert main.run(["version"]) == 0
    assert capsys.readouterr().out == f"leasehold {version}\n"
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"leasehold {version}\n"
    assert main.run(["version", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == version


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["budget", "-h"]])
def test_help_tells_the_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0

    told = " ".join(capsys.readouterr().out.split())
    assert "0 done; 1 refused or failed" in told
    assert "3 no allocator reached" in told
    assert "130 interrupted" in told


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["budgets"],
        ["budget"],
        ["budget", "status"],
        ["budget", "status", "llm-api", "--colour"],
        ["budget", "status", "llm-api", "-o", "xml"],
        ["budget", "status", "llm-api", "--timeout", "0"],
        ["budget", "status", "llm-api", "--timeout", "nan"],
        ["budget", "status", "llm-api", "--timeout", "inf"],
        ["budget", "watch", "llm-api", "--count", "-1"],
        ["budget", "ledger", "--limit", "0"],
        ["budget", "apply"],
        ["node"],
        ["node", "drain"],
        ["node", "explain", "-n", "0"],
        ["workers", "scale"],
        ["workers", "scale", "four"],
        ["workers", "scale", "-1"],
        ["workers", "scale", "4", "--auto"],
        ["workers", "scale", "4", "--hold", "0"],
        ["workers", "scale", "4", "--hold", "nan"],
        ["workers", "scale", "--auto", "--hold", "5"],
        ["workers", "logs"],
        ["workers", "logs", "a_1@b", "-n", "0"],
        ["workers", "stop", "a_1@b", "--pool", "a"],
        ["up", "--port", "70000"],
        ["up", "--allocators", "0"],
    ],
)
def test_wrong_command_line_is_exit_code_2_and_no_data(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    if arguments not in ([], ["budget"], ["node"]):  # those print the help
        out, err = capsys.readouterr()
        assert out == ""
        assert "Error: " in err


@pytest.mark.parametrize("name", ["a/b", "a\nb", "n" * 300, " ", "\udcff"])
@pytest.mark.parametrize("command", ["get", "status", "watch", "delete", "explain", "ledger"])
def test_budget_name_that_is_none_is_refused_without_a_server(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = ["w1"] if command == "explain" else []

    assert main.run(["budget", command, name, *holder, "--addr", NOWHERE]) == main.EXIT_FAILED

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("leasehold: budget: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["status", "llm-api", "--worker", "a/b"], ["explain", "llm-api", "a/b"], ["ledger", "--holder", "a/b"]],
)
def test_holder_name_that_is_none_is_refused_without_a_server(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["budget", *arguments, "--addr", NOWHERE]) == main.EXIT_FAILED
    assert "'a/b' is not a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["node", "status", "../etc"], "node"),
        (["node", "drain", "A"], "node"),
        (["node", "delete", "n" * 64], "node"),
        (["node", "explain", "r620-1", "--pool", "a/b"], "pool"),
        (["workers", "list", "--node", "a b"], "node"),
        (["workers", "scale", "4", "--pool", "../x"], "pool"),
        (["workers", "start", "--pool", "A"], "pool"),
        (["workers", "stop", "../../x"], "worker"),
        (["workers", "stop", "x"], "worker"),
        (["workers", "logs", "../x_1@r620-1"], "worker"),
        (["workers", "logs", "a_1@r620-1", "--node", "*"], "node"),
    ],
    ids=str,
)
def test_node_pool_or_worker_name_that_is_none_is_refused_without_a_server(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*arguments, "--addr", NOWHERE]) == main.EXIT_FAILED

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"leasehold: {field}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("budgets", "field"),
    [
        ("", "budgets"),
        ("budgets: [", "budgets"),
        ("budgets: [{name: a, dimension: {rpm_limit: 1}}]", "budgets[0].dimension"),
        ("budgets: [{name: a, dimensions: {rpm_limit: -1}}]", "budgets[0].dimensions.rpm_limit"),
        ("budgets: [{name: a, dimensions: {rpm_limit: .nan}}]", "budgets[0].dimensions.rpm_limit"),
        ("budgets: [{name: a/b, dimensions: {rpm_limit: 1}}]", "budgets[0].name"),
        (f"budgets: [{{name: {'a' * 300}, dimensions: {{rpm_limit: 1}}}}]", "budgets[0].name"),
        (
            "budgets: [{name: a, dimensions: {rpm_limit: 1}, ttl_seconds: 2, refresh_seconds: 3}]",
            "budgets[0].refresh_seconds",
        ),
        ("budgets: [{name: a, dimensions: {rpm_limit: 1, rpm_limit: 2}}]", "rpm_limit"),
        ("budgets: [{name: 2020-13-45, dimensions: {rpm_limit: 1}}]", "budgets"),
        (f"budgets: [{{name: a, dimensions: {{rpm_limit: {'9' * 5000}}}}}]", "budgets"),
        ("budgets: " + "[" * 1000, "budgets"),
    ],
)
def test_budgets_file_that_is_wrong_is_refused_whole_and_without_a_server(
    tmp_path: pathlib.Path, budgets: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budgets.yaml"
    file.write_text(budgets)

    assert main.run(["budget", "apply", "-f", str(file), "--addr", NOWHERE]) == main.EXIT_FAILED

    out, err = capsys.readouterr()
    assert out == ""
    assert field in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("address", ["localhost", "host:port", "127.0.0.1:99999", ",", " "])
def test_address_that_is_none_is_refused_by_the_name_of_its_setting(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run(["budget", "list", "--addr", address]) == main.EXIT_FAILED
    assert "--addr" in capsys.readouterr().err
    if address.strip():
        monkeypatch.setenv("LEASEHOLD_ADDR", address)
        assert main.run(["budget", "list"]) == main.EXIT_FAILED
        assert "LEASEHOLD_ADDR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["budget", "list"],
        ["budget", "watch", "llm-api"],
        ["budget", "status", "llm-api", "-o", "json"],
        ["node", "list"],
        ["node", "status", "r620-1"],
        ["node", "explain"],
        ["node", "drain", "r620-1"],
        ["workers", "list", "-o", "json"],
        ["workers", "scale", "4"],
        ["workers", "stop"],
        ["workers", "logs", "a_1@r620-1"],
    ],
    ids=str,
)
def test_an_allocator_that_is_away_is_exit_code_3_and_no_data(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = main.run([*arguments, "--addr", NOWHERE, "--timeout", "0.2"])

    out, err = capsys.readouterr()
    assert ran == main.EXIT_UNREACHABLE
    assert out == ""
    assert NOWHERE in err
    assert "LEASEHOLD_ADDR" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LEASEHOLD_COMPLETE", f"source_{shell}")

    assert main.run([]) == 0
    assert f"_LEASEHOLD_COMPLETE=complete_{shell}" in capsys.readouterr().out


def completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("_LEASEHOLD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert main.run([]) == 0
    return capsys.readouterr().out.split()


def test_commands_and_options_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed("leasehold budget st", monkeypatch, capsys) == ["status"]
    assert "--allocators" in completed("leasehold up --", monkeypatch, capsys)


def test_budget_names_complete_to_nothing_where_no_allocator_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "COMPLETION_SECONDS", 0.1)
    monkeypatch.setenv("LEASEHOLD_ADDR", NOWHERE)

    assert completed("leasehold budget status l", monkeypatch, capsys) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["version"], ["budget", "plan", "--help"], ["workers", "scale", "-h"]]
)
def test_what_needs_no_server_starts_quickly_for_it_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from leasehold.cli import main; main.run(sys.argv[1:]); "
        "heavy = {'grpc', 'google.protobuf', 'yaml', 'psycopg', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=30
    )

    assert ran.returncode == 0, ran.stderr
