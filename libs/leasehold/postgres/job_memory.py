"""The ledger of jobs in memory: passes the same contract suite as the one in Postgres; for tests without it."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.placement import model as placement
from leasehold.postgres import job_port, port, rules

_NOTHING = placement.Resources(0, 0)


class MemoryJobStore:
    """Implements `job_port.JobStore`. Set `failure` to have every call raise it: Postgres is away.

    `fail_after_commit` set: the next flush is committed, and its answer is lost.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.failure: errors.LeaseholdError | None = None
        self.fail_after_commit: errors.LeaseholdError | None = None
        self.jobs: dict[str, model.JobRecord] = {}
        self._rows: dict[model.AttemptRef, model.AllocationRecord] = {}
        self._clock = clock
        self._epoch = epochs.ZERO
        self._flush_seq = 0
        self._batch_id = ""
        self._is_breaker_open = False
        self._queues = {model.DEFAULT_QUEUE: placement.Queue(name=model.DEFAULT_QUEUE)}
        self._capacities: dict[str, changes.Capacity] = {}
        self._answers: dict[changes.RequestKey, changes.KeepAnswer] = {}

    async def close(self) -> None:
        """As `job_port.JobStore.close`."""

    def _check(self, epoch: epochs.Epoch | None = None) -> None:
        if self.failure is not None:
            raise self.failure
        if epoch is not None and epoch != self._epoch:
            raise rules.stale_epoch(epoch, self._epoch)

    # The leader

    async def take_over(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """As `job_port.JobStore.take_over`."""
        self._check()
        if epoch < self._epoch:
            raise rules.stale_epoch(epoch, self._epoch)
        self._epoch = epoch
        return await self.reload(epoch)

    async def reload(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """As `job_port.JobStore.reload`."""
        self._check(epoch)
        return changes.Snapshot(
            flush_seq=self._flush_seq,
            queues=tuple(self._queues[name] for name in sorted(self._queues)),
            capacities=tuple(self._capacities[name] for name in sorted(self._capacities)),
            jobs=tuple(job for job in self.jobs.values() if job.state not in model.TERMINAL_STATES),
            is_breaker_open=self._is_breaker_open,
        )

    async def flush(self, epoch: epochs.Epoch, batch: changes.Batch) -> changes.BatchResult:
        """As `job_port.JobStore.flush`."""
        self._check(epoch)
        now = self._clock()
        self._flush_seq += 1
        self._batch_id = batch.batch_id
        kept = {
            answer.key: self._answers[answer.key] for answer in batch.answers if answer.key in self._answers
        }
        refused = {job_id for answer in batch.answers if answer.key in kept for job_id in answer.job_ids}
        result = changes.BatchResult(
            flush_seq=self._flush_seq,
            time_seconds=now,
            ends=tuple(self._end(change, now) for change in batch.ends),
            cancels=tuple(self._cancel(change, now) for change in batch.cancels),
            queues=tuple(self._change_queue(change) for change in batch.queues),
            capacities=tuple(self._set_capacity(change) for change in batch.capacities),
            submits=tuple(self._submit(change, refused) for change in batch.submits),
            allocations=tuple(self._allocate(change, now) for change in batch.allocations),
            kept_before=kept,
        )
        for answer in batch.answers:
            self._answers.setdefault(answer.key, answer)
        lost, self.fail_after_commit = self.fail_after_commit, None
        if lost is not None:
            raise lost
        return result

    async def was_flushed(self, epoch: epochs.Epoch, batch_id: str) -> bool:
        """As `job_port.JobStore.was_flushed`."""
        self._check()
        return self._batch_id == batch_id

    async def set_breaker(self, epoch: epochs.Epoch, *, is_open: bool, cause: str, actor: str = "") -> None:
        """As `job_port.JobStore.set_breaker`."""
        self._check(epoch)
        self._is_breaker_open = is_open

    # Changes

    def _end(self, change: changes.EndAttempt, now: float) -> changes.Verdict:
        job = self.jobs.get(change.ref.job_id)
        row = None if job is None else job.allocation
        if job is None or row is None or row.release_seq or row.ref != change.ref:
            return changes.Verdict.STALE
        is_retry = change.next_state is model.JobState.PENDING
        row = dataclasses.replace(row, release_seq=self._flush_seq, release_time_seconds=now)
        self._rows[row.ref] = row
        self.jobs[job.job_id] = dataclasses.replace(
            job,
            state=change.next_state,
            outcome=change.outcome,
            failures=job.failures + change.is_failure,
            end_time_seconds=None if is_retry else now,
            not_before_seconds=change.not_before_seconds if is_retry else None,
            allocation=row,
        )
        known = self._capacities[row.node]
        used = known.used.minus(row.held)
        self._capacities[row.node] = dataclasses.replace(known, used=used, gated=_larger(known.declared, used))
        return changes.Verdict.APPLIED

    def _cancel(self, change: changes.Cancel, now: float) -> changes.Verdict:
        job = self.jobs.get(change.job_id)
        if job is None or job.state in model.TERMINAL_STATES:
            return changes.Verdict.STALE
        job = dataclasses.replace(job, is_cancel_requested=True)
        if job.state is model.JobState.PENDING:
            job = dataclasses.replace(job, state=model.JobState.CANCELLED, end_time_seconds=now)
        self.jobs[job.job_id] = job
        return changes.Verdict.APPLIED

    def _change_queue(self, change: changes.PutQueue | changes.DeleteQueue) -> changes.Verdict:
        if isinstance(change, changes.PutQueue):
            self._queues[change.queue.name] = change.queue
            return changes.Verdict.APPLIED
        is_used = any(
            job.spec.queue == change.name and job.state not in model.TERMINAL_STATES
            for job in self.jobs.values()
        )
        if is_used or self._queues.pop(change.name, None) is None:
            return changes.Verdict.STALE
        return changes.Verdict.APPLIED

    def _set_capacity(self, change: changes.SetCapacity) -> changes.Verdict:
        known = self._capacities.get(change.node)
        used = _NOTHING if known is None else known.used
        self._capacities[change.node] = changes.Capacity(
            node=change.node,
            boot_id=change.boot_id,
            declared=change.declared,
            gated=_larger(change.declared, used),
            used=used,
        )
        return changes.Verdict.APPLIED

    def _submit(self, change: changes.Submit, refused: Collection[str]) -> changes.Verdict:
        if change.job.job_id in self.jobs or change.job.job_id in refused:
            return changes.Verdict.STALE
        self.jobs[change.job.job_id] = change.job
        return changes.Verdict.APPLIED

    def _allocate(self, change: changes.Allocate, now: float) -> changes.Verdict:
        job, known = self.jobs.get(change.ref.job_id), self._capacities.get(change.node)
        if job is None or job.state is not model.JobState.PENDING or job.attempt != change.ref.attempt - 1:
            return changes.Verdict.STALE
        if known is None or known.boot_id != change.boot_id:
            return changes.Verdict.STALE
        used = known.used.plus(change.held)
        if not known.gated.holds(used):
            return changes.Verdict.POISON
        self._capacities[change.node] = dataclasses.replace(known, used=used)
        row = model.AllocationRecord(
            ref=change.ref,
            node=change.node,
            boot_id=change.boot_id,
            held=change.held,
            queue=change.queue,
            alloc_seq=self._flush_seq,
            allocate_time_seconds=now,
        )
        self._rows[row.ref] = row
        self.jobs[job.job_id] = dataclasses.replace(
            job,
            state=model.JobState.RUNNING,
            attempt=change.ref.attempt,
            start_time_seconds=now,
            not_before_seconds=None,
            allocation=row,
        )
        return changes.Verdict.APPLIED

    # Reading

    async def kept_answers(
        self, keys: Collection[changes.RequestKey]
    ) -> Mapping[changes.RequestKey, changes.KeepAnswer]:
        """As `job_port.JobStore.kept_answers`."""
        self._check()
        return {key: self._answers[key] for key in keys if key in self._answers}

    async def get_job(self, job_id: str) -> model.JobRecord:
        """As `job_port.JobStore.get_job`."""
        self._check()
        job = self.jobs.get(model.checked_job_id(job_id))
        if job is None:
            raise errors.NotFound(f"there is no job {job_id}", field="job_id")
        return job

    async def get_allocation(self, ref: model.AttemptRef) -> model.AllocationRecord:
        """As `job_port.JobStore.get_allocation`."""
        self._check()
        row = self._rows.get(ref)
        if row is None:
            raise job_port.no_such_attempt(ref)
        return row

    async def list_jobs(
        self, chosen: job_port.JobFilter, *, page_size: int, before: tuple[float, str] | None
    ) -> port.Page[model.JobRecord]:
        """As `job_port.JobStore.list_jobs`."""
        self._check()
        rules.checked_page_size(page_size)
        found = sorted(
            (
                job
                for job in self.jobs.values()
                if (not chosen.states or job.state in chosen.states)
                and chosen.queue in ("", job.spec.queue)
                and (not chosen.node or (job.allocation is not None and job.allocation.node == chosen.node))
                and (before is None or (job.submit_time_seconds, job.job_id) < before)
            ),
            key=lambda job: (job.submit_time_seconds, job.job_id),
            reverse=True,
        )
        return port.Page(tuple(found[:page_size]), has_more=len(found) > page_size)

    async def audit(self) -> job_port.LedgerAudit:
        """As `job_port.JobStore.audit`; the counters alone can differ here."""
        self._check()
        return job_port.LedgerAudit(
            findings=tuple(self._findings()),
            rules=("COUNTER_DIFFERS",),
            flush_seq=self._flush_seq,
            live_allocations=len(self._live()),
            nodes=len(self._capacities),
        )

    def _live(self) -> list[model.AllocationRecord]:
        return [row for row in self._rows.values() if not row.release_seq]

    def _findings(self) -> Iterator[job_port.Finding]:
        for node, known in sorted(self._capacities.items()):
            held = _NOTHING
            for row in self._live():
                if row.node == node:
                    held = held.plus(row.held)
            if held != known.used:
                yield job_port.Finding(
                    rule="COUNTER_DIFFERS", subject=node, detail=f"{known.used}, rows {held}"
                )

    async def release_ended(self, epoch: epochs.Epoch) -> int:
        """As `job_port.JobStore.release_ended`: nobody writes rows by hand here."""
        self._check(epoch)
        return 0

    async def keep_house(
        self, epoch: epochs.Epoch, *, retention_seconds: float = job_port.RETENTION_SECONDS
    ) -> Sequence[str]:
        """As `job_port.JobStore.keep_house`."""
        self._check(epoch)
        oldest = self._clock() - rules.checked_age(retention_seconds)
        self.jobs = {
            job_id: job
            for job_id, job in self.jobs.items()
            if job.end_time_seconds is None or job.end_time_seconds >= oldest
        }
        return ()


def _larger(declared: placement.Resources, used: placement.Resources) -> placement.Resources:
    return placement.Resources(max(declared.cpus, used.cpus), max(declared.memory_bytes, used.memory_bytes))
