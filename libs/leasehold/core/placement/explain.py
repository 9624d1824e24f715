"""Why a job waits, in words: every node under one reason, the queue's quota, and who is before it."""

from collections import Counter
from collections.abc import Iterable

from leasehold.core.node import amounts
from leasehold.core.placement import model

_REASONS = tuple(model.BlockReason)


def blocked(shape: model.Shape, reasons: Iterable[model.BlockReason | None]) -> tuple[model.NodesBlocked, ...]:
    """The reasons, one of each node (None: it takes the job), counted; the most frequent first."""
    counts = Counter(reason for reason in reasons if reason is not None)
    return tuple(
        model.NodesBlocked(nodes=nodes, reason=reason, detail=_detail(shape, reason, nodes))
        for reason, nodes in sorted(counts.items(), key=lambda item: (-item[1], _REASONS.index(item[0])))
    )


def _detail(shape: model.Shape, reason: model.BlockReason, nodes: int) -> str:
    lack = "lacks" if nodes == 1 else "lack"
    cpus = shape.required.cpus
    words = {
        model.BlockReason.NOT_READY: "not ready",
        model.BlockReason.DRAINING: "draining",
        model.BlockReason.WRONG_LABEL: "wrong label",
        model.BlockReason.NO_TEMPLATE: f"without template {shape.template}",
        model.BlockReason.TOO_SMALL: "too small",
        model.BlockReason.LACKS_CPUS: f"{lack} {cpus} CPU{'' if cpus == 1 else 's'}",
        model.BlockReason.LACKS_MEMORY: f"{lack} {amounts.text(shape.required.memory_bytes)}",
        model.BlockReason.RESERVED: "reserved for jobs before it",
    }
    return f"{nodes} {words[reason]}"


def summary(nodes: int, found: tuple[model.NodesBlocked, ...], *, more: str = "") -> str:
    """``7 nodes: 4 lack 4 CPUs, 2 draining, 1 wrong label``, and what else there is to say."""
    if nodes == 0:
        told = "no nodes are known"
    else:
        parts = [one.detail for one in found]
        free = nodes - sum(one.nodes for one in found)
        if free:
            parts.append(f"{free} {'has' if free == 1 else 'have'} room")
        told = f"{nodes} node{'' if nodes == 1 else 's'}: {', '.join(parts)}"
    return f"{told}; {more}" if more else told


def over_quota(queue: model.Queue, required: model.Resources, left: model.Resources) -> str:
    """What a queue's quota lacks for a job; ``queue batch: 3 of 8 CPUs left, 4 needed``."""
    parts = []
    if queue.nominal_cpus is not None and left.cpus < required.cpus:
        parts.append(f"{max(0, left.cpus)} of {queue.nominal_cpus} CPUs left, {required.cpus} needed")
    if queue.nominal_memory_bytes is not None and left.memory_bytes < required.memory_bytes:
        parts.append(
            f"{amounts.text(max(0, left.memory_bytes))} of {amounts.text(queue.nominal_memory_bytes)} left, "
            f"{amounts.text(required.memory_bytes)} needed"
        )
    return f"queue {queue.name}: {'; '.join(parts)}"


def over_nominal(queue: model.Queue, required: model.Resources) -> str:
    """Says that a queue's whole quota is too small for a job; empty: it is not."""
    if queue.nominal_cpus is not None and queue.nominal_cpus < required.cpus:
        return f"queue {queue.name} has a quota of {queue.nominal_cpus} CPUs, {required.cpus} needed"
    if queue.nominal_memory_bytes is not None and queue.nominal_memory_bytes < required.memory_bytes:
        quota = amounts.text(queue.nominal_memory_bytes)
        return f"queue {queue.name} has a quota of {quota}, {amounts.text(required.memory_bytes)} needed"
    return ""
