"""Clocks. Nothing that decides about a lease reads a wall clock, and none of these can be set back."""

import time
from typing import Protocol

from leasehold.core import errors


class Clock(Protocol):
    """Seconds since an unspecified instant; it never goes back. Compare only readings of one clock."""

    def now(self) -> float:
        """The present reading, in seconds."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC: stands still while the host is suspended. The allocator's clock."""

    def now(self) -> float:
        """Seconds; the same origin for all processes of one boot and time namespace."""
        return time.monotonic()


class BootClock:
    """CLOCK_BOOTTIME: goes on while the host is suspended. A holder's clock.

    A laptop that slept through its lease must find it expired, whatever its monotonic clock says.
    """

    def now(self) -> float:
        """Seconds since boot."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class ManualClock:
    """A clock that moves only when told, for tests and simulation."""

    def __init__(self, now_seconds: float = 0.0) -> None:
        self._now_seconds = now_seconds

    def now(self) -> float:
        """The seconds that it was last told."""
        return self._now_seconds

    def advance(self, seconds: float) -> float:
        """Move on by `seconds` and return the new reading. Raises `InvalidArgument` on a step back or NaN."""
        if not seconds >= 0:
            raise errors.InvalidArgument(f"a clock cannot move by {seconds} s", field="seconds")
        self._now_seconds += seconds
        return self._now_seconds
