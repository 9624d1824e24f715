"""The ledger of jobs on a real PostgreSQL: many flushers, frozen ones, cut connections, changes by hand."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
from leasehold import devstack
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.job.changes import Verdict
from leasehold.core.placement import model as placement
from leasehold.postgres import job_port, job_store, queries, store

CHILD = pathlib.Path(__file__).parents[1] / "job_flusher_child.py"
PATIENCE_SECONDS = 30.0
CPUS = 8
MIB = 2**20

Process = asyncio.subprocess.Process


async def prepared(dsn: str, revision: int = 1) -> epochs.Epoch:
    """The schema, and three nodes; the epoch that made them."""
    epoch = epochs.Epoch(1, revision, 7)
    async with store.PostgresStore(dsn, deadline_seconds=20.0) as schema:
        await schema.migrate()
    async with job_store.PostgresJobStore(dsn, deadline_seconds=20.0) as ledger:
        await ledger.take_over(epoch)
        await ledger.flush(
            epoch,
            changes.Batch(
                batch_id="nodes",
                capacities=tuple(
                    changes.SetCapacity(
                        node=node, boot_id="boot-1", declared=placement.Resources(CPUS, 1024 * MIB)
                    )
                    for node in ("n1", "n2", "n3")
                ),
            ),
        )
    return epoch


@contextlib.asynccontextmanager
async def child(dsn: str, revision: int, how: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), dsn, str(revision), how, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        return (await process.stdout.readline()).decode().strip()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


def submit(number: int) -> changes.Submit:
    return changes.Submit(
        job=model.JobRecord(
            job_id=str(uuid.UUID(int=number)),
            spec=model.JobSpec(required=placement.Resources(1, MIB)),
            state=model.JobState.PENDING,
            submit_time_seconds=1.9e9,
        )
    )


def give(number: int, node: str = "n1") -> changes.Allocate:
    job = submit(number).job
    return changes.Allocate(
        ref=model.AttemptRef(job.job_id, 1),
        node=node,
        boot_id="boot-1",
        held=job.spec.required,
        queue="default",
    )


MOST_AT_EACH_NUMBER = """
WITH moves AS (
    SELECT node, alloc_seq AS seq, allocated_cpus AS cpus FROM resource_allocation
    UNION ALL
    SELECT node, release_seq, -allocated_cpus FROM resource_allocation WHERE released
), sums AS (
    SELECT node, seq, sum(cpus) AS cpus FROM moves GROUP BY node, seq
)
SELECT coalesce(max(held), 0)
FROM (SELECT sum(cpus) OVER (PARTITION BY node ORDER BY seq) AS held FROM sums) AS s
"""


async def test_leaders_that_overtake_each_other_never_give_out_more_than_there_is(
    postgres_dsn: str,
) -> None:
    await prepared(postgres_dsn)
    async with contextlib.AsyncExitStack() as stack, psycopg_connection(postgres_dsn) as seen:
        for revision in range(2, 8):
            last = await stack.enter_async_context(child(postgres_dsn, revision, "loop"))
            assert await said(last) == "took"
            enough = await value(seen, "SELECT flush_seq + 15 FROM job_fence")

            async def has_flushed(wanted: int = enough) -> bool:
                return await value(seen, "SELECT flush_seq FROM job_fence") >= wanted

            await until(has_flushed)

    async with job_store.PostgresJobStore(postgres_dsn, deadline_seconds=20.0) as ledger:
        await ledger.take_over(epochs.Epoch(1, 100, 7))
        audit = await ledger.audit()
    async with psycopg_connection(postgres_dsn) as seen:
        most = await value(seen, MOST_AT_EACH_NUMBER)
        epochs_seen = await value(seen, "SELECT count(DISTINCT epoch) FROM resource_allocation")
    assert audit.findings == ()
    assert 0 < most <= CPUS
    assert epochs_seen == 6


async def test_a_leader_frozen_inside_a_batch_is_ended_by_its_successor_and_commits_nothing_after(
    postgres_dsn: str,
) -> None:
    await prepared(postgres_dsn)
    async with child(postgres_dsn, 2, "freeze") as frozen:
        assert await said(frozen) == "took"
        assert await said(frozen) == "inside"
        async with job_store.PostgresJobStore(postgres_dsn) as ledger:
            taken = await ledger.take_over(epochs.Epoch(1, 3, 7))
            await ledger.flush(epochs.Epoch(1, 3, 7), changes.Batch(batch_id="next", submits=(submit(1),)))
            os.kill(frozen.pid, signal.SIGCONT)

            assert await said(frozen) == "PostgresUnavailable"
            assert taken.jobs == ()
            assert [job.job_id for job in (await ledger.reload(epochs.Epoch(1, 3, 7))).jobs] == [
                submit(1).job.job_id
            ]


async def test_a_leader_killed_inside_a_batch_leaves_nothing_of_it(postgres_dsn: str) -> None:
    await prepared(postgres_dsn)
    async with child(postgres_dsn, 2, "freeze") as killed:
        assert [await said(killed), await said(killed)] == ["took", "inside"]
        killed.kill()
        await killed.wait()
        async with job_store.PostgresJobStore(postgres_dsn) as ledger:
            assert (await ledger.take_over(epochs.Epoch(1, 3, 7))).jobs == ()


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_connection_cut_at_commit_leaves_a_batch_that_is_known_to_be_there_or_not(
    postgres_dsn: str, is_committed: bool
) -> None:
    epoch = await prepared(postgres_dsn)
    batch = changes.Batch(batch_id="cut", submits=(submit(1),), allocations=(give(1),))
    async with (
        Cutter(postgres_dsn, passes_commit=is_committed) as cutter,
        job_store.PostgresJobStore(cutter.dsn) as ledger,
    ):
        await ledger.take_over(epoch)
        cutter.is_armed = True
        with pytest.raises(errors.PostgresUnavailable):
            await ledger.flush(epoch, batch)

        assert cutter.has_cut
        assert await ledger.was_flushed(epoch, "cut") is is_committed
        jobs = (await ledger.reload(epoch)).jobs
        assert [job.state for job in jobs] == ([model.JobState.RUNNING] if is_committed else [])
        again = await ledger.flush(epoch, batch)
        assert (changes.Verdict.APPLIED in again.allocations) is not is_committed
        assert (await ledger.audit()).findings == ()


async def test_rows_changed_by_hand_are_found_and_the_leaked_one_is_released(postgres_dsn: str) -> None:
    epoch = await prepared(postgres_dsn)
    async with job_store.PostgresJobStore(postgres_dsn) as ledger:
        await ledger.take_over(epoch)
        await ledger.flush(
            epoch,
            changes.Batch(
                batch_id="three",
                submits=tuple(map(submit, (1, 2, 3))),
                allocations=(give(1), give(2, "n2"), give(3, "n3")),
            ),
        )
        async with psycopg_connection(postgres_dsn) as hand:
            await hand.execute("UPDATE job SET state = 'FAILED', end_time = now() WHERE job_id = %s", [_id(1)])
            await hand.execute("DELETE FROM resource_allocation WHERE job_id = %s", [_id(2)])
            await hand.execute("UPDATE node_capacity SET used_cpus = 5 WHERE node = 'n3'")
        found = {(each.rule, each.subject) for each in (await ledger.audit()).findings}

        assert found == {
            ("ENDED_UNRELEASED", _id(1)),
            ("RELEASED_UNENDED", _id(2)),
            ("COUNTER_DIFFERS", "n2"),
            ("COUNTER_DIFFERS", "n3"),
        }
        assert await ledger.release_ended(epoch) == 1
        assert await ledger.release_ended(epoch) == 0
        assert "ENDED_UNRELEASED" not in {each.rule for each in (await ledger.audit()).findings}
        with pytest.raises(errors.StaleEpoch):
            async with psycopg_connection(postgres_dsn) as hand:
                await hand.execute(
                    "UPDATE job SET state = 'FAILED', end_time = now() WHERE job_id = %s", [_id(3)]
                )
            await ledger.release_ended(epochs.Epoch(1, 99, 7))


async def test_the_check_of_the_counter_is_the_last_word_whoever_writes(postgres_dsn: str) -> None:
    await prepared(postgres_dsn)
    async with psycopg_connection(postgres_dsn) as hand:
        with pytest.raises(psycopg.errors.CheckViolation, match="node_capacity_cpus_are_not_exceeded"):
            await hand.execute("UPDATE node_capacity SET used_cpus = 9 WHERE node = 'n1'")


async def test_sessions_that_are_named_much_as_a_flushers_are_left_alone(postgres_dsn: str) -> None:
    await prepared(postgres_dsn)
    # No epoch; one that is no number that Postgres knows; a later one.
    names = ["leasehold-jobs 1.x", f"leasehold-jobs 1.{'9' * 30}", "leasehold-jobs 1.3"]
    async with contextlib.AsyncExitStack() as stack:
        others = [await stack.enter_async_context(psycopg_connection(postgres_dsn, name)) for name in names]
        earlier = await stack.enter_async_context(psycopg_connection(postgres_dsn, "leasehold-jobs 1.1"))
        ledger = await stack.enter_async_context(job_store.PostgresJobStore(postgres_dsn))
        await ledger.take_over(epochs.Epoch(1, 2, 7))

        assert [await value(other, "SELECT 1") for other in others] == [1, 1, 1]
        with pytest.raises(psycopg.OperationalError):
            await earlier.execute("SELECT 1")


async def test_pages_tell_each_job_once_and_a_deep_one_is_found_by_the_index(postgres_dsn: str) -> None:
    await prepared(postgres_dsn)
    async with (
        psycopg_connection(postgres_dsn) as connection,
        job_store.PostgresJobStore(postgres_dsn, deadline_seconds=20.0) as ledger,
    ):
        # Microseconds that no binary fraction is equal to, and seven jobs of each instant.
        await connection.execute(
            """
            INSERT INTO job (job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state,
                principal, submit_time, end_time)
            SELECT gen_random_uuid(), '', 'default', 0, 1, 1, '{}', 'CANCELLED', '',
                '2026-01-01'::timestamptz + (number / 7) * interval '1.000001 s', now()
            FROM generate_series(1, 20000) AS number
            """
        )
        await connection.execute("ANALYZE job")
        told: list[tuple[float, str]] = []
        has_more = True
        while has_more:
            before = told[-1] if told else None
            page = await ledger.list_jobs(job_port.JobFilter(), page_size=1000, before=before)
            told += [(job.submit_time_seconds, job.job_id) for job in page.items]
            has_more = page.has_more
        assert len(told) == 20_000 and told == sorted(set(told), reverse=True)

        parameters = dict.fromkeys(("job_id", "states", "has_ended", "queue", "node"))
        deep = {"before_time": told[-500][0], "before_id": told[-500][1], "limit": 100}
        statement = b"EXPLAIN " + queries.load("job_read.sql")["list_jobs"]
        explained = await connection.execute(statement, {**parameters, **deep}, prepare=False)
        plan = "\n".join(str(row[0]) for row in await explained.fetchall())
        assert "using job_newest" in plan and "Index Cond: (ROW(submit_time, job_id) <" in plan, plan


READ_IN_ALL = """
SELECT t.seq_tup_read, sum(i.idx_tup_read)::bigint, sum(i.idx_scan)::bigint
FROM pg_stat_user_tables AS t
JOIN pg_stat_user_indexes AS i USING (relid)
WHERE t.relname = 'job'
GROUP BY 1
"""


async def test_a_list_that_nothing_matches_does_not_go_through_the_history(postgres_dsn: str) -> None:
    await prepared(postgres_dsn)
    nothing = [
        job_port.JobFilter(states=frozenset({model.JobState.PENDING})),
        job_port.JobFilter(states=frozenset({model.JobState.PENDING, model.JobState.RUNNING})),
        job_port.JobFilter(states=frozenset({model.JobState.FAILED})),
        job_port.JobFilter(states=frozenset({model.JobState.FAILED, model.JobState.CANCELLED})),
        job_port.JobFilter(queue="gpu"),
    ]
    async with psycopg_connection(postgres_dsn) as seen:
        await seen.execute(ENDED_LONG_AGO.encode())
        await seen.execute("VACUUM ANALYZE job")
        before = (await (await seen.execute(READ_IN_ALL.encode())).fetchall())[0]
        async with job_store.PostgresJobStore(postgres_dsn) as ledger:
            for chosen in nothing:
                assert (await ledger.list_jobs(chosen, page_size=100, before=None)).items == ()

        async def told() -> tuple[int, ...]:
            await seen.execute("SELECT pg_stat_clear_snapshot()")
            after = (await (await seen.execute(READ_IN_ALL.encode())).fetchall())[0]
            return tuple(late - early for late, early in zip(after, before, strict=True))

        async def is_told() -> bool:
            read, found, scans = await told()
            return read + found + scans >= len(nothing)

        await until(is_told)
        read, found, _ = await told()
    assert read + found < 100


@pytest.mark.parametrize("places", [[7], [0, 19], []])
async def test_which_jobs_of_a_request_postgres_refuses_is_told_and_nothing_of_the_request_is_kept(
    postgres_dsn: str, places: list[int]
) -> None:
    epoch = await prepared(postgres_dsn)
    submits = [submit(number) for number in range(1, 22)]
    other = submits[20].job.job_id
    for place in places:
        # Not a time that Postgres knows.
        job = dataclasses.replace(submits[place].job, submit_time_seconds=float("nan"))
        submits[place] = changes.Submit(job=job)
    answer = changes.KeepAnswer(
        key=changes.RequestKey("tests", "request-1", 1),
        # Without a poisonous job the answer itself is what Postgres refuses.
        payload_sha256=b"a" * (32 if places else 31),
        answer={},
        job_ids=tuple(each.job.job_id for each in submits[:20]),
    )
    async with job_store.PostgresJobStore(postgres_dsn) as ledger:
        await ledger.take_over(epoch)
        batch = changes.Batch(batch_id="b", submits=tuple(submits), answers=(answer,))
        result = await ledger.flush(epoch, batch)

        expected = [Verdict.POISON if place in places or not places else Verdict.STALE for place in range(20)]
        assert list(result.submits) == [*expected, Verdict.APPLIED]
        assert [job.job_id for job in (await ledger.reload(epoch)).jobs] == [other]
        assert await ledger.kept_answers([answer.key]) == {}
        assert await ledger.was_flushed(epoch, "b")


ENDED_LONG_AGO = """
INSERT INTO job (
    job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state, principal, submit_time,
    end_time
)
SELECT gen_random_uuid(), '', 'default', 0, 1, 1, '{}', 'COMPLETED', '', now(), now()
FROM generate_series(1, 5000)
"""
READ_OF_JOBS = """
SELECT t.idx_tup_fetch, t.seq_tup_read, i.idx_tup_read AS live_read
FROM pg_stat_user_tables AS t
JOIN pg_stat_user_indexes AS i USING (relname)
WHERE t.relname = 'job' AND i.indexrelname = 'job_live'
"""


@pytest.mark.parametrize("is_aged", [False, True])
async def test_a_batch_finds_its_jobs_by_id_in_a_new_ledger_and_beside_a_long_history(
    postgres_dsn: str, is_aged: bool
) -> None:
    epoch = await prepared(postgres_dsn)
    async with psycopg_connection(postgres_dsn) as seen:
        if is_aged:
            await seen.execute(ENDED_LONG_AGO.encode())
            await seen.execute("ANALYZE job")
        before = (await (await seen.execute(READ_OF_JOBS.encode())).fetchall())[0]
        async with job_store.PostgresJobStore(postgres_dsn) as ledger:
            await ledger.take_over(epoch)
            for first in range(1, 200, 5):
                numbers = range(first, first + 5)
                ends = tuple(
                    changes.EndAttempt(
                        ref=model.AttemptRef(submit(number).job.job_id, 1),
                        outcome=model.Outcome(cause=model.EndCause.SUCCEEDED, exit_code=0),
                        next_state=model.JobState.COMPLETED,
                        is_failure=False,
                    )
                    for number in numbers
                )
                submits = tuple(submit(number) for number in numbers)
                allocations = tuple(give(number) for number in numbers)
                await ledger.flush(epoch, changes.Batch(batch_id=f"s{first}", submits=submits))
                await ledger.flush(epoch, changes.Batch(batch_id=f"a{first}", allocations=allocations))
                result = await ledger.flush(epoch, changes.Batch(batch_id=f"e{first}", ends=ends))
                assert set(result.ends) == {Verdict.APPLIED}

        # A session tells what it has read as it ends.
        async def is_told() -> bool:
            await seen.execute("SELECT pg_stat_clear_snapshot()")
            told = (await (await seen.execute(READ_OF_JOBS.encode())).fetchall())[0]
            return bool(told[0] + told[1] + told[2] - sum(before) >= 2 * 200)

        await until(is_told)
        after = (await (await seen.execute(READ_OF_JOBS.encode())).fetchall())[0]
    assert (after[1] - before[1], after[2] - before[2]) == (0, 0)


async def test_a_restart_of_postgres_loses_nothing_and_the_store_recovers_by_itself(
    own_postgres: devstack.PostgresServer,
) -> None:
    epoch = await prepared(own_postgres.dsn)
    async with job_store.PostgresJobStore(own_postgres.dsn) as ledger:
        await ledger.take_over(epoch)
        await ledger.flush(epoch, changes.Batch(batch_id="1", submits=(submit(1),), allocations=(give(1),)))
        await asyncio.to_thread(own_postgres.kill)
        with pytest.raises(errors.PostgresUnavailable) as caught:
            await ledger.flush(epoch, changes.Batch(batch_id="2", submits=(submit(2),)))
        assert caught.value.retry_after_seconds
        await asyncio.to_thread(own_postgres.start)

        async def is_back() -> bool:
            with contextlib.suppress(errors.PostgresUnavailable):
                await ledger.flush(epoch, changes.Batch(batch_id="3", submits=(submit(3),)))
                return True
            return False

        await until(is_back)
        assert {job.job_id for job in (await ledger.reload(epoch)).jobs} == {_id(1), _id(3)}


async def test_a_long_reader_of_the_ledger_does_not_keep_a_leader_from_making_partitions(
    postgres_dsn: str,
) -> None:
    async with store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as schema:
        await schema.migrate()
    async with (
        psycopg_connection(postgres_dsn) as reader,
        job_store.PostgresJobStore(postgres_dsn) as ledger,
        reader.transaction(),
    ):
        assert await value(reader, "SELECT count(*) FROM resource_allocation") == 0
        assert (await ledger.take_over(epochs.Epoch(1, 1, 7))).jobs == ()


async def test_days_past_retention_are_dropped_with_their_jobs_and_live_rows_stay(postgres_dsn: str) -> None:
    epoch = await prepared(postgres_dsn)
    async with job_store.PostgresJobStore(postgres_dsn, deadline_seconds=20.0) as ledger:
        await ledger.take_over(epoch)
        await ledger.flush(
            epoch,
            changes.Batch(
                batch_id="two",
                submits=(submit(1), submit(2)),
                allocations=(give(1), give(2)),
            ),
        )
        async with psycopg_connection(postgres_dsn) as hand:
            # As if it had been released, and had ended, twenty days ago.
            await hand.execute(
                "CREATE TABLE resource_allocation_released_20200102 PARTITION OF resource_allocation_released "
                "FOR VALUES FROM ('2020-01-02 00:00:00+00') TO ('2020-01-03 00:00:00+00')"
            )
            await hand.execute(
                "UPDATE resource_allocation SET released = true, release_seq = 9, "
                "released_time = '2020-01-02 12:00Z' WHERE job_id = %s",
                [_id(1)],
            )
            await hand.execute(
                "UPDATE job SET state = 'COMPLETED', end_time = '2020-01-02 12:00Z' WHERE job_id = %s", [_id(1)]
            )
        assert list(await ledger.keep_house(epoch)) == []

        with pytest.raises(errors.NotFound):
            await ledger.get_job(_id(1))
        with pytest.raises(errors.NotFound):
            await ledger.get_allocation(model.AttemptRef(_id(1), 1))
        assert (await ledger.get_job(_id(2))).state is model.JobState.RUNNING
        async with psycopg_connection(postgres_dsn) as seen:
            ahead = (
                "SELECT count(*) FROM pg_inherits WHERE inhparent = 'resource_allocation_released'::regclass"
            )
            assert await value(seen, ahead) == 8


def _id(number: int) -> str:
    return submit(number).job.job_id


@contextlib.asynccontextmanager
async def psycopg_connection(
    dsn: str, name: str = "tests"
) -> AsyncIterator[psycopg.AsyncConnection[tuple[int, ...]]]:
    connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True, application_name=name)
    async with connection:
        yield connection


async def value(connection: psycopg.AsyncConnection[tuple[int, ...]], query: str) -> int:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None
    return row[0]


class Cutter:
    """A relay before Postgres that cuts the connection of the first COMMIT: once it has passed, or before."""

    def __init__(self, dsn: str, *, passes_commit: bool) -> None:
        self.is_armed = False
        self.has_cut = False
        self._passes_commit = passes_commit
        self._target = urllib.parse.urlsplit(dsn)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Cutter":
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        user = self._target.netloc.rpartition("@")[0]
        query = urllib.parse.parse_qs(self._target.query)
        query.pop("host", None)
        query.pop("port", None)
        self.dsn = self._target._replace(
            netloc=f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}",
            query=urllib.parse.urlencode(query, doseq=True),
        ).geturl()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        to_reader, to_writer = await self._connected()
        self._writers += [writer, to_writer]
        back = asyncio.create_task(self._copy(to_reader, writer))
        try:
            while data := await reader.read(65_536):
                is_cut = self.is_armed and data.endswith(b"COMMIT\0") and b"BEGIN" not in data
                if is_cut:
                    self.is_armed, self.has_cut = False, True
                    back.cancel()
                    await asyncio.wait([back])
                if not is_cut or self._passes_commit:
                    to_writer.write(data)
                    await to_writer.drain()
                if is_cut and self._passes_commit:
                    await to_reader.read(1)  # committed: the answer is on its way
                if is_cut:
                    break
        except ConnectionError:
            pass
        finally:
            back.cancel()
            writer.close()
            to_writer.close()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        info = psycopg.conninfo.conninfo_to_dict(self._target.geturl())
        host, port = str(info["host"]), str(info.get("port", 5432))
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(port))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()


async def test_a_change_of_the_breaker_is_audited_as_what_it_was(postgres_dsn: str) -> None:
    epoch = await prepared(postgres_dsn)
    async with job_store.PostgresJobStore(postgres_dsn, deadline_seconds=20.0) as ledger:
        await ledger.set_breaker(epoch, is_open=True, cause="6 of 8 holders lapsed within 60 s")
        await ledger.set_breaker(epoch, is_open=False, cause="the rack burnt", actor="alice")
    async with store.PostgresStore(postgres_dsn, deadline_seconds=20.0) as kept:
        records = (await kept.list_audit(target="jobs")).items

    assert [(each.method, each.actor, each.cause) for each in records] == [
        ("AcknowledgeSilence", "alice", "the rack burnt"),
        ("SetBreaker", "", "6 of 8 holders lapsed within 60 s"),
    ]
