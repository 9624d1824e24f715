"""Calls of JobService on the I/O thread: what both faces of `jobs` stand on. Imported with the first call."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.client import job_batches
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.rpc import job_codec, leader, leader_stream, methods, tls

#: How much longer than its own wait an acquire may take.
ACQUIRE_SLACK_SECONDS: Final = 10.0


def new_request_id() -> str:
    """An id under which a request may be repeated."""
    return uuid.uuid4().hex


class JobCalls:
    """JobService of whichever allocator leads. Every method runs on the I/O thread's loop."""

    def __init__(
        self, addresses: tuple[str, ...], tls_files: tls.TlsFiles | None, *, timeout_seconds: float
    ) -> None:
        self._addresses = addresses
        self._tls_files = tls_files
        self._timeout_seconds = timeout_seconds
        self._leader: leader.LeaderChannel | None = None

    async def close(self) -> None:
        """Close the connections; calls under way are cancelled."""
        if self._leader is not None:
            await self._leader.close()
            self._leader = None

    async def ask(self, method: str, request: Any, *, timeout_seconds: float | None = None) -> Any:
        """Call a unary method, which must be idempotent. Raises as `leader.LeaderChannel.ask`."""
        if self._leader is None:  # gRPC binds a channel to the running loop
            self._leader = leader.LeaderChannel(self._addresses, tls_files=self._tls_files)
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        return await self._leader.ask(methods.unary(method, request), request, timeout_seconds=seconds)

    async def submit(self, spec: model.JobSpec, request_id: str) -> model.JobRecord:
        """One job; safe to repeat under its id."""
        request = wire.SubmitJobRequest(spec=job_codec.encode_spec(spec), request_id=request_id)
        return job_codec.decode_job((await self.ask("SubmitJob", request)).job)

    async def rehearse(self, spec: model.JobSpec) -> Any:
        """What would happen to a job."""
        request = wire.SubmitJobRequest(spec=job_codec.encode_spec(spec), is_dry_run=True)
        return job_codec.decode_explanation((await self.ask("SubmitJob", request)).explanation)

    async def get(self, job_id: str) -> model.JobRecord:
        """One job."""
        answer = await self.ask("GetJob", wire.GetJobRequest(job_id=job_id))
        return job_codec.decode_job(answer.job)

    async def page(self, request: wire.ListJobsRequest) -> tuple[list[model.JobRecord], str]:
        """A page of jobs, and the token of the next."""
        answer = await self.ask("ListJobs", request)
        return [job_codec.decode_job(each) for each in answer.jobs], answer.next_page_token

    async def cancel(self, job_id: str) -> model.JobRecord:
        """End a job, or leave one that has ended."""
        answer = await self.ask("CancelJob", wire.CancelJobRequest(job_id=job_id))
        return job_codec.decode_job(answer.job)

    async def explain(self, job_id: str) -> Any:
        """Why a job waits."""
        answer = await self.ask("ExplainJob", wire.ExplainJobRequest(job_id=job_id))
        return job_codec.decode_explanation(answer.explanation)

    async def utilization(self, node: str) -> wire.GetUtilizationResponse:
        """What is allocated of what there is."""
        answer: wire.GetUtilizationResponse = await self.ask(
            "GetUtilization", wire.GetUtilizationRequest(node=node)
        )
        return answer

    async def watch(self, job_id: str) -> AsyncGenerator[model.JobRecord, None]:
        """The job now and after each change, until it has ended; across changes of leaders."""
        model.checked_job_id(job_id)
        told: model.JobRecord | None = None
        async for answer in self.follow("WatchJob", lambda: wire.WatchJobRequest(job_id=job_id)):
            job = job_codec.decode_job(answer.job)
            if job != told:  # a stream that was begun anew tells again what is known
                told = job
                yield job
            if job.state in model.TERMINAL_STATES:
                return

    async def wait(self, job_id: str, timeout_seconds: float | None) -> model.JobRecord:
        """The job once it has ended. Raises `DeadlineExceeded` if it has not by then."""
        try:
            async with asyncio.timeout(timeout_seconds):
                async with contextlib.aclosing(self.watch(job_id)) as jobs:
                    async for job in jobs:
                        if job.state in model.TERMINAL_STATES:
                            return job
        except TimeoutError:
            raise errors.DeadlineExceeded(f"job {job_id} has not ended within {timeout_seconds:g} s") from None
        raise errors.Unavailable(f"job {job_id}: the stream is over")

    async def log(
        self, job_id: str, *, attempt: int, tail_lines: int, is_following: bool
    ) -> AsyncGenerator[bytes, None]:
        """Pieces of a job's log; after a cut it goes on where it was."""
        cursor = ""
        request = wire.FollowJobLogRequest(
            job_id=model.checked_job_id(job_id),
            attempt=attempt,
            tail_lines=tail_lines,
            is_following=is_following,
        )

        def asked() -> wire.FollowJobLogRequest:
            request.cursor = cursor
            return request

        async for answer in self.follow("FollowJobLog", asked, is_endless=False):
            cursor = answer.cursor
            if answer.data:
                yield answer.data

    def follow(
        self, method: str, request: Callable[[], Any], *, is_endless: bool = True
    ) -> AsyncGenerator[Any, None]:
        """The messages of a stream; see `leader_stream.follow`."""
        return leader_stream.follow(
            self._addresses,
            method,
            request,
            patience_seconds=self._timeout_seconds,
            tls_files=self._tls_files,
            is_endless=is_endless,
        )

    def batch(self, request_id: str, *, is_all_or_none: bool) -> job_batches.Batch:
        """A batch, to be sent."""
        return job_batches.Batch(
            self._addresses,
            request_id=request_id,
            is_all_or_none=is_all_or_none,
            patience_seconds=max(self._timeout_seconds, 1.0),
            tls_files=self._tls_files,
        )

    # Allocations of workloads that run elsewhere

    async def acquire(
        self, spec: model.JobSpec, request_id: str, wait_seconds: float
    ) -> tuple[model.AttemptRef, str, float]:
        """An allocation's token, its node, and until when by the monotonic clock it is held unless renewed."""
        request = wire.AcquireAllocationRequest(spec=job_codec.encode_spec(spec), request_id=request_id)
        request.wait.CopyFrom(job_codec.encode_duration(wait_seconds))
        sent = time.monotonic()
        answer = await self.ask(
            "AcquireAllocation", request, timeout_seconds=wait_seconds + ACQUIRE_SLACK_SECONDS
        )
        ref = job_codec.decode_ref(answer.allocation, field="allocation")
        ttl_seconds = job_codec.decode_duration(answer.ttl)
        if time.monotonic() - sent > ttl_seconds / 3:  # much of the TTL was spent in line
            held_until, _ = await self.renew(ref, timeout_seconds=ttl_seconds / 3)
            return ref, answer.allocation.node, held_until
        return ref, answer.allocation.node, sent + ttl_seconds

    async def renew(self, ref: model.AttemptRef, *, timeout_seconds: float) -> tuple[float, bool]:
        """Until when it is held, counted from before the call; and whether its job was cancelled.

        Raises `AllocationLapsed` if it was given up.
        """
        sent = time.monotonic()
        request = wire.RenewAllocationRequest(job_id=ref.job_id, attempt=ref.attempt)
        answer = await self.ask("RenewAllocation", request, timeout_seconds=timeout_seconds)
        return sent + job_codec.decode_duration(answer.ttl), answer.is_cancel_requested

    async def release(self, ref: model.AttemptRef, *, is_failed: bool, detail: str) -> None:
        """Give it back; one that is released already is no error."""
        request = wire.ReleaseAllocationRequest(
            job_id=ref.job_id, attempt=ref.attempt, is_failed=is_failed, detail=detail[:1000]
        )
        await self.ask("ReleaseAllocation", request)


async def next_of(messages: AsyncGenerator[Any, None]) -> Any:
    """The next message, or None at the end: a future cannot carry StopAsyncIteration."""
    try:
        return await anext(messages)
    except StopAsyncIteration:
        return None
    except asyncio.CancelledError:
        await messages.aclose()
        raise


def lapsed(ref: model.AttemptRef, why: str) -> errors.AllocationLapsed:
    """Why work under an allocation must stop."""
    return errors.AllocationLapsed(f"the allocation of job {ref.job_id} (attempt {ref.attempt}) {why}")
