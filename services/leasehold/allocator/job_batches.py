"""Batches of jobs: a stream of chunks, each one commit, answered in order while later ones are on their way."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from leasehold.allocator import jobs
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.rpc import job_codec

CHUNK_JOBS_MAX = 1_000
CHUNK_BYTES_MAX = 3 * 2**20
#: Chunks of one stream that are taken before the first of them is answered.
CHUNKS_AHEAD = 4

#: Of jobs that were right, in a chunk of which all are taken or none.
ALL_OR_NONE = "ALL_OR_NONE"


class Submission:
    """One stream. `run` gives the answers."""

    def __init__(self, known: jobs.Jobs, principal: str) -> None:
        self._known = known
        self._principal = principal
        self._request_id = ""
        self._chunk = 0
        self._line: asyncio.Queue[asyncio.Task[wire.SubmitJobsResponse] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(CHUNKS_AHEAD)

    async def run(
        self, requests: AsyncIterator[wire.SubmitJobsRequest]
    ) -> AsyncIterator[wire.SubmitJobsResponse]:
        """Answers, in the order of chunks; one that cannot be taken ends the stream after those before it."""
        reader = asyncio.create_task(self._read(requests), name="submit-jobs")
        taken: asyncio.Task[wire.SubmitJobsResponse] | None = None
        try:
            while (taken := await self._line.get()) is not None:
                response = await taken
                self._room.release()
                yield response
            await reader
        finally:
            reader.cancel()
            while taken is not None or not self._line.empty():
                if taken is not None:
                    taken.cancel()
                taken = None if self._line.empty() else self._line.get_nowait()

    async def _read(self, requests: AsyncIterator[wire.SubmitJobsRequest]) -> None:
        try:
            async for request in requests:
                self._check(request)
                await self._room.acquire()
                self._line.put_nowait(asyncio.create_task(self._submit(request), name="submit-chunk"))
        finally:
            self._line.put_nowait(None)

    def _check(self, request: wire.SubmitJobsRequest) -> None:
        job_codec.checked_request_id(request.request_id, is_needed=True)
        if self._request_id and request.request_id != self._request_id:
            raise errors.InvalidArgument(
                "request_id: is the same in every message of a stream", field="request_id"
            )
        self._request_id = request.request_id
        # A stream that goes on with an earlier one's work begins where that one was answered last.
        is_next = request.chunk == self._chunk + 1 if self._chunk else request.chunk >= 1
        if not is_next:
            raise errors.InvalidArgument(
                f"chunk: {request.chunk} does not follow {self._chunk}; the first is 1", field="chunk"
            )
        self._chunk = request.chunk
        if not 1 <= len(request.specs) <= CHUNK_JOBS_MAX:
            raise errors.InvalidArgument(
                f"specs: 1 to {CHUNK_JOBS_MAX} in a chunk, not {len(request.specs)}", field="specs"
            )
        if request.ByteSize() > CHUNK_BYTES_MAX:
            raise errors.InvalidArgument("specs: a chunk of them has at most 3 MiB", field="specs")

    async def _submit(self, request: wire.SubmitJobsRequest) -> wire.SubmitJobsResponse:
        decoded = [_decoded(spec) for spec in request.specs]
        right = [spec for spec in decoded if isinstance(spec, model.JobSpec)]
        if request.is_all_or_none and len(right) < len(decoded):
            return _response(request.chunk, [_refused_together(spec) for spec in decoded])
        taken: Sequence[wire.SubmitVerdict] = ()
        if right:
            taken = await self._ask(request, right)
        answers = iter(taken)
        return _response(
            request.chunk,
            [next(answers) if isinstance(spec, model.JobSpec) else _refusal(spec) for spec in decoded],
        )

    async def _ask(
        self, request: wire.SubmitJobsRequest, specs: Sequence[model.JobSpec]
    ) -> list[wire.SubmitVerdict]:
        digest = payload_sha256(*request.specs, suffix=b"all" if request.is_all_or_none else b"each")
        answers = await self._known.ask(
            lambda machine, now, wall: machine.submit(
                now,
                wall,
                specs,
                principal=self._principal,
                key=changes.RequestKey(self._principal, request.request_id, request.chunk),
                payload_sha256=digest,
                is_all_or_none=request.is_all_or_none,
            )
        )
        return [verdict(answer) for answer in answers]


def verdict(answer: Any) -> wire.SubmitVerdict:
    """The machine's word on one job, on the wire."""
    if answer.error is not None:
        return _refusal(answer.error)
    return wire.SubmitVerdict(job_id=answer.job_id)


def payload_sha256(*messages: Any, suffix: bytes = b"") -> bytes:
    """Digest of what a request asks for, so that another one under the same id is told from a repeat."""
    digest = hashlib.sha256()
    for message in messages:
        part: bytes = message.SerializeToString(deterministic=True)
        digest.update(len(part).to_bytes(4, "big") + part)
    digest.update(suffix)
    return digest.digest()


def _decoded(message: Any) -> model.JobSpec | errors.InvalidArgument:
    try:
        return job_codec.decode_spec(message)
    except errors.InvalidArgument as error:
        return error


def _refusal(error: errors.LeaseholdError) -> wire.SubmitVerdict:
    return wire.SubmitVerdict(reason=error.reason, message=error.message, field=error.field or "")


def _refused_together(spec: model.JobSpec | errors.InvalidArgument) -> wire.SubmitVerdict:
    if isinstance(spec, errors.InvalidArgument):
        return _refusal(spec)
    return wire.SubmitVerdict(reason=ALL_OR_NONE, message="another job of its chunk was refused")


def _response(chunk: int, verdicts: Sequence[wire.SubmitVerdict]) -> wire.SubmitJobsResponse:
    return wire.SubmitJobsResponse(chunk=chunk, verdicts=verdicts)
