"""AIMD on a provider's 429s: the limit that the provider really grants, learnt for all holders at once.

One provider event is seen by many workers: within max(1 s, retry_after) of a cut, further 429s are the same
event. A cut is to 70%, never below 10% of the defined limit; recovery is 5% of it a window, and begins when
what the provider asked to wait has passed.
"""

from dataclasses import dataclass

SCALE = 1_000_000
CUT = 700_000
FLOOR = 100_000
RECOVERY_PER_WINDOW = 50_000
RETRY_AFTER_SECONDS_MAX = 3600.0


@dataclass(slots=True)
class Throttle:
    """One dimension's factor, in millionths of the defined limit."""

    window_seconds: float
    factor: int = SCALE
    blind_until: float = float("-inf")
    recovered_at: float = 0.0

    def cut(self, now: float, retry_after_seconds: float) -> bool:
        """A 429 arrived; whether it lowered the factor."""
        if now < self.blind_until:
            return False
        quiet = max(1.0, min(retry_after_seconds, RETRY_AFTER_SECONDS_MAX))
        self.blind_until = now + quiet
        self.recovered_at = now + quiet
        before = self.factor
        self.factor = max(FLOOR, self.factor * CUT // SCALE)
        return self.factor < before

    def recover(self, now: float) -> bool:
        """Let time pass; whether the factor rose."""
        if self.factor >= SCALE or now <= self.recovered_at:
            return False
        gain = int(RECOVERY_PER_WINDOW * (now - self.recovered_at) / self.window_seconds)
        if gain < RECOVERY_PER_WINDOW // 5 and self.factor + gain < SCALE:
            return False
        self.factor = min(SCALE, self.factor + gain)
        self.recovered_at = now
        return True

    def next_recovery(self) -> float:
        """Instant at which `recover` has something to do; infinity if there is nothing to recover."""
        if self.factor >= SCALE:
            return float("inf")
        return self.recovered_at + self.window_seconds / 5 + 0.001
