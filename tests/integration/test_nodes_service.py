"""NodeService of a real allocator: registration, reports, states, lists, watches, bad input."""

import asyncio
from typing import Any

import allocator_kit as kit
import pytest
from allocator_kit import until
from leasehold.api.common.v1 import process_pb2
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from node_agents import Agent, ask, node, node_name, registration, running, state


async def test_an_agent_registers_and_its_node_is_ready_with_what_it_reports(service: kit.Fleet) -> None:
    agent = Agent(service.addresses, registration(node_name(), labels={"rack": "b4"}))
    agent.status.load_average.extend([1.0, 2.0, 3.0])
    async with running(agent):
        await until(lambda: agent.terms, "it is told its terms")
        known = await node(service, agent.name)
    assert known.state == node_pb2.NODE_STATE_READY
    assert (known.node_id, known.incarnation) == (agent.registered.node_id, 1)
    assert known.resources == agent.registered.resources
    assert dict(known.labels) == {"rack": "b4"}
    assert list(known.status.load_average) == [1.0, 2.0, 3.0]
    assert known.last_report_age.ToNanoseconds() < 2e9
    assert known.ttl.ToNanoseconds() == 4e9
    assert known.register_time.seconds > 1_700_000_000
    assert agent.terms is not None
    assert agent.terms.report_interval.ToNanoseconds() == 1e9
    _, first = agent.responses[0]
    assert first.epoch.revision > 0
    assert first.answered_sequence == 1


async def test_every_message_is_answered_in_order(service: kit.Fleet) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "the first answer")
        for _ in range(20):
            agent.send()
        await until(lambda: agent.responses[-1][1].answered_sequence == 21, "all are answered")
    answered = [response.answered_sequence for _, response in agent.responses]
    assert answered == sorted(answered)


async def test_a_silent_node_is_lost_within_five_seconds_and_ready_again_when_it_reports(
    service: kit.Fleet,
) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    agent.interval = 60.0
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        heard_at = agent.responses[0][0]

        async def is_lost() -> bool:
            return await state(service, agent.name) == "LOST"

        await until(is_lost, "it is lost", seconds=6)
        assert 3.5 < kit.now() - heard_at < 5.0
        agent.send()
        await until(lambda: _is(service, agent.name, "READY"), "it is ready again")


async def _is(fleet: kit.Fleet, name: str, wanted: str) -> bool:
    return await state(fleet, name) == wanted


async def test_a_cut_stream_is_no_death_and_a_leaving_agent_is_gone_not_lost(service: kit.Fleet) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        agent.cut()
        await until(lambda: agent.connections == 2 and agent.responses[-1][1].answered_sequence, "it is back")
        assert await state(service, agent.name) == "READY"
        agent.leave()
        await until(lambda: _is(service, agent.name, "GONE"), "it is gone")


async def test_a_draining_agent_says_so(service: kit.Fleet) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        agent.send(status=node_pb2.NodeStatus(is_draining=True))
        await until(lambda: _is(service, agent.name, "DRAINING"), "it drains")
        agent.send()
        agent.send(status=node_pb2.NodeStatus())
        await until(lambda: _is(service, agent.name, "READY"), "it takes work up again")


async def test_a_newer_incarnation_supersedes_the_older_whose_stream_is_told(service: kit.Fleet) -> None:
    name = node_name()
    older = Agent(service.addresses, registration(name))
    async with running(older):
        await until(lambda: older.responses, "the older has registered")
        older.may_connect.clear()
        newer = Agent(service.addresses, registration(name, incarnation=2))
        async with running(newer):
            await until(lambda: older.ends, "the older hears of it")
            assert isinstance(older.last_error, errors.NodeSuperseded)
            assert older.last_error.metadata["incarnation"] == "2"
            stubborn = Agent(service.addresses, registration(name))
            async with running(stubborn):
                await until(lambda: stubborn.ends, "it is refused")
            assert isinstance(stubborn.last_error, errors.NodeSuperseded)
            assert (await node(service, name)).incarnation == 2
            assert newer.ends == []


async def test_another_living_host_of_the_same_name_is_refused_and_named(service: kit.Fleet) -> None:
    name = node_name()
    first = Agent(service.addresses, registration(name))
    async with running(first):
        await until(lambda: first.responses, "the first has registered")
        second = Agent(service.addresses, registration(name, node_id="id-of-another"))
        async with running(second):
            await until(lambda: second.ends, "it is refused")
        assert isinstance(second.last_error, errors.AlreadyExists)
        assert second.last_error.metadata["node_id"] == first.registered.node_id
        assert first.ends == []
        first.leave()
        await until(lambda: _is(service, name, "GONE"), "the first is gone")
        async with running(second):
            await until(lambda: second.responses, "the second takes the name")
        assert (await node(service, name)).node_id == "id-of-another"


async def test_the_unary_twin_registers_reports_and_certifies(service: kit.Fleet) -> None:
    registered = registration(node_name())
    request = wire.ReportNodeRequest(registration=registered, status=node_pb2.NodeStatus(is_draining=True))
    answer = await ask(service, "ReportNode", request)
    assert answer.terms.ttl.ToNanoseconds() == 4e9
    assert answer.epoch.revision > 0
    assert await state(service, registered.name) == "DRAINING"
    dead = {"boot_id": registered.boot_id, "pid_namespace": 7, "pid": 10, "start_time_ticks": 1}
    request.deaths.add(process=dead)
    with pytest.raises(errors.InvalidArgument) as caught:
        await ask(service, "ReportNode", request)
    assert caught.value.field == "deaths.process"
    dead["pid_namespace"] = registered.pid_namespace
    del request.deaths[:]
    request.deaths.add(process=dead)
    await ask(service, "ReportNode", request)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "../../etc/passwd"}, "registration.name"),
        ({"name": "n" * 300}, "registration.name"),
        ({"name": ""}, "registration.name"),
        ({"node_id": "short"}, "registration.node_id"),
        ({"labels": {f"key{number}": "v" for number in range(33)}}, "registration.labels"),
        ({"labels": {"k": "v" * 300}}, "registration.labels"),
        ({"incarnation": 2**64 - 1}, "registration.incarnation"),
    ],
)
async def test_a_registration_that_is_wrong_is_refused_by_stream_and_by_call(
    service: kit.Fleet, fields: dict[str, Any], field: str
) -> None:
    wrong = registration(**fields)
    with pytest.raises(errors.InvalidArgument) as caught:
        await ask(service, "ReportNode", wire.ReportNodeRequest(registration=wrong))
    assert caught.value.field == field
    agent = Agent(service.addresses, wrong)
    async with running(agent):
        await until(lambda: agent.ends, "it is refused")
    assert isinstance(agent.last_error, errors.InvalidArgument)
    assert agent.last_error.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"sequence": 1}, "sequence"),
        ({"registration": registration()}, "registration"),
        ({"status": node_pb2.NodeStatus(warnings=["w" * 1_000] * 1_100)}, "status"),
        ({"deaths": [wire.DeathCertificate()] * 1_001}, "deaths"),
    ],
)
async def test_a_message_that_is_wrong_ends_the_stream_and_leaves_the_node(
    service: kit.Fleet, message: dict[str, Any], field: str
) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        agent.may_connect.clear()
        agent.send(**message)
        await until(lambda: agent.ends, "the stream ends")
    assert isinstance(agent.last_error, errors.InvalidArgument)
    assert agent.last_error.field == field
    assert await state(service, agent.name) == "READY"


async def test_nodes_are_listed_by_name_in_pages(service: kit.Fleet) -> None:
    prefix = node_name()
    for number in (3, 1, 2):
        request = wire.ReportNodeRequest(
            registration=registration(f"{prefix}-{number}"), status=node_pb2.NodeStatus(agent_version="1")
        )
        await ask(service, "ReportNode", request)
    found: list[node_pb2.Node] = []
    token = ""
    for _ in range(100):
        page = await ask(service, "ListNodes", wire.ListNodesRequest(page_size=2, page_token=token))
        assert len(page.nodes) <= 2
        found += page.nodes
        token = page.next_page_token
        if not token:
            break
    names = [each.name for each in found]
    assert names == sorted(names)
    assert [name for name in names if name.startswith(prefix)] == [f"{prefix}-{number}" for number in (1, 2, 3)]
    assert all(each.HasField("status") for each in found if each.name.startswith(prefix))
    brief = await ask(service, "ListNodes", wire.ListNodesRequest(is_brief=True))
    assert not any(each.HasField("status") for each in brief.nodes)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListNodes", wire.ListNodesRequest(page_size=-1), "page_size"),
        ("ListNodes", wire.ListNodesRequest(page_size=1_001), "page_size"),
        ("ListNodes", wire.ListNodesRequest(page_token="../x"), "page_token"),
        ("GetNode", wire.GetNodeRequest(name="../x"), "name"),
        ("DeleteNode", wire.DeleteNodeRequest(name=""), "name"),
        ("DeleteNode", wire.DeleteNodeRequest(name="n" * 300), "name"),
    ],
)
async def test_a_request_that_is_wrong_is_refused_by_field(
    service: kit.Fleet, method: str, request_: Any, field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await ask(service, method, request_)
    assert caught.value.field == field


async def test_a_node_that_is_not_there_is_not_found(service: kit.Fleet) -> None:
    for method, request in (
        ("GetNode", wire.GetNodeRequest(name="nobody")),
        ("DeleteNode", wire.DeleteNodeRequest(name="nobody")),
    ):
        with pytest.raises(errors.NotFound):
            await ask(service, method, request)


async def test_a_node_is_deleted_only_when_it_is_gone_and_watchers_hear_of_it(
    service: kit.Fleet,
) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        with pytest.raises(errors.FailedPrecondition, match="READY"):
            await ask(service, "DeleteNode", wire.DeleteNodeRequest(name=agent.name))
        stub = wire_grpc.NodeServiceStub(service.channel(service.members[0]))
        watch = stub.WatchNodes(wire.WatchNodesRequest(name=agent.name), timeout=20.0)
        first = await kit.read(watch)
        assert [each.name for each in first.nodes] == [agent.name]
        agent.leave()
        states = [first.nodes[0].state]
        while states[-1] != node_pb2.NODE_STATE_GONE:
            states += [each.state for each in (await kit.read(watch)).nodes]
        await ask(service, "DeleteNode", wire.DeleteNodeRequest(name=agent.name))
        assert list((await kit.read(watch)).deleted) == [agent.name]
        watch.cancel()
    with pytest.raises(errors.NotFound):
        await node(service, agent.name)


async def test_an_agent_may_certify_only_processes_of_its_own_place_and_goes_on(service: kit.Fleet) -> None:
    agent = Agent(service.addresses, registration(node_name()))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        foreign = process_pb2.ProcessIdentity(boot_id="another", pid_namespace=1, pid=10, start_time_ticks=1)
        agent.send(deaths=[wire.DeathCertificate(process=foreign), wire.DeathCertificate()])
        await until(lambda: agent.responses[-1][1].answered_sequence >= 2, "it is answered")
        assert agent.ends == []
    refused = [line for line in service.members[0].log().splitlines() if "certificate_refused" in line]
    assert len([line for line in refused if agent.name in line]) == 1


async def test_a_connection_that_never_registers_does_no_harm(service: kit.Fleet) -> None:
    call = wire_grpc.NodeServiceStub(service.channel(service.members[0])).SyncNode()
    await call.write(wire.SyncNodeRequest(sequence=1))
    with pytest.raises(errors.InvalidArgument) as caught:
        await asyncio.wait_for(kit.read(call), 5.0)
    assert caught.value.field == "registration.name"
