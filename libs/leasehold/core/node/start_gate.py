"""Starts of a host's workers, spaced and shared out fairly between its pools."""

import math


class StartGate:
    """Lets one worker of the host start each `spacing_seconds`, the pools that wait in turn.

    A pool that has started one goes to the end of the line, so one that starts for ever has at most every
    second start while another waits.
    """

    def __init__(self, spacing_seconds: float = 1.0) -> None:
        self.spacing_seconds = spacing_seconds
        self._open_at = -math.inf
        self._waiting: list[str] = []

    def ask(self, pool: str, now: float) -> bool:
        """Whether `pool` may start one now; else it waits in line."""
        if pool not in self._waiting:
            self._waiting.append(pool)
        if now < self._open_at or self._waiting[0] != pool:
            return False
        self._waiting.pop(0)
        self._open_at = now + self.spacing_seconds
        return True

    def withdraw(self, pool: str) -> None:
        """The pool wants to start none now."""
        if pool in self._waiting:
            self._waiting.remove(pool)

    def opens_at(self, pool: str) -> float:
        """When it is worth asking again."""
        position = self._waiting.index(pool) if pool in self._waiting else len(self._waiting)
        return self._open_at + position * self.spacing_seconds
