"""JobService on the wire: each method checks its input, asks the leader's jobs, and translates."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from leasehold.allocator import calls, job_audit, job_batches, job_logs, job_reading, leadership
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.node import model as node_model
from leasehold.postgres import job_port
from leasehold.rpc import job_codec

PAGE_SIZE = 100
PAGE_SIZE_MAX = 1_000
#: Of an answer's jobs; gRPC takes 4 MiB.
ANSWER_BYTES_MAX = 3 * 2**20

ACQUIRE_SECONDS = 10.0
ACQUIRE_SECONDS_MAX = 3_600.0
#: An acquire that was placed in the last instant is committed after its wait.
ACQUIRE_SLACK_SECONDS = 10.0
DETAIL_LENGTH_MAX = 1_000

_Context = grpc.aio.ServicerContext[Any, Any]


class JobServicer(wire_grpc.JobServiceServicer):
    """The API of jobs. Every method raises core errors; an interceptor maps them to statuses."""

    def __init__(self, leader: leadership.Leadership, draining: asyncio.Event) -> None:
        self._leader = leader
        self._draining = draining

    # Submitting

    async def SubmitJob(self, request: wire.SubmitJobRequest, context: _Context) -> wire.SubmitJobResponse:
        """One job."""
        spec = job_codec.decode_spec(request.spec)
        request_id = job_codec.checked_request_id(request.request_id)
        known = self._leader.require_jobs()
        if request.is_dry_run:
            return wire.SubmitJobResponse(explanation=job_reading.rehearsal(known, spec))
        principal = calls.principal(context)
        key = changes.RequestKey(principal, request_id) if request_id else None
        digest = job_batches.payload_sha256(request.spec)
        answers = await known.ask(
            lambda jobs, now, wall: jobs.submit(
                now,
                wall,
                (spec,),
                principal=principal,
                key=key,
                payload_sha256=digest,
                is_all_or_none=True,
            )
        )
        (verdict,) = answers
        if verdict.error is not None:
            raise verdict.error
        return wire.SubmitJobResponse(job=await job_reading.job(known, verdict.job_id))

    async def SubmitJobs(
        self, request_iterator: AsyncIterator[wire.SubmitJobsRequest], context: _Context
    ) -> AsyncIterator[wire.SubmitJobsResponse]:
        """Chunks of jobs."""
        known = self._leader.require_jobs()
        submission = job_batches.Submission(known, calls.principal(context))
        async for response in submission.run(request_iterator):
            yield response

    # Reading

    async def GetJob(self, request: wire.GetJobRequest, context: _Context) -> wire.GetJobResponse:
        """One job."""
        job_id = model.checked_job_id(request.job_id)
        return wire.GetJobResponse(job=await job_reading.job(self._leader.require_jobs(), job_id))

    async def ListJobs(self, request: wire.ListJobsRequest, context: _Context) -> wire.ListJobsResponse:
        """A page of jobs, newest first."""
        size = calls.page_size(request.page_size, PAGE_SIZE_MAX, PAGE_SIZE)
        chosen = job_port.JobFilter(
            states=job_codec.decode_states(request.states),
            queue=model.checked_queue_name(request.queue) if request.queue else "",
            node=node_model.checked_node_name(request.node) if request.node else "",
        )
        known = self._leader.require_jobs()
        page = await known.store.list_jobs(
            chosen, page_size=size, before=job_reading.page_token(request.page_token)
        )
        response = wire.ListJobsResponse()
        used = 0
        for number, record in enumerate(page.items):
            job = job_reading.encoded(known, record)
            used += job.ByteSize()
            if number and used > ANSWER_BYTES_MAX:
                response.next_page_token = job_reading.token_after(page.items[number - 1])
                return response
            response.jobs.append(job)
        if page.has_more:
            response.next_page_token = job_reading.token_after(page.items[-1])
        return response

    async def WatchJob(
        self, request: wire.WatchJobRequest, context: _Context
    ) -> AsyncIterator[wire.WatchJobResponse]:
        """The job now and after each change, until it has ended."""
        job_id = model.checked_job_id(request.job_id)
        known = self._leader.require_jobs()
        async for job in job_reading.watch(known, job_id, self._leader, self._draining):
            yield wire.WatchJobResponse(job=job)

    async def ExplainJob(self, request: wire.ExplainJobRequest, context: _Context) -> wire.ExplainJobResponse:
        """Why a job waits."""
        job_id = model.checked_job_id(request.job_id)
        known = self._leader.require_jobs()
        return wire.ExplainJobResponse(explanation=await job_reading.explanation(known, job_id))

    async def FollowJobLog(
        self, request: wire.FollowJobLogRequest, context: _Context
    ) -> AsyncIterator[wire.FollowJobLogResponse]:
        """A job's log as it grows."""
        model.checked_job_id(request.job_id)
        known, nodes = self._leader.require_jobs(), self._leader.require_nodes()
        async for response in job_logs.LogReader(known, nodes, request, self._draining).run():
            yield response

    # Changing

    async def CancelJob(self, request: wire.CancelJobRequest, context: _Context) -> wire.CancelJobResponse:
        """End a job, or leave one that has ended as it is."""
        job_id = model.checked_job_id(request.job_id)
        known = self._leader.require_jobs()
        actor = calls.actor(context)
        if known.require_machine().job(job_id) is not None:
            await known.ask(lambda jobs, now, wall: jobs.cancel(now, job_id, actor))
        return wire.CancelJobResponse(job=await job_reading.job(known, job_id))

    # Allocations of workloads that run elsewhere

    async def AcquireAllocation(
        self, request: wire.AcquireAllocationRequest, context: _Context
    ) -> wire.AcquireAllocationResponse:
        """An allocation, in the line of all jobs."""
        spec = job_codec.decode_spec(request.spec)
        if spec.template:
            raise errors.InvalidArgument(
                "spec.template: what runs elsewhere has none; submit a job instead", field="spec.template"
            )
        request_id = job_codec.checked_request_id(request.request_id, is_needed=True)
        seconds = _wait_seconds(request)
        known = self._leader.require_jobs()
        principal = calls.principal(context)
        digest = job_batches.payload_sha256(request.spec)
        acquired = await known.ask(
            lambda jobs, now, wall: jobs.acquire(
                now,
                wall,
                spec,
                principal=principal,
                key=changes.RequestKey(principal, request_id),
                payload_sha256=digest,
                wait_seconds=seconds,
            ),
            seconds=seconds + ACQUIRE_SLACK_SECONDS,
        )
        return wire.AcquireAllocationResponse(
            allocation=job_codec.encode_allocation(acquired.allocation),
            ttl=job_codec.encode_duration(acquired.ttl_seconds),
        )

    async def RenewAllocation(
        self, request: wire.RenewAllocationRequest, context: _Context
    ) -> wire.RenewAllocationResponse:
        """The holder lives."""
        ref = job_codec.decode_ref(request)
        renewed = self._leader.require_jobs().call(lambda jobs, now: jobs.renew(now, ref))
        return wire.RenewAllocationResponse(
            ttl=job_codec.encode_duration(renewed.ttl_seconds),
            is_cancel_requested=renewed.is_cancel_requested,
        )

    async def ReleaseAllocation(
        self, request: wire.ReleaseAllocationRequest, context: _Context
    ) -> wire.ReleaseAllocationResponse:
        """The work is over."""
        ref = job_codec.decode_ref(request)
        detail = _text(request.detail, "detail")
        known = self._leader.require_jobs()
        await known.ask(
            lambda jobs, now, wall: jobs.release(now, ref, is_failed=request.is_failed, detail=detail)
        )
        return wire.ReleaseAllocationResponse(job=await job_reading.job(known, ref.job_id))

    async def ForceReleaseAllocation(
        self, request: wire.ForceReleaseAllocationRequest, context: _Context
    ) -> wire.ForceReleaseAllocationResponse:
        """An operator says that nothing runs any more."""
        ref = job_codec.decode_ref(request)
        cause = _text(request.cause, "cause")
        if not cause.strip():
            raise errors.InvalidArgument("cause: say how it is known that nothing runs any more", field="cause")
        known = self._leader.require_jobs()
        actor = calls.actor(context)
        await known.ask(lambda jobs, now, wall: jobs.force_release(now, ref, cause=cause, actor=actor))
        return wire.ForceReleaseAllocationResponse(job=await job_reading.job(known, ref.job_id))

    async def AcknowledgeSilence(
        self, request: wire.AcknowledgeSilenceRequest, context: _Context
    ) -> wire.AcknowledgeSilenceResponse:
        """An operator says that those who are silent are dead."""
        cause = _text(request.cause, "cause")
        if not cause.strip():
            raise errors.InvalidArgument("cause: say how it is known that the silence is real", field="cause")
        actor = calls.actor(context)
        answer = await self._leader.require_jobs().ask(
            lambda jobs, now, wall: jobs.acknowledge_silence(now, cause=cause, actor=actor)
        )
        return wire.AcknowledgeSilenceResponse(was_held_back=answer.was_held_back, given_up=answer.given_up)

    # The whole

    async def GetUtilization(
        self, request: wire.GetUtilizationRequest, context: _Context
    ) -> wire.GetUtilizationResponse:
        """allocated / total * 100."""
        name = node_model.checked_node_name(request.node) if request.node else ""
        return job_reading.utilization(self._leader.require_jobs(), name)

    async def AuditAllocations(
        self, request: wire.AuditAllocationsRequest, context: _Context
    ) -> wire.AuditAllocationsResponse:
        """Compare the ledger with itself and with what runs."""
        return await job_audit.audit(self._leader.require_jobs())

    # Queues

    async def PutQueue(self, request: wire.PutQueueRequest, context: _Context) -> wire.PutQueueResponse:
        """Create or replace a queue."""
        queue = job_codec.decode_queue(request.queue)
        actor = calls.actor(context)
        await self._leader.require_jobs().ask(lambda jobs, now, wall: jobs.put_queue(now, queue, actor))
        return wire.PutQueueResponse(queue=job_codec.encode_queue(queue))

    async def ListQueues(self, request: wire.ListQueuesRequest, context: _Context) -> wire.ListQueuesResponse:
        """Queues, by name."""
        return job_reading.queues(self._leader.require_jobs())

    async def DeleteQueue(
        self, request: wire.DeleteQueueRequest, context: _Context
    ) -> wire.DeleteQueueResponse:
        """Remove a queue that has no jobs."""
        name = model.checked_queue_name(request.name, field_name="name")
        actor = calls.actor(context)
        await self._leader.require_jobs().ask(lambda jobs, now, wall: jobs.delete_queue(now, name, actor))
        return wire.DeleteQueueResponse()


def _wait_seconds(request: wire.AcquireAllocationRequest) -> float:
    if not request.HasField("wait"):
        return ACQUIRE_SECONDS
    seconds = job_codec.decode_duration(request.wait)
    if not 0.0 <= seconds <= ACQUIRE_SECONDS_MAX:
        raise errors.InvalidArgument(
            f"wait: {seconds:g} s is not in 0 to {ACQUIRE_SECONDS_MAX:g} s", field="wait"
        )
    return seconds


def _text(text: str, field: str) -> str:
    if len(text) > DETAIL_LENGTH_MAX or "\0" in text:
        raise errors.InvalidArgument(
            f"{field}: at most {DETAIL_LENGTH_MAX} characters, none of them NUL", field=field
        )
    return text
