"""The breaker of reclaims by timeout: when most holders fall silent together, it is not they who are dead.

It trips when, of 5 holders or more, over half have lapsed within 60 s. While it is open nothing is reclaimed by
timeout; what is proven goes on. It closes after a whole TTL in which at most half were late, or when an
operator acknowledges that the silence is real.
"""

import itertools
from collections import deque

HOLDERS_MIN = 5
WINDOW_SECONDS = 60.0

_NEVER = float("inf")


class Breaker:
    """Whether reclaims by timeout are held back. Times are the caller's monotonic clock, in seconds."""

    def __init__(self, ttl_seconds: float) -> None:
        self._ttl_seconds = ttl_seconds
        self._lapsed_at: deque[float] = deque()
        self._healthy_since = _NEVER
        self.is_open = False
        #: Of the last change.
        self.cause = ""

    @property
    def held_back_cause(self) -> str:
        """Why reclaims by timeout are held back; empty: they are not."""
        return self.cause if self.is_open else ""

    def restore(self, now: float, *, is_open: bool) -> None:
        """As an earlier leader left it."""
        self.is_open = is_open
        self.cause = "it was open when this leader began" if is_open else ""
        self._healthy_since = now

    def judge(self, now: float, *, holders: int, overdue: int) -> bool:
        """Look at `holders` that are live, `overdue` of them late by now. Whether it tripped or closed."""
        while self._lapsed_at and self._lapsed_at[0] <= now - WINDOW_SECONDS:
            self._lapsed_at.popleft()
        lapsed = overdue if self.is_open else overdue + len(self._lapsed_at)
        known = holders if self.is_open else holders + len(self._lapsed_at)
        is_sick = known >= HOLDERS_MIN and 2 * lapsed > known
        if not self.is_open:
            if is_sick:
                self.is_open, self._healthy_since = True, now
                self.cause = f"{lapsed} of {known} holders lapsed within {WINDOW_SECONDS:g} s"
            return is_sick
        if is_sick:
            self._healthy_since = _NEVER
        elif self._healthy_since == _NEVER:
            self._healthy_since = now
        if now < self._healthy_since + self._ttl_seconds:
            return False
        self._close(f"at most half of the holders were late for {self._ttl_seconds:g} s")
        return True

    def acknowledge(self, cause: str) -> None:
        """An operator says that those who are late are dead indeed."""
        self._close(cause)

    def lapsed(self, now: float, count: int) -> None:
        """So many holders are reclaimed by timeout."""
        self._lapsed_at.extend(itertools.repeat(now, count))

    def closes_at(self) -> float:
        """When `judge` may close it; infinity: not by time alone."""
        return self._healthy_since + self._ttl_seconds if self.is_open else _NEVER

    def _close(self, cause: str) -> None:
        self.is_open, self.cause = False, cause
        self._healthy_since = _NEVER
        self._lapsed_at.clear()
