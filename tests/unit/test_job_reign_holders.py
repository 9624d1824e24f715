"""The machine of jobs, rule by rule: holders elsewhere, their silence, and the breaker."""

import pytest
from fixtures_job_reign import KEY, WAIT_SECONDS, Reign, of
from leasehold.core import errors
from leasehold.core.job import effects, machine, model
from leasehold.core.job.model import AttemptPhase, EndCause, JobState
from leasehold.core.placement import model as placement

# Holders


def test_a_holder_that_is_silent_is_waited_for_then_given_up_and_refused(reign: Reign) -> None:
    reign.until(reign.now + 100.0)
    ref = reign.holder()
    begun = reign.now
    reign.until(begun + WAIT_SECONDS - 0.01)
    assert reign.state(ref) is JobState.RUNNING
    reign.now = begun + WAIT_SECONDS + 0.01

    with pytest.raises(errors.AllocationLapsed):
        reign.machine.renew(reign.now, ref)
    reign.flush()
    assert reign.state(ref) is JobState.FAILED
    with pytest.raises(errors.AllocationLapsed):
        reign.machine.renew(reign.now, ref)


def test_a_holder_that_renews_keeps_its_allocation_and_hears_of_a_cancel(reign: Reign) -> None:
    ref = reign.holder()
    for _ in range(20):
        reign.until(reign.now + 25.0)
        assert reign.machine.renew(reign.now, ref) == effects.Renewed(30.0, False)
    reign.machine.cancel(reign.now, ref.job_id, "someone")
    reign.flush()

    assert reign.machine.renew(reign.now, ref).is_cancel_requested
    reign.machine.release(reign.now, ref, is_failed=True, detail="")
    reign.flush()
    assert reign.state(ref) is JobState.CANCELLED


def test_a_holder_has_a_whole_ttl_of_each_leader(reign: Reign) -> None:
    ref = reign.holder()
    later = Reign(reign.ledger, numbers=100)
    later.connect()
    later.until(later.now + WAIT_SECONDS - 1.0)

    assert later.machine.renew(later.now, ref) == effects.Renewed(30.0, False)


def test_a_leader_gives_nothing_up_for_silence_within_its_first_ttl() -> None:
    made = Reign()
    made.machine = machine.JobMachine(
        new_id=lambda: f"00000000-0000-0000-0000-{next(made.ids):012d}", overrun_seconds=-29.0
    )
    made.machine.restore(made.now, made.now, made.ledger.snapshot())
    made.connect()
    begun = made.now
    ref = made.holder()
    made.until(begun + 29.0)
    assert made.state(ref) is JobState.RUNNING
    made.until(begun + 30.0)

    assert made.state(ref) is JobState.FAILED


def test_a_leader_that_was_held_up_takes_no_silence_for_proof(reign: Reign) -> None:
    ref = reign.holder()
    reign.now += 500.0
    reign.machine.tick(reign.now, reign.now)

    assert reign.machine.renew(reign.now, ref) == effects.Renewed(30.0, False)


def test_an_agents_inventory_says_nothing_of_holders(reign: Reign) -> None:
    ref = reign.holder()
    reign.connect(is_connected=False)
    reign.connect(boot=2)

    assert of(effects.Assign, reign.done) == []
    assert reign.machine.phase(ref) is AttemptPhase.STARTED


def test_an_acquire_that_is_not_placed_in_time_holds_nothing(reign: Reign) -> None:
    reign.run(cpus=4)
    ticket = reign.acquire(wait=5.0)
    reign.flush()
    assert ticket not in reign.answers
    reign.until(reign.now + 5.0)

    assert isinstance(reign.answers[ticket].error, errors.NotPlaced)
    assert reign.machine.pending_count == 0


def test_the_same_acquire_again_finds_the_same_allocation(reign: Reign) -> None:
    first = reign.acquire()
    reign.flush()
    again = reign.acquire()
    reign.flush()

    assert reign.answers[first].value == reign.answers[again].value
    assert reign.machine.running_count == 1


def test_an_acquire_whose_caller_hung_up_leaves_the_line_unless_another_waits(reign: Reign) -> None:
    reign.run(cpus=4)
    first, second = reign.acquire(wait=60.0), reign.acquire(wait=60.0)
    reign.flush()
    reign.machine.give_up(reign.now, first)
    reign.flush()
    assert reign.machine.pending_count == 1
    reign.machine.give_up(reign.now, second)
    reign.flush()

    assert reign.machine.pending_count == 0


def test_a_submit_and_an_acquire_under_one_key_in_the_same_breath_are_one_job(reign: Reign) -> None:
    acquired = reign.acquire(request=KEY.request_id)
    submitted = reign.submit(model.JobSpec(required=placement.Resources(1, 1)), key=KEY)
    reign.flush()

    (verdict,) = reign.answers[submitted].value
    assert verdict.job_id == reign.answers[acquired].value.allocation.ref.job_id
    assert list(reign.ledger.jobs) == list(reign.machine.mirror.jobs) == [verdict.job_id]


def test_who_asks_again_before_the_cancel_is_committed_waits_on(reign: Reign) -> None:
    ref = reign.run(cpus=4)
    first = reign.acquire(wait=60.0)
    reign.flush()
    again = reign.acquire(wait=60.0)
    batch = reign.machine.take_batch(reign.now, reign.now)
    assert batch is not None
    reign.machine.give_up(reign.now, first)
    reign.machine.batch_done(reign.now, reign.now, reign.ledger.commit(batch, reign.now))
    reign.end(ref, EndCause.SUCCEEDED)

    assert reign.answers[again].error is None


# The breaker


@pytest.fixture
def silent() -> Reign:
    """Eight holders, of whom all fall silent but for two."""
    made = Reign()
    made.connect(cpus=8)
    made.until(made.now + 100.0)
    refs = [made.holder(f"h{number}") for number in range(8)]
    for _ in range(3):
        made.until(made.now + 20.0)
        for ref in refs[:2]:
            made.machine.renew(made.now, ref)
    made.refs = refs  # type: ignore[attr-defined]
    return made


def test_holders_that_fall_silent_together_are_kept_and_that_is_saved(silent: Reign) -> None:
    done = silent.until(silent.now + 5.0)

    (saved,) = of(effects.SaveBreaker, done)
    assert saved == effects.SaveBreaker(True, "6 of 8 holders lapsed within 60 s")
    assert silent.machine.utilization().held_back_cause == "6 of 8 holders lapsed within 60 s"
    assert silent.machine.running_count == 8
    silent.ledger.is_breaker_open = True
    later = Reign(silent.ledger, numbers=100)
    later.connect(cpus=8)
    assert later.machine.utilization().held_back_cause == "it was open when this leader began"
    for _ in range(4):
        later.until(later.now + 29.0)
        later.machine.renew(later.now, silent.refs[0])  # type: ignore[attr-defined]
    assert later.machine.utilization().held_back_cause == "7 of 8 holders lapsed within 60 s"
    assert later.machine.running_count == 8


def test_it_closes_after_a_healthy_ttl(silent: Reign) -> None:
    silent.until(silent.now + 5.0)
    saved = []
    for _ in range(4):
        for ref in silent.refs:  # type: ignore[attr-defined]
            silent.machine.renew(silent.now, ref)
        saved += of(effects.SaveBreaker, silent.until(silent.now + 10.0))

    assert [each.is_open for each in saved] == [False]
    assert silent.machine.running_count == 8


def test_an_operator_who_acknowledges_has_the_dead_given_up(silent: Reign) -> None:
    silent.until(silent.now + 5.0)
    ticket = silent.machine.acknowledge_silence(silent.now, cause="the rack burnt", actor="someone")
    (saved,) = done = of(effects.SaveBreaker, silent.flush())
    assert done == [effects.SaveBreaker(False, "the rack burnt", "someone")]
    assert silent.machine.running_count == 2
    assert ticket not in silent.answers
    silent.machine.breaker_saved(silent.now, saved)
    silent.flush()
    assert silent.answers[ticket].value == effects.Acknowledged(was_held_back=True, given_up=6)

    silent.until(silent.now + 1.0)
    assert silent.machine.utilization().held_back_cause == ""


def test_an_operator_is_answered_after_the_releases_are_committed(silent: Reign) -> None:
    silent.until(silent.now + 5.0)
    ticket = silent.machine.acknowledge_silence(silent.now, cause="the rack burnt", actor="someone")
    (saved,) = of(effects.SaveBreaker, silent.machine.take_effects())
    silent.machine.breaker_saved(silent.now, saved)
    assert of(effects.Answer, silent.machine.take_effects()) == []
    silent.flush()

    assert silent.answers[ticket].value.given_up == 6


def test_what_a_silent_node_must_have_ended_is_held_back_and_given_up_with_the_rest(silent: Reign) -> None:
    silent.connect(cpus=9)
    ref = silent.run(max_run_seconds=1.0, on_lost=model.OnLost.AFTER_FENCE)
    silent.connect(cpus=9, is_connected=False)
    silent.until(silent.now + 5.0)
    silent.until(silent.now + 1.0 + machine.FENCE_GRACE_SECONDS)
    silent.until(silent.now + 10.0)
    assert silent.state(ref) is JobState.RUNNING
    ticket = silent.machine.acknowledge_silence(silent.now, cause="the rack burnt", actor="someone")
    (saved,) = of(effects.SaveBreaker, silent.flush())
    silent.machine.breaker_saved(silent.now, saved)
    silent.flush()

    assert silent.state(ref) is JobState.PENDING
    assert silent.answers[ticket].value.given_up == 9


def test_a_word_where_nothing_is_held_back_changes_nothing(reign: Reign) -> None:
    ticket = reign.machine.acknowledge_silence(reign.now, cause="the rack burnt", actor="someone")

    assert of(effects.SaveBreaker, reign.flush()) == []
    assert reign.answers[ticket].value == effects.Acknowledged(was_held_back=False, given_up=0)


def test_within_its_first_ttl_a_leader_takes_nobodys_word_for_a_silence(silent: Reign) -> None:
    silent.ledger.is_breaker_open = True
    later = Reign(silent.ledger, numbers=100)
    later.until(later.now + 10.0)
    with pytest.raises(errors.FailedPrecondition) as caught:
        later.machine.acknowledge_silence(later.now, cause="the rack burnt", actor="someone")

    assert caught.value.retry_after_seconds == pytest.approx(20.0)


def test_it_holds_nothing_back_that_is_proven(silent: Reign) -> None:
    silent.until(silent.now + 5.0)
    ref = silent.refs[7]  # type: ignore[attr-defined]
    silent.machine.release(silent.now, ref, is_failed=False, detail="")
    silent.flush()

    assert silent.state(ref) is JobState.COMPLETED
