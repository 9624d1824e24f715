"""Jobs and allocations of the client library against a made-up JobService behind a real gRPC server."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import fake_jobs
import pytest
from leasehold import client
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.job import model

SPEC = client.job_spec("encode", cpus=2, memory_gb=4)


@pytest.fixture
def fake() -> fake_jobs.FakeJobs:
    return fake_jobs.FakeJobs()


@pytest.fixture
def leasehold(fake: fake_jobs.FakeJobs) -> Iterator[client.Client]:
    with fake_jobs.serve(fake) as addr, client.connect_blocking(addr) as made:
        yield made


def test_a_job_is_submitted_read_cancelled_and_waited_for(
    fake: fake_jobs.FakeJobs, leasehold: client.Client
) -> None:
    fake.is_placing = False
    job = leasehold.jobs.submit(SPEC)
    assert (job.state, job.spec) == (model.JobState.PENDING, SPEC)
    assert leasehold.jobs.get(job.job_id) == job
    assert leasehold.jobs.explain(job.job_id).place_in_line == 3
    assert leasehold.jobs.rehearse(SPEC).line_length == 12

    states = []
    for seen in leasehold.jobs.watch(job.job_id):
        states.append(seen.state.value)
        if seen.state is model.JobState.PENDING:
            fake.move(job.job_id, "RUNNING")
        elif seen.state is model.JobState.RUNNING:
            fake.end(job.job_id)

    assert states == ["PENDING", "RUNNING", "COMPLETED"]
    assert leasehold.jobs.wait(job.job_id).outcome == model.Outcome(cause=model.EndCause.SUCCEEDED, exit_code=0)
    assert leasehold.jobs.cancel(job.job_id).state is model.JobState.COMPLETED
    assert leasehold.jobs.utilization()["total"]["cpus_percent"] == 25.0


def test_a_wait_that_takes_too_long_says_so(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    job = leasehold.jobs.submit(SPEC)

    with pytest.raises(errors.DeadlineExceeded):
        leasehold.jobs.wait(job.job_id, timeout_seconds=0.05)


def test_a_batch_goes_on_after_cuts_with_the_same_ids(
    fake: fake_jobs.FakeJobs, leasehold: client.Client
) -> None:
    fake.cuts = [1, 3]
    verdicts = list(leasehold.jobs.submit_many([SPEC] * 4500, request_id="batch-1"))

    assert len({each.job_id for each in verdicts}) == 4500
    assert len(fake.jobs) == 4500
    asked = fake.asked(wire.SubmitJobsRequest)
    assert len(asked) > 5
    assert {each.request_id for each in asked} == {"batch-1"}
    assert {each.chunk for each in asked} == {1, 2, 3, 4, 5}


def test_each_job_of_a_batch_has_a_verdict(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    large = client.job_spec("encode", cpus=64, memory_gb=4)
    good, refused = leasehold.jobs.submit_many([SPEC, large])

    assert (good.job_id != "", good.error) == (True, None)
    assert refused.job_id == ""
    assert isinstance(refused.error, errors.InvalidArgument)
    assert refused.error.field == "required_cpus"


def test_a_batch_that_is_refused_as_a_whole_raises(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    fake.failure = errors.RequestIdReused("another batch had this id")

    with pytest.raises(errors.RequestIdReused):
        list(leasehold.jobs.submit_many([SPEC]))


def test_a_log_goes_on_after_a_cut_where_it_was(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    job = leasehold.jobs.submit(SPEC)
    fake.cuts_logs = 1

    assert b"".join(leasehold.jobs.log(job.job_id, is_following=True)) == b"one\ntwo\n"
    assert [each.cursor for each in fake.asked(wire.FollowJobLogRequest)] == ["", "4"]


def test_jobs_are_listed_page_by_page(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    ids = [leasehold.jobs.submit(SPEC).job_id for _ in range(5)]

    assert [each.job_id for each in leasehold.jobs.list(page_size=2)] == ids[::-1]
    assert list(leasehold.jobs.list(states=[model.JobState.FAILED])) == []


def test_an_allocation_is_held_renewed_and_given_back(
    fake: fake_jobs.FakeJobs, leasehold: client.Client
) -> None:
    fake.ttl_seconds = 0.3
    with leasehold.jobs.allocation(cpus=2, memory="4GB", wait_seconds=5) as held:
        assert (held.node, held.attempt, held.is_held) == (fake_jobs.NODE, 1, True)
        fake.until(lambda: len(fake.asked(wire.RenewAllocationRequest)) >= 3)
        held.check()

    (release,) = fake.asked(wire.ReleaseAllocationRequest)
    assert (release.job_id, release.is_failed) == (fake.only(), False)


def test_work_that_fails_is_told_at_the_release(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    with pytest.raises(ValueError, match="broken"), leasehold.jobs.allocation(cpus=1, memory_gb=1):
        raise ValueError("broken")

    (release,) = fake.asked(wire.ReleaseAllocationRequest)
    assert (release.is_failed, release.detail) == (True, "ValueError: broken")


def test_where_there_is_no_room_in_time_nothing_runs(
    fake: fake_jobs.FakeJobs, leasehold: client.Client
) -> None:
    fake.is_placing = False

    with pytest.raises(errors.NotPlaced), leasehold.jobs.allocation(cpus=1, memory_gb=1):
        raise AssertionError("it ran")


@pytest.mark.parametrize("how", ["refused", "silent", "cancelled"])
def test_work_whose_allocation_lapsed_is_interrupted(
    fake: fake_jobs.FakeJobs, leasehold: client.Client, how: str
) -> None:
    fake.ttl_seconds = 0.3
    told = threading.Event()

    def work() -> None:
        with leasehold.jobs.allocation(cpus=1, memory_gb=1, on_lapse=told.set) as held:
            if how == "refused":
                fake.renew_failure = errors.AllocationLapsed("it was given up")
            elif how == "silent":
                fake.renew_failure = errors.Unavailable("no leader")
            else:
                fake.is_cancel_requested = True
            fake.until(lambda: not held.is_held)
            fake.until(lambda: False)

    with pytest.raises(errors.AllocationLapsed, match=fake.only() if fake.jobs else "allocation of job"):
        work()
    assert told.is_set()


def test_time_in_line_does_not_count_as_held(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    fake.ttl_seconds, fake.acquire_seconds = 0.6, 0.7
    with leasehold.jobs.allocation(cpus=1, memory_gb=1) as held:
        # Counted from the send of the acquire, it would have lapsed already.
        assert held.is_held
        assert len(fake.asked(wire.RenewAllocationRequest)) >= 1


def test_a_decorated_function_holds_an_allocation(fake: fake_jobs.FakeJobs, leasehold: client.Client) -> None:
    @client.allocated(cpus=2, memory_gb=4, addresses=list(leasehold.addresses))
    def task(number: int) -> tuple[int, str]:
        return number + 1, client.current_allocation().node

    assert task(1) == (2, fake_jobs.NODE)
    assert len(fake.asked(wire.ReleaseAllocationRequest)) == 1
    with pytest.raises(errors.FailedPrecondition):
        client.current_allocation()


def test_what_can_never_be_right_is_told_where_it_is_written() -> None:
    with pytest.raises(errors.InvalidArgument):
        client.allocated(cpus=0, memory_gb=4)


async def test_asyncio_has_all_of_it(fake: fake_jobs.FakeJobs) -> None:
    with fake_jobs.serve(fake) as addr:
        async with client.connect(addr) as leasehold:
            job = await leasehold.jobs.submit(SPEC)
            fake.end(job.job_id)
            assert (await leasehold.jobs.wait(job.job_id)).state is model.JobState.COMPLETED
            verdicts = [each async for each in leasehold.jobs.submit_many([SPEC] * 1500)]
            assert len({each.job_id for each in verdicts}) == 1500
            assert len([each async for each in leasehold.jobs.list()]) == 1501
            assert [each.state async for each in leasehold.jobs.watch(job.job_id)] == [model.JobState.COMPLETED]
            async with leasehold.jobs.allocation(cpus=1, memory_gb=1) as held:
                assert held.node == fake_jobs.NODE


async def test_a_task_whose_allocation_lapsed_is_cancelled(fake: fake_jobs.FakeJobs) -> None:
    fake.ttl_seconds = 0.3

    async def hold(leasehold: Any) -> None:
        async with leasehold.jobs.allocation(cpus=1, memory_gb=1):
            fake.renew_failure = errors.AllocationLapsed("it was given up")
            await asyncio.Event().wait()

    with fake_jobs.serve(fake) as addr:
        async with client.connect(addr) as leasehold:
            with pytest.raises(errors.AllocationLapsed, match="given up"):
                await asyncio.wait_for(hold(leasehold), 10)
            assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
