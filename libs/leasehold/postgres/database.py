"""The pool: transactions with a deadline that hold even while Postgres is frozen, and recovery by itself.

- A connection that Postgres closed while it lay in the pool is seen before use (its socket is readable), so a
  restart of Postgres costs no failed call.
- An operation that outlives its deadline gets its socket shut down under it: psycopg then fails at once and the
  connection is discarded. Cancelling the task instead would make psycopg ask the frozen server to cancel, and
  wait for it.
- After any broken connection the whole pool is renewed.
- Attempts to connect follow demand and give up soon, so that the first call after an outage connects at once,
  rather than wait out the pool's backoff.
"""

import asyncio
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import psycopg_pool
from leasehold.core import errors
from leasehold.postgres import failures, queries
from psycopg import rows

Row = dict[str, Any]
Connection = psycopg.AsyncConnection[Row]
Cursor = psycopg.AsyncCursor[Row]

_SQL = queries.load("session.sql")
# psycopg, as libpq, takes a shorter one for 2 s.
_CONNECT_TIMEOUT_SECONDS = 2
_RECONNECT_SECONDS = 0.5
# Calls that wait for a connection; more are refused at once.
_WAITING_MAX = 1000


class Database:
    """A pool of connections to one database. Raises only errors of ours.

    `deadline_seconds` bounds one transaction, the wait for a connection (at most half of it) included. With
    `finds_by_key` statements are planned for that alone, however small their tables are: see sql/session.sql.
    """

    def __init__(
        self,
        dsn: str,
        *,
        deadline_seconds: float = 2.0,
        connections_max: int = 8,
        application_name: str = "",
        finds_by_key: bool = False,
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._finds_by_key = finds_by_key
        self._last_connect_failure = ""
        self._is_open = False
        self._pool = psycopg_pool.AsyncConnectionPool(
            dsn,
            connection_class=self._recording_connection_class(),
            kwargs={
                "autocommit": True,
                "row_factory": rows.dict_row,
                "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
                # One that is given tells others whose sessions these are; else the user's own wins.
                **(
                    {"application_name": application_name}
                    if application_name
                    else {"fallback_application_name": "leasehold"}
                ),
            },
            min_size=1,
            max_size=connections_max,
            max_waiting=_WAITING_MAX,
            timeout=deadline_seconds / 2,
            reconnect_timeout=_RECONNECT_SECONDS,
            configure=self._configure,
            check=self._check,
            open=False,
            name="leasehold-postgres",
        )

    async def open(self) -> None:
        """Begin to connect. Returns at once, Postgres being there or not."""
        self._is_open = True
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection. Calling it again does nothing."""
        if self._is_open:
            self._is_open = False
            await self._pool.close(timeout=_CONNECT_TIMEOUT_SECONDS)

    @asynccontextmanager
    async def transaction(self, *, deadline_seconds: float | None = None) -> AsyncIterator[Cursor]:
        """A cursor in a READ COMMITTED transaction, committed at the end, rolled back on an error."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + (deadline_seconds or self._deadline_seconds)
        with failures.translated():
            connection = await self._checked_out()
            try:
                with _cut_off(connection, ends_at - loop.time()):
                    async with connection.transaction(), connection.cursor() as cursor:
                        yield cursor
            finally:
                is_broken = connection.broken
                await self._pool.putconn(connection)
                if is_broken:
                    await self._pool.drain()

    async def _checked_out(self) -> Connection:
        if not self._is_open:
            raise errors.PostgresUnavailable("the connection to Postgres has been closed")
        try:
            return await self._pool.getconn()
        except psycopg_pool.PoolTimeout as error:
            story = self._last_connect_failure or failures.first_line(error)
            raise failures.unavailable(story) from error

    async def _configure(self, connection: Connection) -> None:
        milliseconds = round(self._deadline_seconds * 1000)
        # The fence relies on READ COMMITTED (see sql/fence.sql), whatever the database's default is.
        await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        with _cut_off(connection, self._deadline_seconds):
            await connection.execute(
                _SQL["configure"],
                {
                    "statement_timeout": str(milliseconds),
                    # Shorter, so that the error tells which of the two it was.
                    "lock_timeout": str(milliseconds * 3 // 4),
                    "idle_in_transaction_session_timeout": str(milliseconds // 2),
                },
            )
            if self._finds_by_key:
                await connection.execute(_SQL["find_by_key"])

    async def _check(self, connection: Connection) -> None:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
        if poller.poll(0):
            # Nothing is to be read from a healthy idle connection; a rare notice costs only a reconnection.
            await connection.close()
            await self._pool.drain()
            raise psycopg.OperationalError("Postgres closed the idle connection")

    def _recording_connection_class(self) -> type[Connection]:
        """A connection that notes why connecting failed: the pool only logs it, and a user needs to be told."""
        database = self

        class RecordingConnection(psycopg.AsyncConnection[Row]):
            @classmethod
            async def connect(cls, *args: Any, **kwargs: Any) -> Any:
                try:
                    connection = await super().connect(*args, **kwargs)
                except psycopg.Error as error:
                    database._last_connect_failure = failures.first_line(error)
                    raise
                database._last_connect_failure = ""
                return connection

        return RecordingConnection


@contextmanager
def _cut_off(connection: Connection, after_seconds: float) -> Iterator[None]:
    """Shut the connection's socket down if the block takes longer, so that what waits on it fails."""
    was_cut = False

    def cut() -> None:
        nonlocal was_cut
        if connection.closed:
            return
        was_cut = True
        # A duplicate, because libpq owns the descriptor; shutting down concerns the socket, so it reaches both.
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    handle = asyncio.get_running_loop().call_later(max(after_seconds, 0.0), cut)
    try:
        yield
    except psycopg.Error as error:
        if was_cut:
            raise failures.unavailable("no answer in time") from error
        raise
    finally:
        handle.cancel()
