"""Workers outlive their agent, for real: it is killed, and the next takes them over, or learns how they ended.

What a worker did is counted in files that it writes itself and the agent cannot.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import process_scene
import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause, StopContract, StopStep
from leasehold.nodeagent import members, state, worker_folder
from leasehold.runtime import identity as identities
from process_scene import SLEEP, Host, child_agent, identity, is_alive, python, until

MakeHost = Callable[[], Host]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """The state folder's place; whatever was started below it is ended."""
    yield tmp_path / "state"
    process_scene.end_everything(tmp_path)


@pytest.fixture
def make_host(path: Path) -> Iterator[MakeHost]:
    """Agents one after the other on one folder."""
    hosts: list[Host] = []

    def make() -> Host:
        if hosts:
            hosts[-1].leave()
        hosts.append(Host(path))
        return hosts[-1]

    yield make
    if hosts:
        hosts[-1].leave()


async def test_workers_survive_the_kill_of_their_agent_and_are_adopted(path: Path, make_host: MakeHost) -> None:
    ticker = ("sh", "-c", "while :; do echo tick; sleep 0.01; done")
    with child_agent(path, ticker, SLEEP) as agent:
        agent.kill()
        assert [is_alive(main) and is_alive(shim) for _, main, shim in agent.workers] == [True, True]
    host = make_host()

    assert [(worker.worker_id, identity(worker.process), worker.exit) for worker in host.adopted] == [
        (worker_id, main, None) for worker_id, main, _ in agent.workers
    ]
    assert [worker.name for worker in host.adopted] == ["pool_1@test-host", "pool_2@test-host"]
    lines = host.log(1).count("tick")
    await until(lambda: host.log(1).count("tick") > lines, "it works on")
    with pytest.raises(errors.AlreadyExists):
        host.processes.start(process_scene.start_spec(1, SLEEP))

    host.signal(agent.workers[0][0], "TERM")

    assert (await host.end_of(agent.workers[0][0])).signal == signal.SIGTERM


async def test_a_worker_that_died_while_no_agent_ran_is_told_with_its_true_exit(
    path: Path, make_host: MakeHost, tmp_path: Path
) -> None:
    waits = f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done"
    commands = [("sh", "-c", f"{waits}; exit {code}") for code in (0, 41)]
    with child_agent(path, *commands, SLEEP) as agent:
        agent.kill()
    (tmp_path / "go").touch()
    members.send(agent.workers[2][1], signal.SIGKILL)
    await until(lambda: process_scene.pids_below(path) == [], "all and their shims have ended")
    host = make_host()
    exits = [worker.exit for worker in host.adopted]

    assert [(told.cause, told.exit_code, told.signal) for told in exits if told is not None] == [
        (ExitCause.CLEAN, 0, 0),
        (ExitCause.CRASHED, 41, 0),
        (ExitCause.CRASHED, None, 9),
    ]
    assert host.ended == {}


async def test_a_frozen_agent_changes_nothing_for_its_workers(path: Path, tmp_path: Path) -> None:
    """They write to files, so nothing fills up behind an agent that does not read."""
    chatter = python(
        f"for n in range(20000): print('x' * 200)\nopen({str(tmp_path / 'done')!r}, 'w').close()"
        "\nimport time; time.sleep(1000)"
    )
    gate = ("sh", "-c", f'while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exec "$@"', "sh", *chatter)
    with child_agent(path, gate) as agent:
        os.kill(agent.pid, signal.SIGSTOP)
        (tmp_path / "go").touch()
        await until((tmp_path / "done").exists, "it has written 4 MB and gone on")


async def test_an_exit_that_was_counted_is_shown_and_not_counted_again(make_host: MakeHost) -> None:
    host = make_host()
    worker_exit = await host.run(1, ("sh", "-c", "exit 3"))
    (worker_id,) = host.ended
    host.processes.keep_exit(worker_id, worker_exit)

    (adopted,) = make_host().adopted

    assert (adopted.exit, adopted.is_exit_counted) == (worker_exit, True)


async def test_what_is_forgotten_is_gone_and_its_log_stays(make_host: MakeHost) -> None:
    host = make_host()
    await host.run(1, ("echo", "hello"))
    (worker_id,) = host.ended
    await until(lambda: worker_id not in members.find_all(), "its shim, which outlives it by a moment, is gone")
    host.processes.forget(worker_id)
    host = make_host()

    assert host.adopted == []
    assert list(host.folder.workers.iterdir()) == []
    assert host.log(1) == "hello\n"


async def test_a_stop_that_has_begun_is_handed_on(make_host: MakeHost) -> None:
    stop = StopContract(
        steps=(StopStep(signal="TERM", wait_seconds=600.0), StopStep(signal="QUIT", wait_seconds=9.0))
    )
    host = make_host()
    # It was started under another contract than the one by which it is stopped.
    worker_id = await host.start(1, process_scene.STUBBORN, stop=model.PLAIN_STOP)
    await until(lambda: "ready" in host.log(1), "it ignores TERM")
    now = asyncio.get_running_loop().time()
    host.processes.signal(
        worker_id,
        "TERM",
        model.SignalScope.MAIN,
        step=0,
        until_seconds=now + 600.0,
        contract=stop,
        is_replaced=True,
    )
    (adopted,) = make_host().adopted

    assert adopted.stop == model.PLAIN_STOP
    assert adopted.stopping is not None and adopted.stopping.contract == stop
    assert (adopted.stopping.step, adopted.stopping.is_replaced, adopted.stopping.is_sent) == (0, True, True)
    assert 500.0 < adopted.stopping.remaining_seconds <= 600.0
    assert adopted.uptime_seconds < 60.0


async def test_a_stop_whose_signal_may_not_have_been_sent_is_handed_on_as_that(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent dies after it has noted the stop and before it signals."""
    host = make_host()
    worker_id = await host.start(1, SLEEP)

    class Death(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Death

    with monkeypatch.context() as patched, pytest.raises(Death):
        patched.setattr(members, "send", die)
        host.signal(worker_id, "TERM")
    (adopted,) = make_host().adopted

    assert adopted.process is not None
    assert adopted.stopping is not None and not adopted.stopping.is_sent


async def test_a_worker_that_died_behind_a_frozen_shim_is_told_after_the_adoption(make_host: MakeHost) -> None:
    host = make_host()
    worker_id = await host.start(1, SLEEP)
    main, shim = host.main(worker_id), host.shim(worker_id)
    host.leave()
    members.send(shim, signal.SIGSTOP)
    members.send(main, signal.SIGTERM)
    await until(lambda: not is_alive(main), "it is dead")
    host = Host(host.path)
    try:
        assert [(worker.worker_id, worker.exit) for worker in host.adopted] == [(worker_id, None)]
        assert (await host.end_of(worker_id)).signal == signal.SIGTERM
    finally:
        host.leave()


async def test_a_worker_whose_shim_died_while_no_agent_ran_lives_on_and_ends_unknown(
    make_host: MakeHost,
) -> None:
    host = make_host()
    living, dead = await host.start(1, SLEEP), await host.start(2, SLEEP)
    processes = [host.main(living), host.main(dead)]
    for worker_id in (living, dead):
        members.send(host.shim(worker_id), signal.SIGKILL)
    members.send(processes[1], signal.SIGKILL)
    await until(lambda: process_scene.pids_below(host.path) == [processes[0].pid], "the others are gone")
    host = make_host()
    first, second = host.adopted

    assert (first.exit, first.shim, identity(first.process)) == (None, None, processes[0])
    assert second.exit is not None and second.exit.cause is ExitCause.UNKNOWN
    members.send(processes[0], signal.SIGTERM)
    assert (await host.end_of(living)).cause is ExitCause.UNKNOWN


@pytest.mark.parametrize("damage", ["{", '{"version": 99}', "", '{"version": 1, "worker_id": 5}'])
async def test_a_corrupt_intent_is_moved_aside_alone_and_its_worker_is_found_by_its_id(
    make_host: MakeHost, damage: str
) -> None:
    host = make_host()
    first, second = await host.start(1, SLEEP), await host.start(2, SLEEP)
    running = {first: host.main(first), second: host.main(second)}
    (host.worker_folder(first) / "intent.json").write_text(damage)
    host = make_host()

    assert {worker.worker_id: identity(worker.process) for worker in host.adopted} == running
    assert {worker.name for worker in host.adopted} == {"pool_1@test-host", "pool_2@test-host"}
    if damage:
        assert [told.path.read_text() for told in host.processes.quarantined] == [damage]
    host.signal(first, "TERM")
    assert (await host.end_of(first)).signal == signal.SIGTERM
    (again,) = [worker for worker in make_host().adopted if worker.worker_id == second]
    assert again.name == "pool_2@test-host"


async def test_a_corrupt_identity_of_a_running_worker_is_found_by_its_environment(make_host: MakeHost) -> None:
    host = make_host()
    worker_id = await host.start(1, SLEEP)
    main = host.main(worker_id)
    (host.worker_folder(worker_id) / "shim.json").write_bytes(b"\xff\xfe not json")
    host = make_host()

    assert [identity(worker.process) for worker in host.adopted] == [main]
    assert [told.worker_id for told in host.processes.quarantined] == [worker_id]
    members.send(main, signal.SIGKILL)
    assert (await host.end_of(worker_id)).signal == signal.SIGKILL


async def test_a_worker_whose_folder_was_removed_is_found_and_never_started_twice(make_host: MakeHost) -> None:
    host = make_host()
    worker_id = await host.start(1, SLEEP)
    main = host.main(worker_id)
    host.leave()
    shutil.rmtree(host.worker_folder(worker_id))
    host = Host(host.path)
    try:
        assert [(worker.name, identity(worker.process)) for worker in host.adopted] == [
            ("pool_1@test-host", main)
        ]
        with pytest.raises(errors.AlreadyExists):
            host.processes.start(process_scene.start_spec(1, SLEEP))
        host.processes.kill_all(worker_id)
        assert (await host.end_of(worker_id)).cause is ExitCause.UNKNOWN
    finally:
        host.leave()


async def test_a_corrupt_exit_record_is_unknown_and_never_clean(make_host: MakeHost) -> None:
    host = make_host()
    await host.run(1, ("true",))
    (worker_id,) = host.ended
    host.leave()
    await until(lambda: process_scene.pids_below(host.path) == [], "its shim is gone")
    (host.worker_folder(worker_id) / "exit").write_text('{"version": 1, "exit_code": "zero"}')
    host = Host(host.path)
    host.leave()

    (adopted,) = host.adopted
    assert adopted.exit is not None
    assert (adopted.exit.cause, adopted.exit.exit_code) == (ExitCause.UNKNOWN, None)


async def test_an_exit_that_is_written_while_the_next_agent_looks_is_not_lost(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none at the first look; then the shim writes it and ends, so that nobody is there either."""
    host = make_host()
    await host.run(1, ("sh", "-c", "exit 7"))
    (worker_id,) = host.ended
    host.leave()
    await until(lambda: process_scene.pids_below(host.path) == [], "its shim is gone")
    read_exit, looks = worker_folder.WorkerFolder.read_exit, []

    def read(folder: worker_folder.WorkerFolder) -> worker_folder.ExitRecord | None:
        looks.append(folder.worker_id)
        return None if len(looks) == 1 else read_exit(folder)

    monkeypatch.setattr(worker_folder.WorkerFolder, "read_exit", read)
    host = Host(host.path)
    host.leave()

    (adopted,) = host.adopted
    assert (adopted.worker_id, looks[0]) == (worker_id, worker_id)
    assert adopted.exit is not None
    assert (adopted.exit.cause, adopted.exit.exit_code) == (ExitCause.CRASHED, 7)


async def test_what_is_no_worker_at_all_is_moved_aside_and_told(make_host: MakeHost) -> None:
    host = make_host()
    worker_id = await host.start(1, SLEEP)
    (host.folder.workers / "lost+found").mkdir()
    (host.folder.workers / str(uuid.uuid4())).mkdir()
    host = make_host()

    assert [worker.worker_id for worker in host.adopted] == [worker_id]
    assert len(host.processes.quarantined) == 2
    assert [path.name for path in host.folder.workers.iterdir()] == [worker_id]


async def test_a_record_that_names_a_stranger_never_harms_it(make_host: MakeHost) -> None:
    """The PID is another process's by now: with another start time, in a forged record even with its own."""
    stranger = await asyncio.to_thread(subprocess.Popen, ["sleep", "1000"], start_new_session=True)
    try:
        present = identities.identify(stranger.pid)
        host = make_host()
        ids = [await host.start(number, SLEEP) for number in (1, 2)]
        for worker_id in ids:
            host.processes.kill_all(worker_id)
            await host.end_of(worker_id)
        host.leave()
        for worker_id, ticks in zip(ids, (present.start_time_ticks - 1, present.start_time_ticks), strict=True):
            record = host.worker_folder(worker_id) / "shim.json"
            forged = {**json.loads(record.read_text()), "pid": stranger.pid, "start_time_ticks": ticks}
            forged |= {"shim_pid": stranger.pid, "shim_start_time_ticks": present.start_time_ticks}
            record.write_text(json.dumps(forged))
            (host.worker_folder(worker_id) / "exit").write_bytes(b"")
            (host.worker_folder(worker_id) / "stop.json").unlink()
        host = Host(host.path)
        for worker in host.adopted:
            host.processes.kill_all(worker.worker_id)
            host.signal(worker.worker_id, "KILL")
        host.leave()

        assert [worker.exit.cause for worker in host.adopted if worker.exit] == [ExitCause.UNKNOWN] * 2
        assert [told.outcome for told in host.processes.quarantined] == ["a stranger; it is left alone"]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_boot_since_then_means_that_nothing_of_it_runs(make_host: MakeHost) -> None:
    host = make_host()
    worker_id = await host.start(1, SLEEP)
    host.processes.kill_all(worker_id)
    await host.end_of(worker_id)
    host.leave()
    folder = host.worker_folder(worker_id)
    for name in ("intent.json", "shim.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, "boot_id": str(uuid.uuid4())}))
    (folder / "exit").write_bytes(b"")
    host = Host(host.path)
    host.leave()

    (adopted,) = host.adopted
    assert adopted.exit is not None
    assert (adopted.exit.cause, adopted.exit.detail) == (ExitCause.UNKNOWN, "the host was started anew")


async def test_an_intent_that_was_never_carried_out_is_told_as_not_started(make_host: MakeHost) -> None:
    host = make_host()
    await host.run(1, ("true",))
    (worker_id,) = host.ended
    host.leave()
    for name in ("shim.json", "exit"):
        (host.worker_folder(worker_id) / name).write_bytes(b"\0" * 4096)
    host = Host(host.path)
    host.leave()

    (adopted,) = host.adopted
    assert adopted.exit is not None and adopted.exit.cause is ExitCause.NOT_STARTED


async def test_a_worker_that_its_shim_is_just_starting_is_told_when_it_runs(make_host: MakeHost) -> None:
    """The agent died between the spawn of the shim and its word."""
    host = make_host()
    spec = process_scene.start_spec(1, SLEEP)
    host.processes.start(spec)
    shim = await until(
        lambda: [pid for pid in process_scene.pids_below(host.path) if members.is_shim(pid)],
        "the shim is there",
    )
    os.kill(shim[0], signal.SIGSTOP)
    record = host.worker_folder(spec.worker_id) / "shim.json"
    is_early = not record.read_bytes().strip(b"\0")
    host = make_host()
    os.kill(shim[0], signal.SIGCONT)
    (adopted,) = host.adopted

    if is_early:
        assert adopted.process is None
        await until(lambda: spec.worker_id in host.started, "it starts")
    assert len([pid for pid in process_scene.pids_below(host.path) if not members.is_shim(pid)]) == 1


async def test_fifty_workers_are_adopted_in_under_a_second(make_host: MakeHost) -> None:
    host = make_host()
    specs = [process_scene.start_spec(number, SLEEP) for number in range(1, 51)]
    for spec in specs:
        host.processes.start(spec)
    await until(lambda: len(host.started) == 50, "all run", seconds=60.0)
    host.leave()
    before = time.monotonic()
    host = Host(host.path)
    took = time.monotonic() - before
    host.leave()

    assert len(host.adopted) == 50
    assert all(worker.exit is None for worker in host.adopted)
    assert took < 1.0


def test_one_agent_at_a_time_may_use_a_folder(tmp_path: Path) -> None:
    first, second = state.StateFolder(tmp_path / "state"), state.StateFolder(tmp_path / "state")
    first.open()
    with pytest.raises(errors.FailedPrecondition, match=f"PID {os.getpid()}") as caught:
        second.open()
    first.close()
    second.open()
    second.close()

    assert caught.value.metadata["pid"] == str(os.getpid())


def test_a_folder_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    with pytest.raises(errors.FailedPrecondition, match="chmod it 0700"):
        state.StateFolder(tmp_path / "state").open()
