"""The node agent: its cost with 8 workers, how soon it sees a death, how soon the next one has 50 workers."""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import grpc
import harness
from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc as wire_grpc
from leasehold.api.node.v1 import worker_pb2

WORKERS = 8
CROWD = 50
CORE_PERCENT_MAX = 1.0
RSS_MB_MAX = 60.0
DEATH_MS_MAX = 100.0
ADOPTED_SECONDS_MAX = 1.0
_WAIT_SECONDS = 60.0
_MIB = 2**20

_CONFIG = """
node: bench
settings:
  MEMORY_BUDGET_GB: 4
  SYSTEM_RESERVE_GB: 0.05
  MEMORY_THRESHOLD_GB: 0.05
  MEMORY_CHECK_INTERVAL: 30
  WORKER_MEMORY_LIMIT_GB: 0.03125
pools:
  - name: sleepers
    template: command
    min_workers: {count}
    max_workers: {count}
    parameters: {{program: sleep, arguments: ["86394"], stop_seconds: 5}}
    restart: {{initial_seconds: 0.01, max_seconds: 0.01}}
"""


class _Agent:
    """One agent's process on a folder."""

    def __init__(self, folder: pathlib.Path, addresses: str, program: tuple[str, ...] = ()) -> None:
        self.state = folder / "state"
        self.log = folder / "agent.log"
        config = folder / "agent.yaml"
        command = [
            sys.executable,
            "-m",
            "leasehold.nodeagent",
            f"--config={config}",
            f"--state-dir={self.state}",
        ]
        command += [f"--addr={addresses}"]
        if program:
            command = [sys.executable, *program, str(config), str(self.state)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, cwd=folder)

    def running(self) -> list[worker_pb2.WorkerStatus]:
        """Workers that run; none while it does not answer."""
        with (
            contextlib.suppress(grpc.RpcError),
            grpc.insecure_channel(f"unix:{self.state}/agent.sock") as channel,
        ):
            answer = wire_grpc.AgentServiceStub(channel).GetAgentStatus(wire.GetAgentStatusRequest(), timeout=5)
            if answer.pid == self.process.pid:
                return [
                    worker
                    for worker in answer.status.pools[0].workers
                    if worker.state == worker_pb2.WORKER_STATE_RUNNING
                ]
        return []

    def wait_running(self, count: int) -> list[worker_pb2.WorkerStatus]:
        """Until so many run."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while len(found := self.running()) != count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"{len(found)} of {count} workers: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        """SIGKILL: its workers stay."""
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def _folder(count: int) -> Iterator[pathlib.Path]:
    """A folder with a configuration; what its agents left has ended after the block."""
    with tempfile.TemporaryDirectory(prefix="leasehold-bench-") as name:
        folder = pathlib.Path(name)
        config = folder / "agent.yaml"
        config.write_text(_CONFIG.format(count=count))
        config.chmod(0o600)
        try:
            yield folder
        finally:
            ending = [sys.executable, "-m", "leasehold.nodeagent", "--end-leftovers", str(folder / "state")]
            subprocess.run(ending, stdout=subprocess.DEVNULL, timeout=120, check=True)


def _pss_bytes(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _cost(addresses: str) -> list[harness.Result]:
    """Share of a core and memory, at rest with 8 workers, sampled each second, reporting to an allocator."""
    seconds = 5.0 if harness.is_quick() else 40.0
    with _folder(WORKERS) as folder:
        agent = _Agent(folder, addresses)
        try:
            workers = agent.wait_running(WORKERS)
            time.sleep(2.0)  # what the start brought is over
            cpu, began = harness.cpu_seconds(agent.process.pid), time.monotonic()
            time.sleep(seconds)
            used = harness.cpu_seconds(agent.process.pid) - cpu
            percent = 100 * used / (time.monotonic() - began)
            rss = harness.rss_bytes(agent.process.pid) / _MIB
            shims = [_pss_bytes(worker.shim_pid) / _MIB for worker in workers if worker.shim_pid]
            deaths = _deaths(agent)
        finally:
            agent.kill()
    return [
        harness.Result(
            "agent, 8 workers: share of a core",
            percent,
            "%",
            f"< {CORE_PERCENT_MAX:g}",
            percent < CORE_PERCENT_MAX,
            {"seconds": seconds, "sample_seconds": 1.0},
        ),
        harness.Result(
            "agent, 8 workers: its memory",
            rss,
            "MB RSS",
            f"< {RSS_MB_MAX:g}",
            rss < RSS_MB_MAX,
            {
                "shims_pss_mb_each": round(harness.median(shims), 1) if shims else None,
                "shims_pss_mb": round(sum(shims), 1),
            },
        ),
        deaths,
    ]


def _deaths(agent: _Agent) -> harness.Result:
    """From SIGKILL of a worker to the line about it in the agent's log."""
    took: list[float] = []
    for _ in range(5 if harness.is_quick() else 40):
        victim = agent.wait_running(WORKERS)[0]
        seen_before = _count_ended(agent.log)
        began = time.time()
        os.kill(victim.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while len(ended := _ended(agent.log)) <= seen_before:
            if time.monotonic() > deadline:
                raise TimeoutError("a death was not seen")
            time.sleep(0.001)
        took.append((ended[-1] - began) * 1000)
    worst = max(took)
    return harness.Result(
        "agent: a worker's death is seen, worst",
        worst,
        "ms",
        f"< {DEATH_MS_MAX:g}",
        worst < DEATH_MS_MAX,
        {"median_ms": round(harness.median(took), 2), "deaths": len(took)},
    )


def _count_ended(log: pathlib.Path) -> int:
    return len(_ended(log))


def _ended(log: pathlib.Path) -> list[float]:
    """When the agent saw workers end, by the wall clock."""
    found = []
    for line in log.read_text().splitlines():
        if '"worker_ended"' in line:
            text = json.loads(line)["timestamp"]
            found.append(datetime.datetime.fromisoformat(text).timestamp())
    return found


def _restart() -> list[harness.Result]:
    """From the start of the next agent's process until all workers of a killed one are its own."""
    took: list[float] = []
    with _folder(CROWD) as folder:
        first = _Agent(folder, "none", (str(harness.HERE / "agent_crowd.py"),))
        before = {worker.process.pid for worker in first.wait_running(CROWD)}
        first.kill()
        for _ in range(2 if harness.is_quick() else 7):
            began = time.monotonic()
            agent = _Agent(folder, "none")
            after = {worker.process.pid for worker in agent.wait_running(CROWD)}
            took.append(time.monotonic() - began)
            rss = harness.rss_bytes(agent.process.pid) / _MIB
            agent.kill()
            if after != before:
                raise RuntimeError("a worker was restarted")
    middle = harness.median(took)
    return [
        harness.Result(
            "agent: restart to all of 50 workers adopted",
            middle,
            "s",
            f"< {ADOPTED_SECONDS_MAX:g}",
            middle < ADOPTED_SECONDS_MAX,
            {"all_seconds": [round(each, 2) for each in took], "rss_mb": round(rss, 1)},
        )
    ]


def run() -> list[harness.Result]:
    """All figures."""
    with harness.control_plane() as plane:
        results = _cost(plane.addresses[0])
    return [*results, *_restart()]


if __name__ == "__main__":
    harness.report(run())
