"""Jobs as programs get them: plain names, times in ISO 8601, bytes as numbers."""

from typing import Any, TypedDict

from leasehold.api.job.v1 import job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire


class NodeUtilization(TypedDict):
    """What is allocated of a node; an empty name: of all."""

    node: str
    allocated_cpus: int
    total_cpus: int
    cpus_percent: float
    allocated_memory_bytes: int
    total_memory_bytes: int
    memory_percent: float
    running_jobs: int
    is_closed: bool


class Utilization(TypedDict):
    """What is allocated of what there is."""

    nodes: list[NodeUtilization]
    total: NodeUtilization
    pending_jobs: int
    #: Why nothing is given up for silence now; empty: reclaims go on.
    held_back_cause: str


Document = dict[str, Any]


def _time(message: Any, field: str) -> str | None:
    if not message.HasField(field):
        return None
    text: str = getattr(message, field).ToJsonString()
    return text


def _seconds(message: Any, field: str) -> float | None:
    if not message.HasField(field):
        return None
    return float(getattr(message, field).ToNanoseconds() / 1e9)


def state(number: int) -> str:
    """Such as ``pending``."""
    return _short(job_pb2.JobState, number, "JOB_STATE_")


def _short(kind: Any, number: int, prefix: str) -> str:
    """The value's name without its prefix; a value of a newer allocator as its number."""
    known = kind.DESCRIPTOR.values_by_number.get(number)
    return str(number) if known is None else str(known.name).removeprefix(prefix).lower()


def spec(message: job_pb2.JobSpec) -> Document:
    """What is asked for."""
    return {
        "name": message.name,
        "queue": message.queue,
        "priority": message.priority,
        "cpus": message.required_cpus,
        "memory_bytes": message.required_memory_bytes,
        "node_selector": dict(message.node_selector),
        "template": message.template,
        "parameters": dict(message.parameters),
        "max_run_seconds": _seconds(message, "max_run"),
        "max_attempts": message.retry.max_attempts or 1,
        "on_lost": _short(job_pb2.OnLost, message.on_lost, "ON_LOST_"),
        "spreading": _short(job_pb2.Spreading, message.spreading, "SPREADING_"),
        "wait_for_capacity": message.wait_for_capacity,
    }


def job(message: job_pb2.Job) -> Document:
    """One job."""
    return {
        "job_id": message.job_id,
        "state": state(message.state),
        "attempt": message.attempt,
        "is_cancel_requested": message.is_cancel_requested,
        "submit_time": _time(message, "submit_time"),
        "start_time": _time(message, "start_time"),
        "end_time": _time(message, "end_time"),
        "not_before_time": _time(message, "not_before_time"),
        "principal": message.principal,
        "outcome": outcome(message.outcome) if message.HasField("outcome") else None,
        "allocation": _allocation(message.allocation) if message.HasField("allocation") else None,
        "spec": spec(message.spec),
    }


def outcome(message: job_pb2.JobOutcome) -> Document:
    """How an attempt ended."""
    return {
        "cause": _short(job_pb2.EndCause, message.cause, "END_CAUSE_"),
        "exit_code": message.exit_code if message.HasField("exit_code") else None,
        "signal": message.signal or None,
        "detail": message.detail,
    }


def _allocation(message: job_pb2.Allocation) -> Document:
    return {
        "node": message.node,
        "attempt": message.attempt,
        "cpus": message.allocated_cpus,
        "memory_bytes": message.allocated_memory_bytes,
        "phase": _short(job_pb2.AttemptPhase, message.phase, "ATTEMPT_PHASE_"),
        "is_released": message.is_released,
        "allocate_time": _time(message, "allocate_time"),
        "release_time": _time(message, "release_time"),
    }


def explanation(message: wire.Explanation, job_id: str | None = None) -> Document:
    """Why a job waits."""
    return {
        **({} if job_id is None else {"job_id": job_id}),
        "state": state(message.state),
        "summary": message.summary,
        "blocked": [
            {"nodes": each.nodes, "reason": each.reason, "detail": each.detail} for each in message.blocked
        ],
        "held_back_reason": message.held_back_reason,
        "held_back_detail": message.held_back_detail,
        "place_in_line": message.place_in_line or None,
        "line_length": message.line_length,
        "estimated_start_time": _time(message, "estimated_start_time"),
        "node": message.node or None,
    }


def utilization(message: wire.GetUtilizationResponse) -> Utilization:
    """What is allocated of what there is."""
    return {
        "nodes": [_utilization(each) for each in message.nodes],
        "total": _utilization(message.total),
        "pending_jobs": message.pending_jobs,
        "held_back_cause": message.held_back_cause,
    }


def _utilization(message: wire.NodeUtilization) -> NodeUtilization:
    return {
        "node": message.node,
        "allocated_cpus": message.allocated_cpus,
        "total_cpus": message.total_cpus,
        "cpus_percent": message.cpus_percent,
        "allocated_memory_bytes": message.allocated_memory_bytes,
        "total_memory_bytes": message.total_memory_bytes,
        "memory_percent": message.memory_percent,
        "running_jobs": message.running_jobs,
        "is_closed": message.is_closed,
    }


def acknowledged(message: wire.AcknowledgeSilenceResponse) -> Document:
    """What came of an operator's word that a silence is real."""
    return {"was_held_back": message.was_held_back, "given_up": message.given_up}


def queue(message: wire.ListQueuesResponse.Usage) -> Document:
    """A queue, and what its jobs have."""
    return {
        **quota(message.queue),
        "allocated_cpus": message.allocated_cpus,
        "allocated_memory_bytes": message.allocated_memory_bytes,
        "pending_jobs": message.pending_jobs,
        "running_jobs": message.running_jobs,
    }


def quota(message: job_pb2.Queue) -> Document:
    """A queue; a quota of None is none."""
    has_cpus, has_memory = message.HasField("nominal_cpus"), message.HasField("nominal_memory_bytes")
    return {
        "name": message.name,
        "nominal_cpus": message.nominal_cpus if has_cpus else None,
        "nominal_memory_bytes": message.nominal_memory_bytes if has_memory else None,
    }


def audit(message: wire.AuditAllocationsResponse) -> Document:
    """What an audit found."""
    return {
        "findings": [
            {"verdict": each.verdict, "rule": each.rule, "subject": each.subject, "detail": each.detail}
            for each in message.findings
        ],
        "rules": list(message.rules),
        "flush_sequence": message.flush_sequence,
        "live_allocations": message.live_allocations,
        "nodes": message.nodes,
    }
