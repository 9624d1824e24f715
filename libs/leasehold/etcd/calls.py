"""Calls to a cluster of several endpoints: failover, deadlines, login, and the check of the cluster's id."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from leasehold.core import errors
from leasehold.etcd import clock as clocks
from leasehold.etcd import failures
from leasehold.etcd import settings as configuration
from leasehold.etcd.wire import rpc_pb2, rpc_pb2_grpc
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_RETRY_SECONDS = 0.05
_LOGINS_PER_CALL = 2


class _Answer(Protocol):
    @property
    def header(self) -> rpc_pb2.ResponseHeader: ...


Request = TypeVar("Request")
Answer = TypeVar("Answer", bound=_Answer)
Token = tuple[tuple[str, str], ...]
WatchCall = grpc.aio.StreamStreamCall[rpc_pb2.WatchRequest, rpc_pb2.WatchResponse]


class Endpoint:
    """One server: its channel, its methods, and the watches that run over it."""

    def __init__(self, target: str, channel: grpc.aio.Channel) -> None:
        self.target = target
        self.channel = channel
        self.kv = rpc_pb2_grpc.KVStub(channel)
        self.lease = rpc_pb2_grpc.LeaseStub(channel)
        self.maintenance = rpc_pb2_grpc.MaintenanceStub(channel)
        self.auth = rpc_pb2_grpc.AuthStub(channel)
        self.watch = rpc_pb2_grpc.WatchStub(channel)
        # A stream that carries one message each way and ends is, on the wire, a unary call. So a renewal has a
        # deadline, fails over and logs in as all other calls do.
        self.keep_alive: grpc.aio.UnaryUnaryMultiCallable[
            rpc_pb2.LeaseKeepAliveRequest, rpc_pb2.LeaseKeepAliveResponse
        ] = channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=rpc_pb2.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc_pb2.LeaseKeepAliveResponse.FromString,
        )
        self.watches: set[WatchCall] = set()


Method = Callable[[Endpoint], grpc.aio.UnaryUnaryMultiCallable[Request, Answer]]


class Calls:
    """The endpoints, the one in use, and what every call to them has in common.

    Every answer is checked to come from the cluster that answered first.
    """

    def __init__(
        self,
        targets: tuple[str, ...],
        settings: configuration.Settings,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        login: configuration.Login | None = None,
        clock: clocks.Clock,
    ) -> None:
        self.settings = settings
        self._clock = clock
        options = list(settings.channel_options())
        self._endpoints = [Endpoint(target, _channel(target, options, credentials)) for target in targets]
        self._current = 0
        self._login = login
        self._logging_in = asyncio.Lock()
        self._token: Token = ()
        self._closed = False
        self._revision = 0  # the highest that a linearizable answer told
        self.cluster_id = 0  # 0 until the first answer

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def current(self) -> Endpoint:
        """The endpoint that calls go to first."""
        return self._endpoints[self._current]

    async def repeatable(self, method: Method[Request, Answer], request: Request) -> Answer:
        """Makes a call that does no harm when repeated: on another endpoint, until the call timeout."""
        return await self._call(method, request, is_write=False)

    async def read(self, method: Method[Request, Answer], request: Request) -> Answer:
        """The same, of a linearizable read of keys: its answer may not go back in time."""
        floor = self._revision
        answer = await self._call(method, request, is_write=False)
        self.check_revision(answer.header.revision, floor)
        return answer

    async def write(self, method: Method[Request, Answer], request: Request) -> Answer:
        """Makes a call that changes keys; it is repeated only where it certainly did not happen."""
        floor = self._revision
        answer = await self._call(method, request, is_write=True)
        self.check_revision(answer.header.revision, floor)
        return answer

    async def _call(
        self, method: Method[Request, Answer], request: Request, *, is_write: bool, is_anonymous: bool = False
    ) -> Answer:
        deadline = self._clock.now() + self.settings.call_timeout_seconds
        tries = logins = 0
        while True:
            if self._closed:
                raise closed(is_write=False)
            endpoint, token = self.current(), () if is_anonymous else self._token
            try:
                answer = await method(endpoint)(
                    request, timeout=self._try_seconds(deadline, tries, is_write), metadata=token
                )
            except grpc.aio.AioRpcError as failure:
                retry = failures.retry(failure)
                error = failures.translate(failure, is_write=is_write)
            except asyncio.CancelledError:
                if self.is_closed and not is_own_cancellation():
                    raise closed(is_write=is_write) from None
                raise
            else:
                self.check_cluster(answer.header.cluster_id)
                return answer
            if retry is failures.Retry.AFTER_LOGIN and self._login and logins < _LOGINS_PER_CALL:
                assert not is_anonymous, "logging in needs no token"
                logins += 1
                await self.log_in(token)
                continue
            tries += 1
            if not await self._may_try_again(retry, error, endpoint, deadline, tries, is_write=is_write):
                raise error

    def _try_seconds(self, deadline: float, tries: int, is_write: bool) -> float:
        """A read leaves time for the endpoints not asked yet; a write gets only one chance."""
        remaining = max(0.0, deadline - self._clock.now())
        return remaining if is_write else remaining / max(1, len(self._endpoints) - tries)

    async def _may_try_again(
        self,
        retry: failures.Retry,
        error: errors.LeaseholdError,
        endpoint: Endpoint,
        deadline: float,
        tries: int,
        *,
        is_write: bool,
    ) -> bool:
        """Moves on from an endpoint that did not answer; waits a little once all of them did not."""
        if retry not in (failures.Retry.ANY_CALL, failures.Retry.READS):
            return False
        self.leave(endpoint, error.message)
        if is_write and retry is failures.Retry.READS:
            return False
        pause = _RETRY_SECONDS if tries % len(self._endpoints) == 0 else 0.0
        if self._clock.now() + pause >= deadline:
            return False
        await self._clock.sleep(pause)
        return True

    def leave(self, endpoint: Endpoint, reason: str) -> None:
        """Goes over to the next endpoint, watches too: a server that leaves calls unanswered may be frozen."""
        if len(self._endpoints) == 1 or endpoint is not self.current():
            return
        self._current = (self._current + 1) % len(self._endpoints)
        _log.warning("etcd_endpoint_left", endpoint=endpoint.target, to=self.current().target, reason=reason)
        for watch in tuple(endpoint.watches):
            watch.cancel()

    def open_watch(self, endpoint: Endpoint) -> WatchCall:
        """A stream for a watch; the member ends it if it loses its leader."""
        if self._closed:
            raise closed(is_write=False)
        call = endpoint.watch.Watch(metadata=(*self._token, ("hasleader", "true")))
        endpoint.watches.add(call)
        call.add_done_callback(lambda _: endpoint.watches.discard(call))
        return call

    def check_cluster(self, cluster_id: int) -> None:
        """Pins the first cluster id seen; raises `ForeignEtcdCluster` on another."""
        if cluster_id != self.cluster_id:
            if self.cluster_id:
                raise errors.ForeignEtcdCluster(
                    f"etcd's cluster id was {self.cluster_id:016x} and is {cluster_id:016x}",
                    metadata={"expected": f"{self.cluster_id:016x}", "found": f"{cluster_id:016x}"},
                )
            self.cluster_id = cluster_id

    def check_revision(self, revision: int, floor: int) -> None:
        """Raises `ForeignEtcdCluster` if a revision is below one known before it was asked for.

        A cluster wiped and started with the same ``--initial-cluster-token`` has the same id again; only its
        revisions tell.
        """
        if revision < floor:
            raise errors.ForeignEtcdCluster(
                f"etcd's revision went back from {floor} to {revision}: its data was wiped or restored",
                metadata={"expected": f"{floor}", "found": f"{revision}"},
            )
        self._revision = max(self._revision, revision)

    async def log_in(self, stale: Token) -> None:
        """Gets a token to take the place of ``stale``, unless another call has replaced that already."""
        if self._login is None:
            return
        async with self._logging_in:
            if stale != self._token:
                return
            request = rpc_pb2.AuthenticateRequest(name=self._login.user, password=self._login.password)
            try:
                answer = await self._call(
                    lambda endpoint: endpoint.auth.Authenticate, request, is_write=False, is_anonymous=True
                )
            except errors.FailedPrecondition as error:
                if "authentication is not enabled" not in error.message:
                    raise
                self._token = ()
            else:
                self._token = (("token", answer.token),)

    async def close(self) -> None:
        """Ends all calls and closes the channels."""
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.channel.close()


def is_own_cancellation() -> bool:
    """Whether a `CancelledError` means that this task was cancelled; gRPC raises it for a cut call as well."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def closed(*, is_write: bool) -> errors.EtcdUnavailable:
    """The error of a call that `close` came before, or cut off."""
    outcome = "unknown" if is_write else "not_applied"
    return errors.EtcdUnavailable("this etcd client is closed", metadata={"outcome": outcome})


def _channel(
    target: str, options: list[tuple[str, Any]], credentials: grpc.ChannelCredentials | None
) -> grpc.aio.Channel:
    if credentials:
        return grpc.aio.secure_channel(target, credentials, options=options)
    return grpc.aio.insecure_channel(target, options=options)
