"""Renewals per second of a real allocator, and of a bare grpc.aio echo of the same messages in the same run."""

import asyncio
import itertools
import sys
import time
from typing import Any

import grpc
import harness
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.api.budget.v1 import lease_pb2

STREAMS = 8
IN_FLIGHT_PER_STREAM = 8
ROUND_SECONDS = 3.0
ROUNDS = 5
BUDGET = "bench"


class Renewer:
    """One holder that renews as a busy client does: holdings of three dimensions, eight cooling steps."""

    def __init__(self, number: int) -> None:
        self.name = f"holder-{number}"
        self.sequence = 0
        self.lease_id = 0
        self.version = 0

    def report(self) -> lease_pb2.LeaseReport:
        """The next report."""
        self.sequence += 1
        held = {"max_concurrent_requests": 1.0, "rpm_limit": 100.0, "tpm_limit": 5000.0}
        report = lease_pb2.LeaseReport(
            budget=BUDGET,
            holder=self.name,
            incarnation=f"inc-{self.name}",
            sequence=self.sequence,
            lease_id=self.lease_id,
            grant_version=self.version,
            is_active=True,
        )
        report.holdings.held.update(held if self.lease_id else {})
        for dimension in ("rpm_limit", "tpm_limit") if self.lease_id else ():
            steps = [float(step + 1) for step in range(8)]
            report.holdings.cooling.add(dimension=dimension, amounts=[10.0] * 8, remaining_seconds=steps)
        return report

    def take(self, grant: Any) -> None:
        """An answer (an echo carries no lease, so the first real one stays)."""
        self.lease_id, self.version = grant.lease_id, grant.version


async def _streams(
    address: str, method: str, holders: list[Renewer], seconds: float, *, is_echo: bool
) -> float:
    """Answers per second over 8 streams with 8 reports in flight on each."""
    answered = 0
    stop_at = time.monotonic() + seconds

    async def run(mine: list[Renewer]) -> None:
        nonlocal answered
        async with grpc.aio.insecure_channel(
            address, options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel:
            call: Any
            if is_echo:
                response: Any = wire.HoldLeasesRequest
                call = channel.stream_stream(
                    method,
                    request_serializer=wire.HoldLeasesRequest.SerializeToString,
                    response_deserializer=response.FromString,
                )()
            else:
                call = wire_grpc.BudgetServiceStub(channel).HoldLeases()
            known = {holder.name: holder for holder in mine}
            for holder in mine:
                await call.write(wire.HoldLeasesRequest(reports=[holder.report()]))
            while time.monotonic() < stop_at:
                response = await call.read()
                for item in response.reports if is_echo else response.grants:
                    holder = known[item.holder]
                    if not is_echo:
                        holder.take(item)
                        if not item.answered_sequence:
                            continue
                    answered += 1
                    await call.write(wire.HoldLeasesRequest(reports=[holder.report()]))
            call.cancel()

    began = time.monotonic()
    await asyncio.gather(*(run(holders[n::STREAMS]) for n in range(STREAMS)))
    return answered / (time.monotonic() - began)


async def _unary(address: str, method: str, holders: list[Renewer], seconds: float, *, is_echo: bool) -> float:
    answered = 0
    stop_at = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        if is_echo:
            call: Any = channel.unary_unary(
                method,
                request_serializer=wire.RenewLeaseRequest.SerializeToString,
                response_deserializer=wire.RenewLeaseRequest.FromString,
            )
        else:
            call = wire_grpc.BudgetServiceStub(channel).RenewLease

        async def run(holder: Renewer) -> None:
            nonlocal answered
            while time.monotonic() < stop_at:
                answer = await call(wire.RenewLeaseRequest(report=holder.report()))
                if not is_echo:
                    holder.take(answer.grant)
                answered += 1

        began = time.monotonic()
        await asyncio.gather(*(run(holder) for holder in holders))
    return answered / (time.monotonic() - began)


def _measure(kind: str, echo: str, allocator: str, numbers: Any) -> harness.Result:
    drive = _streams if kind == "streams" else _unary
    method = "/bench.Echo/Stream" if kind == "streams" else "/bench.Echo/Unary"
    ratios, rates, echoes = [], [], []
    count = STREAMS * IN_FLIGHT_PER_STREAM
    for _ in range(ROUNDS):
        fresh = [Renewer(next(numbers)) for _ in range(count)]
        echoes.append(asyncio.run(drive(echo, method, fresh, ROUND_SECONDS, is_echo=True)))
        holders = [Renewer(next(numbers)) for _ in range(count)]
        rates.append(asyncio.run(drive(allocator, "", holders, ROUND_SECONDS, is_echo=False)))
        ratios.append(rates[-1] / echoes[-1])
    ratio = harness.median(ratios)
    return harness.Result(
        f"renewals on {kind}, {count} in flight / bare echo",
        ratio,
        "ratio",
        ">= 0.7",
        ratio >= 0.7,
        {
            "renewals_per_second": round(harness.median(rates)),
            "echoes_per_second": round(harness.median(echoes)),
            "ratios": [round(value, 2) for value in ratios],
        },
    )


def run() -> list[harness.Result]:
    """Both ratios."""
    numbers = itertools.count()
    with harness.control_plane() as plane, harness.child_program("echo_server") as (_, port):
        limits = {"max_concurrent_requests": 100_000, "rpm_limit": 1e6, "tpm_limit": 1e8}
        harness.put_budget(plane.addresses, BUDGET, limits, ttl_seconds=10.0)
        echo = f"127.0.0.1:{port}"
        return [_measure(kind, echo, plane.addresses[0], numbers) for kind in ("streams", "unary")]


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
