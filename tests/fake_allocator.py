"""A small allocator for tests of the client: real gRPC on a thread of its own, shares as the test says.

It checks what a real one relies on, whatever the test is about: sequences grow, and a holder never claims to
hold more than it was ever granted.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self

# Read when gRPC is loaded: tests fork, and gRPC's own handling of that crashes children.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import messages, model
from leasehold.core.budget.quantity import MICRO
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import lease_codec, options

CALLS, REQUESTS, TOKENS, SLOTS = "max_concurrent_requests", "rpm_limit", "tpm_limit", "num_workers"
LIMITS = {CALLS: 40, REQUESTS: 800, TOKENS: 40_000, SLOTS: 40}

FIRST_EPOCH = epochs.Epoch(1, 1)


class Stream:
    """What is written to one client; one message at a time, as gRPC wants it."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._lock = asyncio.Lock()

    async def write(self, response: Any) -> None:
        """Send one message."""
        async with self._lock:
            await self._context.write(response)


def terms_of(limits: Mapping[str, float] = LIMITS, **changes: Any) -> messages.Terms:
    """Terms with these limits; dimensions of other names are rates."""
    given: dict[str, Any] = {
        "dimensions": tuple(
            model.Dimension(
                name=name,
                kind=model.STANDARD_KINDS.get(name, model.DimensionKind.RATE),
                limit=round(limit * MICRO),
                window_seconds=changes.get("window_seconds", 60.0),
            )
            for name, limit in limits.items()
        ),
        "arrival_jitter_seconds": 1.0,
        "max_call_seconds": 600.0,
        "activity_timeout_seconds": 30.0,
        "safe_ttl_seconds": 60.0,
        "max_tokens_per_request": 0,
        "charged_at": model.ChargedAt.ARRIVAL,
    }
    changes.pop("window_seconds", None)
    return messages.Terms(**(given | changes))


class Holding:
    """What the allocator knows of one incarnation."""

    def __init__(self, lease_id: int, amounts: dict[str, float]) -> None:
        self.lease_id = lease_id
        self.version = 1
        self.sequence = 0
        self.amounts = amounts
        self.granted_max = dict(amounts)
        self.stream: Stream | None = None
        self.is_active = False
        self.acknowledged = 0


class FakeAllocator:
    """``with FakeAllocator() as allocator: client.connect(allocator.address)``."""

    def __init__(
        self,
        *,
        terms: messages.Terms | None = None,
        amounts: Mapping[str, float] = LIMITS,
        ttl_seconds: float = 10.0,
        refresh_seconds: float = 2.0,
        epoch: epochs.Epoch = FIRST_EPOCH,
        budgets: tuple[str, ...] = ("llm-api",),
    ) -> None:
        self.terms = terms or terms_of()
        self.amounts = dict(amounts)
        self.ttl_seconds, self.refresh_seconds, self.epoch = ttl_seconds, refresh_seconds, epoch
        self.budgets = set(budgets)
        self.leader_address: str | None = None
        self.is_silent = False
        self.reports: list[messages.Report] = []
        self.releases: list[messages.Release] = []
        self.holdings: dict[tuple[str, str], Holding] = {}
        self.violations: list[str] = []
        self.streams = 0
        self._streams: set[asyncio.Task[Any]] = set()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    # Life

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._serve(0))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not self.violations, self.violations

    async def _serve(self, port: int) -> None:
        self._server = grpc.aio.server(options=options.server_options())
        handler = grpc.stream_stream_rpc_method_handler(
            self._hold_leases,
            request_deserializer=budget_service_pb2.HoldLeasesRequest.FromString,
            response_serializer=budget_service_pb2.HoldLeasesResponse.SerializeToString,
        )
        service = "leasehold.api.budget.v1.BudgetService"
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"HoldLeases": handler}),)
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        await self._server.start()

    def stop(self) -> None:
        """Stop serving, at once."""
        self._do(self._server.stop(None))

    def restart(self) -> None:
        """Serve again, on the same port."""
        self._do(self._serve(self.port))

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    # What tests do and wait for

    def wait_for(self, is_so: Callable[[], bool], timeout_seconds: float = 5.0) -> None:
        """Until `is_so`, looked at after each thing that happens here."""
        with self._changed:
            assert self._changed.wait_for(is_so, timeout_seconds), "it did not happen in time"

    def cut(self) -> None:
        """Break every stream."""

        async def cancel() -> None:
            for task in list(self._streams):
                task.cancel()

        self._do(cancel())

    def push(self, amounts: Mapping[str, float], budget: str = "llm-api", **changes: Any) -> None:
        """Give every holder of a budget these amounts from now on."""

        async def send() -> None:
            self.amounts = dict(amounts)
            for (name, _), holding in self.holdings.items():
                if name == budget:
                    self._set(holding, amounts)
            await self._send_all(budget, **changes)

        self._do(send())

    def end(self, end: messages.LeaseEnd, budget: str = "llm-api") -> None:
        """The last word to every holder of a budget."""

        async def send() -> None:
            if end is messages.LeaseEnd.BUDGET_DELETED:
                self.budgets.discard(budget)
            await self._send_all(budget, end=end)
            for key in [key for key in self.holdings if key[0] == budget]:
                del self.holdings[key]

        self._do(send())

    def holding(self, holder: str) -> Holding | None:
        """What is known of the newest incarnation of a name."""
        found = [each for (_, key), each in self.holdings.items() if key.split("/")[0] == holder]
        return found[-1] if found else None

    async def _send_all(self, budget: str, **changes: Any) -> None:
        for (name, key), holding in self.holdings.items():
            if name == budget and holding.stream is not None:
                holder, incarnation = key.split("/")
                grant = self._grant(budget, holder, incarnation, holding, 0, **changes)
                with contextlib.suppress(Exception):
                    await holding.stream.write(budget_service_pb2.HoldLeasesResponse(grants=[grant]))

    def _set(self, holding: Holding, amounts: Mapping[str, float]) -> None:
        holding.version += 1
        holding.amounts = dict(amounts)
        for name, units in amounts.items():
            holding.granted_max[name] = max(holding.granted_max.get(name, 0.0), units)

    def _grant(
        self, budget: str, holder: str, incarnation: str, holding: Holding, sequence: int, **changes: Any
    ) -> Any:
        given: dict[str, Any] = {
            "budget": budget,
            "holder": holder,
            "incarnation": incarnation,
            "lease_id": holding.lease_id,
            "epoch": self.epoch,
            "version": holding.version,
            "answered_sequence": sequence,
            "ttl_seconds": self.ttl_seconds if sequence else 0.0,
            "refresh_seconds": self.refresh_seconds if sequence else 0.0,
            "amounts": {name: round(units * MICRO) for name, units in holding.amounts.items()},
            "total_workers": len(self.holdings),
            "active_workers": sum(each.is_active for each in self.holdings.values()),
            "reason": "the test says so",
        }
        return lease_codec.encode_grant(messages.Grant(**(given | changes)))

    # The service

    async def _hold_leases(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """As the real one, without its rules."""
        if self.leader_address is not None:
            await context.abort_with_status(rpc_errors.to_status(errors.NotLeader(self.leader_address)))
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        self.streams += 1
        stream = Stream(context)
        seen: set[str] = set()
        try:
            async for request in request_iterator:
                response = budget_service_pb2.HoldLeasesResponse()
                for message in request.reports:
                    self._take(lease_codec.decode_report(message), stream, seen, response)
                for release in request.releases:
                    self.releases.append(lease_codec.decode_release(release))
                    self.holdings.pop((release.budget, f"{release.holder}/{release.incarnation}"), None)
                if (response.grants or response.refusals) and not self.is_silent:
                    await stream.write(response)
                with self._changed:
                    self._changed.notify_all()
        except asyncio.CancelledError:
            # Of `cut`. Without a status of its own, the client would not be told.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the test")
        finally:
            self._streams.discard(task)
            for holding in self.holdings.values():
                if holding.stream is stream:
                    holding.stream = None
            with self._changed:
                self._changed.notify_all()

    def _take(self, report: messages.Report, stream: Stream, seen: set[str], response: Any) -> None:
        self.reports.append(report)
        if report.budget not in self.budgets:
            refusal = messages.Refusal(
                budget=report.budget,
                holder=report.holder,
                incarnation=report.incarnation,
                sequence=report.sequence,
                reason="NOT_FOUND",
                message=f"there is no budget {report.budget}",
            )
            response.refusals.append(lease_codec.encode_refusal(refusal))
            return
        key = (report.budget, f"{report.holder}/{report.incarnation}")
        holding = self.holdings.get(key)
        if holding is None:
            holding = self.holdings[key] = Holding(len(self.reports), dict(self.amounts))
        if report.sequence <= holding.sequence:
            self.violations.append(f"sequence {report.sequence} after {holding.sequence}")
        if report.holdings is not None:
            for name, micros in report.holdings.held.items():
                if micros > holding.granted_max.get(name, 0.0) * MICRO + 1:
                    self.violations.append(f"{report.holder} holds {micros} of {name}")
        holding.sequence, holding.stream = report.sequence, stream
        holding.is_active, holding.acknowledged = report.is_active, report.grant_version
        terms = self.terms if key[1] not in seen else None
        seen.add(key[1])
        response.grants.append(
            self._grant(report.budget, report.holder, report.incarnation, holding, report.sequence, terms=terms)
        )
