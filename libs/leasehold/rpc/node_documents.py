"""Nodes, pools and workers as plain JSON values, the same for the command line and over HTTP.

Every key is always there; null says that a thing is not known, or that there is none. Bytes are integers, and
beside them stand the same in GB (2**30 bytes) for people. Durations are seconds. Needs no gRPC.
"""

import enum
from typing import Any, Final, TypeVar

from leasehold.core.node import model, registry_model
from typing_extensions import TypedDict

#: Above it memory is short: people are warned.
MEMORY_WARNING_RATIO: Final = 0.8

Text = TypeVar("Text", bound=str)


class MemorySource(enum.StrEnum):
    """How a worker's memory was measured; what each means is told in ``worker.proto``."""

    CGROUP_V2 = "cgroup_v2"
    CGROUP_V1 = "cgroup_v1"
    PSS = "pss"
    RSS = "rss"


class Memory(TypedDict):
    """A host's memory. `available` is the least of MemAvailable, each ancestor cgroup's room and the budget."""

    total_bytes: int
    total_gb: float
    used_bytes: int
    used_gb: float
    used_percent: float
    available_bytes: int
    available_gb: float
    bound_by: str
    reserve_bytes: int
    reserve_gb: float
    swap_total_bytes: int
    swap_used_bytes: int
    pressure_some_percent: float | None
    pressure_full_percent: float | None
    is_high: bool


class WorkerExit(TypedDict):
    """How a worker ended. Times are RFC 3339, UTC."""

    cause: model.ExitCause
    exit_code: int | None
    signal: int | None
    detail: str
    end_time: str | None
    task_id: str | None
    in_doubt_until: str | None


class Worker(TypedDict):
    """One worker of a pool, or how it ended."""

    name: str
    node: str
    pool: str
    worker_id: str
    state: model.WorkerState | None
    pid: int | None
    shim_pid: int | None
    held_bytes: int
    held_gb: float
    limit_bytes: int
    limit_gb: float
    memory_source: MemorySource | None
    is_limit_enforced: bool
    uptime_seconds: float
    is_adopted: bool
    is_busy: bool | None
    task_id: str | None
    task_name: str | None
    stop_step: str | None
    stop_step_remaining_seconds: float | None
    exit: WorkerExit | None
    log_path: str | None


class QueueDepth(TypedDict):
    """What waits in a pool's queues; null where nobody knows, never 0 in place of it."""

    ready: int | None
    unacknowledged: int | None
    scheduled: int | None
    is_lower_bound: bool
    error: str | None


class Pool(TypedDict):
    """One pool of a node, without its workers."""

    name: str
    node: str
    template: str
    priority: int
    mode: model.PoolMode | None
    min_workers: int
    max_workers: int
    worker_limit_bytes: int
    worker_limit_gb: float
    starting: int
    running: int
    stopping: int
    optimal: int
    desired: int
    manual_target: int | None
    hold_remaining_seconds: float | None
    is_overcommitted: bool
    summary: str
    depth: QueueDepth | None
    starts_total: int
    crashes_total: int
    oom_kills_total: int
    backoff_remaining_seconds: float | None
    blocked_reason: str | None
    warnings: list[str]


class PoolWithWorkers(Pool):
    """One pool of a node, with its workers by name; those that ended recently included."""

    workers: list[Worker]


class Status(TypedDict):
    """What an agent says of its host and itself."""

    memory: Memory | None
    load_average: list[float]
    load_per_core: float
    is_draining: bool
    pools: list[PoolWithWorkers]
    warnings: list[str]
    agent_version: str
    agent_uptime_seconds: float
    agent_rss_bytes: int
    shims_pss_bytes: int


class Node(TypedDict):
    """A node as the allocator knows it; `status` is null where this leader has heard none."""

    name: str
    state: registry_model.NodeState | None
    node_id: str
    incarnation: int
    boot_id: str
    cpus: int
    memory_bytes: int
    memory_gb: float
    labels: dict[str, str]
    register_time: str | None
    last_report_age_seconds: float | None
    ttl_seconds: float | None
    status: Status | None


class Decision(TypedDict):
    """One decision about a pool, with the numbers that it was made from."""

    decision_id: int
    time: str | None
    pool: str
    before: int
    after: int
    trigger: str
    reasons: list[str]
    numbers: dict[str, float]


class Explanation(TypedDict):
    """Why a pool has the workers that it has, and its last decisions, newest first."""

    node: str
    pool: Pool
    reasons: list[str]
    decisions: list[Decision]


def gb(count: int) -> float:
    """Bytes as GB of 2**30 bytes, to two decimals."""
    return round(count / model.GIB, 2)


def memory(message: Any) -> Memory:
    """The document of a ``MemoryStatus``."""
    used = max(message.total_bytes - message.available_bytes, 0)
    return {
        "total_bytes": message.total_bytes,
        "total_gb": gb(message.total_bytes),
        "used_bytes": used,
        "used_gb": gb(used),
        "used_percent": round(message.used_ratio * 100, 1),
        "available_bytes": message.available_bytes,
        "available_gb": gb(message.available_bytes),
        "bound_by": message.bound_by,
        "reserve_bytes": message.reserve_bytes,
        "reserve_gb": gb(message.reserve_bytes),
        "swap_total_bytes": message.swap_total_bytes,
        "swap_used_bytes": message.swap_used_bytes,
        "pressure_some_percent": _optional(message, "pressure_some_percent"),
        "pressure_full_percent": _optional(message, "pressure_full_percent"),
        "is_high": message.used_ratio > MEMORY_WARNING_RATIO,
    }


def worker(message: Any, *, node: str) -> Worker:
    """The document of a ``WorkerStatus``."""
    return {
        "name": message.name,
        "node": node,
        "pool": message.pool,
        "worker_id": message.worker_id,
        "state": _known(model.WorkerState, _enum(message, "state")),
        "pid": message.process.pid if message.HasField("process") else None,
        "shim_pid": message.shim_pid or None,
        "held_bytes": message.held_bytes,
        "held_gb": gb(message.held_bytes),
        "limit_bytes": message.limit_bytes,
        "limit_gb": gb(message.limit_bytes),
        "memory_source": _known(MemorySource, _enum(message, "memory_source")),
        "is_limit_enforced": message.is_limit_enforced,
        "uptime_seconds": _seconds(message.uptime),
        "is_adopted": message.is_adopted,
        "is_busy": _optional(message, "is_busy"),
        "task_id": message.task_id or None,
        "task_name": message.task_name or None,
        "stop_step": message.stop_step or None,
        "stop_step_remaining_seconds": _optional_seconds(message, "stop_step_remaining"),
        "exit": _exit(message.exit) if message.HasField("exit") else None,
        "log_path": message.log_path or None,
    }


def _exit(message: Any) -> WorkerExit:
    return {
        # What this version does not know is never taken for a clean end.
        "cause": _known(model.ExitCause, _enum(message, "cause")) or model.ExitCause.UNKNOWN,
        "exit_code": _optional(message, "exit_code"),
        "signal": message.signal or None,
        "detail": message.detail,
        "end_time": _time(message, "end_time"),
        "task_id": message.task_id or None,
        "in_doubt_until": _time(message, "in_doubt_until"),
    }


def pool(message: Any, *, node: str) -> Pool:
    """The document of a ``PoolStatus``, without its workers."""
    return {
        "name": message.name,
        "node": node,
        "template": message.template,
        "priority": message.priority,
        "mode": _known(model.PoolMode, _enum(message, "mode")),
        "min_workers": message.min_workers,
        "max_workers": message.max_workers,
        "worker_limit_bytes": message.worker_limit_bytes,
        "worker_limit_gb": gb(message.worker_limit_bytes),
        "starting": message.starting,
        "running": message.running,
        "stopping": message.stopping,
        "optimal": message.optimal,
        "desired": message.desired,
        "manual_target": _optional(message, "manual_target"),
        "hold_remaining_seconds": _optional_seconds(message, "hold_remaining"),
        "is_overcommitted": message.is_overcommitted,
        "summary": message.summary,
        "depth": _depth(message.depth) if message.HasField("depth") else None,
        "starts_total": message.starts_total,
        "crashes_total": message.crashes_total,
        "oom_kills_total": message.oom_kills_total,
        "backoff_remaining_seconds": _optional_seconds(message, "backoff_remaining"),
        "blocked_reason": message.blocked_reason or None,
        "warnings": list(message.warnings),
    }


def _depth(message: Any) -> QueueDepth:
    return {
        "ready": _optional(message, "ready"),
        "unacknowledged": _optional(message, "unacknowledged"),
        "scheduled": _optional(message, "scheduled"),
        "is_lower_bound": message.is_lower_bound,
        "error": message.error or None,
    }


def pool_with_workers(message: Any, *, node: str) -> PoolWithWorkers:
    """The document of a ``PoolStatus``."""
    return {**pool(message, node=node), "workers": [worker(each, node=node) for each in message.workers]}


def status(message: Any, *, node: str) -> Status:
    """The document of a ``NodeStatus``."""
    return {
        "memory": memory(message.memory) if message.HasField("memory") else None,
        "load_average": [round(each, 2) for each in message.load_average],
        "load_per_core": round(message.load_per_core, 2),
        "is_draining": message.is_draining,
        "pools": [pool_with_workers(each, node=node) for each in message.pools],
        "warnings": list(message.warnings),
        "agent_version": message.agent_version,
        "agent_uptime_seconds": _seconds(message.agent_uptime),
        "agent_rss_bytes": message.agent_rss_bytes,
        "shims_pss_bytes": message.shims_pss_bytes,
    }


def node(message: Any) -> Node:
    """The document of a ``Node``."""
    return {
        "name": message.name,
        "state": _known(registry_model.NodeState, _enum(message, "state")),
        "node_id": message.node_id,
        "incarnation": message.incarnation,
        "boot_id": message.boot_id,
        "cpus": message.resources.cpus,
        "memory_bytes": message.resources.memory_bytes,
        "memory_gb": gb(message.resources.memory_bytes),
        "labels": dict(sorted(message.labels.items())),
        "register_time": _time(message, "register_time"),
        "last_report_age_seconds": _optional_seconds(message, "last_report_age"),
        "ttl_seconds": _optional_seconds(message, "ttl"),
        "status": status(message.status, node=message.name) if message.HasField("status") else None,
    }


def warnings(document: Node) -> list[str]:
    """What a person should look at: the node's state, memory above 80%, and what the agent itself warns of."""
    found: list[str] = []
    if document["state"] is registry_model.NodeState.LOST:
        age = document["last_report_age_seconds"]
        since = "" if age is None else f" for {age:.0f} s"
        found.append(f"has not reported{since}; its workers may well run")
    status = document["status"]
    if status is None:
        return found
    memory = status["memory"]
    if memory is not None and memory["is_high"] and not any("80%" in text for text in status["warnings"]):
        used = f"{memory['used_gb']:.1f}/{memory['total_gb']:.1f} GB ({memory['used_percent']:.1f}%)"
        found.append(f"memory {used} is above 80%")
    found.extend(status["warnings"])
    for pool in status["pools"]:
        found.extend(f"pool {pool['name']}: {text}" for text in pool["warnings"])
        if pool["blocked_reason"]:
            found.append(f"pool {pool['name']}: no worker is started: {pool['blocked_reason']}")
    return found


def explanation(message: Any, *, node: str) -> Explanation:
    """The document of a ``PoolExplanation``."""
    return {
        "node": node,
        "pool": pool(message.pool, node=node),
        "reasons": list(message.reasons),
        "decisions": [_decision(each) for each in message.decisions],
    }


def _decision(message: Any) -> Decision:
    return {
        "decision_id": message.decision_id,
        "time": _time(message, "decide_time"),
        "pool": message.pool,
        "before": message.before,
        "after": message.after,
        "trigger": message.trigger,
        "reasons": list(message.reasons),
        "numbers": dict(sorted(message.numbers.items())),
    }


def _enum(message: Any, field: str) -> str:
    """An enum's value without the prefix of its type, in small letters; empty: not set, or not known here."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    number = getattr(message, field)
    value = kind.values_by_number.get(number)
    if not number or value is None:
        return ""
    prefix: str = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(value.name.removeprefix(prefix).lower())


def _known(kind: type[Text], text: str) -> Text | None:
    try:
        return kind(text)
    except ValueError:  # not set, or of a newer version
        return None


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _seconds(duration: Any) -> float:
    return round(float(duration.seconds + duration.nanos / 1e9), 3)


def _optional_seconds(message: Any, field: str) -> float | None:
    return _seconds(getattr(message, field)) if message.HasField(field) else None


def _time(message: Any, field: str) -> str | None:
    return str(getattr(message, field).ToJsonString()) if message.HasField(field) else None
