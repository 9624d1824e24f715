"""How long to wait between attempts, and how many a caller may add to an outage. Pure: no clock, no I/O."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from leasehold.core import errors

_GROWTH: Final = 2.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with "equal jitter": each delay is between half of the present step and all of it.

    Steps double from ``initial_seconds`` to ``max_seconds``. The random half keeps callers that failed together
    from coming back together; the fixed half keeps a delay from being next to nothing ("Exponential Backoff
    And Jitter", AWS Architecture Blog, 2015).
    """

    initial_seconds: float = 0.1
    max_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.initial_seconds <= self.max_seconds:
            raise errors.InvalidArgument(
                "a backoff begins above zero and grows to max_seconds", field="initial_seconds"
            )

    def delays(self, rng: random.Random) -> Iterator[float]:
        """Delays in seconds, without end. Begin anew after a success."""
        step = self.initial_seconds
        while True:
            yield rng.uniform(step / 2, step)
            step = min(step * _GROWTH, self.max_seconds)


class RetryBudget:
    """Bounds retries to a part of the calls: an overloaded server must not be met with several times the load.

    Each first attempt earns ``ratio`` of a retry, up to ``burst`` saved; each retry spends one. A ratio of 0.1
    means at most 10% more load in the long run ("Handling Overload", Site Reliability Engineering, O'Reilly
    2016). Not for use from several threads at once.
    """

    def __init__(self, ratio: float = 0.1, burst: float = 10.0) -> None:
        if not (0 <= ratio <= 1 and burst >= 1):
            raise errors.InvalidArgument(
                "a retry budget has a ratio of 0 to 1 and a burst of at least 1", field="ratio"
            )
        self._ratio = ratio
        self._burst = burst
        self._saved = burst

    def record_first_attempt(self) -> None:
        """Count a call that is not a retry."""
        self._saved = min(self._burst, self._saved + self._ratio)

    def try_spend(self) -> bool:
        """Whether one retry may be made now; if so, it is counted."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
