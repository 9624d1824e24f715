"""Jobs under a real agent: started once, ended as told, and told truly whatever dies meanwhile."""

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import allocator_kit
import pytest
from agent_kit import AgentProcess, is_alive
from fake_nodes import FakeNodes
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.api.node.v1 import worker_pb2
from leasehold.core import epoch as epochs
from leasehold.core.job import model
from leasehold.nodeagent import job_records
from leasehold.runtime import identity

EPOCH = epochs.Epoch(1, 100, 7)
MIB = 2**20
YAML = f"""
jobs: {{cpus: 4, memory_gb: 0.125}}
job_templates:
  shell:
    parameters: {{code: {{pattern: '[^\\x00]*'}}, note: {{pattern: '[a-z]*', default: ''}}}}
    argv: [sh, -c, '{{code}}', sh, '{{note}}']
    env: {{OF_TEMPLATE: 'cpus {{cpus}}'}}
    stop: {{steps: [{{signal: TERM, wait_seconds: 1}}]}}
  python:
    parameters: {{code: {{pattern: '[^\\x00]*'}}}}
    argv: ['{sys.executable}', -I, -S, -c, '{{code}}']
  nowhere:
    argv: [/nowhere/at/all]
"""
#: Says that it has begun, and goes on until it is ended.
LEDGER = 'echo "begin $$" >> ledger; exec sleep 86394'

until = allocator_kit.until


class Scene:
    """An agent, and the leader that it hears."""

    def __init__(self, folder: Path, nodes: FakeNodes) -> None:
        self.folder = folder
        self.nodes = nodes
        self.agent = AgentProcess(folder, YAML)

    async def start(self, *flags: str) -> None:
        await asyncio.to_thread(self.agent.start, f"--addr={self.nodes.address}", *flags)

    async def without_cgroups(self) -> None:
        """Another agent, which has none."""
        await self.kill()
        await self.start("--workers-cgroup=/nowhere")

    async def kill(self) -> None:
        await asyncio.to_thread(self.agent.kill)

    def assign(
        self,
        template: str = "shell",
        *,
        ref: model.AttemptRef | None = None,
        max_run: float = 0.0,
        **parameters: str,
    ) -> model.AttemptRef:
        ref = ref or model.AttemptRef(str(uuid.uuid4()), 1)
        message = attempt_pb2.JobAssignment(
            attempt=attempt_pb2.AttemptRef(job_id=ref.job_id, attempt=ref.attempt),
            template=template,
            parameters=parameters,
            cpus=1,
            memory_bytes=32 * MIB,
        )
        if max_run:
            message.max_run.FromMilliseconds(round(max_run * 1000))
        self.nodes.assignments.append(message)
        return ref

    def stop(self, ref: model.AttemptRef) -> None:
        self.nodes.stops.append(attempt_pb2.AttemptRef(job_id=ref.job_id, attempt=ref.attempt))

    def forget(self, ref: model.AttemptRef) -> None:
        self.nodes.forgets.append(attempt_pb2.AttemptRef(job_id=ref.job_id, attempt=ref.attempt))

    def reports(self, ref: model.AttemptRef) -> list[attempt_pb2.AttemptReport]:
        return [each for each in self.nodes.attempts() if each.attempt.job_id == ref.job_id]

    async def phase(self, ref: model.AttemptRef, phase: int, what: str) -> attempt_pb2.AttemptReport:
        def found() -> attempt_pb2.AttemptReport | None:
            return next((each for each in self.reports(ref) if each.phase == phase), None)

        report = await until(found, what)
        assert isinstance(report, attempt_pb2.AttemptReport)
        return report

    async def started(self, ref: model.AttemptRef) -> None:
        await self.phase(ref, job_pb2.ATTEMPT_PHASE_STARTED, "it has started")

    async def ended(self, ref: model.AttemptRef) -> job_pb2.JobOutcome:
        return (await self.phase(ref, job_pb2.ATTEMPT_PHASE_ENDED, "its end is told")).outcome

    async def begun(self) -> list[int]:
        """PIDs of the executions so far; at least one."""
        path = self.folder / "ledger"
        text = await until(lambda: path.exists() and path.read_text(), "it has begun")
        return [int(line.split()[1]) for line in text.splitlines()]

    def shim(self, ref: model.AttemptRef) -> int:
        """The parent of its main process."""
        token = f"LEASEHOLD_WORKER_ID={job_records.worker_id(ref)}".encode()
        for name in os.listdir("/proc"):
            is_shim = name.isdigit() and b"shim.py" in _read(f"/proc/{name}/cmdline")
            if is_shim and token in _read(f"/proc/{name}/environ"):
                return int(name)
        raise AssertionError("no shim")

    async def heard_again(self) -> None:
        """Until the agent has said something more, twice."""
        count = len(self.nodes.heard)
        await until(lambda: len(self.nodes.heard) >= count + 2, "it reports")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


@pytest.fixture(name="scene")
async def fixture_scene(tmp_path: Path) -> AsyncIterator[Scene]:
    nodes = FakeNodes(EPOCH)
    await nodes.start()
    scene = Scene(tmp_path, nodes)
    await scene.start()
    yield scene
    await asyncio.to_thread(scene.agent.close)
    await nodes.stop()


async def test_it_registers_what_jobs_may_have_and_an_empty_inventory(scene: Scene) -> None:
    first = (await until(lambda: scene.nodes.heard, "it registers"))[0]

    resources = first.registration.job_resources
    assert (resources.cpus, resources.memory_bytes) == (4, 128 * MIB)
    assert list(first.registration.job_templates) == ["nowhere", "python", "shell"]
    assert first.HasField("inventory") and not first.inventory.attempts


async def test_ends_are_told_as_they_were_and_nothing_of_them_stays_once_forgotten(scene: Scene) -> None:
    good = scene.assign(code='echo "$OF_TEMPLATE $LEASEHOLD_JOB_ATTEMPT $LEASEHOLD_JOB_ID"')
    bad = scene.assign(code="exit 7")
    crashed = scene.assign(code="kill -SEGV $$")
    nowhere = scene.assign("nowhere")
    unknown = scene.assign("other")
    wrong = scene.assign(code="true", note="1; rm")
    unreadable = scene.assign(code="true", max_run=-1.0)
    refs = (good, bad, crashed, nowhere, unknown, wrong, unreadable)
    outcomes = [await scene.ended(ref) for ref in refs]

    assert [outcome.cause for outcome in outcomes] == [
        job_pb2.END_CAUSE_SUCCEEDED,
        job_pb2.END_CAUSE_FAILED,
        job_pb2.END_CAUSE_FAILED,
        job_pb2.END_CAUSE_NOT_STARTED,
        job_pb2.END_CAUSE_NOT_STARTED,
        job_pb2.END_CAUSE_REFUSED,
        job_pb2.END_CAUSE_NOT_STARTED,
    ]
    assert (outcomes[0].exit_code, outcomes[1].exit_code, outcomes[2].signal) == (0, 7, 11)
    assert "No such file" in outcomes[3].detail
    assert "no job template 'other'" in outcomes[4].detail
    assert "parameters.note" in outcomes[5].detail
    assert "does not understand the assignment" in outcomes[6].detail
    log = scene.agent.order(read_log={"worker": good.log_name}).log
    assert log.data.decode() == f"cpus 1 1 {good.job_id}\n"
    for ref in refs:
        scene.forget(ref)
    jobs = scene.agent.state / "jobs"
    await until(lambda: not [*jobs.glob("ends/*"), *jobs.glob("attempts/*")], "nothing is kept")


async def test_an_attempt_is_started_once_however_often_it_is_asked_for(scene: Scene) -> None:
    ref = scene.assign(code=LEDGER)
    scene.assign(ref=ref, code=LEDGER)
    (first,) = await scene.begun()
    await scene.started(ref)
    scene.assign(ref=ref, code=LEDGER)
    await until(lambda: not scene.nodes.assignments, "it is asked again")
    await scene.kill()
    scene.assign(ref=ref, code=LEDGER)
    await scene.start()
    await until(lambda: not scene.nodes.assignments, "the next agent is asked, too")
    await scene.heard_again()

    assert await scene.begun() == [first]
    assert is_alive(first)
    os.kill(first, signal.SIGKILL)
    assert (await scene.ended(ref)).signal == signal.SIGKILL
    scene.assign(ref=ref, code=LEDGER)
    await scene.heard_again()
    scene.forget(ref)
    scene.assign(ref=ref, code=LEDGER)
    await until(lambda: not scene.nodes.assignments, "it is asked for after all")
    await scene.heard_again()
    assert await scene.begun() == [first]


async def test_a_job_ends_while_no_agent_runs_and_the_next_one_tells_it_first(scene: Scene) -> None:
    ref = scene.assign(code='echo "begin $$" >> ledger; while [ ! -e go ]; do sleep 0.02; done; exit 3')
    (pid,) = await scene.begun()
    await scene.started(ref)
    await scene.kill()
    (scene.folder / "go").touch()
    await until(lambda: not is_alive(pid), "it ended")
    streams, before = scene.nodes.streams, len(scene.nodes.heard)
    await scene.start()
    await until(lambda: scene.nodes.streams > streams and len(scene.nodes.heard) > before, "it registers")

    (report,) = scene.nodes.heard[before].inventory.attempts
    if report.phase != job_pb2.ATTEMPT_PHASE_ENDED:  # its end is being written: it is told at once after
        report = await scene.phase(ref, job_pb2.ATTEMPT_PHASE_ENDED, "its end is told")
    assert (report.outcome.cause, report.outcome.exit_code) == (job_pb2.END_CAUSE_FAILED, 3)
    assert 0 < report.start_time.ToSeconds() <= report.end_time.ToSeconds()
    # Again on each stream, until it is forgotten.
    await scene.kill()
    before = len(scene.nodes.heard)
    await scene.start()
    await until(lambda: len(scene.nodes.heard) > before, "it registers again")
    (again,) = scene.nodes.heard[before].inventory.attempts
    assert again == report


async def test_an_agent_killed_between_intent_and_spawn_never_starts_that_attempt(scene: Scene) -> None:
    await until(lambda: scene.nodes.heard, "it registers")
    ref = scene.assign(code="true")
    await scene.ended(ref)
    await scene.kill()
    # The folder as it is before the spawn: intent and room, and nobody.
    other = model.AttemptRef(str(uuid.uuid4()), 1)
    await asyncio.to_thread(_intend, scene, other)
    await scene.start()
    scene.assign(ref=other, code=LEDGER)

    outcome = await scene.ended(other)

    assert outcome.cause == job_pb2.END_CAUSE_NOT_STARTED
    assert outcome.detail == "the agent ended before it was started"
    assert not (scene.folder / "ledger").exists()


def _intend(scene: Scene, ref: model.AttemptRef) -> None:
    folder = _folder(scene, ref)
    os.close(folder.create(_intent(ref)))


def _folder(scene: Scene, ref: model.AttemptRef) -> Any:
    from leasehold.nodeagent import worker_folder

    return worker_folder.WorkerFolder(scene.agent.state / "jobs" / "attempts" / job_records.worker_id(ref))


def _intent(ref: model.AttemptRef, boot_id: str = "") -> Any:
    from leasehold.core.node import model as node_model
    from leasehold.nodeagent import worker_folder, worker_values

    return worker_folder.Intent(
        worker_id=job_records.worker_id(ref),
        name=ref.log_name,
        pool="jobs",
        number=1,
        start_number=1,
        argv=("true",),
        limit_bytes=32 * MIB,
        boot_id=boot_id or identity.boot_id(),
        cgroup=None,
        stop=node_model.PLAIN_STOP,
        log=worker_values.LogSettings(),
        cpus=1,
    )


async def test_after_a_reboot_its_attempts_are_lost_with_the_node(scene: Scene) -> None:
    await until(lambda: scene.nodes.heard, "it registers")
    await scene.kill()
    ref = model.AttemptRef(str(uuid.uuid4()), 2)

    def reboot() -> None:
        os.close(_folder(scene, ref).create(_intent(ref, boot_id=str(uuid.uuid4()))))

    await asyncio.to_thread(reboot)
    await scene.start()

    assert (await scene.ended(ref)).cause == job_pb2.END_CAUSE_NODE_LOST


async def test_a_stop_goes_by_the_contract_and_kills_what_does_not_hear(scene: Scene) -> None:
    polite = scene.assign(code="trap 'exit 0' TERM; echo begin 1 >> ledger; while :; do sleep 0.02; done")
    deaf = scene.assign(code="trap '' TERM; echo begin 2 >> ledger; while :; do sleep 0.02; done")
    await until(lambda: (scene.folder / "ledger").exists(), "they have begun")
    await until(lambda: len((scene.folder / "ledger").read_text().split()) == 4, "both have begun")
    for ref in (polite, deaf, polite):
        scene.stop(ref)
    outcomes = [await scene.ended(polite), await scene.ended(deaf)]

    assert {outcome.cause for outcome in outcomes} == {job_pb2.END_CAUSE_CANCELLED}
    assert (outcomes[0].exit_code, outcomes[1].signal) == (0, signal.SIGKILL)
    assert any(each.phase == job_pb2.ATTEMPT_PHASE_STOPPING for each in scene.reports(deaf))


async def test_a_stop_goes_on_under_the_next_agent(scene: Scene) -> None:
    deaf = scene.assign(code="trap '' TERM; echo begin 2 >> ledger; while :; do sleep 0.02; done")
    await scene.begun()
    await scene.started(deaf)
    scene.stop(deaf)
    await scene.phase(deaf, job_pb2.ATTEMPT_PHASE_STOPPING, "it is being stopped")
    await scene.kill()
    await scene.start()

    outcome = await scene.ended(deaf)

    assert (outcome.cause, outcome.signal) == (job_pb2.END_CAUSE_CANCELLED, signal.SIGKILL)


async def test_what_is_stopped_before_it_was_heard_of_never_starts_also_after_a_kill(scene: Scene) -> None:
    ref = model.AttemptRef(str(uuid.uuid4()), 1)
    scene.stop(ref)
    assert (await scene.ended(ref)).cause == job_pb2.END_CAUSE_NOT_STARTED
    await scene.kill()
    scene.assign(ref=ref, code=LEDGER)
    await scene.start()
    await until(lambda: not scene.nodes.assignments, "it is asked for late")
    await scene.heard_again()

    assert not (scene.folder / "ledger").exists()


async def test_an_exit_before_the_stop_keeps_its_result(scene: Scene) -> None:
    ref = scene.assign(code="exit 5")
    await scene.ended(ref)
    scene.stop(ref)
    await scene.heard_again()

    assert {each.outcome.exit_code for each in scene.reports(ref) if each.HasField("outcome")} == {5}
    assert (await scene.ended(ref)).cause == job_pb2.END_CAUSE_FAILED


async def test_a_job_beyond_its_time_is_ended_by_its_shim_with_no_agent(scene: Scene) -> None:
    ref = scene.assign(code=LEDGER, max_run=1.5)
    (pid,) = await scene.begun()
    await scene.started(ref)
    await scene.kill()
    await until(lambda: not is_alive(pid), "it is ended though no agent runs")
    await scene.start()

    outcome = await scene.ended(ref)

    assert (outcome.cause, outcome.signal) == (job_pb2.END_CAUSE_TIMED_OUT, signal.SIGTERM)
    assert outcome.detail.startswith("it ran for longer than 1.5 s")


async def test_a_job_that_ends_in_time_has_not_timed_out(scene: Scene) -> None:
    assert (
        await scene.ended(scene.assign(code="sleep 0.2", max_run=30.0))
    ).cause == job_pb2.END_CAUSE_SUCCEEDED


@pytest.mark.parametrize("is_agent_killed", [False, True])
async def test_a_job_whose_shim_was_killed_is_failed_once_its_processes_are_gone(
    scene: Scene, is_agent_killed: bool
) -> None:
    ref = scene.assign(code='echo "begin $$" >> ledger; sleep 86393 & sleep 86393')
    (pid,) = await scene.begun()
    await scene.started(ref)
    if is_agent_killed:
        await scene.kill()
    os.kill(scene.shim(ref), signal.SIGKILL)
    if is_agent_killed:
        await scene.start()
    await scene.heard_again()
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)

    outcome = await scene.ended(ref)

    assert outcome.cause == job_pb2.END_CAUSE_FAILED
    assert "nobody saw how" in outcome.detail
    assert not outcome.HasField("exit_code")
    assert scene.agent.left() == []


async def test_what_a_job_left_behind_is_ended_before_its_end_is_told(scene: Scene) -> None:
    """Also what is known by nothing but the lock that it inherited."""
    await scene.without_cgroups()
    left = 'env -i setsid sh -c "echo begin \\$\\$ >> ledger; exec sleep 86389" &'
    code = f"{left} while [ ! -e ledger ]; do :; done"
    outcome = await scene.ended(scene.assign(code=code))
    (pid,) = await scene.begun()

    assert outcome.cause == job_pb2.END_CAUSE_SUCCEEDED
    assert not is_alive(pid)


async def test_status_shows_what_runs(scene: Scene) -> None:
    ref = scene.assign(code=LEDGER)
    (pid,) = await scene.begun()
    await scene.started(ref)
    (job,) = (await asyncio.to_thread(scene.agent.node)).jobs

    assert (job.job_id, job.attempt, job.phase) == (ref.job_id, 1, job_pb2.ATTEMPT_PHASE_STARTED)
    assert (job.cpus, job.memory_bytes, job.pid, job.log) == (1, 32 * MIB, pid, ref.log_name)


@pytest.mark.parametrize("has_cgroups", [True, False])
async def test_a_job_over_its_memory_is_ended_and_the_cause_is_told(scene: Scene, has_cgroups: bool) -> None:
    if not has_cgroups:
        await scene.without_cgroups()
    code = "import time\ntaken = bytearray(b'1') * (80 << 20)\ntime.sleep(86392)"

    outcome = await scene.ended(scene.assign("python", code=code))

    assert (outcome.cause, outcome.signal) == (job_pb2.END_CAUSE_OOM_KILLED, signal.SIGKILL)
    assert "out of memory" in outcome.detail


async def test_jobs_outlive_an_agent_that_ends_and_go_with_the_leftovers(scene: Scene) -> None:
    ref = scene.assign(code=LEDGER)
    (pid,) = await scene.begun()
    await scene.started(ref)
    scene.agent.signal(signal.SIGTERM)
    assert await asyncio.to_thread(scene.agent.wait_end) == 0
    assert is_alive(pid)

    await asyncio.to_thread(scene.agent.close)

    assert not is_alive(pid)


async def test_another_declaration_is_registered_without_a_restart(scene: Scene) -> None:
    await until(lambda: scene.nodes.heard, "it registers")
    scene.agent.write(YAML.replace("cpus: 4", "cpus: 6"))
    scene.agent.signal(signal.SIGHUP)

    def registered() -> bool:
        return scene.nodes.heard[-1].registration.job_resources.cpus == 6 or any(
            message.registration.job_resources.cpus == 6 for message in scene.nodes.heard
        )

    await until(registered, "it registers anew")


POOL = """
pools:
  - {name: idle, template: command, min_workers: 0, max_workers: 9,
     parameters: {program: sleep, arguments: ["86391"], stop_seconds: 5}}
"""


async def test_pools_leave_the_room_that_a_job_fills_late_and_nothing_is_killed(tmp_path: Path) -> None:
    nodes = FakeNodes(EPOCH)
    await nodes.start()
    scene = Scene(tmp_path, nodes)
    scene.agent.write(YAML + POOL)
    try:
        await scene.start()
        await asyncio.to_thread(scene.agent.wait_running, 7)
        code = (
            "import pathlib, time\n"
            "while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
            "taken = bytearray(b'1') * (100 << 20)\n"
            "pathlib.Path('taken').touch()\n"
            "time.sleep(86390)"
        )
        message_ref = scene.assign("python", code=code)
        nodes.assignments[-1].memory_bytes = 120 * MIB
        # 400 MB less 50 in reserve and 120 that are promised: 4 workers of 50 fit.
        kept = await asyncio.to_thread(scene.agent.wait_running, 4)
        await scene.started(message_ref)
        (tmp_path / "go").touch()
        await until((tmp_path / "taken").exists, "the job has filled its grant")
        checks = len(nodes.heard)
        await until(lambda: len(nodes.heard) > checks + 10, "some checks have passed")
        seen = [pool for message in nodes.heard[checks:] for pool in message.status.pools]
    finally:
        await asyncio.to_thread(scene.agent.close)
        await nodes.stop()

    assert {pool.running for pool in seen} == {4}
    assert {
        worker.name: worker.process.pid
        for worker in seen[-1].workers
        if worker.state == worker_pb2.WORKER_STATE_RUNNING
    } == kept
    assert all("ENDED" not in job_pb2.AttemptPhase.Name(each.phase) for each in scene.reports(message_ref))
