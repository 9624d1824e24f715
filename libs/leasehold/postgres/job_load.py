"""Reading every live job: in parts, so that whoever waits for the event loop gets it between them.

A part is decoded in another thread while the next is fetched.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from leasehold.core import errors
from leasehold.core.job import model
from leasehold.observe import logs
from leasehold.postgres import database, job_rows, queries
from psycopg import rows

#: Decoding a part takes about 20 ms.
PART_ROWS = 2000

_SQL = queries.load("job_read.sql")

_log = logs.get_logger(__name__)


async def live_jobs(connection: database.Connection) -> tuple[model.JobRecord, ...]:
    """Those that are pending or running, in the connection's transaction, which must be REPEATABLE READ.

    One that cannot be read is told and left as it is, so that the others go on.
    """
    decoder = job_rows.LiveJobs()
    found: list[model.JobRecord] = []
    for name, statement in (("pending", _SQL["pending_jobs"]), ("running", _SQL["running_jobs"])):
        async with connection.cursor(name=name, row_factory=rows.tuple_row) as cursor:
            # Binary: its numbers need no parsing.
            await cursor.execute(statement, binary=True)
            part = await cursor.fetchmany(PART_ROWS)
            while part:
                decoded, part = await asyncio.gather(
                    asyncio.to_thread(_decoded, decoder, part), cursor.fetchmany(PART_ROWS)
                )
                found += decoded
    return tuple(found)


def _decoded(decoder: job_rows.LiveJobs, part: Iterable[tuple[Any, ...]]) -> list[model.JobRecord]:
    found = []
    for row in part:
        try:
            found.append(decoder.job(row))
        except errors.LeaseholdError as error:
            _log.error("job_unreadable", job=row[0], error=error.message)
    return found
