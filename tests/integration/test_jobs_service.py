"""JobService of a real allocator on real etcd and Postgres, with agents that pretend to run jobs."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import allocator_kit as kit
import grpc
import job_agents
import pytest
from allocator_kit import until
from google.protobuf import duration_pb2
from job_agents import GIB, JobAgent, ask, job, registration, spec, submit, until_state
from leasehold.api.common.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from leasehold.api.job.v1 import job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from node_agents import running
from psycopg import AsyncConnection

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def hosts(fleet: kit.Fleet, *agents: JobAgent) -> AsyncIterator[None]:
    """Agents whose nodes take jobs."""
    async with running(*agents):
        for agent in agents:
            await job_agents.until_capacity(fleet, agent.name)
        yield


@pytest.fixture
async def fleet(make_fleet: MakeFleet) -> kit.Fleet:
    """One allocator that takes jobs."""
    made = make_fleet()
    await made.start()
    await job_agents.ready(made)
    return made


async def test_a_job_is_placed_run_and_completed_and_gives_back_what_it_had(
    fleet: kit.Fleet, postgres_dsn: str
) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.never_ends)
    async with hosts(fleet, agent):
        asked = spec(3, 2, parameters={"frame": "7"}, name="frame 7", max_run=duration_pb2.Duration(seconds=60))
        submitted = await submit(fleet, asked)
        ref = (submitted.job_id, 1)
        await until(lambda: ref in agent.assignments, "it is assigned")
        assigned = agent.assignments[ref]
        assert (assigned.template, dict(assigned.parameters), assigned.cpus, assigned.name) == (
            "render",
            {"frame": "7"},
            3,
            "frame 7",
        )
        assert (assigned.memory_bytes, assigned.max_run.seconds) == (2 * GIB, 60)

        present = await until_state(fleet, submitted.job_id, "RUNNING")
        assert (present.allocation.node, present.allocation.allocated_cpus, present.attempt) == ("r1", 3, 1)
        used = (await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())).total
        assert (used.allocated_cpus, used.total_cpus, used.cpus_percent) == (3, 8, 37.5)
        assert await _sum_of_cpus(postgres_dsn) == 3

        agent.finish(ref)
        ended = await until_state(fleet, submitted.job_id, "COMPLETED")
        assert ended.outcome.cause == job_pb2.END_CAUSE_SUCCEEDED
        assert ended.outcome.HasField("exit_code") and ended.outcome.exit_code == 0
        assert ended.allocation.is_released
        await until(lambda: ref in agent.forgotten, "the agent may forget it")
        assert await _sum_of_cpus(postgres_dsn) == 0
        assert agent.starts[ref] == 1
        report = await ask(fleet, "AuditAllocations", wire.AuditAllocationsRequest())
        assert list(report.findings) == [] and report.rules and report.flush_sequence > 0


async def _sum_of_cpus(dsn: str) -> int:
    async with await AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute(
            "SELECT coalesce(sum(allocated_cpus), 0) FROM resource_allocation WHERE NOT released"
        )
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


async def test_a_job_that_fails_is_tried_again_as_its_policy_says_and_then_failed(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"), run=lambda _: job_agents.FAILED)
    policy = job_pb2.RetryPolicy(max_attempts=3, initial_backoff=duration_pb2.Duration(nanos=50_000_000))
    async with hosts(fleet, agent):
        submitted = await submit(fleet, spec(retry=policy))
        ended = await until_state(fleet, submitted.job_id, "FAILED")
    assert ended.attempt == 3
    assert ended.outcome.exit_code == 3
    assert dict(agent.starts) == {(submitted.job_id, attempt): 1 for attempt in (1, 2, 3)}


async def test_a_job_that_its_hosts_template_refuses_fails_at_once_with_the_reason(fleet: kit.Fleet) -> None:
    refused = job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_REFUSED, detail="parameters.frame: is missing")
    agent = JobAgent(fleet.addresses, registration("r1"), run=lambda _: refused)
    async with hosts(fleet, agent):
        submitted = await submit(fleet, spec(retry=job_pb2.RetryPolicy(max_attempts=5)))
        ended = await until_state(fleet, submitted.job_id, "FAILED")
    assert (ended.attempt, ended.outcome) == (1, refused)


async def test_a_pending_job_is_cancelled_at_once_and_a_running_one_by_its_agent(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    async with hosts(fleet, agent):
        first = await submit(fleet, spec(4))
        await until_state(fleet, first.job_id, "RUNNING")
        second = await submit(fleet, spec(4))
        answer = await ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=second.job_id))
        assert answer.job.state == job_pb2.JOB_STATE_CANCELLED
        assert (second.job_id, 1) not in agent.assignments

        await until(lambda: agent.running, "the first has started")
        answer = await ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=first.job_id))
        assert answer.job.is_cancel_requested
        ended = await until_state(fleet, first.job_id, "CANCELLED")
        assert ended.outcome.cause == job_pb2.END_CAUSE_CANCELLED
        again = await ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=first.job_id))
        assert again.job.state == job_pb2.JOB_STATE_CANCELLED
    assert agent.stopped == [(first.job_id, 1)]


async def test_the_same_request_id_gives_the_same_job_and_another_job_under_it_is_refused(
    fleet: kit.Fleet,
) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.succeeds)
    async with hosts(fleet, agent):
        request_id = uuid.uuid4().hex
        answers = await asyncio.gather(*(submit(fleet, spec(), request_id=request_id) for _ in range(8)))
        assert len({answer.job_id for answer in answers}) == 1
        await until_state(fleet, answers[0].job_id, "COMPLETED")
        assert (await submit(fleet, spec(), request_id=request_id)).job_id == answers[0].job_id
        with pytest.raises(errors.RequestIdReused):
            await submit(fleet, spec(2), request_id=request_id)
        listed = await ask(fleet, "ListJobs", wire.ListJobsRequest())
        assert [each.job_id for each in listed.jobs] == [answers[0].job_id]


async def _batch(fleet: kit.Fleet, *chunks: wire.SubmitJobsRequest) -> list[wire.SubmitJobsResponse]:
    stub = wire_grpc.JobServiceStub(fleet.channel(await fleet.leader()))
    call = stub.SubmitJobs(iter(chunks), timeout=20.0)
    answers = []
    while (answer := await kit.read(call)) is not grpc.aio.EOF:
        answers.append(answer)
    return answers


def _chunk(number: int, *specs: job_pb2.JobSpec, request_id: str, **fields: Any) -> wire.SubmitJobsRequest:
    return wire.SubmitJobsRequest(request_id=request_id, chunk=number, specs=specs, **fields)


async def test_a_batch_gives_each_job_a_verdict_in_order_and_a_repeat_the_same_ones(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"), run=job_agents.succeeds)
    async with hosts(fleet, agent):
        request_id = uuid.uuid4().hex
        chunks = [
            _chunk(1, *(spec() for _ in range(200)), request_id=request_id),
            _chunk(2, spec(), spec(0), spec(queue="none"), spec(9), spec(), request_id=request_id),
            _chunk(3, spec(), spec(0), request_id=request_id, is_all_or_none=True),
            _chunk(4, spec(), spec(queue="none"), request_id=request_id, is_all_or_none=True),
        ]
        answers = await _batch(fleet, *chunks)
        assert [answer.chunk for answer in answers] == [1, 2, 3, 4]
        assert all(verdict.job_id for verdict in answers[0].verdicts)
        mixed = answers[1].verdicts
        assert [bool(verdict.job_id) for verdict in mixed] == [True, False, False, False, True]
        assert [verdict.field for verdict in mixed[1:4]] == ["required_cpus", "queue", "required_cpus"]
        assert [verdict.reason for verdict in mixed[1:4]] == [
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "INVALID_ARGUMENT",
        ]
        for answer in answers[2:]:
            assert [verdict.job_id for verdict in answer.verdicts] == ["", ""]
            assert all(verdict.reason for verdict in answer.verdicts)
        for verdict in (*answers[0].verdicts, mixed[0], mixed[4]):
            await until_state(fleet, verdict.job_id, "COMPLETED")

        assert await _batch(fleet, *chunks) == answers
        assert await _batch(fleet, *chunks[1:]) == answers[1:]
        assert len(agent.starts) == 202
        assert set(agent.starts.values()) == {1}


@pytest.mark.parametrize(
    ("chunks", "named"),
    [
        ([wire.SubmitJobsRequest(chunk=1, specs=[spec()])], "request_id"),
        ([wire.SubmitJobsRequest(request_id="a", specs=[spec()])], "chunk"),
        ([wire.SubmitJobsRequest(request_id="a", chunk=1)], "specs"),
        ([wire.SubmitJobsRequest(request_id="a", chunk=1, specs=[spec()] * 1001)], "specs"),
        (
            [
                wire.SubmitJobsRequest(request_id="a", chunk=1, specs=[spec(wait_for_capacity=True)]),
                wire.SubmitJobsRequest(request_id="a", chunk=3, specs=[spec()]),
            ],
            "chunk",
        ),
    ],
)
async def test_what_is_wrong_with_a_batch_is_named(
    fleet: kit.Fleet, chunks: list[wire.SubmitJobsRequest], named: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await _batch(fleet, *chunks)
    assert caught.value.field == named


async def test_bad_input_is_told_at_once_and_names_the_field(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4, memory_gib=8))
    async with hosts(fleet, agent):
        for asked, kind, named in (
            (spec(5), errors.InvalidArgument, "required_cpus"),
            (spec(1, 9), errors.InvalidArgument, "required_memory_bytes"),
            (spec(0), errors.InvalidArgument, "required_cpus"),
            (spec(1, 0), errors.InvalidArgument, "required_memory_bytes"),
            (spec(1, -1), errors.InvalidArgument, "required_memory_bytes"),
            (spec(queue="none"), errors.NotFound, "queue"),
            (spec(template="none"), errors.NotFound, "template"),
            (spec(node_selector={"rack": "none"}), errors.InvalidArgument, "node_selector"),
        ):
            with pytest.raises(kind) as caught:
                await submit(fleet, asked)
            assert caught.value.field == named, asked
        waiting = await submit(fleet, spec(5, wait_for_capacity=True))
        assert (await job(fleet, waiting.job_id)).state == job_pb2.JOB_STATE_PENDING
        for method, request in (
            ("GetJob", wire.GetJobRequest(job_id="7")),
            ("CancelJob", wire.CancelJobRequest(job_id="")),
            ("ExplainJob", wire.ExplainJobRequest(job_id="../x")),
            ("RenewAllocation", wire.RenewAllocationRequest(job_id="7", attempt=1)),
        ):
            with pytest.raises(errors.InvalidArgument) as caught:
                await ask(fleet, method, request)
            assert caught.value.field == "job_id"
        with pytest.raises(errors.NotFound):
            await job(fleet, str(uuid.uuid4()))
        with pytest.raises(errors.NotFound):
            await ask(fleet, "CancelJob", wire.CancelJobRequest(job_id=str(uuid.uuid4())))


async def test_a_dry_run_tells_what_would_happen_and_keeps_nothing(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    async with hosts(fleet, agent):
        request = wire.SubmitJobRequest(spec=spec(4), is_dry_run=True)
        told = (await ask(fleet, "SubmitJob", request)).explanation
        assert told.node == "r1"
        await until_state(fleet, (await submit(fleet, spec(4))).job_id, "RUNNING")
        told = (await ask(fleet, "SubmitJob", request)).explanation
        assert told.node == ""
        assert [(part.nodes, part.reason) for part in told.blocked] == [(1, "LACKS_CPUS")]
        with pytest.raises(errors.InvalidArgument):
            await ask(fleet, "SubmitJob", wire.SubmitJobRequest(spec=spec(5), is_dry_run=True))
        assert len((await ask(fleet, "ListJobs", wire.ListJobsRequest())).jobs) == 1


async def test_a_pending_job_is_explained_with_every_node_under_one_reason(fleet: kit.Fleet) -> None:
    busy = JobAgent(fleet.addresses, registration("r1", cpus=4))
    draining = JobAgent(fleet.addresses, registration("r2", cpus=8))
    small = JobAgent(fleet.addresses, registration("r3", cpus=1))
    async with hosts(fleet, busy, draining, small):
        running_job = await submit(fleet, spec(4, node_selector={}))
        first = await until_state(fleet, running_job.job_id, "RUNNING")
        other = draining if first.allocation.node == "r1" else busy
        other.status.is_draining = True
        other.send(status=other.status)
        await _until_closed(fleet, other.name)
        waiting = await submit(fleet, spec(4))
        told = (await ask(fleet, "ExplainJob", wire.ExplainJobRequest(job_id=waiting.job_id))).explanation
        assert told.state == job_pb2.JOB_STATE_PENDING
        assert sum(part.nodes for part in told.blocked) == 3
        assert {"DRAINING", "TOO_SMALL"} <= {part.reason for part in told.blocked}
        assert (told.place_in_line, told.line_length) == (1, 1)
        assert not told.HasField("estimated_start_time")
        told = (await ask(fleet, "ExplainJob", wire.ExplainJobRequest(job_id=running_job.job_id))).explanation
        assert told.state == job_pb2.JOB_STATE_RUNNING and told.node == first.allocation.node


async def _until_closed(fleet: kit.Fleet, name: str) -> None:
    async def is_closed() -> bool:
        answer = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest(node=name))
        return bool(answer.nodes[0].is_closed)

    await until(is_closed, f"{name} takes no more jobs")


async def test_a_watcher_sees_each_change_and_the_end(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    async with hosts(fleet, agent):
        blocker = await submit(fleet, spec(4))
        await until_state(fleet, blocker.job_id, "RUNNING")
        watched = await submit(fleet, spec(4))
        stub = wire_grpc.JobServiceStub(fleet.channel(await fleet.leader()))
        call = stub.WatchJob(wire.WatchJobRequest(job_id=watched.job_id), timeout=20.0)
        states = [(await kit.read(call)).job.state]
        agent.finish((blocker.job_id, 1))
        await until(lambda: (watched.job_id, 1) in agent.records, "it has started")
        agent.finish((watched.job_id, 1))
        while (answer := await kit.read(call)) is not grpc.aio.EOF:
            states.append(answer.job.state)
    distinct = [state for number, state in enumerate(states) if state not in states[:number]]
    assert [job_pb2.JobState.Name(state) for state in distinct] == [
        "JOB_STATE_PENDING",
        "JOB_STATE_RUNNING",
        "JOB_STATE_COMPLETED",
    ]


async def test_a_log_is_read_from_the_agent_by_the_attempts_name(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"), obey=job_agents.obey_logs(b"frame 7 done\n"))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        await until_state(fleet, submitted.job_id, "RUNNING")
        stub = wire_grpc.JobServiceStub(fleet.channel(await fleet.leader()))
        request = wire.FollowJobLogRequest(job_id=submitted.job_id, tail_lines=7, is_following=True)
        call = stub.FollowJobLog(request, timeout=20.0)
        pieces = []
        while (answer := await kit.read(call)) is not grpc.aio.EOF:
            pieces.append(answer.data)
    assert b"".join(pieces) == b"frame 7 done\n"
    (order,) = agent.orders
    assert order.read_log.worker == f"job-{submitted.job_id}-1"
    assert (order.read_log.tail_lines, order.read_log.wait.seconds) == (7, 5)


async def test_an_external_holder_acquires_renews_and_releases_in_the_same_line(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    outside = job_pb2.JobSpec(required_cpus=4, required_memory_bytes=GIB)
    async with hosts(fleet, agent):
        request = wire.AcquireAllocationRequest(spec=outside, request_id="holder-1")
        held = await ask(fleet, "AcquireAllocation", request)
        assert (held.allocation.node, held.allocation.allocated_cpus, held.ttl.seconds) == ("r1", 4, 30)
        assert (await ask(fleet, "AcquireAllocation", request)).allocation.job_id == held.allocation.job_id
        ref = {"job_id": held.allocation.job_id, "attempt": held.allocation.attempt}
        renewed = await ask(fleet, "RenewAllocation", wire.RenewAllocationRequest(**ref))
        assert (renewed.ttl.seconds, renewed.is_cancel_requested) == (30, False)

        late = wire.AcquireAllocationRequest(
            spec=outside, request_id="holder-2", wait=duration_pb2.Duration(nanos=200_000_000)
        )
        with pytest.raises(errors.NotPlaced):
            await ask(fleet, "AcquireAllocation", late)

        released = await ask(fleet, "ReleaseAllocation", wire.ReleaseAllocationRequest(**ref))
        assert released.job.state == job_pb2.JOB_STATE_COMPLETED
        again = await ask(fleet, "ReleaseAllocation", wire.ReleaseAllocationRequest(**ref))
        assert again.job.state == job_pb2.JOB_STATE_COMPLETED
        with pytest.raises(errors.AllocationLapsed):
            await ask(fleet, "RenewAllocation", wire.RenewAllocationRequest(**ref))
        after = wire.AcquireAllocationRequest(spec=outside, request_id="holder-3")
        assert (await ask(fleet, "AcquireAllocation", after)).allocation.node == "r1"
    assert agent.assignments == {}


async def test_a_holder_that_hangs_up_while_it_waits_holds_nothing_afterwards(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    outside = job_pb2.JobSpec(required_cpus=4, required_memory_bytes=GIB)
    async with hosts(fleet, agent):
        blocker = await submit(fleet, spec(4))
        await until_state(fleet, blocker.job_id, "RUNNING")
        stub = wire_grpc.JobServiceStub(fleet.channel(await fleet.leader()))
        call = stub.AcquireAllocation(
            wire.AcquireAllocationRequest(
                spec=outside, request_id="gone", wait=duration_pb2.Duration(seconds=3600)
            )
        )

        async def pending() -> int:
            answer = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())
            return int(answer.pending_jobs)

        await until(lambda: _equals(pending, 1), "it waits in line")
        call.cancel()
        await until(lambda: _equals(pending, 0), "nobody waits any more")
        agent.finish((blocker.job_id, 1))
        await until_state(fleet, blocker.job_id, "COMPLETED")
        used = (await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())).total
        assert used.allocated_cpus == 0


async def _equals(read: Callable[[], Any], wanted: int) -> bool:
    return bool(await read() == wanted)


async def test_queues_bound_what_their_jobs_have_together(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=8))
    async with hosts(fleet, agent):
        await ask(fleet, "PutQueue", wire.PutQueueRequest(queue=job_pb2.Queue(name="nightly", nominal_cpus=2)))
        first = await submit(fleet, spec(2, queue="nightly"))
        await until_state(fleet, first.job_id, "RUNNING")
        second = await submit(fleet, spec(2, queue="nightly"))
        told = (await ask(fleet, "ExplainJob", wire.ExplainJobRequest(job_id=second.job_id))).explanation
        assert told.held_back_reason == "QUEUE_QUOTA"
        listed = await ask(fleet, "ListQueues", wire.ListQueuesRequest())
        usage = {each.queue.name: each for each in listed.queues}
        assert list(usage) == ["default", "nightly"]
        assert (usage["nightly"].allocated_cpus, usage["nightly"].running_jobs) == (2, 1)
        assert usage["nightly"].pending_jobs == 1
        with pytest.raises(errors.FailedPrecondition):
            await ask(fleet, "DeleteQueue", wire.DeleteQueueRequest(name="nightly"))
        with pytest.raises(errors.FailedPrecondition):
            await ask(fleet, "DeleteQueue", wire.DeleteQueueRequest(name="default"))
        with pytest.raises(errors.NotFound):
            await ask(fleet, "DeleteQueue", wire.DeleteQueueRequest(name="none"))
        agent.finish((first.job_id, 1))
        await until_state(fleet, second.job_id, "RUNNING")
        await until(lambda: (second.job_id, 1) in agent.records, "it has started")
        agent.finish((second.job_id, 1))
        await until_state(fleet, second.job_id, "COMPLETED")
        await ask(fleet, "DeleteQueue", wire.DeleteQueueRequest(name="nightly"))


async def test_pages_of_jobs_are_newest_first_and_miss_none(fleet: kit.Fleet) -> None:
    asked = [await submit(fleet, spec(wait_for_capacity=True)) for _ in range(5)]
    found: list[str] = []
    token = ""
    while True:
        page = await ask(fleet, "ListJobs", wire.ListJobsRequest(page_size=2, page_token=token))
        found.extend(each.job_id for each in page.jobs)
        token = page.next_page_token
        if not token:
            break
    assert found == [each.job_id for each in reversed(asked)]
    for token in ("x", "1/7", "-1/" + asked[0].job_id):
        with pytest.raises(errors.InvalidArgument) as caught:
            await ask(fleet, "ListJobs", wire.ListJobsRequest(page_token=token))
        assert caught.value.field == "page_token"


async def test_an_operators_word_releases_what_a_silent_node_has(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, agent):
        submitted = await submit(fleet)
        await until_state(fleet, submitted.job_id, "RUNNING")
        request = wire.ForceReleaseAllocationRequest(job_id=submitted.job_id, attempt=1)
        with pytest.raises(errors.InvalidArgument) as caught:
            await ask(fleet, "ForceReleaseAllocation", request)
        assert caught.value.field == "cause"
        request.cause = "the host was scrapped"
        answer = await ask(fleet, "ForceReleaseAllocation", request)
        assert answer.job.allocation.is_released or answer.job.state == job_pb2.JOB_STATE_PENDING
        await until(lambda: (submitted.job_id, 1) in agent.stopped, "what may run is stopped")


async def test_a_word_for_a_silence_needs_a_cause_and_changes_nothing_where_nothing_is_held_back(
    fleet: kit.Fleet,
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await ask(fleet, "AcknowledgeSilence", wire.AcknowledgeSilenceRequest(cause=" "))
    assert caught.value.field == "cause"
    answer = await ask(fleet, "AcknowledgeSilence", wire.AcknowledgeSilenceRequest(cause="the rack burnt"))
    assert (answer.was_held_back, answer.given_up) == (False, 0)
    assert (await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())).held_back_cause == ""


async def test_what_is_held_back_is_told_by_the_next_leader_which_takes_no_word_for_it_yet(
    fleet: kit.Fleet, postgres_dsn: str
) -> None:
    fleet.members[0].kill()
    async with await AsyncConnection.connect(postgres_dsn) as hand:
        await hand.execute("UPDATE job_fence SET is_breaker_open = true")
    fleet.members[0].start()
    await job_agents.ready(fleet)
    told = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())
    assert told.held_back_cause == "it was open when this leader began"
    with pytest.raises(errors.FailedPrecondition) as caught:
        await ask(fleet, "AcknowledgeSilence", wire.AcknowledgeSilenceRequest(cause="the rack burnt"))
    assert caught.value.retry_after_seconds is not None


@pytest.mark.soak
@pytest.mark.timeout(180)
async def test_holders_that_fell_silent_together_are_given_up_on_an_operators_word(
    fleet: kit.Fleet, postgres_dsn: str
) -> None:
    agent = JobAgent(fleet.addresses, registration("r1"))
    async with hosts(fleet, agent):
        for number in range(6):
            request = wire.AcquireAllocationRequest(spec=spec(template=""), request_id=f"h{number}")
            await ask(fleet, "AcquireAllocation", request)

        async def held_back() -> str:
            told = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())
            return str(told.held_back_cause)

        cause = await until(held_back, "reclaims are held back", seconds=120.0)
        assert cause.endswith("of 6 holders lapsed within 60 s")
        # The first to lapse did so one by one, before it was known that most do.
        kept = await _sum_of_cpus(postgres_dsn)
        answer = await ask(fleet, "AcknowledgeSilence", wire.AcknowledgeSilenceRequest(cause="the rack burnt"))
        assert answer.was_held_back and 1 <= answer.given_up <= kept
        # Who is overdue a moment later is judged as ever, and may be given up by now as well.
        assert await _sum_of_cpus(postgres_dsn) <= kept - answer.given_up
        assert await held_back() == ""
    async with await AsyncConnection.connect(postgres_dsn) as seen:
        cursor = await seen.execute(
            "SELECT cause, actor <> '' FROM audit_log WHERE method = 'AcknowledgeSilence'"
        )
        assert await cursor.fetchall() == [("the rack burnt", True)]


async def test_figures_of_jobs_are_told_to_prometheus(fleet: kit.Fleet) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    async with hosts(fleet, agent):
        first = await submit(fleet, spec(3, 2))
        await until_state(fleet, first.job_id, "RUNNING")
        await submit(fleet, spec(3))
        text = await _metrics(fleet)
    for line in (
        'leasehold_node_allocated_cpus{node="r1"} 3',
        'leasehold_node_job_cpus{node="r1"} 4',
        'leasehold_node_allocated_cpus{node=""} 3',
        f'leasehold_node_allocated_memory_bytes{{node="r1"}} {2 * GIB}',
        'leasehold_jobs{state="pending"} 1',
        'leasehold_jobs{state="running"} 1',
        "leasehold_job_attempts_unknown 0",
        "leasehold_job_ended_unreleased_total 0",
    ):
        assert line in text
    assert "leasehold_job_flush_changes_count" in text and "leasehold_job_flush_seconds_count" in text


async def _metrics(fleet: kit.Fleet) -> str:
    stub = metrics_service_pb2_grpc.MetricsServiceStub(fleet.channel(await fleet.leader()))
    answer = await stub.ExposeMetrics(metrics_service_pb2.ExposeMetricsRequest(), timeout=5.0)
    return str(answer.text)
