"""Submits over gRPC, with a real allocator and synchronous_commit on: in batches, and one by one.

Batches: the client library's `submit_many`, from specs to the last verdict, against the same jobs through two
others, on the same server in databases of their own: a bare unnest insert of the same rows by hand (no fence,
no checks, no first answers kept), and `batch_defer` of procrastinate. All take a thousand jobs a transaction.

One by one: 64 callers that each submit a job under a request id and wait for it to be durable, against a bare
grpc.aio echo of messages of the same sizes.

The sides alternate; the median of the rounds' ratios counts. No node is known, so that nothing is placed
meanwhile: what placement takes is measured by `bench_jobs_flush`.
"""

import asyncio
import itertools
import json
import logging
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
import harness
import procrastinate
import psycopg
from leasehold import client
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc as wire_grpc
from leasehold.client import clients
from leasehold.core.job import model
from leasehold.postgres import job_rows, store
from leasehold.rpc import job_codec
from psycopg import conninfo, sql

BATCH: Final = 1_000
BATCHES: Final = 10
ROUNDS: Final = 6
SHAPES: Final = 60
CALLERS: Final = 64
CALLING_SECONDS: Final = 3.0
FLOOR_MIN, DEFER_MIN, ECHO_MIN = 0.3, 2.0, 0.4

#: Columns as the flusher writes them.
BY_HAND: Final = """
    INSERT INTO job (
        job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state, principal, submit_time
    )
    SELECT w.job_id, w.name, w.queue, w.priority, w.cpus, w.bytes, w.spec, 'PENDING', w.principal,
        to_timestamp(w.submit_time)
    FROM unnest(
        %(ids)s::uuid[], %(names)s::text[], %(queues)s::text[], %(priorities)s::integer[], %(cpus)s::integer[],
        %(bytes)s::bigint[], %(specs)s::jsonb[], %(principals)s::text[], %(times)s::float8[]
    ) AS w (job_id, name, queue, priority, cpus, bytes, spec, principal, submit_time)
"""


def jobs(count: int) -> list[model.JobSpec]:
    """Jobs of 60 shapes, with a command's parameters of their own."""
    chosen = random.Random(7)
    shapes = [(chosen.randint(1, 8), chosen.randint(1, 64) / 4) for _ in range(SHAPES)]
    return [
        client.job_spec(
            "encode",
            cpus=cpus,
            memory_gb=memory_gb,
            name=f"encode-{number:06d}",
            parameters={"input": f"shard-{number:06d}.tar", "seed": str(number)},
            max_run_seconds=3600.0,
            wait_for_capacity=True,
        )
        for number, (cpus, memory_gb) in zip(range(count), itertools.cycle(shapes), strict=False)
    ]


def _chunks(specs: Sequence[model.JobSpec]) -> Iterator[Sequence[model.JobSpec]]:
    for start in range(0, len(specs), BATCH):
        yield specs[start : start + BATCH]


def _timed(work: Callable[[Sequence[model.JobSpec]], int], specs: Sequence[model.JobSpec]) -> float:
    """Jobs a second."""
    began = time.perf_counter()
    done = work(specs)
    seconds = time.perf_counter() - began
    if done != len(specs):
        raise RuntimeError(f"{done} of {len(specs)} jobs were taken")
    return done / seconds


def _submitted(leasehold: clients.Client, specs: Sequence[model.JobSpec]) -> int:
    return sum(bool(verdict.job_id) for verdict in leasehold.jobs.submit_many(specs))


def _by_hand(connection: psycopg.Connection[Any], specs: Sequence[model.JobSpec]) -> int:
    taken = 0
    for chunk in _chunks(specs):
        columns = {
            "ids": [str(uuid.uuid4()) for _ in chunk],
            "names": [spec.name for spec in chunk],
            "queues": [spec.queue for spec in chunk],
            "priorities": [spec.priority for spec in chunk],
            "cpus": [spec.required.cpus for spec in chunk],
            "bytes": [spec.required.memory_bytes for spec in chunk],
            "specs": [json.dumps(job_rows.spec_document(spec)) for spec in chunk],
            "principals": ["bench"] * len(chunk),
            "times": [time.time()] * len(chunk),
        }
        taken += connection.execute(BY_HAND.encode(), columns).rowcount
    return taken


def _deferred(task: Any, specs: Sequence[model.JobSpec]) -> int:
    taken = 0
    for chunk in _chunks(specs):
        arguments = [
            {
                "name": spec.name,
                "cpus": spec.required.cpus,
                "memory_bytes": spec.required.memory_bytes,
                **job_rows.spec_document(spec),
            }
            for spec in chunk
        ]
        taken += len(task.batch_defer(*arguments))
    return taken


def _database(dsn: str, name: str) -> str:
    """A new database beside the allocator's, on its server."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return conninfo.make_conninfo(dsn, dbname=name)


async def _migrated(dsn: str) -> None:
    async with store.PostgresStore(dsn, deadline_seconds=30.0) as schema:
        await schema.migrate()


def _wait_for_jobs(plane: harness.Plane) -> None:
    """Until the leader has read Postgres and takes jobs, which comes after budgets."""
    with client.connect_blocking(plane.addresses, timeout_seconds=harness.READY_SECONDS) as leasehold:
        leasehold.jobs.utilization()


def _batches(plane: harness.Plane) -> list[harness.Result]:
    batches, rounds = (2, 2) if harness.is_quick() else (BATCHES, ROUNDS)
    specs = jobs(batches * BATCH)
    floor_dsn = _database(plane.stack.postgres_dsn, "by_hand")
    asyncio.run(_migrated(floor_dsn))
    # Its line for every job deferred would be counted against it.
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    connector = procrastinate.SyncPsycopgConnector(conninfo=_database(plane.stack.postgres_dsn, "deferred"))
    app = procrastinate.App(connector=connector)
    task = app.task(queue="default", name="encode")(print)
    rates: dict[str, list[float]] = {"ours": [], "floor": [], "deferred": []}
    with (
        client.connect_blocking(plane.addresses) as leasehold,
        psycopg.connect(floor_dsn, autocommit=True) as hand,
        app.open(),
    ):
        app.schema_manager.apply_schema()
        sides: dict[str, Callable[[Sequence[model.JobSpec]], int]] = {
            "ours": lambda chosen: _submitted(leasehold, chosen),
            "floor": lambda chosen: _by_hand(hand, chosen),
            "deferred": lambda chosen: _deferred(task, chosen),
        }
        for number in range(rounds + 1):
            for name, work in sides.items():
                rate = _timed(work, specs)
                # The first round warms up connections and plans.
                if number:
                    rates[name].append(rate)
    return [
        _judged("a bare unnest insert", rates["ours"], rates["floor"], FLOOR_MIN),
        _judged("batch_defer of procrastinate", rates["ours"], rates["deferred"], DEFER_MIN),
    ]


def _judged(rival: str, ours: Sequence[float], theirs: Sequence[float], least: float) -> harness.Result:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    ratio = harness.median(ratios)
    return harness.Result(
        f"jobs: batch submit over gRPC against {rival}",
        ratio,
        "ratio" if least < 1 else "times",
        f">= {least:g}",
        ratio >= least,
        {
            "submits_per_second": round(harness.median(ours)),
            "rival_per_second": round(harness.median(theirs)),
            "ratios": [round(value, 2) for value in ratios],
        },
    )


async def _called(address: str, specs: Sequence[Any], seconds: float, *, is_echo: bool) -> float:
    """Answers a second to 64 callers on one connection."""
    answered = 0
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any
        if is_echo:
            call = channel.unary_unary(
                "/bench.Echo/Submit",
                request_serializer=wire.SubmitJobRequest.SerializeToString,
                response_deserializer=wire.SubmitJobResponse.FromString,
            )
        else:
            call = wire_grpc.JobServiceStub(channel).SubmitJob
        stop_at = time.monotonic() + seconds

        async def run(number: int) -> None:
            nonlocal answered
            for spec in itertools.cycle(specs[number::CALLERS]):
                if time.monotonic() >= stop_at:
                    return
                answer = await call(wire.SubmitJobRequest(spec=spec, request_id=uuid.uuid4().hex))
                if not answer.job.job_id:
                    raise RuntimeError("a submit was answered with no job")
                answered += 1

        began = time.monotonic()
        await asyncio.gather(*(run(number) for number in range(CALLERS)))
    return answered / (time.monotonic() - began)


def _one_by_one(plane: harness.Plane, echo: str) -> harness.Result:
    specs = [job_codec.encode_spec(spec) for spec in jobs(CALLERS * 10)]
    rounds, seconds = (2, 0.5) if harness.is_quick() else (ROUNDS, CALLING_SECONDS)
    rates, echoes = [], []
    for number in range(rounds + 1):
        echoed = asyncio.run(_called(echo, specs, seconds, is_echo=True))
        rate = asyncio.run(_called(plane.addresses[0], specs, seconds, is_echo=False))
        if number:
            echoes.append(echoed)
            rates.append(rate)
    ratios = [rate / echoed for rate, echoed in zip(rates, echoes, strict=True)]
    ratio = harness.median(ratios)
    return harness.Result(
        f"jobs: unary submits, {CALLERS} in flight / bare echo",
        ratio,
        "ratio",
        f">= {ECHO_MIN:g}",
        ratio >= ECHO_MIN,
        {
            "submits_per_second": round(harness.median(rates)),
            "echoes_per_second": round(harness.median(echoes)),
            "ratios": [round(value, 2) for value in ratios],
        },
    )


def run() -> list[harness.Result]:
    """The rows of the table."""
    with harness.control_plane() as plane, harness.child_program("echo_server") as (_, port):
        _wait_for_jobs(plane)
        return [_one_by_one(plane, f"127.0.0.1:{port}"), *_batches(plane)]


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
