"""The store on a real PostgreSQL that is stopped, killed or frozen, and two leaders who meet on its fence."""

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import psycopg
import pytest
from leasehold import devstack
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.postgres import database, ledger, port, queries, store

OLD = epochs.Epoch(1, 10, 5)
NEW = epochs.Epoch(1, 11, 5)
# The store's deadline is 2 s; the rest is for a machine that is busy.
ANSWER_SECONDS_MAX = 3.0
RECOVERY_SECONDS_MAX = 30.0

FENCE = queries.load("fence.sql")


def spec_of(rpm: int) -> model.BudgetSpec:
    kind = model.DimensionKind.RATE
    dimension = model.Dimension(name="rpm_limit", kind=kind, limit=rpm * quantity.MICRO)
    return model.BudgetSpec(name="openai", dimensions=(dimension,))


def entry(n: int) -> port.LedgerEntry:
    return port.LedgerEntry(time=datetime.now(UTC), event="GRANTED", budget="openai", cause=str(n))


async def eventually(call: Callable[[], Awaitable[object]]) -> None:
    """Repeat a call for as long as Postgres is away; only the store may make it succeed again."""
    async with asyncio.timeout(RECOVERY_SECONDS_MAX):
        while True:
            try:
                await call()
            except errors.PostgresUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS_MAX):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def seconds_to_be_refused(call: Callable[[], Awaitable[object]]) -> float:
    began = time.monotonic()
    with pytest.raises(errors.PostgresUnavailable) as caught:
        async with asyncio.timeout(RECOVERY_SECONDS_MAX):
            await call()
    assert caught.value.retry_after_seconds
    return time.monotonic() - began


@pytest.fixture
async def facts(own_postgres: devstack.PostgresServer) -> AsyncIterator[store.PostgresStore]:
    async with store.PostgresStore(own_postgres.dsn) as opened:
        await eventually(opened.migrate)
        await eventually(lambda: opened.raise_epoch(OLD))
        yield opened


# Postgres goes away.


async def test_while_postgres_is_stopped_calls_fail_in_time_and_later_work_by_themselves(
    own_postgres: devstack.PostgresServer, facts: store.PostgresStore
) -> None:
    await facts.put_budget(OLD, spec_of(800))
    await asyncio.to_thread(own_postgres.stop)
    for call in (facts.ping, facts.all_budgets, lambda: facts.put_budget(OLD, spec_of(900))):
        assert await seconds_to_be_refused(call) < ANSWER_SECONDS_MAX
    await asyncio.to_thread(own_postgres.start)
    await eventually(facts.ping)
    (stored,) = await facts.all_budgets()
    assert stored.version == 1


async def test_after_sigkill_an_acknowledged_write_is_there(
    own_postgres: devstack.PostgresServer, facts: store.PostgresStore
) -> None:
    written = await facts.put_budget(OLD, spec_of(800), request_id="r1")
    await facts.append_ledger(OLD, [entry(1)], batch=1)
    await asyncio.to_thread(own_postgres.kill)
    assert await seconds_to_be_refused(facts.ping) < ANSWER_SECONDS_MAX
    await asyncio.to_thread(own_postgres.start)
    await eventually(lambda: facts.put_budget(OLD, spec_of(800), request_id="r1"))
    assert await facts.all_budgets() == (written,)
    assert len((await facts.list_ledger()).items) == 1


async def test_a_restart_between_two_calls_fails_neither(
    own_postgres: devstack.PostgresServer, facts: store.PostgresStore
) -> None:
    await asyncio.gather(*(facts.ping() for _ in range(20)))
    await asyncio.to_thread(own_postgres.restart)
    await asyncio.gather(*(facts.ping() for _ in range(20)))


async def test_while_postgres_is_frozen_calls_fail_in_time_and_after_the_thaw_they_work(
    own_postgres: devstack.PostgresServer, facts: store.PostgresStore
) -> None:
    await asyncio.gather(*(facts.ping() for _ in range(20)))
    own_postgres.freeze()
    try:
        for _ in range(2):
            calls = [facts.ping, facts.all_budgets, lambda: facts.put_budget(OLD, spec_of(900))]
            waits = await asyncio.gather(*(seconds_to_be_refused(call) for call in calls))
            assert max(waits) < ANSWER_SECONDS_MAX
    finally:
        own_postgres.thaw()
    await eventually(facts.ping)
    await facts.put_budget(OLD, spec_of(1000))


async def test_a_cancelled_call_gives_its_connection_back(facts: store.PostgresStore) -> None:
    for turns in range(40):
        task = asyncio.create_task(facts.put_budget(OLD, spec_of(800 + turns)))
        # A turn of the loop more each time, so that it is cancelled at every stage on its way.
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await asyncio.gather(*(facts.ping() for _ in range(20)))


async def test_a_server_that_never_was_there_is_told_by_its_address_and_without_the_password() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port_number = unused.getsockname()[1]
        dsn = f"postgresql://someone:s3cret@127.0.0.1:{port_number}/nothing"
        async with store.PostgresStore(dsn) as facts:
            began = time.monotonic()
            with pytest.raises(errors.PostgresUnavailable) as caught:
                await facts.ping()
            assert time.monotonic() - began < ANSWER_SECONDS_MAX
    assert str(port_number) in caught.value.message
    assert "refused" in caught.value.message
    assert "s3cret" not in caught.value.message


# Two leaders.


async def until_somebody_waits_for_a_lock(dsn: str) -> None:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(10), await psycopg.AsyncConnection.connect(dsn, autocommit=True) as observer:
        while True:
            row = await (await observer.execute(query)).fetchone()
            if row and row[0]:
                return
            await asyncio.sleep(0.01)


def fence_parameters(epoch: epochs.Epoch) -> dict[str, object]:
    return {
        "generation": epoch.generation,
        "revision": epoch.revision,
        "etcd_cluster_id": f"{epoch.etcd_cluster_id:016x}",
    }


WRITES: dict[str, Callable[[store.PostgresStore], Awaitable[object]]] = {
    "put_budget": lambda facts: facts.put_budget(OLD, spec_of(1)),
    "append_ledger": lambda facts: facts.append_ledger(OLD, [entry(1)], batch=1),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_batch_that_waits_while_the_takeover_commits_is_refused(postgres_dsn: str, write: str) -> None:
    async with (
        store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as old_leader,
        await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as new_leader,
    ):
        await old_leader.migrate()
        await old_leader.raise_epoch(OLD)
        async with new_leader.transaction():
            await new_leader.execute(FENCE["raise_epoch"], fence_parameters(NEW))
            late = asyncio.create_task(_outcome(WRITES[write](old_leader)))
            await until_somebody_waits_for_a_lock(postgres_dsn)
        assert isinstance(await late, errors.StaleEpoch)
        assert await old_leader.all_budgets() == ()
        assert (await old_leader.list_ledger()).items == ()


async def test_a_takeover_that_meets_a_batch_waits_for_it_and_then_sees_all_of_it(postgres_dsn: str) -> None:
    async with (
        store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as new_leader,
        await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as old_leader,
    ):
        await new_leader.migrate()
        async with old_leader.transaction():
            await old_leader.execute(FENCE["raise_epoch"], fence_parameters(OLD))
            takeover = asyncio.create_task(new_leader.raise_epoch(NEW))
            await until_somebody_waits_for_a_lock(postgres_dsn)
            assert not takeover.done()
            await old_leader.execute("INSERT INTO generation VALUES (1, '0000000000000005', now())")
        await takeover
        assert await new_leader.claim_generation(5, accept_foreign=False) == 1
        row = await (await old_leader.execute(FENCE["raise_epoch"], fence_parameters(OLD))).fetchone()
        assert row is None


async def test_a_race_of_writes_and_takeovers_never_lets_an_old_leader_write_after_a_new_one(
    postgres_dsn: str,
) -> None:
    async with (
        store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as first,
        store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as second,
    ):
        await first.migrate()

        async def reign(facts: store.PostgresStore, revision: int) -> None:
            epoch = epochs.Epoch(1, revision, 5)
            try:
                await facts.raise_epoch(epoch)
                for n in range(20):
                    await facts.append_ledger(epoch, [entry(n)])
            except errors.StaleEpoch:
                return

        await asyncio.gather(*(reign([first, second][n % 2], n + 1) for n in range(10)))
        entries = (await first.list_ledger(page_size=1000)).items
        revisions = [stored.epoch.revision for stored in reversed(entries)]
        assert revisions == sorted(revisions)
        assert revisions.count(10) == 20


async def test_a_leader_frozen_inside_a_batch_holds_its_successor_up_for_seconds_only(
    postgres_dsn: str,
) -> None:
    async with (
        store.PostgresStore(postgres_dsn) as old_leader,
        store.PostgresStore(postgres_dsn) as new_leader,
        contextlib.AsyncExitStack() as stack,
    ):
        await eventually(old_leader.migrate)
        sessions = database.Database(postgres_dsn)
        await sessions.open()
        stack.push_async_callback(sessions.close)
        with pytest.raises(errors.PostgresUnavailable):
            # A session as the old leader has them, stopped between two statements past every deadline.
            async with sessions.transaction(deadline_seconds=60.0) as cursor:
                await cursor.execute(FENCE["raise_epoch"], fence_parameters(OLD))
                began = time.monotonic()
                await eventually(lambda: new_leader.raise_epoch(NEW))
                assert time.monotonic() - began < 5.0
                await cursor.execute("INSERT INTO generation VALUES (1, '0000000000000005', now())")
        with pytest.raises(errors.StaleEpoch):
            await old_leader.put_budget(OLD, spec_of(1))
        assert await new_leader.claim_generation(7, accept_foreign=False) == 1


async def _outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except errors.LeaseholdError as error:
        return error


# The ledger.


async def test_the_ledger_writer_loses_nothing_through_an_outage_within_its_bounds(
    own_postgres: devstack.PostgresServer, facts: store.PostgresStore
) -> None:
    writer = ledger.LedgerWriter(facts, OLD, batch_entries_max=50)
    writer.start()
    written = 0

    def append(count: int) -> None:
        nonlocal written
        writer.append(*(entry(written + n) for n in range(count)))
        written += count

    append(120)
    assert await writer.flush(RECOVERY_SECONDS_MAX)
    append(200)
    # Killed while batches are on their way: some are committed and not known to be.
    await asyncio.to_thread(own_postgres.kill)
    append(300)
    await until(lambda: writer.is_postgres_away)
    append(80)
    await asyncio.to_thread(own_postgres.start)
    assert await writer.flush(RECOVERY_SECONDS_MAX)
    assert await writer.close() == 0

    page = await facts.list_ledger(page_size=1000)
    assert [stored.entry.cause for stored in reversed(page.items)] == [str(n) for n in range(written)]
    assert writer.lost_total == 0


# A definition that this version cannot read.


async def test_a_budget_that_cannot_be_read_is_left_out_alone_and_can_be_replaced(postgres_dsn: str) -> None:
    names = ["a", "b", "c", "d"]
    async with store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as facts:
        await facts.migrate()
        for name in names:
            await facts.put_budget(OLD, dataclasses.replace(spec_of(800), name=name))
        with psycopg.connect(postgres_dsn, autocommit=True) as newer:
            newer.execute(
                "UPDATE budget SET definition = definition || '{\"borrowing\": true}' WHERE name IN ('b', 'c')"
            )
        assert [stored.spec.name for stored in await facts.all_budgets()] == ["a", "d"]
        with pytest.raises(errors.LeaseholdError, match=r"budget b .* cannot be read") as caught:
            await facts.get_budget("b")
        assert caught.value.reason == "INTERNAL"

        replaced = await facts.put_budget(OLD, dataclasses.replace(spec_of(800), name="b"))
        assert replaced.version == 2
        await facts.delete_budget(OLD, "c")
        assert [stored.spec.name for stored in await facts.all_budgets()] == ["a", "b", "d"]


# Plans.


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({}, "lease_ledger_pkey"),
        ({"budget": "b1"}, "lease_ledger_budget"),
        ({"holder": "w1"}, "lease_ledger_holder"),
        ({"budget": "b1", "holder": "w1"}, "lease_ledger_holder"),
    ],
)
async def test_each_page_of_the_ledger_is_read_through_an_index(
    postgres_dsn: str, filters: dict[str, str], index: str
) -> None:
    async with store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as facts:
        await facts.migrate()
        for _ in range(2):
            await facts.append_ledger(
                OLD,
                [
                    port.LedgerEntry(
                        time=datetime.now(UTC), event="GRANTED", budget=f"b{n % 500}", holder=f"w{n % 1000}"
                    )
                    for n in range(10_000)
                ],
            )
    parameters = {"budget": "", "holder": "", "before_id": 19_000, "limit": 101, **filters}
    explained = b"EXPLAIN (FORMAT TEXT) " + queries.load("ledger.sql")["list_ledger"]
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute("ANALYZE lease_ledger")
        plan = "\n".join(row[0] for row in connection.execute(explained, parameters, prepare=False))
    assert f"using {index}" in plan or f"on {index}" in plan, plan
    assert "Seq Scan" not in plan, plan
