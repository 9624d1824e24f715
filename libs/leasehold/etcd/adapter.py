"""`EtcdPort` on a real cluster, over grpc.aio and this project's own stubs of etcd's v3 API."""

from collections.abc import AsyncGenerator, Sequence

from leasehold.core import errors
from leasehold.etcd import calls as wire_calls
from leasehold.etcd import clock as clocks
from leasehold.etcd import codec, failures, port, watching
from leasehold.etcd import settings as configuration
from leasehold.etcd.wire import rpc_pb2

_LISTING_TRIES = 3
DEFAULT_SETTINGS = configuration.Settings()


async def connect(
    endpoints: Sequence[str],
    *,
    tls: configuration.Tls | None = None,
    login: configuration.Login | None = None,
    settings: configuration.Settings = DEFAULT_SETTINGS,
    clock: clocks.Clock | None = None,
) -> "GrpcEtcd":
    """A client of the cluster whose members are at ``endpoints``: ``host:port`` or ``http(s)://host:port``.

    Logs in and asks for the cluster's id, so a wrong address, certificate or password shows here:
    `EtcdUnavailable` or `DeadlineExceeded` after the call timeout, `PermissionDenied`, or `InvalidArgument`
    that names the field. Belongs to the running event loop; close it with `close`.
    """
    calls = wire_calls.Calls(
        configuration.targets(endpoints, is_tls=tls is not None),
        settings,
        credentials=tls.credentials() if tls else None,
        login=login,
        clock=clock or clocks.SystemClock(),
    )
    etcd = GrpcEtcd(calls, clock or clocks.SystemClock())
    try:
        await calls.log_in(stale=())
        await etcd.status()
    except BaseException:
        await etcd.close()
        raise
    return etcd


class GrpcEtcd(port.EtcdPort):
    """A client made by `connect`."""

    def __init__(self, calls: wire_calls.Calls, clock: clocks.Clock) -> None:
        self._calls = calls
        self._clock = clock

    @property
    def txn_ops_max(self) -> int:
        """See `EtcdPort`; as set, etcd does not tell."""
        return self._calls.settings.txn_ops_max

    async def cluster_id(self) -> int:
        """See `EtcdPort`; known since `connect`, so nothing is sent."""
        return self._calls.cluster_id

    async def get(self, key: str) -> port.KeyValue | None:
        """See `EtcdPort`."""
        request = rpc_pb2.RangeRequest(key=codec.key_bytes(key))
        response = await self._calls.read(lambda endpoint: endpoint.kv.Range, request)
        return codec.record(response.kvs[0]) if response.kvs else None

    async def get_prefix(self, prefix: str, *, revision: int | None = None) -> port.Listing:
        """See `EtcdPort`. The call timeout is that of each page."""
        for _ in range(_LISTING_TRIES - 1):
            try:
                return await self._list(prefix, revision)
            except errors.FailedPrecondition as error:
                if revision is not None or not failures.is_compacted(error):
                    raise  # else the newest revision was compacted while its pages were read: take a newer one
        return await self._list(prefix, revision)

    async def _list(self, prefix: str, revision: int | None) -> port.Listing:
        first, end = codec.prefix_range(prefix)
        at, limit = revision or 0, self._calls.settings.page_records
        records: list[port.KeyValue] = []
        while True:
            request = rpc_pb2.RangeRequest(key=first, range_end=end, limit=limit, revision=at)
            try:
                page = await self._calls.read(lambda endpoint: endpoint.kv.Range, request)
            except errors.ResourceExhausted as error:
                if limit == 1 or not failures.is_too_large(error):
                    raise
                limit = max(1, limit // 4)
                continue
            at = at or page.header.revision
            records.extend(map(codec.record, page.kvs))
            if not page.more:
                return port.Listing(at, tuple(records))
            first = page.kvs[-1].key + b"\0"

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        """See `EtcdPort`."""
        request = rpc_pb2.PutRequest(key=codec.key_bytes(key), value=value, lease=lease_id)
        response = await self._calls.write(lambda endpoint: endpoint.kv.Put, request)
        return response.header.revision

    async def delete(self, key: str, *, is_prefix: bool = False) -> int:
        """See `EtcdPort`."""
        first, end = codec.prefix_range(key) if is_prefix else (codec.key_bytes(key), b"")
        request = rpc_pb2.DeleteRangeRequest(key=first, range_end=end)
        response = await self._calls.write(lambda endpoint: endpoint.kv.DeleteRange, request)
        return response.deleted

    async def txn(
        self, compares: Sequence[port.Compare], then: Sequence[port.Op], otherwise: Sequence[port.Op] = ()
    ) -> port.TxnResult:
        """See `EtcdPort`."""
        request = codec.txn_request(compares, then, otherwise)
        response = await self._calls.write(lambda endpoint: endpoint.kv.Txn, request)
        return codec.txn_result(then if response.succeeded else otherwise, response)

    async def grant_lease(self, ttl_seconds: int) -> port.Lease:
        """See `EtcdPort`. May be tried again: a lease nobody knows of ends by itself."""
        if ttl_seconds < 1:
            raise errors.InvalidArgument("a lease's TTL is at least 1 second", field="ttl_seconds")
        request = rpc_pb2.LeaseGrantRequest(TTL=ttl_seconds)
        response = await self._calls.repeatable(lambda endpoint: endpoint.lease.LeaseGrant, request)
        return port.Lease(response.ID, response.TTL)

    async def keep_alive(self, lease_id: int) -> int:
        """See `EtcdPort`."""
        request = rpc_pb2.LeaseKeepAliveRequest(ID=lease_id)
        response = await self._calls.repeatable(lambda endpoint: endpoint.keep_alive, request)
        return _seconds_left(lease_id, response.TTL)

    async def time_to_live(self, lease_id: int) -> int:
        """See `EtcdPort`."""
        request = rpc_pb2.LeaseTimeToLiveRequest(ID=lease_id)
        response = await self._calls.repeatable(lambda endpoint: endpoint.lease.LeaseTimeToLive, request)
        return _seconds_left(lease_id, response.TTL)

    async def revoke_lease(self, lease_id: int) -> None:
        """See `EtcdPort`."""
        request = rpc_pb2.LeaseRevokeRequest(ID=lease_id)
        try:
            await self._calls.repeatable(lambda endpoint: endpoint.lease.LeaseRevoke, request)
        except errors.NotFound:
            return

    def watch_prefix(
        self, prefix: str, start_revision: int | None = None
    ) -> AsyncGenerator[port.WatchEvent, None]:
        """See `EtcdPort`."""
        return watching.follow(self._calls, self._clock, self.get_prefix, prefix, start_revision)

    async def compact(self, revision: int) -> None:
        """See `EtcdPort`."""
        request = rpc_pb2.CompactionRequest(revision=revision)
        await self._calls.write(lambda endpoint: endpoint.kv.Compact, request)

    async def status(self) -> port.Status:
        """See `EtcdPort`."""
        response = await self._calls.read(lambda endpoint: endpoint.maintenance.Status, rpc_pb2.StatusRequest())
        header = response.header
        return port.Status(
            cluster_id=header.cluster_id,
            member_id=header.member_id,
            leader_member_id=response.leader,
            version=response.version,
            revision=header.revision,
            db_size_bytes=response.db_size,
        )

    async def close(self) -> None:
        """See `EtcdPort`."""
        await self._calls.close()


def _seconds_left(lease_id: int, ttl_seconds: int) -> int:
    if ttl_seconds < 1:
        raise errors.NotFound("etcd lease not found", metadata={"lease_id": f"{lease_id:x}"})
    return ttl_seconds
