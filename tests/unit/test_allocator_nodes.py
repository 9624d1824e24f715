"""The shell around the registry of nodes, on the in-memory twins: Postgres away, bad records, what is swept."""

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from leasehold.allocator import node_orders, node_servicer, node_sessions, node_writer, nodes, records
from leasehold.allocator import reign as reigns
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import codec, messages
from leasehold.core.node import registry_effects
from leasehold.core.node import registry_model as model
from leasehold.etcd import clock as etcd_clock
from leasehold.etcd import memory as etcd_memory
from leasehold.postgres import memory as postgres_memory
from leasehold.postgres import port
from leasehold.runtime import clock as clocks

EPOCH = epochs.Epoch(1, 10, 5)
ELSEWHERE = ("a-boot-of-another-host", 7)


@pytest.fixture
async def store() -> postgres_memory.MemoryStore:
    opened = postgres_memory.MemoryStore()
    await opened.migrate()
    return opened


@pytest.fixture
async def known(store: postgres_memory.MemoryStore) -> nodes.Nodes:
    """The nodes of a reign that is not run."""
    etcd = etcd_memory.MemoryCluster(etcd_clock.ManualClock()).connect()
    reign = reigns.Reign(
        EPOCH,
        etcd,
        records.Keys("/t"),
        store,
        clock=clocks.MonotonicClock(),
        boot_clock=clocks.BootClock(),
    )
    return nodes.Nodes(reign, store, wall_clock=lambda: 1_900_000_000.0)


@contextlib.asynccontextmanager
async def running(known: nodes.Nodes) -> AsyncIterator[asyncio.Task[None]]:
    """Its part that deals with Postgres."""
    is_synchronized = asyncio.Event()
    is_synchronized.set()
    task = asyncio.create_task(known.run(is_synchronized))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


def registration(name: str = "r620-1", **fields: Any) -> wire.NodeRegistration:
    told: dict[str, Any] = {"name": name, "node_id": f"id-of-node-{name}", "incarnation": 1}
    return wire.NodeRegistration(**{**told, "boot_id": ELSEWHERE[0], "pid_namespace": ELSEWHERE[1], **fields})


def register(known: nodes.Nodes, name: str = "r620-1", **fields: Any) -> node_sessions.NodeSession:
    session = known.open_session("ipv4:10.0.0.7:4000")
    known.take(wire.SyncNodeRequest(sequence=1, registration=registration(name, **fields)), session)
    return session


def entry(number: int) -> port.AuditEntry:
    return port.AuditEntry(
        entry_id=f"e-{number}",
        actor="me",
        method="OrderNode",
        target="node/a",
        cause=f"c-{number}",
        after={"n": 1},
    )


# Postgres.


async def test_what_agents_register_is_in_postgres_soon_and_nothing_else_is(
    known: nodes.Nodes, store: postgres_memory.MemoryStore
) -> None:
    async with running(known):
        session = register(known)
        await until(lambda: store.database.nodes)
        stored = store.database.nodes["r620-1"]
        for sequence in range(2, 50):
            known.take(wire.SyncNodeRequest(sequence=sequence, status=node_pb2.NodeStatus()), session)
        assert known.writer.waiting == 0
    assert (stored.state, stored.register_time_seconds) == (model.NodeState.READY, 1_900_000_000.0)
    assert [record.actor for record in store.database.audit] == ["ipv4:10.0.0.7:4000"]


async def test_while_postgres_is_away_writes_wait_and_of_one_node_only_the_newest(
    known: nodes.Nodes, store: postgres_memory.MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_writer, "RETRY_SECONDS", 0)
    async with running(known):
        await until(lambda: known.is_loaded)
        store.database.go_away()
        session = register(known)
        for sequence in range(2, 12):
            status = node_pb2.NodeStatus(is_draining=sequence % 2 == 0)
            known.take(wire.SyncNodeRequest(sequence=sequence, status=status), session)
        known.writer.note(entry(1))
        await until(lambda: known.writer.is_postgres_away)
        assert known.writer.waiting == 2
        store.database.come_back()
        await until(lambda: not known.writer.waiting)
    assert store.database.nodes["r620-1"].state is model.NodeState.READY
    assert [record.method for record in store.database.audit] == ["RegisterNode", "OrderNode"]


async def test_an_answer_of_postgres_that_is_lost_leaves_one_audit_record_all_the_same(
    known: nodes.Nodes, store: postgres_memory.MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_writer, "RETRY_SECONDS", 0)
    async with running(known):
        await until(lambda: known.is_loaded)
        for number in range(2):
            store.database.lose_next_answer()
            known.writer.note(entry(number))
            await until(lambda: not known.writer.waiting)
        store.database.lose_next_answer()
        register(known)
        await until(lambda: not known.writer.waiting)
    assert [record.cause for record in store.database.audit][:2] == ["c-0", "c-1"]
    assert len(store.database.audit) == 3


async def test_a_record_that_is_refused_holds_up_no_other(
    known: nodes.Nodes, store: postgres_memory.MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nodes = store.put_nodes

    async def put(epoch: epochs.Epoch, written: Sequence[port.NodeWrite]) -> None:
        if any(write.record.name == "bad" for write in written):
            raise errors.LeaseholdError("Postgres refused a statement")
        await put_nodes(epoch, written)

    monkeypatch.setattr(store, "put_nodes", put)
    for name in ("a", "bad", "c"):
        register(known, name)
    async with running(known):
        await until(lambda: known.is_loaded and not known.writer.waiting)
    assert sorted(store.database.nodes) == ["a", "c"]


async def test_audit_entries_that_are_too_many_make_room_the_oldest_first(
    store: postgres_memory.MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_writer, "AUDIT_WAITING_MAX", 3)
    writer = node_writer.NodeWriter(store, EPOCH)
    for number in range(5):
        writer.note(entry(number))
    await writer.flush(5.0)
    assert [record.cause for record in store.database.audit] == ["c-2", "c-3", "c-4"]
    assert "audit_entries_lost" in caplog.text


async def test_a_leader_whose_successor_writes_ends_its_reign(
    known: nodes.Nodes, store: postgres_memory.MemoryStore
) -> None:
    async with running(known):
        await until(lambda: known.is_loaded)
        await store.raise_epoch(epochs.Epoch(1, 11, 5))
        register(known)
        await until(known.reign.ending.done)
    assert isinstance(known.reign.ending.exception(), errors.StaleEpoch)
    assert store.database.nodes == {}


async def test_a_node_is_deleted_with_the_record_that_was_on_its_way(
    known: nodes.Nodes, store: postgres_memory.MemoryStore
) -> None:
    async with running(known):
        await until(lambda: known.is_loaded)
        session = register(known)
        known.take(wire.SyncNodeRequest(sequence=2, is_leaving=True), session)
        known.close_session(session)
        assert known.writer.waiting == 1
        await known.delete("r620-1", actor="me", cause="scrapped")
        await until(lambda: not known.writer.waiting)
    assert store.database.nodes == {}
    assert known.registry.nodes == {}


async def test_nothing_is_deleted_before_postgres_was_read_and_a_deletion_that_failed_leaves_the_node(
    known: nodes.Nodes, store: postgres_memory.MemoryStore
) -> None:
    with pytest.raises(errors.PostgresUnavailable):
        await known.delete("r620-1", actor="me", cause="")
    async with running(known):
        await until(lambda: known.is_loaded)
        session = register(known)
        known.take(wire.SyncNodeRequest(sequence=2, is_leaving=True), session)
        known.close_session(session)
        await until(lambda: not known.writer.waiting)
        store.database.lose_next_answer()
        with pytest.raises(errors.PostgresUnavailable):
            await known.delete("r620-1", actor="me", cause="")
        assert known.registry.get("r620-1").state is model.NodeState.GONE
        await until(lambda: not known.writer.waiting)
    assert store.database.nodes["r620-1"].state is model.NodeState.GONE


# Processes elsewhere.


def _join(known: nodes.Nodes, holder: str, process: processes.ProcessKey) -> None:
    reign = known.reign
    reign.core.report(
        messages.Report(
            budget="llm", holder=holder, incarnation=f"life-of-{holder}", sequence=1, process=process
        ),
        reign.now(),
        session=1,
    )
    reign.core.finish(reign.now())


async def test_before_postgres_was_read_no_node_is_said_not_to_exist_or_to_be_the_only_one(
    known: nodes.Nodes,
) -> None:
    leader: Any = types.SimpleNamespace(require_nodes=lambda: known)
    servicer = node_servicer.NodeServicer(leader, asyncio.Event())
    context: Any = None
    register(known)

    for name in ("r620-2", ""):
        with pytest.raises(errors.PostgresUnavailable):
            await servicer.GetNode(wire.GetNodeRequest(name=name), context)
    assert (await servicer.GetNode(wire.GetNodeRequest(name="r620-1"), context)).node.name == "r620-1"

    async with running(known):
        await until(lambda: known.is_loaded)
    assert (await servicer.GetNode(wire.GetNodeRequest(), context)).node.name == "r620-1"
    with pytest.raises(errors.NotFound):
        await servicer.GetNode(wire.GetNodeRequest(name="r620-2"), context)


async def test_certificates_are_asked_for_as_long_as_the_process_holds_a_lease(
    known: nodes.Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reign = known.reign
    reign.core.define(codec.decode_budget({"name": "llm", "dimensions": {"rpm_limit": 600}}), 1, reign.now())
    mine, other = (processes.ProcessKey(*ELSEWHERE, pid, 1) for pid in (10, 11))
    _join(known, "w1", mine)
    _join(known, "w2", other)
    session = register(known)
    reign.ask_elsewhere(mine)
    reign.ask_elsewhere(other)
    response = await session.next_response()
    assert response is not None
    assert [process.pid for process in response.watch] == [10, 11]

    # A process that is certified is not asked for again; one whose lease is gone is taken back.
    death = wire.DeathCertificate(process=response.watch[0])
    known.take(wire.SyncNodeRequest(sequence=2, deaths=[death]), session)
    assert reign.core.processes() == {other}
    reign.core.process_exited(other, reign.now())
    monkeypatch.setattr(nodes, "SWEEP_SECONDS", 0)
    async with running(known):
        await until(lambda: not known.registry.watched)
    response = await session.next_response()
    assert response is not None
    assert [process.pid for process in response.unwatch] == [11]


# Connections and orders.


async def test_a_connection_that_takes_no_orders_is_given_up() -> None:
    session = node_sessions.NodeSession(1, EPOCH, "me")
    for _ in range(node_sessions.UNSENT_ORDERS_MAX + 1):
        session.order(order_pb2.Order())
    with pytest.raises(errors.ResourceExhausted):
        await session.next_response()


async def test_what_is_watched_is_told_in_messages_that_fit() -> None:
    session = node_sessions.NodeSession(1, EPOCH, "me")
    asked = tuple(processes.ProcessKey(*ELSEWHERE, pid, 1) for pid in range(1, 5_001))
    session.watch(asked)
    session.unwatch(asked[:1_000])
    sizes: list[tuple[int, int]] = []
    while len(sizes) < 2:
        response = await session.next_response()
        assert response is not None
        sizes.append((len(response.watch), len(response.unwatch)))
    # What was not told yet needs no taking back.
    assert sizes == [(2_000, 0), (2_000, 0)]


async def test_of_orders_that_are_not_answered_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_orders, "PENDING_MAX", 2)
    session = node_sessions.NodeSession(1, EPOCH, "me")
    router = node_orders.OrderRouter(lambda _: session)
    order = order_pb2.Order(drain=order_pb2.DrainOrder(is_draining=True))
    asked = [asyncio.create_task(router.ask("r620-1", order, 5.0)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(errors.ResourceExhausted):
        await router.ask("r620-1", order, 5.0)
    router.close(errors.NotLeader("elsewhere:1"))
    for each in asked:
        with pytest.raises(errors.NotLeader):
            await each
    with pytest.raises(errors.NotLeader):
        await router.ask("r620-1", order, 5.0)


async def test_whoever_stops_waiting_leaves_the_answer_to_the_others() -> None:
    session = node_sessions.NodeSession(1, EPOCH, "me")
    router = node_orders.OrderRouter(lambda _: session)
    order = order_pb2.Order(order_id="o-1", drain=order_pb2.DrainOrder())
    first, second = (asyncio.create_task(router.ask("r620-1", order, 5.0)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    router.answered("r620-1", order_pb2.OrderResult(order_id="o-1"))
    assert (await second).order_id == "o-1"
    response = await session.next_response()
    assert response is not None
    assert len(response.orders) == 1
    # It is over: an answer that comes twice, or that nobody asked for, is passed over.
    router.answered("r620-1", order_pb2.OrderResult(order_id="o-1"))
    router.answered("nobody", order_pb2.OrderResult(order_id="o-9"))


async def test_an_effect_for_a_connection_that_is_gone_is_no_error(known: nodes.Nodes) -> None:
    session = register(known)
    known.close_session(session)
    known.writer.put(registry_effects.PutNode(record=known.registry.get("r620-1").record))
    known.take(wire.SyncNodeRequest(sequence=2), session)
    assert known.registry.get("r620-1").session is None
