"""The peer of benchmarks of renewals and submits: a bare grpc.aio server that gives each message back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import lines
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.job.v1 import job_pb2
from leasehold.api.job.v1 import job_service_pb2 as job_wire

JOB_ID = "01900000-0000-7000-8000-000000000000"


async def _stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        yield request


async def _unary(request: Any, context: Any) -> Any:
    return request


async def _submit(request: Any, context: Any) -> Any:
    """What a submit is answered with, in size: the spec with an id, a state, an owner and a time."""
    job = job_pb2.Job(job_id=JOB_ID, spec=request.spec, state=job_pb2.JOB_STATE_PENDING, principal="127.0.0.1")
    job.submit_time.FromMicroseconds(1_900_000_000_123_456)
    return job_wire.SubmitJobResponse(job=job)


async def main() -> None:
    """Serve until killed; prints the port."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    hold, renew = wire.HoldLeasesRequest, wire.RenewLeaseRequest
    handlers: dict[str, Any] = {
        "Stream": grpc.stream_stream_rpc_method_handler(
            _stream, request_deserializer=hold.FromString, response_serializer=hold.SerializeToString
        ),
        "Unary": grpc.unary_unary_rpc_method_handler(
            _unary, request_deserializer=renew.FromString, response_serializer=renew.SerializeToString
        ),
        "Submit": grpc.unary_unary_rpc_method_handler(
            _submit,
            request_deserializer=job_wire.SubmitJobRequest.FromString,
            response_serializer=job_wire.SubmitJobResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    lines.out(str(port))
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
