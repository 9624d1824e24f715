"""The ledger's buffer and its writer: order, bounds, gaps, outages, takeovers. Nothing here waits for real."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.postgres import ledger, memory, port

EPOCH = epochs.Epoch(1, 10, 5)
NEXT_EPOCH = epochs.Epoch(1, 11, 5)
NOON = datetime(2030, 1, 2, 12, tzinfo=UTC)


def entry(n: int) -> port.LedgerEntry:
    return port.LedgerEntry(time=NOON + timedelta(seconds=n), event="GRANTED", budget="b", cause=str(n))


def causes(batch: ledger.Batch | None) -> list[str]:
    assert batch is not None
    return [row.cause if row.event != port.GAP else "gap" for row in batch.rows]


def lost(batch: ledger.Batch | None) -> float:
    assert batch is not None and batch.rows[0].event == port.GAP
    return batch.rows[0].amounts["entries_lost"]


# The buffer.


def test_entries_leave_in_order_in_numbered_batches() -> None:
    buffer = ledger.LedgerBuffer(10)
    for n in range(5):
        buffer.add(entry(n))
    assert causes(buffer.take(3)) == ["0", "1", "2"]
    buffer.written()
    second = buffer.take(3)
    assert causes(second) == ["3", "4"]
    assert second is not None and second.number == 2
    buffer.written()
    assert buffer.take(3) is None
    assert not buffer.has_more


def test_a_batch_stays_the_same_until_it_is_written() -> None:
    buffer = ledger.LedgerBuffer(10)
    buffer.add(entry(0))
    first = buffer.take(5)
    buffer.add(entry(1))
    assert buffer.take(5) is first
    assert len(buffer) == 2


def test_a_full_buffer_loses_its_oldest_and_tells_how_many_and_when() -> None:
    buffer = ledger.LedgerBuffer(3)
    for n in range(5):
        buffer.add(entry(n))
    batch = buffer.take(10)
    assert causes(batch) == ["gap", "2", "3", "4"]
    assert lost(batch) == 2
    assert batch is not None and batch.rows[0].time == NOON + timedelta(seconds=1)
    assert "2 entries from 2030-01-02T12:00:00+00:00 to 2030-01-02T12:00:01+00:00" in batch.rows[0].cause
    buffer.written()
    buffer.add(entry(5))
    assert causes(buffer.take(10)) == ["5"]


def test_the_batch_in_flight_is_never_touched_so_the_gap_follows_it() -> None:
    buffer = ledger.LedgerBuffer(4)
    for n in range(4):
        buffer.add(entry(n))
    in_flight = buffer.take(2)
    for n in range(4, 7):
        buffer.add(entry(n))
    assert causes(in_flight) == ["0", "1"]
    buffer.written()
    following = buffer.take(10)
    assert causes(following) == ["gap", "5", "6"]
    assert lost(following) == 3


def test_a_batch_that_is_given_up_becomes_part_of_the_gap_it_told() -> None:
    buffer = ledger.LedgerBuffer(2)
    for n in range(4):
        buffer.add(entry(n))
    assert lost(buffer.take(10)) == 2
    buffer.give_up()
    assert lost(buffer.take(10)) == 4
    assert buffer.lost_total == 4
    assert len(buffer) == 0


def test_dropping_everything_leaves_nothing_to_tell() -> None:
    buffer = ledger.LedgerBuffer(2)
    for n in range(4):
        buffer.add(entry(n))
    buffer.take(1)
    assert buffer.drop_all() == 2
    assert not buffer.has_more
    assert buffer.lost_total == 4


class BufferMachine(RuleBasedStateMachine):
    """Whatever happens, each entry is written once, in order, or counted in one gap at its place."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ledger.LedgerBuffer(7)
        self.added = 0
        self.accounted = 0

    @rule(count=st.integers(1, 10))
    def add(self, count: int) -> None:
        for _ in range(count):
            self.buffer.add(entry(self.added))
            self.added += 1

    @rule(rows_max=st.integers(2, 6))
    def write(self, rows_max: int) -> None:
        batch = self.buffer.take(rows_max)
        if batch is None:
            return
        assert 1 <= len(batch.rows) <= 6
        for row in batch.rows:
            if row.event == port.GAP:
                self.accounted += round(row.amounts["entries_lost"])
            else:
                assert row.cause == str(self.accounted)
                self.accounted += 1
        self.buffer.written()

    @rule()
    def take_without_an_answer(self) -> None:
        self.buffer.take(3)

    @rule()
    def give_up(self) -> None:
        self.buffer.give_up()

    @invariant()
    def it_is_bounded(self) -> None:
        assert len(self.buffer) <= 7

    def teardown(self) -> None:
        while self.buffer.has_more:
            self.write(4)
        assert self.accounted == self.added


test_every_entry_is_written_once_in_order_or_told_as_lost = BufferMachine.TestCase


# The writer, on the in-memory store.


class CountingStore(memory.MemoryStore):
    """Counts appends and lets a test wait for the next ones."""

    def __init__(self, database: memory.MemoryDatabase) -> None:
        super().__init__(database)
        self.appends = 0
        self.refuses_with: Exception | None = None
        self._appended = asyncio.Condition()

    async def append_ledger(self, epoch, entries, *, batch=0):  # type: ignore[no-untyped-def]
        self.appends += 1
        async with self._appended:
            self._appended.notify_all()
        if self.refuses_with:
            raise self.refuses_with
        await super().append_ledger(epoch, entries, batch=batch)

    async def more_appends(self, count: int) -> None:
        goal = self.appends + count
        async with asyncio.timeout(20), self._appended:
            await self._appended.wait_for(lambda: self.appends >= goal)


@pytest.fixture
def database() -> memory.MemoryDatabase:
    return memory.MemoryDatabase(migrations_applied=1)


@pytest.fixture
def store(database: memory.MemoryDatabase) -> CountingStore:
    return CountingStore(database)


def writer_on(store: port.Store, **options: float) -> ledger.LedgerWriter:
    settings = {"linger_seconds": 0.0, "backoff_seconds_min": 0.001, "backoff_seconds_max": 0.001, **options}
    writer = ledger.LedgerWriter(store, EPOCH, **settings)  # type: ignore[arg-type]
    writer.start()
    return writer


def written(database: memory.MemoryDatabase) -> list[str]:
    return ["gap" if stored.entry.event == port.GAP else stored.entry.cause for stored in database.ledger]


async def test_what_is_appended_is_written_in_order(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    writer = writer_on(store, batch_entries_max=3)
    writer.append(*map(entry, range(7)))
    assert await writer.flush(20)
    assert written(database) == [str(n) for n in range(7)]
    assert writer.backlog_entries == 0
    assert await writer.close() == 0


async def test_appending_never_waits_for_postgres(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    database.go_away()
    writer = writer_on(store)
    writer.append(*map(entry, range(5)))
    await store.more_appends(3)
    assert writer.is_postgres_away
    assert writer.backlog_entries == 5
    await writer.close(0.0)


async def test_an_outage_loses_nothing_within_bounds(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    writer = writer_on(store, batch_entries_max=4)
    database.go_away()
    for n in range(20):
        writer.append(entry(n))
    await store.more_appends(2)
    database.come_back()
    assert await writer.flush(20)
    assert written(database) == [str(n) for n in range(20)]
    assert not writer.is_postgres_away
    assert writer.lost_total == 0
    await writer.close()


async def test_an_outage_beyond_bounds_is_told_in_one_gap(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    database.go_away()
    writer = writer_on(store, capacity_entries=10, batch_entries_max=4)
    writer.append(*map(entry, range(6)))
    await store.more_appends(2)
    writer.append(*map(entry, range(6, 30)))
    database.come_back()
    assert await writer.flush(20)
    assert written(database) == ["0", "1", "2", "3", "gap", "24", "25", "26", "27", "28", "29"]
    assert database.ledger[4].entry.amounts == {"entries_lost": 20.0}
    assert writer.lost_total == 20
    await writer.close()


async def test_a_batch_whose_answer_was_lost_is_not_written_twice(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    writer = writer_on(store)
    database.lose_next_answer()
    writer.append(*map(entry, range(3)))
    assert await writer.flush(20)
    assert store.appends == 2
    assert written(database) == ["0", "1", "2"]
    await writer.close()


async def test_a_takeover_ends_the_writing_is_reported_once_and_later_entries_are_dropped(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    reports: list[errors.StaleEpoch] = []
    writer = ledger.LedgerWriter(store, EPOCH, on_fenced=reports.append, linger_seconds=0.0)
    writer.start()
    await memory.MemoryStore(database).raise_epoch(NEXT_EPOCH)
    writer.append(*map(entry, range(3)))
    assert await writer.flush(20)
    writer.append(entry(3))
    assert written(database) == []
    assert len(reports) == 1
    assert writer.backlog_entries == 0
    assert store.appends == 1
    assert await writer.close() == 0


async def test_a_batch_that_is_refused_for_good_is_a_gap_and_the_next_ones_are_written(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    writer = writer_on(store)
    store.refuses_with = ValueError("no such encoding")
    writer.append(entry(0), entry(1))
    await store.more_appends(1)
    store.refuses_with = None
    writer.append(entry(2))
    assert await writer.flush(20)
    assert written(database) == ["gap", "2"]
    await writer.close()


async def test_a_flush_while_postgres_is_away_gives_up_in_time(
    store: CountingStore, database: memory.MemoryDatabase
) -> None:
    database.go_away()
    writer = writer_on(store)
    writer.append(entry(0))
    assert not await writer.flush(0.01)
    assert await writer.close(0.0) == 1
    assert await writer.close() == 0


async def test_closing_writes_what_lingers(store: CountingStore, database: memory.MemoryDatabase) -> None:
    writer = writer_on(store, linger_seconds=3600.0)
    writer.append(entry(0))
    assert await writer.close(20) == 0
    assert written(database) == ["0"]
    writer.append(entry(1))
    assert writer.backlog_entries == 0


@pytest.mark.parametrize("batch_entries_max", [1, port.LEDGER_BATCH_ENTRIES_MAX + 1])
async def test_a_batch_size_that_cannot_work_is_refused(store: CountingStore, batch_entries_max: int) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        ledger.LedgerWriter(store, EPOCH, batch_entries_max=batch_entries_max)
    assert caught.value.field == "batch_entries_max"
