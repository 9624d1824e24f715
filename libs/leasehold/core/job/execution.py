"""Attempts on their nodes: what agents are told, and what their word means, by difference with the inventory.

Absence from an agent's inventory proves that it has never taken an attempt, so it may be told again, as long as
its state folder is the one that was told before. An attempt is over by its agent's record, by a new boot of its
host, or by what others conclude; until then it counts, and is UNKNOWN while its node is silent.
"""

from collections.abc import Sequence

from leasehold.core.job import attempts, effects, model, nodes
from leasehold.core.job import mirror as mirrors
from leasehold.core.job import outbox as outboxes
from leasehold.core.job.model import AttemptPhase, EndCause

#: From a new boot of a host to its agent's inventory, which may tell ends that came before it.
INVENTORY_SECONDS = 30.0

_NEVER = float("inf")


class Execution:
    """Events of nodes, and what committed changes mean for them. Effects are appended to `out`."""

    def __init__(self, mirror: mirrors.Mirror, outbox: outboxes.Outbox, out: list[effects.Effect]) -> None:
        self._mirror = mirror
        self._outbox = outbox
        self._out = out
        #: In the batch that is on its way: their end cannot be another any more.
        self.ends_in_flight: frozenset[str] = frozenset()
        #: When attempts of an earlier boot of a node count as lost though no inventory came.
        self._orphans_at: dict[str, float] = {}

    # Nodes

    def node_seen(self, now: float, facts: effects.NodeFacts) -> bool:
        """A node is so now. Whether its connection came or went."""
        node = self._mirror.node(facts.name)
        before = node.facts
        was_connected = node.is_connected
        node.facts, node.is_forgotten = facts, False
        is_other = before is not None and (before.boot_id, before.node_id) != (facts.boot_id, facts.node_id)
        if not facts.is_connected or is_other:
            node.has_inventory = False
        self._outbox.nodes[facts.name] = None
        self._mirror.put_node(facts.name)
        if any(self._is_orphan(node, attempt) for attempt in self._on(node)):
            self._orphans_at.setdefault(facts.name, now + INVENTORY_SECONDS)
        else:
            self._orphans_at.pop(facts.name, None)
        if not facts.is_connected:
            self._silent(node)
        return was_connected != facts.is_connected

    def _silent(self, node: nodes.NodeLife) -> None:
        for attempt in self._on(node):
            if attempt.is_unsent:
                self._never_sent(attempt)
            elif attempt.phase is not AttemptPhase.UNKNOWN and attempt.end is None:
                attempt.phase = AttemptPhase.UNKNOWN
                self._out.append(effects.Changed(attempt.ref.job_id))

    def _never_sent(self, attempt: attempts.Attempt) -> None:
        detail = f"node {attempt.node} went away before it was told of it"
        self.conclude(attempt, model.Outcome(cause=EndCause.NOT_STARTED, detail=detail))

    def node_forgotten(self, name: str) -> None:
        """An operator has deleted a node. What it may still run stays counted."""
        node = self._mirror.nodes.get(name)
        if node is None:
            return
        node.facts, node.is_forgotten, node.has_inventory = None, True, False
        self._orphans_at.pop(name, None)
        self._silent(node)
        self._outbox.nodes[name] = None
        self._mirror.put_node(name)

    def inventory(self, now: float, name: str, reports: Sequence[model.Report]) -> None:
        """All that a node's agent knows."""
        node = self._mirror.nodes.get(name)
        if node is None or node.facts is None or not node.facts.is_connected:
            return
        node.has_inventory = True
        told = {report.ref for report in reports}
        for report in reports:
            self.reported(now, name, report)
        for attempt in self._on(node):
            if self._is_orphan(node, attempt):
                self._lost_by_boot(node, attempt)
            elif attempt.ref not in told:
                self._absent(node, attempt)
        self._orphans_at.pop(name, None)

    def _absent(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> None:
        if attempt.end is not None:
            return
        if node.facts is not None and attempt.boot_key == nodes.boot_key(node.facts):
            self._tell(node, attempt)
            return
        if attempt.is_unsent:
            self._never_sent(attempt)
            return
        self._out.append(
            effects.Note(
                "attempt_unknown_to_its_node",
                {"node": node.name, "job_id": attempt.ref.job_id, "attempt": attempt.ref.attempt},
            )
        )

    def tick(self, now: float) -> None:
        """Hosts that booted anew and whose agents tell nothing: what ran before is over."""
        for name in [name for name, at in self._orphans_at.items() if at <= now]:
            del self._orphans_at[name]
            node = self._mirror.nodes[name]
            for attempt in self._on(node):
                if self._is_orphan(node, attempt):
                    self._lost_by_boot(node, attempt)

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity: never."""
        return min(self._orphans_at.values(), default=_NEVER)

    def _is_orphan(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> bool:
        return (
            node.facts is not None
            and nodes.boot_of(attempt.boot_key) != node.facts.boot_id
            and attempt.end is None
        )

    def _is_of_another_folder(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> bool:
        """Whether it may still run, without the agent of now knowing of it."""
        return (
            node.facts is not None
            and nodes.boot_of(attempt.boot_key) == node.facts.boot_id
            and attempt.boot_key != nodes.boot_key(node.facts)
        )

    def _lost_by_boot(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> None:
        detail = f"node {node.name} was booted anew"
        self.conclude(attempt, model.Outcome(cause=EndCause.NODE_LOST, detail=detail))

    # Reports

    def reported(self, now: float, name: str, report: model.Report) -> None:
        """A node's agent tells how an attempt stands."""
        attempt = self._mirror.live(report.ref)
        is_end = report.phase is AttemptPhase.ENDED and report.outcome is not None
        if attempt is None or attempt.node != name or attempt.is_external:
            # It was given up before, or its end is committed already.
            self._out.append(effects.Forget(name, report.ref) if is_end else effects.Stop(name, report.ref))
            return
        node = self._mirror.nodes[name]
        if self._is_of_another_folder(node, attempt):
            # This agent was never told to start it; what it says of it, a tombstone say, proves nothing.
            return
        attempt.is_unsent = False
        if is_end and report.outcome is not None:
            attempt.is_end_reported = True
            is_better = attempt.is_end_by_timeout and report.ref.job_id not in self.ends_in_flight
            if attempt.end is None or is_better:
                attempt.is_end_by_timeout = False
                attempt.end = None
                self.conclude(attempt, report.outcome)
            return
        if attempt.end is not None or self._is_orphan(node, attempt):
            return
        if attempt.told(now, report):
            self._out.append(effects.Changed(report.ref.job_id))
        if self._mirror.jobs[report.ref.job_id].is_cancel_requested and (
            report.phase is not AttemptPhase.STOPPING
        ):
            self._out.append(effects.Stop(name, report.ref))

    # Ends

    def conclude(
        self, attempt: attempts.Attempt, outcome: model.Outcome, *, is_by_timeout: bool = False, actor: str = ""
    ) -> None:
        """An attempt is over: have it released. The first word counts."""
        if attempt.end is not None:
            return
        attempt.end = attempts.clean_detail(outcome)
        attempt.is_end_by_timeout, attempt.actor = is_by_timeout, actor
        attempt.phase = AttemptPhase.ENDED
        self._outbox.ends[attempt.ref.job_id] = None

    def released(self, attempt: attempts.Attempt) -> None:
        """Its end is committed: its agent need not keep it, and must not go on with it."""
        node = self._mirror.nodes[attempt.node]
        self._out.append(effects.Changed(attempt.ref.job_id))
        if attempt.is_external or not node.is_connected:
            return
        if attempt.is_end_reported:
            self._out.append(effects.Forget(node.name, attempt.ref))
        elif not attempt.is_unsent and nodes.boot_of(attempt.boot_key) == node.boot_id:
            self._out.append(effects.Stop(node.name, attempt.ref))

    # What is committed

    def allocated(self, attempt: attempts.Attempt) -> None:
        """An allocation is committed."""
        self._out.append(effects.Changed(attempt.ref.job_id))
        if attempt.is_external:
            attempt.phase = AttemptPhase.STARTED
            return
        node = self._mirror.nodes[attempt.node]
        if node.facts is None or not node.is_connected or attempt.boot_key != nodes.boot_key(node.facts):
            self._never_sent(attempt)
        elif node.is_ready:
            self._tell(node, attempt)

    def cancel_requested(self, job_id: str) -> None:
        """The wish to cancel a job that runs is committed."""
        attempt = self._mirror.attempts.get(job_id)
        self._out.append(effects.Changed(job_id))
        if attempt is None or attempt.is_external or attempt.end is not None:
            return
        if attempt.is_unsent:
            self.conclude(attempt, model.Outcome(cause=EndCause.CANCELLED, detail="it was not sent yet"))
            return
        node = self._mirror.nodes[attempt.node]
        if node.is_ready and not self._is_of_another_folder(node, attempt):
            self._stop(node, attempt)

    def _tell(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> None:
        if self._mirror.jobs[attempt.ref.job_id].is_cancel_requested:
            self._stop(node, attempt)
            return
        attempt.is_unsent = False
        attempt.phase = AttemptPhase.SENT
        self._out.append(effects.Assign(node.name, attempt.ref, attempt.spec, attempt.held))
        self._out.append(effects.Changed(attempt.ref.job_id))

    def _stop(self, node: nodes.NodeLife, attempt: attempts.Attempt) -> None:
        attempt.is_unsent = False
        attempt.phase = AttemptPhase.STOPPING
        self._out.append(effects.Stop(node.name, attempt.ref))

    def _on(self, node: nodes.NodeLife) -> list[attempts.Attempt]:
        """Attempts that its agent runs; of what runs elsewhere it knows nothing."""
        found = [self._mirror.attempts[job_id] for job_id in sorted(node.jobs)]
        return [attempt for attempt in found if not attempt.is_external]
