"""A ledger and agents of jobs for tests, written apart from the product's: they believe only what happened.

The ledger refuses, with an assertion, whatever must never be committed; the world counts what really ran.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from leasehold.core.job import changes, effects, model
from leasehold.core.job.changes import Verdict
from leasehold.core.job.model import AttemptPhase, AttemptRef, EndCause, JobState
from leasehold.core.placement import model as placement

TEMPLATE = "work"


@dataclass
class Ledger:
    """What is committed."""

    jobs: dict[str, model.JobRecord] = field(default_factory=dict)
    live: dict[str, changes.Allocate] = field(default_factory=dict)
    capacity: dict[str, tuple[str, placement.Resources]] = field(default_factory=dict)
    queues: dict[str, placement.Queue] = field(
        default_factory=lambda: {"default": placement.Queue(name="default")}
    )
    answers: dict[changes.RequestKey, changes.KeepAnswer] = field(default_factory=dict)
    ended: set[AttemptRef] = field(default_factory=set)
    is_breaker_open: bool = False
    sequence: int = 0

    def used(self, node: str) -> placement.Resources:
        """Summed over live rows."""
        held = [row.held for row in self.live.values() if row.node == node]
        return placement.Resources(sum(each.cpus for each in held), sum(each.memory_bytes for each in held))

    def snapshot(self) -> changes.Snapshot:
        capacities = []
        for node, (boot_id, declared) in self.capacity.items():
            used = self.used(node)
            gated = placement.Resources(
                max(used.cpus, declared.cpus), max(used.memory_bytes, declared.memory_bytes)
            )
            capacities.append(
                changes.Capacity(node=node, boot_id=boot_id, declared=declared, gated=gated, used=used)
            )
        return changes.Snapshot(
            flush_seq=self.sequence,
            queues=tuple(self.queues.values()),
            capacities=tuple(capacities),
            jobs=tuple(job for job in self.jobs.values() if job.state not in model.TERMINAL_STATES),
            is_breaker_open=self.is_breaker_open,
        )

    def commit(self, batch: changes.Batch, now: float) -> changes.BatchResult:
        assert len(batch) <= changes.CHANGES_MAX
        self.sequence += 1
        kept = {each.key: self.answers[each.key] for each in batch.answers if each.key in self.answers}
        void = {job_id for each in batch.answers if each.key in kept for job_id in each.job_ids}
        result = changes.BatchResult(
            flush_seq=self.sequence,
            time_seconds=now,
            ends=tuple(self._end(each, now) for each in batch.ends),
            cancels=tuple(self._cancel(each, now) for each in batch.cancels),
            queues=tuple(self._queue(each) for each in batch.queues),
            capacities=tuple(self._capacity(each) for each in batch.capacities),
            submits=tuple(self._submit(each, void) for each in batch.submits),
            allocations=tuple(self._allocate(each, now) for each in batch.allocations),
            kept_before=kept,
        )
        for each in batch.answers:
            self.answers.setdefault(each.key, each)
        return result

    def _move(self, job_id: str, state: JobState, **fields: Any) -> None:
        job = self.jobs[job_id]
        assert (job.state, state) in model.JOB_EDGES, f"{job.state} became {state}"
        self.jobs[job_id] = replace(job, state=state, **fields)

    def _end(self, change: changes.EndAttempt, now: float) -> Verdict:
        row = self.live.get(change.ref.job_id)
        assert row is not None, "an attempt ended twice"
        assert row.ref == change.ref
        assert change.ref not in self.ended
        self.ended.add(change.ref)
        del self.live[change.ref.job_id]
        job = self.jobs[change.ref.job_id]
        assert job.allocation is not None
        is_retried = change.next_state is JobState.PENDING
        cause = change.outcome.cause
        assert (cause is EndCause.SUCCEEDED) == (change.next_state is JobState.COMPLETED)
        if is_retried and job.spec.on_lost is model.OnLost.NEVER:
            assert cause not in (EndCause.NODE_LOST, EndCause.LAPSED), "what must never repeat is repeated"
        self._move(
            change.ref.job_id,
            change.next_state,
            outcome=change.outcome,
            failures=job.failures + change.is_failure,
            end_time_seconds=None if is_retried else now,
            not_before_seconds=change.not_before_seconds,
            allocation=replace(job.allocation, release_seq=self.sequence, release_time_seconds=now),
        )
        return Verdict.APPLIED

    def _cancel(self, change: changes.Cancel, now: float) -> Verdict:
        job = self.jobs[change.job_id]
        if job.state in model.TERMINAL_STATES:
            return Verdict.STALE
        self.jobs[change.job_id] = replace(job, is_cancel_requested=job.state is JobState.RUNNING)
        if job.state is JobState.PENDING:
            self._move(change.job_id, JobState.CANCELLED, end_time_seconds=now)
        return Verdict.APPLIED

    def _queue(self, change: changes.PutQueue | changes.DeleteQueue) -> Verdict:
        if isinstance(change, changes.PutQueue):
            self.queues[change.queue.name] = change.queue
            return Verdict.APPLIED
        of_it = [job for job in self.jobs.values() if job.spec.queue == change.name]
        assert all(job.state in model.TERMINAL_STATES for job in of_it), "a queue that has jobs was deleted"
        self.queues.pop(change.name, None)
        return Verdict.APPLIED

    def _capacity(self, change: changes.SetCapacity) -> Verdict:
        self.capacity[change.node] = (change.boot_id, change.declared)
        return Verdict.APPLIED

    def _submit(self, change: changes.Submit, void: set[str]) -> Verdict:
        if change.job.job_id in void:
            return Verdict.STALE
        assert change.job.job_id not in self.jobs, "a job was submitted twice"
        assert change.job.spec.queue in self.queues
        self.jobs[change.job.job_id] = change.job
        return Verdict.APPLIED

    def _allocate(self, change: changes.Allocate, now: float) -> Verdict:
        job = self.jobs[change.ref.job_id]
        assert change.ref.attempt == job.attempt + 1
        assert change.ref.job_id not in self.live, "two live attempts of a job"
        boot_id, declared = self.capacity[change.node]
        assert change.boot_id == boot_id
        used = self.used(change.node).plus(change.held)
        assert declared.holds(used), f"{change.node} would be over-allocated: {used} of {declared}"
        quota = self.queues[change.queue].nominal_cpus
        in_queue = sum(row.held.cpus for row in self.live.values() if row.queue == change.queue)
        assert quota is None or in_queue + change.held.cpus <= quota, "over the quota of its queue"
        self.live[change.ref.job_id] = change
        row = model.AllocationRecord(
            ref=change.ref,
            node=change.node,
            boot_id=change.boot_id,
            held=change.held,
            queue=change.queue,
            alloc_seq=self.sequence,
            allocate_time_seconds=now,
        )
        self._move(
            change.ref.job_id,
            JobState.RUNNING,
            attempt=change.ref.attempt,
            start_time_seconds=now,
            not_before_seconds=None,
            allocation=row,
        )
        return Verdict.APPLIED


@dataclass
class Executions:
    """What really runs, wherever that is."""

    running: dict[AttemptRef, tuple[str, float]] = field(default_factory=dict)
    starts: dict[AttemptRef, int] = field(default_factory=dict)

    def start(self, ref: AttemptRef, node: str, now: float) -> None:
        self.starts[ref] = self.starts.get(ref, 0) + 1
        assert self.starts[ref] == 1, f"{ref} was started twice"
        others = [other for other in self.running if other.job_id == ref.job_id]
        assert not others, f"{ref} overlaps {others}"
        self.running[ref] = (node, now)


@dataclass
class Agent:
    """A host's agent, whose state folder outlives it."""

    name: str
    executions: Executions
    boot: int = 1
    folder: int = 1
    cpus: int = 4
    is_connected: bool = False
    is_draining: bool = False
    #: What the folder knows: an outcome where it has ended.
    known: dict[AttemptRef, model.Outcome | None] = field(default_factory=dict)
    asked_to_stop: set[AttemptRef] = field(default_factory=set)
    #: On their way, each way.
    inbox: list[effects.Effect] = field(default_factory=list)
    outbox: list[model.Report] = field(default_factory=list)

    def facts(self) -> effects.NodeFacts:
        openness = placement.Openness.DRAINING if self.is_draining else placement.Openness.OPEN
        return effects.NodeFacts(
            name=self.name,
            boot_id=f"boot-{self.name}-{self.boot}",
            node_id=f"folder-{self.name}-{self.folder}",
            declared=placement.Resources(self.cpus, 100),
            templates=frozenset({TEMPLATE}),
            openness=openness if self.is_connected else placement.Openness.NOT_READY,
            is_connected=self.is_connected,
        )

    def report(self, ref: AttemptRef) -> model.Report:
        outcome = self.known[ref]
        phase = AttemptPhase.SENT
        if outcome is not None:
            phase = AttemptPhase.ENDED
        elif ref in self.executions.running:
            phase = AttemptPhase.STOPPING if ref in self.asked_to_stop else AttemptPhase.STARTED
        return model.Report(ref=ref, phase=phase, outcome=outcome)

    def inventory(self) -> list[model.Report]:
        return [self.report(ref) for ref in self.known]

    def _tell(self, ref: AttemptRef) -> None:
        if self.is_connected:
            self.outbox.append(self.report(ref))

    def take(self, message: effects.Effect) -> None:
        if isinstance(message, effects.Assign):
            if message.ref not in self.known:
                self.known[message.ref] = None
                self._tell(message.ref)
        elif isinstance(message, effects.Stop):
            self.asked_to_stop.add(message.ref)
            is_running = message.ref in self.known and message.ref in self.executions.running
            if not is_running and self.known.get(message.ref) is None:
                # A tombstone: it never starts here. What a lost folder knew runs on.
                self.known[message.ref] = model.Outcome(cause=EndCause.CANCELLED)
                self._tell(message.ref)
        elif isinstance(message, effects.Forget) and message.ref in self.known:
            assert self.known.pop(message.ref) is not None, "what has not ended was to be forgotten"

    def start(self, ref: AttemptRef, now: float) -> None:
        self.executions.start(ref, self.name, now)
        self._tell(ref)

    def end(self, ref: AttemptRef, cause: EndCause) -> None:
        del self.executions.running[ref]
        if ref not in self.known:
            # The folder that it was to be kept in is lost.
            return
        self.known[ref] = model.Outcome(cause=cause)
        self._tell(ref)

    def reboot(self) -> None:
        self.boot += 1
        self.is_connected = False
        self.inbox.clear()
        self.outbox.clear()
        for ref in self.running():
            del self.executions.running[ref]
        for ref, outcome in self.known.items():
            if outcome is None:
                self.known[ref] = model.Outcome(cause=EndCause.NODE_LOST)

    def disconnect(self) -> None:
        self.is_connected = False
        self.inbox.clear()
        self.outbox.clear()

    def waiting_to_start(self) -> list[AttemptRef]:
        return [
            ref for ref, outcome in self.known.items() if outcome is None and ref not in self.executions.running
        ]

    def running(self) -> list[AttemptRef]:
        return [ref for ref, (node, _) in self.executions.running.items() if node == self.name]
