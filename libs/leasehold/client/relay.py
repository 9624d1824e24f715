"""The relay: a helper process that speaks gRPC for a forked child, which cannot. ``python -m`` runs it.

It knows nothing of leases: bytes of streams pass through. It ends with its owner, whose end of the socket pair
closes however the owner dies; a pidfd tells as well, should a stranger have inherited that end.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys

from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.client import frames, grpc_link
from leasehold.core import errors
from leasehold.rpc import tls


class Relay:
    """Carries one stream at a time between the socket of its owner and an allocator."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._stream: grpc_link.GrpcStream | None = None
        self._number = 0
        self._pump: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the owner has gone."""
        with contextlib.suppress(errors.Unavailable):
            while True:
                frame = await frames.read(self._reader)
                try:
                    await self._handle(frame)
                except errors.LeaseholdError as error:
                    self._tell(frames.FrameKind.FAILED, frame.stream, frames.encode_error(error))
        await self._leave()

    async def _handle(self, frame: frames.Frame) -> None:
        if frame.kind is frames.FrameKind.OPEN:
            await self._leave()
            await self._open(frame)
        elif frame.stream != self._number or self._stream is None:
            return
        elif frame.kind is frames.FrameKind.SEND:
            await self._stream.send(budget_service_pb2.HoldLeasesRequest.FromString(frame.payload))
        elif frame.kind is frames.FrameKind.HALF_CLOSE:
            await self._stream.half_close()
        elif frame.kind is frames.FrameKind.CLOSE:
            await self._leave()
            self._tell(frames.FrameKind.CLOSED, frame.stream)

    async def _open(self, frame: frames.Frame) -> None:
        parts = json.loads(frame.payload)
        paths: dict[str, pathlib.Path] = {name: pathlib.Path(path) for name, path in parts["tls"].items()}
        files = tls.TlsFiles(
            certificate_file=paths.get("certificate_file"),
            key_file=paths.get("key_file"),
            ca_file=paths.get("ca_file"),
        )
        link = grpc_link.GrpcLink(files if paths else None)
        self._stream, self._number = await link.open(parts["address"]), frame.stream
        self._pump = asyncio.create_task(self._forward(self._stream, frame.stream))

    async def _forward(self, stream: grpc_link.GrpcStream, number: int) -> None:
        try:
            while True:
                response = await stream.receive()
                self._tell(frames.FrameKind.RECEIVED, number, response.SerializeToString())
                await self._writer.drain()
        except errors.LeaseholdError as error:
            self._tell(frames.FrameKind.FAILED, number, frames.encode_error(error))

    async def _leave(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        if self._stream is not None:
            await self._stream.close()
        self._pump = self._stream = None

    def _tell(self, kind: frames.FrameKind, number: int, payload: bytes = b"") -> None:
        self._writer.write(frames.encode(frames.Frame(kind, number, payload)))


async def _run(descriptor: int, owner_pid: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    relay = asyncio.create_task(Relay(reader, writer).run())
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(owner_pid)
        asyncio.get_running_loop().add_reader(pidfd, relay.cancel)
        if os.getppid() != owner_pid:
            relay.cancel()
    await asyncio.gather(relay, return_exceptions=True)
    writer.close()


def main(arguments: list[str]) -> None:
    """``relay DESCRIPTOR OWNER_PID``: serve the socket `DESCRIPTOR` as long as its owner lives."""
    descriptor, owner_pid = map(int, arguments)
    # Ctrl-C is for the owner, which still has a lease to give back.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_run(descriptor, owner_pid))


if __name__ == "__main__":
    main(sys.argv[1:])
