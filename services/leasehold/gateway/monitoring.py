"""Routes under /monitoring, and /scaling_status: what pools and budgets have, what people change by hand."""

from collections.abc import Iterable, Sequence
from typing import Final

from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.node import model, registry_model
from leasehold.gateway import allocators, parameters, refusals
from leasehold.observe import logs
from leasehold.rpc import budget_documents, node_documents, wire_values
from starlette import requests, responses
from typing_extensions import TypedDict

#: Parameters of each route, by its function.
READING: Final = ("node", "pool")
MEMORY: Final = ("node",)
SCALING: Final = ("target_workers", "node", "pool", "mode", "hold_seconds", "request_id")
SWITCHING: Final = ("node", "pool", "request_id")
BUDGET: Final = ("budget", "worker_id")

_log = logs.get_logger(__name__)


class Totals(TypedDict):
    """Sums over what is shown. Workers and memory are of the nodes that report now."""

    nodes: int
    nodes_ready: int
    nodes_lost: int
    pools: int
    pools_paused: int
    workers_running: int
    workers_starting: int
    workers_stopping: int
    workers_optimal: int
    workers_desired: int
    crashes_total: int
    oom_kills_total: int
    memory_total_bytes: int
    memory_total_gb: float
    memory_available_bytes: int
    memory_available_gb: float


class StatusAnswer(TypedDict):
    """Nodes, pools and workers, with their sums. `is_mass_loss`: rather the allocator's network than deaths."""

    totals: Totals
    warnings: list[str]
    is_mass_loss: bool
    nodes: list[node_documents.Node]


class NodeMemory(TypedDict):
    """A node's memory and load; `memory` is null where this leader has heard none."""

    node: str
    state: registry_model.NodeState | None
    last_report_age_seconds: float | None
    memory: node_documents.Memory | None
    load_average: list[float]
    load_per_core: float | None
    cpus: int
    warnings: list[str]


class MemoryAnswer(TypedDict):
    """Memory and load, node by node."""

    nodes: list[NodeMemory]


class WorkersAnswer(TypedDict):
    """Every pool and every worker, those that ended recently included."""

    pools: list[node_documents.Pool]
    workers: list[node_documents.Worker]


class ScaleAnswer(TypedDict):
    """The pool as it is after the order; the same request_id is answered the same, and applied once."""

    request_id: str
    node: str
    pool: node_documents.Pool
    stopping_workers: list[str]


class NodePools(TypedDict):
    """A node's pools that an order concerned, as they are after it."""

    node: str
    pools: list[node_documents.Pool]


class SwitchAnswer(TypedDict):
    """What pausing or taking up did. `not_reached`: nodes without a connection, which have not heard of it."""

    request_id: str
    nodes: list[NodePools]
    not_reached: list[str]


class Monitoring:
    """The routes' functions, on what the allocators tell."""

    def __init__(self, leader: allocators.Allocators) -> None:
        self._allocators = leader

    async def status(self, request: requests.Request) -> responses.Response:
        """GET /monitoring/status."""
        found = parameters.read(request, READING)
        nodes, is_mass_loss = await self._nodes(parameters.node(found))
        documents = _of_pool([node_documents.node(each) for each in nodes], parameters.pool(found))
        body: StatusAnswer = {
            "totals": _totals(documents),
            "warnings": [text for each in documents for text in _warnings(each)],
            "is_mass_loss": is_mass_loss,
            "nodes": documents,
        }
        return responses.JSONResponse(body)

    async def memory(self, request: requests.Request) -> responses.Response:
        """GET /monitoring/memory."""
        found = parameters.read(request, MEMORY)
        nodes, _ = await self._nodes(parameters.node(found))
        body: MemoryAnswer = {"nodes": [_memory(node_documents.node(each)) for each in nodes]}
        return responses.JSONResponse(body)

    async def workers(self, request: requests.Request) -> responses.Response:
        """GET /monitoring/workers."""
        found = parameters.read(request, READING)
        nodes, _ = await self._nodes(parameters.node(found))
        documents = _of_pool([node_documents.node(each) for each in nodes], parameters.pool(found))
        pools = list(_pools(documents))
        body: WorkersAnswer = {
            "pools": [_without_workers(each) for each in pools],
            "workers": [worker for each in pools for worker in each["workers"]],
        }
        return responses.JSONResponse(body)

    async def scale(self, request: requests.Request) -> responses.Response:
        """POST /monitoring/workers/scale."""
        found = parameters.read(request, SCALING)
        target, hold = parameters.target_workers(found), parameters.hold_seconds(found)
        node, pool = parameters.node(found), parameters.pool(found)
        request_id = parameters.request_id(found)
        order = order_pb2.Order(order_id=request_id, scale=order_pb2.ScaleOrder(pool=pool))
        if target is None:
            order.scale.auto = True
        else:
            order.scale.workers = target
        if hold is not None:
            order.scale.hold.CopyFrom(wire_values.encode_seconds(hold))
        answer = _only(await self._allocators.order(node, order))
        stopping = [worker.name for worker in answer.result.workers]
        document = node_documents.pool(answer.result.pools[0], node=answer.node)
        _log.info(
            "scaled", node=answer.node, pool=document["name"], target=target, hold=hold, request_id=request_id
        )
        body: ScaleAnswer = {
            "request_id": request_id,
            "node": answer.node,
            "pool": document,
            "stopping_workers": stopping,
        }
        return responses.JSONResponse(body)

    async def start(self, request: requests.Request) -> responses.Response:
        """POST /monitoring/monitoring/start."""
        return await self._switch(request, is_running=True)

    async def stop(self, request: requests.Request) -> responses.Response:
        """POST /monitoring/monitoring/stop."""
        return await self._switch(request, is_running=False)

    async def scaling_status(self, request: requests.Request) -> responses.Response:
        """GET /scaling_status."""
        found = parameters.read(request, BUDGET)
        budget, worker = parameters.budget(found), parameters.worker_id(found)
        body = budget_documents.status(await self._allocators.budget_status(budget, worker))
        return responses.JSONResponse(body)

    async def _nodes(self, name: str) -> tuple[Sequence[node_pb2.Node], bool]:
        if name:
            return [await self._allocators.node(name)], False
        return await self._allocators.nodes()

    async def _switch(self, request: requests.Request, *, is_running: bool) -> responses.Response:
        found = parameters.read(request, SWITCHING)
        node, pool = parameters.node(found), parameters.pool(found)
        request_id = parameters.request_id(found)
        order = order_pb2.Order(
            order_id=request_id, monitoring=order_pb2.MonitoringOrder(pool=pool, is_running=is_running)
        )
        not_reached: list[str] = []
        answers = await self._allocators.order(node or allocators.EVERY_NODE, order)
        if not node:
            known, _ = await self._allocators.nodes(is_brief=True)
            answered = {each.node for each in answers}
            not_reached = [
                each.name
                for each in known
                if each.name not in answered and each.state != node_pb2.NODE_STATE_GONE
            ]
        done = _succeeded(answers, not_reached, pool=pool if not node else "")
        _log.info("monitoring_switched", is_running=is_running, node=node, pool=pool, request_id=request_id)
        body: SwitchAnswer = {
            "request_id": request_id,
            "nodes": [
                {
                    "node": each.node,
                    "pools": [node_documents.pool(of, node=each.node) for of in each.result.pools],
                }
                for each in done
            ],
            "not_reached": not_reached,
        }
        return responses.JSONResponse(body)


def _only(answers: Sequence[wire.OrderNodeResponse.Answer]) -> wire.OrderNodeResponse.Answer:
    """The answer of the one node that was asked. Raises what it refused."""
    if len(answers) != 1:
        raise errors.Unavailable("the node did not answer in time; the same request_id may be sent again")
    refused = allocators.refusal_of(answers[0].result)
    if refused is not None:
        raise refused
    if not answers[0].result.pools:
        raise errors.LeaseholdError(f"{answers[0].node} did not tell which pool it scaled")
    return answers[0]


def _succeeded(
    answers: Sequence[wire.OrderNodeResponse.Answer], not_reached: Sequence[str], *, pool: str
) -> list[wire.OrderNodeResponse.Answer]:
    """Answers of the nodes that did it. Raises the first refusal, which tells whose it is and who did it.

    With a `pool`, every node was asked: that some do not have it is no refusal, that none has is one.
    """
    refused = {each.node: refusal for each in answers if (refusal := allocators.refusal_of(each.result))}
    done = [each for each in answers if each.node not in refused]
    if pool and done:
        refused = {name: each for name, each in refused.items() if not isinstance(each, errors.NotFound)}
    for name, refusal in refused.items():
        if len(answers) == 1:
            raise refusal
        refusal.message = f"{name}: {refusal.message}"
        refusal.metadata |= {"refused_by": ",".join(refused), "done_by": ",".join(each.node for each in done)}
        raise refusal
    if not done and not_reached:
        raise errors.Unavailable(f"no node is connected; not reached: {', '.join(not_reached)}")
    if not done:
        raise errors.NotFound("there is no node")
    return done


def _of_pool(nodes: list[node_documents.Node], pool: str) -> list[node_documents.Node]:
    """Nodes that have the pool, and of their pools only that. Raises `NotFound`; empty: all as they are."""
    if not pool:
        return nodes
    found: list[node_documents.Node] = []
    for node in nodes:
        status = node["status"]
        if status is None:
            continue
        pools = [each for each in status["pools"] if each["name"] == pool]
        if pools:
            found.append({**node, "status": {**status, "pools": pools}})
    if not found:
        names = sorted({each["name"] for each in _pools(nodes)})
        raise errors.NotFound(
            f"there is no pool {pool}; there are {', '.join(names) or 'none'}",
            metadata={"choices": ",".join(names)},
        )
    return found


def _pools(nodes: Iterable[node_documents.Node]) -> Iterable[node_documents.PoolWithWorkers]:
    for node in nodes:
        if node["status"] is not None:
            yield from node["status"]["pools"]


def _without_workers(pool: node_documents.PoolWithWorkers) -> node_documents.Pool:
    # A TypedDict without its last key, which no type tells.
    return {name: value for name, value in pool.items() if name != "workers"}  # type: ignore[return-value]


def _is_reporting(node: node_documents.Node) -> bool:
    return node["state"] in (registry_model.NodeState.READY, registry_model.NodeState.DRAINING)


def _totals(nodes: Sequence[node_documents.Node]) -> Totals:
    reporting = [each for each in nodes if _is_reporting(each)]
    pools = list(_pools(reporting))
    memories = [
        memory for each in reporting if each["status"] and (memory := each["status"]["memory"]) is not None
    ]
    total = sum(each["total_bytes"] for each in memories)
    available = sum(each["available_bytes"] for each in memories)
    return {
        "nodes": len(nodes),
        "nodes_ready": sum(each["state"] is registry_model.NodeState.READY for each in nodes),
        "nodes_lost": sum(each["state"] is registry_model.NodeState.LOST for each in nodes),
        "pools": len(pools),
        "pools_paused": sum(each["mode"] is model.PoolMode.PAUSED for each in pools),
        "workers_running": sum(each["running"] for each in pools),
        "workers_starting": sum(each["starting"] for each in pools),
        "workers_stopping": sum(each["stopping"] for each in pools),
        "workers_optimal": sum(each["optimal"] for each in pools),
        "workers_desired": sum(each["desired"] for each in pools),
        "crashes_total": sum(each["crashes_total"] for each in pools),
        "oom_kills_total": sum(each["oom_kills_total"] for each in pools),
        "memory_total_bytes": total,
        "memory_total_gb": node_documents.gb(total),
        "memory_available_bytes": available,
        "memory_available_gb": node_documents.gb(available),
    }


def _warnings(node: node_documents.Node) -> list[str]:
    """What a person should look at, each with the name of its node."""
    return [f"{node['name']}: {text}" for text in node_documents.warnings(node)]


def _memory(node: node_documents.Node) -> NodeMemory:
    status = node["status"]
    return {
        "node": node["name"],
        "state": node["state"],
        "last_report_age_seconds": node["last_report_age_seconds"],
        "memory": None if status is None else status["memory"],
        "load_average": [] if status is None else status["load_average"],
        "load_per_core": None if status is None else status["load_per_core"],
        "cpus": node["cpus"],
        "warnings": node_documents.warnings(node),
    }


ANSWERS: Final = (
    StatusAnswer,
    MemoryAnswer,
    WorkersAnswer,
    ScaleAnswer,
    SwitchAnswer,
    budget_documents.BudgetStatus,
    refusals.ErrorAnswer,
)
