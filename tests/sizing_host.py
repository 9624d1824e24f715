"""A simulated host under a governor: workers that ramp up, stops that take their time, memory that is noisy."""

import dataclasses
from collections.abc import Callable, Sequence

from leasehold.core.node import governor, governor_effects, model, settings

GB = model.GIB


@dataclasses.dataclass
class Worker:
    """One worker of the simulated host."""

    name: str
    pool: str
    start_number: int
    started_at: float
    ends_at: float | None = None

    def held(self, now: float, ramp_seconds: float, use_bytes: int) -> int:
        """What it holds: it ramps up to its real use."""
        share = min(1.0, (now - self.started_at) / ramp_seconds) if ramp_seconds else 1.0
        return int(share * use_bytes)

    @property
    def state(self) -> model.WorkerState:
        """Running, or on its way out."""
        return model.WorkerState.RUNNING if self.ends_at is None else model.WorkerState.STOPPING


class Host:
    """Carries out what its governor wants, one start a second, and counts starts and stops."""

    def __init__(
        self,
        pools: Sequence[model.PoolSpec],
        *,
        host: settings.HostSettings | None = None,
        total_bytes: int = 64 * GB,
        other_bytes: int = 3 * GB,
        use_bytes: int = int(3.5 * GB),
        ramp_seconds: float = 60.0,
        stop_seconds: float = 10.0,
        noise: Callable[[float], int] = lambda now: 0,
    ) -> None:
        self.now = 0.0
        self.total_bytes, self.other_bytes = total_bytes, other_bytes
        self.use_bytes, self.ramp_seconds, self.stop_seconds = use_bytes, ramp_seconds, stop_seconds
        self.noise = noise
        self.workers: list[Worker] = []
        self.desired: dict[str, int] = {}
        self.starts: list[float] = []
        self.stops: list[float] = []
        self.resizes: list[governor_effects.Resize] = []
        #: All that the governor wanted; to be emptied by whoever reads it.
        self.effects: list[governor_effects.Effect] = []
        #: PSI, percent: some, full; and the pages that were reclaimed in a second.
        self.pressure: tuple[float | None, float | None, int | None] = (None, None, None)
        self.names = {spec.name for spec in pools}
        self.governor = governor.Governor(host or settings.HostSettings(), pools, now=self.now)

    def memory(self) -> model.MemorySample:
        """What there is now."""
        held = sum(worker.held(self.now, self.ramp_seconds, self.use_bytes) for worker in self.workers)
        available = self.total_bytes - self.other_bytes - held + self.noise(self.now)
        some, full, reclaimed = self.pressure
        return model.MemorySample(
            total_bytes=self.total_bytes,
            available_bytes=max(0, available),
            pressure_some_percent=some,
            pressure_full_percent=full,
            reclaimed_pages=reclaimed,
        )

    def live(self, pool: str) -> int:
        """Workers of a pool that are not on their way out."""
        return sum(worker.pool == pool and worker.ends_at is None for worker in self.workers)

    def step(self) -> None:
        """One second."""
        self.now += 1.0
        self.workers = [each for each in self.workers if each.ends_at is None or each.ends_at > self.now]
        seen = {
            pool: [
                model.WorkerMemory(
                    name=worker.name,
                    state=worker.state,
                    held_bytes=worker.held(self.now, self.ramp_seconds, self.use_bytes),
                    start_number=worker.start_number,
                    is_limit_enforced=True,
                )
                for worker in self.workers
                if worker.pool == pool
            ]
            for pool in self.names
        }
        self.governor.sample(self.now, self.memory(), seen)
        self.carry_out()

    def run(self, seconds: float) -> None:
        """So many seconds."""
        for _ in range(int(seconds)):
            self.step()

    def carry_out(self, *, may_start: bool = True) -> None:
        """Do what the governor wants: all stops, and one start where time has passed."""
        taken = self.governor.take_effects()
        self.effects += taken
        for effect in taken:
            if isinstance(effect, governor_effects.Resize):
                self.desired[effect.pool] = effect.desired
                self.resizes.append(effect)
        for pool, desired in sorted(self.desired.items()):
            while self.live(pool) > desired:
                newest = max(
                    (each for each in self.workers if each.pool == pool and each.ends_at is None),
                    key=lambda each: each.start_number,
                )
                newest.ends_at = self.now + self.stop_seconds
                self.stops.append(self.now)
            if self.live(pool) < desired and may_start:
                may_start = False
                number = len(self.starts) + 1
                self.workers.append(Worker(f"{pool}_{number}@h", pool, number, self.now))
                self.starts.append(self.now)


def spec(
    name: str = "translation",
    *,
    least: int = 1,
    most: int = 16,
    limit_gb: float = 4.0,
    threshold_gb: float = 8.0,
    priority: int = 0,
    is_auto_scaling: bool = True,
) -> model.PoolSpec:
    """A pool."""
    return model.PoolSpec(
        name=name,
        template="command",
        priority=priority,
        min_workers=least,
        max_workers=most,
        worker_limit_bytes=round(limit_gb * GB),
        threshold_bytes=round(threshold_gb * GB),
        is_auto_scaling=is_auto_scaling,
    )
