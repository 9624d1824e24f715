"""What the agent knows, as the messages that tell it."""

import functools
import importlib.metadata
import os
import time
from typing import Final

from google.protobuf import timestamp_pb2
from leasehold.api.node.v1 import node_pb2, order_pb2, pool_pb2, worker_pb2
from leasehold.core.node import job_life, model, worker_records
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import job_records, memory, pools, worker_values
from leasehold.rpc import common_codec, job_codec, wire_values

MEMORY_WARNING_RATIO: Final = 0.8

_WORKER_STATES: Final = {
    model.WorkerState.STARTING: worker_pb2.WORKER_STATE_STARTING,
    model.WorkerState.RUNNING: worker_pb2.WORKER_STATE_RUNNING,
    model.WorkerState.STOPPING: worker_pb2.WORKER_STATE_STOPPING,
    model.WorkerState.KILLING: worker_pb2.WORKER_STATE_KILLING,
    model.WorkerState.EXITED: worker_pb2.WORKER_STATE_EXITED,
}
_CAUSES: Final = {
    model.ExitCause.CLEAN: worker_pb2.EXIT_CAUSE_CLEAN,
    model.ExitCause.STOPPED: worker_pb2.EXIT_CAUSE_STOPPED,
    model.ExitCause.CRASHED: worker_pb2.EXIT_CAUSE_CRASHED,
    model.ExitCause.OOM_KILLED: worker_pb2.EXIT_CAUSE_OOM_KILLED,
    model.ExitCause.MEMORY_LIMIT: worker_pb2.EXIT_CAUSE_MEMORY_LIMIT,
    model.ExitCause.PERMANENT: worker_pb2.EXIT_CAUSE_PERMANENT,
    model.ExitCause.NOT_STARTED: worker_pb2.EXIT_CAUSE_NOT_STARTED,
    model.ExitCause.UNKNOWN: worker_pb2.EXIT_CAUSE_UNKNOWN,
}
_MODES: Final = {
    model.PoolMode.AUTO: pool_pb2.POOL_MODE_AUTO,
    model.PoolMode.MANUAL: pool_pb2.POOL_MODE_MANUAL,
    model.PoolMode.PAUSED: pool_pb2.POOL_MODE_PAUSED,
    model.PoolMode.STOPPED: pool_pb2.POOL_MODE_STOPPED,
}
_SOURCES: Final = {
    None: worker_pb2.MEMORY_SOURCE_UNSPECIFIED,
    worker_values.HeldSource.CGROUP_V2: worker_pb2.MEMORY_SOURCE_CGROUP_V2,
    worker_values.HeldSource.CGROUP_V1: worker_pb2.MEMORY_SOURCE_CGROUP_V1,
    worker_values.HeldSource.PSS: worker_pb2.MEMORY_SOURCE_PSS,
    worker_values.HeldSource.RSS: worker_pb2.MEMORY_SOURCE_RSS,
}


def node_status(host: agents.Agent) -> node_pb2.NodeStatus:
    """The whole host."""
    load = os.getloadavg()
    return node_pb2.NodeStatus(
        memory=memory_status(host),
        load_average=load,
        load_per_core=load[0] / (os.cpu_count() or 1),
        is_draining=host.is_draining,
        pools=[pool_status(host, host.pools[name]) for name in sorted(host.pools)],
        warnings=warnings(host),
        agent_version=_version(),
        agent_uptime=wire_values.encode_seconds(max(0.0, host.clock() - host.started_at)),
        agent_rss_bytes=memory.own_rss_bytes(),
        shims_pss_bytes=host.shims_pss_bytes(),
        jobs=[job_status(host, life) for life in host.jobs.machine.lives()],
    )


def job_status(host: agents.Agent, life: job_life.AttemptLife) -> node_pb2.JobAttemptStatus:
    """One attempt of a job."""
    process = host.jobs.processes.status(job_records.worker_id(life.ref))
    message = node_pb2.JobAttemptStatus(
        job_id=life.ref.job_id,
        attempt=life.ref.attempt,
        phase=job_codec.encode_phase(life.phase),
        cpus=life.held.cpus,
        memory_bytes=life.held.memory_bytes,
        held_bytes=life.memory_held_bytes,
        log=life.ref.log_name,
    )
    if process is not None and life.is_alive:
        message.is_limit_enforced = process.is_limit_enforced
        message.pid = 0 if process.process is None else process.process.pid
    return message


def memory_status(host: agents.Agent) -> node_pb2.MemoryStatus:
    """The host's memory."""
    sample = host.sample
    if sample is None:
        return node_pb2.MemoryStatus(reserve_bytes=host.config.host.reserve_bytes)
    used = sample.total_bytes - sample.available_bytes
    return node_pb2.MemoryStatus(
        total_bytes=sample.total_bytes,
        available_bytes=sample.available_bytes,
        bound_by=sample.bound_by,
        reserve_bytes=host.config.host.reserve_bytes,
        used_ratio=used / sample.total_bytes if sample.total_bytes else 0.0,
        swap_total_bytes=sample.swap_total_bytes,
        swap_used_bytes=sample.swap_used_bytes,
        pressure_some_percent=sample.pressure_some_percent,
        pressure_full_percent=sample.pressure_full_percent,
    )


def warnings(host: agents.Agent) -> list[str]:
    """What people should look at."""
    found: list[str] = []
    sample = host.sample
    if sample is None:
        found.append("the host's memory cannot be read")
    elif sample.total_bytes:
        ratio = (sample.total_bytes - sample.available_bytes) / sample.total_bytes
        if ratio > MEMORY_WARNING_RATIO:
            found.append(
                f"memory {ratio:.0%} used: {sample.available_bytes / model.GIB:.1f} of "
                f"{sample.total_bytes / model.GIB:.1f} GB available ({sample.bound_by})"
            )
    found.extend(host.problems())
    return found


def pool_status(host: agents.Agent, pool: pools.Pool) -> pool_pb2.PoolStatus:
    """One pool."""
    now = host.clock()
    spec, machine = pool.machine.spec, pool.machine
    totals = machine.totals
    message = pool_pb2.PoolStatus(
        name=spec.name,
        template=spec.template,
        priority=spec.priority,
        min_workers=spec.min_workers,
        max_workers=spec.max_workers,
        worker_limit_bytes=spec.worker_limit_bytes,
        starting=machine.count(model.WorkerState.STARTING),
        running=machine.count(model.WorkerState.RUNNING),
        stopping=machine.count(model.WorkerState.STOPPING, model.WorkerState.KILLING),
        desired=machine.desired or 0,
        starts_total=totals.starts,
        crashes_total=totals.crashes,
        oom_kills_total=totals.oom_kills,
        blocked_reason=machine.blocked_reason,
        workers=[worker_status(host, pool, view) for view in machine.workers(now)],
        warnings=pool.warnings,
    )
    if pool.has_depth:
        message.depth.CopyFrom(depth_status(pool.depth))
    backoff = machine.backoff_remaining(now)
    if backoff is not None:
        message.backoff_remaining.CopyFrom(wire_values.encode_seconds(backoff))
    if pool.declared is None:
        message.mode = pool_pb2.POOL_MODE_STOPPED
        message.summary = "not declared any more: its workers are being stopped"
        return message
    view = host.governor.view(now, spec.name, running=message.running)
    message.mode = _MODES[view.mode]
    message.optimal = view.optimal
    message.is_overcommitted = view.is_overcommitted
    message.summary = view.summary
    if view.manual_target is not None:
        message.manual_target = view.manual_target
    if view.hold_remaining_seconds is not None:
        message.hold_remaining.CopyFrom(wire_values.encode_seconds(max(0.0, view.hold_remaining_seconds)))
    return message


def depth_status(depth: model.Depth) -> pool_pb2.QueueDepth:
    """What waits; not set is not known."""
    return pool_pb2.QueueDepth(
        ready=depth.ready,
        unacknowledged=depth.unacknowledged,
        scheduled=depth.scheduled,
        is_lower_bound=depth.is_lower_bound,
        error=depth.error,
    )


def worker_status(
    host: agents.Agent, pool: pools.Pool, view: worker_records.WorkerView
) -> worker_pb2.WorkerStatus:
    """One worker."""
    status = host.processes.status(view.worker_id)
    held = host.held.get(view.worker_id, worker_values.Held(0, None))
    message = worker_pb2.WorkerStatus(
        name=view.name,
        pool=view.pool,
        worker_id=view.worker_id,
        state=_WORKER_STATES[view.state],
        shim_pid=view.shim.pid if view.shim is not None else 0,
        held_bytes=held.bytes,
        limit_bytes=pool.machine.spec.worker_limit_bytes,
        memory_source=_SOURCES[held.source],
        uptime=wire_values.encode_seconds(max(0.0, view.uptime_seconds)),
        is_adopted=view.is_adopted,
        is_busy=view.is_busy,
        task_id=view.task_id,
        task_name=view.task_name,
        stop_step=view.stop_step,
    )
    if view.process is not None:
        message.process.CopyFrom(common_codec.encode_process(view.process))
    if status is not None:
        message.limit_bytes = status.limit_bytes
        message.is_limit_enforced = status.is_limit_enforced
        message.log_path = str(status.log_path)
    if view.stop_step_remaining_seconds is not None:
        message.stop_step_remaining.CopyFrom(
            wire_values.encode_seconds(max(0.0, view.stop_step_remaining_seconds))
        )
    if view.exit is not None:
        message.exit.CopyFrom(exit_status(view.exit))
    return message


def exit_status(worker_exit: model.WorkerExit) -> worker_pb2.WorkerExit:
    """How a worker ended."""
    message = worker_pb2.WorkerExit(
        cause=_CAUSES[worker_exit.cause],
        exit_code=worker_exit.exit_code,
        signal=worker_exit.signal,
        detail=worker_exit.detail,
        task_id=worker_exit.task_id,
    )
    if worker_exit.end_time_seconds > 0:
        message.end_time.CopyFrom(_timestamp(worker_exit.end_time_seconds))
    if worker_exit.in_doubt_until_seconds > 0:
        message.in_doubt_until.CopyFrom(_timestamp(worker_exit.in_doubt_until_seconds))
    return message


def explanation(host: agents.Agent, pool: pools.Pool, decisions_max: int) -> order_pb2.PoolExplanation:
    """Why a pool has the workers that it has."""
    view = host.governor.view(host.clock(), pool.name)
    reasons = [*view.reasons]
    if pool.machine.blocked_reason:
        reasons.insert(0, f"no worker is started: {pool.machine.blocked_reason}")
    backoff = pool.machine.backoff_remaining(host.clock())
    if backoff is not None:
        reasons.insert(0, f"the next start is in {backoff:.1f} s, after {pool.machine.failures} failures")
    return order_pb2.PoolExplanation(
        pool=pool_status(host, pool),
        reasons=reasons,
        decisions=[decision(host, each) for each in host.governor.decisions(pool.name, decisions_max)],
    )


def decision(host: agents.Agent, each: model.Decision) -> pool_pb2.PoolDecision:
    """One decision; its time is told by the wall clock of now, less its age."""
    return pool_pb2.PoolDecision(
        decision_id=each.number,
        decide_time=_timestamp(time.time() - max(0.0, host.clock() - each.at_seconds)),
        pool=each.pool,
        before=each.before,
        after=each.after,
        trigger=each.trigger,
        reasons=each.reasons,
        numbers=each.numbers,
    )


@functools.cache
def _version() -> str:
    return importlib.metadata.version("leasehold")


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    found = timestamp_pb2.Timestamp()
    found.FromMicroseconds(round(seconds * 1e6))
    return found
