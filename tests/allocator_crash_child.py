"""An allocator that kills itself with SIGKILL at a chosen point of a batch of jobs.

LEASEHOLD_TEST_CRASH: `POINT KIND FILE`. POINT is `before` (the batch has not reached Postgres) or `after` (it
is committed, and nobody was told); KIND names the batch's part that must not be empty (`submits`,
`allocations`, `ends`). It happens once, while FILE is there, which goes first.
"""

import os
import pathlib
import signal
import sys

from leasehold.allocator import __main__ as command
from leasehold.core import epoch as epochs
from leasehold.core.job import changes
from leasehold.postgres import job_store

POINT, KIND, FILE = os.environ["LEASEHOLD_TEST_CRASH"].split(" ", 2)

_flush = job_store.PostgresJobStore.flush


def _die_if(is_here: bool, batch: changes.Batch) -> None:
    armed = pathlib.Path(FILE)
    if is_here and getattr(batch, KIND) and armed.exists():
        armed.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


async def _crashing_flush(
    self: job_store.PostgresJobStore, epoch: epochs.Epoch, batch: changes.Batch
) -> changes.BatchResult:
    _die_if(POINT == "before", batch)
    result = await _flush(self, epoch, batch)
    _die_if(POINT == "after", batch)
    return result


if __name__ == "__main__":
    job_store.PostgresJobStore.flush = _crashing_flush  # type: ignore[method-assign]
    sys.exit(command.run())
