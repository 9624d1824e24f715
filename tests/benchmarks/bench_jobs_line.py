"""A thousand nodes, all full, and a hundred thousand jobs in line in a thousand shapes.

The jobs are submitted over gRPC, and no two are alike in what they run. Then, at random instants, jobs end and
others are submitted; each time the leader looks who may start. What counts is how long it takes from the first
event that may have led to an allocation until that is committed, as the leader's own histogram tells. For the
end of a job that is two commits, its release and what takes its place.

After that the leader is killed while jobs go on ending, and its standby takes over.
"""

import contextlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import harness
import line_driver
import psycopg
from leasehold import client
from leasehold.api.budget.v1 import budget_service_pb2 as budget_wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as budget_grpc
from leasehold.api.common.v1 import metrics_service_pb2 as metrics_wire
from leasehold.api.common.v1 import metrics_service_pb2_grpc as metrics_grpc
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc as wire_grpc
from leasehold.core.job import model
from leasehold.core.placement import model as placement
from leasehold.rpc import job_codec

NODES, JOBS, SHAPES = 1_000, 100_000, 1_000
ENDS_PER_SECOND = 50.0
SUBMITS_PER_SECOND = 10.0
STEADY_SECONDS = 40.0
WAIT_SECONDS = 120.0
COMMIT_SECONDS_MAX, RSS_MB_MAX, TAKEOVER_SECONDS_MAX = 0.050, 400.0, 3.0

_BUCKET = re.compile(r'leasehold_job_placement_seconds_bucket\{le="([^"]+)"\} ([0-9.e+]+)')


def jobs(count: int) -> Iterator[model.JobSpec]:
    """Of 1,000 shapes, each with a name, a command and a longest run of its own."""
    chosen = random.Random(7)
    for number in range(count):
        shape = number % SHAPES
        yield model.JobSpec(
            name=f"encode-{number:06d}",
            required=placement.Resources(1 + shape % 8, (1 + shape // 8) * 2**29),
            node_selector={"zone": f"z{shape % line_driver.ZONES}"} if shape % 5 == 0 else {},
            spreading=placement.Spreading.SPREAD if shape % 7 == 0 else placement.Spreading.PACK,
            template=line_driver.TEMPLATE,
            parameters={"input": f"shard-{number:06d}.tar", "seed": str(number)},
            max_run_seconds=None if number % 10 == 0 else float(chosen.randint(60, 86_400)),
            priority=chosen.randint(0, 5),
            wait_for_capacity=True,
        )


def _leads(address: str) -> bool:
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        budget_grpc.BudgetServiceStub(channel).ListBudgets(budget_wire.ListBudgetsRequest(), timeout=1.0)
        return True
    return False


def _counts(address: str) -> dict[float, float]:
    """How many allocations took at most so many seconds, since the process began."""
    with grpc.insecure_channel(address) as channel:
        stub = metrics_grpc.MetricsServiceStub(channel)
        text = stub.ExposeMetrics(metrics_wire.ExposeMetricsRequest(), timeout=5.0).text
    return {float(bound): float(count) for bound, count in _BUCKET.findall(text)}


def _quantile(counts: dict[float, float], part: float) -> float:
    """Within the bucket in which it lies, by its share of it."""
    wanted, below, bound_below = part * counts[float("inf")], 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= wanted:
            is_last = bound == float("inf")
            return (
                bound_below
                if is_last
                else bound_below + (bound - bound_below) * (wanted - below) / (count - below)
            )
        below, bound_below = count, bound
    raise RuntimeError("nothing was placed")


class Fleet:
    """The agents."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def ask(self, line: str) -> Any:
        harness.tell(self._driver, line)
        told = harness.heard(self._driver)
        if told["broken"]:
            raise RuntimeError(f"agents broke: {told['broken']}")
        return told

    def settled(self, nodes: int) -> Any:
        """Once all are connected, and nothing more starts."""
        deadline, since, running = time.monotonic() + WAIT_SECONDS, time.monotonic(), -1
        while time.monotonic() < deadline:
            told = self.ask("status")
            if told["connected"] < nodes or not told["running"] or told["running"] != running:
                since, running = time.monotonic(), told["running"]
            elif time.monotonic() - since > 3.0:
                return told
            time.sleep(0.25)
        raise TimeoutError(f"the fleet did not settle: {told}")


def _submit_some(address: str, stop: threading.Event) -> None:
    """Submit jobs one by one until told to stop."""
    chosen, specs = random.Random(11), jobs(JOBS)
    with grpc.insecure_channel(address) as channel:
        stub = wire_grpc.JobServiceStub(channel)
        while not stop.wait(chosen.expovariate(SUBMITS_PER_SECOND)):
            stub.SubmitJob(wire.SubmitJobRequest(spec=job_codec.encode_spec(next(specs))), timeout=10.0)


class BareCommits:
    """What a commit takes beside all that, of a row that nobody else wants: the machine's own share."""

    def __init__(self, dsn: str) -> None:
        self.seconds: list[float] = []
        self._dsn = dsn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS bare (n bigint)")
            connection.execute("INSERT INTO bare VALUES (0)")
            while not self._stop.wait(0.1):
                began = time.perf_counter()
                connection.execute("UPDATE bare SET n = n + 1")
                self.seconds.append(time.perf_counter() - began)

    def __enter__(self) -> "BareCommits":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _steady(plane: harness.Plane, fleet: Fleet, leader: str, seconds: float) -> harness.Result:
    address, pid = leader, plane.children[plane.addresses.index(leader)].pid
    fleet.ask(f"pace {ENDS_PER_SECOND}")
    # What began before is not counted.
    time.sleep(2.0)
    fleet.ask("status")
    stop = threading.Event()
    submitting = threading.Thread(target=_submit_some, args=(address, stop))
    before, used, began = _counts(address), harness.cpu_seconds(pid), time.monotonic()
    with BareCommits(plane.stack.postgres_dsn) as bare:
        submitting.start()
        time.sleep(seconds)
        stop.set()
        submitting.join()
    after, share = _counts(address), (harness.cpu_seconds(pid) - used) / (time.monotonic() - began)
    told = fleet.ask("status")
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
    p99 = _quantile(counts, 0.99)
    return harness.Result(
        "jobs: full line, wake to commit of the placement, p99",
        p99 * 1e3,
        "ms",
        f"< {COMMIT_SECONDS_MAX * 1e3:g}",
        p99 < COMMIT_SECONDS_MAX,
        {
            "p50_ms": round(_quantile(counts, 0.5) * 1e3, 1),
            "placements_per_second": round(counts[float("inf")] / seconds, 1),
            "ends_per_second": round(told["ends"] / seconds, 1),
            "agent_end_to_assignment_ms_p50": round(harness.percentile(told["latencies"], 0.5) * 1e3, 1),
            "agent_end_to_assignment_ms_p99": round(harness.percentile(told["latencies"], 0.99) * 1e3, 1),
            "bare_commit_ms_p50": round(harness.percentile(bare.seconds, 0.5) * 1e3, 1),
            "bare_commit_ms_p99": round(harness.percentile(bare.seconds, 0.99) * 1e3, 1),
            "load_average": round(os.getloadavg()[0], 1),
            "allocator_cores": round(share, 2),
            "running": told["running"],
        },
    )


def _logged(child: Any, event: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        for line in child.log_path.read_text(errors="replace").splitlines():
            if line.startswith("{") and f'"{event}"' in line and (told := json.loads(line))["event"] == event:
                return dict(told, seen_at=time.monotonic())
        time.sleep(0.01)
    raise TimeoutError(f"{child.name} did not tell {event}")


def _takeover(plane: harness.Plane, leader: str) -> list[harness.Result]:
    """Kill the leader, and see when its standby has read the line and placed the first job."""
    number = 1 - plane.addresses.index(leader)
    standby, address = plane.children[number], plane.addresses[number]
    killed_at = time.monotonic()
    plane.children[1 - number].kill()
    elected_at = _logged(standby, "leader_elected")["seen_at"]
    known = _logged(standby, "jobs_known")
    deadline = time.monotonic() + WAIT_SECONDS
    while not _counts(address).get(float("inf")):
        if time.monotonic() > deadline:
            raise TimeoutError("the new leader placed nothing")
        time.sleep(0.02)
    placed_at = time.monotonic()
    loading = known["read_seconds"] + known["restore_seconds"]
    rss = harness.rss_peak_bytes(standby.pid) / 1e6
    return [
        harness.Result(
            "jobs: full line, a takeover loads it",
            loading,
            "s",
            f"< {TAKEOVER_SECONDS_MAX:g}",
            loading < TAKEOVER_SECONDS_MAX,
            {
                "jobs": known["jobs"],
                "kill_to_election_s": round(elected_at - killed_at, 2),
                "read_s": known["read_seconds"],
                "restore_s": known["restore_seconds"],
                "election_to_known_s": round(known["seen_at"] - elected_at, 2),
                "known_to_first_placement_s": round(placed_at - known["seen_at"], 2),
            },
        ),
        _memory("jobs: full line, memory of the next leader, at most", rss),
    ]


def _memory(name: str, megabytes: float) -> harness.Result:
    return harness.Result(name, megabytes, "MB", f"< {RSS_MB_MAX:g}", megabytes < RSS_MB_MAX)


def _submitted(addresses: Sequence[str], count: int) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    with client.connect_blocking(addresses) as leasehold:
        taken = sum(bool(verdict.job_id) for verdict in leasehold.jobs.submit_many(jobs(count)))
    if taken != count:
        raise RuntimeError(f"{taken} of {count} jobs were taken")
    return time.monotonic() - began


def run() -> list[harness.Result]:
    """All figures of the line."""
    nodes, count, seconds = (100, 5_000, 5.0) if harness.is_quick() else (NODES, JOBS, STEADY_SECONDS)
    with harness.control_plane(replicas=2) as plane:
        leader = next(address for address in plane.addresses if _leads(address))
        pid = plane.children[plane.addresses.index(leader)].pid
        took = _submitted(plane.addresses, count)
        arguments = [",".join(plane.addresses), str(nodes)]
        with harness.child_program("line_driver", *arguments) as (driver, _):
            fleet = Fleet(driver)
            running = fleet.settled(nodes)["running"]
            # What has started makes room for as many in line.
            took += _submitted(plane.addresses, running)
            placed = _steady(plane, fleet, leader, seconds)
            placed.detail["submitting_s"] = round(took, 1)
            memory = _memory(
                "jobs: full line, memory of the leader, at most", harness.rss_peak_bytes(pid) / 1e6
            )
            return [placed, memory, *_takeover(plane, leader)]


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
