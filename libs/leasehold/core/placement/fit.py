"""Whether a job fits on a node: the one answer behind plan, its serial re-check, explain and dry run."""

from leasehold.core.placement import model


def is_eligible(shape: model.Shape, node: model.Node) -> bool:
    """Whether labels and templates of `node` allow jobs of `shape`, be it full or not."""
    return _barrier(shape, node) is None


def never(shape: model.Shape, node: model.Node) -> model.BlockReason | None:
    """Why `node` could not hold a job of `shape` even if it were open and empty; None: it could."""
    barrier = _barrier(shape, node)
    if barrier is None and not node.total.holds(shape.required):
        return model.BlockReason.TOO_SMALL
    return barrier


def block(shape: model.Shape, node: model.Node, free: model.Resources) -> model.BlockReason | None:
    """Why `node` with so much `free` takes no job of `shape` now, reservations aside; None: it takes one.

    The first reason that holds, in the order of `BlockReason`. `free` may be negative after a total has shrunk.
    """
    if node.openness is not model.Openness.OPEN:
        is_draining = node.openness is model.Openness.DRAINING
        return model.BlockReason.DRAINING if is_draining else model.BlockReason.NOT_READY
    reason = never(shape, node)
    if reason is not None:
        return reason
    if free.cpus < shape.required.cpus:
        return model.BlockReason.LACKS_CPUS
    if free.memory_bytes < shape.required.memory_bytes:
        return model.BlockReason.LACKS_MEMORY
    return None


def _barrier(shape: model.Shape, node: model.Node) -> model.BlockReason | None:
    labels = node.labels
    for key, value in shape.selector:
        if labels.get(key) != value:
            return model.BlockReason.WRONG_LABEL
    if shape.template and shape.template not in node.templates:
        return model.BlockReason.NO_TEMPLATE
    return None
