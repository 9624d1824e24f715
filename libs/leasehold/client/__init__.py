"""Use shared budgets from a worker's program, at the speed of a local lock.

::

    from leasehold import client

    async with client.connect() as leasehold:
        budget = leasehold.budget("llm-api")
        async with budget.acquire(requests=1, tokens=1200, timeout_seconds=30) as permit:
            response = await call_the_provider()
            permit.settle(tokens=response.total_tokens)

The same for threads: ``with client.connect_blocking() as leasehold`` and ``with budget.acquire(...)``. Errors
are those of `leasehold.core.errors`, offered here as ``client.errors``.
"""

from leasehold.client.allocation import Allocation, AllocationState
from leasehold.client.budgets import AsyncBudget, Budget
from leasehold.client.clients import AsyncClient, Client, connect, connect_blocking
from leasehold.client.executor import BudgetExecutor
from leasehold.client.job_specs import job_spec
from leasehold.client.job_tasks import allocated, current_allocation
from leasehold.client.jobs import AsyncJobs, Jobs
from leasehold.client.permits import AsyncPermit, Permit
from leasehold.core import errors

__all__ = [
    "Allocation",
    "AllocationState",
    "AsyncBudget",
    "AsyncClient",
    "AsyncJobs",
    "AsyncPermit",
    "Budget",
    "BudgetExecutor",
    "Client",
    "Jobs",
    "Permit",
    "allocated",
    "connect",
    "connect_blocking",
    "current_allocation",
    "errors",
    "job_spec",
]
