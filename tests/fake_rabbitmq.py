"""As much of RabbitMQ as an agent asks: a login, passive declares, and one page of the management API.

Written after the specification of AMQP 0-9-1; that Celery's own client understands it is a test of its own.
"""

import asyncio
import base64
import json
import struct
import urllib.parse
from typing import Any

_METHOD = 1


class FakeRabbit:
    """Queues and how many messages of each are ready."""

    def __init__(self, ready: dict[str, int], *, password: str = "guest") -> None:
        self.ready = ready
        self.unacknowledged: dict[str, int] = {}
        self.is_management_away = False
        self._password = password
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self.port = self._management_port = 0

    @property
    def url(self) -> str:
        return f"amqp://guest:{self._password}@127.0.0.1:{self.port}//"

    @property
    def management_url(self) -> str:
        return f"http://guest:{self._password}@127.0.0.1:{self._management_port}"

    async def __aenter__(self) -> "FakeRabbit":
        for handle in (self._amqp, self._http):
            self._servers.append(await asyncio.start_server(self._tracked(handle), "127.0.0.1", 0))
        self.port, self._management_port = (each.sockets[0].getsockname()[1] for each in self._servers)
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tracked(self, handle: Any) -> Any:
        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await handle(reader, writer)
            except (EOFError, OSError, asyncio.CancelledError):
                pass
            finally:
                self._tasks.discard(task)
                writer.close()

        return run

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        name = urllib.parse.unquote(head.split(" ")[1].rpartition("/")[2])
        login = base64.b64encode(f"guest:{self._password}".encode()).decode()
        assert head.startswith("GET /api/queues/%2F/"), head
        assert f"Basic {login}" in head
        if self.is_management_away:
            return
        body = json.dumps({"messages_unacknowledged": self.unacknowledged.get(name, 0)}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + body)
        await writer.drain()

    async def _amqp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == b"AMQP\x00\x00\x09\x01"
        mechanisms, locales = _long(b"PLAIN"), _long(b"en_US")
        _send(writer, 0, 10, 10, b"\x00\x09" + _long(b"") + mechanisms + locales)
        while True:
            channel, method, arguments = await _read(reader)
            if method == (10, 11):
                if f"\0guest\0{self._password}".encode() not in arguments:
                    text = b"ACCESS_REFUSED - Login was refused"
                    _send(writer, 0, 10, 50, struct.pack(">HB", 403, len(text)) + text + b"\0\0\0\0")
                else:
                    _send(writer, 0, 10, 30, struct.pack(">HIH", 2047, 131072, 60))
            elif method == (10, 40):
                _send(writer, 0, 10, 41, b"\x00")
            elif method == (10, 50):
                _send(writer, 0, 10, 51, b"")
            elif method == (20, 10):
                _send(writer, channel, 20, 11, _long(b""))
            elif method == (50, 10):
                self._declare(writer, channel, arguments)
            elif method == (20, 40):
                _send(writer, channel, 20, 41, b"")
            await writer.drain()

    def _declare(self, writer: asyncio.StreamWriter, channel: int, arguments: bytes) -> None:
        size = arguments[2]
        name, flags = arguments[3 : 3 + size].decode(), arguments[3 + size]
        assert flags & 1, "only passive declares: the agent changes nothing"
        if name in self.ready:
            answer = bytes([size]) + name.encode() + struct.pack(">II", self.ready[name], 0)
            _send(writer, channel, 50, 11, answer)
        else:
            text = f"NOT_FOUND - no queue '{name}'".encode()
            _send(writer, channel, 20, 40, struct.pack(">HB", 404, len(text)) + text + b"\0\x32\0\x0a")


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _send(writer: asyncio.StreamWriter, channel: int, kind: int, method: int, arguments: bytes) -> None:
    payload = struct.pack(">HH", kind, method) + arguments
    writer.write(struct.pack(">BHI", _METHOD, channel, len(payload)) + payload + b"\xce")


async def _read(reader: asyncio.StreamReader) -> tuple[int, tuple[int, int], bytes]:
    while True:
        kind, channel, size = struct.unpack(">BHI", await reader.readexactly(7))
        payload = (await reader.readexactly(size + 1))[:-1]
        if kind == _METHOD:
            first, second = struct.unpack_from(">HH", payload)
            return channel, (first, second), payload[4:]
