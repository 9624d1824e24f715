"""When a pool's workers come back after they failed: exponential backoff with jitter, and what blocks them."""

import math
from collections.abc import Callable

from leasehold.core.node import model

#: Of the delay, at most so much is taken off by chance, so that hosts do not come back together.
JITTER = 0.25


class Restarts:
    """The backoff of one pool.

    Workers of a pool are alike, so the pool backs off as a whole. Failures of workers that were started before
    the last growth belong to the same wave (the broker went away, say) and do not make it grow again.
    `chance` gives numbers from 0 up to 1.
    """

    def __init__(self, policy: model.RestartPolicy, chance: Callable[[], float]) -> None:
        self.policy = policy
        self._chance = chance
        #: Since the last clean spell, waves counted once.
        self.failures = 0
        #: No start before.
        self.until = -math.inf
        #: Empty: nothing is in the way.
        self.blocked_reason = ""
        self._grown_at = -math.inf
        self._quick_exits = 0

    def failed(self, now: float, started_at: float) -> float | None:
        """A worker failed. Seconds until the next start if the backoff grew, None if it stays as it is."""
        if started_at < self._grown_at:
            return None
        if now - started_at >= self.policy.reset_after_seconds:
            self.failures = 0
        self.failures += 1
        doublings = min(self.failures - 1, 64)
        delay = min(self.policy.initial_seconds * 2.0**doublings, self.policy.max_seconds)
        delay *= 1.0 - JITTER * self._chance()
        self._grown_at = now
        self.until = now + delay
        return delay

    def ended_clean(self, now: float, started_at: float) -> float | None:
        """A worker ended by itself with code 0 and is started again at once, unless that goes round and round.

        Seconds until the next start if it does, None otherwise.
        """
        if now - started_at >= self.policy.clean_loop_seconds:
            self._quick_exits = 0
            return None
        self._quick_exits += 1
        return self.failed(now, started_at) if self._quick_exits > self.policy.clean_loop_exits else None

    def ran(self, now: float, started_at: float) -> bool:
        """A worker is running still; whether that ended the backoff: it began after the last failure."""
        is_clean_spell = started_at >= self._grown_at and now - started_at >= self.policy.reset_after_seconds
        if not is_clean_spell or not self.failures:
            return False
        self.failures = 0
        return True

    def clean_spell_at(self, started_at: float) -> float:
        """When a worker will have run long enough for `ran`; infinity if it cannot matter."""
        if not self.failures or started_at < self._grown_at:
            return math.inf
        return started_at + self.policy.reset_after_seconds

    def may_start(self, now: float) -> bool:
        """Whether neither a block nor the backoff is in the way."""
        return not self.blocked_reason and now >= self.until

    def clear(self) -> None:
        """Begin anew, as after a person has seen to it."""
        self.failures = self._quick_exits = 0
        self.until = self._grown_at = -math.inf
        self.blocked_reason = ""
