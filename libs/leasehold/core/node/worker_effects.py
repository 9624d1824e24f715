"""What a pool's machine wants done. The driver executes each in order and feeds back what came of it.

======================  ====================================================================================
effect                  fed back
======================  ====================================================================================
`Start`                 `started` when the shim told the process; `start_failed` or `ended` otherwise
`SendSignal`            nothing; a worker that is gone is no error, its `ended` comes anyway
`KillAll`               nothing; `ended` comes when its main process is dead. It is told again if it does not
`KeepExit`              nothing; a failure is only logged (it is for people, after a restart of the agent)
`Forget`                nothing
`Note`                  nothing: a line for the log
======================  ====================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core.node import model


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker: its intent is written before its process is spawned."""

    worker_id: str
    name: str
    number: int
    #: Grows with each start of the pool; kept on disk with the worker.
    start_number: int


@dataclass(frozen=True, slots=True)
class SendSignal:
    """A step of the stop contract: signal the worker's main process, or its group."""

    worker_id: str
    #: A name of `signal.Signals` without SIG, as TERM.
    signal: str
    scope: model.SignalScope
    #: Index of the step, and when its wait is over, in the driver's monotonic clock: kept on disk, so that the
    #: next agent goes on where this one was.
    step: int
    until_seconds: float
    contract: model.StopContract
    #: Another is started in its place when it has ended.
    is_replaced: bool = False


@dataclass(frozen=True, slots=True)
class KillAll:
    """SIGKILL every process of the worker, its shim excepted."""

    worker_id: str
    why: str


@dataclass(frozen=True, slots=True)
class KeepExit:
    """Keep how a worker ended, so that a later agent can show it and does not count it again."""

    worker_id: str
    exit: model.WorkerExit


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove what is kept of a worker that ended a while ago; its log stays."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the log. `event` is one of `EVENTS`."""

    event: str
    fields: Mapping[str, str | int | float] = field(default_factory=dict)


#: Events of `Note`, with their fields.
EVENTS: Mapping[str, tuple[str, ...]] = {
    "worker_started": ("worker", "pid"),
    "worker_adopted": ("worker", "pid"),
    "worker_stopping": ("worker", "signal", "wait_seconds", "why"),
    "worker_killed": ("worker", "why"),
    "worker_ended": ("worker", "cause", "detail"),
    "worker_oom_kill": ("worker", "count"),
    "pool_backoff": ("pool", "seconds", "failures", "why"),
    "pool_backoff_over": ("pool",),
    "pool_blocked": ("pool", "why"),
    "pool_unblocked": ("pool",),
}

Effect = Start | SendSignal | KillAll | KeepExit | Forget | Note
