"""The agent's parts in this process: orders whose answer was not kept, and an allocator that is stuck."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import agent_kit
import process_scene
import pytest
from leasehold.api.node.v1 import order_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import agent, cgroups, link, node_record, orders, state, status
from leasehold.nodeagent import config as configs
from leasehold.rpc import common_codec
from process_scene import until

POOL = """
pools:
  - {name: idle, template: command, min_workers: 0, max_workers: 2,
     parameters: {program: sleep, arguments: ["86399"], stop_seconds: 5}}
"""


class Death(BaseException):
    """The agent dies here."""


class Part:
    """What an agent is without its server."""

    def __init__(self, folder: Path) -> None:
        config = folder / "agent.yaml"
        config.write_text(POOL)
        config.chmod(0o600)
        flags = {"LEASEHOLD_AGENT_CONFIG": str(config), "LEASEHOLD_NODE": "here"}
        found = configs.load(flags, {**agent_kit.SETTINGS, "PATH": "/usr/bin:/bin"}, folder)
        self.folder = state.StateFolder(folder / "state")
        self.folder.open()
        record = node_record.NodeRecord(self.folder)
        record.begin()
        self.host = agent.Agent(found, self.folder, cgroups.NoCgroups())
        self.host.adopt()
        self.record = record
        self.orders = orders.Orders(self.host, record)
        self.driver = asyncio.create_task(self.host.run())

    def running(self) -> dict[str, str]:
        """Ids of the running workers, by name."""
        return {
            view.name: view.worker_id
            for view in self.host.pools["idle"].machine.workers(self.host.clock())
            if view.state is model.WorkerState.RUNNING
        }

    async def end(self) -> None:
        """It goes without a word; workers stay."""
        self.driver.cancel()
        await asyncio.gather(self.driver, return_exceptions=True)
        self.host.close()
        self.folder.close()


@contextlib.asynccontextmanager
async def part(folder: Path) -> AsyncIterator[Part]:
    made = Part(folder)
    try:
        yield made
    finally:
        await made.end()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    process_scene.end_everything(tmp_path)


async def test_an_order_whose_answer_was_not_kept_is_not_applied_to_the_next_worker_of_that_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_pb2.Order(order_id="o1", stop_workers=order_pb2.StopWorkersOrder(worker="idle_1@here"))
    async with part(folder) as first:
        await until(lambda: len(first.running()) == 2, "two run")
        before = first.running()["idle_1@here"]

        def die(*_: object) -> None:
            raise Death

        with monkeypatch.context() as patched, pytest.raises(Death):
            patched.setattr(status, "pool_status", die)
            await first.orders.execute(order)
        await until(lambda: first.running().get("idle_1@here", before) != before, "another has its place")

    async with part(folder) as second:
        after = second.running()
        assert len(after) == 2
        result = await second.orders.execute(order)
        again = await second.orders.execute(order)

        assert second.running() == after, "nobody was stopped by it"
        assert (result.order_id, [pool.name for pool in result.pools]) == ("o1", ["idle"])
        assert again == result


async def test_the_id_of_an_earlier_order_is_refused_to_another(folder: Path) -> None:
    async with part(folder) as first:
        one = order_pb2.Order(order_id="o1", scale=order_pb2.ScaleOrder(workers=1))
        answer = await first.orders.execute(one)

    async with part(folder) as second:
        with pytest.raises(errors.InvalidArgument, match="o1 was another order's") as refused:
            await second.orders.execute(order_pb2.Order(order_id="o1", scale=order_pb2.ScaleOrder(workers=2)))
        one.epoch.CopyFrom(common_codec.encode_epoch(epochs.Epoch(1, 5, 9)))

        assert refused.value.field == "order.order_id"
        assert await second.orders.execute(one) == answer
        assert second.host.governor.view(second.host.clock(), "idle").manual_target == 1


async def test_an_allocator_that_takes_no_message_is_unreached_and_no_fault_of_the_agent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[str] = []

    async def stuck(*_: object) -> None:
        served.append("")
        await asyncio.Event().wait()

    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.02)
    monkeypatch.setattr(link._Stream, "send", stuck)
    monkeypatch.setattr(link._Stream, "receive", stuck)
    async with part(folder) as first:
        connection = link.Link(first.host, first.record, first.orders, ["127.0.0.1:1"])
        with caplog.at_level(logging.DEBUG, logger="leasehold"):
            running = asyncio.create_task(connection.run())
            await until(lambda: len(served) >= 4, "it was given up, and tried again")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    assert "has taken no message for 0.02 s" in caplog.text
    assert "link_failed" not in caplog.text
