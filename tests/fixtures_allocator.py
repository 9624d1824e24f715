"""Fleets of real allocators, on the shared etcd and Postgres, in corners of their own."""

import urllib.parse
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import allocator_kit
import psycopg
import pytest
from psycopg import sql

MakeFleet = Callable[..., allocator_kit.Fleet]


@pytest.fixture
async def make_fleet(
    tmp_path: Path, etcd_prefix: str, request: pytest.FixtureRequest
) -> AsyncIterator[MakeFleet]:
    """Make a fleet; what is not given (etcd, dsn, prefix) is the session's. All are ended after the test."""
    fleets: list[allocator_kit.Fleet] = []

    def make(
        *, size: int = 1, etcd: str | None = None, dsn: str | None = None, **env: Any
    ) -> allocator_kit.Fleet:
        fleet = allocator_kit.Fleet(
            tmp_path,
            etcd=etcd or request.getfixturevalue("etcd_server"),
            dsn=dsn or request.getfixturevalue("postgres_dsn"),
            prefix=etcd_prefix,
            size=size,
            **env,
        )
        fleets.append(fleet)
        return fleet

    yield make
    for fleet in fleets:
        await fleet.close()


@pytest.fixture(scope="session")
def shared_allocator(
    etcd_server: str, postgres_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[allocator_kit.AllocatorProcess]:
    """An allocator that tests share which do it no harm; see `service`."""
    database = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(database)))
    fleet = allocator_kit.Fleet(
        tmp_path_factory.mktemp("allocator"),
        etcd=etcd_server,
        dsn=urllib.parse.urlsplit(postgres_server)._replace(path=f"/{database}").geturl(),
        prefix=f"/test/{uuid.uuid4().hex}/",
        size=1,
    )
    member = fleet.members[0]
    member.start()
    try:
        yield member
    finally:
        member.end()


@pytest.fixture
async def service(shared_allocator: allocator_kit.AllocatorProcess) -> AsyncIterator[allocator_kit.Fleet]:
    """Calls to the shared allocator, which leads; a test names its budgets by `budget_name`."""
    fleet = allocator_kit.Fleet.attached(shared_allocator)
    await fleet.ready()
    yield fleet
    await fleet.close_channels()


@pytest.fixture
def budget_name() -> str:
    """A name that no other test uses."""
    return f"b-{uuid.uuid4().hex[:12]}"
