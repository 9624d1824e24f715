"""Time as an input of this package: `runtime.clock`, and waiting for time to pass.

`SystemClock` is the real one, `ManualClock` stands still until a test moves it.
"""

import asyncio
from typing import Protocol

from leasehold.runtime import clock


class Clock(clock.Clock, Protocol):
    """A clock that can also be waited for."""

    async def sleep(self, seconds: float) -> None:
        """Returns once ``seconds`` have passed on this clock; at once, if not positive."""
        ...


class SystemClock(clock.MonotonicClock):
    """CLOCK_MONOTONIC and the event loop's timers."""

    async def sleep(self, seconds: float) -> None:
        """Sleeps in the event loop."""
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that moves by `advance` alone. Starts at 0."""

    # How many turns of the event loop let tasks that do no I/O come to rest; a turn costs about a microsecond.
    _SETTLING_TURNS = 50

    def __init__(self) -> None:
        self._now_seconds = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Seconds by which this clock was advanced so far."""
        return self._now_seconds

    async def sleep(self, seconds: float) -> None:
        """Returns once `advance` has moved the clock that far."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now_seconds + seconds, woken))
        await woken

    async def advance(self, seconds: float) -> None:
        """Moves the clock, stopping at each sleeper's instant on the way and letting the woken tasks run."""
        target = self._now_seconds + seconds
        await self.settle()
        while (instant := self._next_instant(target)) is not None:
            self._now_seconds = max(self._now_seconds, instant)
            for due, woken in self._sleepers:
                if due <= self._now_seconds:
                    woken.set_result(None)
            await self.settle()
        self._now_seconds = target
        await self.settle()

    async def settle(self) -> None:
        """Lets every task that waits for nothing but other tasks run until it waits for time or a caller."""
        for _ in range(self._SETTLING_TURNS):
            await asyncio.sleep(0)

    def _next_instant(self, target: float) -> float | None:
        self._sleepers = [(due, woken) for due, woken in self._sleepers if not woken.done()]
        return min((due for due, _ in self._sleepers if due <= target), default=None)
