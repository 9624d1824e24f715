"""What a host's pools and workers are: values, states and the legal moves between them.

Durations are seconds (float), memory is bytes (int). GIB is the "GB" of every setting: 2**30 bytes.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from leasehold.core import errors

GIB = 2**30
MIB = 2**20

_NODE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
#: Of a pool's worker, or of a job's attempt.
_WORKER_NAME = re.compile(
    r"[a-z0-9][a-z0-9_-]{0,62}_[1-9][0-9]{0,4}@[a-z0-9][a-z0-9.-]{0,62}"
    r"|job-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-[1-9][0-9]{0,9}"
)

#: Of one host; more are a mistake in a file.
POOLS_MAX = 64
WORKERS_MAX = 1000


def _checked(text: str, pattern: re.Pattern[str], allowed: str, field_name: str) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        shown = repr(text if not isinstance(text, str) or len(text) <= 60 else text[:57] + "...")
        raise errors.InvalidArgument(f"{field_name}: {shown} is not a name: {allowed}", field=field_name)
    return text


def checked_node_name(name: str, *, field_name: str = "node") -> str:
    """`name` if it is a node's name, else raises `InvalidArgument`."""
    allowed = "1 to 63 of a-z, 0-9, '.', '-', beginning with a letter or digit"
    return _checked(name, _NODE_NAME, allowed, field_name)


def checked_pool_name(name: str, *, field_name: str = "pool") -> str:
    """`name` if it is a pool's name, else raises `InvalidArgument`."""
    allowed = "1 to 63 of a-z, 0-9, '_', '-', beginning with a letter or digit"
    return _checked(name, _POOL_NAME, allowed, field_name)


def checked_worker_name(name: str, *, field_name: str = "worker") -> str:
    """`name` if it is a worker's name, else raises `InvalidArgument`."""
    return _checked(name, _WORKER_NAME, "as POOL_1@NODE, or job-JOBID-ATTEMPT", field_name)


def worker_name(pool: str, number: int, node: str) -> str:
    """The name of a pool's worker: ``transcription_1@r620-1``. `number` counts from 1."""
    return f"{pool}_{number}@{node}"


class WorkerState(enum.StrEnum):
    """Where a worker is in its life; what each means is told in ``worker.proto``."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLING = "killing"
    EXITED = "exited"


#: Every legal move, with its reason.
WORKER_EDGES: Mapping[tuple[WorkerState, WorkerState], str] = MappingProxyType(
    {
        (WorkerState.STARTING, WorkerState.RUNNING): "its shim told the process",
        (WorkerState.STARTING, WorkerState.EXITED): "it could not be started, or ended at once",
        (WorkerState.STARTING, WorkerState.KILLING): "it did not start in time, or must go at once",
        (WorkerState.STARTING, WorkerState.STOPPING): "it must go before it was ready",
        (WorkerState.RUNNING, WorkerState.STOPPING): "it was asked to end",
        (WorkerState.RUNNING, WorkerState.KILLING): "it must go at once",
        (WorkerState.RUNNING, WorkerState.EXITED): "its main process ended",
        (WorkerState.STOPPING, WorkerState.KILLING): "the last step of its stop contract",
        (WorkerState.STOPPING, WorkerState.EXITED): "its main process ended",
        (WorkerState.KILLING, WorkerState.EXITED): "its main process ended",
    }
)

#: States in which a worker's process lives, or may.
ALIVE_STATES = frozenset({WorkerState.STARTING, WorkerState.RUNNING, WorkerState.STOPPING, WorkerState.KILLING})
#: States in which it counts as one of the workers that the pool wants.
LIVE_STATES = frozenset({WorkerState.STARTING, WorkerState.RUNNING})


class ExitCause(enum.StrEnum):
    """Why a worker ended; what each means is told in ``worker.proto``."""

    CLEAN = "clean"
    STOPPED = "stopped"
    CRASHED = "crashed"
    OOM_KILLED = "oom_killed"
    MEMORY_LIMIT = "memory_limit"
    PERMANENT = "permanent"
    NOT_STARTED = "not_started"
    UNKNOWN = "unknown"


class PoolMode(enum.StrEnum):
    """Who decides how many workers a pool has."""

    AUTO = "auto"
    MANUAL = "manual"
    PAUSED = "paused"
    STOPPED = "stopped"


class SignalScope(enum.StrEnum):
    """Whom a step of a stop contract signals.

    MAIN is the only safe one for Celery's prefork: TERM to its group loses the running task and exits 0.
    """

    MAIN = "main"
    GROUP = "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStep:
    """Send a signal, then wait for the worker to end before the next step."""

    #: A name of `signal.Signals` without SIG, as TERM.
    signal: str
    wait_seconds: float
    scope: SignalScope = SignalScope.MAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class StopContract:
    """How a pool's workers are asked to end. After the last step every process of the worker is killed.

    An immediate stop begins at `immediate_step`: past the steps that wait for the running task, but at one that
    still gives it back to its queue.
    """

    steps: tuple[StopStep, ...]
    immediate_step: int = 0
    #: How long the broker hides a task whose worker was killed; 0: it does not, or there is no broker.
    visibility_timeout_seconds: float = 0.0

    def deadline_seconds(self, *, is_immediate: bool = False) -> float:
        """Longest time from the first signal to the kill."""
        first = self.immediate_step if is_immediate else 0
        return sum(step.wait_seconds for step in self.steps[first:])


#: For a command that says nothing: TERM, then the kill.
PLAIN_STOP = StopContract(steps=(StopStep(signal="TERM", wait_seconds=30.0),))


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How fast a pool's crashed workers come back: exponential with jitter, reset after a clean spell."""

    initial_seconds: float = 0.5
    max_seconds: float = 30.0
    #: A worker that ran for so long had no trouble: the backoff begins anew.
    reset_after_seconds: float = 60.0
    #: Exit codes that mean "do not start me again": a wrong configuration, say. s6's is 125.
    permanent_exit_codes: frozenset[int] = frozenset({125})
    #: A worker that ends with code 0 is started again at once; so many that end sooner than this, one after the
    #: other, may do so before the backoff takes them for a loop.
    clean_loop_seconds: float = 5.0
    clean_loop_exits: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """One pool, as the host's own configuration declares it. Sizes are checked by `settings`."""

    name: str
    #: Name of the command template on this host.
    template: str
    parameters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    #: Higher ones are given memory first.
    priority: int = 0
    min_workers: int
    max_workers: int
    worker_limit_bytes: int
    #: Below so much of `free`, one worker fewer.
    threshold_bytes: int
    is_auto_scaling: bool = True
    stop: StopContract = PLAIN_STOP
    restart: RestartPolicy = RestartPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """A host's memory at one instant."""

    total_bytes: int
    #: The least of MemAvailable, each ancestor cgroup's room, and the memory budget.
    available_bytes: int
    #: Which of them: `MemAvailable`, `cgroup PATH`, `memory budget`.
    bound_by: str = "MemAvailable"
    swap_total_bytes: int = 0
    swap_used_bytes: int = 0
    #: PSI, percent of the last 10 s; None: the kernel does not tell.
    pressure_some_percent: float | None = None
    pressure_full_percent: float | None = None
    #: Pages reclaimed by direct reclaim or kswapd since the last sample: evidence beside the pressure.
    reclaimed_pages: int | None = None
    #: Allocated to jobs and not taken by them yet: not for workers.
    promised_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """A worker as sizing sees it."""

    name: str
    state: WorkerState
    #: What `available` regains when it ends. 0 where it was not measured yet.
    held_bytes: int
    #: None: it does not tell.
    is_busy: bool | None = None
    #: Grows with each start: the newest has the highest.
    start_number: int = 0
    #: Whether the kernel keeps it to its limit.
    is_limit_enforced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """What waits in a pool's queues. None: not known, which is never the same as 0."""

    ready: int | None = None
    unacknowledged: int | None = None
    scheduled: int | None = None
    is_lower_bound: bool = False
    error: str = ""

    @property
    def backlog(self) -> int | None:
        """Work that is there now, whether a worker has it or not."""
        if self.ready is None:
            return None
        return self.ready + (self.unacknowledged or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """How a worker ended."""

    cause: ExitCause
    #: None where a signal ended it, or nobody knows. Never 0 in place of not known.
    exit_code: int | None = None
    signal: int = 0
    detail: str = ""
    #: Wall clock, for people; decides nothing.
    end_time_seconds: float = 0.0
    task_id: str = ""
    #: Wall clock; 0: no doubt.
    in_doubt_until_seconds: float = 0.0
    #: Processes of it, other than the main one, that the OOM killer ended and that were not told before.
    oom_kills: int = 0
    #: Its shim ended it, for it ran longer than it may.
    is_timed_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision about a pool, with what it was made from."""

    number: int
    #: The agent's monotonic clock.
    at_seconds: float
    pool: str
    before: int
    after: int
    #: CHECK, HARD_FLOOR, PRESSURE, MANUAL, MODE, START, DRAIN or LIMIT.
    trigger: str
    reasons: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
