"""One attempt of a job on its node: how far it is, and what its end means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from leasehold.core.job import model
from leasehold.core.job.model import AttemptPhase, EndCause
from leasehold.core.node import model as node_model
from leasehold.core.node import stopping
from leasehold.core.node.model import ExitCause
from leasehold.core.placement import model as placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the leader wants run."""

    ref: model.AttemptRef
    template: str
    parameters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    held: placement.Resources
    #: None: without end.
    max_run_seconds: float | None = None
    #: For people.
    name: str = ""


@dataclass(slots=True)
class AttemptLife:
    """One attempt, from its assignment, its adoption or its refusal until the leader has committed its end."""

    ref: model.AttemptRef
    held: placement.Resources = field(default_factory=lambda: placement.Resources(0, 0))
    max_run_seconds: float | None = None
    template: str = ""
    stop: node_model.StopContract = node_model.PLAIN_STOP
    phase: AttemptPhase = AttemptPhase.SENT
    #: Whether a process of it runs, or may.
    is_alive: bool = True
    #: Monotonic; None: it has not started.
    started_at: float | None = None
    start_time_seconds: float | None = None
    end_time_seconds: float | None = None
    #: The leader, or the end of the agent, asked for its end, and why it will be told so.
    asked_for: EndCause | None = None
    ladder: stopping.Ladder | None = None
    #: Wall clock of the first signal; None: none was sent yet.
    signalled_seconds: float | None = None
    #: The agent killed it for this.
    killed_for: EndCause | None = None
    why: str = ""
    #: When a kill is told again; None: none was.
    kill_again_at: float | None = None
    #: Samples in which it held more than it may, one after the other.
    over_count: int = 0
    memory_held_bytes: int = 0
    outcome: model.Outcome | None = None

    @property
    def report(self) -> model.Report:
        """As the leader is told."""
        is_ended = self.phase is AttemptPhase.ENDED
        return model.Report(
            ref=self.ref,
            phase=self.phase,
            outcome=self.outcome if is_ended else None,
            start_time_seconds=self.start_time_seconds,
            end_time_seconds=self.end_time_seconds if is_ended else None,
        )

    @property
    def promised_bytes(self) -> int:
        """Memory that it was given and does not hold yet: nobody else may have it."""
        return max(0, self.held.memory_bytes - self.memory_held_bytes) if self.is_alive else 0

    @property
    def fence_at(self) -> float | None:
        """When the agent ends it although its shim should have; None: never."""
        if self.started_at is None or self.max_run_seconds is None:
            return None
        grace_seconds = model.KILL_GRACE_SECONDS + model.FENCE_MARGIN_SECONDS
        return self.started_at + self.max_run_seconds + grace_seconds

    def judged(self, told: node_model.WorkerExit, *, is_rebooted: bool) -> model.Outcome:
        """What was asked of it decides what its end means; an end before the first signal is its own."""
        cause, detail = self._cause(told, is_rebooted=is_rebooted)
        if self.why and cause in (self.asked_for, self.killed_for):
            detail = f"{self.why} ({detail})" if detail else self.why
        return model.Outcome(cause=cause, exit_code=told.exit_code, signal=told.signal, detail=detail)

    def _cause(self, told: node_model.WorkerExit, *, is_rebooted: bool) -> tuple[EndCause, str]:
        if told.cause is ExitCause.NOT_STARTED:
            return EndCause.NOT_STARTED, told.detail
        if is_rebooted and told.cause is ExitCause.UNKNOWN:
            return EndCause.NODE_LOST, told.detail
        if self.killed_for is not None and (told.signal == 9 or told.cause is ExitCause.UNKNOWN):
            return self.killed_for, told.detail
        # The shim's own clock tells when it saw the end, which is after the end itself.
        is_asked = self.signalled_seconds is not None and not (
            0.0 < told.end_time_seconds < self.signalled_seconds
        )
        if self.asked_for is not None and is_asked:
            return self.asked_for, told.detail
        if told.is_timed_out:
            limit = "it may" if self.max_run_seconds is None else f"{self.max_run_seconds:g} s"
            return EndCause.TIMED_OUT, f"it ran for longer than {limit} ({told.detail})"
        if told.cause is ExitCause.OOM_KILLED:
            return EndCause.OOM_KILLED, told.detail
        if told.cause is ExitCause.CLEAN:
            return EndCause.SUCCEEDED, told.detail
        if told.oom_kills:
            killed = f"out of memory: {told.oom_kills} of its processes were killed"
            return EndCause.OOM_KILLED, f"{told.detail}; {killed}"
        return EndCause.FAILED, told.detail
