"""What an allocator tells Prometheus of its reign: history, budgets by dimension, nodes by state."""

from collections.abc import Iterable

from leasehold.allocator import job_gauges
from leasehold.allocator import leadership as leaderships
from leasehold.core.budget import allocator, lease, quantity
from leasehold.core.node import registry_model
from leasehold.observe import metrics


def collect(registry: metrics.Registry, leadership: leaderships.Leadership) -> None:
    """Put the present figures into a registry that is exposed once."""
    reign, known = leadership.reign, leadership.nodes
    is_leading = reign is not None and not reign.is_over
    leads = registry.gauge("leasehold_allocator_is_leader", "1 at the allocator that leads")
    leads.labels().set(float(is_leading))
    if reign is None or not is_leading:
        return
    history = registry.gauge("leasehold_ledger_entries_waiting", "Ledger entries that Postgres has not yet")
    history.labels().set(reign.ledger.backlog_entries)
    lost = registry.counter("leasehold_ledger_entries_lost_total", "Ledger entries given up: too many waited")
    lost.labels().add(reign.ledger.lost_total)
    _budgets(registry, reign.core)
    if leadership.jobs is not None:
        job_gauges.collect(registry, leadership.jobs)
    if known is None:
        return
    counts = known.registry.counts()
    nodes = registry.gauge("leasehold_nodes", "Nodes by state", ("state",))
    for state in registry_model.NodeState:
        nodes.labels(state.value).set(counts.get(state, 0))
    streams = registry.gauge("leasehold_nodes_connected", "Nodes whose agent has a stream")
    streams.labels().set(len(known.connected()))
    mass = registry.gauge("leasehold_nodes_are_mass_lost", "1 while most nodes are lost together")
    mass.labels().set(float(known.registry.is_mass_loss))
    watched = registry.gauge("leasehold_processes_watched_elsewhere", "Holders whose deaths agents certify")
    watched.labels().set(len(known.registry.watched))
    waiting = registry.gauge("leasehold_node_writes_waiting", "Records of nodes that Postgres has not yet")
    waiting.labels().set(known.writer.waiting)


def _budgets(registry: metrics.Registry, core: allocator.Allocator) -> None:
    names = ("budget", "dimension")
    defined = registry.gauge("leasehold_budget_limit", "Units that are defined", names)
    in_force = registry.gauge("leasehold_budget_limit_in_force", "Units, after throttling", names)
    granted = registry.gauge("leasehold_budget_granted", "Units that holders may have or still count", names)
    cooling = registry.gauge("leasehold_budget_cooling", "Units of leases that are gone, cooling", names)
    quarantined = registry.gauge("leasehold_budget_quarantined", "Units whose use is not known", names)
    holders = registry.gauge("leasehold_budget_holders", "Holders with a lease", ("budget",))
    for budget in list(core.budgets.values()):
        book, name = budget.book, budget.spec.name
        holders.labels(name).set(len(book.leases))
        gone = [0] * len(book.names), [0] * len(book.names)
        for part in _parts(book.stranded.values()):
            gone[part.is_quarantine][part.index] += part.amount
        for index, dimension in enumerate(budget.spec.dimensions):
            values = (
                (defined, dimension.limit),
                (in_force, book.in_force[index]),
                (granted, book.outstanding[index]),
                (cooling, gone[False][index]),
                (quarantined, gone[True][index]),
            )
            for gauge, micros in values:
                gauge.labels(name, dimension.name).set(micros / quantity.MICRO)


def _parts(stranded: Iterable[list[lease.Stranded]]) -> Iterable[lease.Stranded]:
    return (part for parts in stranded for part in parts)
