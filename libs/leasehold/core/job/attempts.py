"""Attempts: how far each is, and what its end makes of its job."""

from dataclasses import dataclass, field

from leasehold.core.job import model
from leasehold.core.job.model import AttemptPhase, EndCause, JobState
from leasehold.core.placement import model as placement

#: Ends in a row that are not the job's fault, after which it fails all the same: nothing here can run it.
INFRASTRUCTURE_ENDS_MAX = 100
DETAIL_LENGTH_MAX = 1000

_NEVER = float("inf")


@dataclass(slots=True)
class Attempt:
    """A live attempt: its row is not released."""

    ref: model.AttemptRef
    spec: model.JobSpec
    node: str
    #: As kept, see `nodes.boot_key`.
    boot_key: str
    held: placement.Resources
    queue: str
    phase: AttemptPhase = AttemptPhase.ALLOCATED
    #: This leader allocated it and told no agent: nobody can have started it.
    is_unsent: bool = False
    #: Its own agent's record says how it ended.
    is_end_reported: bool = False
    #: When this leader heard, for the first time, that it had started.
    started_heard_at: float | None = None
    #: How it ended, as far as is known now; its release is not committed yet.
    end: model.Outcome | None = None
    #: `end` was concluded from silence.
    is_end_by_timeout: bool = False
    #: Whose word `end` is, if an operator's.
    actor: str = ""
    #: Callers who wait for the release.
    tickets: list[int] = field(default_factory=list)

    @property
    def is_external(self) -> bool:
        """The workload runs elsewhere."""
        return not self.spec.template

    def fenced_at(self, fence_grace_seconds: float, drift: float) -> float:
        """When its host must have ended it by itself; infinity: nobody can tell.

        Only of one that was heard to have started: one that has not may still be started late by a host that
        was held up.
        """
        if (
            self.is_external
            or self.spec.on_lost is not model.OnLost.AFTER_FENCE
            or self.spec.max_run_seconds is None
            or self.started_heard_at is None
        ):
            return _NEVER
        return self.started_heard_at + (self.spec.max_run_seconds + fence_grace_seconds) * drift

    def told(self, now: float, report: model.Report) -> bool:
        """Its agent's word on it, while it has not ended; whether its phase is another now."""
        before = self.phase
        if report.phase in (AttemptPhase.STARTED, AttemptPhase.STOPPING) and self.started_heard_at is None:
            self.started_heard_at = now
        # What was asked of it and is on its way is no step back.
        is_asked = before is AttemptPhase.STOPPING and report.phase in (AttemptPhase.SENT, AttemptPhase.STARTED)
        if not is_asked:
            self.phase = report.phase
        return self.phase is not before


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the end of an attempt makes of its job."""

    next_state: JobState
    is_failure: bool
    #: Only with PENDING.
    backoff_seconds: float = 0.0


def judge(job: model.JobRecord, outcome: model.Outcome) -> Judgement:
    """Decide by how a job's attempt ended; a wish to cancel counts where it would be tried again."""
    found = _judge(job, outcome)
    if job.is_cancel_requested and (
        found.next_state is JobState.PENDING
        or outcome.cause in (EndCause.LAPSED, EndCause.FORCED, EndCause.REFUSED)
        or outcome.cause in model.INFRASTRUCTURE_CAUSES
        or (not job.spec.template and outcome.cause is EndCause.FAILED)
    ):
        return Judgement(JobState.CANCELLED, is_failure=False)
    return found


def _judge(job: model.JobRecord, outcome: model.Outcome) -> Judgement:
    spec, cause = job.spec, outcome.cause
    if cause is EndCause.SUCCEEDED:
        return Judgement(JobState.COMPLETED, is_failure=False)
    if cause is EndCause.CANCELLED and job.is_cancel_requested:
        return Judgement(JobState.CANCELLED, is_failure=False)
    if not spec.template:
        # What a holder does next is its own affair.
        return Judgement(JobState.FAILED, is_failure=cause in (EndCause.FAILED, EndCause.LAPSED))
    if cause in model.INFRASTRUCTURE_CAUSES or cause in (EndCause.FORCED, EndCause.CANCELLED):
        return _judge_lost(job, outcome)
    failures = job.failures + 1
    if failures >= spec.retry.max_attempts or cause is EndCause.REFUSED:
        return Judgement(JobState.FAILED, is_failure=True)
    return Judgement(JobState.PENDING, is_failure=True, backoff_seconds=spec.retry.backoff_seconds(failures))


def _judge_lost(job: model.JobRecord, outcome: model.Outcome) -> Judgement:
    """It ended, and not by its own fault."""
    ends = job.attempt - job.failures
    is_never = job.spec.on_lost is model.OnLost.NEVER and outcome.cause is not EndCause.NOT_STARTED
    if is_never or ends >= INFRASTRUCTURE_ENDS_MAX:
        return Judgement(JobState.FAILED, is_failure=False)
    backoff = job.spec.retry.backoff_seconds(max(ends, 1))
    return Judgement(JobState.PENDING, is_failure=False, backoff_seconds=backoff)


def clean_detail(outcome: model.Outcome) -> model.Outcome:
    """An outcome whose text Postgres takes."""
    text = outcome.detail.replace("\0", "").encode("utf-8", "replace").decode("utf-8")[:DETAIL_LENGTH_MAX]
    if text == outcome.detail:
        return outcome
    return model.Outcome(cause=outcome.cause, exit_code=outcome.exit_code, signal=outcome.signal, detail=text)
