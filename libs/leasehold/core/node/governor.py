"""How many workers each pool of a host has, over time: the one that decides.

Pure: the driver feeds samples, depths, orders and the monotonic time, then takes effects and carries them out.
At checks, `check_interval_seconds` apart, the division of memory decides; between them only the hard floor and
memory pressure do, at once. Rules and reasons: docs/agent.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from leasehold.core import errors
from leasehold.core.node import (
    amounts,
    checking,
    governor_effects,
    model,
    outgrowing,
    pool_sizing,
    pressure,
    saved_modes,
    settings,
    sizing,
)

#: After any shrink: time for its stops to begin, so that they count as being on their way out.
SETTLE_SECONDS: Final = 1.0
#: After the hard floor stopped a worker: time for its memory to come back.
FLOOR_PAUSE_SECONDS: Final = 5.0


class Governor:
    """Sizes the pools of one host. Every method takes the agent's monotonic time, in seconds."""

    def __init__(
        self,
        host: settings.HostSettings,
        pools: Sequence[model.PoolSpec],
        *,
        now: float,
        saved: saved_modes.SavedModes | None = None,
        boot_id: str = "",
        decision_number: int = 0,
    ) -> None:
        self.host = host
        self._pools: dict[str, pool_sizing.PoolSizing] = {}
        self._effects: list[governor_effects.Effect] = []
        self._number = decision_number
        self._memory: model.MemorySample | None = None
        #: Whether it was taken since the last check: no two checks decide by one sample.
        self._is_fresh = False
        self._pressure = pressure.PressureWatch()
        self._slope = pressure.SlopeWatch()
        self._next_check_at = now
        self._floor_quiet_until = self._settling_until = -math.inf
        self._boot_id = boot_id
        self._is_draining = saved is not None and saved.is_draining
        elapsed = saved.elapsed_seconds(now, boot_id) if saved is not None else 0.0
        for spec in pools:
            pool = self._pools[spec.name] = pool_sizing.PoolSizing(spec)
            if saved is not None and spec.name in saved.pools:
                pool.take_saved(saved.pools[spec.name], elapsed, now)

    # Events

    def sample(
        self, now: float, memory: model.MemorySample, workers: Mapping[str, Sequence[model.WorkerMemory]]
    ) -> None:
        """The host's memory and its workers, by pool, as they are now."""
        self._memory, self._is_fresh = memory, True
        for pool in self._pools.values():
            pool.workers = list(workers.get(pool.name, ()))
        self._pressure.sample(now, memory)
        self._watch_slope(now, memory)
        for pool in self._pools.values():
            self._take_ladder(now, pool)
        self.tick(now)
        self._act_between_checks(now)

    def depths(self, now: float, depths: Mapping[str, model.Depth]) -> None:
        """What waits in the pools' queues. It counts from the next check on."""
        for name, depth in depths.items():
            if name in self._pools:
                self._pools[name].depth = depth

    def set_target(self, now: float, pool: str, workers: int, *, hold_seconds: float | None = None) -> None:
        """A person wants so many. With `hold_seconds`, MANUAL ends after it.

        Raises `InvalidArgument` outside MIN to MAX or for a hold that is no time, `FailedPrecondition` with the
        numbers where memory does not allow it now, or while the host drains.
        """
        found = self._pool(pool)
        spec = found.spec
        if not spec.min_workers <= workers <= spec.max_workers:
            raise errors.InvalidArgument(
                f"target_workers: {workers} is not in MIN_WORKERS {spec.min_workers} to MAX_WORKERS "
                f"{spec.max_workers} of pool {pool}",
                field="target_workers",
            )
        if hold_seconds is not None and not (math.isfinite(hold_seconds) and hold_seconds > 0):
            raise errors.InvalidArgument(f"hold_seconds: {hold_seconds:g} is not above 0", field="hold_seconds")
        if self._is_draining:
            raise errors.FailedPrecondition("this node is draining; it starts no workers")
        self._refuse_beyond_memory(found, workers)
        until = math.inf if hold_seconds is None else now + hold_seconds
        found.become(model.PoolMode.MANUAL, target=workers, hold_until=until)
        frozen, why = self._frozen(now), f"manual target {workers}"
        if frozen and workers > found.wanted:
            self._set_by_hand(now, found, found.wanted, "MANUAL", f"{why}; growth is frozen by {frozen}")
        else:
            self._set_by_hand(now, found, workers, "MANUAL", why)
        self._save(now)

    def set_auto(self, now: float, pool: str) -> None:
        """Memory decides again about one pool."""
        self._resume(now, [self._pool(pool)])

    def set_monitoring(self, now: float, pool: str | None, is_running: bool) -> None:
        """Pause sizing, or take it up (which ends MANUAL too), for one pool or (None) all. Idempotent."""
        chosen = self._chosen(pool)
        if is_running:
            self._resume(now, [each for each in chosen if each.mode is not model.PoolMode.STOPPED])
            return
        for each in chosen:
            if each.mode in pool_sizing.SIZED_MODES:
                kept = max(each.wanted, each.spec.min_workers)
                each.become(model.PoolMode.PAUSED)
                self._pause(now, each, kept)
            elif each.mode is model.PoolMode.PAUSED:
                each.is_ordered = True  # by a person, too, from now on
        self._save(now)

    def set_stopped(self, now: float, pool: str | None, is_stopped: bool) -> None:
        """Have no workers until started again, for one pool or (None) all. Idempotent."""
        chosen = self._chosen(pool)
        if not is_stopped:
            self._resume(now, [each for each in chosen if each.mode is model.PoolMode.STOPPED])
            return
        for each in chosen:
            if each.mode is not model.PoolMode.STOPPED:
                each.become(model.PoolMode.STOPPED)
                self._set_by_hand(now, each, 0, "MODE", "stopped by hand")
        self._save(now)

    def set_draining(self, now: float, is_draining: bool) -> None:
        """Have no workers at all, or go on as before. Survives the agent: the driver ends what it adopts."""
        if is_draining == self._is_draining:
            return
        self._is_draining = is_draining
        self._save(now)
        if is_draining:
            for each in self._pools.values():
                each.reasons = ("this node is draining",)
                self._decide(now, each, each.wanted, "DRAIN", after=0)
            return
        for each in self._pools.values():
            each.is_told, each.reasons = False, ("this node drains no more",)
            if each.mode in pool_sizing.SIZED_MODES:
                each.desired = None
        self._check(now, "DRAIN")

    def reconfigure(self, now: float, host: settings.HostSettings, pools: Sequence[model.PoolSpec]) -> None:
        """Take over other settings and pools. What persons ordered stays, within the new bounds."""
        self.host = host
        before, self._pools = self._pools, {}
        for spec in pools:
            known = before.get(spec.name)
            if known is None:
                self._pools[spec.name] = pool_sizing.PoolSizing(spec)
                continue
            wanted = known.wanted
            known.take_spec(spec)
            if known.wanted != wanted and known.is_told and not self._is_draining:
                self._decide(now, known, wanted, "MODE")
            self._pools[spec.name] = known
        self._save(now)
        self._next_check_at = min(self._next_check_at, now + host.check_interval_seconds)
        self._check(now, "MODE")

    def tick(self, now: float) -> None:
        """Let time pass: holds that end, and the check that is due."""
        ended = [pool for pool in self._pools.values() if now >= pool.hold_until]
        for pool in ended:
            wanted = pool.wanted
            pool.follow_settings(pool.spec.min_workers)
            if pool.wanted != wanted and not self._is_draining:
                self._decide(now, pool, wanted, "MODE")
        if ended:
            self._save(now)
            self._check(now, "MODE")
        if self._is_fresh and now >= self._next_check_at:
            self._check(now, "CHECK")

    # Out

    def next_deadline(self) -> float:
        """When `tick` has something to do; a check also needs a sample."""
        times = [pool.hold_until for pool in self._pools.values()]
        if self._is_fresh:
            times.append(self._next_check_at)
        return min(times, default=math.inf)

    def take_effects(self) -> list[governor_effects.Effect]:
        """What is to be done, in order; each is given once."""
        taken, self._effects = self._effects, []
        return taken

    def view(self, now: float, pool: str, *, running: int | None = None) -> pool_sizing.PoolView:
        """What status shows of a pool's size. Raises `NotFound`.

        `running`: how many there are now, where that is known better than by the last sample.
        """
        return self._pool(pool).view(now, is_draining=self._is_draining, running=running)

    def decisions(self, pool: str, most: int) -> list[model.Decision]:
        """The last decisions about a pool, newest first. Raises `NotFound`."""
        return list(reversed(self._pool(pool).decisions))[:most]

    @property
    def is_draining(self) -> bool:
        """Whether no workers are wanted."""
        return self._is_draining

    # Checks

    def _check(self, now: float, trigger: str) -> None:
        """Divide memory, move pools towards what comes out, and tell what changed."""
        if self._memory is None:
            return
        is_due = trigger == "CHECK"
        if is_due:
            self._next_check_at = now + self.host.check_interval_seconds
        self._is_fresh = self._is_fresh and not is_due
        room = self._room(self._memory)
        before = {pool.name: pool.wanted for pool in self._pools.values()}
        check = checking.Check(
            self.host, list(self._pools.values()), room, frozen=self._frozen(now), is_counted=is_due
        )
        if self._is_draining:
            return
        check.move()
        paused = [pool for pool in self._pools.values() if pool.mode is model.PoolMode.PAUSED]
        if any(pool.wanted != before[pool.name] for pool in paused):
            self._save(now)  # the number that it is paused at
        for pool in self._pools.values():
            if not pool.is_told:
                self._decide(now, pool, pool.live, "START" if is_due else trigger)
            elif pool.wanted != before[pool.name]:
                self._decide(now, pool, before[pool.name], trigger)

    def _room(self, memory: model.MemorySample) -> sizing.Room:
        workers = [
            (worker, pool.spec.worker_limit_bytes) for pool in self._pools.values() for worker in pool.workers
        ]
        return sizing.room(
            max(0, memory.available_bytes - memory.promised_bytes),
            self.host.reserve_bytes,
            workers,
            self.host.formula,
        )

    def _frozen(self, now: float) -> str:
        if self._pressure.level >= pressure.Pressure.FREEZE:
            return f"memory pressure: {self._told_pressure()}"
        if self._pressure.is_cooling_down(now):
            return f"a pause of {pressure.COOL_DOWN_SECONDS:g} s: memory pressure stopped a worker"
        return ""

    # Between checks

    def _act_between_checks(self, now: float) -> None:
        """The hard floor and pressure stop one worker at once, and wait for what that brings."""
        memory = self._memory
        if memory is None or self._is_draining or now < self._settling_until:
            return
        floor = self.host.reserve_bytes // 2
        leaving = self._leaving_bytes()
        if memory.available_bytes < floor:
            # What is on its way out is awaited as long as it will do, and half the floor is left to wait with.
            is_awaited = memory.available_bytes + leaving >= floor and memory.available_bytes >= floor // 2
            victim = None if is_awaited or now < self._floor_quiet_until else self._victim()
            if victim is not None:
                self._floor_quiet_until = now + FLOOR_PAUSE_SECONDS
                why = (
                    f"available {amounts.text(memory.available_bytes)} ({memory.bound_by}) is below the hard "
                    f"floor of {amounts.text(floor)}, half the reserve"
                )
                self._stop_one(now, victim, "HARD_FLOOR", why, is_urgent=True)
                return
        if self._pressure.may_act(now, is_leaving=leaving > 0):
            victim = self._victim()
            if victim is not None:
                self._pressure.acted(now)
                is_emergency = self._pressure.level is pressure.Pressure.EMERGENCY
                why = f"memory pressure{' (emergency)' if is_emergency else ''}: {self._told_pressure()}"
                self._stop_one(now, victim, "PRESSURE", why, is_urgent=is_emergency)

    def _leaving_bytes(self) -> int:
        """What workers hold that are on their way out."""
        return sum(
            worker.held_bytes
            for pool in self._pools.values()
            for worker in pool.workers
            if worker.state in model.ALIVE_STATES - model.LIVE_STATES
        )

    def _victim(self) -> pool_sizing.PoolSizing | None:
        """The lowest pool that has more than its MIN."""
        candidates = [
            pool
            for pool in self._pools.values()
            if pool.mode is not model.PoolMode.STOPPED and min(pool.wanted, pool.live) > pool.least
        ]
        return min(candidates, key=lambda each: (each.spec.priority, each.name), default=None)

    def _stop_one(
        self, now: float, pool: pool_sizing.PoolSizing, trigger: str, why: str, *, is_urgent: bool
    ) -> None:
        before = pool.wanted
        pool.desired, pool.reasons = min(before, pool.live) - 1, (why,)
        self._decide(now, pool, before, trigger, is_urgent=is_urgent)
        if pool.mode is model.PoolMode.PAUSED:
            self._save(now)  # the number that it is paused at

    def _take_ladder(self, now: float, pool: pool_sizing.PoolSizing) -> None:
        """Replace or end workers that near their limit, and keep that among the decisions."""
        for effect in outgrowing.judge(pool):
            self._effects.append(effect)
            is_replaced = isinstance(effect, governor_effects.Replace)
            step = "is replaced after its task" if is_replaced else "is ended at once"
            pool.decisions.append(
                self._decision(
                    now, pool, pool.wanted, pool.wanted, "LIMIT", (f"{effect.worker} {effect.reason}: {step}",)
                )
            )

    def _told_pressure(self) -> str:
        memory = self._memory
        assert memory is not None
        return (
            f"some {memory.pressure_some_percent or 0:.0f}%, full {memory.pressure_full_percent or 0:.0f}% "
            f"of the last 10 s, for {pressure.SUSTAINED_SECONDS:g} s"
        )

    def _watch_slope(self, now: float, memory: model.MemorySample) -> None:
        was_fast = self._slope.is_fast
        is_fast = self._slope.sample(now, memory.available_bytes - self.host.reserve_bytes // 2)
        if is_fast != was_fast:
            interval = pressure.FAST_SAMPLE_SECONDS if is_fast else pressure.SAMPLE_SECONDS
            self._effects.append(governor_effects.SampleFaster(interval))

    # Orders

    def _refuse_beyond_memory(self, pool: pool_sizing.PoolSizing, workers: int) -> None:
        if self._memory is None or workers <= max(pool.live, pool.spec.min_workers):
            return
        room = self._room(self._memory)
        others = sum(
            max(other.live, other.wanted) * other.spec.worker_limit_bytes
            for other in self._pools.values()
            if other is not pool
        )
        limit = pool.spec.worker_limit_bytes
        fits = max(0, (room.safe - others) // limit)
        if workers > fits:
            raise errors.FailedPrecondition(
                f"{workers} workers of {amounts.text(limit)} are beyond memory now, which allows {fits}: "
                f"{sizing.explained(room, pool.live, limit, fits, others_bytes=others)}",
                field="target_workers",
                metadata={
                    "target_workers": str(workers),
                    "memory_allows": str(fits),
                    "available_bytes": str(room.available),
                    "free_bytes": str(room.free),
                    "reserve_bytes": str(room.reserve),
                    "limit_bytes": str(limit),
                },
            )

    def _resume(self, now: float, chosen: Sequence[pool_sizing.PoolSizing]) -> None:
        changed = [each for each in chosen if each.mode is not model.PoolMode.AUTO]
        for each in changed:
            each.become(model.PoolMode.AUTO)
        self._save(now)
        if changed:
            self._check(now, "MODE")

    def _pause(self, now: float, pool: pool_sizing.PoolSizing, kept: int) -> None:
        why = f"sizing was paused by hand at {kept}"
        if kept != pool.wanted or not pool.is_told:
            self._set_by_hand(now, pool, kept, "MODE", why)
            return
        pool.desired, pool.reasons = kept, (why,)
        pool.decisions.append(self._decision(now, pool, kept, kept, "MODE", pool.reasons))

    def _set_by_hand(
        self, now: float, pool: pool_sizing.PoolSizing, workers: int, trigger: str, why: str
    ) -> None:
        before = pool.wanted
        pool.desired, pool.reasons = workers, (why,)
        if not self._is_draining:
            self._decide(now, pool, before, trigger)

    # Decisions

    def _decide(
        self,
        now: float,
        pool: pool_sizing.PoolSizing,
        before: int,
        trigger: str,
        *,
        after: int | None = None,
        is_urgent: bool = False,
    ) -> None:
        """Tell what is wanted now, and keep why."""
        after = pool.wanted if after is None else after
        decision = self._decision(now, pool, before, after, trigger, pool.reasons)
        pool.is_told = True
        if after < before:
            self._settling_until = now + SETTLE_SECONDS
        pool.decisions.append(decision)
        self._effects.append(governor_effects.Resize(pool.name, after, is_urgent, decision))

    def _decision(
        self,
        now: float,
        pool: pool_sizing.PoolSizing,
        before: int,
        after: int,
        trigger: str,
        reasons: tuple[str, ...],
    ) -> model.Decision:
        self._number += 1
        numbers: dict[str, float] = {}
        memory = self._memory
        if memory is not None:
            numbers = sizing.numbers(
                self._room(memory),
                limit_bytes=pool.spec.worker_limit_bytes,
                threshold_bytes=pool.spec.threshold_bytes,
                live=pool.live,
            )
            numbers["optimal"] = pool.optimal
            if memory.pressure_some_percent is not None:
                numbers["pressure_some_percent"] = memory.pressure_some_percent
            if memory.pressure_full_percent is not None:
                numbers["pressure_full_percent"] = memory.pressure_full_percent
        return model.Decision(
            number=self._number,
            at_seconds=now,
            pool=pool.name,
            before=before,
            after=after,
            trigger=trigger,
            reasons=reasons,
            numbers=numbers,
        )

    def _save(self, now: float) -> None:
        saved = {pool.name: pool.to_save(now) for pool in self._pools.values()}
        modes = saved_modes.SavedModes(
            pools={name: mode for name, mode in saved.items() if mode is not None},
            at_seconds=now,
            boot_id=self._boot_id,
            is_draining=self._is_draining,
        )
        self._effects.append(governor_effects.SaveModes(modes))

    def _pool(self, name: str) -> pool_sizing.PoolSizing:
        found = self._pools.get(name)
        if found is None:
            raise errors.NotFound(
                f"there is no pool {name[:63]!r}; known are {', '.join(self._pools) or 'none'}"
            )
        return found

    def _chosen(self, pool: str | None) -> list[pool_sizing.PoolSizing]:
        return list(self._pools.values()) if pool is None else [self._pool(pool)]
