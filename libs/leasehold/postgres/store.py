"""The durable facts in Postgres."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from leasehold.core import epoch as epochs
from leasehold.core.budget import codec, model
from leasehold.core.node import model as node_model
from leasehold.core.node import registry_model
from leasehold.postgres import database, migrate, node_rows, port, queries, rowmap, rules, writes
from psycopg.types import json

DELETE_ROWS_MAX = 5000

_FENCE = queries.load("fence.sql")
_BUDGET = queries.load("budget.sql")
_LEDGER = queries.load("ledger.sql")
_AUDIT = queries.load("audit.sql")
_REQUEST = queries.load("request.sql")
_SESSION = queries.load("session.sql")


class PostgresStore:
    """`port.Store` on a pool of connections; an async context manager.

    `dsn` is a libpq connection string or URL. `deadline_seconds` bounds each transaction: Postgres being away,
    or frozen, is an error within it. Recovery is by itself: the first call after Postgres is back connects.
    """

    def __init__(self, dsn: str, *, deadline_seconds: float = 2.0, connections_max: int = 8) -> None:
        self._database = database.Database(
            dsn, deadline_seconds=deadline_seconds, connections_max=connections_max
        )

    async def open(self) -> None:
        """Begin to connect; returns at once, Postgres being there or not."""
        await self._database.open()

    async def close(self) -> None:
        """As `port.Store.close`."""
        await self._database.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def migrate(self) -> int:
        """As `port.Store.migrate`."""
        return await migrate.apply(self._database, migrate.shipped())

    async def ping(self) -> None:
        """As `port.Store.ping`."""
        async with self._database.transaction() as cursor:
            await cursor.execute(_SESSION["ping"])

    async def claim_generation(
        self, etcd_cluster_id: int, *, accept_foreign: bool, is_blank: bool = False
    ) -> int:
        """As `port.Store.claim_generation`."""
        claimed = rules.encode_cluster_id(etcd_cluster_id)
        async with self._database.transaction() as cursor:
            await cursor.execute(_FENCE["lock_generations"])
            await cursor.execute(_FENCE["get_generation"])
            row = await cursor.fetchone()
            if row is not None and row["etcd_cluster_id"] == claimed:
                await cursor.execute(_FENCE["get_epoch"])
                fence = rowmap.epoch(rowmap.only(await cursor.fetchone()))
                if not is_blank or fence.generation < row["generation"]:
                    return int(row["generation"])
                if not accept_foreign:
                    raise rules.blank_etcd_cluster(claimed, fence)
            elif row is not None and not accept_foreign:
                raise rules.foreign_etcd_cluster(claimed, row["etcd_cluster_id"])
            generation = 1 if row is None else int(row["generation"]) + 1
            await cursor.execute(
                _FENCE["insert_generation"], {"generation": generation, "etcd_cluster_id": claimed}
            )
            return generation

    async def raise_epoch(self, epoch: epochs.Epoch) -> None:
        """As `port.Store.raise_epoch`."""
        async with self._fenced(epoch):
            pass

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
        definition = codec.encode_budget(spec)
        request = writes.Request(rules.PUT_BUDGET, request_id, rules.put_payload(spec, expected_version))
        async with self._fenced(epoch) as cursor:
            if (answer := await request.first_answer(cursor)) is not None:
                return rules.decode_stored_budget(answer)
            before = await _one_budget(cursor, spec.name)
            rules.refuse_other_version(spec.name, expected_version, before["version"] if before else 0)
            if before is not None and before["definition"] == definition:
                stored = rowmap.stored_budget(before)
            else:
                await cursor.execute(
                    _BUDGET["put_budget"], {"name": spec.name, "definition": json.Jsonb(definition)}
                )
                after = rowmap.only(await cursor.fetchone())
                stored = rowmap.stored_budget(after)
                await writes.note_change(
                    cursor,
                    epoch,
                    method=rules.PUT_BUDGET,
                    target=f"budget/{spec.name}",
                    actor=actor,
                    cause=cause,
                    before=rowmap.audited(before),
                    after=rowmap.audited(after),
                )
            await request.keep(cursor, rules.encode_stored_budget(stored))
            return stored

    async def get_budget(self, name: str) -> port.StoredBudget:
        """As `port.Store.get_budget`."""
        model.checked_budget_name(name)
        async with self._database.transaction() as cursor:
            row = await _one_budget(cursor, name)
        if row is None:
            raise rules.no_such_budget(name)
        return rowmap.stored_budget(row)

    async def all_budgets(self) -> tuple[port.StoredBudget, ...]:
        """As `port.Store.all_budgets`."""
        async with self._database.transaction() as cursor:
            await cursor.execute(_BUDGET["all_budgets"])
            return rowmap.readable_budgets(await cursor.fetchall())

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
        request = writes.Request(rules.DELETE_BUDGET, request_id, rules.delete_payload(name))
        async with self._fenced(epoch) as cursor:
            if await request.first_answer(cursor) is not None:
                return
            before = await _one_budget(cursor, name)
            if before is None:
                raise rules.no_such_budget(name)
            await cursor.execute(_BUDGET["delete_budget"], {"name": name})
            await writes.note_change(
                cursor,
                epoch,
                method=rules.DELETE_BUDGET,
                target=f"budget/{name}",
                actor=actor,
                cause=cause,
                before=rowmap.audited(before),
                after=None,
            )
            await request.keep(cursor, {})

    async def put_nodes(self, epoch: epochs.Epoch, nodes: Sequence[port.NodeWrite]) -> None:
        """As `port.Store.put_nodes`."""
        rules.checked_node_writes(nodes)
        async with self._fenced(epoch) as cursor:
            await node_rows.put(cursor, epoch, nodes)

    async def delete_node(self, epoch: epochs.Epoch, name: str, *, actor: str = "", cause: str = "") -> None:
        """As `port.Store.delete_node`."""
        node_model.checked_node_name(name)
        async with self._fenced(epoch) as cursor:
            await node_rows.delete(cursor, epoch, name, actor=actor, cause=cause)

    async def all_nodes(self) -> tuple[registry_model.NodeRecord, ...]:
        """As `port.Store.all_nodes`."""
        async with self._database.transaction() as cursor:
            return await node_rows.every(cursor)

    async def append_audit(self, epoch: epochs.Epoch, entries: Sequence[port.AuditEntry]) -> None:
        """As `port.Store.append_audit`."""
        rules.checked_audit_entries(entries)
        async with self._fenced(epoch) as cursor:
            for entry in entries:
                once = writes.Request(entry.method, entry.entry_id, {})
                if await once.first_answer(cursor) is not None:
                    continue
                await writes.note_change(
                    cursor,
                    epoch,
                    method=entry.method,
                    target=entry.target,
                    actor=entry.actor,
                    cause=entry.cause,
                    before=None,
                    after=entry.after,
                )
                await once.keep(cursor, {})

    async def append_ledger(
        self, epoch: epochs.Epoch, entries: Sequence[port.LedgerEntry], *, batch: int = 0
    ) -> None:
        """As `port.Store.append_ledger`."""
        rules.checked_ledger_batch(entries, batch)
        async with self._fenced(epoch) as cursor:
            fence = rowmap.only(await cursor.fetchone())
            if batch:
                if batch <= fence["ledger_batch"]:
                    return
                await cursor.execute(_FENCE["note_ledger_batch"], {"batch": batch})
            reign = tuple(rowmap.epoch_columns(epoch).values())
            async with cursor.copy(_LEDGER["copy_ledger"]) as copy:
                for entry in entries:
                    await copy.write_row((*rowmap.ledger_columns(entry), *reign))

    async def list_ledger(
        self, *, budget: str = "", holder: str = "", page_size: int = 100, before_id: int | None = None
    ) -> port.Page[port.StoredLedgerEntry]:
        """As `port.Store.list_ledger`."""
        rules.checked_page_size(page_size)
        if budget:
            model.checked_budget_name(budget, field_name="budget")
        if holder:
            model.checked_holder_name(holder)
        parameters = {"budget": budget, "holder": holder, "before_id": rules.checked_before_id(before_id)}
        async with self._database.transaction() as cursor:
            # Not prepared: it is to be planned with its values, see sql/ledger.sql.
            await cursor.execute(_LEDGER["list_ledger"], {**parameters, "limit": page_size + 1}, prepare=False)
            rows = await cursor.fetchall()
        items = tuple(rowmap.stored_ledger_entry(row) for row in rows[:page_size])
        return port.Page(items, has_more=len(rows) > page_size)

    async def delete_ledger_before(
        self, epoch: epochs.Epoch, age_seconds: float = port.LEDGER_RETENTION_SECONDS
    ) -> int:
        """As `port.Store.delete_ledger_before`."""
        return await self._delete_old(epoch, _LEDGER["delete_ledger"], age_seconds)

    async def list_audit(
        self, *, target: str = "", page_size: int = 100, before_id: int | None = None
    ) -> port.Page[port.AuditRecord]:
        """As `port.Store.list_audit`."""
        rules.checked_page_size(page_size)
        parameters = {"target": port.clean_text(target), "before_id": rules.checked_before_id(before_id)}
        async with self._database.transaction() as cursor:
            await cursor.execute(_AUDIT["list_audit"], {**parameters, "limit": page_size + 1}, prepare=False)
            rows = await cursor.fetchall()
        items = tuple(rowmap.audit_record(row) for row in rows[:page_size])
        return port.Page(items, has_more=len(rows) > page_size)

    async def delete_requests_before(
        self, epoch: epochs.Epoch, age_seconds: float = port.REQUEST_RETENTION_SECONDS
    ) -> int:
        """As `port.Store.delete_requests_before`."""
        return await self._delete_old(epoch, _REQUEST["delete_requests"], age_seconds)

    @asynccontextmanager
    async def _fenced(self, epoch: epochs.Epoch) -> AsyncIterator[database.Cursor]:
        """A transaction that has taken the fence; the cursor holds the fence's row. Raises `StaleEpoch`."""
        columns = rowmap.epoch_columns(epoch)
        async with self._database.transaction() as cursor:
            await cursor.execute(_FENCE["raise_epoch"], columns)
            if not cursor.rowcount:
                await cursor.execute(_FENCE["get_epoch"])
                raise rules.stale_epoch(epoch, rowmap.epoch(rowmap.only(await cursor.fetchone())))
            yield cursor

    async def _delete_old(self, epoch: epochs.Epoch, statement: bytes, age_seconds: float) -> int:
        """Run `statement` until it finds nothing, a transaction each, so that the fence is held briefly."""
        parameters = {"age_seconds": rules.checked_age(age_seconds), "limit": DELETE_ROWS_MAX}
        deleted = 0
        while True:
            async with self._fenced(epoch) as cursor:
                await cursor.execute(statement, parameters)
                count = cursor.rowcount
            deleted += count
            if count < DELETE_ROWS_MAX:
                return deleted


async def _one_budget(cursor: database.Cursor, name: str) -> database.Row | None:
    await cursor.execute(_BUDGET["get_budget"], {"name": name})
    return await cursor.fetchone()
