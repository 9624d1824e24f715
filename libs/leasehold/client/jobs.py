"""Jobs as users submit and watch them, and allocations for work of their own: for asyncio, and for threads.

::

    with client.connect_blocking() as leasehold:
        job = leasehold.jobs.submit(client.job_spec("encode", cpus=2, memory_gb=4))
        print(leasehold.jobs.wait(job.job_id).state)
        with leasehold.jobs.allocation(cpus=2, memory_gb=4, wait_seconds=60):
            work()

gRPC is loaded with the first call, so a server that forks its workers may make these objects in the parent.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, Final, TypeVar

from leasehold.client import job_allocations, job_specs, runtime
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement

if TYPE_CHECKING:
    from leasehold.client import job_batches, job_calls, job_holding
    from leasehold.rpc import job_documents

#: For one answer; and how long a stream goes without a leader.
TIMEOUT_SECONDS: Final = 10.0
WAIT_SECONDS_MAX: Final = 3600.0

T = TypeVar("T")


class BaseJobs:
    """What both faces share. Safe to use from any thread; begins anew in the child of a fork."""

    def __init__(self, endpoint: runtime.Endpoint, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._calls: job_calls.JobCalls | None = None
        self._io: runtime.IoThread | None = None
        self._pid = 0
        self._is_closed = False

    def _connected(self) -> "job_calls.JobCalls":
        with runtime.PROCESS.lock:
            if self._is_closed:
                raise errors.FailedPrecondition("the client is closed")
            if self._calls is None or self._pid != os.getpid():
                # `runtime` keeps what was inherited by a fork: it must not be touched here.
                self._io = runtime.PROCESS.io(self)
                from leasehold.client import job_calls

                self._calls = job_calls.JobCalls(
                    self._endpoint.addresses,
                    self._endpoint.tls_files,  # type: ignore[arg-type]  # TlsPaths is what is seen of it
                    timeout_seconds=self._timeout_seconds,
                )
                self._pid = os.getpid()
            return self._calls

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "futures.Future[T]":
        assert self._io is not None
        return self._io.submit(coroutine)

    def _holding(
        self, spec: model.JobSpec, wait_seconds: float, lost: Callable[[], None]
    ) -> "job_holding.Holding":
        calls = self._connected()
        from leasehold.client import job_holding

        return job_holding.Holding(calls, spec, wait_seconds=wait_seconds, lost=lost)

    def _make(
        self, cpus: int, memory_gb: float | None, memory: str | int | None, wait_seconds: float, more: Any
    ) -> job_allocations.Make:
        if not 0 <= wait_seconds <= WAIT_SECONDS_MAX:
            raise errors.InvalidArgument(
                f"wait_seconds: 0 to {WAIT_SECONDS_MAX:g}, not {wait_seconds!r:.40}", field="wait_seconds"
            )
        spec = job_specs.job_spec(cpus=cpus, memory_gb=memory_gb, memory=memory, **more)
        return lambda lost: self._holding(spec, wait_seconds, lost)

    def _id(self, given: str | None) -> str:
        from leasehold.client import job_calls

        return job_calls.new_request_id() if given is None else given

    async def close(self) -> None:
        """Close the connection, on the I/O thread."""
        if self._calls is not None:
            await self._calls.close()

    def leave(self) -> "futures.Future[None] | None":
        """Use it no more; wait for the future, if there is one."""
        with runtime.PROCESS.lock:
            self._is_closed = True
            runtime.PROCESS.left(self)
            if self._calls is None or self._pid != os.getpid():
                return None
            return self._submit(self._calls.close())


def _list_request(states: Collection[model.JobState], queue: str, node: str, page_size: int, token: str) -> Any:
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.rpc import job_codec

    return wire.ListJobsRequest(
        page_size=page_size,
        page_token=token,
        states=[job_codec.encode_state(state) for state in states],
        queue=queue,
        node=node,
    )


class Jobs(BaseJobs):
    """Jobs for threads.

    Every method raises what the leader answers, as errors of `client.errors`, and `Unavailable` if no leader
    answers in time. What changes something may be repeated: it carries a request id.
    """

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        result: T = job_allocations.result_of(self._submit(coroutine))
        return result

    def submit(self, spec: model.JobSpec, *, request_id: str | None = None) -> model.JobRecord:
        """Submit a job (see `job_spec`); it is durable when this returns.

        With a `request_id` (1 to 64 printable ASCII characters) of your own a repeat within a day is the same
        job. Raises `InvalidArgument` naming the field, also where no node could ever hold it.
        """
        calls = self._connected()
        return self._run(calls.submit(spec, self._id(request_id)))

    def rehearse(self, spec: model.JobSpec) -> placement.Explanation:
        """What would happen to a job; nothing is kept."""
        explanation: placement.Explanation = self._run(self._connected().rehearse(spec))
        return explanation

    def submit_many(
        self,
        specs: Iterable[model.JobSpec],
        *,
        request_id: str | None = None,
        is_all_or_none: bool = False,
    ) -> Iterator["job_batches.Verdict"]:
        """Submit jobs in chunks; a verdict for each, in order, as they come. Exhaust it to submit all.

        A chunk is at most 1000 jobs and 3 MiB, and one commit; `is_all_or_none` is of each chunk. After a cut
        it goes on with the next leader, and nothing is submitted twice; with the same `request_id` and the same
        jobs it may be repeated as a whole.
        """
        calls = self._connected()
        from leasehold.client import job_batches

        batch = calls.batch(self._id(request_id), is_all_or_none=is_all_or_none)
        try:
            for chunk in job_batches.chunks_of(specs):
                for verdicts in self._run(batch.send(chunk)):
                    yield from verdicts
            for verdicts in self._run(batch.finish()):
                yield from verdicts
        finally:
            self._run(batch.close())

    def get(self, job_id: str) -> model.JobRecord:
        """A job. Raises `NotFound` if there is none, or it has ended longer ago than the retention."""
        return self._run(self._connected().get(job_id))

    def list(
        self,
        *,
        states: Collection[model.JobState] = (),
        queue: str = "",
        node: str = "",
        page_size: int = 100,
    ) -> Iterator[model.JobRecord]:
        """Jobs, newest first, page by page; empty: of all states, queues, nodes."""
        token = ""
        while True:
            request = _list_request(states, queue, node, page_size, token)
            jobs, token = self._run(self._connected().page(request))
            yield from jobs
            if not token:
                return

    def cancel(self, job_id: str) -> model.JobRecord:
        """End a job: in line at once, where it runs by its stop contract. One that has ended stays as it is."""
        return self._run(self._connected().cancel(job_id))

    def explain(self, job_id: str) -> placement.Explanation:
        """What blocks a job, its place in line, and an estimate (``starts_by``, wall clock seconds)."""
        explanation: placement.Explanation = self._run(self._connected().explain(job_id))
        return explanation

    def wait(self, job_id: str, timeout_seconds: float | None = None) -> model.JobRecord:
        """The job once it has ended. Raises `DeadlineExceeded` if it has not by then; None: no bound."""
        return self._run(self._connected().wait(job_id, timeout_seconds))

    def watch(self, job_id: str) -> Iterator[model.JobRecord]:
        """The job now and after each change, until it has ended."""
        return self._each(self._connected().watch(job_id))

    def log(
        self, job_id: str, *, attempt: int = 0, tail_lines: int = 100, is_following: bool = False
    ) -> Iterator[bytes]:
        """Pieces of what an attempt writes to its log; 0: the last attempt."""
        calls = self._connected()
        return self._each(calls.log(job_id, attempt=attempt, tail_lines=tail_lines, is_following=is_following))

    def _each(self, messages: Any) -> Iterator[Any]:
        from leasehold.client import job_calls

        try:
            while (message := self._run(job_calls.next_of(messages))) is not None:
                yield message
        finally:
            with contextlib.suppress(RuntimeError):  # it is closing itself
                self._run(messages.aclose())

    def utilization(self, node: str = "") -> "job_documents.Utilization":
        """allocated / total * 100, of each node (or of one) and of all."""
        from leasehold.rpc import job_documents

        return job_documents.utilization(self._run(self._connected().utilization(node)))

    def allocation(
        self,
        *,
        cpus: int,
        memory_gb: float | None = None,
        memory: str | int | None = None,
        wait_seconds: float = 10.0,
        on_lapse: Callable[[], None] | None = None,
        **more: Any,
    ) -> job_allocations.Allocation:
        """CPUs and memory for a block that runs here; see `job_allocations.Allocation`.

        It waits up to `wait_seconds` (0 to 3600) in the line of all jobs, and raises `NotPlaced` where that was
        not enough. `more` are name, queue, priority, node_selector, spreading as of `job_spec`.
        """
        make = self._make(cpus, memory_gb, memory, wait_seconds, more)
        return job_allocations.Allocation(make, on_lapse, self._run)


class AsyncJobs(BaseJobs):
    """Jobs for asyncio; see `Jobs` for what each method does."""

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        result: T = await asyncio.wrap_future(self._submit(coroutine))
        return result

    async def submit(self, spec: model.JobSpec, *, request_id: str | None = None) -> model.JobRecord:
        """As `Jobs.submit`."""
        calls = self._connected()
        return await self._run(calls.submit(spec, self._id(request_id)))

    async def rehearse(self, spec: model.JobSpec) -> placement.Explanation:
        """As `Jobs.rehearse`."""
        explanation: placement.Explanation = await self._run(self._connected().rehearse(spec))
        return explanation

    async def submit_many(
        self,
        specs: Iterable[model.JobSpec] | AsyncIterable[model.JobSpec],
        *,
        request_id: str | None = None,
        is_all_or_none: bool = False,
    ) -> AsyncIterator["job_batches.Verdict"]:
        """As `Jobs.submit_many`."""
        calls = self._connected()
        from leasehold.client import job_batches

        batch = calls.batch(self._id(request_id), is_all_or_none=is_all_or_none)
        chunks = job_batches.Chunks()
        try:
            async for spec in _each_of(specs):
                full = chunks.add(spec)
                for verdicts in await self._run(batch.send(full)) if full else ():
                    for verdict in verdicts:
                        yield verdict
            last = chunks.take()
            told = await self._run(batch.send(last)) if last else []
            for verdicts in [*told, *await self._run(batch.finish())]:
                for verdict in verdicts:
                    yield verdict
        finally:
            await self._run(batch.close())

    async def get(self, job_id: str) -> model.JobRecord:
        """As `Jobs.get`."""
        return await self._run(self._connected().get(job_id))

    async def list(
        self,
        *,
        states: Collection[model.JobState] = (),
        queue: str = "",
        node: str = "",
        page_size: int = 100,
    ) -> AsyncIterator[model.JobRecord]:
        """As `Jobs.list`."""
        token = ""
        while True:
            request = _list_request(states, queue, node, page_size, token)
            jobs, token = await self._run(self._connected().page(request))
            for job in jobs:
                yield job
            if not token:
                return

    async def cancel(self, job_id: str) -> model.JobRecord:
        """As `Jobs.cancel`."""
        return await self._run(self._connected().cancel(job_id))

    async def explain(self, job_id: str) -> placement.Explanation:
        """As `Jobs.explain`."""
        explanation: placement.Explanation = await self._run(self._connected().explain(job_id))
        return explanation

    async def wait(self, job_id: str, timeout_seconds: float | None = None) -> model.JobRecord:
        """As `Jobs.wait`."""
        return await self._run(self._connected().wait(job_id, timeout_seconds))

    def watch(self, job_id: str) -> AsyncIterator[model.JobRecord]:
        """As `Jobs.watch`."""
        return self._each(self._connected().watch(job_id))

    def log(
        self, job_id: str, *, attempt: int = 0, tail_lines: int = 100, is_following: bool = False
    ) -> AsyncIterator[bytes]:
        """As `Jobs.log`."""
        calls = self._connected()
        return self._each(calls.log(job_id, attempt=attempt, tail_lines=tail_lines, is_following=is_following))

    async def _each(self, messages: Any) -> AsyncIterator[Any]:
        from leasehold.client import job_calls

        try:
            while (message := await self._run(job_calls.next_of(messages))) is not None:
                yield message
        finally:
            with contextlib.suppress(RuntimeError):  # it is closing itself
                await self._run(messages.aclose())

    async def utilization(self, node: str = "") -> "job_documents.Utilization":
        """As `Jobs.utilization`."""
        from leasehold.rpc import job_documents

        return job_documents.utilization(await self._run(self._connected().utilization(node)))

    def allocation(
        self,
        *,
        cpus: int,
        memory_gb: float | None = None,
        memory: str | int | None = None,
        wait_seconds: float = 10.0,
        on_lapse: Callable[[], None] | None = None,
        **more: Any,
    ) -> job_allocations.AsyncAllocation:
        """As `Jobs.allocation`; see `job_allocations.AsyncAllocation`."""
        make = self._make(cpus, memory_gb, memory, wait_seconds, more)
        return job_allocations.AsyncAllocation(make, on_lapse, self._run)


async def _each_of(
    specs: Iterable[model.JobSpec] | AsyncIterable[model.JobSpec],
) -> AsyncIterator[model.JobSpec]:
    if isinstance(specs, AsyncIterable):
        async for spec in specs:
            yield spec
    else:
        for spec in specs:
            yield spec
