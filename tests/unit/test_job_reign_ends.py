"""The machine of jobs, rule by rule: ends, retries, cancels, and what proves an end."""

import dataclasses

import pytest
from fixtures_job_reign import Reign, job, of
from leasehold.core.job import attempts, effects, machine, model
from leasehold.core.job.model import AttemptPhase, AttemptRef, EndCause, JobState
from leasehold.core.placement import model as placement

# Ends, retries, cancels


def test_a_failed_job_is_tried_again_after_a_backoff_then_fails(reign: Reign) -> None:
    ref = reign.run(retry=model.RetryPolicy(max_attempts=2, initial_backoff_seconds=8.0))

    assert reign.end(ref, EndCause.FAILED) is JobState.PENDING
    assert reign.machine.next_deadline() == reign.now + 8.0
    reign.until(reign.now + 8.0)
    again = AttemptRef(ref.job_id, 2)
    assert reign.machine.phase(again) is AttemptPhase.SENT
    assert reign.machine.phase(ref) is None
    assert reign.end(again, EndCause.OOM_KILLED) is JobState.FAILED


@pytest.mark.parametrize("cause", [EndCause.NODE_LOST, EndCause.NOT_STARTED])
def test_a_loss_of_infrastructure_counts_no_attempt(reign: Reign, cause: EndCause) -> None:
    ref = reign.run()

    assert reign.end(ref, cause) is JobState.PENDING
    assert reign.ledger.jobs[ref.job_id].failures == 0


def test_a_job_that_is_never_to_be_repeated_fails_once_its_loss_is_proven(reign: Reign) -> None:
    assert reign.end(reign.run(on_lost=model.OnLost.NEVER), EndCause.NODE_LOST) is JobState.FAILED


def test_what_its_hosts_template_refuses_fails_at_once_and_what_a_host_lacks_is_tried_elsewhere() -> None:
    retry = model.RetryPolicy(max_attempts=5)
    record = model.JobRecord(job_id="", spec=job(retry=retry), state=JobState.RUNNING, attempt=1)
    refused = model.Outcome(cause=EndCause.REFUSED, detail="parameters.note: is not of its pattern")

    assert attempts.judge(record, refused) == attempts.Judgement(JobState.FAILED, is_failure=True)
    assert attempts.judge(record, model.Outcome(cause=EndCause.NOT_STARTED)).next_state is JobState.PENDING
    cancelled = dataclasses.replace(record, is_cancel_requested=True)
    assert attempts.judge(cancelled, refused).next_state is JobState.CANCELLED


def test_what_is_lost_again_and_again_fails_at_last() -> None:
    record = model.JobRecord(job_id="", spec=job(), state=JobState.RUNNING, attempt=100)

    judged = attempts.judge(record, model.Outcome(cause=EndCause.NOT_STARTED))

    assert judged.next_state is JobState.FAILED


def test_the_first_word_on_an_end_counts(reign: Reign) -> None:
    ref = reign.run()
    reign.tell(ref, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    reign.tell(ref, AttemptPhase.ENDED, EndCause.FAILED)
    reign.machine.force_release(reign.now, ref, cause="", actor="someone")
    reign.flush()

    assert reign.state(ref) is JobState.COMPLETED


def test_an_end_is_forgotten_by_its_agent_after_the_commit_and_again_if_it_is_told_again(reign: Reign) -> None:
    ref = reign.run()
    reign.tell(ref, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    assert of(effects.Forget, reign.machine.take_effects()) == []
    assert of(effects.Forget, reign.flush()) == [effects.Forget("a", ref)]

    reign.tell(ref, AttemptPhase.ENDED, EndCause.SUCCEEDED)
    assert of(effects.Forget, reign.flush()) == [effects.Forget("a", ref)]


def test_a_job_in_line_is_cancelled_at_once(reign: Reign) -> None:
    reign.run(cpus=4)
    ticket = reign.submit(job())
    reign.flush()
    job_id = reign.answers[ticket].value[0].job_id
    cancelled = reign.machine.cancel(reign.now, job_id, "someone")
    again = reign.machine.cancel(reign.now, job_id, "someone")
    reign.flush()

    assert reign.ledger.jobs[job_id].state is JobState.CANCELLED
    assert {cancelled, again} <= set(reign.answers)
    assert reign.machine.job(job_id) is None


def test_a_cancel_of_what_runs_asks_and_the_end_decides(reign: Reign) -> None:
    retry = model.RetryPolicy(max_attempts=3)
    found = {}
    for cause in (EndCause.SUCCEEDED, EndCause.CANCELLED, EndCause.FAILED, EndCause.NODE_LOST):
        ref = reign.run(retry=retry)
        reign.machine.cancel(reign.now, ref.job_id, "someone")
        assert of(effects.Stop, reign.flush()) == [effects.Stop("a", ref)]
        assert reign.machine.phase(ref) is AttemptPhase.STOPPING
        found[cause] = reign.end(ref, cause)

    assert found == {
        EndCause.SUCCEEDED: JobState.COMPLETED,
        EndCause.CANCELLED: JobState.CANCELLED,
        # Nothing is tried again that was cancelled.
        EndCause.FAILED: JobState.CANCELLED,
        EndCause.NODE_LOST: JobState.CANCELLED,
    }


def test_a_cancelled_job_that_failed_by_itself_at_its_last_attempt_keeps_that_result(reign: Reign) -> None:
    ref = reign.run()
    reign.machine.cancel(reign.now, ref.job_id, "someone")
    reign.flush()

    assert reign.end(ref, EndCause.FAILED) is JobState.FAILED


def test_a_cancel_of_what_was_sent_by_an_earlier_leader_is_asked_of_its_agent_when_it_comes(
    reign: Reign,
) -> None:
    ref = reign.run()
    later = Reign(reign.ledger, numbers=100)
    later.machine.cancel(later.now, ref.job_id, "someone")
    assert of(effects.Stop, later.flush()) == []
    later.machine.node_seen(later.now, reign.facts)
    later.machine.inventory(later.now, "a", [model.Report(ref=ref, phase=AttemptPhase.STARTED)])

    assert of(effects.Stop, later.flush()) == [effects.Stop("a", ref)]

    assert later.end(ref, EndCause.CANCELLED) is JobState.CANCELLED


# Nodes and proofs


def test_a_silent_node_keeps_what_it_has_and_its_attempts_are_unknown(reign: Reign) -> None:
    ref = reign.run()
    reign.connect(is_connected=False, openness=placement.Openness.NOT_READY)
    reign.until(reign.now + 100_000.0)

    assert reign.machine.phase(ref) is AttemptPhase.UNKNOWN
    assert reign.machine.unknown_count == 1
    assert reign.ledger.used("a").cpus == 1
    reign.connect("a", model.Report(ref=ref, phase=AttemptPhase.STARTED))
    assert reign.machine.phase(ref) is AttemptPhase.STARTED


def test_an_attempt_that_an_agent_has_never_taken_is_told_again(reign: Reign) -> None:
    reign.submit(job())
    reign.flush()
    reign.connect(is_connected=False)
    reign.machine.node_seen(reign.now, reign.facts)
    reign.connect()

    assert reign.machine.unknown_count == 0
    (attempt,) = reign.machine.mirror.attempts.values()
    assert attempt.phase is AttemptPhase.SENT


def test_absence_proves_nothing_once_the_state_folder_is_another(reign: Reign) -> None:
    ref = reign.run()
    reign.connect(is_connected=False)
    reign.machine.node_seen(reign.now, effects.NodeFacts(
        name="a", boot_id="boot-1", node_id="another", declared=placement.Resources(4, 100),
        templates=frozenset({"work"}),
    ))  # fmt: skip
    reign.machine.inventory(reign.now, "a", ())

    assert of(effects.Assign, reign.flush()) == []
    assert reign.machine.phase(ref) is AttemptPhase.UNKNOWN
    reign.connect(boot=2, node_id="another")
    assert reign.state(ref) is JobState.PENDING


def test_a_new_boot_proves_the_end_but_a_record_of_it_counts_more(reign: Reign) -> None:
    lost, over = reign.run(), reign.run()
    ended = model.Report(ref=over, phase=AttemptPhase.ENDED, outcome=model.Outcome(cause=EndCause.SUCCEEDED))
    reign.connect("a", ended, boot=2)

    assert reign.state(over) is JobState.COMPLETED
    assert reign.state(lost) is JobState.PENDING
    assert reign.ledger.jobs[lost.job_id].outcome == model.Outcome(
        cause=EndCause.NODE_LOST, detail="node a was booted anew"
    )


def test_a_new_boot_without_an_inventory_proves_it_after_a_while(reign: Reign) -> None:
    ref = reign.run()
    reign.machine.node_seen(reign.now, effects.NodeFacts(
        name="a", boot_id="boot-2", node_id="folder-of-a", declared=placement.Resources(4, 100),
    ))  # fmt: skip
    reign.until(reign.now + 29.0)
    assert reign.state(ref) is JobState.RUNNING
    reign.until(reign.now + 2.0)

    assert reign.state(ref) is JobState.PENDING


def test_what_was_given_up_and_comes_back_is_stopped(reign: Reign) -> None:
    ref = reign.run()
    ticket = reign.machine.force_release(reign.now, ref, cause="the host burnt", actor="someone")
    assert of(effects.Stop, reign.flush()) == [effects.Stop("a", ref)]
    reign.tell(ref, AttemptPhase.STARTED)

    assert of(effects.Stop, reign.flush()) == [effects.Stop("a", ref)]
    assert reign.answers[ticket].value.outcome == model.Outcome(cause=EndCause.FORCED, detail="the host burnt")


@pytest.mark.parametrize("on_lost", [model.OnLost.AFTER_FENCE, model.OnLost.AFTER_PROOF])
def test_only_a_job_that_allows_it_is_given_up_when_its_shim_has_ended_it(
    reign: Reign, on_lost: model.OnLost
) -> None:
    ref = reign.run(max_run_seconds=100.0, on_lost=on_lost)
    reign.connect(is_connected=False)
    fence = reign.now + (100.0 + machine.FENCE_GRACE_SECONDS) * 1.001
    reign.until(fence - 1.0)
    assert reign.state(ref) is JobState.RUNNING
    reign.until(fence + 1.0)

    is_given_up = on_lost is model.OnLost.AFTER_FENCE
    assert reign.state(ref) is (JobState.PENDING if is_given_up else JobState.RUNNING)


def test_the_leader_gives_a_node_longer_than_the_node_takes() -> None:
    assert machine.FENCE_GRACE_SECONDS > model.KILL_GRACE_SECONDS + model.FENCE_MARGIN_SECONDS


def test_a_fence_needs_the_word_that_it_started(reign: Reign) -> None:
    reign.submit(job(max_run_seconds=100.0, on_lost=model.OnLost.AFTER_FENCE))
    reign.flush()
    reign.connect(is_connected=False)
    reign.until(reign.now + 10_000.0)

    assert reign.machine.unknown_count == 1, "a host that was held up may still start it"


def test_a_total_that_shrinks_falls_as_jobs_end_and_takes_none_meanwhile(reign: Reign) -> None:
    refs = [reign.run() for _ in range(3)]
    reign.connect("a", *(model.Report(ref=ref, phase=AttemptPhase.STARTED) for ref in refs), cpus=2)
    reign.submit(job())
    totals = [reign.machine.utilization().total.total.cpus]
    for ref in refs[:2]:
        reign.end(ref, EndCause.SUCCEEDED)
        totals.append(reign.machine.utilization().total.total.cpus)

    assert totals == [3, 2, 2]
    assert reign.machine.running_count == 2, "the one that waited came in with the second end"


def test_a_node_that_is_deleted_keeps_what_it_may_still_run(reign: Reign) -> None:
    ref = reign.run()
    reign.connect(is_connected=False)
    reign.machine.node_forgotten("a")
    reign.flush()

    assert reign.machine.phase(ref) is AttemptPhase.UNKNOWN
    assert reign.ledger.capacity["a"][1] == placement.Resources(0, 0)
    assert reign.machine.utilization().total.total.cpus == 1


def test_a_tombstone_by_another_state_folder_proves_nothing(reign: Reign) -> None:
    ref = reign.run()
    later = Reign(reign.ledger, numbers=100)
    later.connect(node_id="another")
    later.machine.cancel(later.now, ref.job_id, "someone")
    assert of(effects.Stop, later.flush()) == []
    later.tell(ref, AttemptPhase.ENDED, EndCause.CANCELLED)
    later.flush()

    assert later.machine.phase(ref) is AttemptPhase.UNKNOWN


def test_the_record_of_an_end_counts_more_than_the_silence_before_it(reign: Reign) -> None:
    ref = reign.run(max_run_seconds=10.0, on_lost=model.OnLost.AFTER_FENCE)
    reign.connect(is_connected=False)
    reign.now += 104.0
    reign.machine.tick(reign.now, reign.now)
    assert reign.machine.phase(ref) is AttemptPhase.ENDED
    ended = model.Report(ref=ref, phase=AttemptPhase.ENDED, outcome=model.Outcome(cause=EndCause.SUCCEEDED))
    reign.connect("a", ended)

    assert reign.state(ref) is JobState.COMPLETED
