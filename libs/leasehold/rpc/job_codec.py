"""Jobs between proto and core: for the allocator's servicer, agents and clients.

Decoding checks everything that a stranger could have got wrong and raises `InvalidArgument` naming the field.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement

REQUEST_ID_LENGTH_MAX: Final = 64
#: Attempts are numbered from 1; the wire has 32 bits.
ATTEMPT_MAX: Final = 2**31 - 1

_NANOS: Final = 1_000_000_000
_DEFAULT_RETRY: Final = model.RetryPolicy()
#: Many jobs have the same.
_RETRIES_KEPT: Final = 256

Value = TypeVar("Value")

_STATES: Final[Mapping[model.JobState, "job_pb2.JobState.ValueType"]] = {
    model.JobState.PENDING: job_pb2.JOB_STATE_PENDING,
    model.JobState.RUNNING: job_pb2.JOB_STATE_RUNNING,
    model.JobState.COMPLETED: job_pb2.JOB_STATE_COMPLETED,
    model.JobState.FAILED: job_pb2.JOB_STATE_FAILED,
    model.JobState.CANCELLED: job_pb2.JOB_STATE_CANCELLED,
}
_PHASES: Final[Mapping[model.AttemptPhase, "job_pb2.AttemptPhase.ValueType"]] = {
    model.AttemptPhase.ALLOCATED: job_pb2.ATTEMPT_PHASE_ALLOCATED,
    model.AttemptPhase.SENT: job_pb2.ATTEMPT_PHASE_SENT,
    model.AttemptPhase.STARTED: job_pb2.ATTEMPT_PHASE_STARTED,
    model.AttemptPhase.STOPPING: job_pb2.ATTEMPT_PHASE_STOPPING,
    model.AttemptPhase.ENDED: job_pb2.ATTEMPT_PHASE_ENDED,
    model.AttemptPhase.UNKNOWN: job_pb2.ATTEMPT_PHASE_UNKNOWN,
}
_CAUSES: Final[Mapping[model.EndCause, "job_pb2.EndCause.ValueType"]] = {
    cause: job_pb2.EndCause.Value(f"END_CAUSE_{cause.value}") for cause in model.EndCause
}
_ON_LOST: Final[Mapping[model.OnLost, "job_pb2.OnLost.ValueType"]] = {
    model.OnLost.AFTER_PROOF: job_pb2.ON_LOST_AFTER_PROOF,
    model.OnLost.NEVER: job_pb2.ON_LOST_NEVER,
    model.OnLost.AFTER_FENCE: job_pb2.ON_LOST_AFTER_FENCE,
}
_SPREADING: Final[Mapping[placement.Spreading, "job_pb2.Spreading.ValueType"]] = {
    placement.Spreading.PACK: job_pb2.SPREADING_PACK,
    placement.Spreading.SPREAD: job_pb2.SPREADING_SPREAD,
}
_STATES_BACK: Final = {number: state for state, number in _STATES.items()}
_PHASES_BACK: Final = {number: phase for phase, number in _PHASES.items()}
_CAUSES_BACK: Final = {number: cause for cause, number in _CAUSES.items()}
_ON_LOST_BACK: Final = {number: on_lost for on_lost, number in _ON_LOST.items()} | {0: model.OnLost.AFTER_PROOF}
_SPREADING_BACK: Final = {n: spreading for spreading, n in _SPREADING.items()} | {0: placement.Spreading.PACK}


def _known(values: Mapping[Any, Value], number: int, field: str) -> Value:
    try:
        return values[number]
    except KeyError:
        raise errors.InvalidArgument(f"{field}: {number} is no value of it", field=field) from None


# Times


def encode_time(seconds: float) -> timestamp_pb2.Timestamp:
    """Wall clock seconds since 1970, to the microsecond."""
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def decode_time(message: timestamp_pb2.Timestamp) -> float:
    """Wall clock seconds since 1970, to the microsecond."""
    return round(message.seconds + message.nanos / _NANOS, 6)


def encode_duration(seconds: float) -> duration_pb2.Duration:
    """Seconds, however many."""
    whole, nanos = divmod(round(seconds * _NANOS), _NANOS)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


def decode_duration(message: duration_pb2.Duration) -> float:
    """Seconds, whatever they are: who takes them checks them."""
    return (message.seconds * _NANOS + message.nanos) / _NANOS


def _optional_seconds(message: Any, field: str) -> float | None:
    return decode_duration(getattr(message, field)) if message.HasField(field) else None


def _optional_time(message: Any, field: str) -> float | None:
    return decode_time(getattr(message, field)) if message.HasField(field) else None


def _set_time(message: Any, field: str, seconds: float | None) -> None:
    if seconds is not None:
        getattr(message, field).FromMicroseconds(round(seconds * 1e6))


# Requests


def checked_request_id(request_id: str, *, is_needed: bool = False) -> str:
    """`request_id` if it is one, or empty where none is needed; else raises `InvalidArgument`."""
    is_right = len(request_id) <= REQUEST_ID_LENGTH_MAX and request_id.isascii() and request_id.isprintable()
    if not is_right or (is_needed and not request_id):
        raise errors.InvalidArgument(
            f"request_id: 1 to {REQUEST_ID_LENGTH_MAX} printable ASCII characters", field="request_id"
        )
    return request_id


def decode_spec(message: job_pb2.JobSpec) -> model.JobSpec:
    """What is asked for. Raises `InvalidArgument`."""
    return model.JobSpec(
        required=placement.Resources(message.required_cpus, message.required_memory_bytes),
        name=message.name,
        queue=message.queue or model.DEFAULT_QUEUE,
        priority=message.priority,
        node_selector=dict(message.node_selector),
        template=message.template,
        parameters=dict(message.parameters),
        max_run_seconds=_optional_seconds(message, "max_run"),
        retry=_decode_retry(message.retry) if message.HasField("retry") else _DEFAULT_RETRY,
        on_lost=_known(_ON_LOST_BACK, message.on_lost, "on_lost"),
        spreading=_known(_SPREADING_BACK, message.spreading, "spreading"),
        wait_for_capacity=message.wait_for_capacity,
    )


def _decode_retry(message: job_pb2.RetryPolicy) -> model.RetryPolicy:
    return _retry(
        message.max_attempts,
        _optional_seconds(message, "initial_backoff"),
        _optional_seconds(message, "max_backoff"),
    )


@functools.lru_cache(maxsize=_RETRIES_KEPT)
def _retry(attempts: int, initial: float | None, longest: float | None) -> model.RetryPolicy:
    return model.RetryPolicy(
        max_attempts=attempts or 1,
        initial_backoff_seconds=_DEFAULT_RETRY.initial_backoff_seconds if initial is None else initial,
        max_backoff_seconds=_DEFAULT_RETRY.max_backoff_seconds if longest is None else longest,
    )


def encode_spec(spec: model.JobSpec) -> job_pb2.JobSpec:
    """The message, with every default written out."""
    message = job_pb2.JobSpec(
        name=spec.name,
        queue=spec.queue,
        priority=spec.priority,
        required_cpus=spec.required.cpus,
        required_memory_bytes=spec.required.memory_bytes,
        node_selector=spec.node_selector,
        template=spec.template,
        parameters=spec.parameters,
        retry=job_pb2.RetryPolicy(
            max_attempts=spec.retry.max_attempts,
            initial_backoff=encode_duration(spec.retry.initial_backoff_seconds),
            max_backoff=encode_duration(spec.retry.max_backoff_seconds),
        ),
        on_lost=_ON_LOST[spec.on_lost],
        spreading=_SPREADING[spec.spreading],
        wait_for_capacity=spec.wait_for_capacity,
    )
    if spec.max_run_seconds is not None:
        message.max_run.CopyFrom(encode_duration(spec.max_run_seconds))
    return message


def decode_queue(message: job_pb2.Queue) -> placement.Queue:
    """A queue. Raises `InvalidArgument`."""
    cpus = message.nominal_cpus if message.HasField("nominal_cpus") else None
    memory_bytes = message.nominal_memory_bytes if message.HasField("nominal_memory_bytes") else None
    name = model.checked_queue_name(message.name, field_name="queue.name")
    bounds = {
        "queue.nominal_cpus": (cpus, 2**31 - 1),
        "queue.nominal_memory_bytes": (memory_bytes, model.MEMORY_BYTES_MAX),
    }
    for field, (amount, most) in bounds.items():
        if amount is not None and not 0 <= amount <= most:
            raise errors.InvalidArgument(f"{field}: 0 to {most}, not {amount}", field=field)
    return placement.Queue(name=name, nominal_cpus=cpus, nominal_memory_bytes=memory_bytes)


def encode_queue(queue: placement.Queue) -> job_pb2.Queue:
    """The message."""
    return job_pb2.Queue(
        name=queue.name, nominal_cpus=queue.nominal_cpus, nominal_memory_bytes=queue.nominal_memory_bytes
    )


def decode_ref(message: Any, *, field: str = "") -> model.AttemptRef:
    """An attempt, of any message that has `job_id` and `attempt`. Raises `InvalidArgument`."""
    prefix = f"{field}." if field else ""
    job_id = model.checked_job_id(message.job_id, field_name=f"{prefix}job_id")
    if not 1 <= message.attempt <= ATTEMPT_MAX:
        raise errors.InvalidArgument(
            f"{prefix}attempt: {message.attempt} is no attempt; the first is 1", field=f"{prefix}attempt"
        )
    return model.AttemptRef(job_id, message.attempt)


def encode_ref(ref: model.AttemptRef) -> attempt_pb2.AttemptRef:
    """The message."""
    return attempt_pb2.AttemptRef(job_id=ref.job_id, attempt=ref.attempt)


def decode_states(numbers: Any) -> frozenset[model.JobState]:
    """States that a list is asked for. Raises `InvalidArgument`."""
    return frozenset(_known(_STATES_BACK, number, "states") for number in numbers)


def encode_state(state: model.JobState) -> "job_pb2.JobState.ValueType":
    """The number of a state."""
    return _STATES[state]


def decode_phase(number: int, *, field: str = "phase") -> model.AttemptPhase:
    """A phase. Raises `InvalidArgument`."""
    return _known(_PHASES_BACK, number, field)


def encode_phase(phase: model.AttemptPhase) -> "job_pb2.AttemptPhase.ValueType":
    """The number of a phase."""
    return _PHASES[phase]


# Jobs


def encode_outcome(outcome: model.Outcome) -> job_pb2.JobOutcome:
    """The message."""
    return job_pb2.JobOutcome(
        cause=_CAUSES[outcome.cause],
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        detail=outcome.detail,
    )


def decode_outcome(message: job_pb2.JobOutcome, *, field: str = "outcome") -> model.Outcome:
    """How an attempt ended. Raises `InvalidArgument`."""
    return model.Outcome(
        cause=_known(_CAUSES_BACK, message.cause, f"{field}.cause"),
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal,
        detail=message.detail,
    )


def encode_allocation(
    allocation: model.AllocationRecord, phase: model.AttemptPhase | None = None
) -> job_pb2.Allocation:
    """The message; `phase` None: ENDED if it is released, else ALLOCATED."""
    is_released = allocation.release_seq != 0
    if phase is None:
        phase = model.AttemptPhase.ENDED if is_released else model.AttemptPhase.ALLOCATED
    message = job_pb2.Allocation(
        job_id=allocation.ref.job_id,
        attempt=allocation.ref.attempt,
        node=allocation.node,
        allocated_cpus=allocation.held.cpus,
        allocated_memory_bytes=allocation.held.memory_bytes,
        phase=_PHASES[phase],
        is_released=is_released,
    )
    _set_time(message, "allocate_time", allocation.allocate_time_seconds)
    _set_time(message, "release_time", allocation.release_time_seconds)
    return message


def encode_job(job: model.JobRecord, phase: model.AttemptPhase | None = None) -> job_pb2.Job:
    """The message; `phase` is that of its present attempt, where it is known."""
    message = job_pb2.Job(
        job_id=job.job_id,
        spec=encode_spec(job.spec),
        state=_STATES[job.state],
        attempt=job.attempt,
        is_cancel_requested=job.is_cancel_requested,
        principal=job.principal,
    )
    _set_time(message, "submit_time", job.submit_time_seconds)
    _set_time(message, "start_time", job.start_time_seconds)
    if job.state in model.TERMINAL_STATES:
        _set_time(message, "end_time", job.end_time_seconds)
    if job.state is model.JobState.PENDING:
        _set_time(message, "not_before_time", job.not_before_seconds)
    if job.outcome is not None:
        message.outcome.CopyFrom(encode_outcome(job.outcome))
    if job.allocation is not None:
        is_live = job.allocation.release_seq == 0
        message.allocation.CopyFrom(encode_allocation(job.allocation, phase if is_live else None))
    return message


def decode_job(message: job_pb2.Job) -> model.JobRecord:
    """A job, as a client sees it: what only the allocator needs is left at its default."""
    allocation = None
    if message.HasField("allocation"):
        told = message.allocation
        allocation = model.AllocationRecord(
            ref=decode_ref(told, field="allocation"),
            node=told.node,
            boot_id="",
            held=placement.Resources(told.allocated_cpus, told.allocated_memory_bytes),
            queue=message.spec.queue,
            release_seq=int(told.is_released),
            allocate_time_seconds=decode_time(told.allocate_time),
            release_time_seconds=_optional_time(told, "release_time"),
        )
    return model.JobRecord(
        job_id=model.checked_job_id(message.job_id),
        spec=decode_spec(message.spec),
        state=_known(_STATES_BACK, message.state, "state"),
        attempt=message.attempt,
        principal=message.principal,
        submit_time_seconds=decode_time(message.submit_time),
        start_time_seconds=_optional_time(message, "start_time"),
        end_time_seconds=_optional_time(message, "end_time"),
        not_before_seconds=_optional_time(message, "not_before_time"),
        is_cancel_requested=message.is_cancel_requested,
        outcome=decode_outcome(message.outcome) if message.HasField("outcome") else None,
        allocation=allocation,
    )


# Explanations


def encode_explanation(
    explanation: placement.Explanation, state: model.JobState, *, wall_offset_seconds: float
) -> wire.Explanation:
    """The message; `wall_offset_seconds` is the wall clock less the clock of `starts_by`."""
    message = wire.Explanation(
        state=_STATES[state],
        summary=explanation.summary,
        blocked=[
            wire.NodesBlocked(nodes=part.nodes, reason=part.reason.value, detail=part.detail)
            for part in explanation.blocked
        ],
        held_back_reason=explanation.held_back.value if explanation.held_back is not None else "",
        held_back_detail=explanation.held_back_detail,
        place_in_line=explanation.place_in_line,
        line_length=explanation.line_length,
        node=explanation.node,
    )
    if explanation.starts_by is not None:
        _set_time(message, "estimated_start_time", explanation.starts_by + wall_offset_seconds)
    return message


def decode_explanation(message: wire.Explanation) -> placement.Explanation:
    """An explanation, its instants by the wall clock. Raises `InvalidArgument`."""
    blocked = {reason.value: reason for reason in placement.BlockReason}
    held_back = {held.value: held for held in placement.HeldBack}
    return placement.Explanation(
        summary=message.summary,
        blocked=tuple(
            placement.NodesBlocked(
                nodes=part.nodes, reason=_known_name(blocked, part.reason, "blocked.reason"), detail=part.detail
            )
            for part in message.blocked
        ),
        held_back=_known_name(held_back, message.held_back_reason, "held_back_reason")
        if message.held_back_reason
        else None,
        held_back_detail=message.held_back_detail,
        place_in_line=message.place_in_line,
        line_length=message.line_length,
        starts_by=_optional_time(message, "estimated_start_time"),
        node=message.node,
    )


def _known_name(values: Mapping[str, Value], name: str, field: str) -> Value:
    try:
        return values[name]
    except KeyError:
        raise errors.InvalidArgument(f"{field}: {name[:40]!r} is no value of it", field=field) from None
