"""A snapshot made ready to go on from: most of the work of reading anew, done apart from what is in use.

Nothing here is shared, so another thread may do it while the machine hears events; `mirror.Mirror.begin_from`
takes the result over.
"""

from collections import Counter
from collections.abc import Mapping

from leasehold.core.job import attempts, changes, model
from leasehold.core.job.model import AttemptPhase, JobState
from leasehold.core.placement import model as placement
from leasehold.core.placement import scheduler

#: A job's start and stop take so long at most, beside its `max_run`.
START_AND_STOP_SECONDS = 90.0


class Loaded:
    """What a snapshot tells, by job and counted, and placement that knows all of it but the nodes."""

    def __init__(
        self,
        now: float,
        wall: float,
        snapshot: changes.Snapshot,
        *,
        ageing_seconds: float,
    ) -> None:
        """Read a snapshot; `now` and `wall` are of one instant."""
        self.capacities = snapshot.capacities
        self.is_breaker_open = snapshot.is_breaker_open
        self.scheduler = scheduler.Scheduler(ageing_seconds=ageing_seconds)
        #: PENDING and RUNNING.
        self.jobs: dict[str, model.JobRecord] = {}
        #: By job; UNKNOWN where an agent has them.
        self.attempts: dict[str, attempts.Attempt] = {}
        self.pending: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        for queue in snapshot.queues:
            self.scheduler.put_queue(queue)
        in_line = []
        for job in snapshot.jobs:
            self.jobs[job.job_id] = job
            if job.state is JobState.RUNNING and job.allocation is not None:
                self._runs(now, wall, job, job.allocation)
            else:
                in_line.append(job)
        self.pending.update(job.spec.queue for job in in_line)
        self.scheduler.add_all(waiting(job, now, wall) for job in in_line)
        #: See `compare`.
        self.changed: list[str] = []

    def compare(self, before: Mapping[str, model.JobRecord]) -> None:
        """Have in `changed` the jobs that are other than `before`, or new, or gone."""
        self.changed = [
            job_id
            for job_id in dict.fromkeys([*before, *self.jobs])
            if before.get(job_id) != self.jobs.get(job_id)
        ]

    def _runs(self, now: float, wall: float, job: model.JobRecord, row: model.AllocationRecord) -> None:
        attempt = attempts.Attempt(row.ref, job.spec, row.node, row.boot_id, row.held, row.queue)
        if not attempt.is_external:
            attempt.phase = AttemptPhase.UNKNOWN
        elapsed = max(0.0, wall - (job.start_time_seconds or wall))
        self.attempts[job.job_id] = attempt
        self.running[job.spec.queue] += 1
        self.scheduler.started(running(job, attempt, now - elapsed))


def waiting(job: model.JobRecord, now: float, wall: float) -> placement.Waiting:
    """A pending job, as placement sees it."""
    not_before = float("-inf")
    if job.not_before_seconds is not None:
        not_before = now + job.not_before_seconds - wall
    return placement.Waiting(
        job_id=job.job_id,
        shape=job.spec.shape,
        queue=job.spec.queue,
        priority=job.spec.priority,
        submit_time_seconds=job.submit_time_seconds,
        max_run_seconds=_ends_by(job.spec, 0.0),
        not_before=not_before,
    )


def running(job: model.JobRecord, attempt: attempts.Attempt, started_at: float) -> placement.Running:
    """A live attempt, as placement sees it."""
    return placement.Running(
        job_id=job.job_id,
        node=attempt.node,
        queue=attempt.queue,
        held=attempt.held,
        ends_by=_ends_by(job.spec, started_at),
    )


def _ends_by(spec: model.JobSpec, started_at: float) -> float | None:
    # Nobody ends what runs elsewhere.
    if spec.max_run_seconds is None or not spec.template:
        return None
    return started_at + spec.max_run_seconds + START_AND_STOP_SECONDS
