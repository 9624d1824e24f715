"""Allocators as real processes, calls to them, and a proxy to cut them off: for the tests of the service."""

import asyncio
import contextlib
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from leasehold.core.budget import codec, quantity
from leasehold.devstack import ports
from leasehold.rpc import budget_codec
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.runtime import clock as clocks

LIVE = wire.HOLDER_STATE_LIVE
SUSPECT = wire.HOLDER_STATE_SUSPECT

CLOCK = clocks.BootClock()
MICRO = quantity.MICRO
DEADLINE_SECONDS = 60.0


def now() -> float:
    """Seconds on the holders' clock."""
    return CLOCK.now()


async def until(
    condition: Callable[[], Any], what: str, *, seconds: float = DEADLINE_SECONDS, pause: float = 0.01
) -> Any:
    """Poll until the condition, which may be a coroutine function, is true; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(pause)


def tell(figures: str) -> None:
    """Print a figure that was measured, for those who run with -s."""
    print(figures)  # noqa: T201


def budget(name: str = "llm", **fields: Any) -> budget_pb2.Budget:
    """A budget with short times: TTL 1.5 s, refresh 0.2 s, window 2 s."""
    definition: dict[str, Any] = {
        "name": name,
        "dimensions": {"max_concurrent_requests": 40, "rpm_limit": 800},
        "ttl_seconds": 1.5,
        "refresh_seconds": 0.2,
        "window_seconds": 2.0,
        "arrival_jitter_seconds": 0.2,
        "max_call_seconds": 1.0,
        "orphan_seconds": 0.0,
        **fields,
    }
    return budget_codec.encode_budget(codec.decode_budget(definition))


# Processes.


class AllocatorProcess:
    """One `python -m leasehold.allocator`; `kill`, `freeze` and `thaw` send the signals of those names."""

    def __init__(self, folder: Path, env: Mapping[str, str], number: int) -> None:
        self.port = ports.free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.log_path = folder / f"allocator-{number}.log"
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self.flags: list[str] = []
        #: What is run; a test may have something run that misbehaves.
        self.program = ["-m", "leasehold.allocator"]

    def start(self, *flags: str) -> None:
        self.flags = list(flags)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self.program, "--listen", self.address, *flags],
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it has not been started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> float:
        """SIGKILL, and the instant of it."""
        self.process.kill()
        at = now()
        self.process.wait()
        return at

    def freeze(self) -> float:
        self.process.send_signal(signal.SIGSTOP)
        return now()

    def thaw(self) -> float:
        self.process.send_signal(signal.SIGCONT)
        return now()

    async def terminate(self, seconds: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return await self.wait(seconds)

    async def wait(self, seconds: float = 30.0) -> int:
        """The exit code, once it has ended."""
        await until(lambda: self.process.poll() is not None, f"{self.address} ends", seconds=seconds)
        return int(self.process.returncode)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def logged_at(self, event: str) -> float:
        """When it last logged `event`, on the holders' clock."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        told = [line["timestamp"] for line in lines if line["event"] == event]
        wall = datetime.datetime.fromisoformat(told[-1]).timestamp()
        return wall - time.time() + now()

    def end(self) -> None:
        if self.is_running:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


class Fleet:
    """Allocators of one installation, and calls to them."""

    def __init__(self, folder: Path, *, etcd: str, dsn: str, prefix: str, size: int = 1, **env: str) -> None:
        self._env = {
            "LEASEHOLD_ETCD_ENDPOINTS": etcd,
            "LEASEHOLD_POSTGRES_DSN": dsn,
            "LEASEHOLD_ETCD_PREFIX": prefix,
            "LEASEHOLD_ETCD_TXN_OPS_MAX": "4096",
            "LEASEHOLD_ELECTION_TTL_SECONDS": "1",
            **env,
        }
        self._folder = folder
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.members: list[AllocatorProcess] = []
        for _ in range(size):
            self.add()

    @classmethod
    def attached(cls, member: AllocatorProcess) -> "Fleet":
        """Calls to an allocator that somebody else starts and ends."""
        fleet = cls(member.log_path.parent, etcd="", dsn="", prefix="", size=0)
        fleet.members.append(member)
        return fleet

    def add(self, **env: str) -> AllocatorProcess:
        """One more, not started; `env` stands above what all share."""
        member = AllocatorProcess(self._folder, {**self._env, **env}, len(self.members))
        self.members.append(member)
        return member

    @property
    def addresses(self) -> list[str]:
        return [member.address for member in self.members]

    async def start(self, *flags: str) -> AllocatorProcess:
        """Start all, and return the leader once budgets can be changed."""
        for member in self.members:
            member.start(*flags)
        for member in self.members:
            await until(functools.partial(self._answers, member), f"{member.address} answers")
        return await self.ready()

    async def _answers(self, member: AllocatorProcess) -> bool:
        try:
            await self.call("ListBudgets", wire.ListBudgetsRequest(), at=member, seconds=0.5)
        except errors.NotLeader:
            return True
        except errors.LeaseholdError:
            return False
        return True

    async def ready(self, *, seconds: float = DEADLINE_SECONDS) -> AllocatorProcess:
        leader = await self.leader(seconds=seconds)
        await until(
            lambda: self._is_synchronized(leader), "Postgres's definitions are in force", seconds=seconds
        )
        return leader

    async def leader(
        self, *, other_than: AllocatorProcess | None = None, seconds: float = DEADLINE_SECONDS
    ) -> AllocatorProcess:
        """Whoever answers as the leader."""

        async def found() -> AllocatorProcess | None:
            for member in self.members:
                if member is other_than or not member.is_running:
                    continue
                with contextlib.suppress(errors.LeaseholdError):
                    await self.call("ListBudgets", wire.ListBudgetsRequest(), at=member, seconds=0.5)
                    return member
            return None

        try:
            leader: AllocatorProcess = await until(found, "an allocator leads", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(m.log()[-2000:] for m in self.members)) from None
        return leader

    async def _is_synchronized(self, leader: AllocatorProcess) -> bool:
        # A deletion of what is not there changes nothing.
        try:
            await self.call("DeleteBudget", wire.DeleteBudgetRequest(name="none"), at=leader)
        except errors.NotFound:
            return True
        except errors.Unavailable:
            return False
        return True

    def channel(self, member: AllocatorProcess | str) -> grpc.aio.Channel:
        address = member if isinstance(member, str) else member.address
        if address not in self._channels:
            self._channels[address] = channels.open_channel(address, has_own_connection=True)
        return self._channels[address]

    def stub(self, member: AllocatorProcess | str) -> Any:
        return wire_grpc.BudgetServiceStub(self.channel(member))

    async def call(
        self, method: str, request: Any, *, at: AllocatorProcess | str | None = None, seconds: float = 5.0
    ) -> Any:
        """Call a unary method, on the leader if no other is named. Raises core errors."""
        target = at if at is not None else await self.leader()
        try:
            return await getattr(self.stub(target), method)(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            # grpc.aio's own failure, seen once in some thousand calls: asked again once, as a client would.
            if error.details() != "Internal error from Core":
                raise rpc_errors.from_rpc_error(error) from error
        try:
            return await getattr(self.stub(target), method)(request, timeout=seconds)
        except grpc.RpcError as error:
            raise rpc_errors.from_rpc_error(error) from error

    async def put(self, definition: budget_pb2.Budget, **fields: Any) -> budget_pb2.Budget:
        answer = await self.call("PutBudget", wire.PutBudgetRequest(budget=definition, **fields))
        return answer.budget  # type: ignore[no-any-return]

    async def snapshot(
        self, name: str = "llm", *, at: AllocatorProcess | None = None
    ) -> wire.WatchBudgetResponse:
        """The budget now, as a watcher sees it."""
        target = at if at is not None else await self.leader()
        watch = self.stub(target).WatchBudget(wire.WatchBudgetRequest(budget=name), timeout=5.0)
        try:
            answer = await read(watch)
            assert isinstance(answer, wire.WatchBudgetResponse)
            return answer
        finally:
            watch.cancel()

    async def close_channels(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def close(self) -> None:
        await self.close_channels()
        for member in self.members:
            member.end()


async def read(stream: Any) -> Any:
    """The next message of a stream. Raises core errors."""
    try:
        return await stream.read()
    except grpc.RpcError as error:
        raise rpc_errors.from_rpc_error(error) from error


# A proxy.


class Proxy:
    """A loopback TCP proxy that can be cut (connections closed, none accepted) and muted (bytes withheld)."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._is_cut = False
        self.delay_seconds = 0.0
        self.address = ""

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._end_all()

    async def cut(self) -> float:
        """Close every connection and accept none; the instant of it."""
        self._is_cut = True
        await self._end_all()
        return now()

    def mend(self) -> None:
        self._is_cut = False
        self._open.set()

    def mute(self) -> float:
        """Let no byte through in either direction; connections stay open."""
        self._open.clear()
        return now()

    async def _end_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        other: asyncio.StreamWriter | None = None
        try:
            if not self._is_cut:
                back, other = await asyncio.open_connection(*self._target)
                await asyncio.gather(self._pump(reader, other), self._pump(back, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for each in (writer, other):
                if each is not None:
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError
