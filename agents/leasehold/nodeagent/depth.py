r"""What waits in a pool's queues, asked of the broker itself. Not known is told as not known, never as 0.

Redis. A queue of Celery is several lists: its bare name holds priority 0, and ``NAME\x06\x16STEP`` the others.
The lists of all steps from 0 to 9 are summed, so no setting of ``priority_steps`` within 0 to 9 needs to be
known here. A worker that has taken a message puts it into ``unacked``, one hash for all queues, which is read
through up to a bound, and attributed by exchange and routing key; beyond the bound the count is told as "at
least". A message there whose ETA has not come waits in a worker's memory: it is counted apart, as scheduled.
One with an ETA that no worker has taken yet counts as ready, because a worker is needed to take it. The
numbers are read one after the other: a message that moves meanwhile may be counted twice, or not at all.

RabbitMQ. Ready by a passive declare; what is unacknowledged only the management API tells, so without that it
is not known. ETA tasks are unacknowledged there, and cannot be told apart.
"""

import asyncio
import base64
import datetime
import json
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import amqp_wire, broker_url, redis_wire
from leasehold.observe import logs

_log = logs.get_logger(__name__)

TIMEOUT_SECONDS: Final = 3.0

_SEPARATOR: Final = b"\x06\x16"
_STEPS: Final = range(10)
_UNACKED_MAX: Final = 5_000
#: Values of about a kilobyte: an answer is parsed within a millisecond or two, then others may run.
_SCAN_COUNT: Final = 50
_HTTP_BYTES_MAX: Final = 1_048_576


class DepthProbe(Protocol):
    """Asks one broker. `depth` is called by one task at a time."""

    async def depth(self, queues: Sequence[str]) -> model.Depth:
        """What waits in all `queues` together, within `TIMEOUT_SECONDS`. Raises nothing: see `Depth.error`."""
        ...

    def close(self) -> None:
        """Drop the connection."""
        ...


def probe_of(
    url: str, *, setting: str = "CELERY_BROKER_URL", key_prefix: str = "", management_url: str = ""
) -> DepthProbe:
    """A probe for the broker at `url`; connects with the first question.

    `key_prefix` is the application's ``global_keyprefix`` (Redis); `management_url` is where RabbitMQ's
    management API answers, ``http://user:password@host:15672``. Raises `InvalidArgument` for a malformed one.
    """
    where = broker_url.parse(url, setting=setting)
    if where.kind == broker_url.REDIS:
        return RedisDepth(where, key_prefix=key_prefix)
    return RabbitDepth(where, management_url=management_url)


class RedisDepth:
    """Depth of queues on Redis, Valkey and what speaks like them."""

    def __init__(
        self,
        url: broker_url.BrokerUrl,
        *,
        key_prefix: str = "",
        unacked_max: int = _UNACKED_MAX,
        timeout_seconds: float = TIMEOUT_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        self._prefix = key_prefix.encode()
        self._unacked_max = unacked_max
        self._timeout_seconds = timeout_seconds
        self._wall = wall
        self._connection: redis_wire.RedisConnection | None = None

    async def depth(self, queues: Sequence[str]) -> model.Depth:
        """See `DepthProbe`."""
        return await _told(self._depth, queues, self.close, self._timeout_seconds)

    def close(self) -> None:
        """See `DepthProbe`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _depth(self, queues: Sequence[str]) -> model.Depth:
        if self._connection is None:
            self._connection = await redis_wire.RedisConnection.open(self._url)
        keys = [self._prefix + key for queue in queues for key in _lists(queue)]
        *lengths, unacked = await self._ask([[b"LLEN", key] for key in keys] + [[b"HLEN", self._unacked_key]])
        ready = sum(_number(length) for length in lengths)
        count = _UnackedCount(frozenset(queues), self._wall())
        is_whole = not _number(unacked) or await self._scan(self._connection, count)
        return model.Depth(
            ready=ready,
            unacknowledged=count.unacknowledged,
            scheduled=count.scheduled,
            is_lower_bound=not is_whole or count.has_unreadable,
        )

    @property
    def _unacked_key(self) -> bytes:
        return self._prefix + b"unacked"

    async def _ask(self, commands: Sequence[Sequence[str | bytes]]) -> list[redis_wire.Reply]:
        assert self._connection is not None
        replies = await self._connection.ask(commands)
        for reply in replies:
            if isinstance(reply, redis_wire.Refused):
                raise redis_wire.as_error(reply, self._url.place)
        return replies

    async def _scan(self, connection: redis_wire.RedisConnection, count: "_UnackedCount") -> bool:
        """Read ``unacked`` through; whether to its end."""
        cursor = b"0"
        tables: dict[str, list[tuple[str, str]]] = {}
        while len(count.seen) < self._unacked_max:
            (reply,) = await self._ask([[b"HSCAN", self._unacked_key, cursor, b"COUNT", b"%d" % _SCAN_COUNT]])
            if not (isinstance(reply, list) and len(reply) == 2 and isinstance(reply[1], list)):
                raise errors.FailedPrecondition(f"{self._url.place}: HSCAN was answered by something else")
            cursor, pairs = _bytes(reply[0]), reply[1]
            for tag, value in zip(pairs[::2], pairs[1::2], strict=True):
                message = count.take(_bytes(tag), value)
                if message is not None:
                    exchange, key = message[1], message[2]
                    if exchange and exchange not in tables:
                        tables[exchange] = await self._table(exchange)
                    count.attribute(message, _routes(tables.get(exchange, []), key))
            if cursor == b"0":
                return True
        return False

    async def _table(self, exchange: str) -> list[tuple[str, str]]:
        """Bindings of an exchange: routing keys, or patterns of them, and the queues they lead to."""
        (members,) = await self._ask([[b"SMEMBERS", self._prefix + b"_kombu.binding." + exchange.encode()]])
        parts = [_bytes(member).split(_SEPARATOR) for member in members] if isinstance(members, list) else []
        return [(part[0].decode(), part[2].decode()) for part in parts if len(part) == 3]


class _UnackedCount:
    """Counts the messages in ``unacked`` that belong to some queues."""

    def __init__(self, queues: frozenset[str], now: float) -> None:
        self._queues = queues
        self._now = now
        #: A scan may show an entry twice.
        self.seen: set[bytes] = set()
        self.unacknowledged = 0
        self.scheduled = 0
        self.has_unreadable = False

    def take(self, tag: bytes, value: redis_wire.Reply) -> tuple[Any, str, str] | None:
        """The message, its exchange and routing key; None if it was seen, or cannot be read."""
        if tag in self.seen:
            return None
        self.seen.add(tag)
        try:
            message, exchange, key = json.loads(_bytes(value))
            return message, str(exchange or ""), str(key or "")
        except (ValueError, TypeError, errors.LeaseholdError):
            self.has_unreadable = True
            return None

    def attribute(self, message: tuple[Any, str, str], routes: frozenset[str]) -> None:
        """Count it, if it belongs to the queues: by its bindings, else by its routing key alone."""
        if not (routes or frozenset({message[2]})) & self._queues:
            return
        if _is_later(message[0], self._now):
            self.scheduled += 1
        else:
            self.unacknowledged += 1


def _lists(queue: str) -> list[bytes]:
    name = queue.encode()
    return [name if step == 0 else name + _SEPARATOR + b"%d" % step for step in _STEPS]


def _routes(table: Sequence[tuple[str, str]], key: str) -> frozenset[str]:
    return frozenset(queue for bound, queue in table if bound == key or _matches(bound, key))


def _matches(bound: str, key: str) -> bool:
    """Whether a topic binding, where ``*`` is one word and ``#`` any number of them, takes `key`."""
    if "*" not in bound and "#" not in bound:
        return False
    words = [{"*": r"[^.]+", "#": r".*"}.get(word, re.escape(word)) for word in bound.split(".")]
    return re.fullmatch(r"\.?".join(words) if "#" in bound else r"\.".join(words), key) is not None


def _is_later(message: Any, now: float) -> bool:
    """Whether a task's ETA has not come. One that cannot be read has come: better a worker too many."""
    headers = message.get("headers") if isinstance(message, Mapping) else None
    eta = headers.get("eta") if isinstance(headers, Mapping) else None
    if not isinstance(eta, str):
        return False
    try:
        at = datetime.datetime.fromisoformat(eta)
    except ValueError:
        return False
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    return at.timestamp() > now


def _number(reply: redis_wire.Reply) -> int:
    if not isinstance(reply, int):
        raise errors.FailedPrecondition("the broker answered a count with something else")
    return reply


def _bytes(reply: redis_wire.Reply) -> bytes:
    if not isinstance(reply, bytes):
        raise errors.FailedPrecondition("the broker answered with something else than text")
    return reply


class RabbitDepth:
    """Depth of queues on RabbitMQ."""

    def __init__(
        self,
        url: broker_url.BrokerUrl,
        *,
        management_url: str = "",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._url = url
        self._management = _checked_management(management_url) if management_url else None
        self._timeout_seconds = timeout_seconds
        self._connection: amqp_wire.AmqpConnection | None = None
        self._is_unread = False

    async def depth(self, queues: Sequence[str]) -> model.Depth:
        """See `DepthProbe`. A queue that does not exist yet holds nothing."""
        return await _told(self._depth, queues, self.close, self._timeout_seconds)

    def close(self) -> None:
        """See `DepthProbe`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _depth(self, queues: Sequence[str]) -> model.Depth:
        if self._connection is None:
            self._connection = await amqp_wire.AmqpConnection.open(self._url)
        ready = sum([await self._connection.ready(queue) or 0 for queue in queues])
        if self._management is None:
            return model.Depth(ready=ready)
        try:
            unacknowledged = sum([await self._unacknowledged(self._management, queue) for queue in queues])
        except (errors.LeaseholdError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
            if not self._is_unread:
                self._is_unread = True  # said once, until it answers again
                _log.warning("management_api_unread", host=self._management.hostname, error=str(error))
            return model.Depth(ready=ready)
        self._is_unread = False
        return model.Depth(ready=ready, unacknowledged=unacknowledged)

    async def _unacknowledged(self, management: urllib.parse.SplitResult, queue: str) -> int:
        virtual_host, name = (urllib.parse.quote(text, safe="") for text in (self._url.virtual_host, queue))
        status, body = await _get(management, f"{management.path.rstrip('/')}/api/queues/{virtual_host}/{name}")
        if status == 404:
            return 0
        if status != 200:
            raise errors.Unavailable(f"it answers {status}")
        return int(json.loads(body)["messages_unacknowledged"])


def _checked_management(url: str) -> urllib.parse.SplitResult:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise errors.InvalidArgument(
            "management_url: not http://user:password@host:port", field="management_url"
        )
    return parts


async def _get(url: urllib.parse.SplitResult, path: str) -> tuple[int, bytes]:
    """Status and body of a GET. The answer is read to its end, up to a bound."""
    is_tls = url.scheme == "https"
    port = url.port or (443 if is_tls else 80)
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=is_tls or None)
    try:
        login = ":".join(urllib.parse.unquote(text or "") for text in (url.username, url.password)).encode()
        lines = [
            f"GET {path} HTTP/1.0",
            f"Host: {url.hostname}:{port}",
            f"Authorization: Basic {base64.b64encode(login).decode()}",
            "Accept: application/json",
        ]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), await _body(reader)
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader) -> bytes:
    parts, size = [], 0
    while part := await reader.read(65_536):
        size += len(part)
        if size > _HTTP_BYTES_MAX:
            raise ValueError("the answer is too long")
        parts.append(part)
    return b"".join(parts)


async def _told(
    ask: Callable[[Sequence[str]], Awaitable[model.Depth]],
    queues: Sequence[str],
    close: Callable[[], None],
    timeout_seconds: float,
) -> model.Depth:
    """The answer, or why there is none; a connection on which a question failed is not used again."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await ask(queues)
    except TimeoutError:
        close()
        return model.Depth(error=f"the broker did not answer within {timeout_seconds:g} s")
    except errors.LeaseholdError as error:
        close()
        return model.Depth(error=error.message)
    except Exception as error:  # noqa: BLE001  whatever it answers, other pools are asked on
        close()
        _log.warning("broker_answer_unreadable", error=repr(error))
        return model.Depth(error="the broker's answer makes no sense")
    except BaseException:
        close()
        raise
