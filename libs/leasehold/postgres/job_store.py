"""The ledger of jobs in PostgreSQL: one session for the flusher, a pool for those who read."""

from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import psycopg
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.observe import logs
from leasehold.postgres import (
    database,
    job_flush,
    job_halves,
    job_house,
    job_load,
    job_port,
    job_rows,
    port,
    queries,
    rowmap,
    rules,
    writes,
)

#: Loading a hundred thousand jobs takes about a second.
LOAD_SECONDS = 30.0
AUDIT_SECONDS = 30.0
#: A batch that lost to another session's lock or to a serialization failure is tried again, so often.
TRIES_MAX = 5

AUDIT_RULES = (
    "COUNTER_DIFFERS",
    "OVER_ALLOCATED",
    "UNKNOWN_NODE",
    "ENDED_UNRELEASED",
    "RELEASED_UNENDED",
    "UNKNOWN_QUEUE",
)

_SQL = queries.load("job_read.sql")
#: SQLSTATE of a transaction that may succeed as it is: serialization failure, deadlock.
_AGAIN = frozenset({"40001", "40P01"})
#: Classes of SQLSTATE that blame the data: data exception, integrity constraint violation.
_POISON_CLASSES = frozenset({"22", "23"})

_log = logs.get_logger(__name__)


class _RehearsedError(Exception):
    """Rolls a transaction back that would have gone through."""


class PostgresJobStore:
    """Implements `job_port.JobStore`; an async context manager. `store.PostgresStore` migrates the schema."""

    def __init__(self, dsn: str, *, deadline_seconds: float = 2.0) -> None:
        self._dsn = dsn
        self._deadline_seconds = deadline_seconds
        self._reading = database.Database(dsn, deadline_seconds=deadline_seconds, connections_max=4)
        self._flushing: database.Database | None = None
        self._flushing_name = ""

    async def __aenter__(self) -> Self:
        await self._reading.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `job_port.JobStore.close`."""
        if self._flushing is not None:
            await self._flushing.close()
        await self._reading.close()

    # The leader

    async def take_over(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """As `job_port.JobStore.take_over`."""
        await self._end_sessions(epoch, is_own=False)
        async with self._reading.transaction() as cursor:
            await cursor.execute(_SQL["raise_fence"], rowmap.epoch_columns(epoch))
            if await cursor.fetchone() is None:
                raise await self._stale(cursor, epoch)
        await self._use_session_of(epoch)
        await job_house.make_partitions(self._reading)
        return await self.reload(epoch)

    async def reload(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """As `job_port.JobStore.reload`."""
        async with self._reading.transaction(deadline_seconds=LOAD_SECONDS) as cursor:
            await cursor.execute(_SQL["repeatable_read"])
            await cursor.execute(_SQL["allow_parts"], {"milliseconds": str(round(LOAD_SECONDS * 1000))})
            await cursor.execute(_SQL["get_fence"])
            fence = rowmap.only(await cursor.fetchone())
            if rowmap.epoch(fence) != epoch:
                raise rules.stale_epoch(epoch, rowmap.epoch(fence))
            await cursor.execute(_SQL["list_queues"])
            queues = tuple(map(job_rows.queue, await cursor.fetchall()))
            await cursor.execute(_SQL["list_capacities"])
            capacities = tuple(map(job_rows.capacity, await cursor.fetchall()))
            jobs = await job_load.live_jobs(cursor.connection)
        return changes.Snapshot(
            flush_seq=fence["flush_seq"],
            queues=queues,
            capacities=capacities,
            jobs=jobs,
            is_breaker_open=fence["is_breaker_open"],
        )

    async def flush(self, epoch: epochs.Epoch, batch: changes.Batch) -> changes.BatchResult:
        """As `job_port.JobStore.flush`."""
        flushing = self._writing()
        for _ in range(TRIES_MAX):
            try:
                async with flushing.transaction() as cursor:
                    result = await job_flush.flush(cursor, epoch, batch)
                    if result is None:
                        raise await self._stale(cursor, epoch)
                    return result
            except errors.LeaseholdError as error:
                code = _sqlstate(error)
                if code[:2] in _POISON_CLASSES:
                    return await self._halved(epoch, batch, error)
                if code not in _AGAIN:
                    raise
        raise errors.PostgresUnavailable("the batch lost to other sessions' locks again and again")

    async def _halved(
        self, epoch: epochs.Epoch, batch: changes.Batch, error: errors.LeaseholdError
    ) -> changes.BatchResult:
        """A batch with poison in it: each half by itself, until the poison is alone."""
        units = job_halves.units(batch)
        if len(units) <= 1:
            _log.error("change_refused", batch=batch.batch_id, error=error.message)
            poison = await self._poison(epoch, batch.submits) if len(batch.submits) > 1 else []
            return job_halves.poisoned(batch, await self._noted(epoch, batch.batch_id), poison)
        first, second = units[: len(units) // 2], units[len(units) // 2 :]
        # The whole was flushed when its last half was: that one has its id.
        before = await self.flush(epoch, job_halves.picked(batch, first, f"{batch.batch_id[:62]}/1"))
        after = await self.flush(epoch, job_halves.picked(batch, second, batch.batch_id))
        return job_halves.joined(batch, [(first, before), (second, after)])

    async def _poison(self, epoch: epochs.Epoch, submits: Sequence[changes.Submit]) -> list[str]:
        """Jobs that Postgres refuses, found by halves; nothing is committed."""
        if await self._would_take(epoch, submits):
            return []
        if len(submits) == 1:
            return [submits[0].job.job_id]
        middle = len(submits) // 2
        return [
            *await self._poison(epoch, submits[:middle]),
            *await self._poison(epoch, submits[middle:]),
        ]

    async def _would_take(self, epoch: epochs.Epoch, submits: Sequence[changes.Submit]) -> bool:
        rehearsed = changes.Batch(batch_id="-", submits=tuple(submits))
        try:
            async with self._writing().transaction() as cursor:
                if await job_flush.flush(cursor, epoch, rehearsed) is None:
                    raise await self._stale(cursor, epoch)
                raise _RehearsedError
        except _RehearsedError:
            return True
        except errors.LeaseholdError as error:
            if _sqlstate(error)[:2] not in _POISON_CLASSES:
                raise
            return False

    def _writing(self) -> database.Database:
        if self._flushing is None:
            raise errors.FailedPrecondition("the ledger is flushed by who has taken it over")
        return self._flushing

    async def _noted(self, epoch: epochs.Epoch, batch_id: str) -> changes.BatchResult:
        return await self.flush(epoch, changes.Batch(batch_id=batch_id))

    async def was_flushed(self, epoch: epochs.Epoch, batch_id: str) -> bool:
        """As `job_port.JobStore.was_flushed`."""
        await self._end_sessions(epoch, is_own=True)
        async with self._reading.transaction() as cursor:
            await cursor.execute(_SQL["get_fence"])
            return bool(rowmap.only(await cursor.fetchone())["batch_id"] == batch_id)

    async def set_breaker(self, epoch: epochs.Epoch, *, is_open: bool, cause: str, actor: str = "") -> None:
        """As `job_port.JobStore.set_breaker`."""
        async with self._reading.transaction() as cursor:
            await cursor.execute(_SQL["set_breaker"], {**rowmap.epoch_columns(epoch), "is_open": is_open})
            if not cursor.rowcount:
                raise await self._stale(cursor, epoch)
            await writes.note_change(
                cursor,
                epoch,
                method="AcknowledgeSilence" if actor else "SetBreaker",
                target="jobs",
                actor=actor,
                cause=cause,
                before={"is_open": not is_open},
                after={"is_open": is_open},
            )

    async def _use_session_of(self, epoch: epochs.Epoch) -> None:
        if self._flushing is not None:
            await self._flushing.close()
        self._flushing_name = _session_name(epoch)
        self._flushing = database.Database(
            self._dsn,
            deadline_seconds=self._deadline_seconds,
            connections_max=1,
            application_name=self._flushing_name,
            finds_by_key=True,
        )
        await self._flushing.open()

    async def _end_sessions(self, epoch: epochs.Epoch, *, is_own: bool) -> None:
        async with self._reading.transaction() as cursor:
            await cursor.execute(
                _SQL["end_sessions"],
                {
                    "generation": epoch.generation,
                    "revision": epoch.revision,
                    "is_own": is_own,
                    "name": _session_name(epoch),
                },
            )

    async def _stale(self, cursor: database.Cursor, epoch: epochs.Epoch) -> errors.StaleEpoch:
        await cursor.execute(_SQL["get_fence"])
        return rules.stale_epoch(epoch, rowmap.epoch(rowmap.only(await cursor.fetchone())))

    # Reading

    async def kept_answers(
        self, keys: Collection[changes.RequestKey]
    ) -> Mapping[changes.RequestKey, changes.KeepAnswer]:
        """As `job_port.JobStore.kept_answers`."""
        async with self._reading.transaction() as cursor:
            return await job_flush.kept_answers(cursor, list(keys))

    async def get_job(self, job_id: str) -> model.JobRecord:
        """As `job_port.JobStore.get_job`."""
        model.checked_job_id(job_id)
        rows = await self._listed(limit=1, job_id=job_id)
        if not rows:
            raise errors.NotFound(f"there is no job {job_id}", field="job_id")
        return job_rows.job(rows[0])

    async def get_allocation(self, ref: model.AttemptRef) -> model.AllocationRecord:
        """As `job_port.JobStore.get_allocation`."""
        model.checked_job_id(ref.job_id)
        async with self._reading.transaction() as cursor:
            await cursor.execute(_SQL["get_allocation"], {"job_id": ref.job_id, "attempt": ref.attempt})
            row = await cursor.fetchone()
        if row is None:
            raise job_port.no_such_attempt(ref)
        return job_rows.allocation(row)

    async def list_jobs(
        self, chosen: job_port.JobFilter, *, page_size: int, before: tuple[float, str] | None
    ) -> port.Page[model.JobRecord]:
        """As `job_port.JobStore.list_jobs`."""
        rules.checked_page_size(page_size)
        found = await self._listed(
            limit=page_size + 1,
            states=sorted(state.value for state in chosen.states) or None,
            has_ended=_have_ended(chosen.states),
            queue=chosen.queue or None,
            node=chosen.node or None,
            before_time=None if before is None else before[0],
            before_id=None if before is None else model.checked_job_id(before[1], field_name="page_token"),
        )
        return port.Page(tuple(map(job_rows.job, found[:page_size])), has_more=len(found) > page_size)

    async def _listed(self, **filters: Any) -> list[database.Row]:
        names = ("job_id", "states", "has_ended", "queue", "node", "before_time", "before_id")
        parameters = dict.fromkeys(names)
        async with self._reading.transaction() as cursor:
            # Not prepared: it is to be planned with its values.
            await cursor.execute(_SQL["list_jobs"], {**parameters, **filters}, prepare=False)
            return await cursor.fetchall()

    async def audit(self) -> job_port.LedgerAudit:
        """As `job_port.JobStore.audit`."""
        async with self._reading.transaction(deadline_seconds=AUDIT_SECONDS) as cursor:
            await cursor.execute(_SQL["repeatable_read"])
            await cursor.execute(_SQL["audit"], {})
            findings = tuple(job_port.Finding(**row) for row in await cursor.fetchall())
            await cursor.execute(_SQL["audit_counts"])
            counts = rowmap.only(await cursor.fetchone())
        return job_port.LedgerAudit(findings=findings, rules=AUDIT_RULES, **counts)

    async def release_ended(self, epoch: epochs.Epoch) -> int:
        """As `job_port.JobStore.release_ended`."""
        async with self._reading.transaction() as cursor:
            released = await job_flush.release_ended(cursor, epoch)
            if released is None:
                raise await self._stale(cursor, epoch)
            return released

    async def keep_house(
        self, epoch: epochs.Epoch, *, retention_seconds: float = job_port.RETENTION_SECONDS
    ) -> Sequence[str]:
        """As `job_port.JobStore.keep_house`."""
        async with self._reading.transaction() as cursor:
            await cursor.execute(_SQL["get_fence"])
            fence = rowmap.epoch(rowmap.only(await cursor.fetchone()))
        if fence != epoch:
            raise rules.stale_epoch(epoch, fence)
        return await job_house.keep(self._reading, rules.checked_age(retention_seconds))


def _have_ended(states: Collection[model.JobState]) -> bool | None:
    """Whether jobs of these states have all ended, or none of them; None: neither, or any state will do."""
    found = {state in model.TERMINAL_STATES for state in states}
    return found.pop() if len(found) == 1 else None


def _session_name(epoch: epochs.Epoch) -> str:
    return f"leasehold-jobs {epoch.generation}.{epoch.revision}"


def _sqlstate(error: errors.LeaseholdError) -> str:
    cause = error.__cause__
    return (cause.sqlstate or "") if isinstance(cause, psycopg.Error) else ""
