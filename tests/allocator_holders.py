"""Holders for the tests of the allocator service, and an auditor of what they truly have.

Holders are the product's own `core.budget.holder.Holder` over a real HoldLeases stream, driven by a few lines
here, so that a test can cut, delay and freeze between any two steps. The auditor believes neither side: it has
its own list of admissions and calls.
"""

import asyncio
import bisect
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from allocator_kit import now
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.api.budget.v1 import lease_pb2
from leasehold.core import errors, processes
from leasehold.core.budget import holder, limiter, messages, quantity
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import lease_codec


class Auditor:
    """Counts what holders truly have and do, from their own event loop, so that no two events are at once.

    `look` sums what every holder could still spend or has spent and not cooled; admissions and calls are
    recorded apart, and judged as a provider does, over sliding windows.
    """

    def __init__(self, limits: Mapping[str, float], *, window_seconds: float = 2.0) -> None:
        self.limits = dict(limits)
        self.window_seconds = window_seconds
        self.holders: list[DrivenHolder] = []
        self.highest: dict[str, float] = dict.fromkeys(limits, 0.0)
        self.admissions: list[tuple[float, float]] = []
        self.calls = 0
        self.calls_highest = 0
        self.looks = 0

    def look(self) -> None:
        self.looks += 1
        at = now()
        for name, limit in self.limits.items():
            total = sum(each.truly_held(name, at) for each in self.holders)
            self.highest[name] = max(self.highest[name], total)
            assert total <= limit + 1e-6, (
                f"{total:g} of {name} are held at {at:.3f}, the limit is {limit:g}: "
                + ", ".join(f"{each.name} {each.truly_held(name, at):g}" for each in self.holders)
            )

    def admitted(self, at: float, requests: float) -> None:
        bisect.insort(self.admissions, (at, requests))
        self.calls += 1
        self.calls_highest = max(self.calls_highest, self.calls)

    def ended(self) -> None:
        self.calls -= 1

    def busiest_window(self) -> float:
        """Most requests admitted in any window of the provider's."""
        worst = total = 0.0
        start = 0
        for at, amount in self.admissions:
            total += amount
            while self.admissions[start][0] <= at - self.window_seconds:
                total -= self.admissions[start][1]
                start += 1
            worst = max(worst, total)
        return worst

    def check(self) -> None:
        """Assert that nothing was ever above a limit."""
        self.look()
        assert self.looks > 1
        if "rpm_limit" in self.limits:
            assert self.busiest_window() <= self.limits["rpm_limit"]
        if "max_concurrent_requests" in self.limits:
            assert self.calls_highest <= self.limits["max_concurrent_requests"]


class DrivenHolder:
    """The product's holder on a stream of its own, made to reconnect, and to spend, by the test."""

    def __init__(
        self,
        addresses: list[str],
        name: str,
        *,
        budget: str = "llm",
        incarnation: str | None = None,
        process: processes.ProcessKey | None = None,
        auditor: Auditor | None = None,
        is_active: bool = True,
    ) -> None:
        self.name = name
        self.addresses = addresses
        self.core = holder.Holder(
            budget=budget, name=name, incarnation=incarnation or uuid.uuid4().hex, process=process
        )
        if is_active:
            self.core.declare_activity(is_active=True, current_load=0.0, active_tasks=0)
        self.auditor = auditor
        #: (instant, whether it was an answer, the grant) of everything heard.
        self.heard: list[tuple[float, messages.Grant]] = []
        #: Instants at which reports were sent, by sequence.
        self.sent: dict[int, float] = {}
        self.failures: list[errors.LeaseholdError] = []
        self._release: messages.Release | None = None
        self._poke = asyncio.Event()
        self._sessions = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[None]] = set()
        if auditor is not None:
            auditor.holders.append(self)

    # What it has

    def has(self, name: str = "max_concurrent_requests") -> float:
        """What it may own now, units."""
        self.core.tick(now())
        held = self.core.limiter.stocks.get(name)
        return held.cap / quantity.MICRO if held is not None else 0.0

    def truly_held(self, name: str, at: float) -> float:
        """In use, cooling, and free while its lease lasts; units."""
        limits = self.core.limiter
        limits.fold(at)
        held = limits.stocks.get(name)
        if held is None:
            return 0.0
        if hasattr(held, "advance"):
            held.advance(at)
        amount = held.held if at < limits.expires_at else held.held - max(0, held.free)
        limits.reopen(at)
        return amount / quantity.MICRO

    @property
    def expires_at(self) -> float:
        return self.core.limiter.expires_at

    @property
    def is_held(self) -> bool:
        self.core.tick(now())
        return self.core.state is holder.HolderState.HELD

    def answers_since(self, at: float) -> list[tuple[float, messages.Grant]]:
        """Renewals that were answered after `at`."""
        return [(when, grant) for when, grant in self.heard if when > at and grant.answered_sequence]

    def renewed_since(self, at: float) -> list[messages.Grant]:
        """Answers to reports that were sent after `at`."""
        return [g for _, g in self.heard if g.answered_sequence and self.sent[g.answered_sequence] > at]

    # Connection

    def start(self) -> "DrivenHolder":
        self._tasks = [asyncio.create_task(self._run())]
        return self

    def poke(self) -> None:
        self._poke.set()

    def spend(self, *, calls: int, call_seconds: float = 0.05, requests: float = 1) -> None:
        """Admit as fast as the lease allows, with at most so many calls in flight, until `close`."""
        self._tasks.append(asyncio.create_task(self._spend(calls, call_seconds, requests)))

    async def release(self) -> None:
        """Give the lease back on the connection, and fall silent."""
        self._release = self.core.make_release(now())
        self.poke()
        await asyncio.wait(self._tasks[:1])
        await self.close()

    def check(self) -> None:
        """Raise what its tasks raised, such as the auditor's verdict."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Fall silent, as a process that is killed; raises what `check` does."""
        for task in (*self._tasks, *self._calls):
            if not task.done():
                task.cancel()
        await asyncio.gather(*self._tasks, *self._calls, return_exceptions=True)
        self.check()

    async def _run(self) -> None:
        choices = itertools.cycle(self.addresses)
        address, unreachable = next(choices), ""
        while self.core.state is not holder.HolderState.ENDED:
            try:
                await self._connection(address)
            except errors.LeaseholdError as error:
                self.failures.append(error)
                if isinstance(error, errors.NotLeader):
                    hint = error.leader_address
                    address = hint if hint in self.addresses and hint != unreachable else next(choices)
                else:
                    unreachable, address = address, next(choices)
            await asyncio.sleep(0.02)

    async def _connection(self, address: str) -> None:
        session = next(self._sessions)
        async with channels.open_channel(address, has_own_connection=True) as channel:
            stream = wire_grpc.BudgetServiceStub(channel).HoldLeases()
            self.core.connected(session)
            writing = asyncio.create_task(self._write(stream))
            try:
                while isinstance(response := await stream.read(), wire.HoldLeasesResponse):
                    self._take(session, response)
                raise errors.Unavailable("the allocator ended the stream")
            except grpc.RpcError as error:
                raise rpc_errors.from_rpc_error(error) from error
            finally:
                self.core.disconnected(session)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                stream.cancel()

    def _take(self, session: int, response: wire.HoldLeasesResponse) -> None:
        at = now()
        for message in response.grants:
            grant = lease_codec.decode_grant(message)
            self.heard.append((at, grant))
            self.core.granted(session, grant, at)
        for refusal in response.refusals:
            self.core.refused(session, lease_codec.decode_refusal(refusal), at)
        if self.auditor is not None:
            self.auditor.look()
        self.poke()

    async def _write(self, stream: Any) -> None:
        while True:
            self._poke.clear()
            if self._release is not None:
                await stream.write(wire.HoldLeasesRequest(releases=[lease_codec.encode_release(self._release)]))
                await stream.done_writing()
                return
            at = now()
            self.core.tick(at)
            wait = self.core.report_due(at) - at
            if wait <= 0:
                report = lease_codec.encode_report(self.core.make_report(at))
                self.sent[report.sequence] = at
                try:
                    await stream.write(wire.HoldLeasesRequest(reports=[report]))
                except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                    return
                continue
            with contextlib.suppress(TimeoutError):
                # Not asyncio.wait_for, which may lose a cancellation.
                async with asyncio.timeout(min(wait, 0.2)):
                    await self._poke.wait()

    async def _spend(self, calls: int, call_seconds: float, requests: float) -> None:
        while True:
            at = now()
            self.core.tick(at)
            limits = self.core.limiter
            if limits.terms is not None and len(self._calls) < calls:
                cost = limits.cost(requests=requests)
                if limits.try_admit(cost, at):
                    if self.auditor is not None:
                        self.auditor.admitted(at, requests)
                        self.auditor.look()
                    call = asyncio.create_task(self._call(cost, at, call_seconds))
                    self._calls.add(call)
                    call.add_done_callback(self._calls.discard)
                    continue
            self.poke()
            await asyncio.sleep(0.005)

    async def _call(self, cost: limiter.Cost, at: float, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            self.core.limiter.release(cost, {}, at, now())
            if self.auditor is not None:
                self.auditor.ended()
            self.poke()


@contextlib.asynccontextmanager
async def running(*holders: DrivenHolder) -> AsyncIterator[None]:
    """Holders that run for the length of the block, at whose end what went wrong in them is raised."""
    for each in holders:
        each.start()
    try:
        yield
    finally:
        await asyncio.gather(*(each.close() for each in holders))


def report(name: str, sequence: int, **fields: Any) -> lease_pb2.LeaseReport:
    """A report made by hand."""
    holdings = fields.pop("holdings", None)
    message = lease_pb2.LeaseReport(
        **{
            "budget": "llm",
            "holder": name,
            "incarnation": f"{name}-incarnation",
            "sequence": sequence,
            **fields,
        }
    )
    if holdings is not None:
        message.holdings.SetInParent()
        message.holdings.held.update(holdings)
    return message
