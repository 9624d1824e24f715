"""What the registry of nodes wants done. The shell executes these in order.

A record is written to Postgres when Postgres can be reached; nothing else waits for it.
"""

from dataclasses import dataclass

from leasehold.core import errors, processes
from leasehold.core.node import registry_model


@dataclass(frozen=True, slots=True, kw_only=True)
class PutNode:
    """Write a node's record: it is new, or something durable of it has changed."""

    record: registry_model.NodeRecord
    #: Who registered, for the audit log; empty where only the state has moved, which the record itself tells.
    actor: str = ""


@dataclass(frozen=True, slots=True)
class EndSession:
    """End an agent's connection with an error. One that is gone is no error."""

    session: int
    error: errors.LeaseholdError


@dataclass(frozen=True, slots=True)
class AskWatch:
    """Have an agent certify the deaths of processes."""

    session: int
    processes: tuple[processes.ProcessKey, ...]


@dataclass(frozen=True, slots=True)
class AskUnwatch:
    """Nobody needs these certificates any more."""

    session: int
    processes: tuple[processes.ProcessKey, ...]


@dataclass(frozen=True, slots=True)
class NodeMoved:
    """A node is in another state: for the log."""

    name: str
    #: None: it was not known.
    before: registry_model.NodeState | None
    after: registry_model.NodeState
    cause: str


@dataclass(frozen=True, slots=True)
class MassLossChanged:
    """Most nodes are lost together, or are not any more: for the log."""

    is_mass_loss: bool
    #: Lost together, of so many.
    lost: int
    nodes: int


Effect = PutNode | EndSession | AskWatch | AskUnwatch | NodeMoved | MassLossChanged
