"""Streams through a relay process, for a child that was forked after gRPC had been loaded."""

import asyncio
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Final, Protocol

from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.client import frames
from leasehold.core import errors

_END_SECONDS: Final = 1.0


class TlsPaths(Protocol):
    """What of `leasehold.rpc.tls.TlsFiles` a relay is told; that module must not be loaded here."""

    @property
    def certificate_file(self) -> pathlib.Path | None: ...  # noqa: D102
    @property
    def key_file(self) -> pathlib.Path | None: ...  # noqa: D102
    @property
    def ca_file(self) -> pathlib.Path | None: ...  # noqa: D102


class RelayStream:
    """See `link.Stream`."""

    def __init__(self, owner: "RelayLink", number: int) -> None:
        self._owner = owner
        self._number = number

    async def send(self, request: budget_service_pb2.HoldLeasesRequest) -> None:
        """See `link.Stream`."""
        await self._owner.tell(frames.Frame(frames.FrameKind.SEND, self._number, request.SerializeToString()))

    async def receive(self) -> budget_service_pb2.HoldLeasesResponse:
        """See `link.Stream`."""
        while True:
            frame = await self._owner.hear()
            if frame.stream != self._number:
                continue
            if frame.kind is frames.FrameKind.RECEIVED:
                return budget_service_pb2.HoldLeasesResponse.FromString(frame.payload)
            if frame.kind is frames.FrameKind.FAILED:
                raise frames.decode_error(frame.payload)

    async def half_close(self) -> None:
        """See `link.Stream`."""
        await self._owner.tell(frames.Frame(frames.FrameKind.HALF_CLOSE, self._number))

    async def close(self) -> None:
        """See `link.Stream`."""
        with contextlib.suppress(errors.Unavailable):
            await self._owner.tell(frames.Frame(frames.FrameKind.CLOSE, self._number))
            while True:
                frame = await self._owner.hear()
                if frame.kind is frames.FrameKind.CLOSED and frame.stream == self._number:
                    return


class RelayLink:
    """See `link.Link`. Starts the relay with the first stream, and again should it have died."""

    def __init__(self, tls_files: TlsPaths | None = None) -> None:
        self._tls_files = tls_files
        self._process: subprocess.Popen[bytes] | None = None
        self._heard: asyncio.Queue[frames.Frame | None] = asyncio.Queue()
        self._listener: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0

    async def open(self, address: str) -> RelayStream:
        """See `link.Link`. Raises `Unavailable` if the relay cannot be started."""
        if self._process is None or self._process.poll() is not None:
            await self._start()
        self._number += 1
        paths = {
            name: str(path)
            for name in ("certificate_file", "key_file", "ca_file")
            if (path := getattr(self._tls_files, name, None)) is not None
        }
        payload = json.dumps({"address": address, "tls": paths}).encode()
        await self.tell(frames.Frame(frames.FrameKind.OPEN, self._number, payload))
        return RelayStream(self, self._number)

    async def close(self) -> None:
        """See `link.Link`; waits a second for the relay to end by itself."""
        if self._writer is not None:
            self._writer.close()
        if self._listener is not None:
            self._listener.cancel()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    async def tell(self, frame: frames.Frame) -> None:
        """Send a frame. Raises `Unavailable` if the relay has gone."""
        assert self._writer is not None
        try:
            self._writer.write(frames.encode(frame))
            await self._writer.drain()
        except OSError as error:
            raise errors.Unavailable("the relay has gone") from error

    async def hear(self) -> frames.Frame:
        """The next frame. Raises `Unavailable` if the relay has gone."""
        frame = await self._heard.get()
        if frame is None:
            self._heard.put_nowait(None)
            raise errors.Unavailable("the relay has gone")
        return frame

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        # A task of its own: cancelling who waits for a frame must not lose half of one.
        try:
            while True:
                self._heard.put_nowait(await frames.read(reader))
        except errors.Unavailable:
            self._heard.put_nowait(None)

    async def _start(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if not sys.executable:
            raise errors.Unavailable("this interpreter does not know its own path, so no relay can be started")
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, "-m", "leasehold.client.relay", str(theirs.fileno()), str(os.getpid())]
            try:
                # A session of its own: signals for the owner's terminal are not for the relay.
                self._process = subprocess.Popen(  # noqa: ASYNC220  a few ms, on a loop that serves nothing yet
                    arguments,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise errors.Unavailable(f"the relay cannot be started: {error}") from error
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._heard = asyncio.Queue()
        self._listener = asyncio.create_task(self._listen(reader))
