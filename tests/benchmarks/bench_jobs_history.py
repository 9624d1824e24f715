"""Commits of the jobs' ledger beside a long history and a snapshot that is held, against an empty ledger.

Two databases on one server. One has a million jobs that have ended and a million released rows, over a week,
and a session that sits idle in a REPEATABLE READ transaction, as a forgotten report or a stuck backup does: of
what is updated meanwhile no version can be vacuumed. Both do the same in turns: submit 32 jobs, allocate 32,
release 32, a commit each, through the flusher's own statements; so both meet whatever else the machine does.

The aim is of a snapshot held for 10 minutes: `bench_jobs_history.py --minutes 10`; `make bench` holds it less.
Without `--turns-per-second` the turns follow each other at once, which is more than any fleet does: each leaves
64 versions of nodes' counters, all of which stay to be passed over while the snapshot is held.
"""

import argparse
import asyncio
import contextlib
import datetime
import pathlib
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import harness
import psycopg
from leasehold import devstack
from leasehold.core import epoch as epochs
from leasehold.core.job import changes, model
from leasehold.core.placement import model as placement
from leasehold.postgres import job_store, store
from psycopg import conninfo, sql

HISTORY: Final = 1_000_000
QUICK_HISTORY: Final = 50_000
DAYS: Final = 7
NODES: Final = 1_000
BATCH: Final = 32
#: Batches that run at any time.
RUNNING: Final = 20
MINUTES: Final = 0.75
RATIO_MAX: Final = 2.0
EPOCH: Final = epochs.Epoch(1, 1, 1)
DEADLINE_SECONDS: Final = 60.0

ENDED_JOBS: Final = """
    INSERT INTO job (
        job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state, attempt, principal,
        submit_time, start_time, end_time, outcome
    )
    SELECT gen_random_uuid(), 'job-' || n, 'default', 0, 1 + n %% 4, (1 + n %% 16)::bigint << 28,
        '{"template":"work"}', (ARRAY['COMPLETED', 'COMPLETED', 'FAILED', 'CANCELLED'])[1 + n %% 4], 1, 'bench',
        at, at, at, '{"cause":"SUCCEEDED"}'
    FROM generate_series(1, %(count)s) AS n,
        LATERAL (SELECT now() - n * make_interval(days => %(days)s - 1) / %(count)s) AS t (at)
"""
RELEASED_ROWS: Final = """
    INSERT INTO resource_allocation (
        job_id, attempt, node, boot_id, queue, allocated_cpus, allocated_memory_bytes, released, allocated_time,
        released_time, alloc_seq, release_seq, epoch, outcome
    )
    SELECT job_id, 1, 'node-' || lpad((abs(hashtext(job_id::text)) % 1000)::text, 4, '0'), 'boot-0', queue,
        required_cpus, required_memory_bytes, true, start_time, end_time, 0, 0, '1.1', outcome
    FROM job
"""


def _days_before(connection: psycopg.Connection[Any]) -> None:
    """Partitions of the days that the history spans."""
    row = connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date").fetchone()
    assert row is not None
    for before in range(DAYS):
        day: datetime.date = row[0] - datetime.timedelta(days=before)
        bounds = [sql.Literal(f"{each} 00:00:00+00") for each in (day, day + datetime.timedelta(days=1))]
        connection.execute(
            sql.SQL(
                "CREATE TABLE {} PARTITION OF resource_allocation_released FOR VALUES FROM ({}) TO ({})"
            ).format(sql.Identifier(f"resource_allocation_released_{day:%Y%m%d}"), *bounds)
        )


def _age(dsn: str, count: int) -> None:
    """Give a ledger its history."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        _days_before(connection)
        connection.execute(ENDED_JOBS.encode(), {"count": count, "days": DAYS})
        connection.execute(RELEASED_ROWS.encode())
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


@contextlib.contextmanager
def _held_snapshot(dsn: str) -> Iterator[None]:
    """Somebody reads, and does not end."""
    with psycopg.connect(dsn) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM job WHERE state = 'PENDING'")
        yield
        if reader.info.transaction_status is not psycopg.pq.TransactionStatus.INTRANS:
            raise RuntimeError("the snapshot was not held to the end")


class Side:
    """One ledger, and how long its commits took, in seconds."""

    def __init__(self, ledger: job_store.PostgresJobStore) -> None:
        self._ledger = ledger
        self._running: deque[list[changes.Allocate]] = deque()
        self._node = 0
        self.seconds: dict[str, list[float]] = {"submit": [], "allocate": [], "release": []}

    async def begin(self) -> None:
        """Nodes, and what runs all the time."""
        await self._ledger.take_over(EPOCH)
        declared = placement.Resources(64, 64 * 2**30)
        capacities = tuple(
            changes.SetCapacity(node=f"node-{number:04d}", boot_id="boot-1", declared=declared)
            for number in range(NODES)
        )
        await self._ledger.flush(EPOCH, changes.Batch(batch_id="nodes", capacities=capacities))
        for _ in range(RUNNING):
            self._running.append(await self._start())
        for each in self.seconds.values():
            each.clear()

    async def turn(self) -> None:
        """Submit, allocate and release as many."""
        self._running.append(await self._start())
        ends = tuple(
            changes.EndAttempt(
                ref=each.ref,
                outcome=model.Outcome(cause=model.EndCause.SUCCEEDED, exit_code=0),
                next_state=model.JobState.COMPLETED,
                is_failure=False,
            )
            for each in self._running.popleft()
        )
        result = await self._commit("release", ends=ends)
        _check(result.ends)

    async def _start(self) -> list[changes.Allocate]:
        jobs = [self._job() for _ in range(BATCH)]
        result = await self._commit("submit", submits=tuple(changes.Submit(job=job) for job in jobs))
        _check(result.submits)
        allocations = [self._allocation(job) for job in jobs]
        result = await self._commit("allocate", allocations=tuple(allocations))
        _check(result.allocations)
        return allocations

    async def _commit(self, kind: str, **parts: Any) -> changes.BatchResult:
        batch = changes.Batch(batch_id=uuid.uuid4().hex, **parts)
        began = time.perf_counter()
        result = await self._ledger.flush(EPOCH, batch)
        self.seconds[kind].append(time.perf_counter() - began)
        return result

    def _job(self) -> model.JobRecord:
        return model.JobRecord(
            job_id=str(uuid.uuid4()),
            spec=model.JobSpec(required=placement.Resources(1, 2**28), template="work"),
            state=model.JobState.PENDING,
            principal="bench",
            submit_time_seconds=time.time(),
        )

    def _allocation(self, job: model.JobRecord) -> changes.Allocate:
        self._node = (self._node + 1) % NODES
        return changes.Allocate(
            ref=model.AttemptRef(job.job_id, 1),
            node=f"node-{self._node:04d}",
            boot_id="boot-1",
            held=job.spec.required,
            queue=job.spec.queue,
        )

    def all_seconds(self) -> list[float]:
        """Of commits of every kind."""
        return [each for kind in self.seconds.values() for each in kind]


def _check(verdicts: tuple[changes.Verdict, ...]) -> None:
    if set(verdicts) != {changes.Verdict.APPLIED}:
        raise RuntimeError("the ledger refused what it was told to do")


@contextlib.asynccontextmanager
async def _side(dsn: str) -> AsyncIterator[Side]:
    async with job_store.PostgresJobStore(dsn, deadline_seconds=DEADLINE_SECONDS) as ledger:
        side = Side(ledger)
        await side.begin()
        yield side


async def _measured(
    server: devstack.PostgresServer, minutes: float, count: int, pause_seconds: float = 0.0
) -> tuple[Side, Side]:
    """The empty ledger and the old one, each after as many turns."""
    dsns = []
    for name in ("plain", "aged"):
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        dsns.append(conninfo.make_conninfo(server.dsn, dbname=name))
        async with store.PostgresStore(dsns[-1], deadline_seconds=DEADLINE_SECONDS) as schema:
            await schema.migrate()
    plain_dsn, aged_dsn = dsns
    await asyncio.to_thread(_age, aged_dsn, count)
    async with _side(plain_dsn) as plain, _side(aged_dsn) as aged:
        with _held_snapshot(aged_dsn):
            ends_at = time.monotonic() + 60.0 * minutes
            while time.monotonic() < ends_at:
                due = time.monotonic() + pause_seconds
                await plain.turn()
                await aged.turn()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
    return plain, aged


def _p99_ms(seconds: list[float]) -> float:
    return round(1000.0 * harness.percentile(seconds, 0.99), 2)


def run(minutes: float | None = None, turns_per_second: float | None = None) -> list[harness.Result]:
    """The row of the table."""
    if minutes is None:
        minutes = 0.1 if harness.is_quick() else MINUTES
    count = QUICK_HISTORY if harness.is_quick() else HISTORY
    with (
        tempfile.TemporaryDirectory(prefix="leasehold-bench-") as folder,
        devstack.PostgresServer(pathlib.Path(folder)) as server,
    ):
        plain, aged = asyncio.run(
            _measured(server, minutes, count, 1.0 / turns_per_second if turns_per_second else 0.0)
        )
    with_history, without = _p99_ms(aged.all_seconds()), _p99_ms(plain.all_seconds())
    last = {kind: seconds[-len(seconds) // 5 :] for kind, seconds in aged.seconds.items()}
    return [
        harness.Result(
            "jobs: commit p99 with a long history and a held snapshot / without",
            with_history / without,
            "times",
            f"<= {RATIO_MAX:g}",
            with_history <= RATIO_MAX * without,
            {
                "rows_of_history": count,
                "minutes": minutes,
                "turns_per_second": round(len(aged.seconds["release"]) / (60.0 * minutes), 1),
                "commits": len(aged.all_seconds()),
                "p99_ms": with_history,
                "p99_ms_without": without,
                "median_ms": round(1000 * harness.median(aged.all_seconds()), 2),
                "median_ms_without": round(1000 * harness.median(plain.all_seconds()), 2),
                "p99_ms_by_kind": {kind: _p99_ms(seconds) for kind, seconds in aged.seconds.items()},
                "p99_ms_by_kind_last_fifth": {kind: _p99_ms(seconds) for kind, seconds in last.items()},
            },
        )
    ]


def main() -> None:
    """By itself, for as long as is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=None, help="how long the snapshot is held")
    parser.add_argument("--turns-per-second", type=float, default=None, help="at most so many of each side")
    chosen = parser.parse_args()
    harness.report(run(chosen.minutes, chosen.turns_per_second))


if __name__ == "__main__":
    main()
    sys.exit(0)
