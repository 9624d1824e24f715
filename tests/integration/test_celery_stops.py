"""How Celery stops: what the template's stop contract stands on, each with a real worker and broker."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from allocator_kit import until
from celery_scene import CeleryScene
from fixtures_broker import BrokerServer
from leasehold.core.node import model
from leasehold.nodeagent import templates


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


def test_the_template_signals_the_main_process_alone_and_at_once_means_quit() -> None:
    template = templates.builtin()["celery"]
    values = template.values({"app": "a", "queues": "q", "task_time_limit": "600"}, "test")
    contract = templates.contract(template.stop, values)

    assert [(step.signal, step.scope, step.wait_seconds) for step in contract.steps] == [
        ("TERM", model.SignalScope.MAIN, 630.0),
        ("QUIT", model.SignalScope.MAIN, 20.0),
    ]
    assert contract.steps[contract.immediate_step].signal == "QUIT"
    assert contract.visibility_timeout_seconds == 4500.0


async def test_term_to_the_main_process_waits_for_the_task(scene: CeleryScene) -> None:
    worker = await scene.start()
    scene.submit("work", "a")
    scene.submit("work", "b")
    await scene.until_count("started", "a")

    worker.send("TERM")
    await until(lambda: "Warm shutdown" in worker.log(), "the worker has seen TERM")
    scene.open("a")

    assert await worker.ended() == 0
    assert scene.count("completed", "a") == 1
    assert scene.count("started", "b") == 0
    assert (scene.queued(), scene.unacknowledged()) == (1, 0), "b is left to the others"


async def test_quit_to_the_main_process_gives_the_task_back(scene: CeleryScene) -> None:
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")

    worker.send("QUIT")

    await worker.ended()
    assert (scene.queued(), scene.unacknowledged()) == (1, 0)
    await scene.start()
    await scene.until_count("started", "a", 2)
    scene.open("a")
    await scene.until_count("completed", "a")
    assert (scene.count("started", "a"), scene.count("completed", "a")) == (2, 1)


async def test_quit_lets_a_task_end_that_needs_no_longer_than_the_soft_shutdown(scene: CeleryScene) -> None:
    scene.settings["worker_soft_shutdown_timeout"] = 2.0
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")

    worker.send("QUIT")
    await until(lambda: "Soft Shutdown" in worker.log(), "the worker has seen QUIT")
    scene.open("a")

    await worker.ended()
    assert (scene.count("completed", "a"), scene.queued(), scene.unacknowledged()) == (1, 0, 0)


async def test_term_to_the_group_loses_the_task_and_exits_0(scene: CeleryScene) -> None:
    scene.settings["task_reject_on_worker_lost"] = False
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")

    worker.send("TERM", to_group=True)

    assert await worker.ended() == 0
    assert (scene.count("completed", "a"), scene.queued(), scene.unacknowledged()) == (0, 0, 0), "it is lost"


async def test_a_task_whose_process_is_killed_runs_again(scene: CeleryScene) -> None:
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")

    (child,) = worker.children
    os.kill(child, signal.SIGKILL)
    await scene.until_count("started", "a", 2)
    scene.open("a")

    await scene.until_count("completed", "a")
    await until(lambda: not worker.is_busy(), "nothing runs")
    assert child in worker.activity(), "what a killed process had told is known by its PID and start"
    worker.send("TERM")
    assert await worker.ended() == 0
    assert (scene.count("completed", "a"), scene.queued(), scene.unacknowledged()) == (1, 0, 0)


async def test_kill_of_the_main_process_hides_the_task_until_the_visibility_timeout(scene: CeleryScene) -> None:
    scene.settings["broker_transport_options"] = {
        "visibility_timeout": 4,
        "unacked_restore_interval": 0.5,
        "unacked_restore_throttle": 1,
    }
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    taken_at = time.monotonic()

    worker.send("KILL")
    await worker.ended()
    assert (scene.queued(), scene.unacknowledged()) == (0, 1), "it is hidden, not lost"
    await scene.start()
    await scene.until_count("started", "a", 2)
    assert time.monotonic() - taken_at >= 3.5
    scene.open("a")

    await scene.until_count("completed", "a")
    assert (scene.count("started", "a"), scene.count("completed", "a")) == (2, 1)


async def test_a_killed_main_process_takes_its_pool_along(scene: CeleryScene) -> None:
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    (child,) = worker.children
    pidfd = os.pidfd_open(child)
    loop, is_dead = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, is_dead.set)

    worker.send("KILL")

    async with asyncio.timeout(5):
        await is_dead.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)
    assert scene.count("completed", "a") == 0


async def test_tasks_that_wait_for_their_time_are_given_back_by_either_stop(scene: CeleryScene) -> None:
    for signal_name in ("TERM", "QUIT"):
        worker = await scene.start()
        scene.submit("work", "later", countdown=3600)
        await until(lambda: scene.unacknowledged() == 1, "the worker holds the task")

        worker.send(signal_name)

        await worker.ended()
        assert (scene.queued(), scene.unacknowledged()) == (1, 0), signal_name
        scene.broker.client().flushdb()
