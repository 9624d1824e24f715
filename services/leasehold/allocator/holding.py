"""The HoldLeases stream: reports up, grants down."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from leasehold.allocator import leadership as leaderships
from leasehold.allocator import reign as reigns
from leasehold.allocator import sessions
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.budget import messages
from leasehold.rpc import lease_codec

REPORTS_MAX = 1000

_Context = grpc.aio.ServicerContext[wire.HoldLeasesRequest, wire.HoldLeasesResponse]


async def hold(
    leadership: leaderships.Leadership, requests: AsyncIterator[wire.HoldLeasesRequest], context: _Context
) -> None:
    """Serve one stream until either side ends it, or the reign is over."""
    reign = leadership.require()
    session = reign.open_session()
    reader = asyncio.create_task(_read(reign, session, requests))
    try:
        while (response := await session.next_response()) is not None:
            await context.write(response)
    finally:
        reader.cancel()
        reign.close_session(session)


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
                reign.release(lease_codec.decode_release(release))
    except errors.LeaseholdError as error:
        session.end(error)
    except (asyncio.CancelledError, grpc.aio.UsageError):
        # The call is over; the writer sees it too.
        session.end(None)
        raise
    except Exception as error:
        session.end(errors.LeaseholdError(f"this connection failed: {type(error).__name__}"))
        raise
    else:
        session.end(None)


def _take(reign: reigns.Reign, session: sessions.Session, message: Any) -> None:
    try:
        report = lease_codec.decode_report(message)
    except errors.InvalidArgument as error:
        session.say(
            messages.Refusal(
                budget=message.budget[:128],
                holder=message.holder[:128],
                incarnation=message.incarnation[:64],
                sequence=message.sequence,
                reason=error.reason,
                message=error.message,
                field=error.field or "",
            )
        )
        return
    reign.report(report, session)
