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
