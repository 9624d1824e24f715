"""The kernel's limit on a worker, for real, by cgroup v1 below this process's own.

Where that cannot be written (a container without its cgroup), the same worker runs without and the limit is
told as not enforced: the agent polls there.
"""

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import process_scene
import pytest
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause
from leasehold.nodeagent import cgroups, members
from leasehold.nodeagent.worker_values import HeldSource, ProcessStatus
from leasehold.runtime import identity as identities
from process_scene import SLEEP, Host, is_alive, python, until

LIMIT = 48 * model.MIB
#: Takes memory at hundreds of MB a second, for ever.
LEAK = python("taken = []\nwhile True: taken.append(bytearray(b'1') * (4 << 20))")
#: Its child does; it goes on itself.
LEAKING_CHILD = python(
    """
import os, time
if os.fork() == 0:
    taken = []
    while True:
        taken.append(bytearray(b"1") * (4 << 20))
os.wait()
print("child gone", flush=True)
time.sleep(1000)
"""
)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made_in = process_scene.own_cgroups()
    host = Host(tmp_path / "state", made_in=made_in)
    yield host
    host.leave()
    process_scene.end_everything(tmp_path, made_in)


def is_limiting(host: Host) -> bool:
    return host.cgroups.kind is cgroups.CgroupKind.V1


async def test_a_leak_ends_only_its_own_worker_and_the_cause_is_named(host: Host) -> None:
    neighbour = await host.start(1, SLEEP, limit_bytes=LIMIT)
    if not is_limiting(host):
        assert not unwrap(host, neighbour).is_limit_enforced
        return
    worker_exit = await host.run(2, LEAK, limit_bytes=LIMIT)

    assert (worker_exit.cause, worker_exit.signal) == (ExitCause.OOM_KILLED, 9)
    assert worker_exit.detail == "out of memory: its limit is 48 MiB, the kernel killed it"
    assert is_alive(host.main(neighbour)) and is_alive(host.shim(neighbour))
    assert unwrap(host, neighbour).is_limit_enforced


async def test_a_leak_is_named_though_no_agent_ran(host: Host, tmp_path: Path) -> None:
    gate = ("sh", "-c", f'while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exec "$@"', "sh", *LEAK)
    worker_id = await host.start(1, gate, limit_bytes=LIMIT)
    if not is_limiting(host):
        assert not unwrap(host, worker_id).is_limit_enforced
        return
    host.leave()
    (tmp_path / "go").touch()
    await until(lambda: process_scene.pids_below(host.path) == [], "it is dead, and its shim has noted it")
    successor = Host(host.path, made_in=host.cgroups)
    successor.leave()

    (adopted,) = successor.adopted
    assert adopted.exit is not None and adopted.exit.cause is ExitCause.OOM_KILLED


async def test_a_child_that_the_kernel_kills_is_counted_and_its_worker_goes_on(host: Host) -> None:
    worker_id = await host.start(1, LEAKING_CHILD, limit_bytes=LIMIT)
    if not is_limiting(host):
        host.processes.kill_all(worker_id)
        return
    await until(lambda: "child gone" in host.log(1), "the child is killed")
    assert await until(lambda: host.processes.oom_kills(worker_id), "the kill is told") == 1
    assert host.processes.oom_kills(worker_id) == 0
    members.send(host.main(worker_id), signal.SIGKILL)

    # A kill by somebody else after it is not the OOM killer's.
    assert (await host.end_of(worker_id)).cause is ExitCause.CRASHED


async def test_held_memory_is_the_cgroups_and_never_page_cache(host: Host, tmp_path: Path) -> None:
    code = f"""
import time
data = bytearray(b"1") * (16 << 20)
with open({str(tmp_path / "file")!r}, "wb") as file:
    file.write(bytes(20 << 20))
print("up", flush=True)
time.sleep(1000)
"""
    worker_id = await host.start(1, python(code), limit_bytes=model.GIB)
    await until(lambda: "up" in host.log(1), "it has taken its memory")
    held = host.processes.held_bytes(worker_id)

    assert held.source is (HeldSource.CGROUP_V1 if is_limiting(host) else HeldSource.RSS)
    assert 16 * model.MIB <= held.bytes < 28 * model.MIB


async def test_a_limit_can_be_changed_while_the_worker_runs_and_is_kept(host: Host) -> None:
    worker_id = await host.start(1, SLEEP, limit_bytes=LIMIT)
    assert host.processes.set_limit(worker_id, 2 * LIMIT) is is_limiting(host)
    path = await asyncio.to_thread(cgroup_of, host, worker_id)

    assert unwrap(host, worker_id).limit_bytes == 2 * LIMIT
    if is_limiting(host):
        assert int((path / "memory.limit_in_bytes").read_text()) == 2 * LIMIT


async def test_the_worker_is_inside_and_its_shim_outside_and_the_cgroup_goes_with_it(host: Host) -> None:
    worker_id = await host.start(1, SLEEP, limit_bytes=LIMIT)
    path = cgroup_of(host, worker_id)
    inside = path.joinpath("cgroup.procs").read_text().split() if is_limiting(host) else []
    assert inside == ([str(host.main(worker_id).pid)] if is_limiting(host) else [])
    host.processes.kill_all(worker_id)
    await host.end_of(worker_id)

    await until(lambda: not path.exists(), "it is removed")


@pytest.mark.parametrize("is_shim_there", [True, False])
async def test_what_left_the_session_is_found_in_the_cgroup(host: Host, is_shim_there: bool) -> None:
    """Its environment is empty, and its session its own; the shim finds it, or without one the agent."""
    run_away = ("sh", "-c", "env -i setsid sleep 999.25 & sleep 1000")
    worker_id = await host.start(1, run_away, limit_bytes=LIMIT)
    (pid,) = await until(
        lambda: [stat.pid for stat in members.all_stats() if command_line(stat.pid) == b"sleep\x00999.25\x00"],
        "it has run away",
    )
    stray = identities.identify(pid)
    try:
        if not is_shim_there:
            members.send(host.shim(worker_id), signal.SIGKILL)
        members.send(host.main(worker_id), signal.SIGKILL)
        await host.end_of(worker_id)

        if is_limiting(host):
            await until(lambda: not is_alive(stray), "it is killed")
    finally:
        members.send(stray, signal.SIGKILL)


async def test_the_cgroup_that_another_agent_has_just_made_is_left_to_it(host: Host, tmp_path: Path) -> None:
    """Nobody is in it until its worker joins, which may be some time after."""
    made = host.cgroups.create(str(uuid.uuid4()), LIMIT)
    other = Host(tmp_path / "other", made_in=host.cgroups)
    other.leave()

    assert made is None or made.path.is_dir()


async def test_the_cgroup_of_a_start_that_its_agent_did_not_finish_is_removed(host: Host) -> None:
    await host.run(1, ("true",))
    (worker_id,) = host.ended
    path = cgroup_of(host, worker_id)
    await until(lambda: not path.exists(), "it is removed")
    host.leave()
    for name in ("shim.json", "exit"):
        (host.worker_folder(worker_id) / name).write_bytes(b"\0" * 4096)
    host.cgroups.create(worker_id, LIMIT)
    successor = Host(host.path, made_in=host.cgroups)

    assert [each.exit.cause for each in successor.adopted if each.exit] == [ExitCause.NOT_STARTED]
    await until(lambda: not path.exists(), "it is removed")
    successor.leave()


async def test_what_the_kernel_killed_just_before_an_ordered_end_is_counted(host: Host) -> None:
    """Nobody could tell it while the worker ran: it is told with the worker's end."""
    worker_id = await host.start(1, LEAKING_CHILD, limit_bytes=LIMIT)
    if not is_limiting(host):
        host.processes.kill_all(worker_id)
        return
    await until(lambda: "child gone" in host.log(1), "the child is killed")
    host.signal(worker_id, "TERM")

    worker_exit = await host.end_of(worker_id)
    assert (worker_exit.cause, worker_exit.oom_kills) == (ExitCause.CRASHED, 1)


@pytest.mark.parametrize("is_told_before", [True, False])
async def test_an_earlier_kill_of_a_child_is_not_taken_for_the_workers_own_by_the_next_agent(
    host: Host, is_told_before: bool
) -> None:
    worker_id = await host.start(1, LEAKING_CHILD, limit_bytes=LIMIT)
    if not is_limiting(host):
        host.processes.kill_all(worker_id)
        return
    await until(lambda: "child gone" in host.log(1), "the child is killed")
    if is_told_before:
        await until(lambda: host.processes.oom_kills(worker_id), "the kill is told")
        host.leave()
        members.send(host.main(worker_id), signal.SIGKILL)
    else:
        host.processes.kill_all(worker_id)
        host.leave()
    await until(lambda: process_scene.pids_below(host.path) == [], "it is dead, and its shim has noted it")
    successor = Host(host.path, made_in=host.cgroups)
    successor.leave()

    (adopted,) = successor.adopted
    assert adopted.exit is not None
    assert (adopted.exit.cause, adopted.exit.oom_kills) == (ExitCause.CRASHED, 0 if is_told_before else 1)


async def test_a_kill_that_no_agent_has_told_is_told_by_the_next(host: Host) -> None:
    worker_id = await host.start(1, LEAKING_CHILD, limit_bytes=LIMIT)
    if not is_limiting(host):
        host.processes.kill_all(worker_id)
        return
    await until(lambda: "child gone" in host.log(1), "the child is killed")
    successor = host.successor()
    try:
        assert await until(lambda: successor.processes.oom_kills(worker_id), "the kill is told") == 1
    finally:
        successor.leave()


def unwrap(host: Host, worker_id: str) -> ProcessStatus:
    status = host.processes.status(worker_id)
    assert status is not None
    return status


def cgroup_of(host: Host, worker_id: str) -> Path:
    if not is_limiting(host):
        return Path("/nowhere")
    return Path(host.cgroups.detail) / f"worker-{worker_id}"


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
