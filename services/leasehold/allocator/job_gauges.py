"""What an allocator tells Prometheus of jobs: what is allocated, what waits, how batches go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leasehold.core.job import views
from leasehold.observe import metrics

if TYPE_CHECKING:
    from leasehold.allocator import jobs

#: Of changes in a batch; it has at most 1,000.
BATCH_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
#: Of a wake until what was placed on it is committed.
PLACEMENT_BOUNDS = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
)


class FlushMetrics:
    """Counts batches, over all reigns of this process."""

    def __init__(self, registry: metrics.Registry) -> None:
        self._size = registry.histogram(
            "leasehold_job_flush_changes", "Changes of one batch", bounds=BATCH_BOUNDS
        ).labels()
        self._seconds = registry.histogram("leasehold_job_flush_seconds", "Time that a batch took").labels()
        self._placement = registry.histogram(
            "leasehold_job_placement_seconds",
            "Of each allocation: since the first event that may have led to it, until it was committed",
            bounds=PLACEMENT_BOUNDS,
        ).labels()
        self._lost = registry.counter(
            "leasehold_job_flushes_lost_total", "Batches whose answer never came"
        ).labels()
        self._unreleased = registry.counter(
            "leasehold_job_ended_unreleased_total",
            "Allocations that outlived their job, given back by the sweep",
        ).labels()

    def flushed(self, changes: int, seconds: float) -> None:
        """A batch was committed."""
        self._size.observe(float(changes))
        self._seconds.observe(seconds)

    def placed(self, allocations: int, seconds: float) -> None:
        """Allocations were committed, so long after what led to them, at most."""
        self._placement.observe(seconds, allocations)

    def lost(self) -> None:
        """A batch went unanswered."""
        self._lost.add()

    def mended(self, allocations: int) -> None:
        """Allocations of jobs that had ended were found, and released."""
        self._unreleased.add(float(allocations))


def collect(registry: metrics.Registry, known: jobs.Jobs) -> None:
    """Put the present figures into a registry that is exposed once."""
    machine = known.machine
    away = registry.gauge(
        "leasehold_jobs_without_postgres", "1 while jobs cannot be changed, Postgres being away"
    )
    away.labels().set(float(known.is_postgres_away))
    if machine is None:
        return
    states = registry.gauge("leasehold_jobs", "Jobs by state", ("state",))
    states.labels("pending").set(machine.pending_count)
    states.labels("running").set(machine.running_count)
    unknown = registry.gauge("leasehold_job_attempts_unknown", "Attempts that may run on nodes that are silent")
    unknown.labels().set(machine.unknown_count)
    _capacity(registry, machine.utilization())


def _capacity(registry: metrics.Registry, found: views.Utilization) -> None:
    labels = ("node",)
    cpus = registry.gauge("leasehold_node_allocated_cpus", "CPUs that jobs have; node empty: all", labels)
    cpus_total = registry.gauge("leasehold_node_job_cpus", "CPUs that jobs may have; node empty: all", labels)
    memory = registry.gauge("leasehold_node_allocated_memory_bytes", "Memory that jobs have", labels)
    memory_total = registry.gauge("leasehold_node_job_memory_bytes", "Memory that jobs may have", labels)
    for node in (*found.nodes, found.total):
        cpus.labels(node.name).set(node.used.cpus)
        cpus_total.labels(node.name).set(node.total.cpus)
        memory.labels(node.name).set(node.used.memory_bytes)
        memory_total.labels(node.name).set(node.total.memory_bytes)
