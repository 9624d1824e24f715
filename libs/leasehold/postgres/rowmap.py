"""Between rows of Postgres and the port's values."""

from collections.abc import Iterable
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import codec
from leasehold.observe import logs
from leasehold.postgres import database, port, rules
from psycopg.types import json

_log = logs.get_logger(__name__)


def only(row: database.Row | None) -> database.Row:
    """The row of a statement that always has one."""
    if row is None:
        raise errors.LeaseholdError("a row that must be in Postgres is not; was the database edited by hand?")
    return row


def epoch_columns(epoch: epochs.Epoch) -> dict[str, Any]:
    """An epoch as its three columns, in the order in which tables have them."""
    return {
        "generation": epoch.generation,
        "revision": epoch.revision,
        "etcd_cluster_id": rules.encode_cluster_id(epoch.etcd_cluster_id),
    }


def epoch(row: database.Row) -> epochs.Epoch:
    """Inverse of `epoch_columns`."""
    return epochs.Epoch(row["generation"], row["revision"], int(row["etcd_cluster_id"], 16))


def stored_budget(row: database.Row) -> port.StoredBudget:
    """A budget. Raises `LeaseholdError` if its definition cannot be read by this version of Leasehold."""
    try:
        spec = codec.decode_budget(row["definition"])
    except errors.InvalidArgument as error:
        raise errors.LeaseholdError(
            f"budget {row['name']} in Postgres cannot be read by this version of Leasehold: {error.message}",
            metadata={"budget": row["name"]},
        ) from error
    return port.StoredBudget(spec=spec, version=row["version"], update_time=row["update_time"])


def readable_budgets(rows: Iterable[database.Row]) -> tuple[port.StoredBudget, ...]:
    """The budgets that can be read. One that cannot be is logged and left out, so that the others go on."""
    budgets = []
    for row in rows:
        try:
            budgets.append(stored_budget(row))
        except errors.LeaseholdError as error:
            _log.error("budget_unreadable", budget=row["name"], version=row["version"], error=error.message)
    return tuple(budgets)


def audited(row: database.Row | None) -> dict[str, Any] | None:
    """A budget's row as the audit log keeps it: as stored, readable or not."""
    return None if row is None else {"version": row["version"], "definition": row["definition"]}


def ledger_columns(entry: port.LedgerEntry) -> tuple[Any, ...]:
    """An entry as the first columns of `copy_ledger`."""
    return (
        entry.time,
        entry.budget,
        entry.holder,
        entry.incarnation,
        entry.lease_id,
        entry.event,
        json.Jsonb(dict(entry.amounts)),
        entry.cause,
    )


def stored_ledger_entry(row: database.Row) -> port.StoredLedgerEntry:
    """One entry of the ledger."""
    entry = port.LedgerEntry(
        time=row["time"],
        event=row["event"],
        budget=row["budget"],
        holder=row["holder"],
        incarnation=row["incarnation"],
        lease_id=int(row["lease_id"]),
        amounts=row["amounts"],
        cause=row["cause"],
    )
    return port.StoredLedgerEntry(id=row["id"], entry=entry, epoch=epoch(row))


def audit_record(row: database.Row) -> port.AuditRecord:
    """One record of the audit log."""
    return port.AuditRecord(
        id=row["id"],
        time=row["time"],
        actor=row["actor"],
        method=row["method"],
        target=row["target"],
        cause=row["cause"],
        before=row["before"],
        after=row["after"],
        epoch=epoch(row),
    )
