"""RQ's own workers, which fork for each job, on a real broker: functions that hold an allocation."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import allocator_kit as kit
import job_agents
import pytest
import redis
import rq
import rq_tasks
from allocator_kit import until
from fixtures_broker import BrokerServer
from job_agents import JobAgent, ask, registration, spec, submit, until_state
from leasehold.api.job.v1 import job_service_pb2 as wire
from node_agents import running

LEDGER_DATABASE = 15

MakeWorker = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
async def fleet(make_fleet: Callable[..., kit.Fleet]) -> kit.Fleet:
    """One allocator that takes jobs."""
    made = make_fleet()
    await made.start()
    await job_agents.ready(made)
    return made


@pytest.fixture
def make_worker(fleet: kit.Fleet, broker: BrokerServer, tmp_path: Path) -> Iterator[MakeWorker]:
    """Starts `rq worker`, which ends once it finds nothing in the queue."""
    workers: list[subprocess.Popen[bytes]] = []

    def make() -> "subprocess.Popen[bytes]":
        env = {
            **os.environ,
            "LEASEHOLD_ADDR": ",".join(fleet.addresses),
            "TASKS_LEDGER": broker.url.replace("/0", f"/{LEDGER_DATABASE}"),
        }
        program = str(Path(sys.executable).with_name("rq"))
        command = [program, "worker", "--burst", "--url", broker.url, "--path", str(Path(__file__).parents[1])]
        with (tmp_path / f"worker-{len(workers)}.log").open("wb") as log:
            worker = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


async def _allocated_cpus(fleet: kit.Fleet) -> int:
    return int((await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())).total.allocated_cpus)


async def test_a_job_of_rq_holds_its_allocation_while_it_runs_and_no_longer(
    fleet: kit.Fleet, broker: BrokerServer, make_worker: MakeWorker
) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    with redis.Redis.from_url(broker.url) as connection, broker.client(LEDGER_DATABASE) as ledger:
        queue = rq.Queue(connection=connection)
        async with running(agent):
            await job_agents.until_capacity(fleet, "r1")
            jobs = [queue.enqueue(rq_tasks.work, key) for key in ("a", "b")]
            workers = [make_worker(), make_worker()]

            def lines() -> Any:
                return ledger.lrange("ledger", 0, -1)

            await until(lambda: len(lines()) == 1, "one of the two has the node")
            first = lines()[0].split()[1]
            second = "b" if first == "a" else "a"
            waiting = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest())
            assert waiting.total.allocated_cpus == 4
            ledger.rpush(f"gate:{first}", "open")
            await until(lambda: len(lines()) == 3, "the other one has it then")
            assert lines() == [f"started {first} r1", f"completed {first} r1", f"started {second} r1"]
            ledger.rpush(f"gate:{second}", "open")
            await until(lambda: all(worker.poll() is not None for worker in workers), "both workers end")
            assert [worker.returncode for worker in workers] == [0, 0]
            assert [job.return_value(refresh=True) for job in jobs] == ["r1", "r1"]
            assert await _allocated_cpus(fleet) == 0


async def test_a_job_of_rq_that_is_not_placed_in_time_fails_and_was_not_run(
    fleet: kit.Fleet, broker: BrokerServer, make_worker: MakeWorker
) -> None:
    agent = JobAgent(fleet.addresses, registration("r1", cpus=4))
    with redis.Redis.from_url(broker.url) as connection, broker.client(LEDGER_DATABASE) as ledger:
        async with running(agent):
            await job_agents.until_capacity(fleet, "r1")
            blocker = await submit(fleet, spec(4))
            await until_state(fleet, blocker.job_id, "RUNNING")
            job = rq.Queue(connection=connection).enqueue(rq_tasks.impatient, "a")
            worker = make_worker()
            await until(lambda: worker.poll() is not None, "the worker ends")
        result = job.latest_result()
        assert result is not None and result.type is rq.results.Result.Type.FAILED
        assert "NotPlaced" in str(result.exc_string)
        assert ledger.lrange("ledger", 0, -1) == []
