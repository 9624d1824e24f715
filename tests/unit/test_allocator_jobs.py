"""The shell around the machine of jobs, on the in-memory ledger: it rests, answers, and begins anew."""

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from leasehold.allocator import job_flusher, job_gauges, jobs, nodes, records
from leasehold.allocator import reign as reigns
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, machine, model
from leasehold.core.placement import model as placement
from leasehold.etcd import clock as etcd_clock
from leasehold.etcd import memory as etcd_memory
from leasehold.observe import metrics
from leasehold.postgres import job_memory
from leasehold.postgres import memory as postgres_memory
from leasehold.runtime import clock as clocks

EPOCH = epochs.Epoch(1, 10, 5)


class Store(job_memory.MemoryJobStore):
    """Counts flushes, and is away while a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.flushes = 0

    async def flush(self, epoch: epochs.Epoch, batch: changes.Batch) -> changes.BatchResult:
        self._answer()
        self.flushes += 1
        return await super().flush(epoch, batch)

    async def was_flushed(self, epoch: epochs.Epoch, batch_id: str) -> bool:
        self._answer()
        return await super().was_flushed(epoch, batch_id)

    def _answer(self) -> None:
        if self.is_away:
            raise errors.PostgresUnavailable("away", retry_after_seconds=1.0)


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jobs, "FAILED_SECONDS", 0.0)
        monkeypatch.setattr(job_flusher, "RETRY_SECONDS", 0.0)
        etcd = etcd_memory.MemoryCluster(etcd_clock.ManualClock()).connect()
        budgets = postgres_memory.MemoryStore()
        self.store = Store()
        self.reign = reigns.Reign(
            EPOCH,
            etcd,
            records.Keys("/t"),
            budgets,
            clock=clocks.MonotonicClock(),
            boot_clock=clocks.BootClock(),
        )
        self.jobs = jobs.Jobs(
            self.reign,
            self.store,
            nodes.Nodes(self.reign, budgets),
            metrics=job_gauges.FlushMetrics(metrics.Registry()),
        )
        self.is_synchronized = asyncio.Event()

    async def submit(self) -> str:
        spec = model.JobSpec(required=placement.Resources(1, 1), wait_for_capacity=True)
        (verdict,) = await self.jobs.ask(
            lambda core, now, wall: core.submit(
                now,
                wall,
                (spec,),
                principal="alice",
                key=None,
                payload_sha256=b"0" * 32,
                is_all_or_none=True,
            )
        )
        assert verdict.error is None
        return str(verdict.job_id)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    made = Scene(monkeypatch)
    running = asyncio.create_task(made.jobs.run(made.is_synchronized))
    yield made
    made.jobs.close(errors.NotLeader())
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def known(scene: Scene) -> None:
    scene.is_synchronized.set()
    await until(lambda: scene.jobs.machine is not None)


async def test_nothing_is_taken_before_postgres_was_read(scene: Scene) -> None:
    with pytest.raises(errors.PostgresUnavailable) as caught:
        await scene.submit()
    assert caught.value.retry_after_seconds is not None
    await known(scene)
    job_id = await scene.submit()
    assert (await scene.store.get_job(job_id)).state is model.JobState.PENDING


@pytest.mark.parametrize("read", ["restore", "prepare"])
async def test_what_postgres_tells_is_gone_through_while_the_loop_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    plain, has_beaten = getattr(machine.JobMachine, read), threading.Event()
    beaten: list[bool] = []

    def waits_for_the_loop(self: machine.JobMachine, *arguments: Any) -> Any:
        beaten.append(has_beaten.wait(5.0))
        return plain(self, *arguments)

    monkeypatch.setattr(machine.JobMachine, read, waits_for_the_loop)
    scene.is_synchronized.set()
    if read == "prepare":
        await known(scene)
        scene.store.fail_after_commit = errors.PostgresUnavailable("cut at the commit")
        asking = asyncio.create_task(scene.submit())
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.01, has_beaten.set)
    await until(lambda: beaten)
    await known(scene)
    if read == "prepare":
        await asking

    assert beaten == [True]


async def test_with_nothing_to_do_it_rests(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    take = machine.JobMachine.take_batch

    def counted(self: machine.JobMachine, now: float, wall: float) -> changes.Batch | None:
        nonlocal looks
        looks += 1
        # Else a flusher that never comes to rest would hang the test with itself.
        assert looks < 100, "the flusher looks for batches for ever"
        return take(self, now, wall)

    monkeypatch.setattr(machine.JobMachine, "take_batch", counted)
    await known(scene)
    await scene.submit()
    for _ in range(50):
        await asyncio.sleep(0)
    assert looks <= 5


async def test_what_waits_while_a_batch_is_under_way_is_one_batch_more(scene: Scene) -> None:
    await known(scene)
    before = scene.store.flushes
    job_ids = await asyncio.gather(*(scene.submit() for _ in range(100)))
    assert len(set(job_ids)) == 100
    assert scene.store.flushes - before <= 3


async def test_while_postgres_is_away_callers_are_told_at_once_and_later_nothing_is_lost(scene: Scene) -> None:
    await known(scene)
    scene.store.is_away = True
    waiting = asyncio.create_task(scene.submit())
    await until(lambda: scene.jobs.is_postgres_away)
    with pytest.raises(errors.PostgresUnavailable) as caught:
        await scene.submit()
    assert caught.value.retry_after_seconds == 1.0
    scene.store.is_away = False
    job_id = await waiting
    assert (await scene.store.get_job(job_id)).state is model.JobState.PENDING


async def test_a_machine_that_fails_is_begun_anew_and_the_reign_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await known(scene)
    first = await scene.submit()
    broken = scene.jobs.machine
    assert broken is not None

    def fails(*_: Any) -> changes.Batch | None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(broken, "take_batch", fails)
    with pytest.raises(errors.Unavailable):
        await scene.submit()
    await until(lambda: scene.jobs.machine not in (None, broken))
    assert not scene.reign.ending.done()
    assert (await scene.jobs.job(first)).job_id == first
    assert await scene.submit() != first


async def test_a_later_leader_ends_the_reign(scene: Scene) -> None:
    await known(scene)
    await scene.store.take_over(epochs.Epoch(1, 11, 5))
    lost = asyncio.create_task(scene.submit())
    await until(lambda: scene.reign.ending.done())
    with pytest.raises(errors.StaleEpoch):
        scene.reign.ending.result()
    lost.cancel()
    await asyncio.gather(lost, return_exceptions=True)


async def test_everyone_who_waits_is_told_that_the_reign_is_over(scene: Scene) -> None:
    await known(scene)
    job_id = await scene.submit()
    scene.store.is_away = True
    waiting = asyncio.create_task(scene.submit())
    await until(lambda: scene.jobs.is_postgres_away)
    with scene.jobs.watching(job_id) as changed:
        scene.jobs.close(errors.NotLeader("10.0.0.7:7400"))
        assert changed.is_set()
    with pytest.raises(errors.NotLeader):
        await waiting


def test_ids_of_jobs_are_uuids_that_sort_by_their_time() -> None:
    made = [jobs.new_job_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    for job_id in made:
        assert model.checked_job_id(job_id) == job_id
        assert re.fullmatch(r"[0-9a-f-]{14}7[0-9a-f]{3}-[89ab][0-9a-f-]+", job_id)
    assert [job_id[:8] for job_id in made] == sorted(job_id[:8] for job_id in made)
