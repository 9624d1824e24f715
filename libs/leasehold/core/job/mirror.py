"""What is committed of jobs, in memory: records, live attempts, counters; and placement, which is told of each.

Nothing here is changed by what is only asked for.
"""

from collections import Counter
from dataclasses import replace

from leasehold.core.job import attempts, changes, loading, model, nodes
from leasehold.core.job.model import JobState
from leasehold.core.placement import model as placement
from leasehold.core.placement import scheduler


class Mirror:
    """Filled by `begin_from`; each other method applies one committed change."""

    def __init__(self, *, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds
        self.scheduler = scheduler.Scheduler(ageing_seconds=ageing_seconds)
        #: PENDING and RUNNING.
        self.jobs: dict[str, model.JobRecord] = {}
        #: Live attempts, by job.
        self.attempts: dict[str, attempts.Attempt] = {}
        self.nodes: dict[str, nodes.NodeLife] = {}
        self.pending: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        #: A plan may differ from the last one.
        self.is_changed = True

    def prepare(self, now: float, wall: float, snapshot: changes.Snapshot) -> loading.Loaded:
        """Read a snapshot for `begin_from`. Changes nothing here."""
        return loading.Loaded(now, wall, snapshot, ageing_seconds=self._ageing_seconds)

    def begin_from(self, loaded: loading.Loaded) -> None:
        """Begin anew; what is known of nodes and attempts that are live still is kept."""
        known = self.attempts
        self.scheduler = loaded.scheduler
        self.jobs, self.attempts = loaded.jobs, loaded.attempts
        self.pending, self.running = loaded.pending, loaded.running
        for node in self.nodes.values():
            node.boot_key, node.declared, node.used = "", nodes.NOTHING, nodes.NOTHING
            node.jobs.clear()
        for capacity in loaded.capacities:
            node = self.node(capacity.node)
            node.boot_key, node.declared, node.used = capacity.boot_id, capacity.declared, capacity.used
        for job_id, attempt in self.attempts.items():
            before = known.get(job_id)
            if before is not None and before.ref == attempt.ref:
                attempt = self.attempts[job_id] = before
            self.node(attempt.node).jobs.add(job_id)
        # Last, since `started` counts what is in use already.
        for name in self.nodes:
            self.put_node(name)

    def node(self, name: str) -> nodes.NodeLife:
        """A node, made known if it is not."""
        return self.nodes.setdefault(name, nodes.NodeLife(name))

    def put_node(self, name: str) -> None:
        """Tell placement what a node is now."""
        self.is_changed = True
        self.scheduler.put_node(self.nodes[name].placed())

    def live(self, ref: model.AttemptRef) -> attempts.Attempt | None:
        """The attempt, if its row is not released."""
        found = self.attempts.get(ref.job_id)
        return found if found is not None and found.ref == ref else None

    # Committed changes

    def submitted(self, job: model.JobRecord, now: float, wall: float) -> None:
        """A new job."""
        self.jobs[job.job_id] = job
        self._wait(job, now, wall)

    def _wait(self, job: model.JobRecord, now: float, wall: float) -> None:
        self.is_changed = True
        self.pending[job.spec.queue] += 1
        self.scheduler.add(loading.waiting(job, now, wall))

    def allocated(
        self, change: changes.Allocate, planned_at: float, flush_seq: int, time_seconds: float
    ) -> attempts.Attempt:
        """A job has an allocation."""
        job = self.jobs[change.ref.job_id]
        row = model.AllocationRecord(
            ref=change.ref,
            node=change.node,
            boot_id=change.boot_id,
            held=change.held,
            queue=change.queue,
            alloc_seq=flush_seq,
            allocate_time_seconds=time_seconds,
        )
        job = self.jobs[job.job_id] = replace(
            job,
            state=JobState.RUNNING,
            attempt=change.ref.attempt,
            start_time_seconds=time_seconds,
            not_before_seconds=None,
            allocation=row,
        )
        self.pending[job.spec.queue] -= 1
        node = self.nodes[change.node]
        node.used = node.used.plus(change.held)
        attempt = attempts.Attempt(
            change.ref,
            job.spec,
            change.node,
            change.boot_id,
            change.held,
            change.queue,
            is_unsent=bool(job.spec.template),
        )
        self._start(job, attempt, planned_at)
        return attempt

    def _start(self, job: model.JobRecord, attempt: attempts.Attempt, started_at: float) -> None:
        self.is_changed = True
        self.attempts[job.job_id] = attempt
        self.node(attempt.node).jobs.add(job.job_id)
        self.running[job.spec.queue] += 1
        self.scheduler.started(loading.running(job, attempt, started_at))

    def ended(
        self, change: changes.EndAttempt, now: float, wall: float, flush_seq: int, time_seconds: float
    ) -> model.JobRecord:
        """An attempt's row is released, and its job moved. The job's new record."""
        job_id = change.ref.job_id
        attempt, job = self.attempts.pop(job_id), self.jobs[job_id]
        node = self.nodes[attempt.node]
        node.jobs.discard(job_id)
        node.used = node.used.minus(attempt.held)
        self.running[job.spec.queue] -= 1
        self.is_changed = True
        self.scheduler.ended(job_id)
        is_retried = change.next_state is JobState.PENDING
        row = job.allocation
        job = replace(
            job,
            state=change.next_state,
            outcome=change.outcome,
            failures=job.failures + change.is_failure,
            end_time_seconds=None if is_retried else time_seconds,
            not_before_seconds=change.not_before_seconds if is_retried else None,
            allocation=row and replace(row, release_seq=flush_seq, release_time_seconds=time_seconds),
        )
        if is_retried:
            self.jobs[job_id] = job
            self._wait(job, now, wall)
        else:
            del self.jobs[job_id]
        return job

    def cancelled(self, job_id: str) -> None:
        """A job is cancelled in line, or is to end."""
        job = self.jobs.get(job_id)
        if job is None:
            return
        if job.state is JobState.RUNNING:
            self.jobs[job_id] = replace(job, is_cancel_requested=True)
            return
        del self.jobs[job_id]
        self.pending[job.spec.queue] -= 1
        self.is_changed = True
        self.scheduler.remove(job_id)

    def capacity_set(self, change: changes.SetCapacity) -> None:
        """A node's row tells another capacity."""
        node = self.node(change.node)
        node.boot_key, node.declared = change.boot_id, change.declared
        self.put_node(change.node)

    def queue_changed(self, change: changes.PutQueue | changes.DeleteQueue) -> None:
        """A queue was put or deleted."""
        self.is_changed = True
        if isinstance(change, changes.PutQueue):
            self.scheduler.put_queue(change.queue)
        else:
            self.scheduler.remove_queue(change.name)

    # Checks

    def has_unheard_room(self, required: placement.Resources) -> bool:
        """Whether a node that this leader has not heard of yet, so whose labels it cannot know, might do."""
        return any(node.facts is None and node.declared.holds(required) for node in self.nodes.values())
