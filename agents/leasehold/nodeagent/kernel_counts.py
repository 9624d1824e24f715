"""Small figures of the kernel: OOM kills, and times as /proc tells them."""

import os
import time
from pathlib import Path

#: From an OOM kill to the death of the process that is seen: taking its memory down takes a while.
SETTLE_SECONDS = 2.0


def host_oom_kills() -> int | None:
    """Processes that the OOM killer has ended on this host since its boot; None: the kernel does not tell."""
    try:
        table = Path("/proc/vmstat").read_bytes()
    except OSError:
        return None
    for line in table.splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return None


def ticks_now() -> int:
    """The present, as start times in /proc are told."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def uptime_seconds(start_time_ticks: int) -> float:
    """How long ago a process of this boot was started, by its start time."""
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0.0, since_boot - start_time_ticks / os.sysconf("SC_CLK_TCK"))


class SettledCounter:
    """A counter of OOM kills, told only once it has stood for a while.

    The count grows before the process that is meant is dead. If it was the worker's main process, the kill is
    told with its end and not apart.
    """

    def __init__(self, value: int) -> None:
        self._settled = value
        #: When it grew, and to what; oldest first.
        self._fresh: list[tuple[float, int]] = []

    def observe(self, now: float, value: int) -> None:
        """Note what the counter says now."""
        last = self._fresh[-1][1] if self._fresh else self._settled
        if value != last:
            self._fresh.append((now, value))

    def settled(self, now: float) -> int:
        """What it says, leaving out the last moment."""
        while self._fresh and now - self._fresh[0][0] >= SETTLE_SECONDS:
            self._settled = self._fresh.pop(0)[1]
        return self._settled
