"""A made-up JobService behind a real gRPC server: for tests of the client and the command line."""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
from leasehold.api.job.v1 import job_pb2, job_service_pb2_grpc
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import job_codec, options

PATIENCE_SECONDS = 30.0
NODE = "r620-1"


class FakeJobs(job_service_pb2_grpc.JobServiceServicer):
    """Answers as the leader does, of jobs that exist in words only; a test says what becomes of them."""

    def __init__(self) -> None:
        self.jobs: dict[str, job_pb2.Job] = {}
        self.explanation = wire.Explanation(
            state=job_pb2.JOB_STATE_PENDING,
            summary="2 nodes: 1 lacks 4 CPUs, 1 draining",
            blocked=[
                wire.NodesBlocked(nodes=1, reason="LACKS_CPUS", detail="1 lacks 4 CPUs"),
                wire.NodesBlocked(nodes=1, reason="DRAINING", detail="1 draining"),
            ],
            place_in_line=3,
            line_length=12,
        )
        self.queues: dict[str, job_pb2.Queue] = {"default": job_pb2.Queue(name="default")}
        self.findings: list[wire.AuditFinding] = []
        self.held_back_cause = ""
        self.log = b"one\ntwo\n"
        #: Jobs that are placed at once.
        self.is_placing = True
        #: Set: every call fails with it.
        self.failure: errors.LeaseholdError | None = None
        #: Set: renewals fail with it.
        self.renew_failure: errors.LeaseholdError | None = None
        self.is_cancel_requested = False
        self.ttl_seconds = 30.0
        #: What acquiring takes on the server.
        self.acquire_seconds = 0.0
        self.requests: list[Any] = []
        #: Chunks by (request id, chunk): what a repeat is answered.
        self.chunks: dict[tuple[str, int], wire.SubmitJobsResponse] = {}
        #: After so many answers of batches, streams are cut before the next one is told.
        self.cuts: list[int] = []
        self.cuts_logs = 0
        self._changed = asyncio.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    # What tests do

    def asked(self, kind: type) -> list[Any]:
        """The requests of a type, in order."""
        return [each for each in self.requests if isinstance(each, kind)]

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for what the other side brings about."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    def end(self, job_id: str, state: str = "COMPLETED", cause: str = "SUCCEEDED", code: int = 0) -> None:
        """A job ends; from any thread."""
        job = self.jobs[job_id]
        job.outcome.CopyFrom(
            job_pb2.JobOutcome(cause=job_pb2.EndCause.Value(f"END_CAUSE_{cause}"), exit_code=code)
        )
        job.end_time.GetCurrentTime()
        job.allocation.is_released = True
        self.move(job_id, state)

    def move(self, job_id: str, state: str) -> None:
        """A job changes its state; from any thread."""
        job = self.jobs[job_id]
        if state == "RUNNING":
            self._place(job)
        job.state = job_pb2.JobState.Value(f"JOB_STATE_{state}")
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._tell(), self._loop).result(PATIENCE_SECONDS)

    def only(self) -> str:
        """Id of the only job."""
        (job_id,) = self.jobs
        return job_id

    def _place(self, job: job_pb2.Job) -> None:
        job.attempt += 1
        job.state = job_pb2.JOB_STATE_RUNNING
        job.start_time.GetCurrentTime()
        job.allocation.CopyFrom(
            job_pb2.Allocation(
                job_id=job.job_id,
                attempt=job.attempt,
                node=NODE,
                allocated_cpus=job.spec.required_cpus,
                allocated_memory_bytes=job.spec.required_memory_bytes,
                phase=job_pb2.ATTEMPT_PHASE_STARTED,
            )
        )
        job.allocation.allocate_time.GetCurrentTime()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _new(self, spec: job_pb2.JobSpec) -> job_pb2.Job:
        decoded = job_codec.decode_spec(spec)
        if decoded.required.cpus > 16:
            raise errors.InvalidArgument(
                f"required_cpus: {decoded.required.cpus} is more than any node has (16)", field="required_cpus"
            )
        if decoded.queue not in self.queues:
            raise errors.NotFound(f"there is no queue {decoded.queue}")
        job = job_pb2.Job(
            job_id=str(uuid.uuid4()),
            spec=job_codec.encode_spec(decoded),
            state=job_pb2.JOB_STATE_PENDING,
            principal="anonymous",
        )
        job.submit_time.GetCurrentTime()
        self.jobs[job.job_id] = job
        if self.is_placing:
            self._place(job)
        return job

    def _job(self, job_id: str) -> job_pb2.Job:
        if job_id not in self.jobs:
            raise errors.NotFound(f"there is no job {job_id}")
        return self.jobs[job_id]

    # The service

    async def SubmitJob(self, request: Any, context: Any) -> Any:
        if request.is_dry_run:
            return wire.SubmitJobResponse(explanation=self.explanation)
        return wire.SubmitJobResponse(job=self._new(request.spec))

    async def SubmitJobs(self, request_iterator: Any, context: Any) -> Any:
        async for request in request_iterator:
            self.requests.append(request)
            try:
                self._check()
                answer = self._chunk(request)
            except errors.LeaseholdError as error:
                await context.abort_with_status(rpc_errors.to_status(error))
            if self.cuts and len(self.chunks) >= self.cuts[0]:
                self.cuts.pop(0)
                await context.abort_with_status(rpc_errors.to_status(errors.Unavailable("cut")))
            yield answer

    def _chunk(self, request: wire.SubmitJobsRequest) -> wire.SubmitJobsResponse:
        key = (request.request_id, request.chunk)
        if key not in self.chunks:
            response = wire.SubmitJobsResponse(chunk=request.chunk)
            for spec in request.specs:
                try:
                    response.verdicts.add(job_id=self._new(spec).job_id)
                except errors.LeaseholdError as error:
                    response.verdicts.add(reason=error.reason, message=error.message, field=error.field or "")
            self.chunks[key] = response
        return self.chunks[key]

    async def GetJob(self, request: Any, context: Any) -> Any:
        return wire.GetJobResponse(job=self._job(request.job_id))

    async def ListJobs(self, request: Any, context: Any) -> Any:
        found = [
            each for each in reversed(self.jobs.values()) if not request.states or each.state in request.states
        ]
        begin = int(request.page_token or 0)
        end = begin + (request.page_size or 100)
        return wire.ListJobsResponse(
            jobs=found[begin:end], next_page_token=str(end) if end < len(found) else ""
        )

    async def CancelJob(self, request: Any, context: Any) -> Any:
        job = self._job(request.job_id)
        if job.state == job_pb2.JOB_STATE_PENDING:
            job.state = job_pb2.JOB_STATE_CANCELLED
            await self._tell()
        elif job.state == job_pb2.JOB_STATE_RUNNING:
            job.is_cancel_requested = True
        return wire.CancelJobResponse(job=job)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        job = self._job(request.job_id)
        while True:
            told = job_pb2.Job()
            told.CopyFrom(job)  # what this message tells: the job may change before the generator goes on
            yield wire.WatchJobResponse(job=told)
            if told.state not in (job_pb2.JOB_STATE_PENDING, job_pb2.JOB_STATE_RUNNING):
                return
            async with self._changed:
                await self._changed.wait_for(lambda told=told: job != told)  # type: ignore[misc]

    async def ExplainJob(self, request: Any, context: Any) -> Any:
        self._job(request.job_id)
        return wire.ExplainJobResponse(explanation=self.explanation)

    async def FollowJobLog(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._job(request.job_id)
        begin = int(request.cursor or 0)
        for line in self.log[begin:].splitlines(keepends=True):
            begin += len(line)
            yield wire.FollowJobLogResponse(data=line, cursor=str(begin))
            if self.cuts_logs:
                self.cuts_logs -= 1
                raise errors.Unavailable("cut")

    async def AcquireAllocation(self, request: Any, context: Any) -> Any:
        if not self.is_placing:
            raise errors.NotPlaced("no node had room in time")
        await asyncio.sleep(self.acquire_seconds)
        job = self._new(request.spec)
        return wire.AcquireAllocationResponse(
            allocation=job.allocation, ttl=job_codec.encode_duration(self.ttl_seconds)
        )

    async def RenewAllocation(self, request: Any, context: Any) -> Any:
        if self.renew_failure is not None:
            raise self.renew_failure
        return wire.RenewAllocationResponse(
            ttl=job_codec.encode_duration(self.ttl_seconds), is_cancel_requested=self.is_cancel_requested
        )

    async def ReleaseAllocation(self, request: Any, context: Any) -> Any:
        job = self._job(request.job_id)
        job.state = job_pb2.JOB_STATE_FAILED if request.is_failed else job_pb2.JOB_STATE_COMPLETED
        job.allocation.is_released = True
        return wire.ReleaseAllocationResponse(job=job)

    async def ForceReleaseAllocation(self, request: Any, context: Any) -> Any:
        job = self._job(request.job_id)
        job.state = job_pb2.JOB_STATE_FAILED
        return wire.ForceReleaseAllocationResponse(job=job)

    async def GetUtilization(self, request: Any, context: Any) -> Any:
        node = wire.NodeUtilization(
            node=NODE,
            allocated_cpus=4,
            total_cpus=16,
            cpus_percent=25.0,
            allocated_memory_bytes=2**33,
            total_memory_bytes=2**36,
            memory_percent=12.5,
            running_jobs=2,
        )
        total = wire.NodeUtilization()
        total.CopyFrom(node)
        total.node = ""
        return wire.GetUtilizationResponse(
            nodes=[node], total=total, pending_jobs=5, held_back_cause=self.held_back_cause
        )

    async def AcknowledgeSilence(self, request: Any, context: Any) -> Any:
        was_held_back, self.held_back_cause = bool(self.held_back_cause), ""
        return wire.AcknowledgeSilenceResponse(was_held_back=was_held_back, given_up=6 if was_held_back else 0)

    async def AuditAllocations(self, request: Any, context: Any) -> Any:
        return wire.AuditAllocationsResponse(
            findings=self.findings, rules=["COUNTER_DIFFERS"], flush_sequence=7, live_allocations=2, nodes=1
        )

    async def PutQueue(self, request: Any, context: Any) -> Any:
        self.queues[request.queue.name] = request.queue
        return wire.PutQueueResponse(queue=request.queue)

    async def ListQueues(self, request: Any, context: Any) -> Any:
        usages = [
            wire.ListQueuesResponse.Usage(queue=self.queues[name], pending_jobs=1, running_jobs=2)
            for name in sorted(self.queues)
        ]
        return wire.ListQueuesResponse(queues=usages)

    async def DeleteQueue(self, request: Any, context: Any) -> Any:
        if request.name == "default":
            raise errors.FailedPrecondition("queue default stays")
        del self.queues[request.name]
        return wire.DeleteQueueResponse()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure


class _CoreErrors(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Counts requests, and answers core errors as statuses."""

    def __init__(self, fake: FakeJobs) -> None:
        self._fake = fake

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, behaviour: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            self._fake.requests.append(request)
            try:
                self._fake._check()
                return await behaviour(request, context)
            except errors.LeaseholdError as error:
                await context.abort_with_status(rpc_errors.to_status(error))

        return answer

    def _stream(self, behaviour: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            self._fake.requests.append(request)
            try:
                self._fake._check()
                async for each in behaviour(request, context):
                    yield each
            except errors.LeaseholdError as error:
                await context.abort_with_status(rpc_errors.to_status(error))

        return answer


@contextlib.contextmanager
def serve(fake: FakeJobs) -> Iterator[str]:
    """It behind a real gRPC server on a thread of its own; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_SECONDS)

    async def start() -> tuple[grpc.aio.Server, str]:
        fake._loop = loop
        server = grpc.aio.server(options=options.server_options(), interceptors=(_CoreErrors(fake),))
        job_service_pb2_grpc.add_JobServiceServicer_to_server(fake, server)  # type: ignore[no-untyped-call,unused-ignore]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"

    server, address = do(start())
    try:
        yield address
    finally:
        do(server.stop(None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
