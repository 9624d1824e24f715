"""Orders through a real allocator: routed to the agent that is named, answered once, refused, audited."""

import asyncio
from typing import Any

import allocator_kit as kit
import pytest
from allocator_kit import until
from google.protobuf import duration_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.api.node.v1 import order_pb2, pool_pb2
from leasehold.core import errors
from leasehold.postgres import store
from leasehold.rpc import node_codec
from node_agents import Agent, ask, node_name, registration, running


def scale(workers: int = 4, order_id: str = "") -> order_pb2.Order:
    return order_pb2.Order(order_id=order_id, scale=order_pb2.ScaleOrder(workers=workers))


def ordered(node: str, order: order_pb2.Order, *, milliseconds: int = 5_000) -> wire.OrderNodeRequest:
    timeout = duration_pb2.Duration()
    timeout.FromMilliseconds(milliseconds)
    return wire.OrderNodeRequest(node=node, order=order, timeout=timeout)


async def test_an_order_reaches_the_agent_that_is_named_with_the_leaders_epoch(service: kit.Fleet) -> None:
    def obey(order: order_pb2.Order) -> order_pb2.OrderResult:
        pools = [pool_pb2.PoolStatus(name="transcription", desired=order.scale.workers)]
        return order_pb2.OrderResult(order_id=order.order_id, pools=pools)

    named, other = (Agent(service.addresses, registration(node_name()), obey=obey) for _ in range(2))
    async with running(named, other):
        await until(lambda: named.responses and other.responses, "both have registered")
        answer = await ask(service, "OrderNode", ordered(named.name, scale(3, "o-1")))
    (only,) = answer.answers
    assert (only.node, only.result.order_id) == (named.name, "o-1")
    assert only.result.pools[0].desired == 3
    (received,) = named.orders
    assert received.epoch == named.responses[0][1].epoch
    assert received.epoch.revision > 0
    assert other.orders == []


async def test_what_an_agent_refuses_is_the_status_of_the_call(service: kit.Fleet) -> None:
    refusal = errors.FailedPrecondition("4 workers of 6 GB are beyond memory", metadata={"free_bytes": "17"})

    def refuse(order: order_pb2.Order) -> order_pb2.OrderResult:
        return order_pb2.OrderResult(order_id=order.order_id, error=node_codec.encode_error(refusal))

    agent = Agent(service.addresses, registration(node_name()), obey=refuse)
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        with pytest.raises(errors.FailedPrecondition, match="beyond memory") as caught:
            await ask(service, "OrderNode", ordered(agent.name, scale()))
        assert caught.value.metadata == {"free_bytes": "17"}
        everyone = await ask(service, "OrderNode", ordered("*", scale()))
    (told,) = [answer.result.error for answer in everyone.answers if answer.node == agent.name]
    assert (told.reason, told.message) == ("FAILED_PRECONDITION", refusal.message)


async def test_every_node_that_has_a_stream_is_ordered_and_one_that_is_silent_is_told_among_the_answers(
    service: kit.Fleet,
) -> None:
    prefix = node_name()
    agents = [Agent(service.addresses, registration(f"{prefix}-{number}")) for number in range(3)]
    silent = Agent(service.addresses, registration(f"{prefix}-9"), obey=lambda _: None)
    async with running(*agents, silent):
        await until(lambda: all(agent.responses for agent in (*agents, silent)), "all have registered")
        answer = await ask(service, "OrderNode", ordered("*", scale(order_id="all"), milliseconds=600))
    ours = {each.node: each.result for each in answer.answers if each.node.startswith(prefix)}
    assert list(ours) == sorted(agent.name for agent in (*agents, silent))
    assert not any(ours[agent.name].HasField("error") for agent in agents)
    assert ours[silent.name].error.reason == "DEADLINE_EXCEEDED"


async def test_a_node_without_a_stream_is_unreachable_and_a_silent_one_exceeds_the_deadline(
    service: kit.Fleet,
) -> None:
    absent = registration(node_name())
    await ask(service, "ReportNode", wire.ReportNodeRequest(registration=absent))
    with pytest.raises(errors.NodeUnreachable) as caught:
        await ask(service, "OrderNode", ordered(absent.name, scale()))
    assert caught.value.metadata["node"] == absent.name
    silent = Agent(service.addresses, registration(node_name()), obey=lambda _: None)
    async with running(silent):
        await until(lambda: silent.responses, "it has registered")
        with pytest.raises(errors.DeadlineExceeded, match="order_id"):
            await ask(service, "OrderNode", ordered(silent.name, scale(order_id="o-2"), milliseconds=200))


async def test_a_repeat_of_an_order_under_way_joins_it_and_another_order_of_its_id_is_refused(
    service: kit.Fleet,
) -> None:
    agent = Agent(service.addresses, registration(node_name()), obey=lambda _: None)
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        calls = [
            asyncio.create_task(ask(service, "OrderNode", ordered(agent.name, scale(4, "o-3"))))
            for _ in range(3)
        ]
        await until(lambda: agent.orders, "the agent has it")
        with pytest.raises(errors.InvalidArgument) as caught:
            await ask(service, "OrderNode", ordered(agent.name, scale(5, "o-3")))
        assert caught.value.field == "order.order_id"
        agent.send(results=[order_pb2.OrderResult(order_id="o-3")])
        answers = await asyncio.gather(*calls)
    assert [answer.answers[0].result.order_id for answer in answers] == ["o-3"] * 3
    assert len(agent.orders) == 1


async def test_an_order_that_was_not_answered_is_told_again_on_the_next_stream(service: kit.Fleet) -> None:
    seen: list[str] = []

    def obey_the_second_time(order: order_pb2.Order) -> order_pb2.OrderResult | None:
        seen.append(order.order_id)
        return order_pb2.OrderResult(order_id=order.order_id) if len(seen) > 1 else None

    agent = Agent(service.addresses, registration(node_name()), obey=obey_the_second_time)
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        call = asyncio.create_task(ask(service, "OrderNode", ordered(agent.name, scale())))
        await until(lambda: seen, "the agent has it")
        agent.cut()
        answer = await call
    # Without an id of the caller's it has one of the allocator's, the same both times.
    assert len(seen) == 2
    assert seen[0] == seen[1] == answer.answers[0].result.order_id


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire.OrderNodeRequest(node="../x", order=scale()), "node"),
        (wire.OrderNodeRequest(node="n" * 300, order=scale()), "node"),
        (wire.OrderNodeRequest(node="x"), "order"),
        (wire.OrderNodeRequest(node="x", order=scale(order_id="i" * 65)), "order.order_id"),
        (wire.OrderNodeRequest(node="x", order=scale(order_id="tab\t")), "order.order_id"),
        (ordered("x", scale(), milliseconds=30_001), "timeout"),
        (ordered("x", scale(), milliseconds=0), "timeout"),
        (ordered("x", scale(), milliseconds=-1), "timeout"),
        (ordered("*", order_pb2.Order(read_log=order_pb2.ReadLogOrder(worker="a_1@x"))), "node"),
    ],
)
async def test_an_order_that_is_wrong_is_refused_by_field(
    service: kit.Fleet, request_: wire.OrderNodeRequest, field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await ask(service, "OrderNode", request_)
    assert caught.value.field == field


async def test_the_only_node_need_not_be_named_and_of_several_none_is_guessed(
    make_fleet: Any, postgres_dsn: str
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    with pytest.raises(errors.NotFound):
        await ask(fleet, "OrderNode", ordered("", scale()), at=leader)
    first, second = (Agent(fleet.addresses, registration(name)) for name in ("r620-1", "r620-2"))
    async with running(first):
        await until(lambda: first.responses, "it has registered")
        answer = await ask(fleet, "OrderNode", ordered("", scale(order_id="o-4")), at=leader)
        assert answer.answers[0].node == "r620-1"
        assert (await ask(fleet, "GetNode", wire.GetNodeRequest(), at=leader)).node.name == "r620-1"
        async with running(second):
            await until(lambda: second.responses, "the second has registered")
            with pytest.raises(errors.InvalidArgument, match="r620-1, r620-2"):
                await ask(fleet, "OrderNode", ordered("", scale()), at=leader)
            explain = order_pb2.Order(explain=order_pb2.ExplainOrder())
            await ask(fleet, "OrderNode", ordered("r620-1", explain), at=leader)
    # The audit log tells who registered and who ordered what; not what was only read.
    async with store.PostgresStore(postgres_dsn, deadline_seconds=10.0) as facts:

        async def told() -> list[Any]:
            page = await facts.list_audit(target="node/r620-1")
            return list(page.items) if len(page.items) >= 2 else []

        order, registered = await until(told, "the audit log tells both")
    assert (registered.method, order.method) == ("RegisterNode", "OrderNode")
    assert order.after == {"order": {"order_id": "o-4", "scale": {"workers": 4}}, "outcome": "OK"}
    assert order.actor.startswith("ipv4:127.0.0.1:")
    assert order.cause


# Logs.


class Log:
    """A worker's log that grows by a line with each order that reads it."""

    def __init__(self, lines: int, worker: str) -> None:
        self.lines = lines
        self.worker = worker
        self.cursors: list[str] = []

    def obey(self, order: order_pb2.Order) -> order_pb2.OrderResult:
        asked = order.read_log
        if asked.worker != self.worker:
            unknown = errors.NotFound(f"there is no worker {asked.worker}", field="worker")
            return order_pb2.OrderResult(order_id=order.order_id, error=node_codec.encode_error(unknown))
        self.cursors.append(asked.cursor)
        number = int(asked.cursor or 0)
        chunk = order_pb2.LogChunk(
            data=f"line {number}\n".encode(), cursor=str(number + 1), is_end=number + 1 == self.lines
        )
        return order_pb2.OrderResult(order_id=order.order_id, log=chunk)


async def test_a_log_is_followed_to_its_end_by_reading_on_from_each_cursor(service: kit.Fleet) -> None:
    name = node_name()
    log = Log(5, f"transcription_1@{name}")
    agent = Agent(service.addresses, registration(name), obey=log.obey)
    stub = wire_grpc.NodeServiceStub(service.channel(service.members[0]))
    async with running(agent):
        await until(lambda: agent.responses, "it has registered")
        # The node need not be named: the worker's name ends in it.
        followed = stub.FollowWorkerLog(wire.FollowWorkerLogRequest(worker=log.worker), timeout=10.0)
        data = b"".join([answer.chunk.data async for answer in followed])
        assert data == b"line 0\nline 1\nline 2\nline 3\nline 4\n"
        assert log.cursors == ["", "1", "2", "3", "4"]
        with pytest.raises(errors.NotFound, match="transcription_2"):
            await kit.read(
                stub.FollowWorkerLog(
                    wire.FollowWorkerLogRequest(worker=f"transcription_2@{name}"), timeout=10.0
                )
            )


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire.FollowWorkerLogRequest(worker="../../etc/passwd"), "worker"),
        (wire.FollowWorkerLogRequest(worker="a_1@../x"), "worker"),
        (wire.FollowWorkerLogRequest(node="../x", worker="a_1@x"), "node"),
        (wire.FollowWorkerLogRequest(worker="a_1@x", tail_lines=10_001), "tail_lines"),
    ],
)
async def test_a_log_that_is_asked_for_wrongly_is_refused_by_field(
    service: kit.Fleet, request_: wire.FollowWorkerLogRequest, field: str
) -> None:
    stub = wire_grpc.NodeServiceStub(service.channel(service.members[0]))
    with pytest.raises(errors.InvalidArgument) as caught:
        await kit.read(stub.FollowWorkerLog(request_, timeout=5.0))
    assert caught.value.field == field
