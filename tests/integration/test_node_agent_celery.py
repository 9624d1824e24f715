"""The agent with a pool of real Celery workers on a real broker; what was done stands in the tasks' ledger."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_kit import SETTINGS, AgentProcess, is_alive
from allocator_kit import until
from celery_scene import TESTS, CeleryScene
from fixtures_broker import BrokerServer
from leasehold.api.node.v1 import pool_pb2, worker_pb2

POOL = """
pools:
  - name: work
    template: celery
    min_workers: 1
    max_workers: 2
    worker_memory_limit_gb: 0.25
    parameters:
      app: celery_tasks:app
      queues: work
      directory: %s
      soft_shutdown_timeout: 1
      arguments: [--without-mingle, --without-gossip]
"""
HOST = {**SETTINGS, "MEMORY_BUDGET_GB": "1", "SYSTEM_RESERVE_GB": "0.05"}


@pytest.fixture(name="scene")
async def fixture_scene(broker: BrokerServer, tmp_path: Path) -> AsyncIterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


@pytest.fixture(name="agent")
async def fixture_agent(scene: CeleryScene, tmp_path: Path) -> AsyncIterator[AgentProcess]:
    agent = AgentProcess(tmp_path, POOL % TESTS, settings={**HOST, **environment(scene)})
    await asyncio.to_thread(agent.start)
    yield agent
    await asyncio.to_thread(agent.close)


def environment(scene: CeleryScene) -> dict[str, str]:
    return {
        "CELERY_BROKER_URL": scene.broker.url,
        "TASKS_LEDGER": scene.ledger_url,
        "TASKS_SETTINGS": '{"worker_soft_shutdown_timeout": 0.5, "worker_lost_wait": 0.5}',
    }


def busy(agent: AgentProcess) -> list[worker_pb2.WorkerStatus]:
    return [worker for worker in agent.pool().workers if worker.is_busy]


async def test_a_task_runs_once_through_a_killed_agent_and_a_drain(
    scene: CeleryScene, agent: AgentProcess
) -> None:
    before = await asyncio.to_thread(agent.wait_running, 2)
    task_id = scene.submit("work", "long")
    await scene.until_count("started", "long", seconds=30)
    worker = (await until(lambda: busy(agent), "the agent sees who works"))[0]
    assert (worker.task_id, worker.task_name) == (task_id, "celery_tasks.work")

    await asyncio.to_thread(agent.kill)
    await asyncio.to_thread(agent.start)
    assert await asyncio.to_thread(agent.wait_running, 2) == before
    worker = (await until(lambda: busy(agent), "the next agent sees it, too"))[0]
    assert worker.is_adopted
    scene.submit("work", "waits")
    await scene.until_count("started", "waits")
    agent.signal(signal.SIGTERM)
    await until(lambda: agent.pool().stopping == 2, "it drains")
    scene.submit("work", "after")
    scene.open("long")
    scene.open("waits")

    assert await asyncio.to_thread(agent.wait_end) == 0
    assert [scene.count("completed", key) for key in ("long", "waits")] == [1, 1]
    assert [scene.count("started", key) for key in ("long", "waits", "after")] == [1, 1, 0]
    assert (scene.queued(), scene.unacknowledged()) == (1, 0)


async def test_sigint_gives_a_running_task_back_and_its_next_worker_completes_it_once(
    scene: CeleryScene, agent: AgentProcess
) -> None:
    workers = await asyncio.to_thread(agent.wait_running, 2)
    scene.submit("work", "cut")
    await scene.until_count("started", "cut", seconds=30)
    agent.signal(signal.SIGINT)
    assert await asyncio.to_thread(agent.wait_end) == 0
    assert not any(map(is_alive, workers.values()))
    assert (scene.queued(), scene.unacknowledged()) == (1, 0)

    await asyncio.to_thread(agent.start)
    await scene.until_count("started", "cut", 2, seconds=30)
    scene.open("cut")

    await scene.until_count("completed", "cut")
    assert scene.count("completed", "cut") == 1


async def test_a_shrink_takes_the_idle_one_and_lets_the_other_finish(
    scene: CeleryScene, agent: AgentProcess
) -> None:
    await asyncio.to_thread(agent.wait_running, 2)
    scene.submit("work", "long")
    await scene.until_count("started", "long", seconds=30)
    worker = (await until(lambda: busy(agent), "the agent sees who works"))[0]

    agent.order("shrink", scale={"workers": 1})
    left = await asyncio.to_thread(agent.wait_running, 1)

    assert list(left) == [worker.name]
    scene.open("long")
    await scene.until_count("completed", "long")
    assert scene.count("started", "long") == 1


async def test_what_waits_is_told_and_a_broker_that_is_away_is_not_taken_for_empty(
    scene: CeleryScene, agent: AgentProcess
) -> None:
    await asyncio.to_thread(agent.wait_running, 2)
    agent.order("stop", stop_workers={"pool": "work"})
    await until(lambda: agent.pool().mode == pool_pb2.POOL_MODE_STOPPED and not agent.left(), "all ended")
    for number in range(3):
        scene.submit("work", f"t{number}", priority=number * 3)

    depth = await until(lambda: agent.pool().depth.ready and agent.pool().depth, "what waits is told")

    assert (depth.ready, depth.unacknowledged) == (3, 0)


async def test_without_its_broker_a_pool_is_not_started_and_says_what_to_do(
    scene: CeleryScene, tmp_path: Path, broker: BrokerServer
) -> None:
    folder = tmp_path / "apart"
    folder.mkdir()
    nowhere = {**environment(scene), "CELERY_BROKER_URL": "redis://:secret@127.0.0.1:1/0"}
    agent = AgentProcess(folder, POOL % TESTS, settings={**HOST, **nowhere})
    try:
        await asyncio.to_thread(agent.start)

        told = await until(
            lambda: "127.0.0.1:1" in agent.pool().blocked_reason and agent.pool().blocked_reason, "it is told"
        )
        assert "start the broker" in told
        assert "secret" not in told + agent.text()
        assert agent.pool().starts_total == 0
        assert not agent.pool().depth.HasField("ready")
    finally:
        await asyncio.to_thread(agent.close)


async def test_a_killed_worker_of_a_pool_comes_back(scene: CeleryScene, agent: AgentProcess) -> None:
    before = await asyncio.to_thread(agent.wait_running, 2)
    name = sorted(before)[0]
    os.kill(before[name], signal.SIGKILL)

    await until(lambda: agent.running().get(name, before[name]) != before[name], "it comes back", seconds=30)

    assert agent.running().keys() == before.keys()
