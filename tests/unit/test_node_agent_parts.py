"""Small parts of the agent: its words to systemd, its log, what it keeps, how it ends."""

import io
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.nodeagent import activity, log_writer, main, node_record, records, service_manager, state
from leasehold.runtime import agent_paths

# systemd


def heard(address: str) -> tuple[socket.socket, dict[str, str]]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind("\0" + address[1:] if address.startswith("@") else address)
    listener.settimeout(5.0)
    return listener, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_of_each_step(tmp_path: Path, is_abstract: bool) -> None:
    address = f"@leasehold-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    listener, environment = heard(address)
    with listener:
        manager = service_manager.ServiceManager(environment)
        manager.ready("2 workers adopted")
        manager.alive()
        manager.reloading()
        manager.stopping("at most 30 s")
        told = [listener.recv(4096).decode() for _ in range(4)]

    assert told[0] == f"READY=1\nSTATUS=2 workers adopted\nMAINPID={os.getpid()}"
    assert told[1] == "WATCHDOG=1"
    assert told[2].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert told[3] == "STOPPING=1\nSTATUS=at most 30 s"
    assert manager.watchdog_seconds == 30.0


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}],
)
def test_where_systemd_does_not_ask_nothing_is_told(environment: dict[str, str]) -> None:
    manager = service_manager.ServiceManager(environment)
    manager.ready("x")
    manager.alive()

    assert manager.watchdog_seconds is None


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    service_manager.ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")


# Logs


class StalledStream(io.StringIO):
    """Takes one write, and the next ones only when told."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stuck = threading.Event()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.is_stuck.set()
        assert self.go.wait(10.0)
        return super().write(text)


def test_a_reader_that_stalls_delays_nobody_and_what_was_lost_is_told() -> None:
    stream = StalledStream()
    writer = log_writer.LogWriter(stream, lines_max=3)
    writer.write("first\n")
    assert stream.is_stuck.wait(10.0)
    for number in range(5):
        writer.write(f"line {number}\n")
    stream.go.set()
    writer.close(10.0)

    told = stream.getvalue()
    assert (
        told
        == "first\nline 0\nline 1\nline 2\n2 lines of the log were lost: they could not be written in time\n"
    )


def test_a_disk_that_is_full_loses_lines_and_not_the_agent() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    writer = log_writer.LogWriter(Full())
    assert writer.write("x\n") == 2
    writer.close(10.0)
    assert not writer.isatty()


# What is kept


class FullFolder(state.StateFolder):
    """A folder on a disk that is full until it is told otherwise."""

    is_full = True

    def write(self, name: str, record: Any, kind: Any = None) -> None:
        if self.is_full:
            raise errors.ResourceExhausted("the disk is full")
        super().write(name, record, kind)


def opened(folder: state.StateFolder) -> state.StateFolder:
    folder.open()
    return folder


def test_each_agent_is_another_incarnation_of_one_node(tmp_path: Path) -> None:
    folder = opened(state.StateFolder(tmp_path / "s"))
    first, second = node_record.NodeRecord(folder), node_record.NodeRecord(folder)
    first.begin()
    first.check_epoch(epochs.Epoch(1, 5, 9))
    second.begin()
    folder.close()

    assert (second.node_id, second.incarnation) == (first.node_id, 2)
    assert second.epoch == epochs.Epoch(1, 5, 9)
    with pytest.raises(errors.StaleEpoch) as raised:
        second.check_epoch(epochs.Epoch(1, 4, 9))
    assert raised.value.metadata["highest_epoch"] == epochs.Epoch(1, 5, 9).encode()
    second.check_epoch(epochs.Epoch(2, 1, 9))
    assert second.epoch == epochs.Epoch(2, 1, 9)


def test_on_a_full_disk_it_goes_on_says_so_and_writes_when_it_can(tmp_path: Path) -> None:
    folder = FullFolder(tmp_path / "s")
    folder.open()
    record = node_record.NodeRecord(folder)
    record.begin()
    assert (record.incarnation, record.problem) == (1, "the disk is full")
    with pytest.raises(errors.StaleEpoch):
        record.check_epoch(epochs.Epoch(1, 5, 9))
        record.check_epoch(epochs.Epoch(1, 4, 9))

    folder.is_full = False
    record.retry()
    folder.close()

    assert record.problem == ""
    assert folder.read("node") == {
        "node_id": record.node_id,
        "incarnation": 1,
        "epoch": epochs.Epoch(1, 5, 9).encode(),
    }


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"node_id": "x"},
        {"node_id": "x", "incarnation": "many"},
        {"node_id": "x", "incarnation": float("inf")},
    ],
)
def test_a_record_that_makes_no_sense_begins_another_node(tmp_path: Path, record: dict[str, Any]) -> None:
    folder = opened(state.StateFolder(tmp_path / "s"))
    folder.write("node", record)
    found = node_record.NodeRecord(folder)
    found.begin()
    folder.close()

    assert (len(found.node_id), found.incarnation, found.epoch) == (36, 1, None)


# Where it listens


def test_the_sockets_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    main.prepare_socket(tmp_path / "run" / "agent.sock")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700

    (tmp_path / "run").chmod(0o755)
    with pytest.raises(errors.FailedPrecondition, match=f"chmod 700 {tmp_path}/run"):
        main.prepare_socket(tmp_path / "run" / "agent.sock")


def test_a_path_too_long_for_a_socket_gets_a_short_one_that_is_always_the_same(tmp_path: Path) -> None:
    short = agent_paths.default_socket(Path("/var/lib/x"))
    deep = Path("/", *["folder"] * 30)

    assert short == Path("/var/lib/x/agent.sock")
    assert len(os.fsencode(agent_paths.default_socket(deep))) <= 107
    assert agent_paths.default_socket(deep) == agent_paths.default_socket(deep)
    assert agent_paths.default_socket(deep) != agent_paths.default_socket(deep / "x")


def test_where_the_state_is_follows_flags_then_the_environment_then_the_user() -> None:
    assert agent_paths.state_dir("/a", {"LEASEHOLD_STATE_DIR": "/b"}) == Path("/a")
    assert agent_paths.state_dir(None, {"LEASEHOLD_STATE_DIR": "/b"}) == Path("/b")
    assert agent_paths.socket_path(None, "/a", {}) == Path("/a/agent.sock")
    assert agent_paths.socket_path("unix:/s", "/a", {}) == Path("/s")


# What others wrote


@pytest.mark.parametrize(
    "text", ['{"version": 1, "pid": Infinity, "start_time_ticks": 1, "tasks": []}', "[" * 200_000]
)
def test_what_a_worker_writes_of_itself_never_ends_the_agent(tmp_path: Path, text: str) -> None:
    (tmp_path / "activity.1.json").write_text(text)

    assert activity.RunFolder(tmp_path).activity().is_busy is None


def test_a_record_that_is_nested_without_end_is_damaged() -> None:
    with pytest.raises(records.Damaged):
        records.Format("intent", 1).decode(b"[" * 200_000)
