"""Budget-limited tasks, with a real allocator, a real broker and two real workers: never over the limit."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import allocator_kit
import celery
import pytest
from allocator_kit import until
from celery.result import AsyncResult
from celery_scene import CeleryScene, CeleryWorker
from fixtures_broker import BrokerServer
from leasehold.client import celery as leasehold_celery
from leasehold.core import errors

WINDOW_SECONDS = 2.0
TOKENS = 100


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


@pytest.fixture
async def limited(service: allocator_kit.Fleet, budget_name: str) -> str:
    await service.put(
        allocator_kit.budget(
            budget_name,
            dimensions={"max_concurrent_requests": 4, "rpm_limit": 1000, "tpm_limit": TOKENS},
            window_seconds=WINDOW_SECONDS,
        )
    )
    return budget_name


async def _workers(
    scene: CeleryScene, service: allocator_kit.Fleet, budget: str, count: int, **env: str
) -> list[CeleryWorker]:
    env = {"LEASEHOLD_ADDR": service.members[0].address, "TASKS_BUDGET": budget, **env}
    return list(await asyncio.gather(*(scene.start(**env) for _ in range(count))))


def _begun(scene: CeleryScene) -> list[dict[str, Any]]:
    return [call for call in scene.calls() if call["event"] == "begin"]


async def test_two_workers_never_spend_more_than_the_limit_in_any_window(
    scene: CeleryScene, service: allocator_kit.Fleet, limited: str
) -> None:
    await _workers(scene, service, limited, 2)
    for number in range(14):
        scene.submit("ask", str(number), 20, 20)

    await until(lambda: len(scene.calls()) == 28, "all tasks have run", seconds=30)

    begun = _begun(scene)
    assert sorted(call["key"] for call in begun) == sorted(str(number) for number in range(14)), "once each"
    spent = [
        sum(other["used"] for other in begun if call["at"] - WINDOW_SECONDS < other["at"] <= call["at"])
        for call in begun
    ]
    assert max(spent) <= TOKENS
    assert max(spent) > TOKENS / 2, "and not by being slow"


async def test_what_a_task_did_not_use_is_free_for_the_next(
    scene: CeleryScene, service: allocator_kit.Fleet, limited: str
) -> None:
    await _workers(scene, service, limited, 1)
    for number in range(10):
        scene.submit("ask", str(number), 50, 5)

    await until(lambda: len(scene.calls()) == 20, "all tasks have run", seconds=30)

    begun = _begun(scene)
    assert begun[-1]["at"] - begun[0]["at"] < WINDOW_SECONDS, "50 were used, 500 reserved, the limit is 100"


async def test_a_task_that_is_not_admitted_in_time_is_put_off_and_uses_no_retry(
    scene: CeleryScene, service: allocator_kit.Fleet, limited: str
) -> None:
    scene.settings["result_backend"] = scene.broker.url
    (worker,) = await _workers(scene, service, limited, 1, TASKS_WAIT_SECONDS="0.3")
    tasks = [scene.submit("ask", str(number), 100, 100) for number in range(3)]

    await until(lambda: len(scene.calls()) == 6, f"all tasks have run\n{worker.log()}", seconds=40)

    assert worker.log().count("task_put_off") >= 2
    assert sorted(call["key"] for call in _begun(scene)) == ["0", "1", "2"]
    with celery.Celery(
        "reader", broker=scene.broker.url, backend=scene.broker.url, set_as_current=False
    ) as app:
        for task in tasks:
            result = AsyncResult(task, app=app)
            await until(result.ready, "its result is there")
            assert (result.state, result.result) == ("SUCCESS", 100)


async def test_a_task_gives_up_when_it_was_told_to_and_fails_at_once_for_a_budget_that_is_not_there(
    scene: CeleryScene, service: allocator_kit.Fleet, limited: str
) -> None:
    scene.settings["result_backend"] = scene.broker.url
    hurry = {"TASKS_WAIT_SECONDS": "0.2", "TASKS_GIVE_UP_SECONDS": "0"}
    await _workers(scene, service, limited, 1, **hurry)
    first = scene.submit("ask", "a", 100, 100)
    second = scene.submit("ask", "b", 100, 100)

    with celery.Celery(
        "reader", broker=scene.broker.url, backend=scene.broker.url, set_as_current=False
    ) as app:
        late = AsyncResult(second, app=app)
        await until(late.ready, "the second has given up")
        assert type(late.result).__name__ == "DeadlineExceeded"
        assert AsyncResult(first, app=app).state == "SUCCESS"

        scene.workers[0].end()
        await _workers(scene, service, "nobody-made-this", 1)
        unknown = AsyncResult(scene.submit("ask", "c", 1, 1), app=app)
        await until(unknown.ready, "it has failed")
        assert type(unknown.result).__name__ == "NotFound"


async def test_a_pool_process_that_ends_gives_its_lease_back(
    scene: CeleryScene, service: allocator_kit.Fleet, limited: str
) -> None:
    (worker,) = await _workers(scene, service, limited, 1)
    scene.submit("ask", "a", 1, 1)
    await until(lambda: len(scene.calls()) == 2, "the task has run")
    (child,) = worker.children
    assert [each.holder for each in (await service.snapshot(limited)).holders] == [f"{worker.name}-{child}"]

    worker.send("TERM")
    await worker.ended()

    async def is_empty() -> bool:
        return not (await service.snapshot(limited)).holders

    await until(is_empty, "nobody holds a lease")


def test_a_budgeted_task_that_is_called_as_a_function_raises_at_once(free_address: str) -> None:
    @leasehold_celery.budgeted(
        "llm-api", tokens=lambda text: len(text), wait_seconds=0.05, addresses=free_address
    )
    def ask(text: str) -> str:
        return text

    with pytest.raises(errors.DeadlineExceeded):
        ask("hello")
    with pytest.raises(errors.FailedPrecondition):
        leasehold_celery.current_permit()


@pytest.fixture
def free_address() -> Iterator[str]:
    from leasehold.client import celery_budget
    from leasehold.devstack import ports

    yield f"127.0.0.1:{ports.free_port()}"
    celery_budget._leave()
