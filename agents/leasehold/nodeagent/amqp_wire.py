"""A very small client of AMQP 0-9-1: log in, and ask a queue by passive declare how many messages are ready.

A passive declare changes nothing and needs no right but to see the queue. The agent must not need Celery's
libraries, which may live in another environment than its own.
"""

import asyncio
import contextlib
import struct
from collections.abc import Iterator
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import broker_url

_HEADER: Final = b"AMQP\x00\x00\x09\x01"
_METHOD_FRAME: Final = 1
_FRAME_END: Final = 0xCE
_FRAME_BYTES_MAX: Final = 131_072
_CHANNEL_MAX: Final = 2_047
_PASSIVE: Final = 1

_Key = tuple[int, int]
_START: Final[_Key] = (10, 10)
_START_OK: Final[_Key] = (10, 11)
_TUNE: Final[_Key] = (10, 30)
_TUNE_OK: Final[_Key] = (10, 31)
_OPEN: Final[_Key] = (10, 40)
_OPEN_OK: Final[_Key] = (10, 41)
_CLOSE: Final[_Key] = (10, 50)
_CHANNEL_OPEN: Final[_Key] = (20, 10)
_CHANNEL_OPEN_OK: Final[_Key] = (20, 11)
_CHANNEL_CLOSE: Final[_Key] = (20, 40)
_CHANNEL_CLOSE_OK: Final[_Key] = (20, 41)
_DECLARE: Final[_Key] = (50, 10)
_DECLARE_OK: Final[_Key] = (50, 11)

#: Reply codes: https://www.rabbitmq.com/amqp-0-9-1-reference
_ACCESS_REFUSED: Final = 403
_NOT_FOUND: Final = 404
_NOT_ALLOWED: Final = 530


class AmqpConnection:
    """One connection, logged in. Not for use by several tasks at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str) -> None:
        self._reader = reader
        self._writer = writer
        self._place = place
        self._channel = 0
        self._is_channel_open = False

    @classmethod
    async def open(cls, url: broker_url.BrokerUrl) -> "AmqpConnection":
        """Connect and log in to the virtual host.

        Raises `Unavailable` if it cannot be reached, `PermissionDenied` if it refuses the login or the virtual
        host, `FailedPrecondition` if it closes the connection for another reason.
        """
        try:
            reader, writer = await asyncio.open_connection(url.host, url.port, ssl=url.tls)
        except OSError as error:
            raise errors.Unavailable(f"{url.place} cannot be reached: {error}") from error
        connection = cls(reader, writer, url.place)
        try:
            with connection._told():
                await connection._log_in(url)
        except BaseException:
            connection.close()
            raise
        return connection

    async def ready(self, queue: str) -> int | None:
        """How many messages of `queue` are ready; None if there is no such queue.

        Raises `Unavailable`, `PermissionDenied`, `FailedPrecondition`.
        """
        with self._told():
            if not self._is_channel_open:
                await self._open_channel()
            arguments = b"\x00\x00" + _short(queue) + bytes([_PASSIVE]) + _table(b"")
            key, answer = await self._call(_DECLARE, arguments)
            if key == _DECLARE_OK:
                name_size = answer[0]
                (count,) = struct.unpack_from(">I", answer, 1 + name_size)
                return int(count)
            await self._refused(key, answer)
            return None

    def close(self) -> None:
        """Drop the connection."""
        with contextlib.suppress(Exception):
            self._writer.close()

    async def _log_in(self, url: broker_url.BrokerUrl) -> None:
        self._writer.write(_HEADER)
        await self._expect(_START)
        # Asked to say so, it answers a wrong password with a reason, not with silence.
        capabilities = _short("capabilities") + b"F" + _table(_short("authentication_failure_close") + b"t\x01")
        login = f"\0{url.user}\0{url.password}".encode()
        self._send(0, _START_OK, _table(capabilities) + _short("PLAIN") + _long(login) + _short("en_US"))
        tune = await self._expect(_TUNE)
        _, frame_bytes, _ = struct.unpack_from(">HIH", tune)
        bound = min(frame_bytes or _FRAME_BYTES_MAX, _FRAME_BYTES_MAX)
        # No heartbeats: a connection that went silent is found out by the caller's deadline.
        self._send(0, _TUNE_OK, struct.pack(">HIH", _CHANNEL_MAX, bound, 0))
        self._send(0, _OPEN, _short(url.virtual_host) + _short("") + b"\x00")
        await self._expect(_OPEN_OK)

    async def _open_channel(self) -> None:
        self._channel = self._channel % _CHANNEL_MAX + 1
        key, answer = await self._call(_CHANNEL_OPEN, _short(""))
        if key != _CHANNEL_OPEN_OK:
            await self._refused(key, answer)
        self._is_channel_open = True

    async def _call(self, key: _Key, arguments: bytes) -> tuple[_Key, bytes]:
        self._send(self._channel, key, arguments)
        await self._writer.drain()
        return await self._method()

    async def _expect(self, wanted: _Key) -> bytes:
        await self._writer.drain()
        key, arguments = await self._method()
        if key != wanted:
            await self._refused(key, arguments)
        return arguments

    async def _refused(self, key: _Key, arguments: bytes) -> None:
        """Raise what a close means, unless it says only that there is no such queue."""
        if key not in {_CLOSE, _CHANNEL_CLOSE}:
            raise ValueError(f"method {key} was not expected")
        (code,) = struct.unpack_from(">H", arguments)
        text = arguments[3 : 3 + arguments[2]].decode(errors="replace")[:200]
        if key == _CHANNEL_CLOSE:
            self._is_channel_open = False
            self._send(self._channel, _CHANNEL_CLOSE_OK, b"")
            await self._writer.drain()
            if code == _NOT_FOUND:
                return
        message = f"{self._place}: {code} {text}"
        if code in {_ACCESS_REFUSED, _NOT_ALLOWED}:
            raise errors.PermissionDenied(message)
        raise errors.FailedPrecondition(message)

    def _send(self, channel: int, key: _Key, arguments: bytes) -> None:
        payload = struct.pack(">HH", *key) + arguments
        head = struct.pack(">BHI", _METHOD_FRAME, channel, len(payload))
        self._writer.write(head + payload + bytes([_FRAME_END]))

    async def _method(self) -> tuple[_Key, bytes]:
        while True:
            kind, _, size = struct.unpack(">BHI", await self._reader.readexactly(7))
            if size > _FRAME_BYTES_MAX:
                raise ValueError("it does not speak AMQP 0-9-1")
            payload = await self._reader.readexactly(size + 1)
            if payload[-1] != _FRAME_END:
                raise ValueError("it does not speak AMQP 0-9-1")
            if kind == _METHOD_FRAME:  # anything else is a heartbeat
                class_id, method_id = struct.unpack_from(">HH", payload)
                return (class_id, method_id), payload[4:-1]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError, struct.error, IndexError) as error:
            detail = str(error) or type(error).__name__
            raise errors.Unavailable(f"{self._place}: the connection broke: {detail}") from error


def _short(text: str) -> bytes:
    data = text.encode()
    if len(data) > 255:
        raise errors.InvalidArgument(f"{text[:40]!r}... is longer than 255 bytes", field="queue")
    return bytes([len(data)]) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _table(fields: bytes) -> bytes:
    return _long(fields)
