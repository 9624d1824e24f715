"""What the lease machines want done. The shell executes these in the order of the driver's contract.

1. Every record of a batch is written to etcd in a transaction that compares the epoch and that starts after
   the events of the batch arrived.
2. Only then are its messages sent.
3. The journal follows when it can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core import processes
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import messages, model


@dataclass(frozen=True, slots=True)
class Record:
    """etcd's upper bound of what one incarnation of a holder may have."""

    budget: str
    holder: str
    incarnation: str
    lease_id: int
    #: Micro-units by dimension.
    amounts: Mapping[str, int]
    ttl_seconds: float
    #: The lease is gone and its units only cool.
    is_cooling: bool = False
    is_tracked: bool = True
    #: A newer incarnation of the holder has joined: this lease is nobody's present one.
    is_superseded: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells records apart."""
        return (self.budget, self.holder, self.incarnation)


@dataclass(frozen=True, slots=True)
class PutRecord:
    """Write a record."""

    record: Record


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """Remove the record of a key."""

    key: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class PutDefinition:
    """Write the in-force copy of a budget's definition."""

    spec: model.BudgetSpec
    version: int
    #: Deleted by an administrator; kept until its last units have cooled.
    is_retired: bool = False
    #: What earlier definitions still bind, in seconds that are left.
    aftermath: aftermaths.Aftermath = aftermaths.NOTHING


@dataclass(frozen=True, slots=True)
class DeleteDefinition:
    """Remove the in-force copy."""

    budget: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message on a holders' connection; a connection that is gone is no error."""

    session: int
    message: messages.Grant | messages.Refusal


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a unary call. None answers a release."""

    token: int
    message: messages.Grant | messages.Refusal | None


@dataclass(frozen=True, slots=True)
class WatchProcess:
    """Tell when this process exits, if it can be seen from here."""

    process: processes.ProcessKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """A line of the lease ledger."""

    budget: str
    event: str
    holder: str = ""
    incarnation: str = ""
    lease_id: int = 0
    amounts: Mapping[str, int] = field(default_factory=dict)
    cause: str = ""


Effect = PutRecord | DeleteRecord | PutDefinition | DeleteDefinition | Send | Reply | WatchProcess | Journal
