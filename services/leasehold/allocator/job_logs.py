"""A job's log as it grows: read from its node's agent, piece by piece, by where the last one ended."""

import asyncio
from collections.abc import AsyncIterator

from leasehold.allocator import calls, jobs, nodes
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.node.v1 import order_pb2
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.rpc import common_codec, node_codec, wire_values

TAIL_LINES_MAX = 10_000
#: An agent waits so long for something new, and has so much longer to say so.
WAIT_SECONDS = 5.0
SLACK_SECONDS = 5.0
BYTES_MAX = 256 * 1024
#: Before a node that is not there, or a log that has not begun, is asked again.
PAUSE_SECONDS = 0.5

#: Phases in which an attempt may have no log yet.
_BEFORE_START = frozenset({model.AttemptPhase.ALLOCATED, model.AttemptPhase.SENT})


class LogReader:
    """Reads one attempt's log for one caller."""

    def __init__(
        self,
        known: jobs.Jobs,
        registry: nodes.Nodes,
        request: wire.FollowJobLogRequest,
        draining: asyncio.Event,
    ) -> None:
        if request.tail_lines > TAIL_LINES_MAX:
            raise errors.InvalidArgument(f"tail_lines: at most {TAIL_LINES_MAX}", field="tail_lines")
        self._known = known
        self._nodes = registry
        self._request = request
        self._draining = draining

    async def run(self) -> AsyncIterator[wire.FollowJobLogResponse]:
        """What there is, and, if asked to follow, what comes, until the attempt has ended.

        Raises `NotFound`, `FailedPrecondition` for a job that has no process of Leasehold's, `NodeUnreachable`.
        """
        job_id = self._request.job_id
        with self._known.watching(job_id) as changed:
            allocation = await self._allocation(changed)
            if allocation is None:
                return
            order = self._order(allocation.ref)
            while not self._draining.is_set():
                chunk = await self._read(allocation, order)
                if chunk is None:
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                if chunk.data or chunk.lost_bytes:
                    yield wire.FollowJobLogResponse(
                        data=chunk.data, lost_bytes=chunk.lost_bytes, cursor=chunk.cursor
                    )
                elif self._request.is_following:
                    # An agent that does not wait must not keep the two of us busy.
                    await asyncio.sleep(PAUSE_SECONDS)
                if chunk.is_end or not (chunk.data or self._request.is_following):
                    return
                order.read_log.cursor = chunk.cursor

    async def _allocation(self, changed: asyncio.Event) -> model.AllocationRecord | None:
        """Where the attempt is or was. None: there is no log, and it is not to be waited for."""
        while not self._draining.is_set():
            changed.clear()
            job = await self._known.job(self._request.job_id)
            if not job.spec.template:
                raise errors.FailedPrecondition(
                    "the work of this job runs elsewhere, and so is its log", field="job_id"
                )
            wanted = self._request.attempt or job.attempt
            present = job.allocation
            if present is not None and present.ref.attempt == wanted:
                return present
            if wanted and wanted <= job.attempt:
                return await self._known.store.get_allocation(model.AttemptRef(job.job_id, wanted))
            if not self._request.is_following or job.state in model.TERMINAL_STATES:
                return None
            await calls.first_of(changed.wait(), self._draining.wait())
            self._known.require_machine()
        return None

    def _order(self, ref: model.AttemptRef) -> order_pb2.Order:
        order = order_pb2.Order(
            epoch=common_codec.encode_epoch(self._known.reign.epoch),
            read_log=order_pb2.ReadLogOrder(
                worker=ref.log_name,
                cursor=self._request.cursor,
                tail_lines=self._request.tail_lines,
                bytes_max=BYTES_MAX,
            ),
        )
        if self._request.is_following:
            order.read_log.wait.CopyFrom(wire_values.encode_seconds(WAIT_SECONDS))
        return order

    async def _read(
        self, allocation: model.AllocationRecord, order: order_pb2.Order
    ) -> order_pb2.LogChunk | None:
        """The next piece; None: not yet."""
        try:
            result = await self._nodes.orders.ask(allocation.node, order, WAIT_SECONDS + SLACK_SECONDS)
            if result.HasField("error"):
                raise node_codec.decode_error(result.error)
        except (errors.NodeUnreachable, errors.DeadlineExceeded):
            if self._request.is_following and await self._is_live(allocation):
                return None
            raise
        except errors.NotFound:
            if self._request.is_following and await self._is_live(allocation, _BEFORE_START):
                return None
            raise
        return result.log

    async def _is_live(
        self, allocation: model.AllocationRecord, phases: frozenset[model.AttemptPhase] | None = None
    ) -> bool:
        """Whether the attempt has its allocation yet, and is in one of these phases."""
        job = await self._known.job(allocation.ref.job_id)
        if job.state is not model.JobState.RUNNING or job.allocation is None:
            return False
        if job.allocation.ref != allocation.ref:
            return False
        return phases is None or self._known.phase(job) in phases
