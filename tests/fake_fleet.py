"""A fleet of made-up nodes, for tests of the gateway and the command line: NodeService's answers in words.

`FakeHost` executes orders as an agent does, bounds and memory included; `FakeFleet` answers NodeService's unary
methods for several; `serve` puts it behind a real gRPC server on a thread of its own.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import message as protobuf_message
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as budget_wire
from leasehold.api.common.v1 import metrics_service_pb2 as metrics_wire
from leasehold.api.node.v1 import node_pb2, order_pb2, pool_pb2, worker_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import methods, node_codec, options, wire_values

GIB = model.GIB


class FakeHost:
    """One host: pools with workers that exist in words only."""

    def __init__(
        self, name: str, *, memory_gb: float = 64.0, available_gb: float = 32.0, cpus: int = 8
    ) -> None:
        self.name = name
        self.cpus = cpus
        self.memory_bytes = round(memory_gb * GIB)
        self.available_bytes = round(available_gb * GIB)
        self.reserve_bytes = 4 * GIB
        self.pools: dict[str, pool_pb2.PoolStatus] = {}
        self.logs: dict[str, bytes] = {}
        self.is_draining = False
        self.warnings: list[str] = []
        #: Orders that were applied; a repeated one is not.
        self.applied: list[order_pb2.Order] = []
        self._answered: dict[str, order_pb2.OrderResult] = {}

    def add_pool(self, name: str, workers: int, *, low: int = 1, high: int = 6, limit_gb: float = 4.0) -> None:
        """A pool with so many running workers."""
        self.pools[name] = pool_pb2.PoolStatus(
            name=name,
            template="command",
            mode=pool_pb2.POOL_MODE_AUTO,
            min_workers=low,
            max_workers=high,
            worker_limit_bytes=round(limit_gb * GIB),
            optimal=workers,
            depth=pool_pb2.QueueDepth(ready=7, is_lower_bound=False),
        )
        self._resize(self.pools[name], workers)

    def _resize(self, pool: pool_pb2.PoolStatus, workers: int) -> list[worker_pb2.WorkerStatus]:
        gone = list(pool.workers)[workers:]
        del pool.workers[workers:]
        for number in range(len(pool.workers) + 1, workers + 1):
            worker = pool.workers.add(
                name=model.worker_name(pool.name, number, self.name),
                pool=pool.name,
                worker_id=f"{number:032x}",
                state=worker_pb2.WORKER_STATE_RUNNING,
                shim_pid=1000 + number,
                held_bytes=GIB // 2,
                limit_bytes=pool.worker_limit_bytes,
                memory_source=worker_pb2.MEMORY_SOURCE_CGROUP_V2,
                is_limit_enforced=True,
                uptime=wire_values.encode_seconds(12.5),
                is_busy=number % 2 == 1,
                task_id=f"task-{number}" if number % 2 else "",
                task_name="transcribe" if number % 2 else "",
                log_path=f"/var/lib/leasehold/agent/logs/{pool.name}_{number}.log",
            )
            worker.process.pid = 2000 + number
        pool.desired = pool.running = workers
        pool.summary = f"{pool_pb2.PoolMode.Name(pool.mode).removeprefix('POOL_MODE_').lower()} {workers}"
        return gone

    def status(self) -> node_pb2.NodeStatus:
        """As the agent reports it."""
        memory = node_pb2.MemoryStatus(
            total_bytes=self.memory_bytes,
            available_bytes=self.available_bytes,
            bound_by="MemAvailable",
            reserve_bytes=self.reserve_bytes,
            used_ratio=(self.memory_bytes - self.available_bytes) / self.memory_bytes,
            pressure_some_percent=0.5,
        )
        return node_pb2.NodeStatus(
            memory=memory,
            load_average=[4.0, 3.0, 2.0],
            load_per_core=4.0 / self.cpus,
            is_draining=self.is_draining,
            pools=[self.pools[name] for name in sorted(self.pools)],
            warnings=self.warnings,
            agent_version="0.1.0",
            agent_uptime=wire_values.encode_seconds(3600),
            agent_rss_bytes=45 * model.MIB,
            shims_pss_bytes=20 * model.MIB,
        )

    def execute(self, order: order_pb2.Order) -> order_pb2.OrderResult:
        """The answer, as an agent's; a refusal is in it."""
        if order.order_id in self._answered:
            return self._answered[order.order_id]
        try:
            result: order_pb2.OrderResult = getattr(self, f"_{order.WhichOneof('order')}")(
                getattr(order, order.WhichOneof("order") or "")
            )
            self.applied.append(order)
        except errors.LeaseholdError as error:
            result = order_pb2.OrderResult(error=node_codec.encode_error(error))
        result.order_id = order.order_id
        if order.order_id:
            self._answered[order.order_id] = result
        return result

    def pool(self, name: str) -> pool_pb2.PoolStatus:
        """One of the name; empty: the only one."""
        if not name and len(self.pools) != 1:
            raise errors.InvalidArgument(f"pool: name one of {', '.join(self.pools)}", field="pool")
        pool = self.pools.get(name or next(iter(self.pools)))
        if pool is None:
            raise errors.NotFound(f"there is no pool {name} on {self.name}")
        return pool

    def _which(self, name: str) -> list[pool_pb2.PoolStatus]:
        return [self.pool(name)] if name else list(self.pools.values())

    def _scale(self, order: order_pb2.ScaleOrder) -> order_pb2.OrderResult:
        pool = self.pool(order.pool)
        if order.WhichOneof("target") == "auto":
            pool.mode = pool_pb2.POOL_MODE_AUTO
            pool.ClearField("manual_target")
            return order_pb2.OrderResult(pools=[pool])
        if not pool.min_workers <= order.workers <= pool.max_workers:
            raise errors.InvalidArgument(
                f"target_workers: {order.workers} is not {pool.min_workers} to {pool.max_workers} "
                "(MIN_WORKERS to MAX_WORKERS)",
                field="target_workers",
            )
        needed = (order.workers - pool.running) * pool.worker_limit_bytes
        room = self.available_bytes - self.reserve_bytes
        if needed > max(room, 0):
            raise errors.FailedPrecondition(
                f"{order.workers} workers need {needed / GIB:g} GB more, there are {room / GIB:g} GB",
                metadata={"needed_bytes": str(needed), "room_bytes": str(room)},
            )
        pool.mode, pool.manual_target = pool_pb2.POOL_MODE_MANUAL, order.workers
        if order.HasField("hold"):
            pool.hold_remaining.CopyFrom(order.hold)
        gone = self._resize(pool, order.workers)
        return order_pb2.OrderResult(pools=[pool], workers=gone)

    def _monitoring(self, order: order_pb2.MonitoringOrder) -> order_pb2.OrderResult:
        pools = self._which(order.pool)
        for pool in pools:
            pool.mode = pool_pb2.POOL_MODE_AUTO if order.is_running else pool_pb2.POOL_MODE_PAUSED
            pool.ClearField("manual_target")
        return order_pb2.OrderResult(pools=pools)

    def _start_workers(self, order: order_pb2.StartWorkersOrder) -> order_pb2.OrderResult:
        pools = self._which(order.pool)
        for pool in pools:
            pool.mode = pool_pb2.POOL_MODE_AUTO
            self._resize(pool, pool.optimal)
        return order_pb2.OrderResult(pools=pools)

    def _stop_workers(self, order: order_pb2.StopWorkersOrder) -> order_pb2.OrderResult:
        if order.worker:
            worker = self._worker(order.worker)
            return order_pb2.OrderResult(pools=[self.pool(worker.pool)], workers=[worker])
        pools, gone = self._which(order.pool), []
        for pool in pools:
            pool.mode = pool_pb2.POOL_MODE_STOPPED
            gone += self._resize(pool, 0)
        return order_pb2.OrderResult(pools=pools, workers=gone)

    def _drain(self, order: order_pb2.DrainOrder) -> order_pb2.OrderResult:
        self.is_draining = order.is_draining
        return order_pb2.OrderResult(pools=list(self.pools.values()))

    def _explain(self, order: order_pb2.ExplainOrder) -> order_pb2.OrderResult:
        pool = self.pool(order.pool)
        decision = pool_pb2.PoolDecision(
            decision_id=3,
            pool=pool.name,
            before=2,
            after=pool.desired,
            trigger="CHECK",
            reasons=["memory for 5"],
            numbers={"available_bytes": float(self.available_bytes)},
        )
        decision.decide_time.FromJsonString("2026-01-02T03:04:05Z")
        explained = order_pb2.PoolExplanation(
            pool=pool, reasons=[f"{pool.desired}: 28 GB / 4 GB"], decisions=[decision]
        )
        return order_pb2.OrderResult(explanation=explained)

    def _read_log(self, order: order_pb2.ReadLogOrder) -> order_pb2.OrderResult:
        if order.worker not in self.logs:
            self._worker(order.worker)
        text = self.logs.get(order.worker, b"")
        if order.cursor:
            begin = int(order.cursor)
        else:
            begin = len(text) - len(b"".join(text.splitlines(keepends=True)[-(order.tail_lines or 100) :]))
        is_alive = any(each.name == order.worker for pool in self.pools.values() for each in pool.workers)
        chunk = order_pb2.LogChunk(data=text[begin:], cursor=str(len(text)), is_end=not is_alive)
        return order_pb2.OrderResult(log=chunk)

    def _worker(self, name: str) -> worker_pb2.WorkerStatus:
        for pool in self.pools.values():
            for worker in pool.workers:
                if worker.name == name:
                    return worker
        raise errors.NotFound(f"there is no worker {name} on {self.name}")


class FakeFleet:
    """NodeService of several hosts, and budgets' status, as the leader answers them."""

    def __init__(self, *hosts: FakeHost) -> None:
        self.hosts = {host.name: host for host in hosts}
        self.states = {host.name: node_pb2.NODE_STATE_READY for host in hosts}
        self.budgets: list[str] = ["llm-api"]
        #: Set: every call fails with it.
        self.failure: errors.LeaseholdError | None = None
        self.calls: list[tuple[str, Any]] = []
        #: What every call waits for; a test holds it to let time pass.
        self.gate: asyncio.Event | None = None
        #: How many wait for it, over gRPC.
        self.waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def answer(self, method: str, request: Any) -> Any:
        """The response. Raises core errors."""
        self.calls.append((method, request))
        if self.failure is not None:
            raise self.failure
        return getattr(self, f"_{method}")(request)

    async def wait(self) -> None:
        """Until the gate is open; of the server's own loop."""
        self._loop = asyncio.get_running_loop()
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1

    def open_gate(self) -> None:
        """From another thread than the server's."""
        assert self.gate is not None
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.gate.set)

    def node(self, name: str, *, is_brief: bool = False) -> node_pb2.Node:
        host = self.hosts[name]
        node = node_pb2.Node(
            name=name,
            node_id=f"id-{name}",
            incarnation=3,
            boot_id="boot",
            state=self.states[name],
            resources=node_pb2.NodeResources(cpus=host.cpus, memory_bytes=host.memory_bytes),
            labels={"rack": "a1"},
            last_report_age=wire_values.encode_seconds(0.8),
            ttl=wire_values.encode_seconds(5),
            status=None if is_brief else host.status(),
        )
        node.register_time.FromJsonString("2026-01-02T03:04:05Z")
        return node

    def _ListNodes(self, request: wire.ListNodesRequest) -> wire.ListNodesResponse:
        names = sorted(self.hosts)
        begin = int(request.page_token or 0)
        page = names[begin : begin + (request.page_size or 100)]
        end = begin + len(page)
        return wire.ListNodesResponse(
            nodes=[self.node(name, is_brief=request.is_brief) for name in page],
            next_page_token=str(end) if end < len(names) else "",
        )

    def _GetNode(self, request: wire.GetNodeRequest) -> wire.GetNodeResponse:
        return wire.GetNodeResponse(node=self.node(self._named(request.name)))

    def _named(self, name: str) -> str:
        if not name and len(self.hosts) > 1:
            raise errors.InvalidArgument(f"node: name one of {', '.join(sorted(self.hosts))}", field="node")
        if not self.hosts or (name and name not in self.hosts):
            raise errors.NotFound(f"there is no node {name}")
        return name or next(iter(self.hosts))

    def _DeleteNode(self, request: wire.DeleteNodeRequest) -> wire.DeleteNodeResponse:
        name = self._named(request.name)
        if self.states[name] not in (node_pb2.NODE_STATE_LOST, node_pb2.NODE_STATE_GONE):
            raise errors.FailedPrecondition(f"{name} is ready; only a node that is lost or gone can be deleted")
        del self.hosts[name]
        return wire.DeleteNodeResponse()

    def _OrderNode(self, request: wire.OrderNodeRequest) -> wire.OrderNodeResponse:
        ready = (node_pb2.NODE_STATE_READY, node_pb2.NODE_STATE_DRAINING)
        if request.node == "*":
            asked = [name for name in sorted(self.hosts) if self.states[name] in ready]
        else:
            asked = [self._named(request.node)]
            if self.states[asked[0]] not in ready:
                raise errors.NodeUnreachable(f"{asked[0]} is not connected")
        answers = [
            wire.OrderNodeResponse.Answer(node=name, result=self.hosts[name].execute(request.order))
            for name in asked
        ]
        if request.node != "*" and answers[0].result.HasField("error"):
            raise node_codec.decode_error(answers[0].result.error)
        return wire.OrderNodeResponse(answers=answers)

    def _ListBudgets(self, request: Any) -> budget_wire.ListBudgetsResponse:
        return budget_wire.ListBudgetsResponse(budgets=[budget_pb2.Budget(name=name) for name in self.budgets])

    def _GetBudgetStatus(self, request: Any) -> budget_wire.GetBudgetStatusResponse:
        if request.budget not in self.budgets:
            raise errors.NotFound(f"there is no budget {request.budget}")
        response = budget_wire.GetBudgetStatusResponse(
            worker_id=request.worker_id or "w1", total_workers=2, active_workers=1, is_scaling_enabled=True
        )
        response.active_worker_ids.append("w1")
        response.base_allocation.amounts.update({"rpm_limit": 400.0, "images": 5.0})
        response.current_allocation.amounts.update({"rpm_limit": 800.0, "images": 10.0})
        response.utilization_ratio.amounts.update({"rpm_limit": 2.0, "images": 2.0})
        return response

    def _ExposeMetrics(self, request: Any) -> metrics_wire.ExposeMetricsResponse:
        name = "leasehold_calls_total"
        text = f"# HELP {name} Calls\n# TYPE {name} counter\n{name} 3\n"
        return metrics_wire.ExposeMetricsResponse(text=text)


_REQUESTS: list[tuple[str, Any]] = [
    ("ListNodes", wire.ListNodesRequest()),
    ("GetNode", wire.GetNodeRequest()),
    ("DeleteNode", wire.DeleteNodeRequest()),
    ("OrderNode", wire.OrderNodeRequest()),
    ("ListBudgets", budget_wire.ListBudgetsRequest()),
    ("GetBudgetStatus", budget_wire.GetBudgetStatusRequest()),
    ("ExposeMetrics", metrics_wire.ExposeMetricsRequest()),
]


@contextlib.contextmanager
def serve(fleet: FakeFleet) -> Iterator[str]:
    """The fleet behind a real gRPC server; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    server, address = do(_start(fleet))
    try:
        yield address
    finally:
        do(server.stop(None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(fleet: FakeFleet) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(options=options.server_options())
    handlers: dict[str, dict[str, Any]] = {}
    for name, request in _REQUESTS:
        method = methods.method_of(name, request)
        handlers.setdefault(method.containing_service.full_name, {})[name] = _handler(fleet, name, request)
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(service, each) for service, each in handlers.items())
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


def _handler(fleet: FakeFleet, name: str, request: Any) -> Any:
    async def answer(asked: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await fleet.wait()
        try:
            return fleet.answer(name, asked)
        except errors.LeaseholdError as error:
            await context.abort_with_status(rpc_errors.to_status(error))

    return grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=type(request).FromString, response_serializer=_serialized
    )


def _serialized(message: protobuf_message.Message) -> bytes:
    return message.SerializeToString()
