"""GET /metrics: the gateway's own, the fleet's as NodeService tells it, and the leader's, as one exposition.

An allocator that is away never makes it fail: `leasehold_allocator_up` is 0 then, and the fleet's gauges lack.
"""

import asyncio
import re
from collections.abc import Iterable, Iterator
from typing import Final

from leasehold.api.common.v1 import metrics_service_pb2 as metrics_wire
from leasehold.api.node.v1 import node_pb2
from leasehold.core import errors
from leasehold.core.node import model, registry_model
from leasehold.gateway import allocators
from leasehold.observe import logs, metrics
from leasehold.rpc import node_documents
from starlette import requests, responses

#: A scrape has 10 s by default; what the allocators do not tell by then is left out.
TIMEOUT_SECONDS: Final = 3.0
#: Of one metric of the fleet: 10,000 nodes with 64 pools at most tell less.
SERIES_MAX: Final = 1_000_000

_LINE: Final = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?P<labels>\{.*\})?\s")
_SUFFIXES: Final = ("_bucket", "_sum", "_count")

_log = logs.get_logger(__name__)


class Metrics:
    """The route's function."""

    def __init__(self, registry: metrics.Registry, leader: allocators.Allocators) -> None:
        self._registry = registry
        self._allocators = leader
        self._timeout_seconds = min(TIMEOUT_SECONDS, leader.timeout_seconds)
        self._up = registry.gauge("leasehold_allocator_up", "1 if a leading allocator answers, else 0").labels()

    async def expose(self, request: requests.Request) -> responses.Response:
        """GET /metrics."""
        nodes = await self._nodes()
        self._up.set(float(nodes is not None))
        # After the nodes: only now it is known which of the allocators leads, and every one tells its own.
        leaders = await self._leaders() if nodes is not None else ""
        own = self._registry.expose()
        # Of a thousand nodes it takes half a second, in which others must be answered.
        text = await asyncio.to_thread(lambda: merged([own, of_nodes(nodes or ()), leaders]))
        return responses.Response(text, media_type=metrics.CONTENT_TYPE)

    async def _nodes(self) -> list[node_pb2.Node] | None:
        try:
            nodes, _ = await self._allocators.nodes(timeout_seconds=self._timeout_seconds)
        except errors.LeaseholdError as error:
            _log.warning("allocator_away", error=error.message)
            return None
        return nodes

    async def _leaders(self) -> str:
        try:
            answer: metrics_wire.ExposeMetricsResponse = await self._allocators.call(
                "ExposeMetrics", metrics_wire.ExposeMetricsRequest(), timeout_seconds=self._timeout_seconds
            )
        except errors.LeaseholdError as error:
            _log.debug("leader_tells_no_metrics", error=error.message)
            return ""
        return answer.text


def of_nodes(nodes: Iterable[node_pb2.Node]) -> str:
    """Gauges of nodes, pools, workers and memory, in Prometheus' text format."""
    # Its labels come from nodes that were admitted, not from strangers: none may be lost.
    registry = metrics.Registry(series_max=SERIES_MAX)
    for node in map(node_documents.node, nodes):
        _node(registry, node)
    return registry.expose()


def _node(registry: metrics.Registry, node: node_documents.Node) -> None:
    name = node["name"]
    state = registry.gauge("leasehold_node_state", "1 at the state that the node is in", ("node", "state"))
    for each in registry_model.NodeState:
        state.labels(name, each.value).set(float(node["state"] is each))
    gauges: dict[str, tuple[str, float | None]] = {
        "leasehold_node_report_age_seconds": ("Since its last report", node["last_report_age_seconds"]),
        "leasehold_node_cpus": ("Processors of the host", node["cpus"]),
    }
    # What a node that is lost had is not what it has.
    status = node["status"] if node["state"] in registry_model.ALIVE_STATES else None
    if status is not None:
        gauges["leasehold_node_load_per_core"] = ("Load of 1 minute per processor", status["load_per_core"])
        gauges["leasehold_agent_rss_bytes"] = ("The agent's own memory", status["agent_rss_bytes"])
        gauges["leasehold_agent_shims_pss_bytes"] = ("Its shims' memory", status["shims_pss_bytes"])
        if status["memory"] is not None:
            gauges |= _memory(status["memory"])
    for metric, (description, value) in gauges.items():
        if value is not None:
            registry.gauge(metric, description, ("node",)).labels(name).set(value)
    for pool in status["pools"] if status is not None else ():
        _pool(registry, pool)


def _memory(memory: node_documents.Memory) -> dict[str, tuple[str, float | None]]:
    return {
        "leasehold_node_memory_total_bytes": ("Memory of the host", memory["total_bytes"]),
        "leasehold_node_memory_available_bytes": (
            "Least of MemAvailable, cgroups' room and the budget",
            memory["available_bytes"],
        ),
        "leasehold_node_memory_reserve_bytes": ("Never given to workers", memory["reserve_bytes"]),
        "leasehold_node_memory_used_ratio": ("0 to 1", memory["used_percent"] / 100),
        "leasehold_node_swap_used_bytes": ("Swap in use", memory["swap_used_bytes"]),
        "leasehold_node_memory_pressure_some_percent": (
            "PSI some of 10 s",
            memory["pressure_some_percent"],
        ),
        "leasehold_node_memory_pressure_full_percent": (
            "PSI full of 10 s",
            memory["pressure_full_percent"],
        ),
    }


def _pool(registry: metrics.Registry, pool: node_documents.PoolWithWorkers) -> None:
    labels = (pool["node"], pool["name"])
    names = ("node", "pool")
    workers = registry.gauge("leasehold_pool_workers", "Workers of a pool by state", (*names, "state"))
    for state in ("starting", "running", "stopping"):
        workers.labels(*labels, state).set(float(pool[state]))
    mode = registry.gauge("leasehold_pool_mode", "1 at the mode that the pool is in", (*names, "mode"))
    for each in model.PoolMode:
        mode.labels(*labels, each.value).set(float(pool["mode"] is each))
    depth = pool["depth"]
    gauges: dict[str, tuple[str, float | None]] = {
        "leasehold_pool_optimal_workers": ("What sizing would have", pool["optimal"]),
        "leasehold_pool_desired_workers": ("What is wanted now", pool["desired"]),
        "leasehold_pool_min_workers": ("MIN_WORKERS", pool["min_workers"]),
        "leasehold_pool_max_workers": ("MAX_WORKERS", pool["max_workers"]),
        "leasehold_pool_is_overcommitted": ("MIN is more than memory allows", float(pool["is_overcommitted"])),
        "leasehold_pool_is_blocked": ("No worker is started at all", float(pool["blocked_reason"] is not None)),
        # Not known is no sample, never 0.
        "leasehold_pool_queue_ready": ("Messages that wait", depth["ready"] if depth else None),
        "leasehold_pool_queue_unacknowledged": (
            "Messages that workers have",
            depth["unacknowledged"] if depth else None,
        ),
    }
    for metric, (description, value) in gauges.items():
        if value is not None:
            registry.gauge(metric, description, names).labels(*labels).set(value)
    totals = {
        "leasehold_pool_starts_total": ("Workers started", pool["starts_total"]),
        "leasehold_pool_crashes_total": ("Workers that crashed", pool["crashes_total"]),
        "leasehold_pool_oom_kills_total": ("Workers that the OOM killer ended", pool["oom_kills_total"]),
    }
    for metric, (description, total) in totals.items():
        registry.counter(metric, description, names).labels(*labels).add(total)
    held = registry.gauge("leasehold_worker_held_bytes", "What its end would free", (*names, "worker"))
    limit = registry.gauge("leasehold_worker_limit_bytes", "Its memory limit", (*names, "worker"))
    for worker in pool["workers"]:
        if worker["state"] is not model.WorkerState.EXITED:
            held.labels(*labels, worker["name"]).set(worker["held_bytes"])
            limit.labels(*labels, worker["name"]).set(worker["limit_bytes"])


def merged(texts: Iterable[str]) -> str:
    """Several expositions as one: each family once, its samples together, of a series that recurs the first."""
    families: dict[str, dict[str, str]] = {}  # family -> its comments and series -> lines
    for text in texts:
        for family, key, line in _entries(text):
            families.setdefault(family, {}).setdefault(key, line)
    return "".join(f"{line}\n" for _, lines in sorted(families.items()) for line in _comments_first(lines))


def _comments_first(lines: dict[str, str]) -> Iterator[str]:
    yield from (line for key, line in sorted(lines.items()) if key.startswith("#"))
    yield from (line for key, line in lines.items() if not key.startswith("#"))


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """Family, key within it, and line, of each line of an exposition; what is no such line is left out."""
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split(" ", 3)
        if line.startswith("#"):
            if len(words) == 4 and words[1] in ("HELP", "TYPE"):
                if words[1] == "TYPE":
                    kinds[words[2]] = words[3]
                yield words[2], f"# {words[1]}", line
            continue
        found = _LINE.match(line)
        if found is not None:
            yield _family(found["name"], kinds), f"{found['name']}{found['labels'] or ''}", line


def _family(name: str, kinds: dict[str, str]) -> str:
    for suffix in _SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name and kinds.get(base) in ("histogram", "summary"):
            return base
    return name
