"""Requests of callers: checked against what is committed, and put in line for the next batch."""

from collections.abc import Collection, Sequence

from leasehold.core import errors
from leasehold.core.job import answers, changes, effects, model, outbox
from leasehold.core.job import mirror as mirrors
from leasehold.core.placement import model as placement


def refusal(mirror: mirrors.Mirror, asked: outbox.Outbox, spec: model.JobSpec) -> errors.LeaseholdError | None:
    """Why a job is not taken; None: it is."""
    known = {queue.name for queue in mirror.scheduler.queues()}
    if spec.queue not in known or spec.queue in asked.deleting:
        return errors.NotFound(f"queue: there is no queue {spec.queue}", field="queue")
    if spec.wait_for_capacity or mirror.has_unheard_room(spec.required):
        return None
    if spec.template and not mirror.scheduler.has_template(spec.template):
        return errors.NotFound(f"template: no host declares a job template {spec.template}", field="template")
    found = mirror.scheduler.check(spec.shape, spec.queue)
    if found is None:
        return None
    field = _field(mirror, spec, found)
    return errors.InvalidArgument(
        f"{field}: no node that is known could ever hold this: {found.summary}", field=field
    )


def _field(mirror: mirrors.Mirror, spec: model.JobSpec, found: placement.Explanation) -> str:
    if any(blocked.reason is placement.BlockReason.WRONG_LABEL for blocked in found.blocked) and not any(
        blocked.reason is placement.BlockReason.TOO_SMALL for blocked in found.blocked
    ):
        return "node_selector"
    cpus = max((node.declared.cpus for node in mirror.nodes.values()), default=0)
    if found.held_back is placement.HeldBack.QUEUE_QUOTA:
        quota = [queue.nominal_cpus for queue in mirror.scheduler.queues() if queue.name == spec.queue]
        nominal = quota[0] if quota else None
        cpus = cpus if nominal is None else nominal
    return "required_cpus" if spec.required.cpus > cpus else "required_memory_bytes"


def submission(
    mirror: mirrors.Mirror,
    asked: outbox.Outbox,
    specs: Sequence[model.JobSpec],
    *,
    wall: float,
    principal: str,
    job_ids: Sequence[str],
    key: changes.RequestKey | None,
    payload_sha256: bytes,
    is_all_or_none: bool,
) -> outbox.Submission:
    """A request's jobs, each taken or refused."""
    # Many jobs of a batch are alike.
    known: dict[tuple[placement.Shape, str, bool], errors.LeaseholdError | None] = {}
    refusals: list[errors.LeaseholdError | None] = []
    for spec in specs:
        kind = (spec.shape, spec.queue, spec.wait_for_capacity)
        if kind not in known:
            known[kind] = refusal(mirror, asked, spec)
        refusals.append(known[kind])
    if is_all_or_none and any(refusals):
        refusals = [error or _refused_together() for error in refusals]
    jobs, verdicts = [], []
    for spec, job_id, error in zip(specs, job_ids, refusals, strict=True):
        if error is not None:
            verdicts.append(effects.SubmitVerdict("", error))
            continue
        verdicts.append(effects.SubmitVerdict(job_id))
        jobs.append(
            model.JobRecord(
                job_id=job_id,
                spec=spec,
                state=model.JobState.PENDING,
                principal=principal,
                submit_time_seconds=wall,
            )
        )
    return outbox.Submission(tuple(verdicts), tuple(jobs), payload_sha256, key, is_all_or_none)


def _refused_together() -> errors.RefusedTogether:
    return errors.RefusedTogether("another job of the same request was refused")


def refused_by_postgres() -> errors.LeaseholdError:
    """The verdict on a job that passed every check here, and that Postgres does not take."""
    return errors.InvalidArgument("Postgres refuses what is in this job", field="spec")


def leave_out(asked: outbox.Submission, job_ids: Collection[str]) -> None:
    """Refuse these jobs of a request, of which nothing is committed; with it all, if it is all or none."""
    refusals: dict[str, errors.LeaseholdError] = dict.fromkeys(job_ids, refused_by_postgres())
    if asked.is_all_or_none:
        refusals = {job.job_id: refusals.get(job.job_id, _refused_together()) for job in asked.jobs}
    asked.verdicts = tuple(
        effects.SubmitVerdict("", refusals[verdict.job_id]) if verdict.job_id in refusals else verdict
        for verdict in asked.verdicts
    )
    asked.jobs = tuple(job for job in asked.jobs if job.job_id not in refusals)


def waiting_twin(
    asked: outbox.Outbox, key: changes.RequestKey | None, payload_sha256: bytes
) -> outbox.Submission | None:
    """The same request, which is not committed yet. Raises `RequestIdReused` if its payload is another."""
    twin = None if key is None else asked.by_key.get(key)
    if twin is not None and key is not None and twin.payload_sha256 != payload_sha256:
        raise answers.reused(key)
    return twin


def check_deletable(mirror: mirrors.Mirror, asked: outbox.Outbox, name: str) -> None:
    """Raises `NotFound`, or `FailedPrecondition` while jobs of a queue are pending or running."""
    if name == model.DEFAULT_QUEUE:
        raise errors.FailedPrecondition(f"queue {name} is always there", field="name")
    if name not in {queue.name for queue in mirror.scheduler.queues()} or name in asked.deleting:
        raise errors.NotFound(f"there is no queue {name}", field="name")
    pending, running = mirror.pending[name], mirror.running[name]
    if pending or running or name in asked.queues_used():
        raise errors.FailedPrecondition(
            f"queue {name} has {pending} pending and {running} running jobs", field="name"
        )
