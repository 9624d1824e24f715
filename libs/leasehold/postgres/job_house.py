"""Partitions of the ledger for days to come, and the end of what is past its retention."""

import datetime
import re

from leasehold.core import errors
from leasehold.postgres import database, queries, rowmap
from psycopg import sql

#: Made so many days ahead: so long may a leader be without Postgres's leave to make one.
DAYS_AHEAD = 7
REQUEST_SECONDS = 86_400.0
DELETE_ROWS_MAX = 10_000
#: Dropping a partition waits so long for those who read it, and is put off otherwise.
LOCK_SECONDS = 0.5

_SQL = queries.load("job_read.sql")
_EPOCH = datetime.date(2000, 1, 1)
_NAME = re.compile(r"resource_allocation_released_(\d{8})")


async def make_partitions(target: database.Database) -> None:
    """Make those of today and the days to come that are missing."""
    today, present = await _days(target)
    for ahead in range(DAYS_AHEAD + 1):
        day = today + datetime.timedelta(days=ahead)
        if day not in present:
            await _make(target, day)


async def keep(target: database.Database, retention_seconds: float) -> list[str]:
    """Make and drop partitions, delete what is past the retention; for people, what could not be done."""
    problems: list[str] = []
    try:
        await make_partitions(target)
    except errors.LeaseholdError as error:
        problems.append(f"partitions for days to come could not be made: {error.message}")
    today, present = await _days(target)
    oldest = today - datetime.timedelta(seconds=retention_seconds)
    # The rows of a day are past the retention once the whole day is.
    for day in sorted(day for day in present if day + datetime.timedelta(days=1) <= oldest):
        try:
            await _drop(target, day)
        except errors.PostgresUnavailable as error:
            problems.append(f"the ledger of {day} could not be dropped yet: {error.message}")
    await _delete(target, _SQL["delete_jobs"], retention_seconds)
    await _delete(target, _SQL["delete_requests"], REQUEST_SECONDS)
    async with target.transaction() as cursor:
        await cursor.execute(_SQL["delete_capacity_log"], {"age_seconds": retention_seconds})
    return problems


async def _days(target: database.Database) -> tuple[datetime.date, set[datetime.date]]:
    """Postgres's today, and the days that have a partition."""
    async with target.transaction() as cursor:
        await cursor.execute(_SQL["today"])
        today = _EPOCH + datetime.timedelta(days=rowmap.only(await cursor.fetchone())["today"])
        await cursor.execute(_SQL["partitions"])
        names = [_NAME.fullmatch(row["name"]) for row in await cursor.fetchall()]
    return today, {datetime.date.fromisoformat(match[1]) for match in names if match}


def _table(day: datetime.date) -> sql.Identifier:
    return sql.Identifier(_table_name(day))


def _table_name(day: datetime.date) -> str:
    return f"resource_allocation_released_{day:%Y%m%d}"


async def _make(target: database.Database, day: datetime.date) -> None:
    bounds = [
        sql.Literal(f"{each.isoformat()} 00:00:00+00") for each in (day, day + datetime.timedelta(days=1))
    ]
    # Made apart and attached: CREATE TABLE ... PARTITION OF would wait for everyone who reads the ledger, and
    # all would wait behind it; ATTACH waits for nobody who reads or writes.
    create = sql.SQL("CREATE TABLE {} (LIKE resource_allocation_released INCLUDING ALL)").format(_table(day))
    attach = sql.SQL(
        "ALTER TABLE resource_allocation_released ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})"
    ).format(_table(day), *bounds)
    async with target.transaction() as cursor:
        # Another leader, late or new, may be at it too.
        await cursor.execute(_SQL["lock_partitions"])
        await cursor.execute(_SQL["partitions"])
        if _table_name(day) not in {row["name"] for row in await cursor.fetchall()}:
            await cursor.execute(create)
            await cursor.execute(attach)


async def _drop(target: database.Database, day: datetime.date) -> None:
    async with target.transaction() as cursor:
        await cursor.execute(
            sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{LOCK_SECONDS * 1000:.0f}ms"))
        )
        await cursor.execute(sql.SQL("DROP TABLE {}").format(_table(day)))


async def _delete(target: database.Database, statement: bytes, age_seconds: float) -> None:
    """Run it until it finds nothing, a transaction each, so that nobody waits long for its locks."""
    while True:
        async with target.transaction() as cursor:
            await cursor.execute(statement, {"age_seconds": age_seconds, "limit": DELETE_ROWS_MAX})
            if cursor.rowcount < DELETE_ROWS_MAX:
                return
