"""The client's stream over gRPC: how its ends are told."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.client import grpc_link
from leasehold.core import errors


async def _refuse(
    requests: AsyncIterator[wire.HoldLeasesRequest], context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    """End a stream with a status after its first message."""
    async for _ in requests:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")


@pytest.fixture
async def refusing() -> AsyncIterator[str]:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        _refuse, wire.HoldLeasesRequest.FromString, wire.HoldLeasesResponse.SerializeToString
    )
    name = wire.DESCRIPTOR.services_by_name["BudgetService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"HoldLeases": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_sending_on_a_stream_that_has_failed_says_that_it_is_unavailable(refusing: str) -> None:
    stream = await grpc_link.GrpcLink().open(refusing)
    await stream.send(wire.HoldLeasesRequest())
    with pytest.raises(errors.Unavailable, match="going away"):
        await stream.receive()
    with pytest.raises(errors.Unavailable):
        await stream.send(wire.HoldLeasesRequest())
    await stream.close()


async def test_sending_on_a_stream_that_was_cancelled_says_that_it_is_unavailable(refusing: str) -> None:
    stream = await grpc_link.GrpcLink().open(refusing)
    await stream.close()
    with pytest.raises(errors.Unavailable):
        await stream.send(wire.HoldLeasesRequest())
