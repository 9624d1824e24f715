"""The HoldLeases stream: reports up, grants down."""

import asyncio
from collections.abc import AsyncIterator

import grpc
from leasehold.allocator import leadership as leaderships
from leasehold.allocator import reign as reigns
from leasehold.allocator import sessions
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import lease_pb2
from leasehold.core import errors
from leasehold.core.budget import messages
from leasehold.observe import logs
from leasehold.rpc import lease_codec, refusals

REPORTS_MAX = 1000

_log = logs.get_logger(__name__)

_Context = grpc.aio.ServicerContext[wire.HoldLeasesRequest, wire.HoldLeasesResponse]


async def hold(
    leadership: leaderships.Leadership, requests: AsyncIterator[wire.HoldLeasesRequest], context: _Context
) -> None:
    """Serve one stream until either side ends it, or the reign is over."""
    try:
        reign = leadership.require()
    except errors.NotLeader:
        await refusals.hear_out(requests)
        raise
    session = reign.open_session()
    reader = asyncio.create_task(_read(reign, session, requests))
    try:
        while (response := await session.next_response()) is not None:
            await _write(session, response, context)
    finally:
        reader.cancel()
        reign.close_session(session)


async def _write(session: sessions.Session, response: wire.HoldLeasesResponse, context: _Context) -> None:
    """Write, however long the holder takes to read; raises the session's error if it is given up meanwhile."""
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
    reign: reigns.Reign, session: sessions.Session, requests: AsyncIterator[wire.HoldLeasesRequest]
) -> None:
    try:
        async for request in requests:
            if len(request.reports) + len(request.releases) > REPORTS_MAX:
                raise errors.InvalidArgument("reports: at most 1000 in one message", field="reports")
            for report in request.reports:
                _take(reign, session, report)
            for release in request.releases:
                _take_release(reign, session, release)
        # What was reported is answered before the stream ends.
        await reign.flush()
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


def _take(reign: reigns.Reign, session: sessions.Session, message: lease_pb2.LeaseReport) -> None:
    try:
        report = lease_codec.decode_report(message)
    except errors.InvalidArgument as error:
        session.say(_refusal(message, message.sequence, error))
        return
    reign.report(report, session)


def _take_release(reign: reigns.Reign, session: sessions.Session, message: wire.LeaseRelease) -> None:
    try:
        release = lease_codec.decode_release(message)
    except errors.InvalidArgument as error:
        session.say(_refusal(message, 0, error))
        return
    reign.release(release)


def _refusal(
    message: lease_pb2.LeaseReport | wire.LeaseRelease, sequence: int, error: errors.InvalidArgument
) -> messages.Refusal:
    """The answer to a message that does not parse, cut to what names may be."""
    return messages.Refusal(
        budget=message.budget[:128],
        holder=message.holder[:128],
        incarnation=message.incarnation[:64],
        sequence=sequence,
        reason=error.reason,
        message=error.message,
        field=error.field or "",
    )
