"""Answers to those who read of jobs: from the machine and the ledger to the wire."""

import asyncio
from collections.abc import AsyncIterator

from leasehold.allocator import calls, jobs, leadership
from leasehold.api.job.v1 import job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.job import model, views
from leasehold.core.placement import model as placement
from leasehold.rpc import job_codec

_SEPARATOR = "/"


def encoded(known: jobs.Jobs, record: model.JobRecord) -> job_pb2.Job:
    """A job on the wire, with how far its attempt is."""
    return job_codec.encode_job(record, known.phase(record))


async def job(known: jobs.Jobs, job_id: str) -> job_pb2.Job:
    """A job now. Raises `NotFound`, `PostgresUnavailable`."""
    return encoded(known, await known.job(job_id))


async def watch(
    known: jobs.Jobs, job_id: str, leader: leadership.Leadership, draining: asyncio.Event
) -> AsyncIterator[job_pb2.Job]:
    """A job now and after each change, until it has ended. Raises `NotLeader` when the reign is over."""
    told: job_pb2.Job | None = None
    with known.watching(job_id) as changed:
        while not draining.is_set():
            if leader.require_jobs() is not known:
                raise leader.not_leader()
            changed.clear()
            record = await known.job(job_id)
            present = encoded(known, record)
            if present != told:
                told = present
                yield present
            if record.state in model.TERMINAL_STATES:
                return
            await calls.first_of(changed.wait(), draining.wait())


async def explanation(known: jobs.Jobs, job_id: str) -> wire.Explanation:
    """What blocks a job, or what has become of it. Raises `NotFound`, `PostgresUnavailable`."""
    record = await known.job(job_id)
    if record.state is model.JobState.PENDING:
        found = known.require_machine().explain(job_id, known.now())
    else:
        found = placement.Explanation(summary=_what_became(record), blocked=(), node=_node(record))
    return job_codec.encode_explanation(found, record.state, wall_offset_seconds=known.wall_offset_seconds())


def _node(record: model.JobRecord) -> str:
    is_running = record.state is model.JobState.RUNNING and record.allocation is not None
    return record.allocation.node if is_running and record.allocation is not None else ""


def _what_became(record: model.JobRecord) -> str:
    where = f" on {record.allocation.node}" if record.allocation is not None else ""
    if record.state is model.JobState.RUNNING:
        return f"attempt {record.attempt} has an allocation{where}"
    detail = f": {record.outcome.detail}" if record.outcome is not None and record.outcome.detail else ""
    return f"it has ended as {record.state.value}{where}{detail}"


def rehearsal(known: jobs.Jobs, spec: model.JobSpec) -> wire.Explanation:
    """What would become of a job. Raises what its submit would raise."""
    found = known.require_machine().rehearse(known.now(), known.wall(), spec)
    return job_codec.encode_explanation(
        found, model.JobState.PENDING, wall_offset_seconds=known.wall_offset_seconds()
    )


def utilization(known: jobs.Jobs, name: str) -> wire.GetUtilizationResponse:
    """What is allocated of each node, or of one, and of all. Raises `NotFound`, `PostgresUnavailable`."""
    machine = known.require_machine()
    found = machine.utilization()
    nodes = [node for node in found.nodes if name in ("", node.name)]
    if name and not nodes:
        raise errors.NotFound(
            f"no node {name} declares anything for jobs", field="node", metadata={"node": name}
        )
    return wire.GetUtilizationResponse(
        nodes=[_utilization(node) for node in nodes],
        total=_utilization(found.total),
        pending_jobs=machine.pending_count,
        held_back_cause=found.held_back_cause,
    )


def _utilization(node: views.NodeUtilization) -> wire.NodeUtilization:
    return wire.NodeUtilization(
        node=node.name,
        allocated_cpus=node.used.cpus,
        total_cpus=node.total.cpus,
        cpus_percent=node.cpus_percent,
        allocated_memory_bytes=node.used.memory_bytes,
        total_memory_bytes=node.total.memory_bytes,
        memory_percent=node.memory_percent,
        running_jobs=node.running_jobs,
        is_closed=node.is_closed,
    )


def queues(known: jobs.Jobs) -> wire.ListQueuesResponse:
    """Every queue, by name, and what its jobs have. Raises `PostgresUnavailable`."""
    return wire.ListQueuesResponse(
        queues=[
            wire.ListQueuesResponse.Usage(
                queue=job_codec.encode_queue(usage.queue),
                allocated_cpus=usage.used.cpus,
                allocated_memory_bytes=usage.used.memory_bytes,
                pending_jobs=usage.pending_jobs,
                running_jobs=usage.running_jobs,
            )
            for usage in known.require_machine().queue_usage()
        ]
    )


# Pages


def token_after(record: model.JobRecord) -> str:
    """Where the page after this job begins."""
    return f"{round(record.submit_time_seconds * 1e6)}{_SEPARATOR}{record.job_id}"


def page_token(text: str) -> tuple[float, str] | None:
    """Before which job a page begins. Raises `InvalidArgument`."""
    if not text:
        return None
    micros, _, job_id = text.partition(_SEPARATOR)
    if not (micros.isascii() and micros.isdigit() and len(micros) <= 18):
        raise errors.InvalidArgument("page_token: is not one that was given", field="page_token")
    return int(micros) / 1e6, model.checked_job_id(job_id, field_name="page_token")
