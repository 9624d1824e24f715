"""Budgets as users hold them: one class for asyncio, one for threads."""

import asyncio
import time
from collections.abc import Mapping

from leasehold.client import allocation as allocations
from leasehold.client import engine as engines
from leasehold.client import executor as executors
from leasehold.client import gates, permits
from leasehold.core import errors
from leasehold.core.budget import messages

SLOTS_DIMENSION = "num_workers"


class BaseBudget:
    """This worker's part of one budget, leased from the allocator and shared by the whole process.

    The worker joins at the first use of any method, not before: a server that forks its workers may make this
    object in the parent. Safe to use from any thread.
    """

    def __init__(self, engine: engines.Engine) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        """The budget's name."""
        return self._engine.budget

    @property
    def worker_id(self) -> str:
        """The name under which this process holds its lease; another one after a fork."""
        return self._engine.name

    @property
    def allocation(self) -> allocations.Allocation:
        """What this worker owns now; nothing until the first grant."""
        return self._started().allocation()

    def set_allocation_callback(self, callback: allocations.Callback | None) -> None:
        """Call `callback` with each change of the allocation, beginning with the present one; None: no longer.

        Set in a running event loop it is called there, else on a thread of its own; it may be a coroutine
        function. Calls come in order and one at a time. One that raises is logged and does no harm.
        """
        subscription = None if callback is None else allocations.subscription_of(callback)
        self._started().subscribe(subscription)

    def update_activity(self, is_active: bool, current_load: float = 0.0, active_tasks: int = 0) -> None:
        """Say by hand that this worker is active; False leaves it to what the library sees.

        Acquiring is activity, so this is for work that will need the budget but has not asked yet.
        ``current_load`` and ``active_tasks`` (0 to 2**32 - 1) are for people: they decide nothing.
        """
        if not -1e300 < current_load < 1e300:
            raise errors.InvalidArgument(f"current_load: {current_load} is not finite", field="current_load")
        if not 0 <= active_tasks < 2**32:
            raise errors.InvalidArgument(
                f"active_tasks: {active_tasks} is not in 0 to 2**32 - 1", field="active_tasks"
            )
        self._started().update_activity(
            is_active=bool(is_active), current_load=float(current_load), active_tasks=int(active_tasks)
        )

    def declare_demand(self, demand: Mapping[str, float]) -> None:
        """The most this worker can use, units by dimension; one left out is as much as it can get.

        What it does not need goes to others. Raises `InvalidArgument`, naming the dimension.
        """
        self._started().declare_demand(demand)

    def report_throttled(self, retry_after_seconds: float = 0.0, dimension: str = "") -> None:
        """The provider answered 429: the allocator lowers the limit in force for everybody, for a while.

        `retry_after_seconds` (0 to 86400) is what the provider asked for, `dimension` the limit it named, if
        any.
        """
        if not 0 <= retry_after_seconds <= 86_400:
            raise errors.InvalidArgument(
                f"retry_after_seconds: {retry_after_seconds} is not in 0 to 86400", field="retry_after_seconds"
            )
        self._started().report_throttled(messages.Throttle(dimension, float(retry_after_seconds)))

    def executor(self, dimension: str = SLOTS_DIMENSION) -> executors.BudgetExecutor:
        """A ``concurrent.futures`` executor as wide as this worker's share of a slots dimension."""
        return executors.BudgetExecutor(self._started(), dimension)

    def _started(self) -> engines.Engine:
        self._engine.ensure_started()
        return self._engine


class Budget(BaseBudget):
    """A budget for threads; see `BaseBudget`."""

    def acquire(
        self,
        requests: float = 1,
        tokens: float | None = None,
        timeout_seconds: float | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> permits.Permit:
        """Wait, in turn, until a request may be sent: ``with budget.acquire(tokens=1200) as permit: ...``.

        Charged are `requests` to ``rpm_limit``, `tokens` to ``tpm_limit`` (left out: the budget's
        ``max_tokens_per_request``), one unit to each concurrency dimension, and `costs` by dimension. Entering
        the block raises

        - `DeadlineExceeded` if that took longer than `timeout_seconds` (None: no bound; nothing was taken),
        - `InvalidArgument` for a wrong number or dimension, `CostAboveLimit` for a cost above the whole limit,
        - `NotFound` if there is no such budget, `Superseded` if another process took this worker's name.
        """
        # `permits.prepare`, once more: a call less is a tenth of an admission.
        permit = permits.Permit()
        permit._engine = self._engine
        permit._requests = requests
        permit._tokens = permit._used = tokens
        permit._window = -3
        permit._options = None
        if costs is not None or timeout_seconds is not None:
            permit.set_options(costs, timeout_seconds)
        return permit

    def try_acquire(
        self,
        requests: float = 1,
        tokens: float | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> permits.Permit | None:
        """As `acquire`, now or never: None if it had to wait. Use the permit in ``with``, or release it."""
        permit = permits.prepare(permits.Permit(), self._started(), requests, tokens, costs, None)
        return permit if permit.try_enter() else None

    def wait_for_allocation(self, timeout_seconds: float | None = None) -> allocations.Allocation:
        """Block until something is owned. Raises `DeadlineExceeded`, and what keeps it away for good."""
        timeout_seconds = permits.checked_timeout(timeout_seconds)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        engine, gate = self._started(), gates.ThreadGate()
        engine.watch(gate)
        try:
            while not engine.is_allocated():
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise permits.not_admitted(engine, timeout_seconds)
                gate.wait(remaining)
        finally:
            engine.unwatch(gate)
        return engine.allocation()


class AsyncBudget(BaseBudget):
    """A budget for asyncio; see `BaseBudget`."""

    def acquire(
        self,
        requests: float = 1,
        tokens: float | None = None,
        timeout_seconds: float | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> permits.AsyncPermit:
        """As `Budget.acquire`: ``async with budget.acquire(tokens=1200) as permit: ...``.

        A task that is cancelled while it waits takes nothing.
        """
        return permits.prepare(permits.AsyncPermit(), self._engine, requests, tokens, costs, timeout_seconds)

    def try_acquire(
        self,
        requests: float = 1,
        tokens: float | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> permits.AsyncPermit | None:
        """As `acquire`, now or never: None if it would have to wait. Enter the permit, or release it."""
        permit = permits.prepare(permits.AsyncPermit(), self._started(), requests, tokens, costs, None)
        return permit if permit.try_enter() else None

    async def wait_for_allocation(self, timeout_seconds: float | None = None) -> allocations.Allocation:
        """Wait until something is owned. Raises `DeadlineExceeded`, and what keeps it away for good."""
        timeout_seconds = permits.checked_timeout(timeout_seconds)
        engine, gate = self._started(), gates.LoopGate()
        engine.watch(gate)
        try:
            async with asyncio.timeout(timeout_seconds):
                while not engine.is_allocated():
                    await gate.wait()
        except TimeoutError:
            raise permits.not_admitted(engine, timeout_seconds) from None
        finally:
            engine.unwatch(gate)
        return engine.allocation()
