"""What every store of jobs does: one suite over PostgreSQL and the twin."""

import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.job.changes import Verdict
from leasehold.core.placement import model as placement
from leasehold.postgres import job_memory, job_port, job_store, store

EPOCH = epochs.Epoch(1, 10, 0xCDF818194E3A8C32)
NEXT_EPOCH = epochs.Epoch(1, 11, 0xCDF818194E3A8C32)
GIB = 2**30
SUCCEEDED = model.Outcome(cause=model.EndCause.SUCCEEDED, exit_code=0)


@pytest.fixture(params=["memory", "postgres"])
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[job_port.JobStore]:
    async with contextlib.AsyncExitStack() as stack:
        opened: job_port.JobStore
        if request.param == "memory":
            opened = job_memory.MemoryJobStore()
        else:
            dsn = request.getfixturevalue("postgres_dsn")
            schema = await stack.enter_async_context(store.PostgresStore(dsn, deadline_seconds=20.0))
            await schema.migrate()
            opened = await stack.enter_async_context(job_store.PostgresJobStore(dsn, deadline_seconds=20.0))
        await opened.take_over(EPOCH)
        yield opened


def job(number: int, *, cpus: int = 1, gib: int = 1, **fields: Any) -> model.JobRecord:
    spec = model.JobSpec(required=placement.Resources(cpus, gib * GIB), **fields)
    return model.JobRecord(
        job_id=str(uuid.UUID(int=number)),
        spec=spec,
        state=model.JobState.PENDING,
        principal="tests",
        submit_time_seconds=1_900_000_000.0 + number,
    )


def give(
    record: model.JobRecord, *, attempt: int = 1, node: str = "n1", boot: str = "boot-1"
) -> changes.Allocate:
    return changes.Allocate(
        ref=model.AttemptRef(record.job_id, attempt),
        node=node,
        boot_id=boot,
        held=record.spec.required,
        queue=record.spec.queue,
    )


def end(record: model.JobRecord, *, attempt: int = 1, **fields: Any) -> changes.EndAttempt:
    fields = {
        "outcome": SUCCEEDED,
        "next_state": model.JobState.COMPLETED,
        "is_failure": False,
        **fields,
    }
    return changes.EndAttempt(ref=model.AttemptRef(record.job_id, attempt), **fields)


def capacity(cpus: int = 4, gib: int = 16, *, node: str = "n1", boot: str = "boot-1") -> changes.SetCapacity:
    return changes.SetCapacity(node=node, boot_id=boot, declared=placement.Resources(cpus, gib * GIB))


async def flush(ledger: job_port.JobStore, epoch: epochs.Epoch = EPOCH, **kinds: Sequence[Any]) -> Any:
    batch = changes.Batch(batch_id=uuid.uuid4().hex, **{kind: tuple(found) for kind, found in kinds.items()})
    return await ledger.flush(epoch, batch)


async def running(ledger: job_port.JobStore, *records: model.JobRecord) -> None:
    """Submitted, and given an allocation each on n1."""
    await flush(ledger, capacities=[capacity()], submits=[changes.Submit(job=record) for record in records])
    result = await flush(ledger, allocations=[give(record) for record in records])
    assert set(result.allocations) == {Verdict.APPLIED}


async def used(ledger: job_port.JobStore, node: str = "n1") -> changes.Capacity:
    snapshot = await ledger.reload(EPOCH)
    return next(each for each in snapshot.capacities if each.node == node)


async def test_a_new_ledger_has_the_default_queue_and_nothing_else(ledger: job_port.JobStore) -> None:
    snapshot = await ledger.reload(EPOCH)

    assert snapshot.queues == (placement.Queue(name="default"),)
    assert (snapshot.capacities, snapshot.jobs, snapshot.is_breaker_open) == ((), (), False)


async def test_a_job_comes_back_as_it_was_submitted(ledger: job_port.JobStore) -> None:
    wanted = job(
        1,
        name="näme",
        priority=-5,
        node_selector={"rack": "b4"},
        template="transcribe",
        parameters={"input": "a b"},
        max_run_seconds=60.0,
        retry=model.RetryPolicy(max_attempts=3),
        on_lost=model.OnLost.AFTER_FENCE,
        spreading=placement.Spreading.SPREAD,
        wait_for_capacity=True,
    )
    result = await flush(ledger, submits=[changes.Submit(job=wanted)])

    assert result.submits == (Verdict.APPLIED,)
    assert await ledger.get_job(wanted.job_id) == wanted
    assert (await ledger.reload(EPOCH)).jobs == (wanted,)


async def test_an_allocation_is_counted_and_told_with_its_job(ledger: job_port.JobStore) -> None:
    wanted = job(1, cpus=3)
    await running(ledger, wanted)

    found = await ledger.get_job(wanted.job_id)
    assert (found.state, found.attempt) == (model.JobState.RUNNING, 1)
    assert found.allocation is not None
    assert (found.allocation.node, found.allocation.held) == ("n1", wanted.spec.required)
    assert found.allocation.release_seq == 0
    assert (await used(ledger)).used == placement.Resources(3, GIB)


async def test_an_end_releases_and_moves_the_job_in_one(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    await running(ledger, wanted)
    result = await flush(ledger, ends=[end(wanted)])

    found = await ledger.get_job(wanted.job_id)
    assert result.ends == (Verdict.APPLIED,)
    assert (found.state, found.outcome) == (model.JobState.COMPLETED, SUCCEEDED)
    assert found.end_time_seconds is not None
    assert found.allocation is not None
    assert found.allocation.release_seq == result.flush_seq > found.allocation.alloc_seq
    assert (await used(ledger)).used == placement.Resources(0, 0)
    assert (await ledger.reload(EPOCH)).jobs == ()


async def test_an_end_counts_once_and_only_of_the_live_attempt(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    await running(ledger, wanted)

    assert (await flush(ledger, ends=[end(wanted, attempt=2)])).ends == (Verdict.STALE,)
    assert (await flush(ledger, ends=[end(wanted)])).ends == (Verdict.APPLIED,)
    assert (await flush(ledger, ends=[end(wanted)])).ends == (Verdict.STALE,)
    assert (await used(ledger)).used == placement.Resources(0, 0)


async def test_each_attempts_row_is_found_after_the_next_has_begun(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    await running(ledger, wanted)
    await flush(ledger, ends=[end(wanted, next_state=model.JobState.PENDING)])
    await flush(ledger, allocations=[give(wanted, attempt=2)])

    first = await ledger.get_allocation(model.AttemptRef(wanted.job_id, 1))
    second = await ledger.get_allocation(model.AttemptRef(wanted.job_id, 2))

    assert (first.release_seq > 0, second.release_seq) == (True, 0)
    with pytest.raises(errors.NotFound, match="has no attempt 3"):
        await ledger.get_allocation(model.AttemptRef(wanted.job_id, 3))


async def test_a_sound_ledger_has_nothing_to_release(ledger: job_port.JobStore) -> None:
    await running(ledger, job(1))

    assert await ledger.release_ended(EPOCH) == 0


async def test_a_retry_goes_back_in_line_and_gets_the_next_attempt(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    await running(ledger, wanted)
    failed = model.Outcome(cause=model.EndCause.FAILED, exit_code=3, detail="exit code 3")
    await flush(
        ledger,
        ends=[
            end(
                wanted,
                outcome=failed,
                next_state=model.JobState.PENDING,
                is_failure=True,
                not_before_seconds=1_900_000_100.0,
            )
        ],
    )
    waiting = await ledger.get_job(wanted.job_id)
    assert (waiting.state, waiting.failures, waiting.attempt) == (model.JobState.PENDING, 1, 1)
    assert waiting.not_before_seconds == 1_900_000_100.0
    assert waiting.end_time_seconds is None

    stale = await flush(ledger, allocations=[give(wanted, attempt=1)])
    again = await flush(ledger, allocations=[give(wanted, attempt=2)])

    assert (stale.allocations, again.allocations) == ((Verdict.STALE,), (Verdict.APPLIED,))
    assert (await ledger.get_job(wanted.job_id)).not_before_seconds is None


async def test_a_pending_job_is_cancelled_at_once_and_of_a_running_one_the_wish_is_kept(
    ledger: job_port.JobStore,
) -> None:
    waiting, runs = job(1), job(2)
    await running(ledger, runs)
    await flush(ledger, submits=[changes.Submit(job=waiting)])

    wishes = [changes.Cancel(job_id=each.job_id, actor="me") for each in (waiting, runs, job(3))]
    result = await flush(ledger, cancels=wishes)

    assert result.cancels == (Verdict.APPLIED, Verdict.APPLIED, Verdict.STALE)
    assert (await ledger.get_job(waiting.job_id)).state is model.JobState.CANCELLED
    kept = await ledger.get_job(runs.job_id)
    assert (kept.state, kept.is_cancel_requested) == (model.JobState.RUNNING, True)


async def test_a_node_is_never_given_more_than_it_has_and_the_others_of_the_batch_go_on(
    ledger: job_port.JobStore,
) -> None:
    jobs = [job(number, cpus=3) for number in (1, 2, 3)]
    await flush(
        ledger,
        capacities=[capacity(), capacity(node="n2")],
        submits=[changes.Submit(job=each) for each in jobs],
    )

    result = await flush(ledger, allocations=[give(jobs[0]), give(jobs[1]), give(jobs[2], node="n2")])

    assert sorted(result.allocations) == [Verdict.APPLIED, Verdict.APPLIED, Verdict.POISON]
    assert result.allocations[2] is Verdict.APPLIED
    assert (await used(ledger)).used.cpus == 3


async def test_an_allocation_on_an_unknown_node_or_another_boot_changes_nothing(
    ledger: job_port.JobStore,
) -> None:
    jobs = [job(1), job(2)]
    await flush(ledger, capacities=[capacity()], submits=[changes.Submit(job=each) for each in jobs])

    result = await flush(ledger, allocations=[give(jobs[0], node="n9"), give(jobs[1], boot="boot-2")])

    assert result.allocations == (Verdict.STALE, Verdict.STALE)
    assert {each.state for each in (await ledger.reload(EPOCH)).jobs} == {model.JobState.PENDING}


async def test_a_total_that_shrinks_takes_effect_as_jobs_release(ledger: job_port.JobStore) -> None:
    jobs = [job(number) for number in (1, 2, 3)]
    await running(ledger, *jobs)
    await flush(ledger, capacities=[capacity(cpus=1)])
    shrunk = await used(ledger)
    assert (shrunk.declared.cpus, shrunk.gated.cpus, shrunk.used.cpus) == (1, 3, 3)

    await flush(ledger, ends=[end(jobs[0])])
    assert (await used(ledger)).gated.cpus == 2
    await flush(ledger, ends=[end(jobs[1]), end(jobs[2])])
    assert (await used(ledger)).gated.cpus == 1


async def test_what_is_released_can_be_given_out_in_the_same_batch(ledger: job_port.JobStore) -> None:
    first, second = job(1, cpus=4), job(2, cpus=4)
    await running(ledger, first)
    await flush(ledger, submits=[changes.Submit(job=second)])

    result = await flush(ledger, ends=[end(first)], allocations=[give(second)])

    assert (result.ends, result.allocations) == ((Verdict.APPLIED,), (Verdict.APPLIED,))


async def test_a_job_can_be_submitted_and_given_an_allocation_in_one_batch(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    result = await flush(
        ledger,
        capacities=[capacity()],
        submits=[changes.Submit(job=wanted)],
        allocations=[give(wanted)],
    )
    assert (result.submits, result.allocations) == ((Verdict.APPLIED,), (Verdict.APPLIED,))


async def test_the_first_answer_is_kept_and_a_repeat_submits_nothing(ledger: job_port.JobStore) -> None:
    first, second = job(1), job(2)
    key = changes.RequestKey("tests", "request-1", 1)

    def kept(record: model.JobRecord, digest: bytes) -> changes.KeepAnswer:
        return changes.KeepAnswer(
            key=key,
            payload_sha256=digest,
            answer={"job_ids": [record.job_id]},
            job_ids=(record.job_id,),
        )

    await flush(ledger, submits=[changes.Submit(job=first)], answers=[kept(first, b"a" * 32)])
    result = await flush(
        ledger,
        submits=[changes.Submit(job=second), changes.Submit(job=job(3))],
        answers=[kept(second, b"b" * 32)],
    )

    assert result.submits == (Verdict.STALE, Verdict.APPLIED)
    assert result.kept_before[key].answer == {"job_ids": [first.job_id]}
    assert (await ledger.kept_answers([key]))[key].payload_sha256 == b"a" * 32
    with pytest.raises(errors.NotFound):
        await ledger.get_job(second.job_id)


async def test_a_repeat_submits_nothing_though_another_change_of_its_batch_is_poison(
    ledger: job_port.JobStore,
) -> None:
    too_large = job(9, cpus=9)
    again = [job(number) for number in range(2, 6)]
    key = changes.RequestKey("tests", "request-1", 1)

    def kept(records: Sequence[model.JobRecord]) -> changes.KeepAnswer:
        ids = tuple(record.job_id for record in records)
        return changes.KeepAnswer(key=key, payload_sha256=b"a" * 32, answer={"job_ids": list(ids)}, job_ids=ids)

    await flush(
        ledger, capacities=[capacity()], submits=[changes.Submit(job=too_large)], answers=[kept([job(1)])]
    )
    result = await flush(
        ledger,
        submits=[changes.Submit(job=each) for each in again],
        allocations=[give(too_large)],
        answers=[kept(again)],
    )

    assert result.allocations == (Verdict.POISON,)
    assert result.submits == (Verdict.STALE,) * 4
    assert [each.job_id for each in (await ledger.reload(EPOCH)).jobs] == [too_large.job_id]


async def test_queues_are_put_and_deleted_unless_a_job_is_in_them(ledger: job_port.JobStore) -> None:
    gpu = placement.Queue(name="gpu", nominal_cpus=8)
    await flush(ledger, queues=[changes.PutQueue(queue=gpu, actor="me")])
    await flush(ledger, submits=[changes.Submit(job=job(1, queue="gpu"))])
    assert gpu in (await ledger.reload(EPOCH)).queues

    refused = await flush(ledger, queues=[changes.DeleteQueue(name="gpu", actor="me")])
    await flush(ledger, cancels=[changes.Cancel(job_id=job(1).job_id, actor="me")])
    deleted = await flush(ledger, queues=[changes.DeleteQueue(name="gpu", actor="me")])

    assert (refused.queues, deleted.queues) == ((Verdict.STALE,), (Verdict.APPLIED,))
    assert gpu not in (await ledger.reload(EPOCH)).queues


async def test_a_lower_epoch_writes_and_reads_no_more(ledger: job_port.JobStore) -> None:
    await flush(ledger, submits=[changes.Submit(job=job(1))])
    taken = await ledger.take_over(NEXT_EPOCH)

    assert len(taken.jobs) == 1
    with pytest.raises(errors.StaleEpoch):
        await flush(ledger, submits=[changes.Submit(job=job(2))])
    with pytest.raises(errors.StaleEpoch):
        await ledger.take_over(EPOCH)
    with pytest.raises(errors.StaleEpoch):
        await ledger.reload(EPOCH)
    assert (await flush(ledger, NEXT_EPOCH)).flush_seq > taken.flush_seq


async def test_whether_a_batch_was_flushed_is_told_by_its_id(ledger: job_port.JobStore) -> None:
    batch = changes.Batch(batch_id="batch-1", submits=(changes.Submit(job=job(1)),))
    await ledger.flush(EPOCH, batch)

    assert await ledger.was_flushed(EPOCH, "batch-1")
    assert not await ledger.was_flushed(EPOCH, "batch-2")
    await flush(ledger)


async def test_lists_are_newest_first_by_page_and_filter(ledger: job_port.JobStore) -> None:
    jobs = [job(number) for number in range(1, 6)]
    await running(ledger, *jobs[:2])
    await flush(ledger, submits=[changes.Submit(job=each) for each in jobs[2:]])

    first = await ledger.list_jobs(job_port.JobFilter(), page_size=3, before=None)
    last = first.items[-1]
    second = await ledger.list_jobs(
        job_port.JobFilter(), page_size=3, before=(last.submit_time_seconds, last.job_id)
    )
    runs = await ledger.list_jobs(
        job_port.JobFilter(states=frozenset({model.JobState.RUNNING}), node="n1", queue="default"),
        page_size=10,
        before=None,
    )

    assert [each.job_id for each in first.items] == [each.job_id for each in jobs[:1:-1]]
    assert (first.has_more, second.has_more) == (True, False)
    assert [each.job_id for each in second.items] == [jobs[1].job_id, jobs[0].job_id]
    assert {each.job_id for each in runs.items} == {jobs[0].job_id, jobs[1].job_id}


async def test_the_breaker_is_kept(ledger: job_port.JobStore) -> None:
    await ledger.set_breaker(EPOCH, is_open=True, cause="12 of 20 lapsed together")

    assert (await ledger.take_over(NEXT_EPOCH)).is_breaker_open
    with pytest.raises(errors.StaleEpoch):
        await ledger.set_breaker(EPOCH, is_open=False, cause="late")


async def test_an_audit_of_a_sound_ledger_finds_nothing(ledger: job_port.JobStore) -> None:
    await running(ledger, job(1), job(2))
    audit = await ledger.audit()

    assert audit.findings == ()
    assert (audit.live_allocations, audit.nodes) == (2, 1)
    assert "COUNTER_DIFFERS" in audit.rules


async def test_keeping_house_is_the_leaders_and_takes_nothing_that_lives(ledger: job_port.JobStore) -> None:
    wanted = job(1)
    await running(ledger, wanted)

    assert list(await ledger.keep_house(EPOCH, retention_seconds=0.001)) == []
    assert (await ledger.get_job(wanted.job_id)).state is model.JobState.RUNNING
    with pytest.raises(errors.StaleEpoch):
        await ledger.keep_house(NEXT_EPOCH)


async def test_what_is_no_job_id_is_refused_and_an_unknown_one_not_found(ledger: job_port.JobStore) -> None:
    with pytest.raises(errors.InvalidArgument, match="is not a job id"):
        await ledger.get_job("nonsense")
    with pytest.raises(errors.NotFound, match="there is no job"):
        await ledger.get_job(job(9).job_id)
