"""The scaffold of every gRPC server: what it listens on, what it offers beside its services, how it ends.

A server's life::

    server = Server(["127.0.0.1:7400"])
    server.add(add_BudgetServiceServicer_to_server, servicer, DESCRIPTOR.services_by_name["BudgetService"])
    await server.start()             # binds; raises if it may not or cannot
    await serve_until_signal(server)  # SIGTERM or SIGINT drains; a second one ends it at once
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import descriptor as protobuf_descriptor
from grpc_channelz.v1 import channelz, channelz_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
from leasehold.core import errors
from leasehold.observe import logs, metrics
from leasehold.rpc import addresses, health, interceptors, options, tls
from leasehold.runtime import signals
from leasehold.runtime import tasks as background

_log = logs.get_logger(__name__)

_CHANNELZ_SERVICE: Final[str] = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name

Servicer = TypeVar("Servicer")


@dataclass(frozen=True, slots=True)
class Drain:
    """How a server stops.

    ``notice_seconds``: time between NOT_SERVING and the refusal of new calls, for load balancers to turn away.
    ``grace_seconds``: time that calls in flight have from then on, before they are cancelled.
    """

    notice_seconds: float = 0.2
    grace_seconds: float = 8.0


class Server:
    """One gRPC server with health, reflection and channelz.

    ``listen`` takes ``host:port``, ``[ipv6]:port`` and ``unix:path``; port 0 takes any free one, see `bound`.
    An address that other hosts can reach needs mutual TLS. ``listen_flag`` is how the user sets the addresses;
    it is named in errors. Reflection and channelz describe the server to whoever asks, so by default
    (``is_introspectable=None``) they are offered only where every address is local to this host.

    ``guard`` raises `PermissionDenied` for calls that their caller may not make; none: all may be made.

    A servicer whose streams are open for long watches `draining` (or `on_drain`) and ends them.
    """

    def __init__(
        self,
        listen: Sequence[str],
        *,
        tls_files: tls.TlsFiles | None = None,
        transport: options.Transport = options.DEFAULT,
        drain: Drain | None = None,
        registry: metrics.Registry | None = None,
        server_interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        guard: interceptors.Guard | None = None,
        is_introspectable: bool | None = None,
        listen_flag: str = "--listen",
    ) -> None:
        if not listen:
            raise errors.InvalidArgument("a server needs an address to listen on", field=listen_flag)
        self._addresses = [addresses.parse(text, setting=listen_flag) for text in listen]
        self._tls = tls_files
        self._transport = transport
        self._drain = drain or Drain()
        self._listen_flag = listen_flag
        self._interceptors = [
            interceptors.CallInterceptor(registry if registry is not None else metrics.Registry(), guard=guard),
            *server_interceptors,
        ]
        is_local = all(address.is_loopback for address in self._addresses)
        self._is_introspectable = is_local if is_introspectable is None else is_introspectable
        self._registrations: list[Callable[[grpc.aio.Server], None]] = []
        self._services: list[str] = []
        self._on_drain: list[Callable[[], None]] = []
        self._server: grpc.aio.Server | None = None
        self._health: health.Health | None = None
        self._stops: set[asyncio.Future[None]] = set()
        self._stopped = asyncio.Event()
        self.draining = asyncio.Event()
        self.bound: tuple[str, ...] = ()

    def add(
        self,
        add_to_server: Callable[[Servicer, grpc.aio.Server], None],
        servicer: Servicer,
        service: protobuf_descriptor.ServiceDescriptor,
    ) -> None:
        """Offer a service, by the function that protoc generated for it. Before `start`; ``async`` handlers."""
        self._registrations.append(lambda server: add_to_server(servicer, server))
        self._services.append(service.full_name)

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Call back once when the drain begins, after health says NOT_SERVING. It must return at once."""
        self._on_drain.append(callback)

    def set_serving(self, service: protobuf_descriptor.ServiceDescriptor, is_serving: bool) -> None:
        """Tell by health that one service can, or cannot, be used now. After `start`."""
        self._running_health().set_serving(service.full_name, is_serving)

    async def start(self) -> None:
        """Bind all addresses and serve; `bound` then tells them with their real ports.

        Raises `InvalidArgument` naming the setting (an open address without mutual TLS, bad TLS files) and
        `FailedPrecondition` naming the port, its holder and the flag (an address that is taken).
        """
        credentials = self._credentials()
        for address in self._addresses:
            addresses.require_free(address, flag=self._listen_flag)
        server = grpc.aio.server(
            interceptors=self._interceptors,
            options=options.server_options(self._transport),
            maximum_concurrent_rpcs=self._transport.concurrent_calls_max,
        )
        _by_name_only(server)
        for register in self._registrations:
            register(server)
        self._health = health.Health(self._services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._is_introspectable:
            channelz.add_channelz_servicer(server)
            names = (*self._services, health.SERVICE, _CHANNELZ_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        try:
            self.bound = tuple(str(self._bind(server, address, credentials)) for address in self._addresses)
        except BaseException:
            # A server that never ran keeps what it has bound: gRPC lets go only from running to stopped.
            await server.start()
            await server.stop(None)
            raise
        await server.start()
        self._server = server
        _log.info("server_started", addresses=self.bound, services=self._services, tls=self._tls is not None)

    async def drain(self) -> None:
        """Stop gently: health NOT_SERVING, word to long streams, a grace for calls in flight, then the end.

        A second call joins the first.
        """
        if self.draining.is_set():
            await self.wait_stopped()
            return
        self._running_health().drain()
        self.draining.set()
        _log.info("server_draining", grace_seconds=self._drain.grace_seconds)
        for callback in self._on_drain:
            try:
                callback()
            except Exception:  # noqa: BLE001  one callback must not keep the others, or the stop, from happening
                _log.exception("drain_callback_failed")
        await asyncio.sleep(self._drain.notice_seconds)
        await self._stop(self._drain.grace_seconds)

    async def stop_at_once(self) -> None:
        """Cancel every call and end, also in the midst of a drain."""
        self.draining.set()
        await self._stop(None)

    async def wait_stopped(self) -> None:
        """Wait until the server has ended, however it came to that."""
        await self._stopped.wait()

    async def _stop(self, grace_seconds: float | None) -> None:
        # gRPC's own waits share one bare future: whoever is cancelled while awaiting it cancels it for all, and
        # the next stop returns before the calls have ended. So they run in tasks that nobody cancels.
        stop = asyncio.ensure_future(self._running_server().stop(grace_seconds))
        self._stops.add(stop)
        stop.add_done_callback(self._stops.discard)
        await asyncio.shield(stop)
        if not self._stopped.is_set():
            self._stopped.set()
            _log.info("server_stopped")

    def _running_server(self) -> grpc.aio.Server:
        if self._server is None:
            raise errors.FailedPrecondition("the server has not been started")
        return self._server

    def _running_health(self) -> health.Health:
        if self._health is None:
            raise errors.FailedPrecondition("the server has not been started")
        return self._health

    def _credentials(self) -> grpc.ServerCredentials | None:
        exposed = [str(address) for address in self._addresses if not address.is_loopback]
        if exposed and (self._tls is None or not self._tls.is_mutual):
            prefix = self._tls.setting_prefix if self._tls else tls.TlsFiles().setting_prefix
            missing = f"{prefix}certificate_file, {prefix}key_file and {prefix}ca_file"
            raise errors.InvalidArgument(
                f"refusing to listen on {', '.join(exposed)}, which other hosts can reach, without mutual TLS: "
                f"set {missing}, or choose a loopback address with {self._listen_flag}",
                field=f"{prefix}ca_file",
            )
        return tls.server_credentials(self._tls) if self._tls is not None else None

    def _bind(
        self,
        server: grpc.aio.Server,
        address: addresses.Address,
        credentials: grpc.ServerCredentials | None,
    ) -> addresses.Address:
        if address.host == "localhost" and address.port == 0:
            # gRPC is content when one half of localhost gets the port; the other half may be another's server.
            address = addresses.Address(host="127.0.0.1")
        try:
            with _private_files(address.is_unix):
                if credentials is None or address.is_unix:
                    # A Unix socket's mode is its protection: only this user can open it.
                    port = server.add_insecure_port(str(address))
                else:
                    port = server.add_secure_port(str(address), credentials)
        except RuntimeError as error:
            # Taken since it was looked at.
            raise addresses.taken(address, flag=self._listen_flag) from error
        return address if address.is_unix else address.with_port(port)


def _by_name_only(server: grpc.aio.Server) -> None:
    """Let a server take methods by name, as generated code offers them first, and not once more as registered.

    gRPC waits for calls of every registered method apart, in a task each: with the two dozen methods of an
    allocator every call began with a look at all of these tasks.
    """

    def pass_over(service_name: str, method_handlers: Any) -> None:
        """`add_generic_rpc_handlers` was given them already."""

    server.add_registered_method_handlers = pass_over  # type: ignore[method-assign]


async def serve_until_signal(server: Server, tasks: background.BackgroundTasks | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends it at once.

    A background task that fails drains the server too, and its failure is raised after that. Must run on
    the main thread; the server has been started.
    """
    async with signals.ShutdownSignals() as shutdown:
        reasons = [shutdown.drain.wait(), server.wait_stopped()]
        if tasks is not None:
            reasons.append(tasks.failed.wait())
        await _first_of(*reasons)
        await _first_of(server.drain(), shutdown.immediate.wait())
        if shutdown.immediate.is_set():
            await server.stop_at_once()
    if tasks is not None:
        tasks.raise_failure()


async def _first_of(*waits: Any) -> None:
    pending = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@contextmanager
def _private_files(is_wanted: bool) -> Iterator[None]:
    # The mode must be right from the first instant: a chmod after bind would leave a gap to connect in.
    if not is_wanted:
        yield
        return
    previous = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(previous)
