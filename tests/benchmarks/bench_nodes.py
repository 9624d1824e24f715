"""A thousand agents that report to one allocator: its processor time. One of a hundred dies: it is LOST."""

import contextlib
import json
import sys
import time
from typing import Any

import grpc
import harness
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc

NODES = 1_000
FEW_NODES = 100
DRIVERS = 2
STEADY_SECONDS = 20.0
WAIT_SECONDS = 30.0
DEATHS = 3
CORES_MAX = 0.5
LOST_SECONDS_MAX = 5.0


def _ask(driver: Any, line: str) -> Any:
    harness.tell(driver, line)
    return harness.heard(driver)


def _measured(name: str, value: float, unit: str, bound: float, **detail: Any) -> harness.Result:
    return harness.Result(name, value, unit, f"<= {bound:g}", value <= bound, detail)


@contextlib.contextmanager
def _fleet(address: str, count: int) -> Any:
    """Drivers whose agents have all been answered."""
    with contextlib.ExitStack() as children:
        drivers = []
        for number in range(DRIVERS):
            arguments = [address, f"d{number}-", str(count // DRIVERS)]
            driver, _ = children.enter_context(harness.child_program("nodes_driver", *arguments))
            drivers.append(driver)
        deadline = time.monotonic() + WAIT_SECONDS
        while sum(_ask(driver, "status")["answered"] for driver in drivers) < count // DRIVERS * DRIVERS:
            if time.monotonic() > deadline:
                raise TimeoutError("not every agent was answered")
            time.sleep(0.2)
        yield drivers


def _reporting(plane: harness.Plane, count: int, seconds: float) -> list[harness.Result]:
    """What a fleet costs that only reports."""
    pid = plane.children[0].pid
    with _fleet(plane.addresses[0], count) as drivers:
        # From here on all are at the pace of the whole fleet.
        time.sleep(3.0)
        before = [_ask(driver, "status") for driver in drivers]
        used, began = harness.cpu_seconds(pid), time.monotonic()
        time.sleep(seconds)
        share = (harness.cpu_seconds(pid) - used) / (time.monotonic() - began)
        after = [_ask(driver, "status") for driver in drivers]
    broken = [text for status in after for text in status["broken"]]
    if broken:
        raise RuntimeError(f"agents were cut off: {broken}")
    latencies = [latency for status in after for latency in status["latencies"]]
    driver = sum(b["cpu_seconds"] - a["cpu_seconds"] for a, b in zip(before, after, strict=True))
    told = {
        "reports_per_second": round(len(latencies) / seconds),
        "intervals_seconds": after[0]["intervals"],
        "answered_ms_p50": round(harness.percentile(latencies, 0.5) * 1e3, 1),
        "answered_ms_p99": round(harness.percentile(latencies, 0.99) * 1e3, 1),
        "allocator_mebibytes": round(harness.rss_bytes(pid) / 2**20),
        "drivers_cores": round(driver / seconds, 2),
    }
    return [_measured(f"nodes: {count} report, allocator's processor time", share, "cores", CORES_MAX, **told)]


def _lost(address: str, name: str, seconds: float) -> float:
    """When a node was declared LOST, on CLOCK_MONOTONIC."""
    with grpc.insecure_channel(address) as channel:
        stub = wire_grpc.NodeServiceStub(channel)
        for response in stub.WatchNodes(wire.WatchNodesRequest(name=name), timeout=seconds):
            if any(node.state == node_pb2.NODE_STATE_LOST for node in response.nodes):
                return time.monotonic()
    raise TimeoutError(f"{name} was not lost")


def _deaths(plane: harness.Plane, count: int, deaths: int) -> list[harness.Result]:
    """How long a dead host goes unnoticed."""
    took, silent = [], []
    with _fleet(plane.addresses[0], count) as drivers:
        for number in range(deaths):
            name = f"d0-{number:04d}"
            death = _ask(drivers[0], f"die {name}")
            lost_at = _lost(plane.addresses[0], name, WAIT_SECONDS)
            took.append(lost_at - death["died_at"])
            silent.append(round(lost_at - death["reported_at"], 2))
    return [
        _measured(
            f"nodes: a dead host of {count} is LOST, worst of {deaths}",
            max(took),
            "s",
            LOST_SECONDS_MAX,
            median_seconds=round(harness.median(took), 2),
            since_last_report_seconds=json.dumps(silent),
        )
    ]


def run() -> list[harness.Result]:
    """All figures of nodes."""
    is_quick = harness.is_quick()
    with harness.control_plane() as plane:
        results = _deaths(plane, FEW_NODES, 1 if is_quick else DEATHS)
    with harness.control_plane() as plane:
        count, seconds = (200, 3.0) if is_quick else (NODES, STEADY_SECONDS)
        return results + _reporting(plane, count, seconds)


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
