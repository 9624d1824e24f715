"""The leader dies, drains, is overtaken; Postgres goes away: nodes keep their state, streams are told."""

import asyncio
import contextlib
from collections.abc import Callable

import allocator_kit as kit
import grpc
import pytest
from allocator_kit import until
from leasehold import devstack
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.postgres import store
from leasehold.rpc import common_codec
from node_agents import Agent, ask, node, registration, running, state

MakeFleet = Callable[..., kit.Fleet]


async def test_sigkill_of_the_leader_brings_every_node_back_under_the_next_with_its_state(
    make_fleet: MakeFleet, postgres_dsn: str
) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    agents = [Agent(fleet.addresses, registration(f"r620-{number}", incarnation=5)) for number in range(3)]
    agents[1].status.is_draining = True
    silent = registration("silent")
    async with running(*agents):
        await until(lambda: all(agent.terms for agent in agents), "all have registered")
        await ask(fleet, "ReportNode", wire.ReportNodeRequest(registration=silent), at=leader)
        agents[2].leave()
        await until(lambda: _states(fleet, leader, "READY DRAINING GONE READY"), "all is as it shall be")
        known = {each.name: each for each in await _nodes(fleet, leader)}
        before = common_codec.decode_epoch(agents[0].responses[-1][1].epoch)
        await until(lambda: _stored(postgres_dsn, "ready draining gone ready"), "Postgres has it")

        leader.kill()

        successor = await fleet.ready()
        await until(lambda: "nodes_known" in successor.log(), "it knows Postgres's nodes")
        known_at = kit.now()
        await until(lambda: _states(fleet, successor, "READY DRAINING GONE READY"), "states are kept")
        after = {each.name: each for each in await _nodes(fleet, successor)}
        assert {name: each.register_time for name, each in after.items()} == {
            name: each.register_time for name, each in known.items()
        }
        assert {each.incarnation for each in after.values()} == {5, 1}
        # This leader has not heard of it; it had a whole TTL from the takeover on.
        assert not after["silent"].HasField("last_report_age")
        await until(lambda: _is(fleet, successor, "silent", "LOST"), "the silent one is lost", seconds=6)
        assert 3.0 < kit.now() - known_at < 5.0
        # An agent of before the present one is not let in by a leader that knows both only from Postgres.
        stale = Agent([successor.address], registration("r620-2", incarnation=4))
        async with running(stale):
            await until(lambda: stale.ends, "the stale agent is refused")
        assert isinstance(stale.last_error, errors.NodeSuperseded)
        assert common_codec.decode_epoch(agents[0].responses[-1][1].epoch)[:2] > before[:2]


async def _stored(dsn: str, wanted: str) -> bool:
    async with store.PostgresStore(dsn, deadline_seconds=10.0) as facts:
        return " ".join(record.state.value for record in await facts.all_nodes()) == wanted


async def _nodes(fleet: kit.Fleet, leader: kit.AllocatorProcess) -> list[node_pb2.Node]:
    return list((await ask(fleet, "ListNodes", wire.ListNodesRequest(), at=leader)).nodes)


async def _states(fleet: kit.Fleet, leader: kit.AllocatorProcess, wanted: str) -> bool:
    states = [node_pb2.NodeState.Name(each.state) for each in await _nodes(fleet, leader)]
    return " ".join(states).replace("NODE_STATE_", "") == wanted


async def _is(fleet: kit.Fleet, leader: kit.AllocatorProcess, name: str, wanted: str) -> bool:
    return await state(fleet, name, at=leader) == wanted


async def test_a_follower_names_the_leader_and_a_drain_ends_every_stream(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    (follower,) = [member for member in fleet.members if member is not leader]

    async def hint() -> bool:
        try:
            await ask(fleet, "ListNodes", wire.ListNodesRequest(), at=follower)
        except errors.NotLeader as error:
            return error.leader_address == leader.address
        return False

    await until(hint, "the follower names the leader")
    stuck = Agent([follower.address], registration("stuck"))
    agent = Agent([leader.address], registration("r620-1"))
    async with running(agent, stuck):
        await until(lambda: any(isinstance(end, errors.NotLeader) for end in stuck.ends), "it is sent away")
        await until(lambda: agent.responses, "another has registered")
        watch = wire_grpc.NodeServiceStub(fleet.channel(leader)).WatchNodes(wire.WatchNodesRequest())
        await kit.read(watch)
        assert await leader.terminate() == 0
        assert isinstance(agent.last_error, errors.NotLeader | errors.Unavailable)
        # In peace or by the word that another leads: it does not stay open.
        with contextlib.suppress(errors.Unavailable):
            while await asyncio.wait_for(kit.read(watch), 5.0) is not grpc.aio.EOF:
                pass
        await until(lambda: _is_known(fleet, follower, "r620-1"), "the next leader knows the node")


async def _is_known(fleet: kit.Fleet, leader: kit.AllocatorProcess, name: str) -> bool:
    try:
        await node(fleet, name, at=leader)
    except (errors.NotFound, errors.Unavailable):
        return False
    return True


async def test_a_frozen_leader_that_was_overtaken_cannot_write_nodes_any_more(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    agent = Agent(fleet.addresses, registration("r620-1"))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        epoch = common_codec.decode_epoch(agent.responses[-1][1].epoch)
        leader.freeze()
        successor = await fleet.leader(other_than=leader)
        await until(lambda: _epoch(agent)[:2] > epoch[:2], "the agent is with the successor")
        leader.thaw()
        await until(lambda: "reign_ended" in leader.log(), "the earlier leader steps down")
        assert (await node(fleet, "r620-1", at=successor)).state == node_pb2.NODE_STATE_READY
        assert _epoch(agent)[:2] > epoch[:2]


def _epoch(agent: Agent) -> epochs.Epoch:
    return common_codec.decode_epoch(agent.responses[-1][1].epoch)


async def test_without_postgres_nodes_come_and_go_and_it_hears_of_all_of_them_afterwards(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer
) -> None:
    fleet = make_fleet(size=2, dsn=own_postgres.dsn)
    leader = await fleet.start()
    first, second = (Agent(fleet.addresses, registration(f"r620-{number}")) for number in (1, 2))
    async with running(first):
        await until(lambda: first.responses, "the first has registered")
        await asyncio.to_thread(own_postgres.kill)
        async with running(second):
            await until(lambda: second.responses, "another registers all the same")
            second.leave()
            await until(lambda: _is(fleet, leader, "r620-2", "GONE"), "it goes all the same")
        await until(lambda: "nodes_without_postgres" in leader.log(), "it is told")
        with pytest.raises(errors.PostgresUnavailable):
            await ask(fleet, "DeleteNode", wire.DeleteNodeRequest(name="r620-2"), at=leader)
        assert await _is(fleet, leader, "r620-2", "GONE")
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: "nodes_in_postgres_again" in leader.log(), "it has caught up")

        leader.kill()
        successor = await fleet.ready()

        await until(lambda: _is_known(fleet, successor, "r620-2"), "the successor knows it from Postgres")
        assert await _is(fleet, successor, "r620-2", "GONE")
        assert (await node(fleet, "r620-1", at=successor)).state == node_pb2.NODE_STATE_READY


async def test_most_nodes_lost_together_are_flagged_until_they_report_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    reports = [wire.ReportNodeRequest(registration=registration(f"r620-{number}")) for number in range(4)]
    for report in reports:
        await ask(fleet, "ReportNode", report, at=leader)
    agent = Agent([leader.address], registration("r620-9"))
    async with running(agent):
        await until(lambda: _states(fleet, leader, "LOST LOST LOST LOST READY"), "four are lost", seconds=7)
        assert await _is_mass_loss(fleet, leader)
        assert "mass_loss" in leader.log()
        for report in reports[:3]:
            await ask(fleet, "ReportNode", report, at=leader)
        assert not await _is_mass_loss(fleet, leader)


async def _is_mass_loss(fleet: kit.Fleet, leader: kit.AllocatorProcess) -> bool:
    answer = await ask(fleet, "ListNodes", wire.ListNodesRequest(is_brief=True), at=leader)
    return bool(answer.is_mass_loss)
