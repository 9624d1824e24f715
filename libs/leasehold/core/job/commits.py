"""Batches: what goes into the next one, and what follows from one that is committed, or lost.

One is in flight at a time. Nothing of it is known before its commit is; of one that was lost, what is committed
is read anew, and what is missing is asked for again.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from leasehold.core import errors
from leasehold.core.job import answers, attempts, changes, effects, loading, model, reclaim, requests
from leasehold.core.job import execution as executions
from leasehold.core.job import mirror as mirrors
from leasehold.core.job import outbox as outboxes
from leasehold.core.job import waits as waiting
from leasehold.core.job.changes import Verdict
from leasehold.core.job.model import JobState

_UNNUMBERED = "-"


class Commits:
    """Takes from the outbox, and changes the mirror. Effects are appended to `out`."""

    def __init__(
        self,
        mirror: mirrors.Mirror,
        outbox: outboxes.Outbox,
        execution: executions.Execution,
        reclaimer: reclaim.Reclaim,
        waits: waiting.Waits,
        out: list[effects.Effect],
        new_id: Callable[[], str],
    ) -> None:
        self._mirror = mirror
        self._outbox = outbox
        self._execution = execution
        self._reclaim = reclaimer
        self._waits = waits
        self._out = out
        self._new_id = new_id
        self._flight: outboxes.Flight | None = None
        self._is_reload_due = False
        self._has_submits_first = False
        self._next_plan_at = float("-inf")

    @property
    def is_free(self) -> bool:
        """Whether a batch may be taken."""
        return self._flight is None and not self._is_reload_due

    def next_deadline(self, now: float) -> float:
        """When a plan may differ by time alone; infinity: not, or a batch has to come back first."""
        return self._mirror.scheduler.next_wake(now) if self.is_free else float("inf")

    # Taking

    def take(self, now: float, wall: float) -> changes.Batch | None:
        """The next batch; None: there is nothing to do, or one is in flight."""
        if not self.is_free:
            return None
        room = changes.CHANGES_MAX
        submissions: list[outboxes.Submission] = []
        # In turns, or those that come without end would keep the others out.
        self._has_submits_first = not self._has_submits_first
        if self._has_submits_first:
            submissions = self._outbox.take_submissions(room)
            room -= sum(len(each.jobs) for each in submissions)
        ends = self._take_ends(wall, room)
        room -= len(ends)
        cancels = self._outbox.take_cancels(room)
        room -= len(cancels)
        queues = self._outbox.take_queues(room)
        room -= len(queues)
        capacities = self._take_capacities(room)
        room -= len(capacities)
        # A quota that is being changed is not planned with.
        allocations = [] if queues else self._plan(now, room, {wish.job_id for wish in cancels})
        room -= len(allocations)
        if not self._has_submits_first:
            submissions = self._outbox.take_submissions(room)
        batch = changes.Batch(
            batch_id=_UNNUMBERED,
            ends=tuple(ends),
            cancels=tuple(changes.Cancel(job_id=wish.job_id, actor=wish.actor) for wish in cancels),
            queues=tuple(wish.change for wish in queues),
            capacities=tuple(capacities),
            submits=tuple(changes.Submit(job=job) for each in submissions for job in each.jobs),
            allocations=tuple(allocations),
            answers=tuple(_kept(each) for each in submissions if each.key is not None),
        )
        if not len(batch) and not batch.answers:
            return None
        batch = replace(batch, batch_id=self._new_id())
        self._execution.ends_in_flight = frozenset(change.ref.job_id for change in ends)
        self._outbox.flying = tuple(submissions)
        self._flight = outboxes.Flight(
            batch=batch, submissions=submissions, cancels=cancels, queues=queues, planned_at=now
        )
        return batch

    def _take_ends(self, wall: float, room: int) -> list[changes.EndAttempt]:
        chosen = list(self._outbox.ends)[:room]
        found = []
        for job_id in chosen:
            del self._outbox.ends[job_id]
            attempt = self._mirror.attempts.get(job_id)
            if attempt is not None and attempt.end is not None:
                found.append(self._end(wall, attempt, attempt.end))
        return found

    def _end(self, wall: float, attempt: attempts.Attempt, outcome: model.Outcome) -> changes.EndAttempt:
        judged = attempts.judge(self._mirror.jobs[attempt.ref.job_id], outcome)
        is_retried = judged.next_state is JobState.PENDING
        return changes.EndAttempt(
            ref=attempt.ref,
            outcome=outcome,
            next_state=judged.next_state,
            is_failure=judged.is_failure,
            not_before_seconds=wall + judged.backoff_seconds if is_retried else None,
            actor=attempt.actor,
        )

    def _take_capacities(self, room: int) -> list[changes.SetCapacity]:
        found = []
        for name in list(self._outbox.nodes)[:room]:
            del self._outbox.nodes[name]
            node = self._mirror.nodes.get(name)
            wanted = None if node is None else node.wanted()
            if wanted is not None:
                found.append(wanted)
        return found

    def _plan(self, now: float, room: int, cancelled: set[str]) -> list[changes.Allocate]:
        if room <= 0 or not (self._mirror.is_changed or now >= self._next_plan_at):
            return []
        proposals = self._mirror.scheduler.plan(now, most=room)
        self._mirror.is_changed = len(proposals) == room
        self._next_plan_at = self._mirror.scheduler.next_wake(now)
        found = []
        for job_id, name in proposals:
            if job_id in cancelled or job_id in self._outbox.cancels:
                continue
            job, node = self._mirror.jobs[job_id], self._mirror.nodes[name]
            found.append(
                changes.Allocate(
                    ref=model.AttemptRef(job_id, job.attempt + 1),
                    node=name,
                    boot_id=node.boot_key,
                    held=job.spec.required,
                    queue=job.spec.queue,
                )
            )
        return found

    # Committed

    def done(self, now: float, wall: float, result: changes.BatchResult) -> None:
        """The batch in flight is committed."""
        flight = self._land()
        batch = flight.batch
        for end, verdict in zip(batch.ends, result.ends, strict=True):
            if self._is_as_known(verdict, f"the end of attempt {end.ref.attempt} of job {end.ref.job_id}"):
                self._ended(now, wall, end, result)
            else:
                self._outbox.ends[end.ref.job_id] = None
        for wish, verdict in zip(flight.cancels, result.cancels, strict=True):
            self._cancelled(wish, verdict)
        for queue_wish, verdict in zip(flight.queues, result.queues, strict=True):
            self._queue_changed(queue_wish, verdict)
        for capacity, verdict in zip(batch.capacities, result.capacities, strict=True):
            if self._is_as_known(verdict, f"the capacity of node {capacity.node}"):
                self._mirror.capacity_set(capacity)
            # It may have changed again meanwhile.
            self._outbox.nodes[capacity.node] = None
        verdicts = {
            change.job.job_id: verdict for change, verdict in zip(batch.submits, result.submits, strict=True)
        }
        for submission in flight.submissions:
            self._submitted(now, wall, submission, verdicts, result)
        for allocation, verdict in zip(batch.allocations, result.allocations, strict=True):
            if self._is_as_known(verdict, f"the allocation of job {allocation.ref.job_id}"):
                self._allocated(now, flight, allocation, result)
        self._reclaim.answer_acknowledged()

    def _land(self) -> outboxes.Flight:
        flight = self._flight
        if flight is None:
            raise errors.LeaseholdError("a batch came back that was not in flight")
        self._flight, self._outbox.flying = None, ()
        self._execution.ends_in_flight = frozenset()
        return flight

    def _is_as_known(self, verdict: Verdict, what: str) -> bool:
        if verdict is Verdict.APPLIED:
            return True
        self._reload(f"{what} was {verdict.value}")
        return False

    def _reload(self, cause: str) -> None:
        if not self._is_reload_due:
            self._is_reload_due = True
            self._out.append(effects.Reload(cause))

    def _ended(self, now: float, wall: float, change: changes.EndAttempt, result: changes.BatchResult) -> None:
        attempt = self._mirror.attempts[change.ref.job_id]
        job = self._mirror.ended(change, now, wall, result.flush_seq, result.time_seconds)
        self._reclaim.ended(change.ref)
        self._execution.released(attempt)
        self._answer(attempt.tickets, job)
        if job.state in model.TERMINAL_STATES:
            self._waits.gone(job.job_id)

    def _cancelled(self, wish: outboxes.CancelWish, verdict: Verdict) -> None:
        job = self._mirror.jobs.get(wish.job_id)
        if job is not None and self._is_as_known(verdict, f"the cancel of job {wish.job_id}"):
            self._mirror.cancelled(wish.job_id)
            if job.state is JobState.RUNNING:
                self._execution.cancel_requested(wish.job_id)
            else:
                self._out.append(effects.Changed(wish.job_id))
                self._waits.gone(wish.job_id)
        self._answer(wish.tickets, None)

    def _queue_changed(self, wish: outboxes.QueueWish, verdict: Verdict) -> None:
        if isinstance(wish.change, changes.DeleteQueue):
            self._outbox.deleting.discard(wish.change.name)
        if verdict is Verdict.APPLIED:
            self._mirror.queue_changed(wish.change)
            self._answer(wish.tickets, None)
            return
        if isinstance(wish.change, changes.DeleteQueue):
            error = errors.FailedPrecondition(f"queue {wish.change.name} has jobs", field="name")
        else:
            error = errors.FailedPrecondition(f"queue {wish.change.queue.name} could not be put", field="queue")
        self._refuse(wish.tickets, error)
        self._reload(f"the change of a queue was {verdict.value}")

    def _submitted(
        self,
        now: float,
        wall: float,
        submission: outboxes.Submission,
        verdicts: dict[str, Verdict],
        result: changes.BatchResult,
    ) -> None:
        poison = {job.job_id for job in submission.jobs if verdicts[job.job_id] is Verdict.POISON}
        if submission.key is not None and 0 < len(poison) < len(submission.jobs):
            # Its answer is kept with its jobs, and told of all of them: nothing is committed yet.
            requests.leave_out(submission, poison)
            self._outbox.put_back(submissions=[submission], cancels=(), queues=())
            return
        self._forget_key(submission)
        kept = None if submission.key is None else result.kept_before.get(submission.key)
        if kept is not None and submission.key is not None:
            self._answer_kept(now, submission, submission.key, kept)
            return
        refused: dict[str, errors.LeaseholdError] = {}
        for job in submission.jobs:
            if verdicts[job.job_id] is Verdict.APPLIED:
                self._mirror.submitted(job, now, wall)
                self._out.append(effects.Changed(job.job_id))
            else:
                refused[job.job_id] = requests.refused_by_postgres()
        self._answer_submission(now, submission, refused)

    def _answer_submission(
        self, now: float, submission: outboxes.Submission, refused: dict[str, errors.LeaseholdError]
    ) -> None:
        verdicts = tuple(
            effects.SubmitVerdict("", refused[verdict.job_id]) if verdict.job_id in refused else verdict
            for verdict in submission.verdicts
        )
        if submission.wait is not None:
            self._waits.submitted(now, submission.wait, verdicts[0])
        else:
            self._answer(submission.tickets, verdicts)

    def _answer_kept(
        self,
        now: float,
        submission: outboxes.Submission,
        key: changes.RequestKey,
        kept: changes.KeepAnswer,
    ) -> None:
        if kept.payload_sha256 != submission.payload_sha256:
            if submission.wait is not None:
                self._waits.refuse(submission.wait, answers.reused(key))
            else:
                self._refuse(submission.tickets, answers.reused(key))
            return
        verdicts = answers.decode(kept.answer)
        if submission.wait is not None:
            self._waits.submitted(now, submission.wait, verdicts[0])
        else:
            self._answer(submission.tickets, verdicts)

    def _forget_key(self, submission: outboxes.Submission) -> None:
        if submission.key is not None:
            self._outbox.by_key.pop(submission.key, None)

    def _allocated(
        self,
        now: float,
        flight: outboxes.Flight,
        change: changes.Allocate,
        result: changes.BatchResult,
    ) -> None:
        attempt = self._mirror.allocated(change, flight.planned_at, result.flush_seq, result.time_seconds)
        if attempt.is_external:
            self._reclaim.holders.renew(now, attempt.ref)
        self._execution.allocated(attempt)
        self._waits.placed(now, change.ref.job_id)

    # Lost

    def lost(self) -> None:
        """Nothing is known of the batch in flight."""
        if self._flight is None:
            raise errors.LeaseholdError("a batch was lost that was not in flight")
        self._is_reload_due = True

    def reloaded(self, now: float, loaded: loading.Loaded, *, was_committed: bool) -> None:
        """This is committed. Go on from there."""
        before = self._mirror.jobs
        attempts_before = self._mirror.attempts
        flight, self._flight = self._flight, None
        self._outbox.flying = ()
        self._execution.ends_in_flight = frozenset()
        self._is_reload_due = False
        self._mirror.begin_from(loaded)
        self._reclaim.loaded(now)
        self._outbox.nodes.update(dict.fromkeys(self._mirror.nodes))
        after = self._mirror.jobs
        self._out.extend(map(effects.Changed, loaded.changed))
        self._outbox.ends.clear()
        for attempt in attempts_before.values():
            self._still_live_or_released(attempt)
        for attempt in list(self._mirror.attempts.values()):
            self._allocated_unheard(attempts_before, before, attempt)
        if flight is not None:
            self._again(now, flight, was_committed=was_committed)
        for job_id in self._waits.job_ids():
            if job_id not in after:
                self._waits.gone(job_id)
            elif after[job_id].state is JobState.RUNNING:
                self._waits.placed(now, job_id)
        for job_id in [job_id for job_id in self._outbox.cancels if job_id not in after]:
            self._answer(self._outbox.cancels.pop(job_id).tickets, None)
        self._reclaim.answer_acknowledged()

    def _still_live_or_released(self, attempt: attempts.Attempt) -> None:
        if self._mirror.live(attempt.ref) is None:
            self._reclaim.ended(attempt.ref)
            self._execution.released(attempt)
            self._answer(attempt.tickets, None)
        elif attempt.end is not None:
            self._outbox.ends[attempt.ref.job_id] = None

    def _allocated_unheard(
        self,
        attempts_before: dict[str, attempts.Attempt],
        jobs_before: dict[str, model.JobRecord],
        attempt: attempts.Attempt,
    ) -> None:
        """An allocation that the lost batch made, which no agent was told of; or a wish to cancel."""
        job_id = attempt.ref.job_id
        known = attempts_before.get(job_id)
        if known is None or known.ref != attempt.ref:
            attempt.is_unsent = not attempt.is_external
            self._execution.allocated(attempt)
        elif self._mirror.jobs[job_id].is_cancel_requested and not jobs_before[job_id].is_cancel_requested:
            self._execution.cancel_requested(job_id)

    def _again(self, now: float, flight: outboxes.Flight, *, was_committed: bool) -> None:
        """Answer what is committed, and ask again for the rest."""
        again = [each for each in flight.submissions if not self._is_answered(now, each, was_committed)]
        cancels = [wish for wish in flight.cancels if not self._is_cancelled(wish)]
        queues = [wish for wish in flight.queues if not was_committed]
        for queue_wish in flight.queues:
            if was_committed:
                self._answer_queue(queue_wish)
        self._outbox.put_back(submissions=again, cancels=cancels, queues=queues)

    def _is_answered(self, now: float, submission: outboxes.Submission, was_committed: bool) -> bool:
        missing = [job.job_id for job in submission.jobs if job.job_id not in self._mirror.jobs]
        if submission.key is not None and (missing or not submission.jobs or not was_committed):
            return False
        if not was_committed:
            return False
        refused = {job_id: requests.refused_by_postgres() for job_id in missing}
        self._forget_key(submission)
        self._answer_submission(now, submission, refused)
        return True

    def _is_cancelled(self, wish: outboxes.CancelWish) -> bool:
        job = self._mirror.jobs.get(wish.job_id)
        if job is not None and not (job.state is JobState.RUNNING and job.is_cancel_requested):
            return False
        self._answer(wish.tickets, None)
        return True

    def _answer_queue(self, wish: outboxes.QueueWish) -> None:
        if isinstance(wish.change, changes.DeleteQueue):
            self._outbox.deleting.discard(wish.change.name)
        names = {queue.name for queue in self._mirror.scheduler.queues()}
        if isinstance(wish.change, changes.DeleteQueue) and wish.change.name in names:
            error = errors.FailedPrecondition(f"queue {wish.change.name} has jobs", field="name")
            self._refuse(wish.tickets, error)
        else:
            self._answer(wish.tickets, None)

    # Answers

    def _answer(self, tickets: Iterable[int], value: object) -> None:
        self._out.extend(effects.Answer(ticket, value) for ticket in tickets)

    def _refuse(self, tickets: Iterable[int], error: errors.LeaseholdError) -> None:
        self._out.extend(effects.Answer(ticket, error=error) for ticket in tickets)


def _kept(submission: outboxes.Submission) -> changes.KeepAnswer:
    if submission.key is None:
        raise errors.LeaseholdError("a request without a key keeps no answer")
    return changes.KeepAnswer(
        key=submission.key,
        payload_sha256=submission.payload_sha256,
        answer=answers.encode(submission.verdicts),
        job_ids=tuple(job.job_id for job in submission.jobs),
    )
