"""How a waiting acquire is woken: one gate for each, opened from any thread."""

import asyncio
import threading
from typing import Protocol


class Gate(Protocol):
    """Opened when the acquire behind it should look again. Opening it twice does no harm."""

    def open(self) -> bool:
        """Wake whoever waits. False if nobody can be woken any more: its event loop is closed."""
        ...


class ThreadGate:
    """For a thread that blocks."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> bool:
        """See `Gate`."""
        self._event.set()
        return True

    def wait(self, timeout_seconds: float | None) -> bool:
        """Block until it is opened, and shut it again; False if the time was up first."""
        is_open = self._event.wait(timeout_seconds)
        self._event.clear()
        return is_open


class LoopGate:
    """For a task of the running event loop."""

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def open(self) -> bool:
        """See `Gate`."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed, and its tasks are gone
            return False
        return True

    async def wait(self) -> None:
        """Suspend until it is opened, and shut it again."""
        await self._event.wait()
        self._event.clear()
