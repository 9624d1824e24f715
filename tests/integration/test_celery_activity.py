"""What a Celery worker tells the agent: which task runs, in files that are always whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from allocator_kit import until
from celery_scene import CeleryScene
from fixtures_broker import BrokerServer
from leasehold.runtime import identity


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


async def test_a_worker_is_idle_then_busy_with_its_task_then_idle(scene: CeleryScene) -> None:
    worker = await scene.start()
    await until(lambda: worker.main in worker.activity(), "the main process has told that it is ready")
    ready = worker.activity()[worker.main]
    assert ready == {
        "version": 1,
        "pid": worker.main,
        "start_time_ticks": identity.start_time_ticks(worker.main),
        "is_ready": True,
        "tasks": [],
    }
    assert not worker.is_busy()

    task_id = scene.submit("work", "a")
    await scene.until_count("started", "a")
    (child,) = worker.children
    busy = worker.activity()[child]
    (task,) = busy["tasks"]
    assert (task["id"], task["name"], task["queue"]) == (task_id, "celery_tasks.work", "work")
    assert abs(task["since"] - worker.log_path.stat().st_mtime) < 60
    assert busy["start_time_ticks"] == identity.start_time_ticks(child)
    assert worker.is_busy()

    scene.open("a")
    await until(lambda: not worker.is_busy(), "the task is over")
    worker.send("TERM")
    await worker.ended()
    assert worker.main not in worker.activity()


async def test_a_folder_that_cannot_be_written_harms_no_task(scene: CeleryScene) -> None:
    worker = await scene.start(LEASEHOLD_RUN_DIR=str(scene.folder / "no" / "such"))
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    scene.open("a")

    await scene.until_count("completed", "a")
    assert worker.log().count("activity_unwritten") <= 2, "told once by each process"


async def test_a_log_that_was_renamed_is_opened_anew(scene: CeleryScene) -> None:
    worker = await scene.start()
    worker.log_path.rename(worker.log_path.with_suffix(".log.1"))
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    scene.open("a")

    await until(lambda: worker.log_path.exists() and "succeeded" in worker.log(), "both processes log there")
    assert "received" in worker.log()
