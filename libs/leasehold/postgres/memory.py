"""The in-memory twin of the store, with switches for faults. It passes the contract suite of the real one.

Several stores on one `MemoryDatabase` are several processes on one Postgres.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import codec, model
from leasehold.core.node import model as node_model
from leasehold.core.node import registry_model
from leasehold.postgres import failures, migrate, port, rules


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _KeptAnswer:
    payload_sha256: bytes
    answer: dict[str, Any]
    time: datetime


@dataclass(slots=True)
class MemoryDatabase:
    """What Postgres would hold, and how it fares. `now` is its wall clock, with time zone."""

    now: Callable[[], datetime] = _utc_now
    migrations_applied: int = 0
    budgets: dict[str, port.StoredBudget] = field(default_factory=dict)
    nodes: dict[str, registry_model.NodeRecord] = field(default_factory=dict)
    cluster_ids: list[str] = field(default_factory=list)
    fence: epochs.Epoch = epochs.ZERO
    ledger_batch: int = 0
    ledger: list[port.StoredLedgerEntry] = field(default_factory=list)
    ledger_id: int = 0
    audit: list[port.AuditRecord] = field(default_factory=list)
    requests: dict[tuple[str, str], _KeptAnswer] = field(default_factory=dict)
    is_away: bool = False
    is_next_answer_lost: bool = False

    def go_away(self) -> None:
        """Every call raises `PostgresUnavailable` from now on, and changes nothing."""
        self.is_away = True

    def come_back(self) -> None:
        """Undo `go_away`."""
        self.is_away = False

    def lose_next_answer(self) -> None:
        """The next write that succeeds is done, and raises `PostgresUnavailable` all the same."""
        self.is_next_answer_lost = True


class MemoryStore:
    """`port.Store` in memory. Without a `database` it has one of its own."""

    def __init__(self, database: MemoryDatabase | None = None) -> None:
        self.database = MemoryDatabase() if database is None else database
        self._is_closed = False

    async def migrate(self) -> int:
        """As `port.Store.migrate`."""
        self._reach(needs_schema=False)
        shipped = len(migrate.shipped())
        applied = shipped - self.database.migrations_applied
        self.database.migrations_applied = shipped
        return applied

    async def ping(self) -> None:
        """As `port.Store.ping`."""
        self._reach(needs_schema=False)

    async def close(self) -> None:
        """As `port.Store.close`."""
        self._is_closed = True

    async def claim_generation(
        self, etcd_cluster_id: int, *, accept_foreign: bool, is_blank: bool = False
    ) -> int:
        """As `port.Store.claim_generation`."""
        claimed = rules.encode_cluster_id(etcd_cluster_id)
        self._reach()
        accepted = self.database.cluster_ids
        if accepted and accepted[-1] == claimed:
            fence = self.database.fence
            if not is_blank or fence.generation < len(accepted):
                return len(accepted)
            if not accept_foreign:
                raise rules.blank_etcd_cluster(claimed, fence)
        elif accepted and not accept_foreign:
            raise rules.foreign_etcd_cluster(claimed, accepted[-1])
        accepted.append(claimed)
        self._lose_answer()
        return len(accepted)

    async def raise_epoch(self, epoch: epochs.Epoch) -> None:
        """As `port.Store.raise_epoch`."""
        self._refuse_stale(epoch)
        self._commit(epoch)

    async def put_budget(
        self,
        epoch: epochs.Epoch,
        spec: model.BudgetSpec,
        *,
        request_id: str = "",
        expected_version: int = 0,
        actor: str = "",
        cause: str = "",
    ) -> port.StoredBudget:
        """As `port.Store.put_budget`."""
        rules.checked_request_id(request_id)
        sha256 = rules.payload_sha256(rules.put_payload(spec, expected_version))
        self._refuse_stale(epoch)
        if (answer := self._first_answer(rules.PUT_BUDGET, request_id, sha256)) is not None:
            self._commit(epoch)
            return rules.decode_stored_budget(answer)
        before = self.database.budgets.get(spec.name)
        version = before.version if before else 0
        rules.refuse_other_version(spec.name, expected_version, version)
        # What comes out of Postgres is what its codec keeps.
        kept = codec.decode_budget(codec.encode_budget(spec))
        if before is not None and before.spec == kept:
            stored = before
        else:
            stored = port.StoredBudget(spec=kept, version=version + 1, update_time=self.database.now())
            self.database.budgets[spec.name] = stored
            self._note_change(epoch, rules.PUT_BUDGET, spec.name, actor, cause, before, stored)
        self._keep_answer(rules.PUT_BUDGET, request_id, sha256, rules.encode_stored_budget(stored))
        self._commit(epoch)
        return stored

    async def get_budget(self, name: str) -> port.StoredBudget:
        """As `port.Store.get_budget`."""
        model.checked_budget_name(name)
        self._reach()
        try:
            return self.database.budgets[name]
        except KeyError:
            raise rules.no_such_budget(name) from None

    async def all_budgets(self) -> tuple[port.StoredBudget, ...]:
        """As `port.Store.all_budgets`."""
        self._reach()
        return tuple(stored for _, stored in sorted(self.database.budgets.items()))

    async def delete_budget(
        self,
        epoch: epochs.Epoch,
        name: str,
        *,
        request_id: str = "",
        actor: str = "",
        cause: str = "",
    ) -> None:
        """As `port.Store.delete_budget`."""
        model.checked_budget_name(name)
        rules.checked_request_id(request_id)
        sha256 = rules.payload_sha256(rules.delete_payload(name))
        self._refuse_stale(epoch)
        if self._first_answer(rules.DELETE_BUDGET, request_id, sha256) is not None:
            self._commit(epoch)
            return
        before = self.database.budgets.pop(name, None)
        if before is None:
            raise rules.no_such_budget(name)
        self._note_change(epoch, rules.DELETE_BUDGET, name, actor, cause, before, None)
        self._keep_answer(rules.DELETE_BUDGET, request_id, sha256, {})
        self._commit(epoch)

    async def put_nodes(self, epoch: epochs.Epoch, nodes: Sequence[port.NodeWrite]) -> None:
        """As `port.Store.put_nodes`."""
        rules.checked_node_writes(nodes)
        self._refuse_stale(epoch)
        for write in nodes:
            # What comes out of Postgres is cut as this is.
            record = replace(write.record, cause=port.clean_text(write.record.cause))
            before = self.database.nodes.get(record.name)
            self.database.nodes[record.name] = record
            change = rules.node_change(before, record)
            if change is not None:
                target, actor = f"node/{record.name}", write.actor
                self._audit(epoch, rules.REGISTER_NODE, target, actor, record.cause, *change)
        self._commit(epoch)

    async def delete_node(self, epoch: epochs.Epoch, name: str, *, actor: str = "", cause: str = "") -> None:
        """As `port.Store.delete_node`."""
        node_model.checked_node_name(name)
        self._refuse_stale(epoch)
        before = self.database.nodes.pop(name, None)
        if before is None:
            raise rules.no_such_node(name)
        told = rules.audited_node(before)
        self._audit(epoch, rules.DELETE_NODE, f"node/{name}", actor, cause, told, None)
        self._commit(epoch)

    async def all_nodes(self) -> tuple[registry_model.NodeRecord, ...]:
        """As `port.Store.all_nodes`."""
        self._reach()
        return tuple(record for _, record in sorted(self.database.nodes.items()))

    async def append_audit(self, epoch: epochs.Epoch, entries: Sequence[port.AuditEntry]) -> None:
        """As `port.Store.append_audit`."""
        rules.checked_audit_entries(entries)
        self._refuse_stale(epoch)
        sha256 = rules.payload_sha256({})
        for entry in entries:
            if self._first_answer(entry.method, entry.entry_id, sha256) is None:
                after = copy.deepcopy(dict(entry.after))
                self._audit(epoch, entry.method, entry.target, entry.actor, entry.cause, None, after)
                self._keep_answer(entry.method, entry.entry_id, sha256, {})
        self._commit(epoch)

    async def append_ledger(
        self, epoch: epochs.Epoch, entries: Sequence[port.LedgerEntry], *, batch: int = 0
    ) -> None:
        """As `port.Store.append_ledger`."""
        rules.checked_ledger_batch(entries, batch)
        self._refuse_stale(epoch)
        self._take_fence(epoch)
        if batch:
            if batch <= self.database.ledger_batch:
                return
            self.database.ledger_batch = batch
        for entry in entries:
            self.database.ledger_id += 1
            stored = port.StoredLedgerEntry(id=self.database.ledger_id, entry=entry, epoch=epoch)
            self.database.ledger.append(stored)
        self._lose_answer()

    async def list_ledger(
        self, *, budget: str = "", holder: str = "", page_size: int = 100, before_id: int | None = None
    ) -> port.Page[port.StoredLedgerEntry]:
        """As `port.Store.list_ledger`."""
        rules.checked_page_size(page_size)
        if budget:
            model.checked_budget_name(budget, field_name="budget")
        if holder:
            model.checked_holder_name(holder)
        below = rules.checked_before_id(before_id)
        self._reach()
        found = [
            stored
            for stored in reversed(self.database.ledger)
            if stored.id < below and budget in ("", stored.entry.budget) and holder in ("", stored.entry.holder)
        ]
        return _page(found, page_size)

    async def delete_ledger_before(
        self, epoch: epochs.Epoch, age_seconds: float = port.LEDGER_RETENTION_SECONDS
    ) -> int:
        """As `port.Store.delete_ledger_before`."""
        kept_since = self._cutoff(epoch, age_seconds)
        kept = [stored for stored in self.database.ledger if stored.entry.time >= kept_since]
        deleted = len(self.database.ledger) - len(kept)
        self.database.ledger = kept
        self._commit(epoch)
        return deleted

    async def list_audit(
        self, *, target: str = "", page_size: int = 100, before_id: int | None = None
    ) -> port.Page[port.AuditRecord]:
        """As `port.Store.list_audit`."""
        rules.checked_page_size(page_size)
        below = rules.checked_before_id(before_id)
        self._reach()
        found = [
            record
            for record in reversed(self.database.audit)
            if record.id < below and target in ("", record.target)
        ]
        return _page(found, page_size)

    async def delete_requests_before(
        self, epoch: epochs.Epoch, age_seconds: float = port.REQUEST_RETENTION_SECONDS
    ) -> int:
        """As `port.Store.delete_requests_before`."""
        kept_since = self._cutoff(epoch, age_seconds)
        kept = {key: answer for key, answer in self.database.requests.items() if answer.time >= kept_since}
        deleted = len(self.database.requests) - len(kept)
        self.database.requests = kept
        self._commit(epoch)
        return deleted

    def _reach(self, *, needs_schema: bool = True) -> None:
        if self._is_closed:
            raise failures.unavailable("the connection has been closed")
        if self.database.is_away:
            raise failures.unavailable("it is away")
        if needs_schema and not self.database.migrations_applied:
            raise errors.FailedPrecondition("the database has not the schema of this version of Leasehold")

    def _refuse_stale(self, epoch: epochs.Epoch) -> None:
        rules.encode_cluster_id(epoch.etcd_cluster_id)
        self._reach()
        if epoch[:2] < self.database.fence[:2]:
            raise rules.stale_epoch(epoch, self.database.fence)

    def _take_fence(self, epoch: epochs.Epoch) -> None:
        if epoch[:2] > self.database.fence[:2]:
            self.database.ledger_batch = 0
        self.database.fence = epoch

    def _commit(self, epoch: epochs.Epoch) -> None:
        # As in Postgres, a write that was refused has not taken the fence either.
        self._take_fence(epoch)
        self._lose_answer()

    def _lose_answer(self) -> None:
        if self.database.is_next_answer_lost:
            self.database.is_next_answer_lost = False
            raise failures.unavailable("the answer was lost")

    def _cutoff(self, epoch: epochs.Epoch, age_seconds: float) -> datetime:
        rules.checked_age(age_seconds)
        self._refuse_stale(epoch)
        return self.database.now() - timedelta(seconds=age_seconds)

    def _first_answer(self, method: str, request_id: str, sha256: bytes) -> dict[str, Any] | None:
        kept = self.database.requests.get((request_id, method))
        if kept is None:
            return None
        rules.refuse_other_payload(kept.payload_sha256, sha256, request_id)
        return copy.deepcopy(kept.answer)

    def _keep_answer(self, method: str, request_id: str, sha256: bytes, answer: dict[str, Any]) -> None:
        if request_id:
            kept = _KeptAnswer(sha256, answer, self.database.now())
            self.database.requests[request_id, method] = kept

    def _note_change(
        self,
        epoch: epochs.Epoch,
        method: str,
        name: str,
        actor: str,
        cause: str,
        before: port.StoredBudget | None,
        after: port.StoredBudget | None,
    ) -> None:
        self._audit(epoch, method, f"budget/{name}", actor, cause, _audited(before), _audited(after))

    def _audit(
        self,
        epoch: epochs.Epoch,
        method: str,
        target: str,
        actor: str,
        cause: str,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
    ) -> None:
        self.database.audit.append(
            port.AuditRecord(
                id=len(self.database.audit) + 1,
                time=self.database.now(),
                actor=port.clean_text(actor),
                method=method,
                target=target,
                cause=port.clean_text(cause),
                before=before,
                after=after,
                epoch=epoch,
            )
        )


def _audited(stored: port.StoredBudget | None) -> Mapping[str, Any] | None:
    if stored is None:
        return None
    return {"version": stored.version, "definition": codec.encode_budget(stored.spec)}


def _page(items: Sequence[port.Item], page_size: int) -> port.Page[port.Item]:
    return port.Page(tuple(items[:page_size]), has_more=len(items) > page_size)
