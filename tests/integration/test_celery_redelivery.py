"""A task that kills its worker each time is put away; one that is only interrupted never is."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from allocator_kit import until
from celery.result import AsyncResult
from celery_scene import CeleryScene
from fixtures_broker import BrokerServer
from leasehold.client import celery as leasehold_celery
from leasehold.devstack import ports


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


def _starts(scene: CeleryScene, task_id: str) -> str | None:
    with scene.broker.client() as client:
        found: Any = client.get(f"leasehold:starts:{task_id}")
        return found if found is None else str(found)


async def test_a_poison_task_stops_after_its_cap_and_can_be_revived(scene: CeleryScene) -> None:
    scene.settings["result_backend"] = scene.broker.url
    task_id = scene.submit("poison", "p")
    worker = await scene.start()

    await until(lambda: "task_quarantined" in worker.log(), f"it is put away\n{worker.log()}", seconds=40)

    assert scene.count("started", "p") == 3, "once, and redeliveries_max = 2 times again"
    await until(lambda: scene.unacknowledged() == 0, "the message is rejected")
    assert (scene.queued(), _starts(scene, task_id)) == (0, None)
    with scene.broker.client() as client:
        assert client.llen("leasehold:dead:work") == 1
    with celery.Celery(
        "reader", broker=scene.broker.url, backend=scene.broker.url, set_as_current=False
    ) as app:
        result = AsyncResult(task_id, app=app)
        await until(result.ready, "its failure is told")
        assert type(result.result).__name__ == "WorkerLostError"
        assert "3 workers were lost while they ran it" in str(result.result)

        # The worker goes on, and a dead letter that is put back is counted anew.
        scene.submit("work", "a")
        await scene.until_count("started", "a")
        scene.open("a")
        await scene.until_count("completed", "a")
        assert leasehold_celery.revive(app, "work") == 1
        await scene.until_count("started", "p", 4)
        assert leasehold_celery.revive(app, "work") == 0


async def test_a_task_that_is_interrupted_in_order_is_never_put_away(scene: CeleryScene) -> None:
    scene.settings["worker_soft_shutdown_timeout"] = 0.01
    task_id = scene.submit("work", "a")
    for number in range(1, 4):
        worker = await scene.start()
        await scene.until_count("started", "a", number)
        await until(lambda: _starts(scene, task_id) == "1", "its start is counted")
        worker.send("QUIT")
        await worker.ended()
        assert _starts(scene, task_id) == "0", "it was given back"

    await scene.start()
    await scene.until_count("started", "a", 4)
    scene.open("a")
    await scene.until_count("completed", "a")
    await until(lambda: _starts(scene, task_id) is None, "it is over")


async def test_a_killed_main_process_counts_as_well(scene: CeleryScene) -> None:
    task_id = scene.submit("work", "a")
    worker = await scene.start()
    await scene.until_count("started", "a")
    await until(lambda: _starts(scene, task_id) == "1", "its start is counted")

    worker.send("KILL")
    await worker.ended()

    assert _starts(scene, task_id) == "1"


async def test_where_starts_cannot_be_counted_tasks_run_nevertheless(scene: CeleryScene) -> None:
    away = f"redis://127.0.0.1:{ports.free_port()}/0"
    scene.submit("work", "a")
    worker = await scene.start(TASKS_REDELIVERY_URL=away)
    await scene.until_count("started", "a")
    (child,) = worker.children
    os.kill(child, 9)
    await scene.until_count("started", "a", 2)
    scene.open("a")

    await scene.until_count("completed", "a")
    assert worker.log().count("redeliveries_uncounted") == 1
