"""Workers under shims, for real: how they end is told truly and at once, and nothing of them stays."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import process_scene
import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause, SignalScope
from leasehold.nodeagent import kernel_counts, members, watching, worker_values
from leasehold.runtime import identity as identities
from process_scene import SLEEP, STUBBORN, Host, is_alive, proc_text, python, until


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path / "state")
    yield host
    host.leave()
    process_scene.end_everything(tmp_path)


async def test_exit_codes_and_signals_are_told_as_they_were(host: Host) -> None:
    clean, failed = await asyncio.gather(
        host.run(1, ("true",)), host.run(2, ("sh", "-c", "echo bad >&2; exit 7"))
    )
    assert (clean.cause, clean.exit_code, clean.signal) == (ExitCause.CLEAN, 0, 0)
    assert (failed.cause, failed.exit_code, failed.detail) == (ExitCause.CRASHED, 7, "exit code 7")
    assert host.log(2) == "bad\n"

    by_signal = await host.run(3, ("sh", "-c", "kill -SEGV $$"))

    assert (by_signal.cause, by_signal.exit_code, by_signal.signal) == (ExitCause.CRASHED, None, 11)
    assert by_signal.detail == "ended by SIGSEGV"


async def test_a_command_that_cannot_be_executed_is_told_with_the_reason(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("not executable")
    missing, forbidden, folder = await asyncio.gather(
        host.run(1, ("/nowhere/celery",)),
        host.run(2, (str(program),)),
        host.run(3, ("true",), cwd=Path("/nowhere")),
    )

    assert {missing.cause, forbidden.cause, folder.cause} == {ExitCause.NOT_STARTED}
    assert missing.detail == "the program cannot be executed: No such file or directory"
    assert forbidden.detail == "the program cannot be executed: Permission denied"
    assert folder.detail == "its working folder cannot be entered: No such file or directory"
    assert host.started == {}


async def test_a_worker_has_its_own_session_its_names_and_no_protection_from_the_oom_killer(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    main, shim = host.main(worker_id), host.shim(worker_id)
    stat, shim_stat = members.stat_of(main.pid), members.stat_of(shim.pid)
    assert stat is not None and shim_stat is not None

    assert (stat.session, stat.group, stat.parent) == (main.pid, main.pid, shim.pid)
    assert shim_stat.session == shim.pid
    environment = members.environment(main.pid)
    assert environment.pop("LEASEHOLD_RUN_DIR") == str(host.worker_folder(worker_id) / "run")
    assert environment == {
        "PATH": os.environ["PATH"],
        "LEASEHOLD_WORKER_ID": worker_id,
        "LEASEHOLD_WORKER_NAME": "pool_1@test-host",
        "LEASEHOLD_POOL": "pool",
        "LEASEHOLD_NODE": "test-host",
        "WORKER_ID": "pool_1@test-host",
    }
    assert proc_text(main, "oom_score_adj") == "0\n"
    assert members.holds(main.pid, host.worker_folder(worker_id) / "lock")


async def test_a_worker_gets_only_its_log_and_its_lock_and_every_signal_works(host: Host) -> None:
    """Descriptors and ignored signals of agent and shim do not leak into it."""
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        worker_id = await host.start(1, SLEEP)
    finally:
        os.close(leak)
    main = host.main(worker_id)
    status = dict(line.split(":\t", 1) for line in proc_text(main, "status").splitlines() if ":\t" in line)

    assert sorted(int(name) for name in os.listdir(f"/proc/{main.pid}/fd")) == [0, 1, 2, 3]
    assert int(status["SigBlk"], 16) == 0
    # 32 and 33 are the C library's own.
    assert int(status["SigIgn"], 16) & ~(0b11 << 31) == 0


async def test_the_environment_is_not_written_to_disk(host: Host) -> None:
    secret = "amqp-password-7391"
    await host.start(1, SLEEP, env={"PATH": os.environ["PATH"], "BROKER_URL": secret})
    files = [path for path in host.path.rglob("*") if path.is_file()]

    assert files
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


async def test_a_shim_is_small(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    status = proc_text(host.shim(worker_id), "status")
    rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    assert rss_kib < 11 * 1024


async def test_a_shim_is_not_ended_by_signals_that_a_terminal_or_an_operator_sends(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        members.send(host.shim(worker_id), number)
    members.send(host.main(worker_id), signal.SIGTERM)

    assert (await host.end_of(worker_id)).signal == signal.SIGTERM


async def test_a_shim_that_has_just_begun_hears_no_signal_either(host: Host) -> None:
    for number in range(1, 6):
        spec = process_scene.start_spec(number, SLEEP)
        host.processes.start(spec)
        # Its worker's process looks the same for a moment; the shim is the first.
        pid = await until(
            lambda: min(filter(members.is_shim, process_scene.pids_below(host.path)), default=0),
            "its shim is there",
        )
        shim = identities.identify(pid)
        for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            members.send(shim, ignored)
        await until(lambda: spec.worker_id in host.started, f"it starts: {host.ended}")  # noqa: B023
        host.processes.kill_all(spec.worker_id)
        await host.end_of(spec.worker_id)
        await until(lambda: process_scene.pids_below(host.path) == [], "it is gone")


async def test_a_signal_to_an_old_identity_reaches_nobody(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    main = host.main(worker_id)
    earlier = dataclasses.replace(main, start_time_ticks=main.start_time_ticks - 1)

    assert not members.send(earlier, signal.SIGKILL)
    assert is_alive(main)


@pytest.mark.alone
async def test_the_death_of_a_worker_is_seen_within_a_tenth_of_a_second(host: Host) -> None:
    delays = []
    for number in range(1, 6):
        worker_id = await host.start(number, SLEEP)
        killed_at = time.monotonic()
        members.send(host.main(worker_id), signal.SIGKILL)
        worker_exit = await host.end_of(worker_id)
        delays.append(host.ended_at[worker_id] - killed_at)
        assert (worker_exit.cause, worker_exit.signal) == (ExitCause.CRASHED, 9)

    # The machine may be busy with something else for a moment; the usual delay is what counts.
    assert sorted(delays)[len(delays) // 2] < 0.1


async def test_a_stop_contract_ends_a_worker_that_does_not_hear(host: Host) -> None:
    worker_id = await host.start(1, STUBBORN)
    await until(lambda: "ready" in host.log(1), "it ignores TERM")
    assert host.signal(worker_id, "TERM")
    assert not await asyncio.to_thread(lambda: worker_id in host.ended)
    assert host.signal(worker_id, "QUIT")

    assert (await host.end_of(worker_id)).signal == signal.SIGQUIT
    assert not host.signal(worker_id, "TERM")


async def test_a_signal_to_the_group_reaches_the_children_and_one_to_the_main_process_does_not(
    host: Host,
) -> None:
    family = (
        "sh",
        "-c",
        "trap 'echo main' USR1; (trap 'echo child' USR1; echo up; while :; do sleep 0.02; done) & "
        "echo up; while :; do sleep 0.02; done",
    )
    worker_id = await host.start(1, family)
    await until(lambda: host.log(1).count("up") == 2, "both are up")
    host.signal(worker_id, "USR1")
    await until(lambda: "main" in host.log(1), "the main process hears")
    assert "child" not in host.log(1)

    host.signal(worker_id, "USR1", SignalScope.GROUP)

    await until(lambda: "child" in host.log(1), "the child hears")


async def test_killing_all_leaves_nobody_and_the_shim_tells_how_it_ended(host: Host) -> None:
    """A child in the session, and a grandchild that left it."""
    family = ("sh", "-c", "sleep 1000 & setsid sleep 1000 & echo up; wait")
    worker_id = await host.start(1, family)
    await until(lambda: len(process_scene.pids_below(host.path)) == 4, "shim and three processes")
    host.processes.kill_all(worker_id)
    worker_exit = await host.end_of(worker_id)

    assert (worker_exit.cause, worker_exit.signal) == (ExitCause.CRASHED, 9)
    await until(lambda: process_scene.pids_below(host.path) == [], "all are gone")


async def test_what_a_worker_leaves_behind_is_killed_when_its_main_process_ends(host: Host) -> None:
    worker_exit = await host.run(1, ("sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 0"))

    assert worker_exit.cause is ExitCause.CLEAN
    await until(lambda: process_scene.pids_below(host.path) == [], "the rest of its session is gone")


async def test_a_killed_shim_makes_the_end_unknown_and_never_clean(host: Host) -> None:
    worker_id = await host.start(1, ("sh", "-c", "sleep 1000 & read line </dev/zero; exit 0"))
    members.send(host.shim(worker_id), signal.SIGKILL)
    await until(
        lambda: (status := host.processes.status(worker_id)) and status.shim is None, "its shim is gone"
    )
    assert is_alive(host.main(worker_id))
    assert host.signal(worker_id, "TERM")
    worker_exit = await host.end_of(worker_id)

    assert (worker_exit.cause, worker_exit.exit_code, worker_exit.signal) == (ExitCause.UNKNOWN, None, 0)
    await until(lambda: process_scene.pids_below(host.path) == [], "its session is swept without the shim")


async def test_a_stranger_that_was_given_the_old_pid_while_the_agent_was_frozen_is_left_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leads a session of the worker's number, and is older than the moment when the agent sees the death."""
    worker_id = await host.start(1, SLEEP)
    main, shim = host.main(worker_id), host.shim(worker_id)
    host.processes.held_bytes(worker_id)
    # From here on to its end the loop stands still, as that of a frozen agent does.
    members.send(shim, signal.SIGKILL)
    members.send(main, signal.SIGKILL)
    spin(lambda: identities.start_time_ticks(main.pid) != main.start_time_ticks, "its PID is free")
    with subprocess.Popen(SLEEP) as stranger:  # noqa: ASYNC220  the loop is to stand still
        stat = members.stat_of(stranger.pid)
        assert stat is not None
        disguised = dataclasses.replace(stat, session=main.pid)
        spin(lambda: kernel_counts.ticks_now() > stat.start_time_ticks, "it is older than what follows")
        monkeypatch.setattr(members, "all_stats", lambda: [disguised])

        await host.end_of(worker_id)
        host.leave()  # what was begun is finished
        is_left = stranger.poll() is None
        stranger.kill()
    assert is_left


def spin(condition: Callable[[], bool], what: str) -> None:
    """Until it is so, without letting the loop run."""
    deadline = time.monotonic() + process_scene.DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what


async def test_a_frozen_shim_is_thawed_when_its_worker_dies(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    members.send(host.shim(worker_id), signal.SIGSTOP)
    members.send(host.main(worker_id), signal.SIGTERM)

    assert (await host.end_of(worker_id, seconds=4.0)).signal == signal.SIGTERM


async def test_a_shim_that_cannot_be_thawed_is_killed_in_the_end_and_the_exit_is_unknown(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_id = await host.start(1, SLEEP)
    shim, main = host.shim(worker_id), host.main(worker_id)
    send = members.send

    def send_but_no_thaw(process: identities.ProcessIdentity, number: int) -> bool:
        return number == signal.SIGCONT or send(process, number)

    send(shim, signal.SIGSTOP)
    monkeypatch.setattr(members, "send", send_but_no_thaw)
    monkeypatch.setattr(watching, "SHIM_DEADLINE_SECONDS", 0.3)
    send(main, signal.SIGTERM)

    assert (await host.end_of(worker_id)).cause is ExitCause.UNKNOWN
    assert not is_alive(shim)


async def test_a_frozen_worker_is_ended_by_the_kill(host: Host) -> None:
    worker_id = await host.start(1, SLEEP)
    members.send(host.main(worker_id), signal.SIGSTOP)
    host.signal(worker_id, "TERM")
    host.processes.kill_all(worker_id)

    assert (await host.end_of(worker_id)).signal in (signal.SIGKILL, signal.SIGTERM)


async def test_a_worker_that_is_killed_before_it_has_started_never_runs(host: Host, tmp_path: Path) -> None:
    spec = process_scene.start_spec(1, ("sh", "-c", f"sleep 0.05; touch {tmp_path}/ran; sleep 1000"))
    host.processes.start(spec)
    host.processes.kill_all(spec.worker_id)
    worker_exit = await host.end_of(spec.worker_id)

    assert worker_exit.exit_code is None
    await until(lambda: process_scene.pids_below(host.path) == [], "nothing runs")
    assert not (tmp_path / "ran").exists()


async def test_a_name_that_lives_is_not_started_twice(host: Host) -> None:
    await host.start(1, SLEEP)
    with pytest.raises(errors.AlreadyExists, match="pool_1@test-host still lives"):
        host.processes.start(process_scene.start_spec(1, SLEEP))

    assert len(process_scene.pids_below(host.path)) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "../../etc/passwd"}, "name"),
        ({"worker_id": "../x"}, "worker_id"),
        ({"argv": ()}, "argv"),
        ({"argv": ("a\0b",)}, "argv"),
    ],
)
async def test_what_cannot_be_a_worker_is_refused_with_its_field(
    host: Host, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        host.processes.start(process_scene.start_spec(1, **{"argv": SLEEP, **changes}))  # type: ignore[arg-type]

    assert caught.value.field == field
    assert list(host.folder.workers.iterdir()) == []


async def test_a_worker_tells_what_it_does_in_its_run_folder(host: Host) -> None:
    code = """
import json, os, time
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
told = {"version": 1, "pid": os.getpid(), "start_time_ticks": int(stat[19]), "is_ready": True,
        "tasks": [{"id": "task-1", "name": "work", "queue": "q", "since": 1.0}]}
path = os.environ["LEASEHOLD_RUN_DIR"] + f"/activity.{os.getpid()}.json"
open(path + ".tmp", "w").write(json.dumps(told))
os.rename(path + ".tmp", path)
time.sleep(1000)
"""
    worker_id = await host.start(1, (sys.executable, "-I", "-c", code))
    activity = await until(
        lambda: (told := host.processes.activity(worker_id)).is_busy is not None and told, "it tells"
    )

    assert activity == worker_values.Activity(True, "task-1", "work", True)
    members.send(host.main(worker_id), signal.SIGKILL)
    await host.end_of(worker_id)
    assert host.processes.activity(worker_id) == worker_values.UNKNOWN_ACTIVITY


async def test_memory_is_told_by_the_resident_set_and_near_the_limit_by_the_share(host: Host) -> None:
    """A child shares 32 MiB with its parent: the sum counts them twice, the share once."""
    code = """
import os, time
data = bytearray(b"1") * (32 << 20)
os.fork()
print("up", flush=True)
time.sleep(99)
"""
    far = await host.start(1, python(code), limit_bytes=model.GIB)
    near = await host.start(2, python(code), limit_bytes=80 * model.MIB)
    await until(lambda: host.log(1).count("up") == host.log(2).count("up") == 2, "both have children")
    by_sum, by_share = host.processes.held_bytes(far), host.processes.held_bytes(near)

    assert by_sum.source is worker_values.HeldSource.RSS
    assert 64 * model.MIB < by_sum.bytes < 90 * model.MIB
    assert by_share.source is worker_values.HeldSource.PSS
    assert 32 * model.MIB < by_share.bytes < 50 * model.MIB
