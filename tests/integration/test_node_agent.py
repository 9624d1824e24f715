"""The agent as a process: its workers outlive it, it ends as it is told, and bad input changes nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import agent_kit
import deaf
import grpc
import pytest
from agent_kit import AgentProcess, is_alive, until
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]
from leasehold.api.node.v1 import agent_service_pb2, pool_pb2, worker_pb2
from leasehold.core import errors

SLEEPERS = """
pools:
  - {name: idle, template: command, min_workers: 0, max_workers: %d,
     parameters: {program: sleep, arguments: ["86397"], stop_seconds: 5}}
"""
STUBBORN = """
pools:
  - name: busy
    template: command
    min_workers: 0
    max_workers: 2
    parameters: {program: %s, arguments: ["%s/stubborn.py", "%s"], stop_seconds: 60}
    stop: {steps: [{signal: TERM, wait_seconds: 60}, {signal: INT, wait_seconds: 5}], immediate_step: 1}
"""


@pytest.fixture(name="idle")
def fixture_idle(tmp_path: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path, SLEEPERS % 2)
    yield agent
    agent.close()


@pytest.fixture(name="busy")
def fixture_busy(tmp_path: Path) -> Iterator[AgentProcess]:
    """Workers that end on SIGTERM only once `go` is there, and note begin and end in a ledger of their own."""
    (tmp_path / "stubborn.py").write_text(agent_kit.STUBBORN)
    agent = AgentProcess(tmp_path, STUBBORN % (sys.executable, tmp_path, tmp_path))
    yield agent
    (tmp_path / "go").touch()
    agent.close()


def ledger(agent: AgentProcess) -> list[str]:
    path = agent.folder / "ledger"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


# Workers outlive their agent


def test_the_next_agent_adopts_all_and_learns_how_one_ended_meanwhile(idle: AgentProcess) -> None:
    idle.start()
    before = idle.wait_running(2)
    idle.kill()
    dead, kept = sorted(before)
    os.kill(before[dead], signal.SIGUSR1)
    until(lambda: not is_alive(before[dead]), "the worker ended")

    idle.start()
    after = idle.wait_running(2)

    assert after[kept] == before[kept]
    lives = idle.worker(dead)
    ended = next(life for life in lives if life.state == worker_pb2.WORKER_STATE_EXITED)
    assert ended.exit.signal == signal.SIGUSR1
    assert ended.exit.cause == worker_pb2.EXIT_CAUSE_CRASHED
    assert idle.worker(kept)[0].is_adopted
    assert idle.pool().starts_total == 1, "only the one that died was started"


def test_a_frozen_agent_freezes_no_worker_and_goes_on_after(idle: AgentProcess) -> None:
    idle.start()
    before = idle.wait_running(2)
    idle.signal(signal.SIGSTOP)
    name = sorted(before)[0]
    os.kill(before[name], signal.SIGKILL)
    until(lambda: not is_alive(before[name]), "the worker ended")
    assert is_alive(before[sorted(before)[1]])
    idle.signal(signal.SIGCONT)

    after = idle.wait_running(2)

    assert after[name] != before[name]
    assert after[sorted(before)[1]] == before[sorted(before)[1]]


def test_sigusr1_hands_the_workers_over(busy: AgentProcess) -> None:
    busy.start()
    before = busy.wait_running(2)
    busy.signal(signal.SIGUSR1)
    assert busy.wait_end() == 0
    assert all(map(is_alive, before.values()))

    busy.start()

    assert busy.wait_running(2) == before
    assert ledger(busy) == ["begin", "begin"]


def test_what_persons_ordered_survives_a_killed_agent_and_applies_once(idle: AgentProcess) -> None:
    idle.start()
    idle.wait_running(2)
    first = idle.order("order-1", scale={"pool": "idle", "workers": 1})
    assert [worker.name for worker in first.workers] == ["idle_2@here"], "the answer tells who goes"
    idle.wait_running(1)
    idle.order("order-2", scale={"pool": "idle", "auto": True})
    idle.wait_running(2)
    idle.kill()
    idle.start()
    idle.wait_running(2)

    again = idle.order("order-1", scale={"pool": "idle", "workers": 1})

    assert again == first
    assert idle.pool().mode == pool_pb2.POOL_MODE_AUTO
    idle.order("order-3", scale={"workers": 1})
    idle.wait_running(1)
    idle.kill()
    idle.start()
    assert idle.pool().mode == pool_pb2.POOL_MODE_MANUAL
    assert idle.pool().manual_target == 1
    assert len(idle.running()) == 1


def test_a_drain_by_order_goes_on_under_the_next_agent_until_it_is_ended(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.order(drain={"is_draining": True})
    busy.kill()

    busy.start()
    assert busy.node().is_draining
    (busy.folder / "go").touch()
    until(lambda: not any(map(is_alive, workers.values())), "both end")
    assert busy.node().is_draining
    assert busy.pool().starts_total == 0
    (busy.folder / "go").unlink()
    busy.order(drain={"is_draining": False})

    busy.wait_running(2)


# How it ends


def test_sigterm_waits_for_running_work(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)
    until(lambda: busy.node().is_draining, "it drains, and still answers")
    assert all(map(is_alive, workers.values()))
    (busy.folder / "go").touch()

    assert busy.wait_end() == 0
    assert sorted(ledger(busy)) == ["begin", "begin", "end", "end"]


def test_a_second_signal_during_a_drain_stops_at_once(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)
    until(lambda: busy.node().is_draining, "it drains")
    busy.signal(signal.SIGTERM)

    assert busy.wait_end() == 0
    assert not any(map(is_alive, workers.values()))
    assert ledger(busy) == ["begin", "begin"]


def test_sigusr1_during_a_drain_hands_over_workers_that_are_asked_to_end(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)
    until(lambda: busy.pool().stopping == 2, "both are asked to end")
    busy.signal(signal.SIGUSR1)
    assert busy.wait_end() == 0
    assert all(map(is_alive, workers.values()))

    (busy.folder / "go").touch()
    until(lambda: ledger(busy).count("end") == 2, "their work was finished")


def test_the_drain_deadline_ends_a_drain(busy: AgentProcess) -> None:
    busy.start("--addr=none", "--drain-deadline-seconds=0.5")
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)

    assert busy.wait_end() == 0
    assert not any(map(is_alive, workers.values()))


def test_an_agent_killed_in_the_midst_of_a_drain_leaves_a_drain_that_goes_on(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)
    until(lambda: busy.pool().stopping == 2, "both are asked to end")
    busy.kill()
    assert all(map(is_alive, workers.values()))
    busy.start()
    assert busy.pool().stopping == 2, "the next agent goes on where this one was"
    (busy.folder / "go").touch()

    until(lambda: not any(map(is_alive, workers.values())), "they end by themselves")
    until(lambda: ledger(busy).count("end") == 2, "their work was finished")


@pytest.mark.parametrize("prefix", [(), deaf.PREFIX], ids=["as usual", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_midst_of_the_start_leaves_nothing(
    tmp_path: Path, number: signal.Signals, prefix: Sequence[str]
) -> None:
    agent = AgentProcess(tmp_path, SLEEPERS % 4, prefix=prefix)
    try:
        agent.start(wait=False)
        until(lambda: "agent_started" in agent.text(), "it starts", seconds=30)
        agent.signal(number)

        assert agent.wait_end() == 0
        assert agent.left() == []
    finally:
        agent.close()


def test_an_ephemeral_agent_takes_sigterm_as_stop_at_once(busy: AgentProcess) -> None:
    busy.start("--addr=none", "--ephemeral")
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.signal(signal.SIGTERM)

    assert busy.wait_end() == 0
    assert not any(map(is_alive, workers.values()))


# Bad input, bad state


def test_a_second_agent_on_the_folder_is_told_who_has_it(idle: AgentProcess) -> None:
    idle.start()
    command = [sys.executable, "-m", "leasehold.nodeagent", f"--state-dir={idle.state}", "--addr=none"]

    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=idle.folder)

    assert second.returncode == 1
    assert f"already running, PID {idle.pid}" in second.stderr


def test_scaling_beyond_memory_or_bounds_is_refused_with_numbers_and_changes_nothing(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, SLEEPERS % 20)
    try:
        agent.start()
        agent.order("pause", scale={"workers": 1})
        agent.wait_running(1)

        with pytest.raises(errors.FailedPrecondition) as beyond:
            agent.order("too-much", scale={"workers": 12})
        with pytest.raises(errors.InvalidArgument) as outside:
            agent.order("outside", scale={"workers": 21})

        assert beyond.value.metadata["memory_allows"] == "7"
        assert "12 workers" in beyond.value.message
        assert outside.value.field == "target_workers"
        assert (agent.pool().manual_target, len(agent.running())) == (1, 1)
    finally:
        agent.close()


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ({"scale": {"pool": "nope", "workers": 1}}, errors.NotFound, "there is no pool 'nope' on here"),
        ({"stop_workers": {"worker": "../x"}}, errors.InvalidArgument, "worker: '../x' is not a name"),
        ({"read_log": {"worker": "../../etc/passwd"}}, errors.InvalidArgument, "is not a name"),
        ({"stop_workers": {"worker": "idle_9@here"}}, errors.NotFound, "there is no worker idle_9@here"),
        ({}, errors.InvalidArgument, "order: says nothing"),
        ({"scale": {}}, errors.InvalidArgument, "neither workers nor auto"),
    ],
)
def test_a_wrong_order_is_told(
    idle: AgentProcess, kind: dict[str, object], error: type[Exception], told: str
) -> None:
    idle.start()

    with pytest.raises(error, match=told):
        idle.order("", **kind)


def test_a_file_that_became_wrong_is_refused_and_the_last_good_one_stays(idle: AgentProcess) -> None:
    idle.start()
    before = idle.wait_running(2)
    idle.write("pools: [{name: idle, template: gone}]")
    idle.signal(signal.SIGHUP)
    until(lambda: any("there is no template 'gone'" in each for each in idle.node().warnings), "it is told")
    assert idle.running() == before

    idle.write(SLEEPERS % 3)

    after = idle.wait_running(3)
    assert before.items() <= after.items()
    assert not any("template" in each for each in idle.node().warnings)


def test_a_pool_that_left_the_file_ends_by_the_contract_that_it_began_with(busy: AgentProcess) -> None:
    busy.start()
    workers = busy.wait_running(2)
    until(lambda: ledger(busy) == ["begin", "begin"], "both work")
    busy.kill()
    busy.write("pools: []")
    busy.start()
    until(lambda: busy.pool("busy").stopping == 2, "they are asked to end")
    assert all(map(is_alive, workers.values()))
    (busy.folder / "go").touch()

    until(lambda: not any(map(is_alive, workers.values())), "they ended")
    assert sorted(ledger(busy)) == ["begin", "begin", "end", "end"]


@pytest.mark.parametrize("content", [b"{", b"\xff\x00", b'{"version": 99}', b"[]"])
def test_state_that_is_corrupt_is_put_aside_and_told(idle: AgentProcess, content: bytes) -> None:
    idle.start()
    before = idle.wait_running(2)
    idle.kill()
    for name in ("node", "modes", "orders"):
        (idle.state / f"{name}.json").write_bytes(content)

    idle.start()

    assert idle.wait_running(2) == before
    assert len(list((idle.state / "quarantine").iterdir())) == 3


def test_a_pool_whose_checks_fail_is_not_started_and_says_why(tmp_path: Path) -> None:
    agent = AgentProcess(
        tmp_path,
        f"pools:\n  - {{name: lost, template: command, parameters: {{program: {tmp_path}/program}}}}\n",
    )
    try:
        agent.start()
        until(lambda: f"{tmp_path}/program does not exist" in agent.pool().blocked_reason, "it is told")
        assert agent.pool().starts_total == 0
    finally:
        agent.close()


# What it tells


def test_the_first_users_lines_are_in_the_log(idle: AgentProcess) -> None:
    idle.start()
    workers = idle.wait_running(2)
    events = [json.loads(line)["event"] for line in idle.text().splitlines() if line.startswith("{")]

    assert f"worker idle_1@here started, PID {workers['idle_1@here']}" in events
    assert "scaling: 0 -> 2 workers" in events
    memory = [event for event in events if event.startswith("memory ")]
    assert memory
    pattern = r"^memory \d+\.\d/0\.4 GB \(\d+\.\d%\), available \d+\.\d GB, workers \d/2 \(optimal\)$"
    assert all(re.match(pattern, event) for event in memory), memory


def test_status_and_stop_from_the_command_line(idle: AgentProcess) -> None:
    idle.start()
    workers = idle.wait_running(2)
    command = [sys.executable, "-m", "leasehold.nodeagent", f"--state-dir={idle.state}"]

    told = subprocess.run([*command, "--status"], capture_output=True, text=True, timeout=30, check=True).stdout
    stopped = subprocess.run(
        [*command, "--stop"], capture_output=True, text=True, timeout=30, check=True
    ).stdout

    assert f"idle_1@here  running, PID {workers['idle_1@here']}" in told
    assert "per core" in told
    assert stopped.startswith("the agent has ended")
    assert idle.wait_end() == 0
    assert not any(map(is_alive, workers.values()))
    gone = subprocess.run([*command, "--status"], capture_output=True, text=True, timeout=30, check=False)
    assert gone.returncode == 3


def test_a_log_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    """Its log goes into a pipe whose reader stalls: 64 KiB, then no more."""
    agent = AgentProcess(tmp_path, (SLEEPERS % 1).replace("sleep", "'true'").replace('["86397"]', '[""]'))
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        agent.start(stderr=writer)
        os.close(writer)

        until(lambda: agent.pool().starts_total >= 2, "workers start and end")
        assert agent.node().memory.total_bytes
        agent.signal(signal.SIGTERM)
        assert agent.wait_end() == 0
    finally:
        os.close(reader)
        agent.close()


def test_following_a_log_ends_with_its_worker(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
        "print('hello', flush=True)\nwhile True: time.sleep(0.05)\n"
    )
    parameters = f"{{program: {sys.executable}, arguments: ['{tmp_path}/talk.py']}}"
    agent = AgentProcess(
        tmp_path, f"pools: [{{name: talk, template: command, max_workers: 1, parameters: {parameters}}}]"
    )
    try:
        agent.start()
        agent.wait_running(1)
        said = b""
        with agent.stub() as stub:
            request = agent_service_pb2.FollowLogRequest(worker="talk_1@here")
            for response in stub.FollowLog(request, timeout=20):
                said += response.chunk.data
                if said == b"hello\n":
                    agent.order("stop", stop_workers={"pool": "talk"})
        assert said == b"hello\nbye\n"
        chunk = agent.order("", read_log={"worker": "talk_1@here", "tail_lines": 1}).log
        assert chunk.data == b"bye\n"
    finally:
        agent.close()


def test_a_watch_is_told_of_changes_and_ends_with_the_agent(idle: AgentProcess) -> None:
    idle.start()
    seen: list[int] = []
    with idle.stub() as stub:
        for response in stub.WatchAgentStatus(agent_service_pb2.WatchAgentStatusRequest(), timeout=20):
            running = response.status.pools[0].running
            if not seen or seen[-1] != running:
                seen.append(running)
            if running == 2 and not idle.node().is_draining:
                idle.signal(signal.SIGTERM)

    assert idle.wait_end() == 0
    assert 2 in seen


def test_health_and_reflection_are_served(idle: AgentProcess) -> None:
    idle.start()
    with grpc.insecure_channel(f"unix:{idle.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        name = "leasehold.api.node.v1.AgentService"
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        listed = next(iter(reflection.ServerReflectionInfo(asked, timeout=5)))

    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    names = {service.name for service in listed.list_services_response.service}
    assert {name, "grpc.channelz.v1.Channelz", "grpc.health.v1.Health"} <= names


def test_a_second_sigint_kills_what_does_not_listen(tmp_path: Path) -> None:
    agent = AgentProcess(
        tmp_path,
        "pools:\n"
        "  - name: deaf\n"
        "    template: command\n"
        "    max_workers: 1\n"
        "    parameters: {program: sh, arguments: [-c, 'trap \"\" TERM INT; while :; do sleep 0.1; done']}\n"
        "    stop:\n"
        "      steps: [{signal: TERM, wait_seconds: 600}, {signal: INT, wait_seconds: 600}]\n"
        "      immediate_step: 1\n",
    )
    try:
        agent.start()
        agent.wait_running(1)
        agent.signal(signal.SIGINT)
        until(lambda: any(worker.stop_step == "INT" for worker in agent.pool().workers), "it is asked to end")
        agent.signal(signal.SIGINT)

        assert agent.wait_end() == 0
        assert agent.left() == []
    finally:
        agent.close()


def test_leftovers_are_ended_by_identity_but_not_under_a_living_agent(idle: AgentProcess) -> None:
    command = [sys.executable, "-m", "leasehold.nodeagent", "--end-leftovers", str(idle.state)]
    idle.start()
    workers = idle.wait_running(2)
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert all(map(is_alive, workers.values()))
    idle.kill()

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (refused.returncode, f"already running, PID {idle.pid}" in refused.stderr) == (1, True)
    assert (ended.returncode, ended.stdout) == (0, "ended 2 workers: idle_1@here, idle_2@here\n")
    assert (again.returncode, again.stdout) == (0, "there was nothing to end\n")
    assert not any(map(is_alive, workers.values()))


def test_the_kernels_oom_killer_takes_workers_before_their_agent(idle: AgentProcess) -> None:
    """Where it may be set (with CAP_SYS_RESOURCE); elsewhere the agent is as its workers are."""
    idle.start()
    workers = idle.wait_running(2)
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (idle.pid, *workers.values())]

    assert scores[0] == (-900 if may_protect() else 0)
    assert scores[1:] == [0, 0]


def may_protect() -> bool:
    """Whether a process of this user may lower its oom_score_adj, tried in a child."""
    program = "import pathlib; pathlib.Path('/proc/self/oom_score_adj').write_text('-900')"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
