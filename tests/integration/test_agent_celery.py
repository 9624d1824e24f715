"""A real agent, real Celery workers and a real broker: what is killed, frozen or shrunk loses no task.

What became of a task stands in a ledger that only tasks write. One that was interrupted has two starts; none
has two completions.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_kit import AgentProcess, is_alive, until
from celery_scene import TESTS, CeleryScene
from fixtures_broker import BrokerServer
from leasehold.api.node.v1 import worker_pb2
from leasehold.nodeagent import cgroups

#: A task may wait behind its gate for some seconds: it must not be given to another meanwhile.
VISIBILITY_SECONDS = 600
POOL = """
pools:
  - name: work
    template: celery
    min_workers: 0
    max_workers: 2
    worker_memory_limit_gb: 0.2
    parameters:
      app: celery_tasks:app
      queues: work
      directory: {tests}
      task_time_limit: 60
      task_soft_time_limit: 55
      soft_shutdown_timeout: 1
      visibility_timeout: {visibility}
      arguments: [--without-mingle, --without-gossip]
    env:
      TASKS_LEDGER: {ledger}
      TASKS_SETTINGS: '{settings}'
"""
#: Of 2 GB, which are only counted: nothing here takes that much.
SETTINGS = {
    "MEMORY_BUDGET_GB": "2",
    "SYSTEM_RESERVE_GB": "0.05",
    "MEMORY_HYSTERESIS_GB": "0.01",
    "MEMORY_THRESHOLD_GB": "0.05",
    "MEMORY_CHECK_INTERVAL": "0.5",
}


class Host(AgentProcess):
    """A host whose pool runs the tests' Celery application."""

    def __init__(self, folder: Path, scene: CeleryScene, *, visibility: int = VISIBILITY_SECONDS) -> None:
        transport = {
            "visibility_timeout": visibility,
            "unacked_restore_interval": 0.5,
            "unacked_restore_throttle": 1,
        }
        settings = {**scene.settings, "broker_transport_options": transport}
        pool = POOL.format(
            tests=TESTS, ledger=scene.ledger_url, settings=json.dumps(settings), visibility=visibility
        )
        super().__init__(folder, pool, settings={**SETTINGS, "CELERY_BROKER_URL": scene.broker.url})

    def run(self, workers: int) -> dict[str, int]:
        """Start the agent, and wait until so many workers take tasks; their PIDs by name."""
        self.start()
        if workers < 2:
            self.order(scale={"pool": "work", "workers": workers})
        found = self.wait_running(workers)
        until(lambda: all(each.HasField("is_busy") for each in self.living()), "they are ready")
        return found

    def living(self) -> list[worker_pb2.WorkerStatus]:
        """Workers that have not ended."""
        return [each for each in self.pool().workers if each.state != worker_pb2.WORKER_STATE_EXITED]

    def busy(self) -> dict[str, str]:
        """Ids of the running tasks, by worker."""
        return {each.name: each.task_id for each in self.living() if each.is_busy}

    def wait_busy(self, count: int) -> dict[str, str]:
        """Until so many workers are seen to be busy; the ids of their tasks."""
        until(lambda: len(self.busy()) == count, f"{count} workers are busy")
        return self.busy()

    def ended(self, name: str) -> worker_pb2.WorkerStatus | None:
        """The last life of a worker that is over, if there is one."""
        over = [each for each in self.worker(name) if each.state == worker_pb2.WORKER_STATE_EXITED]
        return over[-1] if over else None


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


@pytest.fixture
def host(tmp_path: Path, scene: CeleryScene) -> Iterator[Host]:
    host = Host(tmp_path, scene)
    yield host
    host.close()


def _completed(scene: CeleryScene, *keys: str) -> None:
    until(lambda: all(scene.count("completed", key) for key in keys), f"{keys} are completed\n{scene.ledger()}")


def test_a_shrinking_pool_takes_the_idle_worker_first_and_then_waits_for_the_busy_one(
    host: Host, scene: CeleryScene
) -> None:
    before = host.run(2)
    task_id = scene.submit("work", "a")
    (busy,) = host.wait_busy(1)
    assert host.busy() == {busy: task_id}
    (idle,) = before.keys() - {busy}

    host.order(scale={"pool": "work", "workers": 1})
    until(lambda: host.ended(idle) is not None, "the idle worker ended")
    assert host.running() == {busy: before[busy]}

    host.order(scale={"pool": "work", "workers": 0})
    until(lambda: "TERM" in host.worker(busy)[0].stop_step, "the busy worker is asked to end")
    assert is_alive(before[busy])
    scene.open("a")
    until(lambda: host.ended(busy) is not None, "the busy worker ended")

    assert (scene.count("started", "a"), scene.count("completed", "a")) == (1, 1)
    assert (scene.queued(), scene.unacknowledged()) == (0, 0)
    ended = host.ended(busy)
    assert ended is not None
    assert ended.exit.cause == worker_pb2.EXIT_CAUSE_STOPPED


def test_the_status_tells_what_waits_what_runs_and_what_is_for_later(host: Host, scene: CeleryScene) -> None:
    host.run(1)
    scene.submit("work", "a")
    host.wait_busy(1)
    scene.submit("work", "later", countdown=3600)
    for priority in (0, 3, 9):
        scene.submit("work", f"p{priority}", priority=priority)

    # The worker takes no more while it is busy, so what is for later waits with the others.
    until(lambda: host.pool().depth.ready == 4, "four tasks wait")
    depth = host.pool().depth
    assert (depth.unacknowledged, depth.scheduled, depth.is_lower_bound, depth.error) == (1, 0, False, "")


def test_an_agent_that_is_frozen_and_killed_with_a_shim_interrupts_no_task(
    host: Host, scene: CeleryScene
) -> None:
    before = host.run(2)
    for key in ("a", "b", "c", "d"):
        scene.submit("work", key)
    host.wait_busy(2)

    host.signal(signal.SIGSTOP)
    scene.open("a")
    scene.open("b")
    _completed(scene, "a", "b")
    host.signal(signal.SIGCONT)

    until(lambda: scene.count("started", "c") and scene.count("started", "d"), "the next two run")
    shim = host.living()[0].shim_pid
    host.kill()
    os.kill(shim, signal.SIGKILL)
    scene.open("c")
    _completed(scene, "c")
    host.start()

    assert host.wait_running(2) == before, "adopted, not started again"
    scene.open("d")
    _completed(scene, "d")
    assert [scene.count("started", key) for key in "abcd"] == [1, 1, 1, 1]
    assert [scene.count("completed", key) for key in "abcd"] == [1, 1, 1, 1]


@pytest.fixture
def hasty(tmp_path: Path, scene: CeleryScene) -> Iterator[Host]:
    """Its broker hides a task for 5 s only."""
    host = Host(tmp_path, scene, visibility=5)
    yield host
    host.close()


def test_a_killed_workers_task_is_in_doubt_until_it_runs_again(hasty: Host, scene: CeleryScene) -> None:
    host = hasty
    before = host.run(1)
    (name,) = before
    task_id = scene.submit("work", "a")
    host.wait_busy(1)
    killed_at = time.time()
    os.kill(before[name], signal.SIGKILL)

    until(lambda: host.ended(name) is not None, "its end is seen")
    ended = host.ended(name)
    assert ended is not None
    assert (ended.exit.signal, ended.exit.task_id) == (signal.SIGKILL, task_id)
    in_doubt_seconds = ended.exit.in_doubt_until.seconds - killed_at
    assert 3 <= in_doubt_seconds <= 7

    until(lambda: scene.count("started", "a") == 2, "it runs again")
    assert host.running()[name] != before[name]
    scene.open("a")
    _completed(scene, "a")
    assert scene.count("completed", "a") == 1


def test_a_killed_pool_process_costs_an_interruption_and_the_worker_goes_on(
    host: Host, scene: CeleryScene
) -> None:
    before = host.run(1)
    scene.submit("work", "a")
    host.wait_busy(1)
    os.kill(int(scene.ledger()[0].split()[2]), signal.SIGKILL)

    until(lambda: scene.count("started", "a") == 2, "it runs again")
    scene.open("a")
    _completed(scene, "a")

    assert scene.count("completed", "a") == 1
    assert host.running() == before


def test_a_stop_at_once_gives_the_task_back_and_the_next_agent_completes_it(
    host: Host, scene: CeleryScene
) -> None:
    host.run(1)
    scene.submit("work", "a")
    host.wait_busy(1)

    host.signal(signal.SIGINT)
    assert host.wait_end() == 0
    assert (scene.queued(), scene.unacknowledged(), host.left()) == (1, 0, [])

    host.start()
    until(lambda: scene.count("started", "a") == 2, "it runs again")
    scene.open("a")
    _completed(scene, "a")
    host.signal(signal.SIGTERM)
    assert host.wait_end() == 0
    assert (scene.count("completed", "a"), scene.unacknowledged(), host.left()) == (1, 0, [])


def test_a_task_beyond_its_workers_memory_is_put_away_and_the_others_run(
    host: Host, scene: CeleryScene
) -> None:
    if cgroups.detect().kind is cgroups.CgroupKind.NONE:
        return  # nobody but the agent ends it here, and the agent ends a worker whole
    host.run(1)
    scene.submit("gorge", "g", 400)

    dead_letters: Any = scene.broker.client()
    until(lambda: dead_letters.llen("leasehold:dead:work") == 1, "the task is put away", seconds=40)
    scene.submit("work", "a")
    scene.open("a")
    _completed(scene, "a")

    assert (scene.count("started", "g"), scene.count("completed", "g")) == (3, 0)
    # The kernel kills the pool's process, not the worker; that the agent may replace, in order, as one near
    # its limit.
    ended = [each for each in host.pool().workers if each.state == worker_pb2.WORKER_STATE_EXITED]
    assert {each.exit.cause for each in ended} <= {worker_pb2.EXIT_CAUSE_STOPPED}
    until(lambda: host.pool().oom_kills_total >= 3, "the kernel's part in it is told")
    assert host.pool().oom_kills_total == 3
    dead_letters.close()
