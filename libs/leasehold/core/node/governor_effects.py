"""What a governor wants done."""

from dataclasses import dataclass

from leasehold.core.node import model, saved_modes


@dataclass(frozen=True, slots=True)
class Resize:
    """Have so many workers of a pool. Urgent: do not wait for one victim's end before the next."""

    pool: str
    desired: int
    is_urgent: bool
    decision: model.Decision


@dataclass(frozen=True, slots=True)
class Replace:
    """Let a worker end after its current task, and start another in its place."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End a worker at once: it is over its limit, and no kernel holds it."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class SaveModes:
    """Keep on disk what a person has ordered."""

    modes: saved_modes.SavedModes


@dataclass(frozen=True, slots=True)
class SampleFaster:
    """Sample so often from now on; also told when it is slower again."""

    interval_seconds: float


Effect = Resize | Replace | KillWorker | SaveModes | SampleFaster
