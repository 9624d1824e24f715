"""What carries the reports of a process to an allocator: gRPC, or a relay process where gRPC cannot be used."""

from typing import Protocol

from leasehold.api.budget.v1 import budget_service_pb2


class Stream(Protocol):
    """One open HoldLeases stream. Every method raises core errors; after one, only `close` may be called."""

    async def send(self, request: budget_service_pb2.HoldLeasesRequest) -> None:
        """Send a message; returns when it is under way, not when it has arrived."""
        ...

    async def receive(self) -> budget_service_pb2.HoldLeasesResponse:
        """The next message. Raises what ended the stream: `NotLeader`, `Unavailable`, and others."""
        ...

    async def half_close(self) -> None:
        """Nothing more is sent. The allocator ends the stream when it has read everything: `receive` tells."""
        ...

    async def close(self) -> None:
        """Leave the stream at once: when this returns, nothing of it reaches the allocator any more."""
        ...


class Link(Protocol):
    """Opens streams, one at a time."""

    async def open(self, address: str) -> Stream:
        """Open a stream to an allocator. Raises `Unavailable` if that fails; a refusal may come later."""
        ...

    async def close(self) -> None:
        """Free what the link holds. Streams are closed before."""
        ...
