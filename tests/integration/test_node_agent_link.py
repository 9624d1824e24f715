"""An agent and its allocator: the link breaks and heals, and no worker notices."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import allocator_kit
import pytest
from agent_kit import AgentProcess
from fake_nodes import FakeNodes
from google.protobuf import json_format
from leasehold.api.node.v1 import order_pb2
from leasehold.core import epoch as epochs
from leasehold.core import processes
from leasehold.devstack import ports
from leasehold.runtime import identity

POOL = """
pools:
  - {name: idle, template: command, min_workers: 0, max_workers: 3,
     parameters: {program: sleep, arguments: ["86396"], stop_seconds: 5}}
"""
EPOCH = epochs.Epoch(1, 100, 7)

until = allocator_kit.until


@pytest.fixture(name="nodes")
async def fixture_nodes() -> AsyncIterator[FakeNodes]:
    nodes = FakeNodes(EPOCH)
    await nodes.start()
    yield nodes
    await nodes.stop()


@pytest.fixture(name="agent")
async def fixture_agent(tmp_path: Path, nodes: FakeNodes) -> AsyncIterator[AgentProcess]:
    agent = AgentProcess(tmp_path, POOL)
    await asyncio.to_thread(agent.start, f"--addr={nodes.address}")
    yield agent
    await asyncio.to_thread(agent.close)


def order(order_id: str, epoch: epochs.Epoch | None = None, **kind: Any) -> order_pb2.Order:
    found = json_format.ParseDict(kind, order_pb2.Order())
    found.order_id = order_id
    if epoch is not None:
        found.epoch.generation, found.epoch.revision = epoch.generation, epoch.revision
    return found


async def running(agent: AgentProcess, count: int) -> dict[str, int]:
    return await asyncio.to_thread(agent.wait_running, count)


async def connected(agent: AgentProcess, is_connected: bool = True) -> None:
    async def is_so() -> bool:
        status = await asyncio.to_thread(agent.status)
        return status.link.is_connected is is_connected

    await until(is_so, f"the link is {'up' if is_connected else 'down'}")


def spawned(*command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command)


def write_log(folder: Path, worker: str, data: bytes) -> None:
    (log,) = folder.rglob(f"logs/{worker}.log")
    log.write_bytes(data)


def reported(nodes: FakeNodes) -> Callable[[], bool]:
    return lambda: any(pool.running == 3 for message in nodes.heard[-1:] for pool in message.status.pools)


async def test_it_registers_reports_and_carries_out_orders(nodes: FakeNodes, agent: AgentProcess) -> None:
    await until(lambda: nodes.heard, "it registered")
    registration = nodes.heard[0].registration
    assert (registration.name, registration.incarnation, registration.boot_id) == (
        "here",
        1,
        identity.boot_id(),
    )
    await until(reported(nodes), "its workers are told")

    nodes.order(order("o1", EPOCH, scale={"workers": 1}))
    await until(lambda: "o1" in nodes.results(), "the order is answered")
    await running(agent, 1)

    assert not nodes.results()["o1"].HasField("error")
    nodes.order(order("o2", scale={"workers": 99}))
    refused = await until(lambda: nodes.results().get("o2"), "a refusal is answered, too")
    assert (refused.error.reason, refused.error.field) == ("INVALID_ARGUMENT", "target_workers")


async def test_answers_larger_than_a_message_may_be_are_told_one_after_the_other(
    nodes: FakeNodes, agent: AgentProcess, tmp_path: Path
) -> None:
    await until(reported(nodes), "its workers are told")
    await asyncio.to_thread(write_log, tmp_path, "idle_1@here", (b"x" * 1023 + b"\n") * 2048)
    wanted = [f"log-{number}" for number in range(6)]

    for order_id in wanted:
        read = {"worker": "idle_1@here", "tail_lines": 10_000, "bytes_max": 1 << 20}
        nodes.order(order(order_id, EPOCH, read_log=read))
    await until(lambda: set(wanted) <= set(nodes.results()), "all are answered")

    assert min(len(nodes.results()[each].log.data) for each in wanted) > 900_000
    assert nodes.streams == 1


async def test_cut_off_it_works_on_and_nothing_is_restarted_when_the_link_heals(
    nodes: FakeNodes, agent: AgentProcess
) -> None:
    nodes.order(order("o1", EPOCH, scale={"workers": 2}))
    await until(lambda: "o1" in nodes.results(), "the order is answered")
    before = await running(agent, 2)
    port = int(nodes.address.rpartition(":")[2])
    await nodes.stop()
    await connected(agent, False)

    name = sorted(before)[0]
    os.kill(before[name], signal.SIGKILL)
    await until(lambda: agent.running().get(name, before[name]) != before[name], "it restarts what dies")
    during = await running(agent, 2)
    successor = FakeNodes(epochs.Epoch(1, 101, 7))
    await successor.start(port)
    try:
        await connected(agent)
        await until(lambda: len(successor.heard) >= 3, "it reports")
        assert await running(agent, 2) == during
        assert successor.heard[0].registration.incarnation == 1
        assert agent.pool().manual_target == 2
    finally:
        await successor.stop()


async def test_an_allocator_of_a_lower_epoch_is_not_obeyed_nor_are_its_orders(
    nodes: FakeNodes, agent: AgentProcess
) -> None:
    await connected(agent)
    before = await running(agent, 3)
    nodes.order(order("late", epochs.Epoch(1, 99), scale={"workers": 1}))
    late = await until(lambda: nodes.results().get("late"), "the order is answered")
    assert late.error.reason == "STALE_EPOCH"

    port = int(nodes.address.rpartition(":")[2])
    await nodes.stop()
    usurper = FakeNodes(epochs.Epoch(1, 99, 7))
    usurper.order(order("forged", scale={"workers": 1}))
    await usurper.start(port)
    try:
        await until(lambda: usurper.streams >= 3, "it leaves again and again")
        assert await running(agent, 3) == before
        assert usurper.results() == {}
        assert not (await asyncio.to_thread(agent.status)).link.is_connected
    finally:
        await usurper.stop()
    # Also after the agent was killed: the epoch is on disk.
    await asyncio.to_thread(agent.kill)
    usurper = FakeNodes(epochs.Epoch(1, 99, 7))
    await usurper.start(port)
    try:
        await asyncio.to_thread(agent.start, f"--addr={usurper.address}")
        await until(lambda: usurper.streams >= 2, "the next agent leaves, too")
        assert agent.running() == before
    finally:
        await usurper.stop()


async def test_a_process_that_it_watches_is_certified_dead_within_a_tenth_of_a_second(
    nodes: FakeNodes, agent: AgentProcess
) -> None:
    watched, gone = spawned("sleep", "86395"), spawned("true")
    keys = []
    for process in (watched, gone):
        found = identity.identify(process.pid)
        keys.append(processes.ProcessKey(found.boot_id, found.pid_namespace, found.pid, found.start_time_ticks))
    gone.wait()
    nodes.watch = keys
    await until(lambda: keys[1] in nodes.deaths(), "the one that is dead already is certified")
    assert keys[0] not in nodes.deaths()

    loop = asyncio.get_running_loop()
    watched.kill()
    began = loop.time()
    await until(lambda: keys[0] in nodes.deaths(), "its death is certified", pause=0.002)
    took = loop.time() - began
    watched.wait()

    allocator_kit.tell(f"death certified in {took * 1000:.0f} ms")
    assert took < 1.0


async def test_what_was_not_answered_is_said_again(nodes: FakeNodes, agent: AgentProcess) -> None:
    await connected(agent)
    port = int(nodes.address.rpartition(":")[2])
    nodes.order(order("o1", EPOCH, scale={"workers": 1}))
    await until(lambda: not nodes.orders, "the order is on its way")
    nodes.is_silent = True
    await until(lambda: "o1" in nodes.results(), "it was answered, and nobody took the answer")
    await nodes.stop()
    successor = FakeNodes(epochs.Epoch(1, 101, 7))
    await successor.start(port)
    try:
        await until(lambda: "o1" in successor.results(), "the answer is given to the next leader")
    finally:
        await successor.stop()


async def test_it_follows_the_leader_by_itself(tmp_path: Path, nodes: FakeNodes) -> None:
    nobody = ports.free_port()
    agent = AgentProcess(tmp_path, POOL)
    try:
        await asyncio.to_thread(agent.start, f"--addr=127.0.0.1:{nobody},{nodes.address}")
        await until(lambda: nodes.heard, "it found the one that leads")
    finally:
        await asyncio.to_thread(agent.close)


async def test_it_says_that_it_leaves(nodes: FakeNodes, agent: AgentProcess) -> None:
    await connected(agent)
    await running(agent, 3)

    agent.signal(signal.SIGTERM)

    assert await asyncio.to_thread(agent.wait_end) == 0
    assert nodes.heard[-1].is_leaving
