"""`leasehold node` and `leasehold workers` against a made-up fleet behind a real gRPC server."""

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import cli_scene
import fake_fleet
import gateway_scene
import pytest
import yaml
from leasehold.api.node.v1 import node_pb2
from leasehold.cli import main
from leasehold.core import errors

Ask = Callable[..., tuple[int, str, str]]


class Scene:
    """A fleet that is served, and commands against it within this process."""

    def __init__(self, fleet: fake_fleet.FakeFleet, addr: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.fleet, self.addr = fleet, addr
        self._capsys = capsys

    def ask(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self._capsys.readouterr()
        code = main.run([*arguments, "--addr", self.addr])
        return code, *self._capsys.readouterr()

    def json(self, *arguments: str) -> Any:
        code, out, err = self.ask(*arguments, "-o", "json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def host(self, name: str) -> fake_fleet.FakeHost:
        return self.fleet.hosts[name]


@pytest.fixture
def one(capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    fleet = gateway_scene.fleet()
    with fake_fleet.serve(fleet) as addr:
        yield Scene(fleet, addr, capsys)


@pytest.fixture
def two(capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    fleet = gateway_scene.two()
    with fake_fleet.serve(fleet) as addr:
        yield Scene(fleet, addr, capsys)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["node", "list"], "r620-1  ready      3/3  64.0 GB  50.0%    32.0 GB        0.5  1 s ago\n"),
        (["node", "status"], "healthy   3 workers: 2 busy, 1 idle\n"),
        (
            ["node", "status", "r620-1"],
            "transcription  auto        3       3        3      1..6      7  auto 3",
        ),
        (["node", "explain"], "transcription on r620-1: 3 running, 3 wanted (auto 3)\n  3: 28 GB / 4 GB\n"),
        (["node", "drain", "r620-1"], "node r620-1 drains\n"),
        (["workers", "list"], "transcription_1@r620-1  running  2001  0.50/4 GB  12 s  transcribe task-1\n"),
        (["workers", "scale", "4"], "transcription on r620-1: 4 running, 4 wanted (manual 4)\n"),
        (["workers", "start"], "transcription on r620-1: 3 running, 3 wanted (auto 3)\n"),
        (["workers", "stop"], "stopping transcription_3@r620-1\n"),
        (["workers", "pause"], "transcription on r620-1: 3 running, 3 wanted (auto 3)\n"),
        (["workers", "resume"], "transcription on r620-1: 3 running, 3 wanted (auto 3)\n"),
    ],
    ids=str,
)
def test_each_command_has_a_form_for_people_and_three_for_programs(
    one: Scene, command: list[str], shown: str
) -> None:
    def read(form: str) -> str:
        code, out, err = one.ask(*command, "-o", form)
        assert (code, err) == (0, "")
        return out

    assert shown in read("table")
    assert type(json.loads(read("json"))) in (dict, list)
    assert yaml.safe_load(read("yaml")) is not None
    assert read("name").splitlines()[0] in ("r620-1", "transcription", "transcription_1@r620-1")


def test_status_for_programs_is_what_the_gateway_tells(one: Scene) -> None:
    document = one.json("node", "status", "r620-1")

    assert document["status"]["memory"]["available_gb"] == 32.0
    assert document["status"]["memory"]["total_bytes"] == 64 * 2**30
    assert document["status"]["pools"][0]["workers"][0]["is_busy"] is True
    assert one.json("node", "status") == [document]
    assert one.json("node", "list") == [document]


def test_memory_above_80_percent_is_warned_of_beside_the_data(two: Scene) -> None:
    for command in (["node", "list"], ["node", "status"], ["node", "status", "r620-2"]):
        code, out, err = two.ask(*command)
        assert code == 0
        assert "warning" not in out
        assert err == "warning: r620-2: memory 58.0/64.0 GB (90.6%) is above 80%\n"


def test_a_lost_node_is_warned_of_and_shown_by_its_last_report(two: Scene) -> None:
    two.fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    _, out, err = two.ask("node", "status", "r620-1")

    assert out.startswith("r620-1: lost, reported 1 s ago; ")
    assert err == "warning: r620-1: has not reported for 1 s; its workers may well run\n"


def test_explain_of_a_node_tells_each_pool_and_of_a_pool_only_that(two: Scene) -> None:
    both = two.json("node", "explain", "r620-2")
    one = two.json("node", "explain", "r620-2", "--pool", "transcription", "-n", "5")

    assert [each["pool"]["name"] for each in both] == ["summarization", "transcription"]
    assert one == both[1:]
    assert one[0]["decisions"][0]["numbers"] == {"available_bytes": 6.0 * 2**30}
    assert one[0]["reasons"] == ["2: 28 GB / 4 GB"]


def test_a_target_by_hand_is_set_held_and_ended(one: Scene) -> None:
    held = one.json("workers", "scale", "2", "--hold", "60")
    auto = one.json("workers", "scale", "--auto")

    assert held["stopping_workers"] == ["transcription_3@r620-1"]
    assert (held["pools"][0]["manual_target"], held["pools"][0]["hold_remaining_seconds"]) == (2, 60.0)
    assert (auto["pools"][0]["mode"], auto["pools"][0]["manual_target"]) == ("auto", None)
    assert len({order.order_id for order in one.host("r620-1").applied}) == 2


def test_sizing_is_paused_and_taken_up_again(one: Scene) -> None:
    paused = one.json("workers", "pause", "--pool", "transcription")
    resumed = one.json("workers", "resume")

    assert (paused["pools"][0]["mode"], resumed["pools"][0]["mode"]) == ("paused", "auto")
    assert [order.monitoring.pool for order in one.host("r620-1").applied] == ["transcription", ""]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["workers", "scale", "7"], "1 to 6 (MIN_WORKERS to MAX_WORKERS)"),
        (["workers", "scale", "0"], "1 to 6"),
        (["workers", "scale", "4", "--pool", "translation"], "there is no pool translation on r620-1"),
        (["workers", "scale", "4", "--node", "r620-9"], "there is no node r620-9; there are r620-1"),
        (["node", "status", "r620-9"], "there is no node r620-9"),
        (["node", "drain", "r620-9"], "there is no node r620-9"),
        (["node", "delete", "r620-1"], "only a node that is lost or gone"),
        (["workers", "stop", "transcription_9"], "there is no worker transcription_9"),
        (["workers", "logs", "transcription_9@r620-1"], "there is no worker transcription_9@r620-1"),
    ],
    ids=" ".join,
)
def test_what_is_refused_is_exit_code_1_in_one_line_and_changes_nothing(
    one: Scene, command: list[str], words: str
) -> None:
    code, out, err = one.ask(*command)

    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1
    assert one.host("r620-1").applied == []


def test_a_target_beyond_memory_is_refused_with_the_numbers(two: Scene) -> None:
    code, out, err = two.ask("workers", "scale", "6", "--node", "r620-2", "--pool", "transcription")

    assert (code, out) == (1, "")
    assert err == "leasehold: 6 workers need 16 GB more, there are 2 GB\n"


def test_where_there_are_several_the_one_must_be_named(two: Scene) -> None:
    code, _, err = two.ask("workers", "scale", "2")
    assert (code, err) == (1, "leasehold: node: name one of r620-1, r620-2\n")

    code, _, err = two.ask("workers", "scale", "2", "--node", "r620-2")
    assert (code, err) == (1, "leasehold: pool: name one of summarization, transcription\n")

    code, _, err = two.ask("workers", "stop", "transcription_1")
    assert code == 1
    assert "may be transcription_1@r620-1, transcription_1@r620-2" in err


def test_a_node_that_is_not_connected_is_exit_code_3_and_told_at_once(two: Scene) -> None:
    two.fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    code, out, err = two.ask("workers", "scale", "2", "--node", "r620-1", "--timeout", "30")

    assert (code, out) == (3, "")
    assert err == "leasehold: r620-1 is not connected\n"
    assert [method for method, _ in two.fleet.calls].count("OrderNode") == 1


def test_a_node_that_does_not_answer_is_told_in_the_leaders_own_words(one: Scene) -> None:
    one.fleet.failure = errors.DeadlineExceeded(
        "node r620-1 has not answered within 5 s", metadata={"node": "r620-1"}
    )

    code, out, err = one.ask("workers", "scale", "2", "--node", "r620-1")

    assert (code, out) == (1, "")
    assert err == "leasehold: node r620-1 has not answered within 5 s\n"


def test_short_names_do_where_only_one_can_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    hosts = [fake_fleet.FakeHost(name) for name in ("r620-1.example.org", "r620-2.example.org", "r620-2.test")]
    for host in hosts:
        host.add_pool("transcription" if host is hosts[0] else "translation", 1)
    with fake_fleet.serve(fake_fleet.FakeFleet(*hosts)) as addr:
        scene = Scene(fake_fleet.FakeFleet(*hosts), addr, capsys)
        assert scene.json("node", "status", "r620-1")["name"] == "r620-1.example.org"
        stopped = scene.json("workers", "stop", "transcription_1")
        code, _, err = scene.ask("node", "drain", "r620-2")
        within = scene.json("workers", "stop", "translation_1", "--node", "r620-2.test")

    assert stopped["stopping_workers"] == ["transcription_1@r620-1.example.org"]
    assert within["stopping_workers"] == ["translation_1@r620-2.test"]
    assert (code, err) == (1, "leasehold: node: r620-2 may be r620-2.example.org, r620-2.test\n")


def test_drain_and_its_end_and_the_deletion_of_what_is_gone(two: Scene) -> None:
    drained = two.json("node", "drain", "r620-1")
    is_draining = two.host("r620-1").is_draining
    again = two.json("node", "drain", "r620-1", "--cancel")
    two.fleet.states["r620-2"] = node_pb2.NODE_STATE_GONE

    assert (drained["is_draining"], is_draining) == (True, True)
    assert (again["is_draining"], two.host("r620-1").is_draining) == (False, False)
    assert two.ask("node", "delete", "r620-2")[:2] == (0, "node r620-2 deleted\n")
    assert two.ask("node", "list", "-o", "name")[:2] == (0, "r620-1\n")


def test_lists_keep_to_a_node_and_a_pool(two: Scene) -> None:
    assert two.ask("workers", "list", "--node", "r620-2", "--pool", "summarization", "-o", "name")[1] == (
        "summarization_1@r620-2\n"
    )
    assert two.ask("workers", "list", "--pool", "none")[1:] == ("", "there are no workers\n")


def test_the_last_lines_of_a_log_are_printed_as_they_are(one: Scene) -> None:
    one.host("r620-1").logs["transcription_1@r620-1"] = b"one\ntwo\xff\x1b[31m\nthree"

    ran = subprocess.run(
        [*cli_scene.LEASEHOLD, "workers", "logs", "transcription_1", "-n", "2", "--addr", one.addr],
        capture_output=True,
        timeout=cli_scene.PATIENCE_SECONDS,
        check=True,
    )
    assert ran.stdout == b"two\xff\x1b[31m\nthree"


def test_a_log_is_followed_until_its_worker_has_ended(one: Scene) -> None:
    host = one.host("r620-1")
    host.logs["transcription_1@r620-1"] = b"zero\none\n"
    with cli_scene.follow("transcription_1@r620-1", one.addr) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"one\n"
        host.logs["transcription_1@r620-1"] += b"two\nand a half\n"
        assert following.stdout.readline() == b"two\n"
        assert following.stdout.readline() == b"and a half\n"
        host.logs["transcription_1@r620-1"] += b"three\n"
        host._resize(host.pools["transcription"], 0)
        assert following.stdout.read() == b"three\n"
        assert following.wait(cli_scene.PATIENCE_SECONDS) == 0


def test_following_a_log_ends_with_ctrl_c(one: Scene) -> None:
    one.host("r620-1").logs["transcription_1@r620-1"] = b"one\n"
    with cli_scene.follow("transcription_1@r620-1", one.addr) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"one\n"
        following.send_signal(signal.SIGINT)
        assert following.wait(cli_scene.PATIENCE_SECONDS) == main.EXIT_INTERRUPTED


def test_on_a_terminal_a_log_cannot_drive_it(one: Scene) -> None:
    one.host("r620-1").logs["transcription_1@r620-1"] = b"red \x1b[31m\nnext\n"
    controller, terminal = pty.openpty()
    try:
        ran = subprocess.run(
            [*cli_scene.LEASEHOLD, "workers", "logs", "transcription_1", "--addr", one.addr],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            timeout=cli_scene.PATIENCE_SECONDS,
            check=True,
        )
        shown = os.read(controller, 1000)
    finally:
        os.close(controller)
        os.close(terminal)

    assert ran.returncode == 0
    assert shown == b"red \\x1b[31m\r\nnext\r\n"


def completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    monkeypatch.setenv("_LEASEHOLD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert main.run([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("leasehold node status r", ["r620-1", "r620-2"]),
        ("leasehold node drain r620-2", ["r620-2"]),
        ("leasehold workers list --node ", ["r620-1", "r620-2"]),
        ("leasehold workers list --pool s", ["summarization"]),
        ("leasehold workers scale --node r620-1 --pool ", ["transcription"]),
        ("leasehold workers logs transcription_2", ["transcription_2@r620-1", "transcription_2@r620-2"]),
        ("leasehold workers stop --node r620-2 transcription_1", ["transcription_1@r620-2"]),
    ],
)
def test_names_complete(
    two: Scene,
    words: str,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LEASEHOLD_ADDR", two.addr)

    assert completed(words, monkeypatch, capsys) == names


def test_names_complete_to_nothing_where_no_allocator_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEASEHOLD_ADDR", "127.0.0.1:9")

    assert completed("leasehold node status r", monkeypatch, capsys) == []
    assert capsys.readouterr().err == ""


def test_no_nodes_and_no_workers_are_told_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_fleet.serve(fake_fleet.FakeFleet()) as addr:
        scene = Scene(fake_fleet.FakeFleet(), addr, capsys)
        for command in (["node", "list"], ["node", "status"], ["workers", "list"]):
            code, out, err = scene.ask(*command)
            assert (code, out) == (0, "")
            assert err.startswith("there are no ")
        assert scene.json("node", "list") == []
