"""A budget leased through the client library, whose changes go to a worker's log."""

import contextlib
from collections.abc import AsyncIterator

from leasehold import client
from leasehold.demo import journal


@contextlib.asynccontextmanager
async def budget(
    name: str, *, allocator: str, worker_id: str, log: journal.Journal
) -> AsyncIterator[client.AsyncBudget]:
    """The budget `name`, for the time of the block; `allocator` is its address, host:port."""

    def on_allocation(allocation: client.Allocation) -> None:
        log.write(
            "allocation",
            amounts=dict(allocation.amounts),
            total_workers=allocation.total_workers,
            active_workers=allocation.active_workers,
            reason=allocation.reason,
        )

    async with client.connect([allocator], worker_id=worker_id) as leasehold:
        leased = leasehold.budget(name)
        leased.set_allocation_callback(on_allocation)
        try:
            yield leased
        finally:
            # The log is about to be closed.
            leased.set_allocation_callback(None)
