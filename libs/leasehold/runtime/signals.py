"""SIGTERM and SIGINT as asyncio events: the first asks for a drain, the second for an end at once."""

import asyncio
import signal
from types import TracebackType
from typing import Final, Self

from leasehold.observe import logs
from leasehold.runtime import interrupts

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_log = logs.get_logger(__name__)


class ShutdownSignals:
    """Turns signals into two events while the ``async with`` block runs; after it, signals act as by default.

    Must be entered on the main thread (`signal` allows no other). They are taken even where they were
    inherited as ignored or blocked.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
        self._signals = signals
        self.drain = asyncio.Event()
        self.immediate = asyncio.Event()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._received, number)
        interrupts.unblock(self._signals)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        if self.drain.is_set():
            _log.warning("stop_at_once_requested", signal=number.name)
            self.immediate.set()
        else:
            _log.info("drain_requested", signal=number.name)
            self.drain.set()
