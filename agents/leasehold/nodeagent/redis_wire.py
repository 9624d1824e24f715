"""A very small client of Redis's protocol, for the agent's two questions: what waits, and does it answer?

The library `redis` would do, but for its weight: importing ``redis.asyncio`` adds 7.7 MB to the agent's own
memory, of the 60 MB that it may have. This needs nothing that the agent has not loaded. RESP 2, one connection,
one pipeline at a time.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import broker_url

#: A longer bulk string is read past, and `TOO_LONG` stands in its place.
_BULK_BYTES_MAX: Final = 1_048_576
_ITEMS_MAX: Final = 1_000_000
_DEPTH_MAX: Final = 4


class TooLong:
    """Stands where a bulk string was too long to be kept."""


TOO_LONG: Final = TooLong()


class Refused(Exception):
    """The server answered one command with an error."""

    def __init__(self, text: str) -> None:
        self.code = text.partition(" ")[0]
        super().__init__(text[:200])


Reply = bytes | int | None | list["Reply"] | Refused | TooLong


class RedisConnection:
    """One connection, logged in. Not for use by several tasks at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str) -> None:
        self._reader = reader
        self._writer = writer
        self._place = place

    @classmethod
    async def open(cls, url: broker_url.BrokerUrl) -> "RedisConnection":
        """Connect, log in and select the database.

        Raises `Unavailable` if it cannot be reached, `PermissionDenied` if it refuses the login,
        `FailedPrecondition` if it has no such database or answers otherwise.
        """
        try:
            if url.socket_path:
                reader, writer = await asyncio.open_unix_connection(url.socket_path)
            else:
                reader, writer = await asyncio.open_connection(url.host, url.port, ssl=url.tls)
        except OSError as error:
            raise errors.Unavailable(f"{url.place} cannot be reached: {error}") from error
        connection = cls(reader, writer, url.place)
        try:
            await connection._log_in(url)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _log_in(self, url: broker_url.BrokerUrl) -> None:
        if url.password:
            login = ["AUTH", url.user, url.password] if url.user else ["AUTH", url.password]
            (answer,) = await self.ask([login])
            if isinstance(answer, Refused):
                raise errors.PermissionDenied(f"{url.place} refuses the login: {answer}")
        (answer,) = await self.ask([["SELECT", str(url.database)]])
        if isinstance(answer, Refused):
            raise as_error(answer, url.place)

    async def ask(self, commands: Sequence[Sequence[str | bytes]]) -> list[Reply]:
        """Send all, then read their replies, of which each may be a `Refused`. Raises `Unavailable`."""
        try:
            self._writer.write(b"".join(_encode(command) for command in commands))
            await self._writer.drain()
            return [await self._reply(0) for _ in commands]
        except (OSError, EOFError, ValueError) as error:
            detail = str(error) or type(error).__name__
            raise errors.Unavailable(f"{self._place}: the connection broke: {detail}") from error

    def close(self) -> None:
        """Drop the connection."""
        with contextlib.suppress(Exception):
            self._writer.close()

    async def _reply(self, depth: int) -> Reply:
        line = await self._reader.readuntil(b"\r\n")
        kind, text = line[:1], line[1:-2]
        if kind == b"+":
            return text
        if kind == b"-":
            return Refused(text.decode(errors="replace"))
        if kind not in b":$*":
            raise ValueError(f"it does not speak Redis's protocol: {line[:20]!r}")
        number = int(text)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return await self._bulk(number)
        if depth == _DEPTH_MAX or number > _ITEMS_MAX:
            raise ValueError("a reply is too deep or too long")
        return [await self._reply(depth + 1) for _ in range(number)]

    async def _bulk(self, size: int) -> bytes | TooLong:
        if size <= _BULK_BYTES_MAX:
            return (await self._reader.readexactly(size + 2))[:-2]
        left = size + 2
        while left:
            left -= len(await self._reader.readexactly(min(left, 65_536)))
        return TOO_LONG


def as_error(refused: Refused, place: str) -> errors.LeaseholdError:
    """What an error reply means."""
    message = f"{place}: {refused}"
    if refused.code in {"NOAUTH", "WRONGPASS", "NOPERM"}:
        return errors.PermissionDenied(message)
    if refused.code in {"LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN"}:
        return errors.Unavailable(message)
    return errors.FailedPrecondition(message)


def _encode(command: Sequence[str | bytes]) -> bytes:
    parts = [part.encode() if isinstance(part, str) else part for part in command]
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%s" % (len(parts), body)
