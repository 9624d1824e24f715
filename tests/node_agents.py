"""Agents for the tests of NodeService: a SyncNode stream driven by a few lines, so that tests can misbehave."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from allocator_kit import AllocatorProcess, Fleet, now
from leasehold.api.common.v1 import process_pb2
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.runtime import identity, process_watch

#: Answers an order; None: not at all.
Obey = Callable[[order_pb2.Order], order_pb2.OrderResult | None]


def registration(name: str = "r620-1", **fields: Any) -> wire.NodeRegistration:
    """A registration as the agent of a host would make it."""
    known: dict[str, Any] = {
        "name": name,
        "node_id": f"id-of-node-{name}",
        "incarnation": 1,
        "boot_id": "5f2c2f0e-8f6e-4d0b-9a43-1a2b3c4d5e6f",
        "pid_namespace": 4026531836,
        "resources": node_pb2.NodeResources(cpus=8, memory_bytes=64 * 2**30),
    }
    return wire.NodeRegistration(**{**known, **fields})


def node_name() -> str:
    """A name that no other test uses."""
    return f"n-{uuid.uuid4().hex[:12]}"


async def ask(fleet: Fleet, method: str, request: Any, *, at: AllocatorProcess | None = None) -> Any:
    target = at or fleet.members[0]
    try:
        stub = wire_grpc.NodeServiceStub(fleet.channel(target))
        return await getattr(stub, method)(request, timeout=10.0)
    except grpc.RpcError as error:
        raise rpc_errors.from_rpc_error(error) from error


async def node(fleet: Fleet, name: str, *, at: AllocatorProcess | None = None) -> node_pb2.Node:
    answer = await ask(fleet, "GetNode", wire.GetNodeRequest(name=name), at=at)
    return answer.node  # type: ignore[no-any-return]


async def state(fleet: Fleet, name: str, *, at: AllocatorProcess | None = None) -> str:
    return node_pb2.NodeState.Name((await node(fleet, name, at=at)).state).removeprefix("NODE_STATE_")


class Agent:
    """One agent: it registers, reports as it is told to, obeys orders, and connects again when cut off."""

    def __init__(
        self, addresses: list[str], registered: wire.NodeRegistration, *, obey: Obey | None = None
    ) -> None:
        self.registered = registered
        self.name = registered.name
        self.status = node_pb2.NodeStatus(agent_version="test")
        self.responses: list[tuple[float, wire.SyncNodeResponse]] = []
        self.orders: list[order_pb2.Order] = []
        #: Why each connection ended.
        self.ends: list[errors.LeaseholdError | None] = []
        self.terms: wire.NodeTerms | None = None
        self.watched: list[process_pb2.ProcessIdentity] = []
        self.may_connect = asyncio.Event()
        self.may_connect.set()
        self.interval: float | None = None
        self._obey = obey or (lambda order: order_pb2.OrderResult(order_id=order.order_id))
        self._addresses = itertools.cycle(addresses)
        self._outbox: asyncio.Queue[wire.SyncNodeRequest | None] = asyncio.Queue()
        self._call: Any = None
        self.connections = 0

    @property
    def last_error(self) -> errors.LeaseholdError | None:
        return self.ends[-1] if self.ends else None

    def send(self, **fields: Any) -> None:
        """One message more on the present connection."""
        self._outbox.put_nowait(wire.SyncNodeRequest(**fields))

    def leave(self) -> None:
        """Say that the agent ends, and close the stream."""
        self.may_connect.clear()
        self.send(is_leaving=True)
        self._outbox.put_nowait(None)

    def cut(self) -> None:
        """End the connection without a word; `may_connect` tells whether another follows."""
        self._call.cancel()

    async def run(self) -> None:
        while True:
            await self.may_connect.wait()
            address = next(self._addresses)
            try:
                await self._connect(address)
                self.ends.append(None)
            except grpc.RpcError as error:
                self.ends.append(rpc_errors.from_rpc_error(error))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                self.ends.append(errors.Unavailable("cut by the test"))
            await asyncio.sleep(0.05)

    async def _connect(self, address: str) -> None:
        self._outbox = asyncio.Queue()
        self.watched = []
        channel = channels.open_channel(address, has_own_connection=True)
        self.connections += 1
        try:
            self._call = wire_grpc.NodeServiceStub(channel).SyncNode()
            writer = asyncio.create_task(self._write(self._call))
            try:
                self.send(registration=self.registered, status=self.status, **self._first())
                while (response := await self._call.read()) is not grpc.aio.EOF:
                    self._hear(response)
                await self._call.code()
            finally:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
                    await writer
        finally:
            await channel.close()

    def _first(self) -> dict[str, Any]:
        """What else its first message says."""
        return {}

    async def _write(self, call: Any) -> None:
        for sequence in itertools.count(1):
            request: wire.SyncNodeRequest | None = wire.SyncNodeRequest()
            # Before it has heard its terms: as often as few nodes do.
            told = 1.0 if self.terms is None else self.terms.report_interval.ToNanoseconds() / 1e9
            interval = told if self.interval is None else self.interval
            with contextlib.suppress(TimeoutError):
                request = await asyncio.wait_for(self._outbox.get(), interval)
            if request is None:
                await call.done_writing()
                return
            request.sequence = request.sequence or sequence
            await call.write(request)

    def _hear(self, response: wire.SyncNodeResponse) -> None:
        self.responses.append((now(), response))
        if response.HasField("terms"):
            self.terms = response.terms
        self.watched.extend(response.watch)
        for gone in response.unwatch:
            self.watched.remove(gone)
        for order in response.orders:
            self.orders.append(order)
            result = self._obey(order)
            if result is not None:
                self.send(results=[result])


@contextlib.asynccontextmanager
async def running(*agents: Agent) -> AsyncIterator[None]:
    """Agents that run for the time of the block."""
    tasks = [asyncio.create_task(agent.run()) for agent in agents]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Certifier(Agent):
    """An agent that really watches processes of this boot and PID namespace, by pidfds."""

    def __init__(self, addresses: list[str], name: str) -> None:
        super().__init__(
            addresses,
            registration(name, boot_id=identity.boot_id(), pid_namespace=identity.pid_namespace()),
        )
        self._watch = process_watch.ProcessWatch()

    def _hear(self, response: wire.SyncNodeResponse) -> None:
        super()._hear(response)
        for process in response.watch:
            self._watch.watch(
                identity.ProcessIdentity(
                    process.boot_id, process.pid_namespace, process.pid, process.start_time_ticks
                ),
                lambda dead: self.send(
                    deaths=[
                        wire.DeathCertificate(
                            process=process_pb2.ProcessIdentity(
                                boot_id=dead.boot_id,
                                pid_namespace=dead.pid_namespace,
                                pid=dead.pid,
                                start_time_ticks=dead.start_time_ticks,
                            )
                        )
                    ]
                ),
            )
