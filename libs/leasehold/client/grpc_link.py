"""Streams over gRPC. Imported only on the way to the first connection: gRPC does not survive a fork.

A process that used it must not use it in the child of a fork (its threads are gone there, its locks are not:
children were seen to hang and to crash), so `runtime` gives such children a relay instead.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import tls


class GrpcStream:
    """See `link.Stream`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._call = budget_service_pb2_grpc.BudgetServiceStub(channel).HoldLeases()
        # gRPC loses a message, without a word, that is written while another is being written.
        self._writing = asyncio.Lock()

    async def send(self, request: budget_service_pb2.HoldLeasesRequest) -> None:
        """See `link.Stream`."""
        async with self._writing, _core_errors():
            await self._call.write(request)

    async def receive(self) -> budget_service_pb2.HoldLeasesResponse:
        """See `link.Stream`."""
        async with _core_errors():
            response = await self._call.read()
        if isinstance(response, budget_service_pb2.HoldLeasesResponse):
            return response
        raise errors.Unavailable("the allocator ended the stream")

    async def half_close(self) -> None:
        """See `link.Stream`."""
        async with self._writing, _core_errors():
            await self._call.done_writing()

    async def close(self) -> None:
        """See `link.Stream`."""
        self._call.cancel()
        await self._channel.close()


class GrpcLink:
    """See `link.Link`."""

    def __init__(self, tls_files: tls.TlsFiles | None = None) -> None:
        self._tls_files = tls_files

    async def open(self, address: str) -> GrpcStream:
        """See `link.Link`."""
        return GrpcStream(channels.open_channel(address, tls_files=self._tls_files))

    async def close(self) -> None:
        """See `link.Link`."""


@contextlib.asynccontextmanager
async def _core_errors() -> AsyncIterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise rpc_errors.from_rpc_error(error) from error
    except rpc_errors.STREAM_OVER as error:  # its status was told to whoever reads
        raise errors.Unavailable("the stream is over") from error
