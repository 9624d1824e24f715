"""One pool in the governor's eyes: its mode, what is wanted, and the story of its decisions."""

import collections
import math
from dataclasses import dataclass
from typing import Final

from leasehold.core.node import model, saved_modes

DECISIONS_KEPT: Final = 200

#: Modes in which memory decides, at checks, how many workers there are.
SIZED_MODES = frozenset({model.PoolMode.AUTO, model.PoolMode.MANUAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """What status shows of a pool's size."""

    mode: model.PoolMode
    #: What sizing would have, whatever the mode.
    optimal: int
    desired: int
    manual_target: int | None
    #: None: MANUAL does not end by itself.
    hold_remaining_seconds: float | None
    is_overcommitted: bool
    summary: str
    #: Of the last check.
    reasons: tuple[str, ...]
    #: Workers that near their limits.
    warnings: tuple[str, ...]


class PoolSizing:
    """Mutable state of one pool; only the governor changes it."""

    def __init__(self, spec: model.PoolSpec) -> None:
        self.spec = spec
        self.mode = model.PoolMode.AUTO if spec.is_auto_scaling else model.PoolMode.PAUSED
        self.manual_target: int | None = None
        self.hold_until = math.inf
        self.depth: model.Depth | None = None
        self.workers: list[model.WorkerMemory] = []
        #: Whether a person has ordered the mode; else it is the settings'.
        self.is_ordered = False
        #: None: nothing was decided yet. While the node drains it is what comes after.
        self.desired: int | None = None if spec.is_auto_scaling else spec.min_workers
        #: Whether anybody was told of `desired`.
        self.is_told = False
        self.optimal = spec.min_workers
        self.is_overcommitted = False
        #: Below the threshold; cleared so much higher.
        self.is_low = False
        #: Below the threshold, and one less already.
        self.has_given = False
        #: Checks running that would shrink it for want of memory, and those with an equal share.
        self.deficit_checks = 0
        self.equal_checks = 0
        self.last_share: int | None = None
        self.reasons: tuple[str, ...] = () if spec.is_auto_scaling else (self._told_not_scaling(),)
        self.warnings: tuple[str, ...] = ()
        self.decisions: collections.deque[model.Decision] = collections.deque(maxlen=DECISIONS_KEPT)
        #: Lives of workers that were replaced or killed for their size, told once each.
        self.outgrown: set[tuple[str, int, str]] = set()

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.spec.name

    @property
    def live(self) -> int:
        """Workers that count as wanted ones."""
        return sum(worker.state in model.LIVE_STATES for worker in self.workers)

    @property
    def wanted(self) -> int:
        """What is wanted now; before the first decision, what there is."""
        return self.live if self.desired is None else self.desired

    @property
    def least(self) -> int:
        """MIN, or less where a person wants less."""
        if self.mode is model.PoolMode.STOPPED:
            return 0
        if self.mode is model.PoolMode.MANUAL and self.manual_target is not None:
            return min(self.spec.min_workers, self.manual_target)
        return self.spec.min_workers

    @property
    def most(self) -> int:
        """MAX, or a person's target."""
        if self.mode is model.PoolMode.STOPPED:
            return 0
        if self.mode is model.PoolMode.MANUAL and self.manual_target is not None:
            return self.manual_target
        if self.mode is model.PoolMode.PAUSED:
            return max(self.wanted, self.least)
        return self.spec.max_workers

    def take_saved(self, saved: saved_modes.SavedMode, elapsed_seconds: float, now: float) -> None:
        """Go on as a former agent was ordered; bounds that were narrowed since hold."""
        workers = saved.workers
        if workers is not None:
            workers = min(max(workers, self.spec.min_workers), self.spec.max_workers)
        if saved.mode is model.PoolMode.MANUAL:
            if workers is None:
                return
            if saved.hold_remaining_seconds is not None:
                if saved.hold_remaining_seconds <= elapsed_seconds:
                    return
                self.hold_until = now + saved.hold_remaining_seconds - elapsed_seconds
            self.manual_target = workers
        self.mode, self.is_ordered, self.desired, self.reasons = saved.mode, True, None, ()
        if saved.mode is model.PoolMode.PAUSED:
            self.desired = workers if workers is not None else self.spec.min_workers
            self.reasons = (f"sizing was paused by hand at {self.desired}",)
        elif saved.mode is model.PoolMode.STOPPED:
            self.desired = 0
            self.reasons = ("stopped by hand",)

    def to_save(self, now: float) -> saved_modes.SavedMode | None:
        """What a later agent must know; None where it is the configuration's."""
        if not self.is_ordered or (self.mode is model.PoolMode.AUTO and self.spec.is_auto_scaling):
            return None
        return saved_modes.SavedMode(
            mode=self.mode,
            workers=self.manual_target if self.mode is model.PoolMode.MANUAL else self.desired,
            hold_remaining_seconds=None if math.isinf(self.hold_until) else max(0.0, self.hold_until - now),
        )

    def become(self, mode: model.PoolMode, *, target: int | None = None, hold_until: float = math.inf) -> None:
        """Change who decides, by a person's order."""
        self.mode, self.manual_target, self.hold_until = mode, target, hold_until
        self.is_ordered = True
        self.deficit_checks = self.equal_checks = 0

    def follow_settings(self, workers: int | None) -> None:
        """Have the settings' own mode; where that is PAUSED, at `workers` (None: what there is)."""
        self.become(model.PoolMode.AUTO if self.spec.is_auto_scaling else model.PoolMode.PAUSED)
        self.is_ordered = False
        if not self.spec.is_auto_scaling:
            self.desired = self.wanted if workers is None else workers
            self.reasons = (self._told_not_scaling(),)

    def take_spec(self, spec: model.PoolSpec) -> None:
        """Go on under other settings; what a person has ordered stays, within the new bounds."""
        was_auto_scaling, self.spec = self.spec.is_auto_scaling, spec
        if self.manual_target is not None:
            self.manual_target = min(max(self.manual_target, spec.min_workers), spec.max_workers)
        if was_auto_scaling != spec.is_auto_scaling and not self.is_ordered:
            self.follow_settings(None)
        if self.desired is None or self.mode is model.PoolMode.STOPPED:
            return
        if self.mode is model.PoolMode.PAUSED:
            self.desired = max(self.desired, spec.min_workers)
        if self.desired > spec.max_workers:
            self.desired = spec.max_workers
            self.reasons = (f"MAX_WORKERS is {spec.max_workers} now",)
        elif self.mode is model.PoolMode.MANUAL and self.manual_target is not None:
            self.desired = min(self.desired, self.manual_target)

    def _told_not_scaling(self) -> str:
        return f"ENABLE_AUTO_SCALING is false: paused, at MIN_WORKERS {self.spec.min_workers} from the start"

    def view(self, now: float, *, is_draining: bool, running: int | None = None) -> PoolView:
        """What status shows."""
        return PoolView(
            mode=self.mode,
            optimal=self.optimal,
            desired=0 if is_draining else self.wanted,
            manual_target=self.manual_target,
            hold_remaining_seconds=None if math.isinf(self.hold_until) else max(0.0, self.hold_until - now),
            is_overcommitted=self.is_overcommitted,
            summary=self._summary(self.live if running is None else running, is_draining=is_draining),
            reasons=self.reasons,
            warnings=self.warnings,
        )

    def _summary(self, running: int, *, is_draining: bool) -> str:
        over = "; overcommitted: MIN is more than memory allows" if self.is_overcommitted else ""
        if self.is_overcommitted and self.mode is model.PoolMode.PAUSED:
            over = "; overcommitted: memory allows fewer"
        if is_draining:
            return f"draining, running {running}"
        if self.mode is model.PoolMode.STOPPED:
            return f"stopped by hand, running {running}; auto would be {self.optimal}"
        if self.mode is model.PoolMode.PAUSED:
            return f"paused at {self.wanted}, running {running}; auto would be {self.optimal}{over}"
        if self.mode is model.PoolMode.MANUAL:
            cause = ": memory" if self.wanted < (self.manual_target or 0) else ""
            return f"manual {self.manual_target}, running {running}{cause}; auto would be {self.optimal}{over}"
        if self.wanted == self.optimal:
            return f"auto {self.wanted}, running {running}{over}"
        return f"auto {self.wanted}, running {running}; optimal now {self.optimal}{over}"
