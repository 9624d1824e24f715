"""Between the nodes' connections and the jobs of one reign: what nodes are, what runs there, what is to run.

Agents connect before Postgres has been read. What they tell of attempts until then waits here, by node, and is
told to the machine once it is there; of each attempt the newest report counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from leasehold.allocator import nodes
from leasehold.api.job.v1 import attempt_pb2
from leasehold.core import errors
from leasehold.core.job import effects, machine, model
from leasehold.core.node import registry, registry_model
from leasehold.core.placement import model as placement
from leasehold.rpc import attempt_codec

#: An event of the machine: what it is given, with the present instant.
Event = Callable[[machine.JobMachine, float], None]
#: Gives the machine an event, if it is there.
Feed = Callable[[Event], None]

_OPENNESS = {
    registry_model.NodeState.READY: placement.Openness.OPEN,
    registry_model.NodeState.DRAINING: placement.Openness.DRAINING,
}


@dataclass(slots=True)
class _Untold:
    """What a node has told while there was no machine."""

    has_inventory: bool = False
    reports: dict[model.AttemptRef, model.Report] = field(default_factory=dict)


@dataclass(slots=True)
class Spoken:
    """What an agent said last of an attempt."""

    phase: model.AttemptPhase
    #: When it first said so; the leader's clock, in seconds.
    since: float


@dataclass(slots=True)
class NodeWord:
    """What the agent of a node has said since it connected."""

    #: When it told its inventory; the leader's clock, in seconds.
    since: float
    attempts: dict[model.AttemptRef, Spoken] = field(default_factory=dict)


class JobDispatch:
    """As `nodes.JobSide`. `feed` gives events to the machine; `begin` tells that there is one."""

    def __init__(self, known: nodes.Nodes, feed: Feed) -> None:
        self._nodes = known
        self._feed = feed
        self._is_begun = False
        self._told: dict[str, effects.NodeFacts] = {}
        #: Nodes that have a row of capacity, though they may declare nothing now.
        self._with_capacity: frozenset[str] = frozenset()
        self._untold: dict[str, _Untold] = {}
        #: What agents that are connected have said, by node; for audits only.
        self.word: dict[str, NodeWord] = {}

    # The machine

    def begin(self, with_capacity: frozenset[str]) -> None:
        """There is a machine that knows nothing of nodes but these names: tell it what is there."""
        self._is_begun, self._with_capacity = True, with_capacity
        self._told.clear()
        for name in self._nodes.registry.nodes:
            self.node_changed(name)
        untold, self._untold = self._untold, {}
        for name, waiting in untold.items():
            self._report(name, tuple(waiting.reports.values()), is_inventory=waiting.has_inventory)

    def end(self, why: errors.LeaseholdError) -> None:
        """The machine is gone, and another will come: agents tell it everything on new connections."""
        self._is_begun = False
        self._untold.clear()
        for name in self._nodes.connected():
            session = self._nodes.session_of(name)
            if session is not None:
                session.end(why)

    # From the nodes

    def node_changed(self, name: str) -> None:
        """A node, or its connection, may be another than before."""
        node = self._nodes.registry.nodes.get(name)
        if node is None:
            return
        if node.session is None:
            self._untold.pop(name, None)
            self.word.pop(name, None)
        if not self._is_begun:
            return
        before = self._told.get(name)
        facts = self._facts(node, before)
        if facts is not None and facts != before:
            self._told[name] = facts
            self._feed(lambda jobs, now: jobs.node_seen(now, facts))

    def _facts(self, node: registry.Node, before: effects.NodeFacts | None) -> effects.NodeFacts | None:
        """None: it has nothing to do with jobs, or this leader has not heard what it declares."""
        registration = node.record.registration
        if node.session is None:
            if before is None:
                return None
            return replace(before, is_connected=False, openness=placement.Openness.NOT_READY)
        declared = placement.Resources(registration.job_cpus, registration.job_memory_bytes)
        if before is None and declared == (0, 0) and registration.name not in self._with_capacity:
            return None
        return effects.NodeFacts(
            name=registration.name,
            boot_id=registration.boot_id,
            node_id=registration.node_id,
            declared=declared,
            labels=registration.labels,
            templates=registration.job_templates,
            openness=_OPENNESS.get(node.state, placement.Openness.NOT_READY),
            is_connected=True,
        )

    def node_deleted(self, name: str) -> None:
        """A node was forgotten."""
        self._untold.pop(name, None)
        if self._told.pop(name, None) is not None or name in self._with_capacity:
            self._feed(lambda jobs, now: jobs.node_forgotten(name))

    def inventory(self, name: str, reports: Sequence[attempt_pb2.AttemptReport]) -> None:
        """Every attempt that the agent knows, on a new connection. Raises `InvalidArgument`."""
        decoded = tuple(attempt_codec.decode_report(report) for report in reports)
        self.word[name] = NodeWord(self._nodes.reign.now())
        self._heard(name, decoded)
        if self._is_begun:
            self._report(name, decoded, is_inventory=True)
        else:
            self._untold[name] = _Untold(True, {report.ref: report for report in decoded})

    def attempts(self, name: str, reports: Sequence[attempt_pb2.AttemptReport]) -> None:
        """Attempts that have changed. Raises `InvalidArgument`."""
        decoded = tuple(attempt_codec.decode_report(report) for report in reports)
        self._heard(name, decoded)
        if self._is_begun:
            self._report(name, decoded, is_inventory=False)
        else:
            self._untold.setdefault(name, _Untold()).reports.update({each.ref: each for each in decoded})

    def _heard(self, name: str, reports: Sequence[model.Report]) -> None:
        word, now = self.word.get(name), self._nodes.reign.now()
        if word is None:
            # It has told no inventory: what it says of single attempts proves nothing of the others.
            return
        spoken = word.attempts
        for report in reports:
            before = spoken.get(report.ref)
            if before is None or before.phase is not report.phase:
                spoken[report.ref] = Spoken(report.phase, now)

    def _report(self, name: str, reports: Sequence[model.Report], *, is_inventory: bool) -> None:
        def told(jobs: machine.JobMachine, now: float) -> None:
            if is_inventory:
                jobs.inventory(now, name, reports)
                return
            for report in reports:
                jobs.attempt_reported(now, name, report)

        self._feed(told)

    # To the nodes

    def send(self, effect: effects.Assign | effects.Stop | effects.Forget) -> None:
        """Tell a node's agent. One without a connection is told what it lacks when it comes back."""
        session = self._nodes.session_of(effect.node)
        if session is None:
            return
        if isinstance(effect, effects.Assign):
            session.assign(effect.ref, attempt_codec.encode_assignment(effect.ref, effect.spec, effect.held))
        elif isinstance(effect, effects.Stop):
            session.stop(effect.ref)
        else:
            word = self.word.get(effect.node)
            if word is not None:
                word.attempts.pop(effect.ref, None)
            session.forget(effect.ref)
