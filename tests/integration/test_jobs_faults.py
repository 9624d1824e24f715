"""The leader dies, is frozen, is overtaken; Postgres goes away: no job is lost, and none is run twice."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import allocator_kit as kit
import job_agents
import pytest
from allocator_kit import until
from job_agents import GIB, JobAgent, ask, registration, spec, submit, until_state
from leasehold import devstack
from leasehold.api.job.v1 import job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from node_agents import running
from psycopg import AsyncConnection

MakeFleet = Callable[..., kit.Fleet]

CRASHING = [str(Path(__file__).parents[1] / "allocator_crash_child.py")]


@contextlib.asynccontextmanager
async def hosts(fleet: kit.Fleet, *agents: JobAgent) -> AsyncIterator[None]:
    """Agents whose nodes take jobs."""
    async with running(*agents):
        for agent in agents:
            await job_agents.until_capacity(fleet, agent.name)
        yield


async def _submit_patiently(fleet: kit.Fleet, request_id: str, *, seconds: float = 30.0) -> job_pb2.Job:
    """As a client does: again under the same request id, whoever leads, until it is answered."""

    async def answered() -> job_pb2.Job | None:
        with contextlib.suppress(errors.Unavailable, errors.DeadlineExceeded):
            return await submit(fleet, spec(), request_id=request_id)
        return None

    submitted: job_pb2.Job = await until(answered, "the submit is answered", seconds=seconds, pause=0.1)
    return submitted


async def _jobs(fleet: kit.Fleet) -> list[job_pb2.Job]:
    return list((await ask(fleet, "ListJobs", wire.ListJobsRequest())).jobs)


async def _findings(fleet: kit.Fleet) -> list[wire.AuditFinding]:
    answer = await ask(fleet, "AuditAllocations", wire.AuditAllocationsRequest())
    return [finding for finding in answer.findings if finding.verdict == "DEFINITE"]


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("before", "submits"),
        ("after", "submits"),
        ("before", "allocations"),
        ("after", "allocations"),
        ("before", "ends"),
        ("after", "ends"),
    ],
)
async def test_sigkill_of_the_leader_at_any_point_of_a_batch_loses_no_job_and_starts_none_twice(
    make_fleet: MakeFleet, tmp_path: Path, point: str, kind: str
) -> None:
    armed = tmp_path / "armed"
    fleet = make_fleet(LEASEHOLD_TEST_CRASH=f"{point} {kind} {armed}")
    first = fleet.members[0]
    first.program = CRASHING
    await fleet.start()
    await job_agents.ready(fleet)
    second = fleet.add()
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.succeeds)
    async with hosts(fleet, agent):
        second.start()
        request_id = uuid.uuid4().hex
        armed.touch()

        submitted = await _submit_patiently(fleet, request_id)
        await until(lambda: not first.is_running, "the first leader has died")
        successor = await job_agents.ready(fleet)
        assert successor is second
        ended = await until_state(fleet, submitted.job_id, "COMPLETED")

        assert (await _submit_patiently(fleet, request_id)).job_id == submitted.job_id
        assert [job.job_id for job in await _jobs(fleet)] == [submitted.job_id]
        assert ended.attempt == 1
        assert dict(agent.starts) == {(submitted.job_id, 1): 1}
        await until(lambda: not agent.records, "its end may be forgotten")
        assert await _findings(fleet) == []


async def test_two_failovers_during_one_job_and_its_end_is_accepted(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=3)
    await fleet.start()
    await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        ref = (submitted.job_id, 1)
        await until(lambda: ref in agent.records, "it has started")
        for _ in range(2):
            leader = await fleet.leader()
            leader.kill()
            await job_agents.ready(fleet)
            await job_agents.until_capacity(fleet, "r1")
            present = await until_state(fleet, submitted.job_id, "RUNNING")
            assert (present.attempt, present.allocation.node) == (1, "r1")

        agent.finish(ref)
        ended = await until_state(fleet, submitted.job_id, "COMPLETED")
        await until(lambda: ref in agent.forgotten, "its end is committed")
    assert ended.attempt == 1
    assert agent.starts[ref] == 1


async def test_an_end_while_there_is_no_leader_is_told_to_the_next(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        ref = (submitted.job_id, 1)
        await until(lambda: ref in agent.records, "it has started")
        fleet.members[0].kill()
        agent.finish(ref, job_agents.FAILED)
        fleet.members[0].start()
        await job_agents.ready(fleet)
        ended = await until_state(fleet, submitted.job_id, "FAILED")
    assert ended.outcome.exit_code == 3


@pytest.mark.alone
async def test_a_leader_that_was_frozen_past_its_lease_commits_nothing_afterwards(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=2)
    await fleet.start()
    leader = await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.succeeds)
    async with hosts(fleet, agent):
        first = await submit(fleet, at=leader)
        await until_state(fleet, first.job_id, "COMPLETED")
        leader.freeze()
        stuck = asyncio.create_task(submit(fleet, request_id="while-frozen", at=leader))
        successor = await fleet.leader(other_than=leader)
        await until(lambda: _takes(fleet, successor), "the successor takes jobs", seconds=20)
        leader.thaw()
        with contextlib.suppress(errors.LeaseholdError):
            await stuck
        again = await _submit_patiently(fleet, "while-frozen")
        await until_state(fleet, again.job_id, "COMPLETED")
        assert {job.job_id for job in await _jobs(fleet)} == {first.job_id, again.job_id}
        assert set(agent.starts.values()) == {1}
        assert await _findings(fleet) == []


async def _takes(fleet: kit.Fleet, member: kit.AllocatorProcess) -> bool:
    with contextlib.suppress(errors.LeaseholdError):
        await ask(fleet, "ListQueues", wire.ListQueuesRequest(), at=member, seconds=1.0)
        return True
    return False


async def test_postgres_stopped_and_started_again_loses_nothing_and_is_recovered_from_by_itself(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer
) -> None:
    fleet = make_fleet(dsn=own_postgres.dsn)
    await fleet.start()
    leader = await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, agent):
        going_on = await submit(fleet)
        ref = (going_on.job_id, 1)
        await until(lambda: ref in agent.records, "it has started")

        await asyncio.to_thread(own_postgres.kill)
        with pytest.raises(errors.PostgresUnavailable) as caught:
            await submit(fleet, request_id="meanwhile", at=leader)
        assert caught.value.retry_after_seconds is not None
        with pytest.raises(errors.PostgresUnavailable):
            await submit(fleet, request_id="meanwhile", at=leader)
        # What runs is still told of, and its end is kept by its agent.
        assert (await job_agents.job(fleet, going_on.job_id)).state == job_pb2.JOB_STATE_RUNNING
        agent.finish(ref)
        await asyncio.to_thread(own_postgres.start)

        later = await _submit_patiently(fleet, "meanwhile")
        await until_state(fleet, going_on.job_id, "COMPLETED")
        await until(lambda: (later.job_id, 1) in agent.records, "the later one has started")
        agent.finish((later.job_id, 1))
        await until_state(fleet, later.job_id, "COMPLETED")
        assert len(await _jobs(fleet)) == 2
        assert set(agent.starts.values()) == {1}
        assert await _findings(fleet) == []
        assert leader.is_running and await fleet.leader() is leader


async def test_release_force_and_cancel_racing_release_once_and_leave_nothing_allocated(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1", cpus=16))
    outside = job_pb2.JobSpec(required_cpus=1, required_memory_bytes=GIB)
    async with hosts(fleet, agent):
        for number in range(10):
            request = wire.AcquireAllocationRequest(spec=outside, request_id=f"holder-{number}")
            held = (await ask(fleet, "AcquireAllocation", request)).allocation
            ref = {"job_id": held.job_id, "attempt": held.attempt}
            await asyncio.gather(
                ask(fleet, "ReleaseAllocation", wire.ReleaseAllocationRequest(**ref)),
                ask(fleet, "ForceReleaseAllocation", wire.ForceReleaseAllocationRequest(**ref, cause="race")),
                ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=held.job_id)),
                ask(fleet, "RenewAllocation", wire.RenewAllocationRequest(**ref)),
                return_exceptions=True,
            )
        running_jobs = [await submit(fleet) for _ in range(8)]
        for each in running_jobs:
            await until(lambda each=each: (each.job_id, 1) in agent.records, "it has started")  # type: ignore[misc]
        for each in running_jobs:
            agent.finish((each.job_id, 1))
        await asyncio.gather(
            *(ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=each.job_id)) for each in running_jobs)
        )
        # An exit before the signal keeps its result.
        for each in running_jobs:
            await until_state(fleet, each.job_id, "COMPLETED")
        used = (await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())).total
        assert (used.allocated_cpus, used.allocated_memory_bytes) == (0, 0)
        assert await _findings(fleet) == []
        assert all(job.state != job_pb2.JOB_STATE_RUNNING for job in await _jobs(fleet))


async def test_a_node_that_is_cut_off_keeps_its_job_and_is_given_no_other(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1", cpus=2))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        ref = (submitted.job_id, 1)
        await until(lambda: ref in agent.records, "it has started")
        agent.may_connect.clear()
        agent.cut()
        await until(lambda: _is_unknown(fleet, submitted.job_id), "nobody can tell of it", seconds=15)
        waiting = await submit(fleet)
        told = (await ask(fleet, "ExplainJob", wire.ExplainJobRequest(job_id=waiting.job_id))).explanation
        assert [part.reason for part in told.blocked] == ["NOT_READY"]

        agent.may_connect.set()
        await until(lambda: (waiting.job_id, 1) in agent.records, "the node takes jobs again")
        agent.finish(ref)
        await until_state(fleet, submitted.job_id, "COMPLETED")
    assert agent.starts[ref] == 1


async def _is_unknown(fleet: kit.Fleet, job_id: str) -> bool:
    present = await job_agents.job(fleet, job_id)
    return present.allocation.phase == job_pb2.ATTEMPT_PHASE_UNKNOWN


async def test_a_reboot_of_a_node_proves_that_its_job_has_ended_and_it_is_tried_again(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    before = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, before):
        submitted = await submit(fleet)
        await until(lambda: (submitted.job_id, 1) in before.records, "it has started")
    after = JobAgent(
        fleet.addresses,
        registration("r1", incarnation=2, boot_id="11111111-2222-3333-4444-555555555555"),
        run=job_agents.succeeds,
    )
    async with running(after):
        ended = await until_state(fleet, submitted.job_id, "COMPLETED")
    assert ended.attempt == 2
    assert dict(after.starts) == {(submitted.job_id, 2): 1}


async def test_rows_that_were_ended_by_hand_are_released_by_the_sweep_and_told_as_a_fault(
    make_fleet: MakeFleet, postgres_dsn: str
) -> None:
    fleet = make_fleet()
    await fleet.start()
    leader = await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1", cpus=2))
    async with hosts(fleet, agent):
        submitted = await submit(fleet, spec(2))
        ref = (submitted.job_id, 1)
        await until(lambda: ref in agent.records, "it has started")
        async with await AsyncConnection.connect(postgres_dsn) as connection:
            await connection.execute(
                "UPDATE job SET state = 'FAILED', end_time = now() WHERE job_id = %s", (submitted.job_id,)
            )

        async def is_free() -> bool:
            answer = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())
            return bool(answer.total.allocated_cpus == 0)

        await until(is_free, "what it had is free again", seconds=15)
        await until(lambda: ref in agent.stopped, "what runs of it is stopped")
        after = await submit(fleet, spec(2))
        await until(lambda: (after.job_id, 1) in agent.records, "the node is given another")
        assert "ended_jobs_were_not_released" in leader.log()
        assert await _findings(fleet) == []


async def test_an_audit_hears_agents_and_tells_what_it_cannot_know(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        await until(lambda: (submitted.job_id, 1) in agent.records, "it has started")
        # A command that nobody knows of, and an agent that does not hear that it must end.
        agent.is_hearing_jobs = False
        stranger = (str(uuid.uuid4()), 1)
        agent.report(stranger, job_pb2.ATTEMPT_PHASE_STARTED)
        first = await until(lambda: _of_rule(fleet, "RUNS_UNALLOCATED"), "it is found")
        assert first.verdict in ("IN_FLIGHT", "DEFINITE") and stranger[0] in first.subject

        async def is_settled() -> bool:
            found = await _of_rule(fleet, "RUNS_UNALLOCATED")
            return found is not None and found.verdict == "DEFINITE"

        await until(is_settled, "it is certain")
        agent.may_connect.clear()
        agent.cut()
        silent = await until(lambda: _of_rule(fleet, "NODE_SILENT"), "nobody can tell", seconds=15)
        assert silent.verdict == "UNKNOWN" and submitted.job_id in silent.subject
        assert await _of_rule(fleet, "RUNS_UNALLOCATED") is None


async def _of_rule(fleet: kit.Fleet, rule: str) -> wire.AuditFinding | None:
    answer = await ask(fleet, "AuditAllocations", wire.AuditAllocationsRequest())
    assert rule in answer.rules
    return next((finding for finding in answer.findings if finding.rule == rule), None)
