"""The registry of nodes, as the allocator's leader keeps it: who is there, who is lost, who took whose place.

It lives in memory. Postgres is told of registrations and moves, never of reports; a new leader knows its nodes
from there, and gives each a whole TTL from its own takeover on, since it cannot know when they reported last.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from leasehold.core import errors, processes
from leasehold.core.node import registry_effects as effects
from leasehold.core.node import registry_model as model
from leasehold.core.node import watch_list
from leasehold.core.node.registry_model import NodeState

#: A tick that comes later than this was held up with everything else here: silence then proves nothing.
HELD_UP_SECONDS = 1.0
#: Fewer nodes that are lost together are no mass loss.
MASS_NODES_MIN = 3

_NEVER = float("inf")


@dataclass(slots=True)
class Node:
    """One node, and how it stands with this leader."""

    record: model.NodeRecord
    #: Number of its agent's connection.
    session: int | None = None
    #: When this leader last heard of it; None: never.
    reported_at: float | None = None
    #: It is lost at this instant, if it does not report before.
    deadline: float = _NEVER
    #: Terms that it was told on its present connection.
    told: model.Terms | None = None
    #: Its agent has said that it ends.
    is_leaving: bool = False
    lost_at: float = -_NEVER
    #: Its earliest entry in the queue of deadlines; infinity: it has none.
    queued_at: float = _NEVER

    @property
    def state(self) -> NodeState:
        """Its state."""
        return self.record.state

    @property
    def is_alive(self) -> bool:
        """Whether its agent is there, for all that is known."""
        return self.record.state in model.ALIVE_STATES


class NodeRegistry:
    """Events in, effects out. Instants are of one monotonic clock; `wall_seconds` is for people only."""

    def __init__(self, pace: model.Pace | None = None) -> None:
        self.nodes: dict[str, Node] = {}
        self.watched = watch_list.WatchList()
        self._pace = pace or model.Pace()
        self._names: dict[int, str] = {}
        self._queue: list[tuple[float, str]] = []
        self._terms = self._pace.terms(0)
        #: Nodes that have reports to make: all but those that are GONE.
        self._reporting = 0
        #: Names of nodes that were lost together with most others, and still are.
        self._lost_together: set[str] = set()
        self._is_mass_loss = False
        self._out: list[effects.Effect] = []

    # Reading

    @property
    def terms(self) -> model.Terms:
        """What nodes are told now."""
        return self._terms

    @property
    def is_mass_loss(self) -> bool:
        """Whether most nodes are lost, and were lost together: rather this allocator's own network."""
        return self._is_mass_loss

    def counts(self) -> Mapping[NodeState, int]:
        """Nodes by state."""
        return Counter(node.state for node in self.nodes.values())

    def get(self, name: str) -> Node:
        """The node of that name. Raises `NotFound`."""
        try:
            return self.nodes[name]
        except KeyError:
            raise errors.NotFound(f"there is no node {name}", field="node", metadata={"node": name}) from None

    def only(self) -> Node:
        """The only node, those that are gone apart. Raises `NotFound` or `InvalidArgument` if it is not one."""
        present = [node for node in self.nodes.values() if node.state is not NodeState.GONE]
        if not present:
            raise errors.NotFound("there is no node", field="node")
        if len(present) > 1:
            names = sorted(node.record.name for node in present)
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise errors.InvalidArgument(
                f"node: there are {len(names)} nodes, so one must be named: {shown}", field="node"
            )
        return present[0]

    def name_of(self, session: int) -> str | None:
        """The node of a connection; None: another one has taken its place, or it has not registered."""
        return self._names.get(session)

    # Events: agents

    def register(
        self,
        registration: model.Registration,
        now: float,
        *,
        wall_seconds: float,
        session: int | None = None,
        actor: str = "",
    ) -> None:
        """An agent has connected (`session`), or made itself known by a single call.

        Raises `NodeSuperseded` for an older incarnation than is known, `AlreadyExists` where another host of
        that name is there, `ResourceExhausted` for one node too many; nothing is changed then.
        """
        node = self.nodes.get(registration.name)
        if node is None:
            if len(self.nodes) >= model.NODES_MAX:
                raise errors.ResourceExhausted(f"there are {model.NODES_MAX} nodes; delete those that are gone")
            record = model.NodeRecord(registration=registration, register_time_seconds=wall_seconds)
            node = self._add(record)
            self._moved(node, None, "it registered for the first time")
            self._put(node, actor)
        else:
            _refuse_other(node, registration)
            self._replace_session(node, registration, session)
            self._renew(node, registration, wall_seconds, actor)
        node.is_leaving = False
        if session is not None:
            self._bind(node, session)
        self._heard(node, now)
        self._judge_mass_loss()

    def _renew(self, node: Node, registration: model.Registration, wall_seconds: float, actor: str) -> None:
        """Another life of the node, or the same one again."""
        before = node.record
        known = before.registration
        is_same_life = (known.node_id, known.incarnation) == (registration.node_id, registration.incarnation)
        if known.node_id != registration.node_id:
            cause = f"another host of this name has registered ({registration.node_id})"
        elif not is_same_life:
            cause = f"its agent has started again (incarnation {registration.incarnation})"
        else:
            cause = "its agent has connected again"
        node.record = replace(
            before,
            registration=registration,
            register_time_seconds=before.register_time_seconds if is_same_life else wall_seconds,
        )
        is_kept = is_same_life and before.state in model.ALIVE_STATES
        if not is_kept and before.state is not NodeState.READY:
            self._move(node, NodeState.READY, cause)
        elif not is_same_life:
            node.record = replace(node.record, cause=cause)
        if node.record != before:
            self._put(node, "" if registration == known else actor)

    def _replace_session(self, node: Node, registration: model.Registration, session: int | None) -> None:
        present = node.session
        known = node.record.registration
        if present is None or (session is None and registration == known):
            # By a single call the same agent says only that it lives.
            return
        error: errors.LeaseholdError = errors.Unavailable(
            f"the agent of node {known.name} has connected anew", retry_after_seconds=1.0
        )
        if (known.node_id, known.incarnation) != (registration.node_id, registration.incarnation):
            error = _superseded(known, registration.incarnation)
        self._unbind(node)
        self._out.append(effects.EndSession(present, error))

    def report(
        self, session: int, now: float, *, is_draining: bool | None = None, is_leaving: bool = False
    ) -> bool:
        """An agent reported on its connection; whether that still is its node's.

        `is_draining` None: as before.
        """
        name = self._names.get(session)
        if name is None:
            return False
        node = self.nodes[name]
        node.is_leaving = node.is_leaving or is_leaving
        self._heard(node, now, is_draining)
        return True

    def report_once(self, name: str, now: float, *, is_draining: bool | None = None) -> None:
        """A node that has registered by a single call reported by it."""
        self._heard(self.nodes[name], now, is_draining)

    def session_closed(self, session: int, now: float) -> None:
        """A connection is gone: no death. Unless it said that it ends, the node has the rest of its TTL."""
        name = self._names.get(session)
        if name is None:
            return
        node = self.nodes[name]
        self._unbind(node)
        if node.is_leaving:
            node.is_leaving = False
            self._move(node, NodeState.GONE, model.NODE_EDGES[NodeState.READY, NodeState.GONE])
            self._put(node)
            self._judge_mass_loss()

    def terms_due(self, session: int) -> model.Terms | None:
        """Terms that a connection has not been told; they count as told from now on."""
        name = self._names.get(session)
        if name is None:
            return None
        node = self.nodes[name]
        if node.told == self._terms:
            return None
        node.told = self._terms
        return self._terms

    def _heard(self, node: Node, now: float, is_draining: bool | None = None) -> None:
        node.reported_at = now
        state = node.state
        wanted = NodeState.DRAINING if is_draining else NodeState.READY
        if is_draining is None:
            wanted = state if state in model.ALIVE_STATES else NodeState.READY
        if wanted is not state:
            self._move(node, wanted, model.NODE_EDGES[state, wanted])
            self._put(node)
            self._judge_mass_loss()
        # The longer of the two: it may not have heard of shorter terms yet.
        ttl = self._terms.ttl_seconds
        if node.told is not None and node.told.ttl_seconds > ttl:
            ttl = node.told.ttl_seconds
        self._set_deadline(node, now + ttl)

    # Events: what was durable, what is forgotten

    def restore(self, records: Iterable[model.NodeRecord], now: float) -> None:
        """What Postgres knew when this leader took over, heard perhaps long after.

        What agents have told this leader meanwhile is newer, but for an agent whose successor is in Postgres.
        """
        for stored in records:
            node = self.nodes.get(stored.name)
            if node is None:
                self._add(stored)
                continue
            known, there = node.record.registration, stored.registration
            if known.node_id != there.node_id:
                continue
            if there.incarnation > known.incarnation:
                if node.session is not None:
                    self._out.append(effects.EndSession(node.session, _superseded(known, there.incarnation)))
                    self._unbind(node)
                self._count(node, -1)
                node.record, node.reported_at, node.deadline = stored, None, _NEVER
                self._count(node, 1)
                # What the earlier agent said may be on its way to Postgres.
                self._put(node)
            elif there.incarnation == known.incarnation:
                node.record = replace(node.record, register_time_seconds=stored.register_time_seconds)
                self._put(node)
        for node in self.nodes.values():
            if node.is_alive and node.reported_at is None and node.deadline == _NEVER:
                self._set_deadline(node, now + self._terms.ttl_seconds)

    def check_forget(self, name: str) -> Node:
        """The node, if it can be forgotten. Raises `NotFound`, `FailedPrecondition`."""
        node = self.get(name)
        if node.is_alive:
            raise errors.FailedPrecondition(
                f"node {name} is {node.state.name}; only one that is LOST or GONE can be deleted",
                metadata={"node": name, "state": node.state.name},
            )
        return node

    def forget(self, name: str) -> None:
        """Forget a node that is lost or gone; one that has come back stays. Its record is the caller's."""
        node = self.nodes.get(name)
        if node is None or node.is_alive:
            return
        if node.session is not None:
            gone = errors.NotFound(f"node {name} was deleted", metadata={"node": name})
            self._out.append(effects.EndSession(node.session, gone))
            self._unbind(node)
        self._count(node, -1)
        del self.nodes[name]
        self._lost_together.discard(name)
        self._judge_mass_loss()

    # Time

    def next_deadline(self) -> float:
        """Instant at which `tick` may have something to do; infinity if never."""
        return self._queue[0][0] if self._queue else _NEVER

    def tick(self, now: float) -> None:
        """Let time pass: who has not reported within its TTL is lost."""
        if now - self.next_deadline() > HELD_UP_SECONDS:
            self._give_time(now)
        lost = []
        while self._queue and self._queue[0][0] <= now:
            at, name = heapq.heappop(self._queue)
            node = self.nodes.get(name)
            if node is None or node.queued_at != at:
                continue
            node.queued_at = _NEVER
            if node.deadline <= now:
                lost.append(node)
            else:
                self._queue_up(node)
        if lost:
            self._lose(lost, now)

    def _give_time(self, now: float) -> None:
        """Reports may wait unread: every node has one more interval."""
        least = now + self._terms.report_interval_seconds
        for node in self.nodes.values():
            if node.deadline < least:
                node.deadline = least

    def _lose(self, lost: list[Node], now: float) -> None:
        for node in lost:
            silent = "" if node.reported_at is None else f" for {now - node.reported_at:.1f} s"
            node.lost_at = now
            self._move(node, NodeState.LOST, f"no report{silent}, its TTL is {self._terms.ttl_seconds:g} s")
        together = [
            node
            for node in self.nodes.values()
            if node.state is NodeState.LOST and now - node.lost_at <= self._terms.ttl_seconds
        ]
        living = sum(node.is_alive for node in self.nodes.values())
        if len(together) >= MASS_NODES_MIN and len(together) > living:
            self._lost_together.update(node.record.name for node in together)
        for node in lost:
            self._put(node)
        self._judge_mass_loss()

    def _judge_mass_loss(self) -> None:
        lost = len(self._lost_together)
        living = sum(node.is_alive for node in self.nodes.values()) if lost else 0
        is_mass_loss = lost >= MASS_NODES_MIN and lost > living
        if is_mass_loss != self._is_mass_loss:
            self._is_mass_loss = is_mass_loss
            self._out.append(effects.MassLossChanged(is_mass_loss, lost, lost + living))

    # Events: processes that hold leases

    def watch(self, process: processes.ProcessKey) -> None:
        """Have the agents at its place certify this process's death, those that connect later too."""
        for session in self.watched.add(process):
            self._out.append(effects.AskWatch(session, (process,)))

    def unwatch(self, process: processes.ProcessKey) -> None:
        """Nobody needs its certificate any more."""
        for session in self.watched.remove(process):
            self._out.append(effects.AskUnwatch(session, (process,)))

    def certify(self, name: str, process: processes.ProcessKey) -> bool:
        """A node's agent says that a process is dead; whether somebody needs to know.

        Raises `InvalidArgument` if it cannot know that.
        """
        registration = self.get(name).record.registration
        if watch_list.place_of(process) != watch_list.place_of_agent(registration):
            raise errors.InvalidArgument(
                f"deaths: process {process.pid} is of another boot or PID namespace than the agent of {name}",
                field="deaths.process",
            )
        is_needed = process in self.watched
        self.watched.remove(process)
        return is_needed

    # Parts

    def take_effects(self) -> list[effects.Effect]:
        """What is to be done, in order."""
        out, self._out = self._out, []
        return out

    def _add(self, record: model.NodeRecord) -> Node:
        node = self.nodes[record.name] = Node(record)
        self._count(node, 1)
        return node

    def _count(self, node: Node, change: int) -> None:
        if node.state is not NodeState.GONE:
            self._reporting += change
            self._terms = self._pace.terms(self._reporting)

    def _move(self, node: Node, state: NodeState, cause: str) -> None:
        before = node.state
        if (before, state) not in model.NODE_EDGES:
            raise errors.LeaseholdError(f"node {node.record.name} cannot go from {before} to {state} ({cause})")
        self._count(node, -1)
        node.record = replace(node.record, state=state, cause=cause)
        self._count(node, 1)
        if state is not NodeState.LOST:
            self._lost_together.discard(node.record.name)
        if not node.is_alive:
            node.deadline = _NEVER
        self._moved(node, before, cause)

    def _moved(self, node: Node, before: NodeState | None, cause: str) -> None:
        self._out.append(effects.NodeMoved(node.record.name, before, node.state, cause))

    def _put(self, node: Node, actor: str = "") -> None:
        self._out.append(effects.PutNode(record=node.record, actor=actor))

    def _bind(self, node: Node, session: int) -> None:
        node.session, node.told = session, None
        self._names[session] = node.record.name
        registration = node.record.registration
        known = self.watched.opened(session, watch_list.place_of_agent(registration))
        if known:
            self._out.append(effects.AskWatch(session, known))

    def _unbind(self, node: Node) -> None:
        session = node.session
        if session is not None:
            node.session = None
            self._names.pop(session, None)
            self.watched.closed(session, watch_list.place_of_agent(node.record.registration))

    def _set_deadline(self, node: Node, at: float) -> None:
        node.deadline = at
        # A later deadline is found when the queued one comes up.
        if at < node.queued_at:
            self._queue_up(node)

    def _queue_up(self, node: Node) -> None:
        if node.deadline != _NEVER:
            node.queued_at = node.deadline
            heapq.heappush(self._queue, (node.deadline, node.record.name))


def _refuse_other(node: Node, registration: model.Registration) -> None:
    """Raise if `registration` is of another host than the one that is there, or of an earlier life of it."""
    known = node.record.registration
    if known.node_id != registration.node_id:
        if node.is_alive:
            raise errors.AlreadyExists(
                f"another node named {known.name} is {node.state.name}: its id is {known.node_id}, not "
                f"{registration.node_id}; give this host another name",
                field="registration.name",
                metadata={"node": known.name, "node_id": known.node_id, "state": node.state.name},
            )
        return
    if registration.incarnation < known.incarnation:
        raise _superseded(registration, known.incarnation)
    if (
        registration.incarnation == known.incarnation
        and registration.boot_id != known.boot_id
        and node.is_alive
    ):
        raise errors.AlreadyExists(
            f"node {known.name} is {node.state.name} on another boot with the same id and incarnation: its "
            "state folder was copied; remove it on this host",
            field="registration.node_id",
            metadata={"node": known.name, "node_id": known.node_id, "boot_id": known.boot_id},
        )


def _superseded(registration: model.Registration, incarnation: int) -> errors.NodeSuperseded:
    return errors.NodeSuperseded(
        f"a newer agent of node {registration.name} has registered: incarnation {incarnation}, "
        f"not {registration.incarnation}",
        metadata={"node": registration.name, "incarnation": str(incarnation)},
    )
