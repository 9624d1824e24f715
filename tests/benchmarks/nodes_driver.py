"""Hundreds of simulated agents in one process, each with a stream of its own, at their terms' pace.

An agent here tells a whole status of one pool with eight workers each time, as a busy host's does, so that its
reports cost what real ones cost.

Driven by lines on standard input, answered by one line of JSON each: ``status``, ``die NAME`` (its stream is
cut, and it says no more). It ends with its input.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import time
from typing import Any

import lines
from leasehold.api.node.v1 import node_pb2, pool_pb2, worker_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.rpc import channel as channels

#: Streams on one connection: what is measured are reports, not sockets.
STREAMS_PER_CHANNEL = 50
WORKERS = 8


def _status(name: str) -> node_pb2.NodeStatus:
    workers = [
        worker_pb2.WorkerStatus(
            name=f"transcription_{number}@{name}",
            pool="transcription",
            worker_id=f"{number:032x}",
            state=worker_pb2.WORKER_STATE_RUNNING,
            held_bytes=3 * 2**30 + number,
            limit_bytes=6 * 2**30,
            is_busy=True,
            task_id=f"task-{number:028x}",
            task_name="app.tasks.transcribe",
            log_path=f"/var/lib/leasehold/logs/transcription_{number}@{name}.log",
        )
        for number in range(1, WORKERS + 1)
    ]
    pool = pool_pb2.PoolStatus(
        name="transcription",
        running=WORKERS,
        optimal=WORKERS,
        desired=WORKERS,
        workers=workers,
        summary="auto 8",
    )
    memory = node_pb2.MemoryStatus(total_bytes=64 * 2**30, available_bytes=12 * 2**30, bound_by="MemAvailable")
    return node_pb2.NodeStatus(memory=memory, load_average=[4.0, 4.0, 4.0], pools=[pool], agent_version="bench")


class Agent:
    """One agent on a stream."""

    def __init__(self, channel: Any, name: str) -> None:
        self._stub = wire_grpc.NodeServiceStub(channel)
        self.name = name
        self.sent_at = 0.0
        self.interval = 1.0
        self.answers = 0
        self.latencies: list[float] = []
        self._call: Any = None
        self._status = _status(name)

    async def run(self) -> None:
        """Report until cancelled."""
        self._call = self._stub.SyncNode()
        reader = asyncio.create_task(self._read())
        try:
            first = wire.NodeRegistration(
                name=self.name,
                node_id=f"id-of-{self.name}",
                incarnation=1,
                boot_id=f"boot-of-{self.name}",
                pid_namespace=1,
                resources=node_pb2.NodeResources(cpus=8, memory_bytes=64 * 2**30),
            )
            sequence = 1
            request = wire.SyncNodeRequest(sequence=1, registration=first, status=self._status)
            while True:
                self.sent_at = time.monotonic()
                await self._call.write(request)
                await asyncio.sleep(self.interval)
                sequence += 1
                self._status.memory.available_bytes += 4096
                request = wire.SyncNodeRequest(sequence=sequence, status=self._status)
        finally:
            self._call.cancel()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self) -> None:
        while True:
            response = await self._call.read()
            self.answers += 1
            self.latencies.append(time.monotonic() - self.sent_at)
            if response.HasField("terms"):
                self.interval = response.terms.report_interval.ToNanoseconds() / 1e9


class Fleet:
    """All agents of this process."""

    def __init__(self, address: str, prefix: str, count: int) -> None:
        made = [
            channels.open_channel(address, has_own_connection=True)
            for _ in range(-(-count // STREAMS_PER_CHANNEL))
        ]
        self.agents = {
            f"{prefix}{number:04d}": Agent(made[number // STREAMS_PER_CHANNEL], f"{prefix}{number:04d}")
            for number in range(count)
        }
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self) -> None:
        """Start all, spread over a second."""
        for agent in self.agents.values():
            self.tasks[agent.name] = asyncio.create_task(agent.run())
            await asyncio.sleep(1.0 / len(self.agents))

    def die(self, name: str) -> dict[str, Any]:
        """An agent falls silent; when it had spoken last."""
        self.tasks[name].cancel()
        return {"died_at": time.monotonic(), "reported_at": self.agents[name].sent_at}

    def status(self) -> dict[str, Any]:
        """Figures since the last status."""
        latencies = [seconds for agent in self.agents.values() for seconds in agent.latencies]
        for agent in self.agents.values():
            agent.latencies.clear()
        broken = [task for task in self.tasks.values() if task.done() and not task.cancelled()]
        return {
            "answered": sum(agent.answers > 0 for agent in self.agents.values()),
            "latencies": latencies,
            "intervals": sorted({agent.interval for agent in self.agents.values()}),
            "broken": [repr(task.exception()) for task in broken][:3],
            "cpu_seconds": time.process_time(),
        }


async def main() -> None:
    """Obey standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("prefix")
    parser.add_argument("count", type=int)
    chosen = parser.parse_args()
    fleet = Fleet(chosen.address, chosen.prefix, chosen.count)
    await fleet.begin()
    gc.freeze()
    lines.out("ready")
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        word, _, rest = line.strip().partition(" ")
        if not word:
            break
        lines.out(json.dumps(fleet.die(rest) if word == "die" else fleet.status()))
    for task in fleet.tasks.values():
        task.cancel()
    await asyncio.gather(*fleet.tasks.values(), return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
