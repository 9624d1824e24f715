"""BudgetService on the wire: each method checks its input, asks the leader's reign, and translates."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from leasehold.allocator import calls, holding, leadership, reading
from leasehold.allocator import reign as reigns
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from leasehold.core.budget import machine, model
from leasehold.observe import causes
from leasehold.postgres import port
from leasehold.rpc import budget_codec, common_codec, lease_codec, wire_values

PAGE_SIZE = 100
BUDGETS_PAGE_MAX = 250
#: A watcher is told at most so often.
WATCH_SECONDS = 0.1

#: What a refusal waits for etcd.
CONFIRM_SECONDS = 3.0

_Context = grpc.aio.ServicerContext[Any, Any]


class BudgetServicer(wire_grpc.BudgetServiceServicer):
    """The API of budgets. Every method raises core errors; an interceptor maps them to statuses."""

    def __init__(self, leader: leadership.Leadership, store: port.Store, draining: asyncio.Event) -> None:
        self._leader = leader
        self._store = store
        self._draining = draining

    @contextlib.asynccontextmanager
    async def _confirmed(self) -> AsyncIterator[reigns.Reign]:
        """The present reign; "there is no such budget" leaves only if it is confirmed by etcd.

        A leader that was frozen, and deposed, may not know it yet, nor the budgets that came after.
        """
        reign = self._leader.require()
        try:
            yield reign
        except errors.NotFound as refusal:
            try:
                async with asyncio.timeout(CONFIRM_SECONDS):
                    await reign.flush()
            except errors.StaleEpoch:
                raise self._leader.not_leader() from refusal
            except TimeoutError:
                raise errors.EtcdUnavailable(
                    "etcd does not confirm that this allocator still leads", retry_after_seconds=0.5
                ) from refusal
            raise

    # Administration

    async def PutBudget(self, request: wire.PutBudgetRequest, context: _Context) -> wire.PutBudgetResponse:
        """Create or replace a budget."""
        spec = budget_codec.decode_budget(request.budget)
        stored = await self._leader.administration.put_budget(
            spec,
            request_id=request.request_id,
            expected_version=request.expected_version,
            actor=calls.actor(context),
            cause=causes.current() or "",
        )
        return wire.PutBudgetResponse(
            budget=budget_codec.encode_budget(
                stored.spec, version=stored.version, update_time=stored.update_time
            )
        )

    async def GetBudget(self, request: wire.GetBudgetRequest, context: _Context) -> wire.GetBudgetResponse:
        """A definition in force, and the limits in force."""
        model.checked_budget_name(request.name)
        async with self._confirmed() as reign:
            budget = reign.core.budget(request.name)
        budget.book.update_limits()
        return wire.GetBudgetResponse(
            budget=self._in_force(budget),
            limits_in_force=wire_values.encode_amounts(budget.book.amounts(budget.book.in_force)),
        )

    async def ListBudgets(
        self, request: wire.ListBudgetsRequest, context: _Context
    ) -> wire.ListBudgetsResponse:
        """Definitions in force, by name."""
        size = calls.page_size(request.page_size, BUDGETS_PAGE_MAX, PAGE_SIZE)
        core = self._leader.require().core
        names = sorted(name for name in core.names() if name > request.page_token)
        page = names[:size]
        return wire.ListBudgetsResponse(
            budgets=[self._in_force(core.budget(name)) for name in page],
            next_page_token=page[-1] if len(names) > size else "",
        )

    def _in_force(self, budget: machine.BudgetMachine) -> budget_pb2.Budget:
        update_time = self._leader.administration.update_times.get(budget.spec.name)
        return budget_codec.encode_budget(budget.spec, version=budget.version, update_time=update_time)

    async def DeleteBudget(
        self, request: wire.DeleteBudgetRequest, context: _Context
    ) -> wire.DeleteBudgetResponse:
        """End a budget and its leases."""
        model.checked_budget_name(request.name)
        await self._leader.administration.delete_budget(
            request.name,
            request_id=request.request_id,
            actor=calls.actor(context),
            cause=causes.current() or "",
        )
        return wire.DeleteBudgetResponse()

    # Holders

    async def HoldLeases(  # type: ignore[override]  # it writes to the context, and yields nothing
        self, request_iterator: AsyncIterator[wire.HoldLeasesRequest], context: _Context
    ) -> None:
        """Hold leases on one connection."""
        await holding.hold(self._leader, request_iterator, context)

    async def AcquireLease(
        self, request: wire.AcquireLeaseRequest, context: _Context
    ) -> wire.AcquireLeaseResponse:
        """Take a lease by one call."""
        model.checked_budget_name(request.budget, field_name="budget")
        process = common_codec.decode_process(request.process) if request.HasField("process") else None
        async with self._confirmed() as reign:
            grant = await reign.acquire(
                budget=request.budget,
                holder=model.checked_holder_name(request.holder),
                incarnation=_incarnation(request.request_id),
                demand=wire_values.decode_amounts(request.demand, "demand"),
                process=process,
            )
        return wire.AcquireLeaseResponse(grant=lease_codec.encode_grant(grant))

    async def RenewLease(self, request: wire.RenewLeaseRequest, context: _Context) -> wire.RenewLeaseResponse:
        """One report, one grant."""
        report = lease_codec.decode_report(request.report)
        async with self._confirmed() as reign:
            grant = await reign.report_once(report)
        return wire.RenewLeaseResponse(grant=lease_codec.encode_grant(grant))

    async def ReleaseLease(
        self, request: wire.ReleaseLeaseRequest, context: _Context
    ) -> wire.ReleaseLeaseResponse:
        """Give a lease back."""
        release = lease_codec.decode_release(request.release)
        async with self._confirmed() as reign:
            await reign.release_once(release)
        return wire.ReleaseLeaseResponse()

    # Reading

    async def GetBudgetStatus(
        self, request: wire.GetBudgetStatusRequest, context: _Context
    ) -> wire.GetBudgetStatusResponse:
        """One worker's view."""
        model.checked_budget_name(request.budget, field_name="budget")
        if request.worker_id:
            model.checked_holder_name(request.worker_id, field_name="worker_id")
        async with self._confirmed() as reign:
            return reading.status(reign.core.budget(request.budget), request.worker_id)

    async def WatchBudget(
        self, request: wire.WatchBudgetRequest, context: _Context
    ) -> AsyncIterator[wire.WatchBudgetResponse]:
        """The budget now and after each change."""
        model.checked_budget_name(request.budget, field_name="budget")
        first = self._leader.require()
        while not self._draining.is_set():
            if self._leader.require() is not first:
                raise errors.NotLeader
            async with self._confirmed() as reign:
                news, snapshot = reign.news, reading.snapshot(reign, request.budget)
            yield snapshot
            await asyncio.sleep(WATCH_SECONDS)
            await calls.first_of(news.wait(), self._draining.wait())

    async def ExplainLease(
        self, request: wire.ExplainLeaseRequest, context: _Context
    ) -> wire.ExplainLeaseResponse:
        """Why a holder has what it has."""
        model.checked_budget_name(request.budget, field_name="budget")
        model.checked_holder_name(request.holder)
        async with self._confirmed() as reign:
            return reading.explanation(reign, request.budget, request.holder)

    async def ListLedgerEntries(
        self, request: wire.ListLedgerEntriesRequest, context: _Context
    ) -> wire.ListLedgerEntriesResponse:
        """History, newest first."""
        if request.budget:
            model.checked_budget_name(request.budget, field_name="budget")
        if request.holder:
            model.checked_holder_name(request.holder)
        page = await self._store.list_ledger(
            budget=request.budget,
            holder=request.holder,
            page_size=calls.page_size(request.page_size, port.PAGE_SIZE_MAX, PAGE_SIZE),
            before_id=_page_token(request.page_token),
        )
        return wire.ListLedgerEntriesResponse(
            entries=[reading.ledger_entry(stored) for stored in page.items],
            next_page_token=str(page.items[-1].id) if page.has_more else "",
        )

    async def PlanShares(self, request: wire.PlanSharesRequest, context: _Context) -> wire.PlanSharesResponse:
        """Dry run."""
        spec = None
        if request.budget:
            model.checked_budget_name(request.budget, field_name="budget")
            async with self._confirmed() as reign:
                spec = reign.core.budget(request.budget).spec
        return reading.planned(request, spec)


def _incarnation(request_id: str) -> str:
    """A request id as an incarnation: what is too short for one is lengthened, the same way each time."""
    if not 1 <= len(request_id) <= 64:
        raise errors.InvalidArgument("request_id: 1 to 64 characters are needed", field="request_id")
    return model.checked_incarnation(request_id.ljust(8, "."), field_name="request_id")


def _page_token(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise errors.InvalidArgument("page_token: is not one that was given", field="page_token")
    return int(text)
