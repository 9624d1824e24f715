"""What every store does with nodes and with changes made elsewhere: one suite over PostgreSQL and the twin."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.node import registry_model as model
from leasehold.postgres import memory, port, store

EPOCH = epochs.Epoch(1, 10, 0xCDF818194E3A8C32)
NEXT_EPOCH = epochs.Epoch(1, 11, 0xCDF818194E3A8C32)


@pytest.fixture(params=["memory", "postgres"])
async def facts(request: pytest.FixtureRequest) -> AsyncIterator[port.Store]:
    async with contextlib.AsyncExitStack() as stack:
        opened: port.Store
        if request.param == "memory":
            opened = memory.MemoryStore()
        else:
            dsn = request.getfixturevalue("postgres_dsn")
            opened = await stack.enter_async_context(store.PostgresStore(dsn, deadline_seconds=20.0))
        await opened.migrate()
        yield opened


def node(name: str = "r620-1", *, labels: Mapping[str, str] | None = None, **fields: Any) -> model.NodeRecord:
    registration = model.Registration(
        name=name,
        node_id=fields.pop("node_id", f"id-of-node-{name}"),
        incarnation=fields.pop("incarnation", 1),
        boot_id="5f2c2f0e",
        pid_namespace=4026531836,
        cpus=8,
        memory_bytes=64 * 2**30,
        labels={"rack": "b4"} if labels is None else labels,
    )
    return model.NodeRecord(registration=registration, register_time_seconds=1_900_000_000.123456, **fields)


def write(record: model.NodeRecord, actor: str = "") -> port.NodeWrite:
    return port.NodeWrite(record=record, actor=actor)


async def told(facts: port.Store, target: str = "") -> list[tuple[str, str, str]]:
    return [(each.method, each.actor, each.cause) for each in (await facts.list_audit(target=target)).items]


async def test_nodes_come_back_as_they_were_written_in_the_order_of_names(facts: port.Store) -> None:
    written = [node("b"), node("a", state=model.NodeState.LOST, cause="no report"), node("a.b-c", labels={})]
    await facts.put_nodes(EPOCH, [write(record) for record in written])
    assert await facts.all_nodes() == (written[1], written[2], written[0])


async def test_a_node_that_is_written_again_replaces_what_was_there(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node())])
    moved = node(state=model.NodeState.DRAINING, cause="its agent drains")
    await facts.put_nodes(EPOCH, [write(moved)])
    assert await facts.all_nodes() == (moved,)


async def test_the_audit_log_tells_registrations_and_no_moves(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node(cause="first"), "ipv4:10.0.0.7:4000")])
    await facts.put_nodes(EPOCH, [write(node(state=model.NodeState.LOST, cause="no report"))])
    await facts.put_nodes(EPOCH, [write(node(incarnation=2, cause="again"), "ipv4:10.0.0.7:4001")])
    assert await told(facts, "node/r620-1") == [
        ("RegisterNode", "ipv4:10.0.0.7:4001", "again"),
        ("RegisterNode", "ipv4:10.0.0.7:4000", "first"),
    ]
    newest, oldest = (await facts.list_audit(target="node/r620-1")).items
    assert oldest.before is None
    assert newest.before is not None
    assert newest.after is not None
    assert (newest.before["incarnation"], newest.after["incarnation"]) == (1, 2)
    assert newest.epoch == EPOCH


async def test_writing_the_same_again_changes_nothing(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node(), "me")])
    await facts.put_nodes(EPOCH, [write(node(), "me")])
    assert len(await told(facts)) == 1


async def test_an_earlier_leader_cannot_write_nodes_or_forget_them(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node())])
    await facts.raise_epoch(NEXT_EPOCH)
    with pytest.raises(errors.StaleEpoch):
        await facts.put_nodes(EPOCH, [write(node("b"))])
    with pytest.raises(errors.StaleEpoch):
        await facts.delete_node(EPOCH, "r620-1")
    with pytest.raises(errors.StaleEpoch):
        await facts.append_audit(EPOCH, [entry()])
    assert await facts.all_nodes() == (node(),)


async def test_a_forgotten_node_is_gone_and_told(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node())])
    await facts.delete_node(EPOCH, "r620-1", actor="me", cause="scrapped")
    assert await facts.all_nodes() == ()
    assert (await told(facts))[0] == ("DeleteNode", "me", "scrapped")
    with pytest.raises(errors.NotFound):
        await facts.delete_node(EPOCH, "r620-1")


@pytest.mark.parametrize("name", ["../r620", "", "n" * 300])
async def test_a_name_that_can_be_no_nodes_is_refused(facts: port.Store, name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        await facts.delete_node(EPOCH, name)


async def test_too_much_at_once_is_refused_and_nothing_is_written(facts: port.Store) -> None:
    with pytest.raises(errors.InvalidArgument):
        await facts.put_nodes(EPOCH, [write(node(f"n{number}")) for number in range(501)])
    with pytest.raises(errors.InvalidArgument):
        await facts.append_audit(EPOCH, [entry(entry_id=f"e-{number}") for number in range(501)])
    assert await facts.all_nodes() == ()
    assert await told(facts) == []


async def test_a_long_cause_is_cut_and_not_refused(facts: port.Store) -> None:
    await facts.put_nodes(EPOCH, [write(node(cause="\0" + "x" * 5_000))])
    (stored,) = await facts.all_nodes()
    assert len(stored.cause) == port.TEXT_LENGTH_MAX
    assert replace(stored, cause="") == node()


def entry(**fields: Any) -> port.AuditEntry:
    known: dict[str, Any] = {
        "entry_id": "e-1",
        "actor": "me",
        "method": "OrderNode",
        "target": "node/r620-1",
        "cause": "rpc-1",
        "after": {"order": {"scale": {"workers": 4}}, "outcome": "OK"},
    }
    return port.AuditEntry(**{**known, **fields})


async def test_a_change_made_elsewhere_is_told_once_however_often_it_is_written(facts: port.Store) -> None:
    await facts.append_audit(EPOCH, [entry(), entry(entry_id="e-2", cause="rpc-2")])
    await facts.append_audit(EPOCH, [entry()])
    assert await told(facts) == [("OrderNode", "me", "rpc-2"), ("OrderNode", "me", "rpc-1")]
    (_, first) = (await facts.list_audit()).items
    assert first.after == entry().after


@pytest.mark.parametrize("entry_id", ["", "x" * 65])
async def test_an_entry_needs_an_id_of_its_own(facts: port.Store, entry_id: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        await facts.append_audit(EPOCH, [entry(entry_id=entry_id)])
