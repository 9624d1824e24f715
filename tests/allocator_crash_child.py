"""An allocator that kills itself with SIGKILL, or freezes itself, at a chosen point of a batch of jobs.

LEASEHOLD_TEST_CRASH: `POINT KIND FILE`. POINT is `before` (the batch has not reached Postgres), `after` (it is
committed, and nobody was told) or `inside`: SIGSTOP once all is written, before the commit, in a session that
Postgres does not end for idling. KIND names the batch's part that must not be empty (`submits`, `allocations`,
`ends`). It happens once, while FILE is there, which goes first.
"""

import os
import pathlib
import signal
import sys

from leasehold.allocator import __main__ as command
from leasehold.core import epoch as epochs
from leasehold.core.job import changes
from leasehold.postgres import database, job_flush, job_store

POINT, KIND, FILE = os.environ["LEASEHOLD_TEST_CRASH"].split(" ", 2)

_flush = job_store.PostgresJobStore.flush
_write = job_flush.flush


def _is_due(is_here: bool, batch: changes.Batch) -> bool:
    armed = pathlib.Path(FILE)
    if not (is_here and getattr(batch, KIND) and armed.exists()):
        return False
    armed.unlink()
    return True


def _die_if(is_here: bool, batch: changes.Batch) -> None:
    if _is_due(is_here, batch):
        os.kill(os.getpid(), signal.SIGKILL)


async def _freezing_write(
    cursor: database.Cursor, epoch: epochs.Epoch, batch: changes.Batch
) -> changes.BatchResult | None:
    result = await _write(cursor, epoch, batch)
    if _is_due(POINT == "inside", batch):
        await cursor.execute("SET idle_in_transaction_session_timeout = 0")
        os.kill(os.getpid(), signal.SIGSTOP)
    return result


async def _crashing_flush(
    self: job_store.PostgresJobStore, epoch: epochs.Epoch, batch: changes.Batch
) -> changes.BatchResult:
    _die_if(POINT == "before", batch)
    result = await _flush(self, epoch, batch)
    _die_if(POINT == "after", batch)
    return result


if __name__ == "__main__":
    job_store.PostgresJobStore.flush = _crashing_flush  # type: ignore[method-assign]
    job_flush.flush = _freezing_write
    sys.exit(command.run())
