"""Calls find the leader, over real connections."""

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.observe import causes
from leasehold.rpc import leader
from leasehold.rpc.server import Server
from leasehold.runtime import retry

BUDGET_SERVICE = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]


class Allocator(budget_service_pb2_grpc.BudgetServiceServicer):
    """Leads, or answers with the error that it is set to."""

    def __init__(self) -> None:
        self.failure: errors.LeaseholdError | None = None
        self.leads_from_call = 1
        self.calls = 0
        self.causes: list[str | None] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def GetBudget(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.causes.append(causes.current())
        if self.failure is not None and self.calls < self.leads_from_call:
            raise self.failure
        await self.answers.wait()
        return budget_service_pb2.GetBudgetResponse()


class Fleet:
    def __init__(self) -> None:
        self.allocators: list[Allocator] = []
        self.servers: list[Server] = []

    async def add(self) -> tuple[Allocator, str]:
        allocator = Allocator()  # type: ignore[abstract]  # the methods left out answer UNIMPLEMENTED
        server = Server(["127.0.0.1:0"])
        server.add(budget_service_pb2_grpc.add_BudgetServiceServicer_to_server, allocator, BUDGET_SERVICE)
        await server.start()
        self.servers.append(server)
        return allocator, server.bound[0]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet()
    yield made
    for server in made.servers:
        await server.stop_at_once()


def never_leads(allocator: Allocator, failure: errors.LeaseholdError) -> None:
    allocator.failure, allocator.leads_from_call = failure, 1_000_000


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def connect(*addresses: str) -> leader.LeaderChannel:
    backoff = retry.Backoff(initial_seconds=0.02, max_seconds=0.1)
    return leader.LeaderChannel(addresses, backoff=backoff, rng=random.Random(1))


async def get(channel: leader.LeaderChannel, timeout_seconds: float = 10.0) -> Any:
    def method(client: grpc.aio.Channel) -> Any:
        return budget_service_pb2_grpc.BudgetServiceStub(client).GetBudget

    return await channel.call(
        method, budget_service_pb2.GetBudgetRequest(name="openai"), timeout_seconds=timeout_seconds
    )


async def test_a_follower_sends_the_caller_to_a_leader_that_was_not_listed(fleet: Fleet) -> None:
    follower, follower_address = await fleet.add()
    leading, leader_address = await fleet.add()
    never_leads(follower, errors.NotLeader(leader_address))
    async with connect(follower_address) as channel:
        await get(channel)
        assert channel.leader_address == leader_address
        await get(channel)  # stays with it
    assert (follower.calls, leading.calls) == (1, 2)


async def test_a_server_that_is_away_is_passed_over(fleet: Fleet) -> None:
    leading, leader_address = await fleet.add()
    async with connect(free_address(), leader_address) as channel:
        await get(channel)
    assert leading.calls == 1


async def test_it_waits_while_there_is_no_leader(fleet: Fleet) -> None:
    allocator, address = await fleet.add()
    allocator.failure, allocator.leads_from_call = errors.NotLeader(""), 4
    async with connect(address) as channel:
        await get(channel)
    assert allocator.calls == 4


async def test_two_that_name_each_other_are_not_asked_in_a_tight_circle(fleet: Fleet) -> None:
    first, first_address = await fleet.add()
    second, second_address = await fleet.add()
    never_leads(first, errors.NotLeader(second_address))
    never_leads(second, errors.NotLeader(first_address))
    async with connect(first_address, second_address) as channel:
        with pytest.raises(errors.NotLeader):
            await get(channel, timeout_seconds=1.0)
    # At most ten rounds of 0.1 s, NOT_LEADER's own delay, of five calls each.
    assert first.calls + second.calls <= 50


@pytest.mark.parametrize("hint", ["no address", "unix:", "a b:1"])
async def test_a_hint_that_is_no_address_is_passed_over(fleet: Fleet, hint: str) -> None:
    allocator, address = await fleet.add()
    allocator.failure, allocator.leads_from_call = errors.NotLeader(hint), 2
    async with connect(address) as channel:
        await get(channel)
    assert allocator.calls == 2


async def test_an_answer_that_no_retry_helps_is_raised_as_it_is(fleet: Fleet) -> None:
    allocator, address = await fleet.add()
    never_leads(allocator, errors.NotFound("there is no budget openai"))
    async with connect(address) as channel:
        with pytest.raises(errors.NotFound, match="there is no budget openai"):
            await get(channel)
    assert allocator.calls == 1


async def test_where_nobody_answers_the_error_says_who_was_asked_and_comes_in_time() -> None:
    first, second = free_address(), free_address()
    began = time.monotonic()
    async with connect(first, second) as channel:
        with pytest.raises(errors.Unavailable) as failure:
            await get(channel, timeout_seconds=1.0)
    assert time.monotonic() - began < 3
    assert f"{first}, {second}" in str(failure.value)
    assert "within 1 s" in str(failure.value)


async def test_a_leader_that_does_not_answer_in_time_is_told_as_such(fleet: Fleet) -> None:
    allocator, address = await fleet.add()
    allocator.answers.clear()
    async with connect(address) as channel:
        with pytest.raises(errors.DeadlineExceeded):
            await get(channel, timeout_seconds=0.5)
    assert allocator.calls == 1


async def test_the_cause_goes_with_the_call(fleet: Fleet) -> None:
    allocator, address = await fleet.add()
    with causes.bound("cli-9"):
        async with connect(address) as channel:
            await get(channel)
    assert allocator.causes == ["cli-9"]


async def test_no_address_is_refused_by_name() -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        connect()
    assert refusal.value.field == "address"
