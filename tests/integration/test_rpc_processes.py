"""Servers and clients in processes of their own: signals, and a peer that is frozen."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import deaf
import grpc
import pytest
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.rpc import channel
from leasehold.rpc.server import Server

BUDGET_SERVICE = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]
REQUEST = budget_service_pb2.WatchBudgetRequest()

# Prints its address, and what happens to the stream that it serves.
SERVER = """
import asyncio, sys
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.observe import logs
from leasehold.rpc import server as servers
from leasehold.runtime.tasks import BackgroundTasks

class Budgets(budget_service_pb2_grpc.BudgetServiceServicer):
    async def WatchBudget(self, request, context):
        try:
            yield budget_service_pb2.WatchBudgetResponse()
            await draining.wait()
            print("draining", flush=True)
            if manner == "stubborn":
                await asyncio.Event().wait()
            await asyncio.sleep(0.3)  # work that a drain has to wait for
            yield budget_service_pb2.WatchBudgetResponse()
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise

async def fail():
    raise OSError("the disk of the ledger is gone")

async def main():
    global draining
    logs.configure("json")
    server = servers.Server(["127.0.0.1:0"], drain=servers.Drain(notice_seconds=0, grace_seconds=60))
    draining = server.draining
    service = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]
    server.add(budget_service_pb2_grpc.add_BudgetServiceServicer_to_server, Budgets(), service)
    await server.start()
    print(server.bound[0], flush=True)
    async with BackgroundTasks() as tasks:
        if manner == "failing":
            tasks.start(fail(), name="ledger")
        await servers.serve_until_signal(server, tasks)
    print("ended", flush=True)

manner = sys.argv[1]
asyncio.run(main())
"""

CLIENT = """
import asyncio, sys
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.rpc import channel

async def main():
    async with channel.open_channel(sys.argv[1]) as client:
        stub = budget_service_pb2_grpc.BudgetServiceStub(client)
        watch = stub.WatchBudget(budget_service_pb2.WatchBudgetRequest())
        await watch.read()
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def child(
    script: str, *arguments: str, prefix: Sequence[str] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, "-c", script, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()


async def settle() -> None:
    """Let the connection fall quiet, so that no ping of the last message's is still unanswered."""
    await asyncio.sleep(0.6)


async def open_watch(client: grpc.aio.Channel) -> Any:
    watch: Any = budget_service_pb2_grpc.BudgetServiceStub(client).WatchBudget(REQUEST)
    assert isinstance(await watch.read(), budget_service_pb2.WatchBudgetResponse)
    return watch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_the_server_and_ends_it_with_success(number: signal.Signals) -> None:
    async with child(SERVER, "willing") as server:
        async with channel.open_channel(await line_of(server)) as client:
            watch = await open_watch(client)
            server.send_signal(number)
            assert isinstance(await watch.read(), budget_service_pb2.WatchBudgetResponse)
            assert await watch.read() is grpc.aio.EOF
            assert await watch.code() is grpc.StatusCode.OK
        assert [await line_of(server), await line_of(server)] == ["draining", "ended"]
        assert await asyncio.wait_for(server.wait(), 10) == 0


async def test_a_server_that_inherited_signals_as_ignored_and_blocked_is_drained_by_them() -> None:
    async with child(SERVER, "willing", prefix=deaf.PREFIX) as server:
        await line_of(server)
        server.send_signal(signal.SIGTERM)
        assert await line_of(server) == "ended"
        assert await asyncio.wait_for(server.wait(), 10) == 0


async def test_a_second_signal_ends_at_once_what_would_not_drain() -> None:
    async with child(SERVER, "stubborn") as server, channel.open_channel(await line_of(server)) as client:
        watch = await open_watch(client)
        server.send_signal(signal.SIGTERM)
        assert await line_of(server) == "draining"  # and there it stays, for a grace of 60 s
        server.send_signal(signal.SIGTERM)
        assert [await line_of(server), await line_of(server)] == ["cancelled", "ended"]
        assert await asyncio.wait_for(server.wait(), 10) == 0
        assert await watch.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_background_task_that_fails_ends_the_service_with_an_error() -> None:
    async with child(SERVER, "failing") as server:
        _, told = await asyncio.wait_for(server.communicate(), 20)
        assert server.returncode == 1
        assert b"background_task_failed" in told
        assert b"server_draining" in told
        assert b"OSError: the disk of the ledger is gone" in told


async def test_a_frozen_server_is_noticed_by_its_client_within_about_two_seconds() -> None:
    async with child(SERVER, "willing") as server, channel.open_channel(await line_of(server)) as client:
        watch = await open_watch(client)
        await settle()
        server.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async with asyncio.timeout(20):
                await watch.read()
        noticed_after_seconds = time.monotonic() - frozen_at
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert noticed_after_seconds < 3


async def test_a_frozen_client_is_noticed_by_its_server_within_about_two_seconds() -> None:
    opened, closed = asyncio.Event(), asyncio.Event()

    class Budgets(budget_service_pb2_grpc.BudgetServiceServicer):
        async def WatchBudget(self, request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                yield budget_service_pb2.WatchBudgetResponse()
                opened.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

    server = Server(["127.0.0.1:0"])
    server.add(
        budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
        Budgets(),  # type: ignore[abstract]  # the methods left out answer UNIMPLEMENTED
        BUDGET_SERVICE,
    )
    await server.start()
    try:
        async with child(CLIENT, server.bound[0]) as client:
            await asyncio.wait_for(opened.wait(), 20)
            await settle()
            client.send_signal(signal.SIGSTOP)
            frozen_at = time.monotonic()
            await asyncio.wait_for(closed.wait(), 20)
            noticed_after_seconds = time.monotonic() - frozen_at
            assert noticed_after_seconds < 3
    finally:
        await server.stop_at_once()


async def test_after_a_freeze_the_channel_is_soon_usable_again() -> None:
    async with child(SERVER, "willing") as server, channel.open_channel(await line_of(server)) as client:
        watch = await open_watch(client)
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError):
            async with asyncio.timeout(20):
                await watch.read()
        server.send_signal(signal.SIGCONT)
        healed_at = time.monotonic()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await open_watch(client)
                    break
        usable_after_seconds = time.monotonic() - healed_at
        assert usable_after_seconds < 4
