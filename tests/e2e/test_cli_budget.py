"""`leasehold budget ...` against a running `leasehold up`, with workers that use the client library."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import cli_scene
import pytest
import yaml
from leasehold import client
from leasehold.cli import main

TEAM = "team"
TEAM_YAML = """
budgets:
  - name: team
    expected_workers: 4
    dimensions: {max_concurrent_requests: 40, rpm_limit: 800, tpm_limit: 40000, num_workers: 40}
"""
RICH_YAML = """
budgets:
  - name: {name}
    policy: max_min
    expected_workers: 3
    scaling_enabled: false
    ttl_seconds: 6
    refresh_seconds: 1.5
    max_call_seconds: 90
    orphan_seconds: 0
    max_tokens_per_request: 4000
    charged_at: completion
    holder_classes:
      - {{pattern: "batch-*", weight: 0.5, priority: -1, safe_capacity: {{rpm_limit: 10}}}}
    dimensions:
      rpm_limit: 100
      tpm_limit: {{limit: 9000, window_seconds: 30}}
      images: {{kind: rate, limit: 12.5, window_seconds: 10}}
      gpus: {{kind: slots, limit: 8}}
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cli_scene.Up]:
    with cli_scene.up(tmp_path_factory.mktemp("up")) as running:
        yield running


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(up: cli_scene.Up, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run `budget ...` within this process, which is quicker; exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(["budget", *arguments, "--addr", up.addr])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def team(up: cli_scene.Up) -> Iterator[cli_scene.Up]:
    """The budget `team` with four workers, w1 to w4, of which w2 is active and has everything."""
    assert up.run("budget", "apply", "-f", "-", stdin=TEAM_YAML).returncode == 0
    workers = [client.connect_blocking(up.addr, worker_id=f"w{number}") for number in range(1, 5)]
    try:
        for worker in workers:
            worker.budget(TEAM).update_activity(is_active=worker is workers[1])
        cli_scene.until(lambda: is_whole(status(up)), "w2 has all of it")
        yield up
    finally:
        for worker in workers:
            worker.close()


def status(up: cli_scene.Up, *arguments: str) -> dict[str, Any]:
    ran = up.run("budget", "status", TEAM, "-o", "json", *arguments)
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def is_whole(document: dict[str, Any]) -> bool:
    return bool(document["total_workers"] == 4 and document["current_allocation"]["rpm_limit"] == 800)


def test_one_of_four_active_has_everything_in_exactly_the_keys_that_programs_know(team: cli_scene.Up) -> None:
    assert status(team) == {
        "worker_id": "w2",
        "total_workers": 4,
        "active_workers": 1,
        "active_worker_ids": ["w2"],
        "is_scaling_enabled": True,
        "base_allocation": {
            "max_concurrent_requests": 10,
            "rpm_limit": 200,
            "tpm_limit": 10000,
            "num_workers": 10,
        },
        "current_allocation": {
            "max_concurrent_requests": 40,
            "rpm_limit": 800,
            "tpm_limit": 40000,
            "num_workers": 40,
        },
        "utilization_ratio": {"concurrent": 4.0, "rpm": 4.0, "tpm": 4.0, "workers": 4.0},
    }


def test_an_idle_worker_is_shown_by_its_name_and_an_unknown_one_refused(team: cli_scene.Up) -> None:
    idle = status(team, "--worker", "w4")
    assert idle["worker_id"] == "w4"
    assert idle["current_allocation"]["rpm_limit"] == 0

    unknown = team.run("budget", "status", TEAM, "--worker", "w9")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "w9" in unknown.stderr


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["list"], "team     active_share         4        1          40  800  40000       40"),
        (["get", TEAM], "rpm_limit                rate in 60 s    800       800"),
        (["status", TEAM], "workers  4 registered, 1 active: w2"),
        (["watch", TEAM, "--count=1"], "w2       live   yes             40  800  40000       40"),
        (["explain", TEAM, "w2"], "rpm_limit                  800  "),
        (["ledger", TEAM], "concurrent 40, rpm 800, tpm 40000, workers 40"),
        (["ledger"], "BUDGET"),
    ],
    ids=" ".join,
)
def test_each_reading_has_a_form_for_people_and_three_for_programs(
    team: cli_scene.Up, command: list[str], shown: str, ask: Ask
) -> None:
    def read(form: str) -> str:
        code, out, err = ask(*command, "-o", form)
        assert (code, err) == (0, "")
        return out

    assert shown in read("table")
    assert type(json.loads(read("json"))) in (dict, list)
    assert type(yaml.safe_load(read("yaml"))) in (dict, list)
    assert read("name").split()


def test_a_list_is_in_the_order_of_names(team: cli_scene.Up, ask: Ask) -> None:
    assert ask("list", "-o", "name") == (0, "llm-api\nteam\n", "")


def test_explain_tells_the_numbers_and_what_happened(team: cli_scene.Up, ask: Ask) -> None:
    told = json.loads(ask("explain", TEAM, "w2", "-o", "json")[1])

    by_dimension = {each["dimension"]: each for each in told["dimensions"]}
    assert by_dimension["rpm_limit"]["amount"] == 800
    assert "800" in by_dimension["rpm_limit"]["reason"]
    assert any("joined" in event for event in told["story"])


def test_the_ledger_is_newest_first_bounded_and_of_whom_one_asks(team: cli_scene.Up, ask: Ask) -> None:
    everything = json.loads(ask("ledger", TEAM, "-o", "json")[1])
    ids = [int(entry["id"]) for entry in everything]
    assert ids == sorted(ids, reverse=True)
    assert {entry["holder"] for entry in everything} >= {"w1", "w2", "w3", "w4"}

    one = json.loads(ask("ledger", TEAM, "--holder=w1", "--limit=1", "-o", "json")[1])
    assert [entry["holder"] for entry in one] == ["w1"]


def test_watch_tells_each_change_as_a_line_of_json_until_ctrl_c(team: cli_scene.Up) -> None:
    command = [*cli_scene.LEASEHOLD, "budget", "watch", TEAM, "--addr", team.addr, "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        first = json.loads(watch.stdout.readline())
        with client.connect_blocking(team.addr, worker_id="w5") as newcomer:
            newcomer.budget(TEAM).update_activity(is_active=False)
            joined = next(line for line in watch.stdout if '"w5"' in line)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(cli_scene.PATIENCE_SECONDS) == 130
        assert watch.stderr.read() == ""

    assert [holder["holder"] for holder in first["holders"]] == ["w1", "w2", "w3", "w4"]
    after = json.loads(joined)
    counted = sum(holder["bound"]["rpm_limit"] for holder in after["holders"])
    assert counted + after["pool"]["rpm_limit"] == after["limits_in_force"]["rpm_limit"] == 800


def test_on_a_terminal_a_watch_repaints_its_table_in_place(team: cli_scene.Up) -> None:
    master, slave = pty.openpty()
    command = [*cli_scene.LEASEHOLD, "budget", "watch", TEAM, "--addr", team.addr, "--count=2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=env) as watch:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last process of the terminal has gone
            while part := os.read(master, 4096):
                shown += part
    os.close(master)

    text = shown.decode()
    assert watch.returncode == 0, text
    heading = "HOLDER   STATE  ACTIVE  CONCURRENT  RPM    TPM  WORKERS"
    assert text.count(heading) >= 2
    up_a_line = "\x1b[1A"
    assert up_a_line in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_a_definition_that_was_printed_can_be_applied_again(up: cli_scene.Up, ask: Ask) -> None:
    applied = up.run("budget", "apply", "-f", "-", "-o", "json", stdin=RICH_YAML.format(name="rich"))
    assert json.loads(applied.stdout) == [{"name": "rich", "version": 1}]

    printed = ask("get", "rich", "-o", "yaml")[1]
    again = up.run("budget", "apply", "-f", "-", stdin=printed)

    assert (again.returncode, again.stdout) == (0, "budget rich applied, version 1\n")
    assert ask("get", "rich", "-o", "yaml")[1] == printed
    (budget,) = yaml.safe_load(printed)["budgets"]
    assert (budget["refresh_seconds"], budget["orphan_seconds"], budget["charged_at"]) == (1.5, 0, "completion")
    as_json = json.loads(ask("get", "rich", "-o", "json")[1])
    assert as_json["version"] == 1
    assert as_json["limits_in_force"] == {"rpm_limit": 100, "tpm_limit": 9000, "images": 12.5, "gpus": 8}
    table = ask("get", "rich")[1]
    assert "6 s, renewed every 1.5 s" in table
    assert "at most 90 s, orphaned 0 s, 4000 tokens" in table
    assert "batch-*     0.5        -1  rpm 10" in table
    assert ask("delete", "rich") == (0, "budget rich deleted\n", "")


def test_a_file_with_one_wrong_budget_changes_nothing(up: cli_scene.Up, ask: Ask) -> None:
    before = ask("list", "-o", "json")
    text = RICH_YAML.format(name="good") + "  - {name: bad, dimensions: {rpm_limit: -1}}\n"

    refused = up.run("budget", "apply", "-f", "-", stdin=text)

    assert (refused.returncode, refused.stdout) == (1, "")
    assert "budgets[1].dimensions.rpm_limit" in refused.stderr
    assert ask("list", "-o", "json") == before


@pytest.mark.parametrize(
    "command", [["get"], ["status"], ["watch"], ["delete"], ["explain", "w1"], ["ledger"]], ids=lambda c: c[0]
)
def test_an_unknown_budget_is_told_in_one_line(ask: Ask, command: list[str]) -> None:
    code, out, err = ask(command[0], "nosuch", *command[1:])

    assert (code, out) == (1, "")
    assert re.fullmatch("leasehold: there is no budget (named )?'?nosuch'?\n", err)


def test_a_reader_that_has_enough_is_no_error_and_a_full_disk_is(up: cli_scene.Up) -> None:
    command = [*cli_scene.LEASEHOLD, "budget", "list", "--addr", up.addr]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        left = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
    with open("/dev/full", "w") as full:
        lost = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=30)

    assert (left.returncode, left.stderr) == (0, "")
    assert lost.returncode == 1
    assert lost.stderr == "leasehold: cannot write to standard output: No space left on device\n"


def test_budget_names_complete_at_a_tab(up: cli_scene.Up) -> None:
    words = "leasehold budget status llm"
    env = {"_LEASEHOLD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}

    ran = cli_scene.leasehold(env={**env, "LEASEHOLD_ADDR": up.addr})

    assert (ran.returncode, ran.stdout.split()) == (0, ["llm-api"])


def test_without_budgets_a_list_is_empty_data_and_a_word_for_people(team: cli_scene.Up, ask: Ask) -> None:
    """Runs last: it takes the budgets away. A deleted budget's history stays."""
    for name in ask("list", "-o", "name")[1].split():
        assert ask("delete", name)[0] == 0

    code, out, err = ask("list")
    assert (code, out) == (0, "")
    assert err.startswith("there are no budgets; ")
    assert ask("list", "-o", "json") == (0, "[]\n", "")
    assert ask("list", "-o", "name") == (0, "", "")
    assert "JOINED" in ask("ledger", TEAM)[1]
