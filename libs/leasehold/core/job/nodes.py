"""Nodes as the machine of jobs knows them: what is committed of them, and what their agents say."""

from dataclasses import dataclass, field

from leasehold.core.job import changes, effects
from leasehold.core.placement import model as placement

NOTHING = placement.Resources(0, 0)

#: Of `Allocate.boot_id`, as Postgres takes it.
_BOOT_ID_LENGTH_MAX = 64
_SEPARATOR = "/"


def boot_key(facts: effects.NodeFacts) -> str:
    """What an allocation belongs to, as it is kept: the node's boot, and the state folder of its agent.

    With the folder, so that a later leader can tell whether an agent that does not know an attempt has ever
    been the one that was told of it.
    """
    return f"{facts.boot_id}{_SEPARATOR}{facts.node_id}"[:_BOOT_ID_LENGTH_MAX]


def boot_of(key: str) -> str:
    """The boot of a `boot_key`."""
    return key.partition(_SEPARATOR)[0]


@dataclass(slots=True)
class NodeLife:
    """One node."""

    name: str
    #: None: this leader has not heard of it.
    facts: effects.NodeFacts | None = None
    #: An operator has deleted it: it is to declare nothing.
    is_forgotten: bool = False
    #: As committed (see `boot_key`); empty: it has no row yet.
    boot_key: str = ""
    declared: placement.Resources = NOTHING
    used: placement.Resources = NOTHING
    #: Jobs that have an allocation of it.
    jobs: set[str] = field(default_factory=set)
    #: Its agent has told, on the present connection, all that it knows.
    has_inventory: bool = False

    @property
    def boot_id(self) -> str:
        """Of its present boot; empty: not heard."""
        return "" if self.facts is None else self.facts.boot_id

    @property
    def is_connected(self) -> bool:
        """Whether its agent can be told something."""
        return self.facts is not None and self.facts.is_connected

    @property
    def is_ready(self) -> bool:
        """Whether its agent may be told to start something: what it knows already is known here."""
        return self.is_connected and self.has_inventory

    @property
    def gated(self) -> placement.Resources:
        """Its total: what it declares, or what is in use where that is more, until jobs release it."""
        return placement.Resources(
            max(self.declared.cpus, self.used.cpus), max(self.declared.memory_bytes, self.used.memory_bytes)
        )

    def wanted(self) -> changes.SetCapacity | None:
        """What Postgres is to be told of it; None: nothing."""
        if self.is_forgotten:
            boot_id, declared = self.boot_key, NOTHING
        elif self.facts is not None:
            boot_id, declared = boot_key(self.facts), self.facts.declared
        else:
            return None
        if (boot_id, declared) == (self.boot_key, self.declared) or (not self.boot_key and declared == NOTHING):
            return None
        return changes.SetCapacity(node=self.name, boot_id=boot_id, declared=declared)

    def placed(self) -> placement.Node:
        """It, as placement sees it. It is closed until what it declares is committed."""
        facts = self.facts
        if facts is None or self.is_forgotten:
            return placement.Node(
                name=self.name,
                total=self.declared,
                used=self.used,
                openness=placement.Openness.NOT_READY,
            )
        is_open = facts.is_connected and bool(self.boot_key) and self.wanted() is None
        return placement.Node(
            name=self.name,
            total=self.declared,
            used=self.used,
            openness=facts.openness if is_open else placement.Openness.NOT_READY,
            labels=facts.labels,
            templates=facts.templates,
        )
