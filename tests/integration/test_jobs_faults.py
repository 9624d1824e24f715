"""The leader dies, is frozen, is overtaken; Postgres goes away: no job is lost, and none is run twice."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, LiteralString

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


@pytest.mark.parametrize("kind", ["submits", "allocations", "ends"])
async def test_a_leader_frozen_inside_a_transaction_holds_up_no_successor_and_commits_nothing_afterwards(
    make_fleet: MakeFleet, postgres_dsn: str, tmp_path: Path, kind: str
) -> None:
    armed = tmp_path / "armed"
    fleet = make_fleet(LEASEHOLD_TEST_CRASH=f"inside {kind} {armed}")
    first = fleet.members[0]
    first.program = CRASHING
    await fleet.start()
    await job_agents.ready(fleet)
    second = fleet.add()
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.succeeds)
    async with hosts(fleet, agent):
        second.start()
        armed.touch()
        submitting = asyncio.create_task(_submit_patiently(fleet, "meanwhile"))
        await until(lambda: _is_frozen(first), "the first leader freezes itself")
        [backend] = await _rows(postgres_dsn, _OPEN_TRANSACTIONS)

        successor = await job_agents.ready(fleet, seconds=20)
        assert successor is second
        assert successor.logged_at("jobs_known") - successor.logged_at("leading") < 5.0
        assert backend not in await _rows(postgres_dsn, _OPEN_TRANSACTIONS)
        submitted = await submitting
        await until_state(fleet, submitted.job_id, "COMPLETED")
        await until(lambda: not agent.records, "its end may be forgotten")

        before = await _rows(postgres_dsn, _LEDGER)
        first.thaw()
        await until(lambda: "reign_ended" in first.log(), "the first one knows that it leads no more")
        with pytest.raises(errors.Unavailable):
            await submit(fleet, at=first)
        assert await _rows(postgres_dsn, _LEDGER) == before
        assert [job.job_id for job in await _jobs(fleet)] == [submitted.job_id]
        assert dict(agent.starts) == {(submitted.job_id, 1): 1}
        assert await _findings(fleet) == []


#: Of flushers: who has written, and neither commits nor goes on.
_OPEN_TRANSACTIONS = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'leasehold-jobs %'
        AND state = 'idle in transaction' AND backend_xid IS NOT NULL
"""
_LEDGER = """
    SELECT j.job_id, j.state, j.attempt, a.alloc_seq, a.release_seq, a.epoch, f.generation, f.revision,
        f.flush_seq, f.batch_id
    FROM job_fence AS f
    LEFT JOIN job AS j ON true
    LEFT JOIN resource_allocation AS a USING (job_id)
    ORDER BY j.job_id, a.attempt
"""


async def _rows(dsn: str, statement: LiteralString) -> list[Any]:
    async with await AsyncConnection.connect(dsn) as connection:
        return await (await connection.execute(statement)).fetchall()


def _is_frozen(member: kit.AllocatorProcess) -> bool:
    # After the command, which may have blanks and parentheses: the state.
    return Path(f"/proc/{member.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize(
    ("seconds", "is_frozen"),
    [
        (15.0, True),
        pytest.param(60.0, True, marks=pytest.mark.soak),
        pytest.param(60.0, False, marks=pytest.mark.soak),
    ],
)
async def test_postgres_away_for_long_is_told_clearly_what_runs_goes_on_and_all_is_committed_afterwards(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer, seconds: float, is_frozen: bool
) -> None:
    fleet = make_fleet(dsn=own_postgres.dsn)
    await fleet.start()
    leader = await job_agents.ready(fleet)
    agent = JobAgent(fleet.addresses, registration("r1", cpus=16))
    async with hosts(fleet, agent):
        ending, failing, lasting = [(await submit(fleet)).job_id for _ in range(3)]
        for job_id in (ending, failing, lasting):
            await until(lambda ref=(job_id, 1): ref in agent.records, "it has started")  # type: ignore[misc]
        connections = agent.connections

        await asyncio.to_thread(own_postgres.freeze if is_frozen else own_postgres.kill)
        agent.finish((ending, 1))
        agent.finish((failing, 1), job_agents.FAILED)
        # Clients whose requests come again under their ids, and go on doing so until they are answered.
        patient = [
            asyncio.create_task(_submit_patiently(fleet, f"patient-{number}", seconds=seconds + 60))
            for number in range(5)
        ]
        until_then, told = asyncio.get_running_loop().time() + seconds, 0
        while asyncio.get_running_loop().time() < until_then:
            with pytest.raises(errors.PostgresUnavailable) as caught:
                await submit(fleet, request_id="meanwhile", at=leader)
            assert caught.value.retry_after_seconds is not None
            told += 1
            for job_id in (ending, failing, lasting):
                assert (await job_agents.job(fleet, job_id, at=leader)).state == job_pb2.JOB_STATE_RUNNING
            await asyncio.sleep(caught.value.retry_after_seconds)
        # Most are refused at once, rather than after a wait for Postgres.
        assert told > seconds / 3
        assert not any(each.done() for each in patient)
        assert {(ending, 1), (failing, 1), (lasting, 1)} == set(agent.records)
        await asyncio.to_thread(own_postgres.thaw if is_frozen else own_postgres.start)

        await until_state(fleet, ending, "COMPLETED")
        await until_state(fleet, failing, "FAILED")
        later = [await each for each in patient]
        assert len({each.job_id for each in later}) == len(patient)
        for each in later:
            await until(lambda ref=(each.job_id, 1): ref in agent.records, "it has started")  # type: ignore[misc]
        for job_id in (lasting, *(each.job_id for each in later)):
            agent.finish((job_id, 1))
            await until_state(fleet, job_id, "COMPLETED")
        # One of them may have been committed with nobody to hear of it: under its id it is found again.
        meanwhile = await _submit_patiently(fleet, "meanwhile")
        expected = {ending, failing, lasting, meanwhile.job_id, *(each.job_id for each in later)}
        assert {job.job_id for job in await _jobs(fleet)} == expected
        await until(lambda: (meanwhile.job_id, 1) in agent.records, "it has started")
        assert set(agent.starts.values()) == {1}
        await until(lambda: set(agent.records) == {(meanwhile.job_id, 1)}, "ends may be forgotten")
        assert await _findings(fleet) == []
        assert leader.is_running and await fleet.leader() is leader
        assert agent.connections == connections


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
