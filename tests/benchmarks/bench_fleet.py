"""Ten thousand holders of one budget on one allocator: processor time, memory, how fast shares follow."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import fleet_driver
import harness
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.rpc import channel as channels

HOLDERS = 10_000
STREAMS = 100
DRIVERS = 2
BUDGET = "fleet"
LIMITS = {"max_concurrent_requests": 20_000.0, "rpm_limit": 600_000.0, "tpm_limit": 60_000_000.0}
TTL_SECONDS = 20.0
REFRESH_SECONDS = 5.0
STEADY_SECONDS = 15.0
NEWCOMERS = 10
#: Part of the holders that leave at once.
LEAVING = 20
#: "One refresh and one second."
SETTLED_SECONDS_MAX = REFRESH_SECONDS + 1.0
WAIT_SECONDS = 40.0

Drivers = Sequence[subprocess.Popen[str]]


def _ask(drivers: Drivers, line: str) -> list[Any]:
    for driver in drivers:
        harness.tell(driver, line)
    return [harness.heard(driver) for driver in drivers]


def _shares(count: int) -> dict[str, float]:
    return {name: limit / count for name, limit in LIMITS.items()}


def _settle(drivers: Drivers, count: int) -> tuple[float, list[Any]]:
    """Seconds from the change until everybody had its share, infinity if that did not happen; last statuses."""
    _ask(drivers, f"expect {json.dumps(_shares(count))}")
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        statuses = _ask(drivers, "status")
        if not any(status["off"] for status in statuses):
            began = min(status["began_at"] for status in statuses)
            return max(status["settled_at"] for status in statuses) - began, statuses
        if time.monotonic() > deadline:
            return float("inf"), statuses
        time.sleep(0.1)


async def _newcomers(address: str, count: int) -> list[float]:
    """Seconds from a newcomer's first report to at least one unit in every dimension."""
    seconds: list[float] = []
    async with channels.open_channel(address, has_own_connection=True) as channel:
        call: Any = wire_grpc.BudgetServiceStub(channel).HoldLeases()
        for number in range(count):
            holder = fleet_driver.Holder(BUDGET, f"newcomer-{number}")
            began = time.monotonic()
            await call.write(wire.HoldLeasesRequest(reports=[holder.report(began)]))
            while not (holder.amounts and min(holder.amounts.values()) >= 1.0):
                async with asyncio.timeout(WAIT_SECONDS):
                    response = await call.read()
                for grant in response.grants:
                    if grant.holder == holder.message.holder and holder.take(grant):
                        await call.write(wire.HoldLeasesRequest(reports=[holder.report(time.monotonic())]))
            seconds.append(time.monotonic() - began)
            await call.write(wire.HoldLeasesRequest(releases=[holder.release()]))
            await asyncio.sleep(0.7)
        call.cancel()
    return seconds


def _measured(name: str, value: float, unit: str, bound: float, **detail: Any) -> harness.Result:
    return harness.Result(name, value, unit, f"<= {bound:g}", value <= bound, detail)


def _steady(pid: int, drivers: Drivers, seconds: float, count: int) -> list[harness.Result]:
    before = _ask(drivers, "status")
    used, began = harness.cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    share = (harness.cpu_seconds(pid) - used) / (time.monotonic() - began)
    after = _ask(drivers, "status")
    latencies = [seconds for status in after for seconds in status["latencies"]]
    driver = sum(b["cpu_seconds"] - a["cpu_seconds"] for a, b in zip(before, after, strict=True))
    mebibytes = harness.rss_bytes(pid) / 2**20
    told = {
        "renewals_per_second": round(len(latencies) / seconds),
        "answered_ms_p50": round(harness.percentile(latencies, 0.5) * 1e3, 1),
        "answered_ms_p99": round(harness.percentile(latencies, 0.99) * 1e3, 1),
        "drivers_cores": round(driver / seconds, 2),
    }
    return [
        _measured(f"fleet of {count}: allocator's processor time", share, "cores", 1.0, **told),
        _measured(
            f"fleet of {count}: allocator's memory",
            mebibytes,
            "MiB",
            500e6 / 2**20,
            peak_mebibytes=round(harness.rss_peak_bytes(pid) / 2**20),
        ),
    ]


def _run(plane: harness.Plane, drivers: Drivers, count: int, *, steady: float) -> list[harness.Result]:
    pid = plane.children[0].pid
    used = harness.cpu_seconds(pid)
    _ask(drivers, "join")
    joined, statuses = _settle(drivers, count)
    storm = {
        "cpu_seconds": round(harness.cpu_seconds(pid) - used, 1),
        "off": sum(status["off"] for status in statuses),
        "off_example": next((s["off_example"] for s in statuses if s["off_example"]), None),
    }
    results = [
        _measured(f"fleet: {count} join at once, all at their share", joined, "s", SETTLED_SECONDS_MAX, **storm)
    ]
    time.sleep(REFRESH_SECONDS)
    results += _steady(pid, drivers, steady, count)
    seconds = asyncio.run(_newcomers(plane.addresses[0], NEWCOMERS))
    results.append(
        _measured(
            f"fleet of {count}: a newcomer's first useful grant, worst of {len(seconds)}",
            max(seconds),
            "s",
            1.0,
            median_ms=round(harness.median(seconds) * 1e3),
        )
    )
    used = harness.cpu_seconds(pid)
    leaving = count // LEAVING // len(drivers)
    _ask(drivers, f"leave {leaving}")
    left, statuses = _settle(drivers, count - leaving * len(drivers))
    results.append(
        _measured(
            f"fleet of {count}: 5% leave, all at their share",
            left,
            "s",
            SETTLED_SECONDS_MAX,
            cpu_seconds=round(harness.cpu_seconds(pid) - used, 1),
            off=sum(status["off"] for status in statuses),
        )
    )
    return results


def run() -> list[harness.Result]:
    """All figures of the fleet."""
    count = 2_000 if harness.is_quick() else HOLDERS
    with harness.control_plane() as plane, contextlib.ExitStack() as children:
        harness.put_budget(
            plane.addresses, BUDGET, LIMITS, ttl_seconds=TTL_SECONDS, refresh_seconds=REFRESH_SECONDS
        )
        drivers = []
        for number in range(DRIVERS):
            size = [str(count // DRIVERS), str(STREAMS // DRIVERS), str(REFRESH_SECONDS)]
            arguments = [plane.addresses[0], BUDGET, f"d{number}-", *size]
            driver, _ = children.enter_context(harness.child_program("fleet_driver", *arguments))
            drivers.append(driver)
        return _run(plane, drivers, count, steady=5.0 if harness.is_quick() else STEADY_SECONDS)


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
