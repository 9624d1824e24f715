"""What acts between checks: memory pressure, and the speed at which memory goes.

The kernel's pressure stall information (PSI) tells whether tasks wait for memory; it is evidence of harm where
"available" is only arithmetic. It is noisy alone (a start reads files in, too), so a shrink also wants pages
that were reclaimed, and each action is followed by a pause in which its effect is awaited, as oomd does.
"""

import enum
import math
from typing import Final

from leasehold.core.node import model

SOME_PERCENT: Final = 10.0
FULL_PERCENT: Final = 10.0
EMERGENCY_PERCENT: Final = 40.0
SUSTAINED_SECONDS: Final = 10.0
#: After an action; and after one in an emergency.
PAUSE_SECONDS: Final = 15.0
EMERGENCY_PAUSE_SECONDS: Final = 5.0
#: So long after an action nothing grows: the pressure went with the worker, and would come back with it.
COOL_DOWN_SECONDS: Final = 60.0
#: So long a shrink waits for the end of a worker that is on its way out; an emergency does not.
LEAVING_PAUSE_SECONDS: Final = 60.0

#: Sample faster once memory lasts no longer than this at its present slope, until it lasts twice as long.
EXHAUSTION_SECONDS: Final = 5.0
FAST_SAMPLE_SECONDS: Final = 0.1
SAMPLE_SECONDS: Final = 1.0
#: Time constant of the moving average of the slope.
_SMOOTHING_SECONDS: Final = 2.0


class Pressure(enum.IntEnum):
    """How hard the host is pressed for memory."""

    NONE = 0
    #: Grow no pool.
    FREEZE = 1
    #: Stop one worker.
    SHRINK = 2
    EMERGENCY = 3


class PressureWatch:
    """Judges samples: a level counts once it has lasted for 10 s."""

    def __init__(self) -> None:
        self._some_since = math.inf
        self._full_since = math.inf
        self._emergency_since = math.inf
        self._reclaimed_at = -math.inf
        self._quiet_until = -math.inf
        self._acted_at = -math.inf
        self.level = Pressure.NONE

    def sample(self, now: float, memory: model.MemorySample) -> Pressure:
        """The level now."""
        some = memory.pressure_some_percent or 0.0
        full = memory.pressure_full_percent or 0.0
        if memory.reclaimed_pages is None or memory.reclaimed_pages > 0:
            self._reclaimed_at = now
        self._some_since = _since(self._some_since, now, some > SOME_PERCENT)
        self._full_since = _since(self._full_since, now, full > FULL_PERCENT)
        self._emergency_since = _since(self._emergency_since, now, full > EMERGENCY_PERCENT)
        if now - self._emergency_since >= SUSTAINED_SECONDS:
            self.level = Pressure.EMERGENCY
        elif now - self._full_since >= SUSTAINED_SECONDS and now - self._reclaimed_at <= SUSTAINED_SECONDS:
            self.level = Pressure.SHRINK
        elif now - self._some_since >= SUSTAINED_SECONDS or now - self._full_since >= SUSTAINED_SECONDS:
            self.level = Pressure.FREEZE
        else:
            self.level = Pressure.NONE
        return self.level

    def may_act(self, now: float, *, is_leaving: bool = False) -> bool:
        """Whether a worker should be stopped now, the last action's effect having been awaited.

        `is_leaving`: a worker is on its way out.
        """
        if self.level < Pressure.SHRINK or now < self._quiet_until:
            return False
        is_awaited = is_leaving and now < self._acted_at + LEAVING_PAUSE_SECONDS
        return self.level is Pressure.EMERGENCY or not is_awaited

    def is_cooling_down(self, now: float) -> bool:
        """Whether a worker was stopped for pressure a moment ago."""
        return now < self._acted_at + COOL_DOWN_SECONDS

    def acted(self, now: float) -> None:
        """A worker is being stopped."""
        pause = EMERGENCY_PAUSE_SECONDS if self.level is Pressure.EMERGENCY else PAUSE_SECONDS
        self._acted_at, self._quiet_until = now, now + pause


def _since(before: float, now: float, is_high: bool) -> float:
    if not is_high:
        return math.inf
    return min(before, now)


class SlopeWatch:
    """How long memory lasts at the speed at which it goes."""

    def __init__(self) -> None:
        self._at = -math.inf
        self._amount = 0.0
        self._slope = 0.0
        self.is_fast = False

    def sample(self, now: float, amount_bytes: float) -> bool:
        """`amount_bytes` are left. Returns whether to sample faster."""
        elapsed = now - self._at
        if elapsed > 0 and math.isfinite(elapsed):
            weight = 1.0 - math.exp(-elapsed / _SMOOTHING_SECONDS)
            self._slope += weight * ((self._amount - amount_bytes) / elapsed - self._slope)
        self._at, self._amount = now, amount_bytes
        bound = EXHAUSTION_SECONDS * (2.0 if self.is_fast else 1.0)
        self.is_fast = self.seconds_left < bound
        return self.is_fast

    @property
    def seconds_left(self) -> float:
        """Until nothing is left; infinity where it does not go."""
        if self._slope <= 0:
            return math.inf
        return max(0.0, self._amount / self._slope)
