"""A real agent under real allocators: orders by way of the leader, and a leader that is killed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import allocator_kit
import pytest
from agent_kit import AgentProcess
from fixtures_allocator import MakeFleet
from google.protobuf import json_format
from leasehold.api.node.v1 import node_pb2, node_service_pb2_grpc, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.rpc import leader as leaders

POOL = """
pools:
  - {name: idle, template: command, min_workers: 0, max_workers: 3,
     parameters: {program: sleep, arguments: ["86393"], stop_seconds: 5}}
"""

until = allocator_kit.until


@pytest.fixture(name="fleet")
async def fixture_fleet(make_fleet: MakeFleet) -> allocator_kit.Fleet:
    fleet = make_fleet(size=2)
    await fleet.start()
    return fleet


@pytest.fixture(name="agent")
async def fixture_agent(tmp_path: Path, fleet: allocator_kit.Fleet) -> AsyncIterator[AgentProcess]:
    folder = tmp_path / "host"
    folder.mkdir()
    agent = AgentProcess(folder, POOL)
    await asyncio.to_thread(agent.start, f"--addr={','.join(fleet.addresses)}")
    yield agent
    await asyncio.to_thread(agent.close)


@pytest.fixture(name="leader")
async def fixture_leader(fleet: allocator_kit.Fleet) -> AsyncIterator[leaders.LeaderChannel]:
    async with leaders.LeaderChannel(fleet.addresses) as leader:
        yield leader


async def node(leader: leaders.LeaderChannel) -> node_pb2.Node | None:
    try:
        answer = await leader.call(
            lambda channel: node_service_pb2_grpc.NodeServiceStub(channel).GetNode,
            wire.GetNodeRequest(name="here"),
        )
    except errors.LeaseholdError:
        return None
    return answer.node


async def order(leader: leaders.LeaderChannel, order_id: str, **kind: Any) -> order_pb2.OrderResult:
    request = wire.OrderNodeRequest(node="here", order=json_format.ParseDict(kind, order_pb2.Order()))
    request.order.order_id = order_id
    answer = await leader.call(
        lambda channel: node_service_pb2_grpc.NodeServiceStub(channel).OrderNode, request, timeout_seconds=15.0
    )
    return answer.answers[0].result


async def ready(leader: leaders.LeaderChannel, running: int) -> node_pb2.Node:
    async def is_so() -> node_pb2.Node | None:
        found = await node(leader)
        if found is None or found.state != node_pb2.NODE_STATE_READY or not found.HasField("status"):
            return None
        return found if sum(pool.running for pool in found.status.pools) == running else None

    found: node_pb2.Node = await until(is_so, f"the node is ready with {running} workers", seconds=30.0)
    return found


async def test_orders_go_through_the_leader_and_its_death_touches_no_worker(
    fleet: allocator_kit.Fleet, agent: AgentProcess, leader: leaders.LeaderChannel
) -> None:
    await ready(leader, 3)
    result = await order(leader, "o1", scale={"workers": 2})
    assert result.pools[0].manual_target == 2
    await ready(leader, 2)
    before = await asyncio.to_thread(agent.running)
    with pytest.raises(errors.FailedPrecondition, match="beyond memory") as beyond:
        agent.write(POOL.replace("max_workers: 3", "max_workers: 30"))
        await until(lambda: agent.pool().max_workers == 30, "the file is in force")
        await order(leader, "o2", scale={"workers": 30})
    assert beyond.value.metadata["target_workers"] == "30"

    leading = next(member for member in fleet.members if member.address == leader.leader_address)
    leading.kill()

    found = await ready(leader, 2)
    assert found.incarnation == 1
    assert await asyncio.to_thread(agent.running) == before
    again = await order(leader, "o1", scale={"workers": 2})
    assert again == result, "what an agent has answered it answers again, under the next leader too"
    await order(leader, "o3", scale={"workers": 1})
    await ready(leader, 1)


async def test_an_agent_that_was_killed_is_the_same_node_with_a_higher_incarnation(
    agent: AgentProcess, leader: leaders.LeaderChannel, fleet: allocator_kit.Fleet
) -> None:
    before = await ready(leader, 3)
    await asyncio.to_thread(agent.kill)
    await asyncio.to_thread(agent.start, f"--addr={','.join(fleet.addresses)}")

    async def is_back() -> bool:
        found = await node(leader)
        return found is not None and found.incarnation == 2 and found.state == node_pb2.NODE_STATE_READY

    await until(is_back, "it registered again", seconds=30.0)
    after = await ready(leader, 3)

    assert after.node_id == before.node_id
    assert [worker.process.pid for worker in after.status.pools[0].workers] == [
        worker.process.pid for worker in before.status.pools[0].workers
    ]
