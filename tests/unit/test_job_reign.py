"""The machine of jobs, rule by rule: what is answered and when, what is given up and what is not."""

import dataclasses
import itertools
from typing import Any

import job_world
import pytest
from leasehold.core import errors
from leasehold.core.job import attempts, changes, effects, invariants, machine, model
from leasehold.core.job.changes import Verdict
from leasehold.core.job.model import AttemptPhase, AttemptRef, EndCause, JobState
from leasehold.core.placement import model as placement

KEY = changes.RequestKey("someone", "r1")
#: A holder counts 30 s; the leader waits for so long.
WAIT_SECONDS = 30.0 * 1.001 + 30.0


class Reign:
    """A machine with a ledger that commits at once, and one node, `a`, of 4 CPUs."""

    def __init__(self, ledger: job_world.Ledger | None = None, *, numbers: int = 0) -> None:
        self.now = 1_000.0
        self.ledger = ledger or job_world.Ledger()
        self.ids = itertools.count(numbers + 1)
        self.done: list[effects.Effect] = []
        self.answers: dict[int, effects.Answer] = {}
        self.machine = machine.JobMachine(new_id=lambda: f"00000000-0000-0000-0000-{next(self.ids):012d}")
        self.machine.restore(self.now, self.now, self.ledger.snapshot())

    def connect(
        self, name: str = "a", *reports: model.Report, boot: int = 1, cpus: int = 4, **facts: Any
    ) -> None:
        seen: dict[str, Any] = {
            "name": name,
            "boot_id": f"boot-{boot}",
            "node_id": f"folder-of-{name}",
            "declared": placement.Resources(cpus, 100),
            "templates": frozenset({"work"}),
            **facts,
        }
        self.facts = effects.NodeFacts(**seen)
        self.machine.node_seen(self.now, self.facts)
        if self.facts.is_connected:
            self.machine.inventory(self.now, name, reports)
        self.flush()

    def reload(self, was_committed: bool = False) -> None:
        """Read the ledger anew."""
        loaded = self.machine.prepare(self.now, self.now, self.ledger.snapshot())
        self.machine.reloaded(self.now, loaded, was_committed)

    def flush(self) -> list[effects.Effect]:
        """Commit all that there is; what was to be done."""
        while True:
            self._take()
            batch = self.machine.take_batch(self.now, self.now)
            if batch is None:
                self._take()
                done, self.done = self.done, []
                return done
            self.machine.batch_done(self.now, self.now, self.ledger.commit(batch, self.now))
            invariants.check(self.machine)

    def _take(self) -> None:
        for effect in self.machine.take_effects():
            if isinstance(effect, effects.Answer):
                assert effect.ticket not in self.answers
                self.answers[effect.ticket] = effect
            self.done.append(effect)

    def submit(
        self, *specs: model.JobSpec, key: changes.RequestKey | None = None, sha: bytes = b"1", **how: Any
    ) -> int:
        how = {"is_all_or_none": False, **how}
        return self.machine.submit(
            self.now, self.now, specs, principal="someone", key=key, payload_sha256=sha, **how
        )

    def acquire(self, *, request: str = "r1", cpus: int = 1, wait: float = 5.0) -> int:
        return self.machine.acquire(
            self.now,
            self.now,
            model.JobSpec(required=placement.Resources(cpus, 1)),
            principal="someone",
            key=changes.RequestKey("someone", request),
            payload_sha256=b"1",
            wait_seconds=wait,
        )

    def holder(self, request: str = "r1") -> AttemptRef:
        ticket = self.acquire(request=request)
        self.flush()
        ref: AttemptRef = self.answers[ticket].value.allocation.ref
        return ref

    def run(self, **spec: Any) -> AttemptRef:
        """A job that its agent has started."""
        self.submit(job(**spec))
        self.flush()
        ref = list(self.machine.mirror.attempts.values())[-1].ref
        self.tell(ref, AttemptPhase.STARTED)
        return ref

    def tell(self, ref: AttemptRef, phase: AttemptPhase, cause: EndCause | None = None) -> None:
        outcome = None if cause is None else model.Outcome(cause=cause)
        self.machine.attempt_reported(self.now, "a", model.Report(ref=ref, phase=phase, outcome=outcome))

    def end(self, ref: AttemptRef, cause: EndCause) -> JobState:
        self.tell(ref, AttemptPhase.ENDED, cause)
        self.flush()
        return self.state(ref)

    def state(self, ref: AttemptRef) -> JobState:
        return self.ledger.jobs[ref.job_id].state

    def until(self, at: float) -> list[effects.Effect]:
        """Let time pass, ticking whenever that is due."""
        while (due := max(self.now, self.machine.next_deadline())) <= at and due > self.now:
            self.now = due
            self.machine.tick(due, due)
            self._take()
        self.now = at
        self.machine.tick(at, at)
        return self.flush()


def job(cpus: int = 1, **spec: Any) -> model.JobSpec:
    return model.JobSpec(**{"required": placement.Resources(cpus, 1), "template": "work", **spec})


def of(kind: type, done: list[effects.Effect]) -> list[Any]:
    return [effect for effect in done if isinstance(effect, kind)]


@pytest.fixture
def reign() -> Reign:
    made = Reign()
    made.connect()
    return made


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
