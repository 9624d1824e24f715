"""The SyncNode stream: an agent's reports up, orders down."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
from leasehold.allocator import node_sessions, nodes
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.observe import logs

#: A connection that has not registered by then is closed.
REGISTRATION_SECONDS_MAX = 10.0

_log = logs.get_logger(__name__)

_Context = grpc.aio.ServicerContext[wire.SyncNodeRequest, wire.SyncNodeResponse]


async def sync(
    registry: nodes.Nodes,
    requests: AsyncIterator[wire.SyncNodeRequest],
    context: _Context,
    *,
    peer: str,
    check_name: Callable[[str], None],
) -> None:
    """Serve one stream until either side ends it, or the reign is over.

    `check_name` raises if the caller may not register under a name.
    """
    session = registry.open_session(peer)
    reader = asyncio.create_task(_read(registry, session, requests, check_name))
    late = asyncio.get_running_loop().call_later(REGISTRATION_SECONDS_MAX, _end_unregistered, session)
    try:
        while (response := await session.next_response()) is not None:
            await _write(session, response, context)
    finally:
        late.cancel()
        reader.cancel()
        registry.close_session(session)


def _end_unregistered(session: node_sessions.NodeSession) -> None:
    if not session.sequence:
        session.end(errors.DeadlineExceeded(f"no registration within {REGISTRATION_SECONDS_MAX:g} s"))


async def _write(
    session: node_sessions.NodeSession, response: wire.SyncNodeResponse, context: _Context
) -> None:
    """Write, however long the agent takes to read; raises the session's error if it is given up meanwhile."""
    writer = session.writing = asyncio.current_task()
    assert writer is not None
    try:
        await context.write(response)
    except asyncio.CancelledError:
        if session.error is None or writer.uncancel():
            raise
        raise session.error from None
    finally:
        session.writing = None


async def _read(
    registry: nodes.Nodes,
    session: node_sessions.NodeSession,
    requests: AsyncIterator[wire.SyncNodeRequest],
    check_name: Callable[[str], None],
) -> None:
    try:
        async for request in requests:
            if not session.sequence:
                check_name(request.registration.name)
            registry.take(request, session)
    except errors.LeaseholdError as error:
        session.end(error)
    except (asyncio.CancelledError, grpc.aio.UsageError):
        # The call is over; the writer sees it too.
        session.end(None)
        raise
    except Exception as error:  # noqa: BLE001 - told in the log and on the connection
        _log.error("connection_failed", exc_info=error)
        session.end(errors.LeaseholdError(f"this connection failed: {type(error).__name__}"))
    else:
        session.end(None)
