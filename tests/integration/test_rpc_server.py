"""The server scaffold over real connections."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_requests.aio import AsyncClient
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.rpc import channel, options
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc.server import Drain, Server

BUDGET_SERVICE = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Budgets(budget_service_pb2_grpc.BudgetServiceServicer):
    """One method waits until it is let go, one stream lasts until the server drains."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.let_go = asyncio.Event()
        self.draining = asyncio.Event()

    async def GetBudget(self, request: Any, context: Any) -> Any:
        self.entered.set()
        await self.let_go.wait()
        return budget_service_pb2.GetBudgetResponse()

    async def WatchBudget(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield budget_service_pb2.WatchBudgetResponse()
        await self.draining.wait()


def make_budgets() -> Budgets:
    return Budgets()  # type: ignore[abstract]  # the methods left out answer UNIMPLEMENTED


def make_server(listen: str = "127.0.0.1:0", budgets: Budgets | None = None, **given: Any) -> Server:
    server = Server([listen], **given)
    server.add(
        budget_service_pb2_grpc.add_BudgetServiceServicer_to_server, budgets or make_budgets(), BUDGET_SERVICE
    )
    return server


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[str]:
    await server.start()
    try:
        yield server.bound[0]
    finally:
        await server.stop_at_once()


async def check(address: str, service: str = "") -> int:
    async with channel.open_channel(address) as client:
        answer = await health_pb2_grpc.HealthStub(client).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=5
        )
    status: int = answer.status
    return status


async def test_a_stranger_finds_every_service_by_reflection() -> None:
    async with running(make_server()) as address:
        client = AsyncClient(address)
        assert set(await client._get_service_names()) == {
            "leasehold.api.budget.v1.BudgetService",
            "grpc.health.v1.Health",
            "grpc.channelz.v1.Channelz",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        answer = await client.request("grpc.health.v1.Health", "Check", {})
        assert answer == {"status": "SERVING"}


async def test_channelz_counts_the_calls_of_this_server() -> None:
    async with running(make_server()) as address:
        await check(address)
        async with channel.open_channel(address) as client:
            answer = await channelz_pb2_grpc.ChannelzStub(client).GetServers(channelz_pb2.GetServersRequest())
        assert any(each.data.calls_succeeded >= 1 for each in answer.server)


async def test_health_tells_of_each_service_and_of_a_stranger() -> None:
    server = make_server()
    async with running(server) as address:
        assert await check(address) == SERVING
        assert await check(address, BUDGET_SERVICE.full_name) == SERVING
        server.set_serving(BUDGET_SERVICE, False)
        assert await check(address, BUDGET_SERVICE.full_name) == NOT_SERVING
        assert await check(address) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await check(address, "no.such.Service")
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        async with channel.open_channel(address) as client:
            listed = await health_pb2_grpc.HealthStub(client).List(health_pb2.HealthListRequest())
        assert {name: each.status for name, each in listed.statuses.items()} == {
            "": SERVING,
            BUDGET_SERVICE.full_name: NOT_SERVING,
        }


async def test_drain_tells_health_first_then_lets_the_call_in_flight_finish() -> None:
    budgets = make_budgets()
    server = make_server(budgets=budgets, drain=Drain(notice_seconds=0.5, grace_seconds=20))
    order: list[str] = []
    server.on_drain(lambda: order.append("told"))
    async with running(server) as address, channel.open_channel(address) as client:
        stub = budget_service_pb2_grpc.BudgetServiceStub(client)
        in_flight = asyncio.ensure_future(stub.GetBudget(budget_service_pb2.GetBudgetRequest(), timeout=20))
        await budgets.entered.wait()
        watch = health_pb2_grpc.HealthStub(client).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING

        drain = asyncio.ensure_future(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        assert order == ["told"]
        assert await check(address) == NOT_SERVING  # a new call, within the notice
        assert await watch.read() is grpc.aio.EOF  # watches do not hold up the drain
        assert not drain.done()
        budgets.let_go.set()
        assert await in_flight == budget_service_pb2.GetBudgetResponse()
        await asyncio.wait_for(drain, 5)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await check(address)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_long_streams_end_when_they_are_told_of_the_drain() -> None:
    budgets = make_budgets()
    server = make_server(budgets=budgets, drain=Drain(notice_seconds=0, grace_seconds=60))
    budgets.draining = server.draining
    async with running(server) as address, channel.open_channel(address) as client:
        watch = budget_service_pb2_grpc.BudgetServiceStub(client).WatchBudget(
            budget_service_pb2.WatchBudgetRequest()
        )
        await watch.read()
        await asyncio.wait_for(server.drain(), 5)
        assert await watch.read() is grpc.aio.EOF
        assert await watch.code() is grpc.StatusCode.OK


async def test_calls_that_outlast_the_grace_are_cancelled() -> None:
    budgets = make_budgets()
    server = make_server(budgets=budgets, drain=Drain(notice_seconds=0, grace_seconds=0.2))
    async with running(server) as address, channel.open_channel(address) as client:
        stub = budget_service_pb2_grpc.BudgetServiceStub(client)
        in_flight = asyncio.ensure_future(stub.GetBudget(budget_service_pb2.GetBudgetRequest(), timeout=20))
        await budgets.entered.wait()
        await asyncio.wait_for(server.drain(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await in_flight
        assert refusal.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_callback_that_fails_does_not_keep_the_server_from_stopping() -> None:
    server = make_server(drain=Drain(notice_seconds=0, grace_seconds=1))
    told: list[int] = []
    server.on_drain(lambda: told.append(1 // 0))
    server.on_drain(lambda: told.append(2))
    async with running(server):
        await asyncio.wait_for(server.drain(), 5)
        await asyncio.wait_for(server.drain(), 5)  # a second one joins the first
    assert told == [2]


async def test_a_port_that_is_taken_names_port_holder_and_flag() -> None:
    async with running(make_server()) as address:
        port = address.rpartition(":")[2]
        for second in (address, f"localhost:{port}"):
            with pytest.raises(errors.FailedPrecondition) as refusal:
                await make_server(second, listen_flag="--allocator-listen").start()
            text = str(refusal.value)
            assert f"port {port}" in text
            assert f"(PID {os.getpid()})" in text
            assert "--allocator-listen" in text
            assert refusal.value.metadata["pid"] == str(os.getpid())
        assert await check(address) == SERVING


async def test_a_port_taken_on_one_half_of_localhost_only_is_taken() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        other.listen()
        with pytest.raises(errors.FailedPrecondition, match="is taken"):
            await make_server(f"localhost:{other.getsockname()[1]}").start()


async def test_an_address_of_another_host_is_refused_with_its_reason() -> None:
    with pytest.raises(errors.InvalidArgument, match="mutual TLS"):
        await make_server("192.0.2.1:7400").start()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "example.org:7400"])
async def test_an_open_address_without_mutual_tls_is_refused_naming_the_settings(listen: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        await make_server(listen).start()
    for named in ("tls_certificate_file", "tls_key_file", "tls_ca_file", "--listen", listen):
        assert named in str(refusal.value)
    assert refusal.value.field == "tls_ca_file"


async def test_a_failed_start_leaves_no_port_bound() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            first = f"127.0.0.1:{free.getsockname()[1]}"
        for second in (f"127.0.0.1:{other.getsockname()[1]}", first):
            with pytest.raises(errors.FailedPrecondition, match="is taken"):
                await Server([first, second]).start()
        async with running(make_server(first)) as address:
            assert await check(address) == SERVING


async def test_a_unix_socket_is_private_and_a_live_one_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    umask = os.umask(0)
    os.umask(umask)
    async with running(make_server(f"unix:{path}")) as address:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(errors.FailedPrecondition, match="running server"):
            await make_server(f"unix:{path}").start()
        assert await check(address) == SERVING
    assert os.umask(umask) == umask


async def test_a_unix_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    async with running(make_server(f"unix:{path}")) as address:
        assert await check(address) == SERVING


async def test_a_file_in_the_place_of_the_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(errors.FailedPrecondition, match="another kind of file"):
        await make_server(f"unix:{path}").start()
    assert path.read_text() == "data"
    with pytest.raises(errors.FailedPrecondition, match="folder does not exist"):
        await make_server(f"unix:{tmp_path}/missing/a.sock").start()


async def test_one_server_listens_on_several_addresses(tmp_path: Path) -> None:
    server = Server(["127.0.0.1:0", f"unix:{tmp_path}/a.sock"])
    async with running(server):
        assert [await check(address) for address in server.bound] == [SERVING, SERVING]


async def test_messages_and_metadata_above_the_limit_are_refused() -> None:
    async def code(call: Callable[[Any], Awaitable[Any]], address: str) -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(address) as client:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call(health_pb2_grpc.HealthStub(client))
        return refusal.value.code()

    transport = options.Transport(message_bytes_max=10_000, metadata_bytes_max=4_000)
    large = health_pb2.HealthCheckRequest(service="x" * 20_000)
    async with running(make_server(transport=transport)) as address:
        assert await code(lambda stub: stub.Check(large), address) is grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = await code(
            lambda stub: stub.Check(health_pb2.HealthCheckRequest(), metadata=(("a", "x" * 8_000),)), address
        )
        assert refused is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await check(address) == SERVING


async def test_calls_beyond_the_limit_of_the_server_are_refused_at_once() -> None:
    budgets = make_budgets()
    server = make_server(budgets=budgets, transport=options.Transport(concurrent_calls_max=2))
    async with running(server) as address, channel.open_channel(address) as client:
        stub = budget_service_pb2_grpc.BudgetServiceStub(client)
        request = budget_service_pb2.GetBudgetRequest()
        held = [asyncio.ensure_future(stub.GetBudget(request, timeout=20)) for _ in range(2)]
        await budgets.entered.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            while True:
                await stub.GetBudget(request, timeout=5)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        budgets.let_go.set()
        await asyncio.gather(*held)


async def test_a_call_begins_with_a_look_at_one_task_however_many_methods_there_are() -> None:
    async with running(make_server()) as address:
        assert await check(address) == SERVING
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    assert len([name for name in names if name.startswith("AioServer._request")]) == 1


@pytest.mark.parametrize("writes", [1, 2])
async def test_a_stream_whose_write_is_given_up_ends_with_its_error_and_is_not_left_open(writes: int) -> None:
    class GivingUp(budget_service_pb2_grpc.BudgetServiceServicer):
        """As a leader that loses its reign while it writes to a holder or an agent."""

        async def HoldLeases(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
            task = asyncio.current_task()
            assert task is not None
            for number in range(1, writes + 1):
                if number == writes:
                    # It is run once the write has begun, and before anything is heard of it.
                    asyncio.get_running_loop().call_soon(task.cancel)
                try:
                    await context.write(budget_service_pb2.HoldLeasesResponse())
                except asyncio.CancelledError:
                    task.uncancel()
                    raise errors.NotLeader("127.0.0.1:1") from None

    server = make_server(budgets=GivingUp())  # type: ignore[abstract, arg-type]
    async with running(server) as address, channel.open_channel(address) as client:
        call = budget_service_pb2_grpc.BudgetServiceStub(client).HoldLeases()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(5):
                while await call.read() is not grpc.aio.EOF:
                    pass
    assert isinstance(rpc_errors.from_rpc_error(caught.value), errors.NotLeader)
