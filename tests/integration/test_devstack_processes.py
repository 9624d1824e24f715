"""Child processes for real: recorded before they run, ended by identity, never a stranger with an old PID."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from leasehold import devstack
from leasehold.core import errors
from leasehold.devstack import identity, ports, process, records

SLEEP = ["sleep", "1000"]
# It answers SIGTERM by going on.
STUBBORN = ["sh", "-c", "trap '' TERM; echo armed; while :; do sleep 0.05; done"]
# A parent with a child, both of which say who they are.
FAMILY = ["sh", "-c", "echo $$; sleep 1000 & echo $!; wait"]

StartChild = Callable[[list[str]], process.Child]


@pytest.fixture
def start_child(tmp_path: Path) -> Iterator[StartChild]:
    """Start a child that is recorded in tmp_path and killed at the end."""
    children: list[process.Child] = []

    def start(command: list[str]) -> process.Child:
        name = f"child{len(children)}"
        child = process.Child(name, command, log_path=tmp_path / f"{name}.log", book=records.Records(tmp_path))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.stop(grace_seconds=0)


def log_lines(child: process.Child, count: int) -> list[str]:
    """Wait until the child has written so many lines."""
    child.wait_until(
        lambda: child.log_path.read_text().count("\n") >= count, timeout_seconds=10, cancel=threading.Event()
    )
    return child.log_path.read_text().split()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def present(pid: int) -> identity.Identity:
    found = identity.of(pid)
    assert found is not None
    return found


def test_a_child_is_recorded_and_forgotten_when_it_is_stopped(tmp_path: Path, start_child: StartChild) -> None:
    child = start_child(SLEEP)
    (record,) = records.Records(tmp_path).read()

    assert record == records.Record("child0", present(child.pid), tuple(SLEEP), signal.SIGTERM)

    child.stop(grace_seconds=10)

    assert child.exit_code == -signal.SIGTERM
    assert records.Records(tmp_path).read() == []


def test_nothing_runs_that_could_not_be_recorded(tmp_path: Path) -> None:
    (tmp_path / records.FILE_NAME).write_text("damaged")
    child = process.Child(
        "touch", ["touch", str(tmp_path / "ran")], log_path=tmp_path / "log", book=records.Records(tmp_path)
    )

    with pytest.raises(errors.FailedPrecondition, match="damaged"):
        child.start()
    assert not child.is_running
    assert not (tmp_path / "ran").exists()


def test_a_child_whose_owner_dies_before_the_record_never_runs(tmp_path: Path) -> None:
    """The owner kills itself at the worst instant: forked, not yet recorded."""
    script = f"""
import os, pathlib, signal
from leasehold.devstack import process, records

class KilledWhileRecording(records.Records):
    def add(self, record):
        print(record.identity.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

folder = pathlib.Path({str(tmp_path)!r})
command = ["sh", "-c", "echo ran; exec sleep 1000"]
process.Child("child", command, log_path=folder / "log", book=KilledWhileRecording(folder)).start()
"""
    owner = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30
    )
    child = identity.of(int(owner.stdout))

    assert owner.returncode == -signal.SIGKILL
    assert child is None or identity.wait(child, timeout_seconds=10)
    assert (tmp_path / "log").read_text() == ""


def test_a_child_that_does_not_stop_is_killed_when_its_grace_is_over(start_child: StartChild) -> None:
    child = start_child(STUBBORN)
    assert log_lines(child, 1) == ["armed"]

    child.stop(grace_seconds=0.2)

    assert child.exit_code == -signal.SIGKILL


def test_stopping_leaves_no_descendant(start_child: StartChild) -> None:
    """The parent ends at SIGTERM and does not tell its child."""
    child = start_child(FAMILY)
    family = [present(int(pid)) for pid in log_lines(child, 2)]

    child.stop(grace_seconds=10)

    assert child.exit_code == -signal.SIGTERM
    assert [identity.is_alive(member) for member in family] == [False, False]


def test_killing_takes_the_descendants_too(start_child: StartChild) -> None:
    child = start_child(FAMILY)
    family = [present(int(pid)) for pid in log_lines(child, 2)]

    child.kill()

    assert [identity.is_alive(member) for member in family] == [False, False]


def test_a_frozen_family_stands_still_and_goes_on_when_thawed(start_child: StartChild) -> None:
    child = start_child(FAMILY)
    pids = [int(pid) for pid in log_lines(child, 2)]

    child.freeze()
    frozen = [state_of(pid) for pid in pids]
    child.thaw()

    assert frozen == ["T", "T"]
    assert "T" not in [state_of(pid) for pid in pids]


def test_a_frozen_child_is_stopped_in_order(start_child: StartChild) -> None:
    child = start_child(SLEEP)
    child.freeze()

    child.stop(grace_seconds=10)

    assert child.exit_code == -signal.SIGTERM


def test_a_child_outlives_the_thread_that_started_it(start_child: StartChild) -> None:
    """PR_SET_PDEATHSIG fires when the forking thread ends; that must not be a caller's."""
    script = "trap 'echo answered' USR1; echo up; while :; do sleep 0.05; done"
    started: list[process.Child] = []

    def start_and_wait() -> None:
        started.append(start_child(["sh", "-c", script]))
        log_lines(started[0], 1)  # the setting is made before the script runs

    thread = threading.Thread(target=start_and_wait)
    thread.start()
    thread.join()
    # join() returns a little before the kernel is done with the thread.
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        os.sched_yield()
    identity.send(present(started[0].pid), signal.SIGUSR1)

    assert log_lines(started[0], 2) == ["up", "answered"]


def test_a_child_has_a_session_of_its_own_so_a_terminals_interrupt_passes_it_by(
    start_child: StartChild,
) -> None:
    child = start_child(SLEEP)

    assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_a_child_that_ends_at_once_is_told_with_the_end_of_its_log(start_child: StartChild) -> None:
    child = start_child(["sh", "-c", "echo port is taken >&2; exit 3"])

    with pytest.raises(errors.Unavailable, match=r"ended with code 3.*\n.*port is taken"):
        child.wait_until(lambda: False, timeout_seconds=10, cancel=threading.Event())


def test_a_child_is_not_taken_for_ready_because_a_stranger_answers_on_its_port(start_child: StartChild) -> None:
    port = ports.free_port()

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((ports.HOST, port)):
            return True
        return False

    with socket.create_server((ports.HOST, port)):
        child = start_child([sys.executable, "-m", "http.server", "--bind", ports.HOST, str(port)])
        with pytest.raises(errors.Unavailable, match=r"ended with code 1(.*\n)*.*in use"):
            child.wait_until(answers, timeout_seconds=10, cancel=threading.Event(), port=port)

    child.start()
    child.wait_until(answers, timeout_seconds=10, cancel=threading.Event(), port=port)


def test_a_child_can_be_started_again_after_it_was_killed_from_outside(
    tmp_path: Path, start_child: StartChild
) -> None:
    child = start_child(SLEEP)
    first = present(child.pid)
    identity.kill(first)
    assert child.exit_code == -signal.SIGKILL

    child.start()

    (record,) = records.Records(tmp_path).read()
    assert record.identity == present(child.pid) != first


def test_leftovers_are_ended_by_identity_and_a_reused_pid_is_not_signalled(tmp_path: Path) -> None:
    """Two live processes of ours; the list knows one, and has the other's PID from an earlier holder of it."""
    with subprocess.Popen(SLEEP) as leftover, subprocess.Popen(SLEEP) as stranger:
        try:
            records.record_process(tmp_path, "allocator", leftover.pid)
            book = records.Records(tmp_path)
            earlier = dataclasses.replace(
                present(stranger.pid), start_time_ticks=present(stranger.pid).start_time_ticks - 1
            )
            book.add(records.Record("etcd", earlier, ("etcd",)))
            said: list[str] = []

            ended = devstack.end_leftovers(tmp_path, announce=said.append)

            assert leftover.wait(timeout=10) == -signal.SIGTERM
            assert stranger.poll() is None
            assert [record.name for record in ended] == ["allocator"]
            assert said == [f"ended allocator, PID {leftover.pid}, left by an earlier run"]
            assert book.read() == []
        finally:
            leftover.kill()
            stranger.kill()


def test_a_folder_is_waited_for_while_a_dying_owners_child_still_has_its_lock(tmp_path: Path) -> None:
    """Between fork and exec a child has a copy of the lock; here one keeps it a moment longer."""
    with (tmp_path / "owner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(["sleep", "0.2"], pass_fds=[lock.fileno()])

    with child, devstack.Owner(tmp_path):
        assert child.wait(timeout=0) == 0


def test_a_folder_whose_lock_stays_with_a_nameless_process_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "owner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(errors.FailedPrecondition, match=r"already running on .*: a process holds its lock"):
            devstack.Owner(tmp_path).acquire()


def test_a_name_with_parentheses_and_spaces_does_not_hide_the_start_time(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "1000"]) as child:
        try:
            assert 0 <= present(child.pid).start_time_ticks - present(os.getpid()).start_time_ticks < 100_000
        finally:
            child.kill()


def test_a_zombie_does_not_count_as_alive() -> None:
    with subprocess.Popen(SLEEP) as child:
        identified = present(child.pid)
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped

        assert state_of(child.pid) == "Z"
        assert not identity.is_alive(identified)


def test_a_tool_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    cancel = threading.Event()
    script = f"echo $$ >{tmp_path}/pid; sleep 1000 & echo $! >>{tmp_path}/pid; touch {tmp_path}/begun; wait"
    family: list[identity.Identity] = []

    def cancel_when_it_runs() -> None:
        while not (tmp_path / "begun").exists():
            cancel.wait(0.01)
        family.extend(present(int(pid)) for pid in (tmp_path / "pid").read_text().split())
        cancel.set()

    watcher = threading.Thread(target=cancel_when_it_runs)
    watcher.start()
    with pytest.raises(errors.DeadlineExceeded):
        process.run_tool(["sh", "-c", script], timeout_seconds=30, cancel=cancel)
    watcher.join()

    assert [identity.is_alive(member) for member in family] == [False, False]


def test_a_tool_that_takes_too_long_or_fails_is_told_with_its_output() -> None:
    with pytest.raises(errors.Unavailable, match="longer than"):
        process.run_tool(SLEEP, timeout_seconds=0.2, cancel=threading.Event())
    with pytest.raises(errors.Unavailable, match="code 4: no space"):
        process.run_tool(["sh", "-c", "echo no space; exit 4"], timeout_seconds=9, cancel=threading.Event())
    with pytest.raises(errors.Unavailable, match="/nonexistent/tool"):
        process.run_tool(["/nonexistent/tool"], timeout_seconds=9, cancel=threading.Event())
