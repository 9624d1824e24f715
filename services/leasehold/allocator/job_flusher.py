"""Batches of the jobs' ledger on their way to Postgres: the next begins when the last commit has returned.

There is no timer: whatever has gathered during a commit is the next batch, with the submits that come in the
same breath. A batch whose answer was lost is looked for in Postgres before anything else happens, and the
machine begins again from what is committed; so nothing is dispatched, answered or allocated from state that
nobody has confirmed.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from leasehold.allocator import job_gauges
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, effects, machine
from leasehold.observe import logs
from leasehold.postgres import job_port
from leasehold.runtime import garbage

RETRY_SECONDS = 0.5
#: Turns of the loop without another submit that end the wait for more: a call takes a few to the machine.
QUIET_TURNS = 8
#: Of that wait in all, however many come: a commit takes as long.
GATHER_SECONDS_MAX = 0.01

_log = logs.get_logger(__name__)

Value = TypeVar("Value")


class _Wakes:
    """When each batch was first asked for.

    What a batch places follows from what was heard since the batch before it was taken, or from what that one
    has changed: an end is committed first, and room for others after that.
    """

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._before_at: float | None = None
        self._last_at = time.perf_counter()

    def woken(self) -> None:
        """Something was heard."""
        if self._first_at is None:
            self._first_at = time.perf_counter()

    def taken(self, *, has_changes: bool) -> float:
        """A batch is taken; since when its allocations may have been due."""
        heard_at, self._first_at = self._first_at, None
        due_at = heard_at if self._before_at is None else self._before_at
        self._before_at = heard_at if has_changes else None
        # Without a wake it goes on with what a full batch had no room for.
        self._last_at = self._last_at if due_at is None else due_at
        return self._last_at


class JobFlusher:
    """Commits for one reign.

    `follow_up` is called after each event that the machine was given, to carry out its effects.
    """

    def __init__(
        self,
        store: job_port.JobStore,
        epoch: epochs.Epoch,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        follow_up: Callable[[], None],
        metrics: job_gauges.FlushMetrics,
    ) -> None:
        #: Postgres does not answer: writes are refused meanwhile.
        self.is_postgres_away = False
        self._store = store
        self._epoch = epoch
        self._now = now
        self._wall = wall
        self._follow_up = follow_up
        self._metrics = metrics
        self._wake = asyncio.Event()
        #: In the order of the changes: each leaves its mark in the audit.
        self._breakers: deque[effects.SaveBreaker] = deque()
        self._must_read = False
        self._wakes = _Wakes()

    def wake(self) -> None:
        """There may be something to commit."""
        self._wakes.woken()
        self._wake.set()

    def save_breaker(self, breaker: effects.SaveBreaker) -> None:
        """Keep, before the next batch, whether reclaims by timeout are held back."""
        self._breakers.append(breaker)
        self._wake.set()

    def read_anew(self) -> None:
        """Rows were changed by hand: have the machine begin, before the next batch, from what there is."""
        self._must_read = True
        self._wake.set()

    async def take_over(self) -> changes.Snapshot:
        """Fence earlier leaders off and read what there is, however long that takes. Raises `StaleEpoch`."""
        return await self._patiently(lambda: _read(self._store.take_over(self._epoch)))

    async def run(self, jobs: machine.JobMachine) -> NoReturn:
        """Commit until cancelled. Raises `StaleEpoch` once a later leader has taken over."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._gather(jobs)
            while await self._flush_one(jobs):
                await self._gather(jobs)

    async def _gather(self, jobs: machine.JobMachine) -> None:
        """Let submits that are on their way to the machine be in the next batch.

        Only while there are some already: a batch without submits is not put off. With 64 callers a batch has
        twice as many jobs so, at a tenth less of processor time a job; one caller waits for idle turns only.
        """
        until = time.perf_counter() + GATHER_SECONDS_MAX
        waiting, quiet = jobs.asked_count, 0
        while 0 < waiting < changes.CHANGES_MAX and quiet < QUIET_TURNS and time.perf_counter() < until:
            await asyncio.sleep(0)
            before, waiting = waiting, jobs.asked_count
            quiet = quiet + 1 if waiting == before else 0

    async def _keep_breaker(self, jobs: machine.JobMachine) -> None:
        while self._breakers:
            saved = self._breakers[0]
            await self._patiently(lambda: self._save(saved))  # noqa: B023 - awaited here and now
            self._breakers.popleft()
            jobs.breaker_saved(self._now(), saved)
            self._follow_up()

    async def _save(self, breaker: effects.SaveBreaker) -> None:
        await self._store.set_breaker(
            self._epoch, is_open=breaker.is_open, cause=breaker.cause, actor=breaker.actor
        )

    async def _flush_one(self, jobs: machine.JobMachine) -> bool:
        """Commit a batch, if there is one; whether there was."""
        await self._keep_breaker(jobs)
        if self._must_read:
            self._must_read = False
            await self._reload(jobs, was_committed=False)
        batch = jobs.take_batch(self._now(), self._wall())
        woken_at = self._wakes.taken(has_changes=batch is not None)
        # What was planned, refused or put off with it is to be told, batch or none.
        self._follow_up()
        if batch is None:
            return False
        begun = time.perf_counter()
        try:
            result = await self._store.flush(self._epoch, batch)
        except errors.PostgresUnavailable as error:
            await self._recover(jobs, batch, error)
            return True
        now = time.perf_counter()
        self._metrics.flushed(len(batch), now - begun)
        if batch.allocations:
            self._metrics.placed(len(batch.allocations), now - woken_at)
        jobs.batch_done(self._now(), self._wall(), result)
        self._follow_up()
        return True

    async def _recover(
        self, jobs: machine.JobMachine, batch: changes.Batch, error: errors.PostgresUnavailable
    ) -> None:
        """Find out what became of a batch, and begin again from what is committed."""
        self._away(error)
        jobs.batch_lost(self._now())
        self._metrics.lost()
        self._follow_up()
        was_committed = await self._patiently(lambda: self._store.was_flushed(self._epoch, batch.batch_id))
        _log.info("batch_looked_up", batch=batch.batch_id, was_committed=was_committed)
        await self._reload(jobs, was_committed=was_committed)

    async def _reload(self, jobs: machine.JobMachine, *, was_committed: bool) -> None:
        snapshot = await self._patiently(lambda: _read(self._store.reload(self._epoch)))
        with garbage.put_off():
            # In another thread, for those who need the loop meanwhile, as the election's lease does.
            loaded = await asyncio.to_thread(jobs.prepare, self._now(), self._wall(), snapshot)
            jobs.reloaded(self._now(), loaded, was_committed)
        _log.info("jobs_reloaded", jobs=len(snapshot.jobs))
        self._follow_up()

    def _away(self, error: errors.PostgresUnavailable) -> None:
        if not self.is_postgres_away:
            _log.warning("jobs_without_postgres", error=error.message)
        self.is_postgres_away = True

    async def _patiently(self, step: Callable[[], Awaitable[Value]]) -> Value:
        while True:
            try:
                value = await step()
            except errors.PostgresUnavailable as error:
                self._away(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                if self.is_postgres_away:
                    _log.info("jobs_in_postgres_again")
                self.is_postgres_away = False
                return value


async def _read(reading: Awaitable[changes.Snapshot]) -> changes.Snapshot:
    with garbage.put_off():
        return await reading
