"""Virtual time of a simulated world: one queue of events, and clocks that differ from true time."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Scheduler:
    """Runs actions in the order of their instants; true time, seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, instant: float, action: Action) -> None:
        """Run `action` at `instant`, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._heap, (max(instant, self.now), self._count, action))

    def after(self, seconds: float, action: Action) -> None:
        """Run `action` in `seconds`."""
        self.at(self.now + seconds, action)

    def run(self, until: float, *, steps_max: int | None = None) -> None:
        """Run what is due by `until`, at most up to step number `steps_max`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            if steps_max is not None and self.steps >= steps_max:
                return
            instant, _, action = heapq.heappop(heap)
            self.now = instant
            self.steps += 1
            action()
        self.now = until


class Clock:
    """A clock with an offset and a rate of its own, which may stand still while its machine is suspended.

    CLOCK_BOOTTIME goes on through a suspend and CLOCK_MONOTONIC does not. Only one direction is dangerous: a
    *holder* whose clock stands still believes in a lease that has expired for everybody else. So holders read
    CLOCK_BOOTTIME. An allocator whose clock stands still waits longer than it must, which is safe.
    """

    def __init__(self, *, offset: float, rate: float) -> None:
        self.rate = rate
        self._offset = offset
        self._stopped = 0.0

    def at(self, now: float) -> float:
        """Reading at true time `now`."""
        return self._offset + (now - self._stopped) * self.rate

    def when(self, reading: float) -> float:
        """True time of a reading, if the clock does not stand still before."""
        return (reading - self._offset) / self.rate + self._stopped

    def stand_still(self, seconds: float) -> None:
        """The last `seconds` of true time did not count."""
        self._stopped += seconds
