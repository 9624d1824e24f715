"""A thousand simulated agents in one process that run what they are given, until told to end some of it.

They report at their terms' pace, connect again when a leader dies, and tell the next one what they run.

Driven by lines on standard input, answered by one line of JSON each: ``pace N`` (from now on N jobs a second
end, anywhere; 0: none), ``status``. It ends with its input.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import random
import sys
import time
from typing import Any

import grpc
import lines
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.rpc import channel as channels
from leasehold.runtime import retry

#: Streams on one connection: what is measured are jobs, not sockets.
STREAMS_PER_CHANNEL = 50
CPUS, MEMORY_BYTES = 24, 256 * 2**30
ZONES = 4
TEMPLATE = "encode"
BACKOFF = retry.Backoff(initial_seconds=0.1, max_seconds=2.0)

Ref = tuple[str, int]


class Agent:
    """One agent: it starts at once what it is assigned, and runs it until `end`."""

    def __init__(self, name: str, zone: str) -> None:
        self.name = name
        self.is_connected = False
        self.running: dict[Ref, None] = {}
        #: Ends that are not committed, for all that it knows.
        self.ended: dict[Ref, None] = {}
        #: When the first end was told that no assignment has followed yet.
        self.freed_at: float | None = None
        self.latencies: list[float] = []
        self._interval = 5.0
        self._outbox: asyncio.Queue[attempt_pb2.AttemptReport] = asyncio.Queue()
        self._registration = wire.NodeRegistration(
            name=name,
            node_id=f"id-of-{name}",
            incarnation=1,
            boot_id=f"boot-of-{name}",
            pid_namespace=1,
            resources=node_pb2.NodeResources(cpus=CPUS, memory_bytes=MEMORY_BYTES),
            job_resources=node_pb2.NodeResources(cpus=CPUS, memory_bytes=MEMORY_BYTES),
            labels={"zone": zone},
            job_templates=[TEMPLATE],
        )

    async def run(self, made: list[Any]) -> None:
        """Keep a stream to whoever leads, by one of these channels, until cancelled."""
        rng = random.Random(self.name)
        # Hosts that were not all started together do not report together either.
        await asyncio.sleep(rng.uniform(0.0, self._interval))
        while True:
            # As real agents do.
            for delay in BACKOFF.delays(rng):
                for channel in made:
                    with contextlib.suppress(grpc.RpcError):
                        await self._connect(wire_grpc.NodeServiceStub(channel).SyncNode())
                has_served, self.is_connected = self.is_connected, False
                if has_served:
                    break
                await asyncio.sleep(delay)

    async def _connect(self, call: Any) -> None:
        self._outbox = asyncio.Queue()
        writer = asyncio.create_task(self._write(call))
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                self.is_connected = True
                self._hear(response)
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        inventory = attempt_pb2.JobInventory(
            attempts=[*map(_started, self.running), *map(_succeeded, self.ended)]
        )
        request = wire.SyncNodeRequest(
            registration=self._registration, status=node_pb2.NodeStatus(agent_version="bench")
        )
        request.inventory.CopyFrom(inventory)
        for sequence in itertools.count(1):
            request.sequence = sequence
            await call.write(request)
            request = wire.SyncNodeRequest()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    request.attempts.append(await self._outbox.get())

    def _hear(self, response: wire.SyncNodeResponse) -> None:
        if response.HasField("terms"):
            self._interval = response.terms.report_interval.ToNanoseconds() / 1e9
        for assignment in response.assignments:
            ref = (assignment.attempt.job_id, assignment.attempt.attempt)
            if ref in self.running or ref in self.ended:
                continue
            self.running[ref] = None
            self._outbox.put_nowait(_started(ref))
            if self.freed_at is not None:
                self.latencies.append(time.monotonic() - self.freed_at)
                self.freed_at = None
        for forget in response.forget:
            self.ended.pop((forget.job_id, forget.attempt), None)

    def end(self) -> bool:
        """One of its jobs succeeds; whether there was one."""
        if not self.running:
            return False
        ref = next(iter(self.running))
        del self.running[ref]
        self.ended[ref] = None
        self._outbox.put_nowait(_succeeded(ref))
        if self.freed_at is None:
            self.freed_at = time.monotonic()
        return True


def _started(ref: Ref) -> attempt_pb2.AttemptReport:
    attempt = attempt_pb2.AttemptRef(job_id=ref[0], attempt=ref[1])
    return attempt_pb2.AttemptReport(attempt=attempt, phase=job_pb2.ATTEMPT_PHASE_STARTED)


def _succeeded(ref: Ref) -> attempt_pb2.AttemptReport:
    return attempt_pb2.AttemptReport(
        attempt=attempt_pb2.AttemptRef(job_id=ref[0], attempt=ref[1]),
        phase=job_pb2.ATTEMPT_PHASE_ENDED,
        outcome=job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_SUCCEEDED, exit_code=0),
    )


class Fleet:
    """All agents of this process."""

    def __init__(self, addresses: list[str], count: int) -> None:
        self.pace = 0.0
        self.ends = 0
        self.agents = [Agent(f"n{number:04d}", f"z{number % ZONES}") for number in range(count)]
        shared = [
            [channels.open_channel(address, has_own_connection=True) for address in addresses]
            for _ in range(-(-count // STREAMS_PER_CHANNEL))
        ]
        self.tasks = [
            asyncio.create_task(agent.run(shared[number // STREAMS_PER_CHANNEL]))
            for number, agent in enumerate(self.agents)
        ]
        self.tasks.append(asyncio.create_task(self._end_some()))

    async def _end_some(self) -> None:
        chosen = random.Random(7)
        while True:
            if self.pace == 0.0:
                await asyncio.sleep(0.05)
                continue
            # As often as it comes: not in step with anything.
            await asyncio.sleep(chosen.expovariate(self.pace))
            self.ends += chosen.choice(self.agents).end()

    def status(self) -> dict[str, Any]:
        """Figures since the last status, and how many are connected and running now."""
        latencies = [seconds for agent in self.agents for seconds in agent.latencies]
        for agent in self.agents:
            agent.latencies.clear()
        ends, self.ends = self.ends, 0
        return {
            "connected": sum(agent.is_connected for agent in self.agents),
            "running": sum(len(agent.running) for agent in self.agents),
            "ends": ends,
            "latencies": latencies,
            "broken": [repr(task.exception()) for task in self.tasks if task.done()][:3],
            "cpu_seconds": time.process_time(),
        }


async def main() -> None:
    """Obey standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses")
    parser.add_argument("count", type=int)
    chosen = parser.parse_args()
    fleet = Fleet(chosen.addresses.split(","), chosen.count)
    gc.freeze()
    lines.out("ready")
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        word, _, rest = line.strip().partition(" ")
        if not word:
            break
        if word == "pace":
            fleet.pace = float(rest)
        lines.out(json.dumps(fleet.status()))
    for task in fleet.tasks:
        task.cancel()
    await asyncio.gather(*fleet.tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
