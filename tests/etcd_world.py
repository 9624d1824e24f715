"""A cluster of the etcd contract's tests: the in-memory twin, or a real server."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from leasehold.etcd import clock, port

T = TypeVar("T")


class World:
    """A cluster, real or not: clients at will, a prefix of this test's own, and time."""

    def __init__(
        self, prefix: str, clock_: clock.Clock, connect: Callable[[], Awaitable[port.EtcdPort]]
    ) -> None:
        self.prefix = prefix
        self.clock = clock_
        self._connect = connect
        self._stack = contextlib.AsyncExitStack()

    async def connect(self) -> port.EtcdPort:
        etcd = await self._connect()
        self._stack.push_async_callback(etcd.close)
        return etcd

    async def close(self) -> None:
        await self._stack.aclose()

    async def within(self, seconds: float, action: Awaitable[T]) -> T:
        """The action's result; it must be done before so much of the world's time has passed."""
        task = asyncio.ensure_future(action)
        if isinstance(self.clock, clock.ManualClock):
            for _ in range(round(seconds * 10)):
                if not task.done():
                    await self.clock.advance(0.1)
        return await asyncio.wait_for(task, seconds)

    async def events(self, watch: AsyncGenerator[port.WatchEvent, None], count: int) -> list[port.WatchEvent]:
        return [await self.within(10, anext(watch)) for _ in range(count)]
