import asyncio
import io
import json
from collections.abc import Iterator

import pytest
from leasehold.core import errors
from leasehold.observe import logs
from leasehold.runtime.tasks import BackgroundTasks


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    yield stream
    logs.reset()


async def fail(message: str) -> None:
    raise ValueError(message)


async def test_a_task_that_fails_is_logged_with_its_traceback_and_told(log: io.StringIO) -> None:
    tasks = BackgroundTasks()
    tasks.start(fail("no disk"), name="ledger")
    await tasks.failed.wait()
    line = json.loads(log.getvalue())
    assert (line["event"], line["task"], line["level"]) == ("background_task_failed", "ledger", "error")
    assert "ValueError: no disk" in line["exception"]
    with pytest.raises(ValueError, match="no disk"):
        tasks.raise_failure()


async def test_the_end_of_the_block_raises_the_first_failure(log: io.StringIO) -> None:
    with pytest.raises(ValueError, match="first"):
        async with BackgroundTasks() as tasks:
            tasks.start(fail("first"), name="a")
            tasks.start(fail("second"), name="b")
            await tasks.failed.wait()
    assert log.getvalue().count("background_task_failed") == 2


async def test_a_loop_that_ends_by_itself_is_a_failure(log: io.StringIO) -> None:
    tasks = BackgroundTasks()
    tasks.start(asyncio.sleep(0), name="keepalive")
    await tasks.failed.wait()
    with pytest.raises(errors.LeaseholdError, match="keepalive ended by itself"):
        tasks.raise_failure()


async def test_a_task_that_may_end_ends_in_peace(log: io.StringIO) -> None:
    async with BackgroundTasks() as tasks:
        await tasks.start(asyncio.sleep(0), name="once", may_end=True)
    assert not tasks.failed.is_set()
    assert log.getvalue() == ""


async def test_stopping_cancels_what_runs_and_waits_for_its_clean_up(log: io.StringIO) -> None:
    steps: list[str] = []
    started = asyncio.Event()

    async def loop() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    async with BackgroundTasks() as tasks:
        tasks.start(loop(), name="loop")
        await started.wait()
    assert steps == ["cleaned up"]
    assert not tasks.failed.is_set()


async def test_a_task_that_fails_while_it_is_cancelled_is_not_swallowed(log: io.StringIO) -> None:
    started = asyncio.Event()

    async def loop() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("flush failed")

    with pytest.raises(OSError, match="flush failed"):
        async with BackgroundTasks() as tasks:
            tasks.start(loop(), name="loop")
            await started.wait()
    assert "background_task_failed" in log.getvalue()


async def test_an_error_of_the_block_itself_is_the_one_that_is_raised(log: io.StringIO) -> None:
    with pytest.raises(KeyError):
        async with BackgroundTasks() as tasks:
            tasks.start(fail("background"), name="a")
            await tasks.failed.wait()
            raise KeyError("foreground")
