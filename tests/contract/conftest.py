"""Both clusters that the etcd contract is tried on."""

import uuid
from collections.abc import AsyncIterator

import pytest
from etcd_world import World
from leasehold.etcd import adapter, clock, memory, port, settings

OPS_MAX = 128


@pytest.fixture
async def twin() -> AsyncIterator[World]:
    manual = clock.ManualClock()
    cluster = memory.MemoryCluster(manual, txn_ops_max=OPS_MAX)

    async def connect() -> port.EtcdPort:
        return cluster.connect()

    world = World("/t/", manual, connect)
    yield world
    await world.close()


@pytest.fixture
async def real(etcd_server: str) -> AsyncIterator[World]:
    async def connect() -> port.EtcdPort:
        # Small pages, so that paging is exercised.
        return await adapter.connect(
            [etcd_server], settings=settings.Settings(page_records=3, txn_ops_max=4096)
        )

    world = World(f"/test/{uuid.uuid4().hex}/", clock.SystemClock(), connect)
    yield world
    await world.close()


@pytest.fixture(params=["twin", "real"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def etcd(world: World) -> port.EtcdPort:
    return await world.connect()


@pytest.fixture
def key(world: World) -> str:
    return f"{world.prefix}key"
