"""Batches of jobs: chunks under one request id, sent again from the first unanswered one after a cut."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc
from leasehold.client import failures
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import job_codec, leader_stream, tls

CHUNK_JOBS_MAX: Final = 1000
#: Below the 3 MiB that a chunk may have, its own fields included.
CHUNK_BYTES_MAX: Final = 3 * 2**20 - 4096
#: Chunks on their way.
WINDOW: Final = 4
#: Tag and length before each job of a message.
_JOB_FRAME_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one job of a batch."""

    #: Empty: it was refused.
    job_id: str
    error: errors.LeaseholdError | None = None


def verdict(message: wire.SubmitVerdict) -> Verdict:
    """The verdict of the wire; a refusal as the error that its reason names."""
    if message.job_id:
        return Verdict(message.job_id)
    return Verdict("", failures.build(message.reason, message.message, field=message.field or None))


class Chunks:
    """Cuts jobs into chunks of what one commit takes; equal jobs give equal chunks."""

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._bytes = 0

    def add(self, spec: model.JobSpec) -> list[Any] | None:
        """Add a job; the chunk before it, if that is full. Raises `InvalidArgument` for a job above 3 MiB."""
        job = job_codec.encode_spec(spec)
        size = job.ByteSize() + _JOB_FRAME_BYTES
        if size > CHUNK_BYTES_MAX:
            raise errors.InvalidArgument(f"parameters: the job has {size} bytes", field="parameters")
        full = None
        if len(self._jobs) == CHUNK_JOBS_MAX or self._bytes + size > CHUNK_BYTES_MAX:
            full = self.take()
        self._jobs.append(job)
        self._bytes += size
        return full

    def take(self) -> list[Any]:
        """What there is now; the next chunk begins."""
        jobs, self._jobs, self._bytes = self._jobs, [], 0
        return jobs


def chunks_of(specs: Iterable[model.JobSpec]) -> Iterator[list[Any]]:
    """All jobs in chunks, none of them empty."""
    chunks = Chunks()
    for spec in specs:
        full = chunks.add(spec)
        if full:
            yield full
    last = chunks.take()
    if last:
        yield last


class Batch:
    """One batch on its way, on the loop that uses it.

    Chunks that are not answered are kept, and sent again under the same ids to whoever leads after a cut; so
    none is submitted twice. `patience_seconds` bounds the time without an answer; above 0.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        request_id: str,
        is_all_or_none: bool,
        patience_seconds: float,
        tls_files: tls.TlsFiles | None = None,
    ) -> None:
        self._candidates = leader_stream.Candidates(addresses)
        self._request_id = request_id
        self._is_all_or_none = is_all_or_none
        self._patience_seconds = patience_seconds
        self._tls_files = tls_files
        self._unanswered: deque[wire.SubmitJobsRequest] = deque()
        #: Of the unanswered, those that this stream has been told.
        self._written = 0
        self._number = 0
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._failure: errors.LeaseholdError | None = None

    async def send(self, jobs: Sequence[Any]) -> list[list[Verdict]]:
        """Send a chunk; waits only while `WINDOW` are on their way. Verdicts of earlier chunks, in order.

        Raises what the leader answers, as core errors, and `Unavailable` if there is none in time.
        """
        self._number += 1
        self._unanswered.append(
            wire.SubmitJobsRequest(
                request_id=self._request_id,
                chunk=self._number,
                specs=jobs,
                is_all_or_none=self._is_all_or_none,
            )
        )
        return await self._until(WINDOW - 1)

    async def finish(self) -> list[list[Verdict]]:
        """Verdicts of all chunks that are still on their way. Raises as `send`."""
        return await self._until(0)

    async def close(self) -> None:
        """Leave the connection; what is on its way may be submitted, or not."""
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            await self._channel.close()
        self._call = self._channel = None
        self._written = 0

    async def _until(self, unanswered: int) -> list[list[Verdict]]:
        loop = asyncio.get_running_loop()
        told: list[list[Verdict]] = []
        deadline = loop.time() + self._patience_seconds
        while len(self._unanswered) > unanswered or self._written < len(self._unanswered):
            try:
                async with asyncio.timeout_at(deadline):
                    await self._write()
                    if len(self._unanswered) <= unanswered:
                        break
                    response = await self._call.read()
                if response is grpc.aio.EOF:
                    raise errors.Unavailable("the allocator ended the stream")
                told.append(self._answered(response))
                deadline = loop.time() + self._patience_seconds
            except TimeoutError:
                await self.close()
                seconds = f"{self._patience_seconds:g} s"
                raise self._failure or errors.Unavailable(f"no answer to a chunk within {seconds}") from None
            except (*rpc_errors.STREAM_OVER, grpc.RpcError, errors.Unavailable) as error:
                await self._cut(error)
                if loop.time() >= deadline:
                    raise self._failure or errors.Unavailable("the stream is over") from error
                await asyncio.sleep(leader_stream.RETRY_SECONDS)
        return told

    async def _write(self) -> None:
        if self._call is None:
            self._channel = channels.open_channel(self._candidates.next(), tls_files=self._tls_files)
            self._call = job_service_pb2_grpc.JobServiceStub(self._channel).SubmitJobs()  # type: ignore[no-untyped-call,unused-ignore]
        while self._written < len(self._unanswered):
            await self._call.write(self._unanswered[self._written])
            self._written += 1

    def _answered(self, response: wire.SubmitJobsResponse) -> list[Verdict]:
        first = self._unanswered[0]
        if response.chunk != first.chunk or len(response.verdicts) != len(first.specs):
            raise errors.LeaseholdError(
                f"chunk {first.chunk} of {len(first.specs)} jobs was answered by chunk {response.chunk} "
                f"with {len(response.verdicts)} verdicts"
            )
        self._unanswered.popleft()
        self._written -= 1
        self._failure = None
        return [verdict(each) for each in response.verdicts]

    async def _cut(self, error: Exception) -> None:
        """Leave this connection; raises what asking again cannot heal."""
        failure: errors.LeaseholdError
        if isinstance(error, rpc_errors.STREAM_OVER):  # the call is over, and its status tells why
            failure = await self._status()
        elif isinstance(error, grpc.RpcError):
            failure = rpc_errors.from_rpc_error(error)
        else:
            assert isinstance(error, errors.LeaseholdError)
            failure = error
        await self.close()
        if not isinstance(failure, errors.Unavailable):
            raise failure
        self._failure = failure
        self._candidates.failed(failure)

    async def _status(self) -> errors.LeaseholdError:
        try:
            await self._call.read()
        except grpc.RpcError as error:
            return rpc_errors.from_rpc_error(error)
        return errors.Unavailable("the stream is over")
