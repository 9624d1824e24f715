"""Wiring: an HTTP server around the application, started and drained."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Final

import uvicorn
from leasehold.core import errors
from leasehold.gateway import allocators, app, config
from leasehold.observe import logs
from leasehold.rpc import addresses, tls
from leasehold.runtime import signals

#: Requests in flight at the drain have so long.
GRACE_SECONDS: Final = 8
CONNECTIONS_MAX: Final = 512
_BACKLOG: Final = 256

_log = logs.get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, whose own handling of signals would end the process by the signal in place of exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: config.Settings) -> None:
    """Run a gateway until SIGTERM or SIGINT. Raises core errors for what the user must mend."""
    settings.check()
    where = settings.listen
    addresses.require_free(where, flag="--listen")
    leader = allocators.Allocators(
        settings.allocators(),
        timeout_seconds=settings.gateway_allocator_timeout_seconds,
        tls_files=tls.client_files(),
    )
    try:
        with _listening(where) as listener:
            server = _Server(_uvicorn_settings(settings, app.of_settings(settings, leader)))
            bound = str(where.with_port(listener.getsockname()[1]))
            scheme = "https" if settings.tls_files is not None else "http"
            _log.info("server_started", address=f"{scheme}://{bound}", allocators=settings.allocators())
            await _serve_until_signal(server, listener)
            _log.info("server_stopped")
    finally:
        await leader.close()


async def _serve_until_signal(server: uvicorn.Server, listener: socket.socket) -> None:
    """The first signal drains, the second ends it at once."""
    async with signals.ShutdownSignals() as shutdown:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        drain = asyncio.ensure_future(shutdown.drain.wait())
        await asyncio.wait([serving, drain], return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        server.should_exit = True
        immediate = asyncio.ensure_future(shutdown.immediate.wait())
        await asyncio.wait([serving, immediate], return_when=asyncio.FIRST_COMPLETED)
        immediate.cancel()
        server.force_exit = True
        await serving


@contextlib.contextmanager
def _listening(where: addresses.Address) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        listener = socket.create_server((where.host, where.port), family=family, backlog=_BACKLOG)
    except OSError as error:  # taken since it was looked at
        raise errors.FailedPrecondition(
            f"cannot listen on {where}: {error.strerror}; choose another address with --listen"
        ) from error
    with listener:
        yield listener


def _uvicorn_settings(settings: config.Settings, application: Any) -> uvicorn.Config:
    files = settings.tls_files
    transport: dict[str, Any] = {}
    if files is not None:
        transport = {
            "ssl_certfile": files.certificate_file,
            "ssl_keyfile": files.key_file,
            "ssl_ca_certs": files.ca_file,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if files.ca_file is not None else ssl.CERT_NONE,
        }
    return uvicorn.Config(
        application,
        # One way, whatever else is installed.
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=GRACE_SECONDS,
        **transport,
    )


def run(flags: Mapping[str, Any]) -> None:
    """Serve with settings from flags, environment and defaults; returns after a drain."""
    settings = config.load(flags)
    logs.configure(settings.log_format, settings.log_level, service="gateway")  # type: ignore[arg-type]
    asyncio.run(serve(settings))
