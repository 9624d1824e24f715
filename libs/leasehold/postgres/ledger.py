"""Writing the ledger without ever holding up the leader: a pure buffer and a thin asyncio shell around it.

While Postgres is away entries wait in the buffer. When it is full the oldest make room, and one GAP entry in
their place says how many were lost. A batch keeps its number and its content until it is known to be written,
so that one whose answer was lost is not written twice.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.observe import logs
from leasehold.postgres import port

CAPACITY_ENTRIES = 20_000
BATCH_ENTRIES_MAX = 2_000
LINGER_SECONDS = 0.05
BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 2.0

_log = logs.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gap:
    """Entries that were lost, and the times of the first and the last of them."""

    entries: int
    begin: datetime
    end: datetime

    def joined(self, other: "Gap | None") -> "Gap":
        """Both as one."""
        if other is None:
            return self
        return Gap(self.entries + other.entries, min(self.begin, other.begin), max(self.end, other.end))

    def told(self) -> port.LedgerEntry:
        """The entry that stands in the ledger for what was lost."""
        return port.LedgerEntry(
            time=self.end,
            event=port.GAP,
            amounts={"entries_lost": float(self.entries)},
            cause=(
                f"{self.entries} entries from {self.begin.isoformat()} to {self.end.isoformat()} "
                "could not be written"
            ),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries that are written together, under a number that is theirs alone within the epoch."""

    number: int
    #: What was lost just before these entries.
    gap: Gap | None
    entries: tuple[port.LedgerEntry, ...]

    @property
    def rows(self) -> tuple[port.LedgerEntry, ...]:
        """What is written."""
        return (self.gap.told(), *self.entries) if self.gap else self.entries


class LedgerBuffer:
    """Entries on their way, at most `capacity`, the batch that is being written included. Pure."""

    def __init__(self, capacity: int = CAPACITY_ENTRIES) -> None:
        if capacity < 1:
            raise errors.InvalidArgument(f"capacity: {capacity} is not positive", field="capacity")
        self._capacity = capacity
        self._waiting: deque[port.LedgerEntry] = deque()
        self._in_flight: Batch | None = None
        self._batches = 0
        self._gap: Gap | None = None
        self._lost_total = 0

    def __len__(self) -> int:
        return len(self._waiting) + (len(self._in_flight.entries) if self._in_flight else 0)

    @property
    def has_more(self) -> bool:
        """Whether there is anything to write: entries, or a gap to tell."""
        return bool(self._in_flight or self._waiting or self._gap)

    @property
    def has_gap(self) -> bool:
        """Whether entries were lost that no batch tells of yet."""
        return self._gap is not None

    @property
    def lost_total(self) -> int:
        """Entries lost since the buffer was made."""
        return self._lost_total

    def add(self, entry: port.LedgerEntry) -> None:
        """Take an entry; where there is no room the oldest that is not being written is lost for it."""
        self._waiting.append(entry)
        if len(self) > self._capacity:
            self._lose([self._waiting.popleft()])

    def take(self, rows_max: int) -> Batch | None:
        """The batch to write next, unchanged until `written` or `give_up`; None: there is nothing."""
        if self._in_flight is None and self.has_more:
            room = rows_max - (1 if self._gap else 0)
            entries = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._batches += 1
            self._in_flight = Batch(self._batches, self._gap, tuple(entries))
            self._gap = None
        return self._in_flight

    def written(self) -> None:
        """The batch in flight is in Postgres."""
        self._in_flight = None

    def give_up(self) -> None:
        """The batch in flight can never be written: it becomes part of a gap."""
        batch, self._in_flight = self._in_flight, None
        if batch is None:
            return
        if batch.gap:
            self._gap = batch.gap.joined(self._gap)
        self._lose(batch.entries)

    def drop_all(self) -> int:
        """Forget everything, untold: how many entries were lost by it."""
        dropped = len(self)
        self._in_flight = None
        self._waiting.clear()
        self._gap = None
        self._lost_total += dropped
        return dropped

    def _lose(self, entries: Sequence[port.LedgerEntry]) -> None:
        for entry in entries:
            self._gap = Gap(1, entry.time, entry.time).joined(self._gap)
        self._lost_total += len(entries)


class LedgerWriter:
    """Writes the ledger of one reign in the background. `append` never waits and never fails.

    On `PostgresUnavailable` it keeps what it has and tries again, 0.1 to 2 s later. On `StaleEpoch` it forgets
    everything, calls `on_fenced` with the error once, and takes no more. A batch that is refused for any other
    reason is given up, told as a gap, and the next one goes on.
    """

    def __init__(
        self,
        store: port.Store,
        epoch: epochs.Epoch,
        *,
        on_fenced: Callable[[errors.StaleEpoch], None] | None = None,
        capacity_entries: int = CAPACITY_ENTRIES,
        batch_entries_max: int = BATCH_ENTRIES_MAX,
        linger_seconds: float = LINGER_SECONDS,
        backoff_seconds_min: float = BACKOFF_SECONDS_MIN,
        backoff_seconds_max: float = BACKOFF_SECONDS_MAX,
    ) -> None:
        if not 2 <= batch_entries_max <= port.LEDGER_BATCH_ENTRIES_MAX:
            raise errors.InvalidArgument(
                f"batch_entries_max: {batch_entries_max} is not in 2 to {port.LEDGER_BATCH_ENTRIES_MAX}",
                field="batch_entries_max",
            )
        self._store = store
        self._epoch = epoch
        self._on_fenced = on_fenced
        self._buffer = LedgerBuffer(capacity_entries)
        self._batch_entries_max = batch_entries_max
        self._linger_seconds = linger_seconds
        self._backoff_seconds_min = backoff_seconds_min
        self._backoff_seconds_max = backoff_seconds_max
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._hurry = asyncio.Event()
        self._flushes = 0
        self._is_shut = False
        self._is_away = False
        self._task: asyncio.Task[None] | None = None

    @property
    def backlog_entries(self) -> int:
        """Entries that are not known to be written."""
        return len(self._buffer)

    @property
    def lost_total(self) -> int:
        """Entries that were, or will be, told as lost, and those dropped at a takeover or at closing."""
        return self._buffer.lost_total

    @property
    def is_postgres_away(self) -> bool:
        """Whether the last attempt to write found Postgres away."""
        return self._is_away

    def start(self) -> None:
        """Begin to write, in a task of the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="ledger-writer")

    def append(self, *entries: port.LedgerEntry) -> None:
        """Take entries, in order. After a takeover or `close` they are dropped."""
        if self._is_shut:
            return
        had_gap = self._buffer.has_gap
        for entry in entries:
            self._buffer.add(entry)
        if self._buffer.has_gap and not had_gap:
            _log.warning("ledger_overflowed", backlog_entries=len(self._buffer))
        self._filled.set()
        self._drained.clear()

    async def flush(self, timeout_seconds: float) -> bool:
        """Write what there is without lingering; whether all of it is written in time."""
        self._flushes += 1
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._buffer.has_more:
                    await self._drained.wait()
        except TimeoutError:
            return False
        finally:
            self._flushes -= 1
        return True

    async def close(self, timeout_seconds: float = 2.0) -> int:
        """Flush for at most so long and stop; how many entries were not written. Again: 0."""
        if self._task is None:
            self._is_shut = True
            return self._buffer.drop_all()
        await self.flush(timeout_seconds)
        self._is_shut = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        dropped = self._buffer.drop_all()
        if dropped:
            _log.warning("ledger_entries_dropped", entries=dropped, why="closed while Postgres was away")
        return dropped

    async def _run(self) -> None:
        backoff_seconds = self._backoff_seconds_min
        while not self._is_shut:
            if not self._buffer.has_more:
                self._drained.set()
                self._filled.clear()
                await self._filled.wait()
                if not self._flushes:
                    await self._pause(self._linger_seconds)
            if await self._write_batch():
                backoff_seconds = self._backoff_seconds_min
            else:
                await self._pause(backoff_seconds)
                backoff_seconds = min(backoff_seconds * 2, self._backoff_seconds_max)

    async def _write_batch(self) -> bool:
        """Write the next batch; whether to go on at once."""
        batch = self._buffer.take(self._batch_entries_max)
        if batch is None:
            return True
        try:
            await self._store.append_ledger(self._epoch, batch.rows, batch=batch.number)
        except errors.PostgresUnavailable as error:
            if not self._is_away:
                _log.warning("ledger_waits_for_postgres", error=error.message)
            self._is_away = True
            return False
        except errors.StaleEpoch as error:
            self._fence_off(error)
            return True
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a batch, the next one goes on
            self._buffer.give_up()
            _log.error("ledger_batch_refused", entries=len(batch.entries), error=str(error))
            return False
        self._buffer.written()
        if self._is_away:
            _log.info("ledger_goes_on", backlog_entries=len(self._buffer))
        self._is_away = False
        return True

    def _fence_off(self, error: errors.StaleEpoch) -> None:
        self._is_shut = True
        dropped = self._buffer.drop_all()
        self._drained.set()
        _log.warning("ledger_fenced_off", epoch=self._epoch.encode(), entries=dropped, error=error.message)
        if self._on_fenced:
            self._on_fenced(error)

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than to the next call of `flush`."""
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
