"""Allocations by the flusher, placement on a thousand nodes included, against SQL written by hand.

The floor is the same rows at the same nodes, a thousand a transaction, in three plain unnest statements: no
fence, no locks in order, no counter deltas worked out, no placement. The rivals give one job an allocation in
each transaction, by one statement that is planned once: on one connection, and on 32 of them in two processes
(in an order in which neighbours are on other nodes, so that they seldom wait for each other's rows).

All sides alternate on one server with synchronous_commit on. Of the batches, and of the rounds of the rivals,
the best quarter of each side counts: what a neighbour on the machine takes only ever makes one slower. The
median of the rounds' ratios, all batches of both sides counted, is told beside it.
"""

import asyncio
import gc
import itertools
import multiprocessing
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import psycopg
from leasehold import devstack
from leasehold.core import epoch as epochs
from leasehold.core.job import changes, model
from leasehold.core.placement import model as placement
from leasehold.core.placement import scheduler
from leasehold.postgres import job_store, store

NODES = 1_000
NODE_CPUS = 64
GIB = 2**30
BATCH = 1_000
BATCHES = 12
ROUNDS = 6
RIVAL_JOBS = {1: 1_500, 32: 6_000}
PROCESSES = 2
EPOCH = epochs.Epoch(1, 1, 1)
DEADLINE_SECONDS = 30.0
TARGETS = {0: 0.5, 1: 10.0, 32: 2.5}

BY_HAND = (
    """
    UPDATE job AS j SET state = 'RUNNING', attempt = 1, start_time = now()
    FROM unnest(%(jobs)s::uuid[]) AS w (job_id)
    WHERE j.job_id = w.job_id
    """,
    """
    INSERT INTO resource_allocation (
        job_id, attempt, node, boot_id, queue, allocated_cpus, allocated_memory_bytes, allocated_time,
        alloc_seq, epoch
    )
    SELECT w.job_id, 1, w.node, 'boot-1', 'default', w.cpus, w.bytes, now(), 1, '1.1'
    FROM unnest(%(jobs)s::uuid[], %(nodes)s::text[], %(cpus)s::integer[], %(bytes)s::bigint[])
        AS w (job_id, node, cpus, bytes)
    """,
    """
    UPDATE node_capacity AS n
    SET used_cpus = n.used_cpus + w.cpus, used_memory_bytes = n.used_memory_bytes + w.bytes
    FROM (
        SELECT node, sum(cpus) AS cpus, sum(bytes) AS bytes
        FROM unnest(%(nodes)s::text[], %(cpus)s::integer[], %(bytes)s::bigint[]) AS w (node, cpus, bytes)
        GROUP BY node
    ) AS w
    WHERE n.node = w.node
    """,
)

ONE_JOB = """
WITH counted AS (
    UPDATE node_capacity
    SET used_cpus = used_cpus + %(cpus)s, used_memory_bytes = used_memory_bytes + %(bytes)s
    WHERE node = %(node)s AND used_cpus + %(cpus)s <= gated_cpus
        AND used_memory_bytes + %(bytes)s <= gated_memory_bytes
    RETURNING node
), given AS (
    INSERT INTO resource_allocation (
        job_id, attempt, node, boot_id, queue, allocated_cpus, allocated_memory_bytes, allocated_time,
        alloc_seq, epoch
    )
    SELECT %(job)s, 1, node, 'boot-1', 'default', %(cpus)s, %(bytes)s, now(), 1, '1.1' FROM counted
    RETURNING job_id
)
UPDATE job AS j SET state = 'RUNNING', attempt = 1, start_time = now() FROM given AS g
WHERE j.job_id = g.job_id AND j.state = 'PENDING'
"""

AS_BEFORE = (
    "TRUNCATE resource_allocation_live",
    "UPDATE job SET state = 'PENDING', attempt = 0, start_time = NULL WHERE state = 'RUNNING'",
    "UPDATE node_capacity SET used_cpus = 0, used_memory_bytes = 0 WHERE used_cpus > 0",
    "VACUUM job",
    "VACUUM node_capacity",
    "CHECKPOINT",
)


@dataclass(frozen=True, slots=True)
class Given:
    """One allocation."""

    job_id: str
    node: str
    held: placement.Resources


def jobs(count: int) -> list[model.JobRecord]:
    """Jobs in line, of 60 shapes."""
    chosen = random.Random(7)
    return [
        model.JobRecord(
            job_id=str(uuid.UUID(int=chosen.getrandbits(128), version=4)),
            spec=model.JobSpec(
                required=placement.Resources(chosen.randint(1, 4), chosen.randint(1, 15) * GIB // 8)
            ),
            state=model.JobState.PENDING,
            principal="bench",
            submit_time_seconds=1.9e9 + number / 1e3,
        )
        for number in range(count)
    ]


def _nodes() -> list[str]:
    return [f"node-{number:04d}" for number in range(NODES)]


def _scheduler(records: Sequence[model.JobRecord]) -> scheduler.Scheduler:
    """As the leader has it: every node, every job in line."""
    made = scheduler.Scheduler()
    made.put_queue(placement.Queue(name=model.DEFAULT_QUEUE))
    for name in _nodes():
        made.put_node(
            placement.Node(
                name=name,
                total=placement.Resources(NODE_CPUS, NODE_CPUS * GIB),
                used=placement.Resources(0, 0),
                openness=placement.Openness.OPEN,
            )
        )
    for job in records:
        made.add(
            placement.Waiting(
                job_id=job.job_id,
                shape=job.spec.shape,
                queue=job.spec.queue,
                priority=job.spec.priority,
                submit_time_seconds=job.submit_time_seconds,
                max_run_seconds=job.spec.max_run_seconds,
            )
        )
    return made


async def _filled(ledger: job_store.PostgresJobStore, records: Sequence[model.JobRecord]) -> None:
    await ledger.take_over(EPOCH)
    declared = placement.Resources(NODE_CPUS, NODE_CPUS * GIB)
    capacities = tuple(changes.SetCapacity(node=name, boot_id="boot-1", declared=declared) for name in _nodes())
    await ledger.flush(EPOCH, changes.Batch(batch_id="nodes", capacities=capacities))
    for number, chunk in enumerate(_chunks(records)):
        submits = tuple(changes.Submit(job=job) for job in chunk)
        await ledger.flush(EPOCH, changes.Batch(batch_id=f"submit-{number}", submits=submits))


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


@dataclass(slots=True)
class Flushed:
    """What the flusher did in one round."""

    given: list[Given]
    batch_seconds: list[float]
    planning_seconds: float = 0.0


async def _flushed(ledger: job_store.PostgresJobStore, records: Sequence[model.JobRecord]) -> Flushed:
    """Plan, commit, tell the scheduler; again, until nothing more is placed."""
    line, by_id = _scheduler(records), {job.job_id: job for job in records}
    gc.collect()
    done = Flushed(given=[], batch_seconds=[])
    for number in itertools.count():
        began = at = time.perf_counter()
        plan = line.plan(0.0, most=BATCH)
        if not plan:
            return done
        done.planning_seconds += time.perf_counter() - at
        allocations = tuple(
            changes.Allocate(
                ref=model.AttemptRef(job_id, 1),
                node=node,
                boot_id="boot-1",
                held=by_id[job_id].spec.required,
                queue=model.DEFAULT_QUEUE,
            )
            for job_id, node in plan
        )
        result = await ledger.flush(EPOCH, changes.Batch(batch_id=f"give-{number}", allocations=allocations))
        if set(result.allocations) != {changes.Verdict.APPLIED}:
            raise RuntimeError("the ledger refused what was planned")
        at = time.perf_counter()
        for each in allocations:
            job_id = each.ref.job_id
            line.started(
                placement.Running(job_id=job_id, node=each.node, queue=each.queue, held=each.held, ends_by=None)
            )
            done.given.append(Given(job_id, each.node, each.held))
        ended = time.perf_counter()
        done.planning_seconds += ended - at
        done.batch_seconds.append(ended - began)
    raise AssertionError("a count has no end")


def _by_hand(connection: psycopg.Connection[Any], given: Sequence[Given]) -> list[float]:
    """Seconds that the floor takes for each batch of the same rows."""
    batch_seconds = []
    for chunk in _chunks(given):
        began = time.perf_counter()
        with connection.transaction():
            columns = {
                "jobs": [each.job_id for each in chunk],
                "nodes": [each.node for each in chunk],
                "cpus": [each.held.cpus for each in chunk],
                "bytes": [each.held.memory_bytes for each in chunk],
            }
            for statement in BY_HAND:
                connection.execute(statement.encode(), columns)
        batch_seconds.append(time.perf_counter() - began)
    return batch_seconds


def _give_alone(dsn: str, given: Sequence[Given], meet: Callable[[], Any]) -> None:
    """One connection's share, a transaction each."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        meet()
        for each in given:
            cpus, memory_bytes = each.held
            values = {"job": each.job_id, "node": each.node, "cpus": cpus, "bytes": memory_bytes}
            if connection.execute(ONE_JOB.encode(), values, prepare=True).rowcount != 1:
                raise RuntimeError("the rival's job was not given")
        meet()


def _rivals(dsn: str, given: Sequence[Given], connections: int, barrier: Any) -> None:
    """A process of the rivals: so many connections, a thread each."""
    threads = [
        threading.Thread(target=_give_alone, args=(dsn, given[number::connections], barrier.wait), daemon=True)
        for number in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _alone(dsn: str, given: Sequence[Given], connections: int) -> float:
    """Seconds that the rivals take, on so many connections together."""
    context = multiprocessing.get_context("spawn")
    processes = min(PROCESSES, connections)
    barrier = context.Barrier(connections + 1, timeout=DEADLINE_SECONDS)
    children = [
        context.Process(
            target=_rivals, args=(dsn, given[number::processes], connections // processes, barrier), daemon=True
        )
        for number in range(processes)
    ]
    for child in children:
        child.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for child in children:
        child.join()
    return seconds


@dataclass(frozen=True, slots=True)
class Round:
    """Allocations a second: of each batch of the flusher and of the floor, and of the rivals by connections."""

    flusher: list[float]
    floor: list[float]
    rivals: dict[int, float]
    planning_part: float


def _undisturbed(rates: Sequence[float]) -> float:
    """The median of the best quarter."""
    return harness.median(sorted(rates)[-max(1, len(rates) // 4) :])


def _mean(rates: Sequence[float]) -> float:
    """Of batches of one size: what they come to together."""
    return statistics.harmonic_mean(rates)


async def _round(
    dsn: str,
    ledger: job_store.PostgresJobStore,
    hand: psycopg.Connection[Any],
    records: Sequence[model.JobRecord],
) -> Round:
    def again() -> None:
        for statement in AS_BEFORE:
            hand.execute(statement.encode())

    again()
    done = await _flushed(ledger, records)
    if len(done.given) != len(records):
        raise RuntimeError(f"{len(done.given)} of {len(records)} jobs were placed")
    again()
    floor = [BATCH / seconds for seconds in _by_hand(hand, done.given)]
    rivals = {}
    shuffled = random.Random(11).sample(done.given, len(done.given))
    for connections, count in RIVAL_JOBS.items():
        again()
        chosen = shuffled[: count // (4 if harness.is_quick() else 1)]
        rivals[connections] = len(chosen) / _alone(dsn, chosen, connections)
    flusher = [BATCH / seconds for seconds in done.batch_seconds]
    return Round(flusher, floor, rivals, done.planning_seconds / sum(done.batch_seconds))


async def _rounds(dsn: str) -> list[Round]:
    """A first round warms up what every leader has warm: plans and catalogues of its one session."""
    batches, rounds = (3, 2) if harness.is_quick() else (BATCHES, ROUNDS)
    records = jobs(batches * BATCH)
    async with store.PostgresStore(dsn, deadline_seconds=DEADLINE_SECONDS) as schema:
        await schema.migrate()
    with psycopg.connect(dsn, autocommit=True) as hand:
        async with job_store.PostgresJobStore(dsn, deadline_seconds=DEADLINE_SECONDS) as ledger:
            await _filled(ledger, records)
            return [await _round(dsn, ledger, hand, records) for _ in range(rounds + 1)][1:]


def _judged(rounds: Sequence[Round], connections: int) -> harness.Result:
    against = {0: "unnest by hand", 1: "a transaction each", 32: "a transaction each on 32 connections"}
    ours = _undisturbed([rate for each in rounds for rate in each.flusher])
    others = [each.floor if connections == 0 else [each.rivals[connections]] for each in rounds]
    theirs = _undisturbed([rate for rates in others for rate in rates])
    ratios = [_mean(each.flusher) / _mean(rates) for each, rates in zip(rounds, others, strict=True)]
    target = TARGETS[connections]
    return harness.Result(
        f"jobs: allocations by the flusher against {against[connections]}",
        ours / theirs,
        "ratio" if connections == 0 else "times",
        f">= {target:g}",
        ours / theirs >= target,
        {
            "flusher_per_second": round(ours),
            "rival_per_second": round(theirs),
            "median_of_ratios": round(harness.median(ratios), 3),
            "placement_part": round(harness.median([each.planning_part for each in rounds]), 2),
        },
    )


def run() -> list[harness.Result]:
    """The rows of the table."""
    with (
        tempfile.TemporaryDirectory(prefix="leasehold-bench-") as folder,
        devstack.PostgresServer(pathlib.Path(folder)) as server,
    ):
        rounds = asyncio.run(_rounds(server.dsn))
    return [_judged(rounds, connections) for connections in TARGETS]


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
