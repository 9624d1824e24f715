"""Fleets of real allocators, on the shared etcd and Postgres, in corners of their own."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import allocator_kit
import pytest

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
