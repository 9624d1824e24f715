"""What jobs, attempts and allocations are: values, states and the legal moves between them.

CPUs are whole processors (int), memory is bytes (int), durations are seconds (float). Times that are kept are
wall clock seconds since 1970, for people and for retention; no lease is decided by them.
"""

import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from leasehold.core import errors
from leasehold.core.placement import model as placement

PRIORITY_MAX = 1000
CPUS_MAX = 100_000
MEMORY_BYTES_MAX = 2**62
NAME_LENGTH_MAX = 128
SELECTOR_MAX = 32
LABEL_LENGTH_MAX = 63
PARAMETERS_MAX = 64
PARAMETER_LENGTH_MAX = 4096
ATTEMPTS_MAX = 100
RUN_SECONDS_MAX = 366 * 86_400.0
BACKOFF_SECONDS_MAX = 86_400.0
DEFAULT_QUEUE = "default"

#: From SIGTERM to SIGKILL of an attempt that ran longer than it may; its shim keeps to it.
KILL_GRACE_SECONDS = 10.0
#: So long after the kill the agent does it itself: the shim may have been killed.
FENCE_MARGIN_SECONDS = 5.0

_JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_QUEUE = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_LOG_NAME = re.compile(r"job-([0-9a-f-]{36})-([1-9][0-9]{0,9})")
_PARAMETER = re.compile(r"[a-z][a-z0-9_]{0,62}")
_NOTHING: Mapping[str, str] = MappingProxyType({})
#: Many jobs are alike, and share one.
_SHAPES_KEPT = 4096


class JobState(enum.StrEnum):
    """Where a job is in its life; what each means is told in ``job.proto``."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


TERMINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})

#: Every legal move, with its reason.
JOB_EDGES: Mapping[tuple[JobState, JobState], str] = MappingProxyType(
    {
        (JobState.PENDING, JobState.RUNNING): "it was given an allocation",
        (JobState.PENDING, JobState.CANCELLED): "it was cancelled in line",
        (JobState.RUNNING, JobState.COMPLETED): "its attempt succeeded",
        (JobState.RUNNING, JobState.FAILED): "its attempt failed, and it may not be tried again",
        (JobState.RUNNING, JobState.CANCELLED): "its attempt ended since it was cancelled",
        (JobState.RUNNING, JobState.PENDING): "its attempt ended, and it is tried again",
    }
)


class AttemptPhase(enum.StrEnum):
    """How far an attempt is on its node; what each means is told in ``job.proto``."""

    ALLOCATED = "ALLOCATED"
    SENT = "SENT"
    STARTED = "STARTED"
    STOPPING = "STOPPING"
    ENDED = "ENDED"
    UNKNOWN = "UNKNOWN"


class EndCause(enum.StrEnum):
    """Why an attempt ended; what each means is told in ``job.proto``."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    OOM_KILLED = "OOM_KILLED"
    TIMED_OUT = "TIMED_OUT"
    CANCELLED = "CANCELLED"
    NOT_STARTED = "NOT_STARTED"
    NODE_LOST = "NODE_LOST"
    LAPSED = "LAPSED"
    FORCED = "FORCED"
    REFUSED = "REFUSED"


#: Ends that are not the job's fault: they count no attempt.
INFRASTRUCTURE_CAUSES = frozenset({EndCause.NODE_LOST, EndCause.NOT_STARTED})


class OnLost(enum.StrEnum):
    """What becomes of a job whose node is silent."""

    NEVER = "never"
    AFTER_PROOF = "after_proof"
    AFTER_FENCE = "after_fence"


class AttemptRef(NamedTuple):
    """One attempt of one job: the token that guards its start, its reports and its release."""

    job_id: str
    attempt: int

    @property
    def log_name(self) -> str:
        """The name of its log and of its processes on its node, as a worker's: ``job-JOBID-ATTEMPT``."""
        return f"job-{self.job_id}-{self.attempt}"

    @classmethod
    def of_log_name(cls, name: str) -> "AttemptRef | None":
        """The attempt that `name` is of; None if it is none's."""
        found = _LOG_NAME.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]))


def checked_job_id(job_id: str, *, field_name: str = "job_id") -> str:
    """`job_id` if it is one, else raises `InvalidArgument`."""
    if not _JOB_ID.fullmatch(job_id):
        raise errors.InvalidArgument(f"{field_name}: {job_id[:60]!r} is not a job id", field=field_name)
    return job_id


def checked_queue_name(name: str, *, field_name: str = "queue") -> str:
    """`name` if it is a queue's, else raises `InvalidArgument`."""
    if not _QUEUE.fullmatch(name):
        raise errors.InvalidArgument(
            f"{field_name}: {name[:70]!r} is not a name: 1 to 63 of a-z, 0-9, '_', '-', "
            "beginning with a letter or digit",
            field=field_name,
        )
    return name


def _wrong(name: str, allowed: str, found: object) -> errors.InvalidArgument:
    # Made of what is wrong only: a batch has a thousand jobs, and texts cost more than the checks.
    return errors.InvalidArgument(f"{name}: {allowed}, not {found!r:.80}", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, and after how long. Raises `InvalidArgument`, naming the field."""

    #: By the job's own fault; 1: it is not tried again.
    max_attempts: int = 1
    initial_backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= ATTEMPTS_MAX:
            raise _wrong("retry.max_attempts", f"1 to {ATTEMPTS_MAX}", self.max_attempts)
        for name, seconds in (
            ("retry.initial_backoff", self.initial_backoff_seconds),
            ("retry.max_backoff", self.max_backoff_seconds),
        ):
            if not 0.0 < seconds <= BACKOFF_SECONDS_MAX:
                raise _wrong(name, "above 0 and at most a day", seconds)

    def backoff_seconds(self, failures: int) -> float:
        """How long to wait after `failures` ends, 1 or more: doubled with each, bounded."""
        doubled = self.initial_backoff_seconds * 2.0 ** min(failures - 1, 60)
        return min(doubled, self.max_backoff_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What was asked for. Raises `InvalidArgument`, naming the field (see ``job.proto`` for the bounds)."""

    required: placement.Resources
    name: str = ""
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    node_selector: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    #: Empty: the workload runs elsewhere; a holder acquires and renews.
    template: str = ""
    parameters: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    #: None: without end.
    max_run_seconds: float | None = None
    retry: RetryPolicy = RetryPolicy()
    on_lost: OnLost = OnLost.AFTER_PROOF
    spreading: placement.Spreading = placement.Spreading.PACK
    wait_for_capacity: bool = False

    def __post_init__(self) -> None:
        cpus, memory_bytes = self.required
        if not 1 <= cpus <= CPUS_MAX:
            raise _wrong("required_cpus", f"1 to {CPUS_MAX}", cpus)
        if not 1 <= memory_bytes <= MEMORY_BYTES_MAX:
            raise _wrong("required_memory_bytes", f"1 to {MEMORY_BYTES_MAX}", memory_bytes)
        if len(self.name) > NAME_LENGTH_MAX or not self.name.isprintable():
            raise _wrong("name", f"at most {NAME_LENGTH_MAX} printable characters", self.name)
        checked_queue_name(self.queue)
        if abs(self.priority) > PRIORITY_MAX:
            raise _wrong("priority", f"-{PRIORITY_MAX} to {PRIORITY_MAX}", self.priority)
        if self.node_selector:
            _check_selector(self.node_selector)
        if self.template:
            checked_queue_name(self.template, field_name="template")
        if self.parameters:
            _check_parameters(self.parameters)
        if self.max_run_seconds is not None and not 0.0 < self.max_run_seconds <= RUN_SECONDS_MAX:
            raise _wrong("max_run", "above 0 s, at most 366 days", self.max_run_seconds)
        if self.on_lost is OnLost.AFTER_FENCE and self.max_run_seconds is None and self.template:
            raise _wrong("on_lost", "after_fence needs max_run, which its host enforces", self.on_lost.value)

    @property
    def shape(self) -> placement.Shape:
        """What decides where it fits."""
        selector = tuple(sorted(self.node_selector.items())) if self.node_selector else ()
        return _shape(self.required, selector, self.template, self.spreading)


@functools.lru_cache(maxsize=_SHAPES_KEPT)
def _shape(
    required: placement.Resources,
    selector: tuple[tuple[str, str], ...],
    template: str,
    spreading: placement.Spreading,
) -> placement.Shape:
    return placement.Shape(required=required, selector=selector, template=template, spreading=spreading)


def _check_selector(selector: Mapping[str, str]) -> None:
    if len(selector) > SELECTOR_MAX:
        raise _wrong("node_selector", f"at most {SELECTOR_MAX} labels", len(selector))
    for key, value in selector.items():
        if not (1 <= len(key) <= LABEL_LENGTH_MAX and key.isprintable()):
            raise _wrong("node_selector", f"a key has 1 to {LABEL_LENGTH_MAX} printable characters", key)
        if len(value) > LABEL_LENGTH_MAX or not value.isprintable():
            raise _wrong(f"node_selector.{key}", f"at most {LABEL_LENGTH_MAX} printable characters", value)


def _check_parameters(parameters: Mapping[str, str]) -> None:
    if len(parameters) > PARAMETERS_MAX:
        raise _wrong("parameters", f"at most {PARAMETERS_MAX}", len(parameters))
    for key, value in parameters.items():
        if not _PARAMETER.fullmatch(key):
            raise _wrong("parameters", "a name as `input_file`", key)
        if len(value) > PARAMETER_LENGTH_MAX or "\0" in value:
            raise _wrong(f"parameters.{key}", f"at most {PARAMETER_LENGTH_MAX} characters, no NUL", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    cause: EndCause
    exit_code: int | None = None
    #: 0: not by a signal.
    signal: int = 0
    #: One line for people.
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an attempt stands on its node, by its agent's word: SENT, STARTED, STOPPING or ENDED."""

    ref: AttemptRef
    phase: AttemptPhase
    #: Only of ENDED.
    outcome: Outcome | None = None
    #: Wall clock of the node; None: not known, or not yet.
    start_time_seconds: float | None = None
    end_time_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationRecord:
    """A row of the ledger: CPUs and memory of a node that an attempt has, or had."""

    ref: AttemptRef
    node: str
    #: Boot of the node that it belongs to, with its agent's state folder.
    boot_id: str
    held: placement.Resources
    queue: str
    #: Number of the flush that allocated it, and of the one that released it (0: it is live).
    alloc_seq: int = 0
    release_seq: int = 0
    allocate_time_seconds: float = 0.0
    release_time_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What is durable of a job."""

    job_id: str
    spec: JobSpec
    state: JobState
    #: The present or last attempt; 0: none yet.
    attempt: int = 0
    #: Attempts that ended by the job's own fault.
    failures: int = 0
    principal: str = ""
    submit_time_seconds: float = 0.0
    start_time_seconds: float | None = None
    end_time_seconds: float | None = None
    #: Wall clock before which it is not tried again.
    not_before_seconds: float | None = None
    is_cancel_requested: bool = False
    outcome: Outcome | None = None
    #: The live one; for a job that has ended, the last. None: none yet.
    allocation: AllocationRecord | None = None
