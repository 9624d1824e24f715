"""The machine of jobs, rule by rule: what is answered and when, and what becomes of batches and queues."""

import pytest
from fixtures_job_reign import KEY, Reign, job, of
from leasehold.core import errors
from leasehold.core.job import changes, effects, model
from leasehold.core.job.changes import Verdict
from leasehold.core.job.model import AttemptPhase, EndCause, JobState
from leasehold.core.placement import model as placement

# Submits and kept answers


def test_nothing_is_answered_or_dispatched_before_its_commit(reign: Reign) -> None:
    reign.submit(job())
    first = reign.machine.take_batch(reign.now, reign.now)

    assert first is not None
    assert reign.machine.take_effects() == []
    assert reign.machine.pending_count == 0
    reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(first, reign.now))
    assert of(effects.Answer, reign.machine.take_effects())
    second = reign.machine.take_batch(reign.now, reign.now)
    assert second is not None
    assert len(second.allocations) == 1
    assert of(effects.Assign, reign.machine.take_effects()) == []
    reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(second, reign.now))
    assert len(of(effects.Assign, reign.machine.take_effects())) == 1


def test_a_repeat_is_told_the_first_answer_refusals_included_by_a_later_leader_too(reign: Reign) -> None:
    first = reign.submit(job(), job(queue="nowhere"), key=KEY)
    twin = reign.submit(job(), job(queue="nowhere"), key=KEY)
    reign.flush()
    later = Reign(reign.ledger, numbers=100)
    repeated = later.submit(job(), job(queue="nowhere"), key=KEY)
    later.flush()

    told = [reign.answers[first].value, reign.answers[twin].value, later.answers[repeated].value]
    assert [[verdict.job_id for verdict in each] for each in told] == [[told[0][0].job_id, ""]] * 3
    assert [type(each[1].error) for each in told] == [errors.NotFound] * 3
    assert {each[1].error.field for each in told} == {"queue"}
    assert len(reign.ledger.jobs) == 1


def test_another_request_under_the_same_key_is_refused_before_and_after_the_commit(reign: Reign) -> None:
    reign.submit(job(), key=KEY)
    with pytest.raises(errors.RequestIdReused):
        reign.submit(job(), key=KEY, sha=b"2")
    reign.flush()
    ticket = reign.submit(job(), key=KEY, sha=b"2")
    reign.flush()

    assert isinstance(reign.answers[ticket].error, errors.RequestIdReused)
    assert len(reign.ledger.jobs) == 1


def test_all_are_taken_or_none_where_that_was_asked(reign: Reign) -> None:
    ticket = reign.submit(job(), job(cpus=5), is_all_or_none=True)
    reign.flush()

    reasons = [verdict.error.reason for verdict in reign.answers[ticket].value]
    assert reasons == ["ALL_OR_NONE", "INVALID_ARGUMENT"]
    assert reign.ledger.jobs == {}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (job(cpus=5), "required_cpus"),
        (job(required=placement.Resources(1, 101)), "required_memory_bytes"),
        (job(template="other"), "template"),
        (job(queue="nowhere"), "queue"),
        (job(node_selector={"gpu": "yes"}), "node_selector"),
    ],
)
def test_what_can_never_run_is_told_at_once_naming_the_field(
    reign: Reign, spec: model.JobSpec, field: str
) -> None:
    ticket = reign.submit(spec)
    reign.flush()

    assert reign.answers[ticket].value[0].error.field == field
    with pytest.raises(errors.LeaseholdError):
        reign.machine.rehearse(reign.now, reign.now, spec)


def test_a_job_may_wait_for_capacity_and_for_nodes_not_heard_of_yet(reign: Reign) -> None:
    ticket = reign.submit(job(cpus=5, wait_for_capacity=True))
    reign.flush()
    later = Reign(reign.ledger, numbers=100)
    untold = later.submit(job(node_selector={"gpu": "yes"}))
    later.flush()

    assert reign.answers[ticket].value[0].error is None
    assert later.answers[untold].value[0].error is None, "node a may have that label"


def test_a_stream_of_chunks_keeps_neither_ends_nor_allocations_out(reign: Reign) -> None:
    ref = reign.run()
    for _ in range(4):
        reign.submit(*[job()] * 1_000)
    reign.tell(ref, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    batches = []
    while (batch := reign.machine.take_batch(reign.now, reign.now)) is not None:
        batches.append(batch)
        reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(batch, reign.now))

    assert all(len(batch) <= changes.CHANGES_MAX for batch in batches)
    assert any(batch.ends for batch in batches[:2])
    assert any(batch.allocations for batch in batches[:4])
    assert len(batches[0].submits) in (0, 1_000)
    assert len(reign.ledger.jobs) == 4_001


@pytest.mark.parametrize("is_all_or_none", [False, True])
def test_one_job_that_postgres_refuses_spoils_no_other_of_its_request_and_the_answer_is_kept(
    reign: Reign, is_all_or_none: bool
) -> None:
    key, specs = changes.RequestKey("someone", "r1", 1), [job(), job(), job()]
    ticket = reign.submit(*specs, key=key, is_all_or_none=is_all_or_none)
    batch = reign.machine.take_batch(reign.now, reign.now)
    assert batch is not None
    told = changes.BatchResult(
        flush_seq=1, time_seconds=reign.now, submits=(Verdict.STALE, Verdict.POISON, Verdict.STALE)
    )
    reign.machine.batch_done(reign.now, reign.now, told)
    reign.flush()

    verdicts = reign.answers[ticket].value
    others = errors.RefusedTogether.reason if is_all_or_none else None
    reasons = [None if each.error is None else each.error.reason for each in verdicts]
    assert reasons == [others, errors.InvalidArgument.reason, others]
    assert sorted(reign.ledger.jobs) == sorted(each.job_id for each in verdicts if each.job_id)
    repeated = reign.submit(*specs, key=key, is_all_or_none=is_all_or_none)
    reign.flush()
    again = reign.answers[repeated].value
    assert [(each.job_id, str(each.error)) for each in again] == [
        (each.job_id, str(each.error)) for each in verdicts
    ]


# Batches that do not come back


@pytest.mark.parametrize("was_committed", [False, True])
def test_a_batch_whose_answer_is_lost_is_read_and_asked_again(reign: Reign, was_committed: bool) -> None:
    running = reign.run()
    line = reign.run(cpus=3)
    waiting = reign.submit(job())
    reign.flush()
    job_id = reign.answers[waiting].value[0].job_id
    tickets = [
        reign.submit(job(), key=KEY),
        reign.acquire(request="r2", wait=500.0),
        reign.machine.cancel(reign.now, job_id, "someone"),
        reign.machine.put_queue(reign.now, placement.Queue(name="narrow"), "someone"),
    ]
    reign.tell(running, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    batch = reign.machine.take_batch(reign.now, reign.now)
    assert batch is not None
    if was_committed:
        reign.ledger.commit(batch, reign.now)
    reign.machine.batch_lost(reign.now)
    assert reign.machine.take_batch(reign.now, reign.now) is None
    assert of(effects.Answer, reign.machine.take_effects()) == []
    reign.reload(was_committed)
    reign.flush()
    reign.end(line, EndCause.SUCCEEDED)

    assert set(tickets) <= set(reign.answers)
    assert [reign.answers[ticket].error for ticket in tickets] == [None] * 4
    assert reign.state(running) is JobState.COMPLETED
    assert reign.ledger.jobs[job_id].state is JobState.CANCELLED
    assert len(reign.ledger.jobs) == 5


def test_an_allocation_whose_answer_was_lost_is_dispatched_after_it_was_read(reign: Reign) -> None:
    reign.submit(job())
    for is_lost in (False, True):
        batch = reign.machine.take_batch(reign.now, reign.now)
        assert batch is not None
        result = reign.ledger.commit(batch, reign.now)
        if not is_lost:
            reign.machine.batch_done(reign.now, reign.now, result)
    reign.machine.batch_lost(reign.now)
    assert of(effects.Assign, reign.machine.take_effects()) == []
    reign.reload(was_committed=True)

    assert len(of(effects.Assign, reign.flush())) == 1


def test_what_differs_from_what_is_known_is_read_anew_before_anything_else(reign: Reign) -> None:
    ref = reign.run()
    reign.tell(ref, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    batch = reign.machine.take_batch(reign.now, reign.now)
    assert batch is not None
    result = changes.BatchResult(flush_seq=99, time_seconds=0.0, ends=(Verdict.STALE,))
    reign.machine.batch_done(reign.now, reign.now, result)

    assert len(of(effects.Reload, reign.machine.take_effects())) == 1
    assert reign.machine.take_batch(reign.now, reign.now) is None
    reign.reload()
    reign.flush()
    assert reign.state(ref) is JobState.COMPLETED


# Queues


def test_a_queue_is_deleted_only_without_jobs_and_takes_none_meanwhile(reign: Reign) -> None:
    reign.machine.put_queue(reign.now, placement.Queue(name="narrow", nominal_cpus=1), "someone")
    reign.flush()
    with pytest.raises(errors.FailedPrecondition):
        reign.machine.delete_queue(reign.now, "default", "someone")
    with pytest.raises(errors.NotFound):
        reign.machine.delete_queue(reign.now, "nowhere", "someone")
    ref = reign.run(queue="narrow")
    with pytest.raises(errors.FailedPrecondition):
        reign.machine.delete_queue(reign.now, "narrow", "someone")
    reign.end(ref, EndCause.SUCCEEDED)
    reign.submit(job(cpus=4, queue="narrow", wait_for_capacity=True), is_all_or_none=True)
    in_flight = reign.machine.take_batch(reign.now, reign.now)
    assert in_flight is not None
    with pytest.raises(errors.FailedPrecondition):
        reign.machine.delete_queue(reign.now, "narrow", "someone")
    reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(in_flight, reign.now))
    reign.machine.cancel(reign.now, in_flight.submits[0].job.job_id, "someone")
    reign.flush()
    reign.machine.delete_queue(reign.now, "narrow", "someone")
    refused = reign.submit(job(queue="narrow"))
    reign.flush()

    assert isinstance(reign.answers[refused].value[0].error, errors.NotFound)
    assert [usage.queue.name for usage in reign.machine.queue_usage()] == ["default"]


def test_a_quota_that_falls_is_kept_to_by_what_is_planned_with_it(reign: Reign) -> None:
    reign.machine.put_queue(reign.now, placement.Queue(name="narrow", nominal_cpus=3), "someone")
    reign.flush()
    reign.submit(job(queue="narrow"), job(queue="narrow"))
    batch = reign.machine.take_batch(reign.now, reign.now)
    assert batch is not None
    reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(batch, reign.now))
    reign.machine.put_queue(reign.now, placement.Queue(name="narrow", nominal_cpus=1), "someone")
    reign.flush()

    assert reign.machine.running_count == 1
