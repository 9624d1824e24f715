"""The gateway's application on real allocators: budgets as from a shell, orders, and a leader that dies."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import allocator_kit as kit
import fake_fleet
import gateway_scene
import httpx
from allocator_kit import until
from fixtures_allocator import MakeFleet
from leasehold.cli import connection
from leasehold.gateway import allocators, app
from leasehold.rpc import budget_documents
from node_agents import Agent, node_name, registration, running


@contextlib.asynccontextmanager
async def gateway(fleet: kit.Fleet) -> AsyncIterator[httpx.AsyncClient]:
    leader = allocators.Allocators(fleet.addresses, timeout_seconds=10.0)
    application = app.build(leader, allowed_hosts=gateway_scene.HOSTS)
    transport = httpx.ASGITransport(application)
    try:
        async with httpx.AsyncClient(transport=transport, base_url=gateway_scene.BASE) as calls:
            yield calls
    finally:
        await leader.close()


def scripted(fleet: kit.Fleet) -> tuple[Agent, fake_fleet.FakeHost]:
    """An agent whose answers are a made-up host's, over a real stream."""
    host = fake_fleet.FakeHost(node_name())
    host.add_pool("transcription", 3)
    agent = Agent(fleet.addresses, registration(host.name), obey=host.execute)
    agent.status = host.status()
    return agent, host


async def test_scaling_status_is_field_for_field_what_the_command_line_prints(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name))

    def printed() -> str:
        with connection.connect(service.addresses[0], 5.0) as allocator:
            from leasehold.api.budget.v1 import budget_service_pb2 as wire

            request = wire.GetBudgetStatusRequest(budget=budget_name)
            return json.dumps(budget_documents.status(allocator.call("GetBudgetStatus", request)))

    async with gateway(service) as calls:
        told = await calls.get("/scaling_status", params={"budget": budget_name})
        unknown = await calls.get("/scaling_status", params={"budget": budget_name, "worker_id": "none"})

    assert told.json() == json.loads(await asyncio.to_thread(printed))
    assert list(told.json()) == list(budget_documents.BudgetStatus.__annotations__)
    assert told.json()["base_allocation"]["rpm_limit"] == 800 / 4
    assert (unknown.status_code, unknown.json()["error"]["reason"]) == (404, "NOT_FOUND")


async def test_a_node_without_a_connection_is_503_at_once_and_an_unknown_one_404(service: kit.Fleet) -> None:
    agent, host = scripted(service)
    async with gateway(service) as calls:
        url = f"/monitoring/workers/scale?target_workers=2&node={host.name}"
        assert (await calls.post(url)).status_code == 404
        async with running(agent):
            await until(lambda: agent.terms, "it is registered")
            assert (await calls.post(url)).status_code == 200
        began = kit.now()
        away = await calls.post(url)
        seconds = kit.now() - began

    assert (away.status_code, away.json()["error"]["reason"]) == (503, "NODE_UNREACHABLE")
    assert away.headers["retry-after"] == "1"
    assert seconds < 5.0
    assert len(host.applied) == 1


async def test_what_the_agent_refuses_comes_through_with_its_field_and_its_numbers(service: kit.Fleet) -> None:
    agent, host = scripted(service)
    async with gateway(service) as calls, running(agent):
        await until(lambda: agent.terms, "it is registered")
        url = f"/monitoring/workers/scale?node={host.name}"
        outside = await calls.post(f"{url}&target_workers=9")
        host.available_bytes = host.reserve_bytes
        beyond = await calls.post(f"{url}&target_workers=6")

    assert (outside.status_code, outside.json()["error"]["field"]) == (400, "target_workers")
    assert beyond.status_code == 409
    assert beyond.json()["error"]["metadata"] == {"needed_bytes": str(12 * 2**30), "room_bytes": "0"}
    assert host.applied == []


async def test_two_at_once_with_one_request_id_are_answered_alike_and_applied_once(service: kit.Fleet) -> None:
    agent, host = scripted(service)
    async with gateway(service) as first, gateway(service) as second, running(agent):
        await until(lambda: agent.terms, "it is registered")
        url = f"/monitoring/workers/scale?node={host.name}&target_workers=5&request_id=once"
        answers = await asyncio.gather(*(calls.post(url) for calls in (first, second) * 5))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(host.applied) == 1


async def test_a_leader_that_dies_costs_a_wait_and_no_second_application(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    agent, host = scripted(fleet)
    url = f"/monitoring/workers/scale?node={host.name}&target_workers=5&request_id=once"
    async with gateway(fleet) as calls, running(agent):
        await until(lambda: agent.terms, "it is registered")
        before = await calls.post(url)
        leader.kill()
        assert (await calls.get("/metrics")).status_code == 200
        after = await until_ok(calls, url)
        status = await calls.get("/monitoring/status", params={"node": host.name})

    assert before.json() == after.json()
    assert len(host.applied) == 1
    assert status.json()["nodes"][0]["state"] == "ready"


async def until_ok(calls: httpx.AsyncClient, url: str) -> httpx.Response:
    """As a caller does that was told to try again."""

    async def answered() -> httpx.Response | None:
        response = await calls.post(url)
        assert response.status_code in (200, 503), response.text
        return response if response.status_code == 200 else None

    found = await until(answered, "the new leader answers")
    assert isinstance(found, httpx.Response)
    return found
