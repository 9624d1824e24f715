"""What is true of the machine of jobs after every event; tests run it after every step."""

from leasehold.core.job import machine, model
from leasehold.core.job.model import AttemptPhase, JobState
from leasehold.core.job.nodes import NOTHING


def check(jobs: machine.JobMachine) -> None:
    """Assert the invariants of a machine, whose effects were taken or not."""
    mirror = jobs.mirror
    running = {job_id for job_id, job in mirror.jobs.items() if job.state is JobState.RUNNING}
    assert running == set(mirror.attempts), "who runs has a live attempt, and nobody else"
    assert jobs.pending_count == len(mirror.jobs) - len(running)
    assert all(job.state not in model.TERMINAL_STATES for job in mirror.jobs.values())
    for job_id, attempt in mirror.attempts.items():
        job = mirror.jobs[job_id]
        assert attempt.ref == (job_id, job.attempt)
        assert job_id in mirror.nodes[attempt.node].jobs
        assert (attempt.end is not None) == (attempt.phase is AttemptPhase.ENDED), f"{attempt}"
        if attempt.is_external:
            is_renewing = attempt.ref in jobs.reclaim.holders
            assert is_renewing == (attempt.end is None), (
                "a holder that nobody waits for, or that is waited for twice"
            )
        if attempt.is_unsent:
            assert attempt.phase in (AttemptPhase.ALLOCATED, AttemptPhase.ENDED)
    for name, node in mirror.nodes.items():
        used = NOTHING
        for job_id in node.jobs:
            used = used.plus(mirror.attempts[job_id].held)
        assert used == node.used, f"{name} has {node.used} in use, its attempts {used}"
    for queue in jobs.queue_usage():
        mine = [job for job in mirror.jobs.values() if job.spec.queue == queue.queue.name]
        held = NOTHING
        for job in mine:
            if job.state is JobState.RUNNING:
                held = held.plus(job.spec.required)
        assert held == queue.used, f"queue {queue.queue.name}"
        assert queue.running_jobs == sum(job.state is JobState.RUNNING for job in mine)
        assert queue.pending_jobs + queue.running_jobs == len(mine)
