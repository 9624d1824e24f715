"""What a worker owns of a budget, and who is told when it changes."""

import asyncio
import enum
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from leasehold.core.budget import holder as holders
from leasehold.core.budget import quantity
from leasehold.observe import logs

_log = logs.get_logger(__name__)

#: Changes that wait for a callback that is slower than they come; beyond this the oldest are left out.
_PENDING_MAX: Final = 1_000


class AllocationState(enum.StrEnum):
    """Where a worker stands with its lease."""

    JOINING = "joining"
    HELD = "held"
    EXPIRED = "expired"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A worker's share of a budget at one instant."""

    #: Units by dimension: whole window's units of a rate, calls at a time, slots.
    amounts: Mapping[str, float] = field(default_factory=dict)
    #: Workers registered with the budget, and those of them that are active.
    total_workers: int = 0
    active_workers: int = 0
    #: One line for people, such as "800 rpm = all of it: the only active worker".
    reason: str = ""
    state: AllocationState = AllocationState.JOINING


#: Called with each change; what it returns is passed over, or awaited if it can be.
Callback = Callable[[Allocation], object]


def of_change(change: holders.AllocationChanged) -> Allocation:
    """The change in units, as users see it."""
    return Allocation(
        amounts={name: quantity.to_units(micros) for name, micros in change.amounts.items()},
        total_workers=change.total_workers,
        active_workers=change.active_workers,
        reason=change.reason,
        state=AllocationState(change.state.value),
    )


class Subscription(Protocol):
    """Delivers allocations, each once and in order, without holding up who publishes them."""

    def publish(self, allocation: Allocation) -> None:
        """Take the next one."""
        ...


class LoopSubscription:
    """Calls back on the event loop in which it was made; one call ends before the next begins."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._pending: deque[Allocation] = deque(maxlen=_PENDING_MAX)
        self._task: asyncio.Task[None] | None = None

    def publish(self, allocation: Allocation) -> None:
        """See `Subscription`; nothing is delivered once the loop is closed."""
        self._pending.append(allocation)
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            self._pending.clear()

    def _drain(self) -> None:
        if self._task is None and self._pending:
            self._task = self._loop.create_task(self._deliver(), name="leasehold-allocation-callback")

    async def _deliver(self) -> None:
        try:
            while self._pending:
                try:
                    result = self._callback(self._pending.popleft())
                    if inspect.isawaitable(result):
                        await result
                except Exception:  # noqa: BLE001  the user's own fault: theirs to see, no reason to stop leasing
                    _log_failure(self._callback)
        finally:
            self._task = None


class ThreadSubscription:
    """Calls back on a thread of its own, which ends when there is nothing to tell; awaitables run there too."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self._pending: deque[Allocation] = deque(maxlen=_PENDING_MAX)
        self._lock = threading.Lock()
        self._is_running = False

    def publish(self, allocation: Allocation) -> None:
        """See `Subscription`."""
        with self._lock:
            self._pending.append(allocation)
            if self._is_running:
                return
            self._is_running = True
        threading.Thread(target=self._deliver, name="leasehold-allocation-callback", daemon=True).start()

    def _deliver(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._is_running = False
                    return
                allocation = self._pending.popleft()
            try:
                result = self.callback(allocation)
                if inspect.isawaitable(result):
                    asyncio.run(_awaited(result))
            except Exception:  # noqa: BLE001  the user's own fault: theirs to see, no reason to stop leasing
                _log_failure(self.callback)


async def _awaited(result: Awaitable[object]) -> None:
    await result


def _log_failure(callback: Callback) -> None:
    _log.exception("allocation_callback_failed", callback=getattr(callback, "__qualname__", repr(callback)))


def subscription_of(callback: Callback) -> Subscription:
    """On the running event loop if there is one, else on a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return ThreadSubscription(callback)
    return LoopSubscription(callback)
