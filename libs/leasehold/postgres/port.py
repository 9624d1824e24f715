"""What Leasehold keeps in Postgres, as a port: `store.PostgresStore` and `memory.MemoryStore` implement it.

Every write that a leader makes takes its epoch, and is refused with `StaleEpoch` once a newer leader has raised
the fence, whatever the two are doing at that instant. Any method but `close` may raise `PostgresUnavailable`;
then a write may or may not have happened, and repeating it is safe where a `request_id` or a `batch` is given.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.core.node import registry_model

PAGE_SIZE_MAX = 1000
REQUEST_ID_LENGTH_MAX = 64  # printable ASCII characters
TEXT_LENGTH_MAX = 1000
LEDGER_BATCH_ENTRIES_MAX = 10_000
NODE_WRITES_MAX = 500
AUDIT_ENTRIES_MAX = 500
LEDGER_RETENTION_SECONDS = 7 * 86_400.0
REQUEST_RETENTION_SECONDS = 86_400.0

#: Event of the entry that stands for entries that were lost.
GAP = "GAP"

_EVENT = re.compile(r"[A-Z][A-Z0-9_]{0,62}")
_UNSIGNED_64_BITS = 2**64
_AMOUNT_NAME_LENGTH_MAX = 63
_NO_AMOUNTS: Mapping[str, float] = MappingProxyType({})

Item = TypeVar("Item")


def clean_text(text: str, *, length_max: int = TEXT_LENGTH_MAX) -> str:
    """`text` as Postgres can store it: no NUL, no lone surrogate, at most `length_max` characters.

    For words meant for people (cause, actor), where losing a character is better than losing the record.
    """
    storable = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return storable if len(storable) <= length_max else storable[: length_max - 1] + "…"


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a list. The next one begins after the key of the last item."""

    items: tuple[Item, ...]
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBudget:
    """A budget's definition in force, as Postgres has it."""

    spec: model.BudgetSpec
    #: 1 for a new budget, one more with each change.
    version: int
    #: Postgres's clock at the change, with time zone.
    update_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One event in the life of a lease, as it is appended. Raises `InvalidArgument`, naming the field.

    Entries are checked when they are made, so that no bad one can hold up the batch that it is in.
    """

    #: When it happened by the writer's wall clock, with time zone. For people; decides nothing.
    time: datetime
    #: UPPER_SNAKE, at most 63 characters: JOINED, GRANTED, SHRUNK, EXPIRED, GAP and others.
    event: str
    #: Empty where the event concerns no one budget or holder (GAP).
    budget: str = ""
    holder: str = ""
    incarnation: str = ""
    #: 0 to 2**64 - 1; 0: no lease.
    lease_id: int = 0
    #: Units (not micro-units) by dimension; for a GAP `entries_lost`.
    amounts: Mapping[str, float] = field(default_factory=lambda: _NO_AMOUNTS)
    #: For people; cut at 1000 characters.
    cause: str = ""

    def __post_init__(self) -> None:
        if self.time.tzinfo is None:
            raise errors.InvalidArgument("time: has no time zone", field="time")
        if not _EVENT.fullmatch(self.event):
            raise errors.InvalidArgument(f"event: {self.event[:60]!r} is not UPPER_SNAKE", field="event")
        if self.budget:
            model.checked_budget_name(self.budget, field_name="budget")
        if self.holder:
            model.checked_holder_name(self.holder)
        if self.incarnation:
            model.checked_incarnation(self.incarnation)
        if not 0 <= self.lease_id < _UNSIGNED_64_BITS:
            raise errors.InvalidArgument("lease_id: is not in 0 to 2**64 - 1", field="lease_id")
        for name, units in self.amounts.items():
            if not (len(name) <= _AMOUNT_NAME_LENGTH_MAX and name.isascii() and name.isidentifier()):
                raise errors.InvalidArgument(f"amounts: {name[:60]!a} is not a name", field="amounts")
            if not math.isfinite(units):
                raise errors.InvalidArgument(
                    f"amounts.{name}: {units} is not a finite number", field=f"amounts.{name}"
                )
        object.__setattr__(self, "cause", clean_text(self.cause))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLedgerEntry:
    """A ledger entry with its place in the ledger and the epoch whose leader wrote it."""

    #: Grows with each entry; gaps mean nothing.
    id: int
    entry: LedgerEntry
    epoch: epochs.Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """Who changed what, and why. Written in the transaction of the change."""

    id: int
    time: datetime
    actor: str
    #: The RPC: `PutBudget`, `DeleteBudget`.
    method: str
    #: What was changed, as `budget/NAME`.
    target: str
    cause: str
    #: The thing before and after, as stored. None: there was, or is, none.
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    epoch: epochs.Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWrite:
    """A node's record to be written."""

    record: registry_model.NodeRecord
    #: Who registered, for the audit log.
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """A change that was made elsewhere (by an agent, on its host), to be told in the audit log."""

    #: 1 to 64 printable ASCII characters, its own: a repeat is written once.
    entry_id: str
    actor: str
    method: str
    target: str
    cause: str
    #: What was asked, and what came of it.
    after: Mapping[str, Any]


class Store(Protocol):
    """The durable facts. Methods may be called concurrently from one event loop."""

    async def migrate(self) -> int:
        """Bring the schema up to date; how many migrations were applied.

        Safe to call from several processes at once. Raises `FailedPrecondition` if a migration that was applied
        differs from the one at hand, or if the database has been migrated by a newer Leasehold.
        """

    async def ping(self) -> None:
        """Return if Postgres answers, else raise `PostgresUnavailable`, within about 2 seconds."""

    async def close(self) -> None:
        """Close the connections. Calling it again does nothing."""

    async def claim_generation(
        self, etcd_cluster_id: int, *, accept_foreign: bool, is_blank: bool = False
    ) -> int:
        """The generation of epochs that this etcd cluster counts in, 1 or more.

        The first cluster ever is generation 1. Another cluster than the last accepted one raises
        `ForeignEtcdCluster`, or becomes the next generation if `accept_foreign`. So does a cluster that has
        lost the epochs it gave out (`is_blank`: it holds none, or an older one) although its id is the accepted
        one, as after a wipe that kept its token: the fence knows an epoch of the generation in force then.
        """

    async def raise_epoch(self, epoch: epochs.Epoch) -> None:
        """Fence off every lower epoch. Raises `StaleEpoch` if a higher one is there; the same one is no error.

        Call it after winning the election, before the first read.
        """

    async def put_budget(
        self,
        epoch: epochs.Epoch,
        spec: model.BudgetSpec,
        *,
        request_id: str = "",
        expected_version: int = 0,
        actor: str = "",
        cause: str = "",
    ) -> StoredBudget:
        """Create or replace a budget; what is then stored.

        An equal definition changes nothing: neither version nor audit log. `expected_version` 0: any; raises
        `VersionConflict` if another is there. A repeat of `request_id` returns the first answer, and raises
        `InvalidArgument` (field `request_id`) if it asks for something else. Raises `StaleEpoch`.
        """

    async def get_budget(self, name: str) -> StoredBudget:
        """The budget of that name; raises `NotFound`."""

    async def all_budgets(self) -> tuple[StoredBudget, ...]:
        """Every budget, in the order of names, as of one instant."""

    async def delete_budget(
        self,
        epoch: epochs.Epoch,
        name: str,
        *,
        request_id: str = "",
        actor: str = "",
        cause: str = "",
    ) -> None:
        """Remove a budget. `request_id` as in `put_budget`. Raises `NotFound`, `StaleEpoch`."""

    async def put_nodes(self, epoch: epochs.Epoch, nodes: Sequence[NodeWrite]) -> None:
        """Write nodes' records, all or none, at most 500; writing the same ones again changes nothing.

        A registration that is new, or other than before, leaves an audit record; a move of the state alone does
        not. Raises `StaleEpoch`.
        """

    async def delete_node(self, epoch: epochs.Epoch, name: str, *, actor: str = "", cause: str = "") -> None:
        """Forget a node. Raises `NotFound`, `StaleEpoch`."""

    async def all_nodes(self) -> tuple[registry_model.NodeRecord, ...]:
        """Every node, in the order of names, as of one instant."""

    async def append_audit(self, epoch: epochs.Epoch, entries: Sequence[AuditEntry]) -> None:
        """Tell the audit log of changes made elsewhere, all or none, at most 500. Raises `StaleEpoch`."""

    async def append_ledger(
        self, epoch: epochs.Epoch, entries: Sequence[LedgerEntry], *, batch: int = 0
    ) -> None:
        """Append to the history of leases, all or nothing. At most 10,000 entries.

        `batch` numbers the epoch's batches from 1 up; one that is not above the last one written is known to be
        written and is skipped, so that a batch whose answer was lost can be repeated. 0: always appended.
        Raises `StaleEpoch`.
        """

    async def list_ledger(
        self, *, budget: str = "", holder: str = "", page_size: int = 100, before_id: int | None = None
    ) -> Page[StoredLedgerEntry]:
        """History, newest first, beginning before `before_id`. Empty filters mean all."""

    async def delete_ledger_before(
        self, epoch: epochs.Epoch, age_seconds: float = LEDGER_RETENTION_SECONDS
    ) -> int:
        """Delete entries older than `age_seconds` by Postgres's clock, in bounded batches; how many."""

    async def list_audit(
        self, *, target: str = "", page_size: int = 100, before_id: int | None = None
    ) -> Page[AuditRecord]:
        """The audit log, newest first, beginning before `before_id`. Empty target: all."""

    async def delete_requests_before(
        self, epoch: epochs.Epoch, age_seconds: float = REQUEST_RETENTION_SECONDS
    ) -> int:
        """Forget answers kept for repeats that are older than `age_seconds`, in bounded batches; how many."""
