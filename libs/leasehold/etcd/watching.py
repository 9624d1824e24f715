"""A watch that outlives its streams: resumes after a disconnect, lists anew after a compaction."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc.aio
from leasehold.core import errors
from leasehold.etcd import calls as wire_calls
from leasehold.etcd import clock as clocks
from leasehold.etcd import codec, failures, port
from leasehold.etcd.wire import rpc_pb2
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_PAUSE_SECONDS_MIN = 0.05
_PAUSE_SECONDS_MAX = 1.0
_TRANSIENT = (errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted)

T = TypeVar("T")
Change = port.KeyPut | port.KeyDeleted
Lister = Callable[[str], Awaitable[port.Listing]]


class _Compacted(Exception):
    """The changes that a stream would begin with are gone."""


class _Stream:
    """One stream of one watch.

    It begins one revision early and drops what it finds there. Reason: in etcd releases that do not keep such
    tombstones (3.4.23 is one), compaction at revision R also removes deletions made *at* R, yet a watch from R
    is accepted, and never tells of them. A watch from R - 1 is refused, so the gap is noticed.
    """

    def __init__(self, calls: wire_calls.Calls, endpoint: wire_calls.Endpoint, next_revision: int) -> None:
        self.next_revision = next_revision
        self._calls = calls
        self._call = calls.open_watch(endpoint)

    @classmethod
    async def open(cls, calls: wire_calls.Calls, prefix: str, next_revision: int) -> "_Stream":
        """Asks for the watch and waits for etcd's consent, up to the call timeout."""
        first, end = codec.prefix_range(prefix)
        # etcd would wait in silence for a revision that a wiped cluster reaches in months. This also replaces a
        # lapsed token, which a watch is told of in the same words as a lack of permission.
        newest = await calls.read(
            lambda endpoint: endpoint.kv.Range, rpc_pb2.RangeRequest(key=first, range_end=end, limit=1)
        )
        calls.check_revision(newest.header.revision, next_revision - 1)
        create = rpc_pb2.WatchCreateRequest(
            key=first,
            range_end=end,
            start_revision=max(1, next_revision - 1),
            progress_notify=True,
            fragment=True,
        )
        endpoint = calls.current()
        stream = cls(calls, endpoint, next_revision)
        try:
            async with asyncio.timeout(calls.settings.call_timeout_seconds):
                await stream._translated(stream._call.write(rpc_pb2.WatchRequest(create_request=create)))
                await stream._response()
        except TimeoutError:
            calls.leave(endpoint, "a watch was not answered")
            raise errors.DeadlineExceeded("etcd did not open the watch in time") from None
        except BaseException:
            stream.close()
            raise
        return stream

    async def changes(self) -> list[Change]:
        """The next changes, none of a revision left for later; may be empty."""
        response = await self._response()
        events = list(response.events)
        while response.fragment:
            response = await self._response()
            events.extend(response.events)
        fresh = [codec.event(event) for event in events if event.kv.mod_revision >= self.next_revision]
        if fresh:
            self.next_revision = events[-1].kv.mod_revision + 1
        elif not events:  # a progress notice: all up to its revision has been told
            self.next_revision = max(self.next_revision, response.header.revision + 1)
        return fresh

    def close(self) -> None:
        """Ends the stream."""
        self._call.cancel()

    async def _response(self) -> rpc_pb2.WatchResponse:
        response = await self._translated(self._call.read())
        if not isinstance(response, rpc_pb2.WatchResponse):
            raise errors.EtcdUnavailable("etcd ended the watch", metadata={"outcome": "not_applied"})
        if response.header.cluster_id:  # absent in some refusals
            self._calls.check_cluster(response.header.cluster_id)
        if response.compact_revision:
            raise _Compacted
        if response.canceled:
            if "permission denied" in response.cancel_reason or "auth token" in response.cancel_reason:
                raise errors.PermissionDenied(response.cancel_reason)
            raise errors.EtcdUnavailable(
                f"etcd cancelled the watch: {response.cancel_reason}", metadata={"outcome": "not_applied"}
            )
        return response

    async def _translated(self, step: Awaitable[T]) -> T:
        try:
            return await step
        except grpc.aio.AioRpcError as failure:
            raise failures.translate(failure, is_write=False) from None
        except asyncio.InvalidStateError:  # gRPC's word for writing to a stream that has failed already
            details = await self._call.details()
            raise errors.EtcdUnavailable(
                f"etcd does not answer: {details}", metadata={"outcome": "not_applied"}
            ) from None
        except asyncio.CancelledError:
            if wire_calls.is_own_cancellation():
                raise
            if self._calls.is_closed:
                raise wire_calls.closed(is_write=False) from None
            raise errors.EtcdUnavailable("the endpoint was left", metadata={"outcome": "not_applied"}) from None


class _Follower:
    """Where a watch stands, and how it goes on after each kind of failure."""

    def __init__(
        self,
        calls: wire_calls.Calls,
        clock: clocks.Clock,
        lister: Lister,
        prefix: str,
        start_revision: int | None,
    ) -> None:
        self._calls = calls
        self._clock = clock
        self._lister = lister
        self._prefix = prefix
        self._next_revision = start_revision  # None: list first
        self._stream: _Stream | None = None
        self._failed = 0
        self._was_denied = False

    async def events(self) -> Sequence[port.WatchEvent]:
        """The next events; raises only what waiting does not heal."""
        while True:
            try:
                events = await self._step()
            except _Compacted:
                _log.warning("watch_fell_behind_compaction", prefix=self._prefix, at=self._next_revision)
                self.close()
                self._next_revision = None
            except errors.PermissionDenied as error:
                self.close()
                if self._was_denied:
                    raise
                _log.info("watch_refused", prefix=self._prefix, error=error.message)
                self._was_denied = (
                    True  # by a token that has just lapsed, perhaps: the next stream has a new one
                )
            except _TRANSIENT as error:
                self.close()
                if self._calls.is_closed:
                    raise
                _log.warning("watch_interrupted", prefix=self._prefix, error=error.message)
                await self._pause()
            else:
                self._failed, self._was_denied = 0, False
                return events

    def close(self) -> None:
        """Ends the present stream, if any."""
        stream, self._stream = self._stream, None
        if stream:
            stream.close()

    async def _step(self) -> Sequence[port.WatchEvent]:
        if self._next_revision is None:
            listing = await self._lister(self._prefix)
            self._next_revision = listing.revision + 1
            return (port.Reset(listing),)
        if self._stream is None:
            self._stream = await _Stream.open(self._calls, self._prefix, self._next_revision)
        changes = await self._stream.changes()
        self._next_revision = self._stream.next_revision
        return changes

    async def _pause(self) -> None:
        """The first retry is at once, for it often goes to another endpoint."""
        if self._failed:
            seconds = _PAUSE_SECONDS_MIN * 2 ** min(self._failed - 1, 10)
            await self._clock.sleep(min(_PAUSE_SECONDS_MAX, seconds))
        self._failed += 1


async def follow(
    calls: wire_calls.Calls, clock: clocks.Clock, lister: Lister, prefix: str, start_revision: int | None
) -> AsyncGenerator[port.WatchEvent, None]:
    """`EtcdPort.watch_prefix` over real streams; ``lister`` is `EtcdPort.get_prefix`."""
    follower = _Follower(calls, clock, lister, prefix, start_revision)
    try:
        while True:
            for event in await follower.events():
                yield event
    finally:
        follower.close()
