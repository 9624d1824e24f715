"""What is told of jobs, nodes and queues to those who read. Values only."""

from dataclasses import dataclass

from leasehold.core.placement import model as placement


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUtilization:
    """What is allocated of a node, or of all."""

    #: Empty: all together.
    name: str
    used: placement.Resources
    total: placement.Resources
    running_jobs: int
    #: It takes no new jobs.
    is_closed: bool

    @property
    def cpus_percent(self) -> float:
        """allocated / total * 100; 0 where there are none."""
        return _percent(self.used.cpus, self.total.cpus)

    @property
    def memory_percent(self) -> float:
        """allocated / total * 100; 0 where there is none."""
        return _percent(self.used.memory_bytes, self.total.memory_bytes)


def _percent(used: int, total: int) -> float:
    return 100.0 * used / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """What is allocated of each node, in the order of names, and of all together."""

    nodes: tuple[NodeUtilization, ...]
    total: NodeUtilization
    #: Why reclaims by timeout are held back; empty: they are not.
    held_back_cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueUsage:
    """A queue, and what its jobs have."""

    queue: placement.Queue
    used: placement.Resources
    pending_jobs: int
    running_jobs: int
