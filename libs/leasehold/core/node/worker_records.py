"""Workers as they are told to a pool's machine, and as it tells them."""

from dataclasses import dataclass

from leasehold.core import processes
from leasehold.core.node import model


@dataclass(frozen=True, slots=True, kw_only=True)
class StopProgress:
    """How far an earlier agent got with a worker's stop contract."""

    #: The one by which it is being stopped; the pool's, or that of its start, may have changed since.
    contract: model.StopContract
    #: Index of the step that was in force; the number of steps: the kill.
    step: int
    #: Until the step's wait is over; 0 or less: it is.
    remaining_seconds: float
    is_replaced: bool = False
    #: False: whether the step's signal was sent is not known, so it is sent again.
    is_sent: bool = True
    #: What for, where that decides what its end means: the name of an end's cause. Empty: a worker's stop.
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedWorker:
    """A worker of an earlier agent, as found on this host."""

    worker_id: str
    name: str
    pool: str
    number: int
    start_number: int
    #: None: its shim has not told yet; `started` follows, or `ended`.
    process: processes.ProcessKey | None
    #: None: gone.
    shim: processes.ProcessKey | None
    uptime_seconds: float = 0.0
    limit_bytes: int = 0
    #: As it was when the worker was started: for one whose pool is no longer declared.
    stop: model.StopContract = model.PLAIN_STOP
    #: None: it was not being stopped.
    stopping: StopProgress | None = None
    #: None: it lives.
    exit: model.WorkerExit | None = None
    #: An earlier agent has counted `exit` already.
    is_exit_counted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as status shows it."""

    worker_id: str
    name: str
    pool: str
    number: int
    start_number: int
    state: model.WorkerState
    process: processes.ProcessKey | None = None
    shim: processes.ProcessKey | None = None
    uptime_seconds: float = 0.0
    is_adopted: bool = False
    #: None: it does not tell.
    is_busy: bool | None = None
    task_id: str = ""
    task_name: str = ""
    #: Signal of the step of the stop contract that is in force, `KILL` for the last; empty: none.
    stop_step: str = ""
    #: None: no step is in force.
    stop_step_remaining_seconds: float | None = None
    #: Another is started in its place when it has ended.
    is_replaced: bool = False
    #: Only in EXITED.
    exit: model.WorkerExit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a pool's machine has counted since it was made."""

    starts: int = 0
    #: Ended by themselves with another code than 0, by a signal that was not asked for, or nobody knows how.
    crashes: int = 0
    #: By the kernel's OOM killer: the worker itself, or a process of it while it ran on.
    oom_kills: int = 0
    #: By the agent, over the limit where no cgroup enforces it.
    memory_limit_kills: int = 0
    #: Workers whose running task may be hidden by the broker for a while.
    in_doubt: int = 0
