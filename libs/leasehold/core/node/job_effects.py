"""What a host's jobs' machine wants done. The driver executes each in order and feeds back what came of it.

======================  ====================================================================================
effect                  fed back
======================  ====================================================================================
`Start`                 `started` when the shim told the process; `start_failed` or `ended` otherwise
`SendSignal`            nothing; `ended` comes, also if it was gone already
`Kill`                  nothing; `ended` comes when its main process is dead. It is told again if it does not
`Clear`                 `cleared` once no process of it is left, however long that takes
`KeepEnd`               `end_kept` once its end is on disk; it is tried until then
`Forget`                nothing
`Note`                  nothing: a line for the log
======================  ====================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core.job import model
from leasehold.core.node import job_life
from leasehold.core.node import model as node_model


@dataclass(frozen=True, slots=True)
class Start:
    """Start an attempt: its intent is on disk before its process is spawned."""

    assignment: job_life.Assignment


@dataclass(frozen=True, slots=True)
class SendSignal:
    """A step of the stop contract."""

    ref: model.AttemptRef
    #: A name of `signal.Signals` without SIG, as TERM.
    signal: str
    scope: node_model.SignalScope
    #: Index of the step, and when its wait is over in the driver's monotonic clock: kept for the next agent.
    step: int
    until_seconds: float
    contract: node_model.StopContract
    why: model.EndCause


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL every process of the attempt, its shim excepted."""

    ref: model.AttemptRef
    why: model.EndCause


@dataclass(frozen=True, slots=True)
class Clear:
    """See that no process of an attempt whose main process is dead is left."""

    ref: model.AttemptRef


@dataclass(frozen=True, slots=True)
class KeepEnd:
    """Write how an attempt ended, or that it never starts, through to the disk."""

    report: model.Report


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove what is kept of an attempt; its log stays for a while."""

    ref: model.AttemptRef


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the log. `event`: job_started, job_stopping, job_killed, job_ended, job_refused."""

    event: str
    fields: Mapping[str, str | int | float] = field(default_factory=dict)


Effect = Start | SendSignal | Kill | Clear | KeepEnd | Forget | Note
