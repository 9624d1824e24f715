"""Nodes in Postgres: rows and records, and the statements of one write."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.node import registry_model as model
from leasehold.observe import logs
from leasehold.postgres import database, port, queries, rowmap, rules, writes
from psycopg.types import json

_NODE = queries.load("node.sql")

_log = logs.get_logger(__name__)


async def put(cursor: database.Cursor, epoch: epochs.Epoch, nodes: Sequence[port.NodeWrite]) -> None:
    """Write records, in a transaction that has the fence. One that is there already is left alone."""
    for write in nodes:
        record = write.record
        before = await _one(cursor, record.name)
        if before is not None and before == record:
            continue
        await cursor.execute(_NODE["put_node"], {**_columns(record), **rowmap.epoch_columns(epoch)})
        change = rules.node_change(before, record)
        if change is not None:
            await writes.note_change(
                cursor,
                epoch,
                method=rules.REGISTER_NODE,
                target=f"node/{record.name}",
                actor=write.actor,
                cause=record.cause,
                before=change[0],
                after=change[1],
            )


async def delete(cursor: database.Cursor, epoch: epochs.Epoch, name: str, *, actor: str, cause: str) -> None:
    """Remove one. Raises `NotFound`."""
    await cursor.execute(_NODE["get_node"], {"name": name})
    row = await cursor.fetchone()
    if row is None:
        raise rules.no_such_node(name)
    await cursor.execute(_NODE["delete_node"], {"name": name})
    readable = readable_nodes([row])
    await writes.note_change(
        cursor,
        epoch,
        method=rules.DELETE_NODE,
        target=f"node/{name}",
        actor=actor,
        cause=cause,
        before=rules.audited_node(readable[0]) if readable else {"name": name},
        after=None,
    )


async def every(cursor: database.Cursor) -> tuple[model.NodeRecord, ...]:
    """All that can be read, in the order of names."""
    await cursor.execute(_NODE["list_nodes"])
    return readable_nodes(await cursor.fetchall())


def readable_nodes(rows: Iterable[database.Row]) -> tuple[model.NodeRecord, ...]:
    """The nodes that can be read. One that cannot be is logged and left out, so that the others go on."""
    nodes = []
    for row in rows:
        try:
            nodes.append(_record(row))
        except (errors.InvalidArgument, ValueError) as error:
            _log.error("node_unreadable", node=row["name"], error=str(error))
    return tuple(nodes)


async def _one(cursor: database.Cursor, name: str) -> model.NodeRecord | None:
    await cursor.execute(_NODE["get_node"], {"name": name})
    row = await cursor.fetchone()
    readable = readable_nodes([] if row is None else [row])
    return readable[0] if readable else None


def _columns(record: model.NodeRecord) -> dict[str, Any]:
    registration = record.registration
    return {
        "name": registration.name,
        "node_id": registration.node_id,
        "incarnation": registration.incarnation,
        "boot_id": registration.boot_id,
        "pid_namespace": registration.pid_namespace,
        "total_cpus": registration.cpus,
        "total_memory_bytes": registration.memory_bytes,
        "labels": json.Jsonb(dict(registration.labels)),
        "state": record.state.value,
        "cause": port.clean_text(record.cause),
        "register_time": datetime.fromtimestamp(record.register_time_seconds, UTC),
    }


def _record(row: database.Row) -> model.NodeRecord:
    return model.NodeRecord(
        registration=model.Registration(
            name=row["name"],
            node_id=row["node_id"],
            incarnation=row["incarnation"],
            boot_id=row["boot_id"],
            pid_namespace=row["pid_namespace"],
            cpus=row["total_cpus"],
            memory_bytes=row["total_memory_bytes"],
            labels=row["labels"],
        ),
        state=model.NodeState(row["state"]),
        cause=row["cause"],
        register_time_seconds=row["register_time"].timestamp(),
    )
