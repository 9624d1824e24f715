"""Batches of jobs on their way to Postgres: one at a time, no timer, and one whose answer never comes."""

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from leasehold.allocator import job_flusher, job_gauges
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, effects, model
from leasehold.core.placement import model as placement
from leasehold.observe import metrics
from leasehold.postgres import job_memory

EPOCH = epochs.Epoch(1, 7, 1)


def batch(name: str) -> changes.Batch:
    return changes.Batch(
        batch_id=name, queues=(changes.PutQueue(queue=placement.Queue(name=name), actor="test"),)
    )


class Machine:
    """Gives out what a test puts in line, and keeps what it was told."""

    def __init__(self) -> None:
        self.line: list[changes.Batch] = []
        self.told: list[Any] = []
        self.is_in_flight = False
        self.asked_count = 0

    def take_batch(self, now: float, wall: float) -> changes.Batch | None:
        if self.is_in_flight or not self.line:
            return None
        self.is_in_flight = True
        self.asked_count = 0
        return self.line.pop(0)

    def batch_done(self, now: float, wall: float, result: changes.BatchResult) -> None:
        assert self.is_in_flight
        self.is_in_flight = False
        self.told.append(("done", result.queues))

    def batch_lost(self, now: float) -> None:
        self.told.append("lost")

    def breaker_saved(self, now: float, saved: effects.SaveBreaker) -> None:
        self.told.append(("saved", saved.cause))

    def prepare(self, now: float, wall: float, snapshot: changes.Snapshot) -> list[str]:
        return sorted(queue.name for queue in snapshot.queues)

    def reloaded(self, now: float, loaded: list[str], was_committed: bool) -> None:
        self.is_in_flight = False
        self.told.append(("reloaded", was_committed, loaded))


class Store(job_memory.MemoryJobStore):
    """Loses connections before or after a commit, as a test says, and stays away for so many calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: str = ""
        self.away = 0
        self.flushed: list[str] = []
        self.may_commit = asyncio.Event()
        self.may_commit.set()
        self.breakers: list[tuple[bool, str]] = []

    async def flush(self, epoch: epochs.Epoch, batch: changes.Batch) -> changes.BatchResult:
        await self.may_commit.wait()
        self.flushed.append(batch.batch_id)
        fails, self.fails = self.fails, ""
        if fails == "before":
            raise errors.PostgresUnavailable("cut before the commit")
        result = await super().flush(epoch, batch)
        if fails == "after":
            raise errors.PostgresUnavailable("cut at the commit")
        return result

    async def was_flushed(self, epoch: epochs.Epoch, batch_id: str) -> bool:
        if self.away:
            self.away -= 1
            raise errors.PostgresUnavailable("away")
        return await super().was_flushed(epoch, batch_id)

    async def set_breaker(self, epoch: epochs.Epoch, *, is_open: bool, cause: str, actor: str = "") -> None:
        self.breakers.append((is_open, actor))
        await super().set_breaker(epoch, is_open=is_open, cause=cause, actor=actor)


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job_flusher, "RETRY_SECONDS", 0.0)
        self.machine, self.store = Machine(), Store()
        self.registry = metrics.Registry()
        self.flusher = job_flusher.JobFlusher(
            self.store,
            EPOCH,
            now=lambda: 1.0,
            wall=lambda: 1_800_000_000.0,
            follow_up=lambda: None,
            metrics=job_gauges.FlushMetrics(self.registry),
        )

    def put(self, *names: str) -> None:
        self.machine.line.extend(batch(name) for name in names)
        self.flusher.wake()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """A flusher that runs, after a takeover."""
    made = Scene(monkeypatch)
    await made.flusher.take_over()
    running = asyncio.create_task(made.flusher.run(made.machine))  # type: ignore[arg-type]
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError, errors.LeaseholdError):
        await running


APPLIED = (changes.Verdict.APPLIED,)


async def test_batches_follow_each_other_at_once_and_never_overlap(scene: Scene) -> None:
    scene.store.may_commit.clear()
    scene.put("a", "b", "c")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert scene.machine.is_in_flight and scene.machine.told == []
    scene.store.may_commit.set()
    await _until(lambda: len(scene.machine.told) == 3)
    assert scene.store.flushed == ["a", "b", "c"]
    assert scene.machine.told == [("done", APPLIED)] * 3
    text = scene.registry.expose()
    assert "leasehold_job_flush_changes_count 3" in text
    assert "leasehold_job_flushes_lost_total 0" in text


async def submits_come(scene: Scene, count: int, *, turns: int) -> list[int]:
    """So many submits, with turns of the loop between them; how many batches there were after each."""
    batches = []
    scene.put("a")
    for number in range(1, count + 1):
        scene.machine.asked_count = number
        batches.append(len(scene.store.flushed))
        for _ in range(turns):
            await asyncio.sleep(0)
    return batches


async def test_submits_in_the_same_breath_are_one_batch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_flusher, "GATHER_SECONDS_MAX", 60.0)

    assert await submits_come(scene, 20, turns=job_flusher.QUIET_TURNS // 2) == [0] * 20
    await _until(lambda: scene.store.flushed == ["a"])


@pytest.mark.parametrize("asked", [0, changes.CHANGES_MAX])
async def test_nothing_is_waited_for_without_submits_or_with_a_full_batch(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    monkeypatch.setattr(job_flusher, "QUIET_TURNS", 1_000_000_000)
    monkeypatch.setattr(job_flusher, "GATHER_SECONDS_MAX", 60.0)
    scene.machine.asked_count = asked
    scene.put("a")

    await _until(lambda: scene.store.flushed == ["a"])


async def test_submits_without_end_are_not_waited_for_without_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_flusher, "GATHER_SECONDS_MAX", 0.0)

    assert (await submits_come(scene, 10, turns=2))[-1] == 1


@pytest.mark.parametrize(("cut", "was_committed"), [("before", False), ("after", True)])
async def test_a_batch_without_an_answer_is_looked_up_before_anything_else_happens(
    scene: Scene, cut: str, was_committed: bool
) -> None:
    scene.store.fails, scene.store.away = cut, 3
    scene.put("a", "b")
    await _until(lambda: len(scene.machine.told) == 3)
    known = ["a", "default"] if was_committed else ["default"]
    assert scene.machine.told == ["lost", ("reloaded", was_committed, known), ("done", APPLIED)]
    assert not scene.flusher.is_postgres_away
    assert "leasehold_job_flushes_lost_total 1" in scene.registry.expose()


async def test_while_postgres_is_away_that_is_known_and_nothing_is_taken(scene: Scene) -> None:
    scene.store.fails, scene.store.away = "before", 10**9
    scene.put("a", "b")
    await _until(lambda: scene.flusher.is_postgres_away)
    for _ in range(20):
        await asyncio.sleep(0)
    assert scene.store.flushed == ["a"]
    assert scene.machine.told == ["lost"]
    scene.store.away = 0
    await _until(lambda: scene.store.flushed == ["a", "b"])
    await _until(lambda: not scene.flusher.is_postgres_away)


async def test_each_change_of_the_breaker_is_kept_before_the_next_batch(scene: Scene) -> None:
    scene.store.may_commit.clear()
    scene.put("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    scene.flusher.save_breaker(effects.SaveBreaker(True, "5 of 6 lapsed"))
    scene.flusher.save_breaker(effects.SaveBreaker(False, "the rack burnt", "someone"))
    scene.put("b")
    scene.store.may_commit.set()
    await _until(lambda: len(scene.machine.told) == 4)
    assert scene.store.breakers == [(True, ""), (False, "someone")]
    saved = [("saved", "5 of 6 lapsed"), ("saved", "the rack burnt")]
    assert scene.machine.told == [("done", APPLIED), *saved, ("done", APPLIED)]
    assert not (await scene.store.reload(EPOCH)).is_breaker_open


async def test_rows_that_were_changed_by_hand_are_read_between_two_batches(scene: Scene) -> None:
    scene.put("a")
    await _until(lambda: len(scene.machine.told) == 1)
    scene.flusher.read_anew()
    scene.put("b")
    await _until(lambda: len(scene.machine.told) == 3)
    assert scene.machine.told[1] == ("reloaded", False, ["a", "default"])


async def test_a_later_leader_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Scene(monkeypatch)
    await made.flusher.take_over()
    await made.store.take_over(epochs.Epoch(1, 8, 1))
    made.put("a")
    with pytest.raises(errors.StaleEpoch):
        async with asyncio.timeout(5):
            await made.flusher.run(made.machine)  # type: ignore[arg-type]
    assert made.machine.told == []


async def test_a_placement_is_timed_from_what_was_heard_before_the_release_that_made_room(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(job_flusher, "time", types.SimpleNamespace(perf_counter=lambda: now))
    scene.store.may_commit.clear()
    scene.put("the release")
    await _until(lambda: scene.machine.is_in_flight)
    # Heard of later, so not what made room.
    now = 101.0
    scene.flusher.wake()
    ref = model.AttemptRef("00000000-0000-0000-0000-000000000001", 1)
    allocation = changes.Allocate(
        ref=ref, node="n", boot_id="b", held=placement.Resources(1, 1), queue="default"
    )
    scene.machine.line.append(changes.Batch(batch_id="what follows", allocations=(allocation,)))
    now = 104.0
    scene.store.may_commit.set()
    await _until(lambda: len(scene.machine.told) == 2)

    text = scene.registry.expose()
    assert "leasehold_job_placement_seconds_sum 4\n" in text
    assert "leasehold_job_placement_seconds_count 1\n" in text
