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
    division,
    governor_effects,
    model,
    outgrowing,
    pool_sizing,
    pressure,
    saved_modes,
    settings,
    sizing,
)

#: Checks running with a deficit before a pool shrinks, and with the same division before pools exchange.
DEFICIT_CHECKS: Final = 2
EQUAL_CHECKS: Final = 3
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
        decision_number: int = 0,
    ) -> None:
        self.host = host
        self._pools: dict[str, pool_sizing.PoolSizing] = {}
        self._effects: list[governor_effects.Effect] = []
        self._number = decision_number
        self._memory: model.MemorySample | None = None
        self._pressure = pressure.PressureWatch()
        self._slope = pressure.SlopeWatch()
        self._next_check_at = now
        self._floor_quiet_until = -math.inf
        self._is_draining = False
        elapsed = max(0.0, now - saved.at_seconds) if saved is not None else 0.0
        for spec in pools:
            pool = self._pools[spec.name] = pool_sizing.PoolSizing(spec)
            if saved is not None and spec.name in saved.pools:
                pool.take_saved(saved.pools[spec.name], elapsed, now)

    # Events

    def sample(
        self, now: float, memory: model.MemorySample, workers: Mapping[str, Sequence[model.WorkerMemory]]
    ) -> None:
        """The host's memory and its workers, by pool, as they are now."""
        self._memory = memory
        for pool in self._pools.values():
            pool.workers = list(workers.get(pool.name, ()))
        self._pressure.sample(now, memory)
        self._watch_slope(now, memory)
        for pool in self._pools.values():
            self._effects += outgrowing.judge(pool)
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
        self._set_by_hand(now, found, workers, "MANUAL", f"{workers} by hand")
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
                each.desired = each.wanted
                each.become(model.PoolMode.PAUSED)
                each.reasons = (f"sizing was paused by hand at {each.wanted}",)
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
        """Have no workers at all, or go on as before. Not kept over a restart of the agent."""
        if is_draining == self._is_draining:
            return
        self._is_draining = is_draining
        if is_draining:
            for each in self._pools.values():
                self._set_by_hand(now, each, 0, "DRAIN", "this node is draining")
            return
        for each in self._pools.values():
            each.desired = each.least if each.mode is model.PoolMode.PAUSED else None
            each.is_told = False
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
            was_auto_scaling, known.spec = known.spec.is_auto_scaling, spec
            if known.manual_target is not None:
                known.manual_target = min(max(known.manual_target, spec.min_workers), spec.max_workers)
            if was_auto_scaling != spec.is_auto_scaling and known.mode in (
                model.PoolMode.AUTO,
                model.PoolMode.PAUSED,
            ):
                known.become(model.PoolMode.AUTO if spec.is_auto_scaling else model.PoolMode.PAUSED)
            self._pools[spec.name] = known
        self._save(now)
        self._check(now, "START")

    def tick(self, now: float) -> None:
        """Let time pass: holds that end, and the check that is due."""
        ended = [pool for pool in self._pools.values() if now >= pool.hold_until]
        for pool in ended:
            pool.become(model.PoolMode.AUTO)
        if ended:
            self._save(now)
        if self._memory is not None and (ended or now >= self._next_check_at):
            self._check(now, "MODE" if ended else "CHECK")

    # Out

    def next_deadline(self) -> float:
        """When `tick` has something to do; a check also needs a sample."""
        times = [pool.hold_until for pool in self._pools.values()]
        if self._memory is not None:
            times.append(self._next_check_at)
        return min(times, default=math.inf)

    def take_effects(self) -> list[governor_effects.Effect]:
        """What is to be done, in order; each is given once."""
        taken, self._effects = self._effects, []
        return taken

    def view(self, now: float, pool: str) -> pool_sizing.PoolView:
        """What status shows of a pool's size. Raises `NotFound`."""
        return self._pool(pool).view(now, is_draining=self._is_draining)

    def decisions(self, pool: str, most: int) -> list[model.Decision]:
        """The last decisions about a pool, newest first. Raises `NotFound`."""
        return list(reversed(self._pool(pool).decisions))[:most]

    @property
    def is_draining(self) -> bool:
        """Whether no workers are wanted."""
        return self._is_draining

    @property
    def pressure_level(self) -> pressure.Pressure:
        """How hard the host is pressed for memory."""
        return self._pressure.level

    # Checks

    def _check(self, now: float, trigger: str) -> None:
        """Divide memory, and move pools towards what comes out."""
        if self._memory is None:
            return
        self._next_check_at = now + self.host.check_interval_seconds
        room = self._room(self._memory)
        self._judge_thresholds(room)
        self._set_optima(room)
        if self._is_draining:
            return
        shares, borne = self._shares(room)
        deficit = self._deficit(room)
        for pool in self._pools.values():
            self._shrink(now, pool, room, shares[pool.name], borne[pool.name], deficit, trigger)
        self._grow(now, room, shares, trigger)

    def _room(self, memory: model.MemorySample) -> sizing.Room:
        workers = [
            (worker, pool.spec.worker_limit_bytes) for pool in self._pools.values() for worker in pool.workers
        ]
        return sizing.room(memory.available_bytes, self.host.reserve_bytes, workers, self.host.formula)

    def _judge_thresholds(self, room: sizing.Room) -> None:
        for pool in self._pools.values():
            bound = pool.spec.threshold_bytes + (self.host.hysteresis_bytes if pool.is_low else 0)
            pool.is_low = room.judged < bound

    def _divide(
        self, room: sizing.Room, claims: Sequence[division.Claim], *, borne_bytes: int = 0
    ) -> division.Division:
        """The division, less one worker of the lowest pool whose threshold is not met.

        A deficit of `borne_bytes` is overlooked.
        """
        found = division.divide(claims, room.divisible + borne_bytes)
        workers = dict(found.workers)
        by_rank = sorted(claims, key=lambda each: (each.priority, each.pool))
        for each in by_rank:
            if self._pools[each.pool].is_low and workers[each.pool] > each.min_workers:
                workers[each.pool] -= 1
                break
        return division.Division(workers, found.overcommitted, found.left_bytes)

    def _set_optima(self, room: sizing.Room) -> None:
        """What each pool would have if all sized themselves."""
        found = self._divide(room, [division.claim(pool.spec, pool.depth) for pool in self._pools.values()])
        for pool in self._pools.values():
            pool.optimal = found.workers[pool.name]

    def _shares(self, room: sizing.Room) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """What each pool may have, as persons have ordered; and what it may keep, the hysteresis overlooked."""
        claims = []
        for pool in self._pools.values():
            own = division.claim(pool.spec, pool.depth)
            is_auto = pool.mode is model.PoolMode.AUTO
            claims.append(
                division.Claim(
                    pool=own.pool,
                    priority=own.priority,
                    limit_bytes=own.limit_bytes,
                    # A paused pool keeps what it has; the others must do with the rest.
                    min_workers=pool.most if pool.mode is model.PoolMode.PAUSED else pool.least,
                    max_workers=pool.most,
                    backlog=own.backlog if is_auto else None,
                )
            )
        found = self._divide(room, claims)
        for pool in self._pools.values():
            pool.is_overcommitted = pool.name in found.overcommitted
        return found.workers, self._divide(room, claims, borne_bytes=self.host.hysteresis_bytes).workers

    def _deficit(self, room: sizing.Room) -> int:
        """By how much the live workers' limits are more than there is, in bytes; below 0: room is left."""
        charged = sum(
            min(pool.live, max(pool.wanted, pool.least)) * pool.spec.worker_limit_bytes
            for pool in self._pools.values()
        )
        return charged - room.divisible

    def _shrink(
        self,
        now: float,
        pool: pool_sizing.PoolSizing,
        room: sizing.Room,
        share: int,
        borne: int,
        deficit: int,
        trigger: str,
    ) -> None:
        """Have fewer, once the reason has lasted."""
        pool.equal_checks = pool.equal_checks + 1 if share == pool.last_share else 1
        pool.last_share = share
        if pool.mode not in pool_sizing.SIZED_MODES:
            return
        pool.reasons = tuple(self._reasons(pool, room, share))
        if pool.desired is None or share >= pool.wanted:
            pool.deficit_checks = 0
            return
        hysteresis = amounts.text(self.host.hysteresis_bytes)
        is_short = deficit > self.host.hysteresis_bytes
        if is_short or (pool.is_low and borne < pool.wanted):
            pool.deficit_checks += 1
            has_lasted = pool.deficit_checks >= DEFICIT_CHECKS
            if is_short:
                why = f"{amounts.text(deficit)} short, more than the hysteresis of {hysteresis}"
            else:
                # The threshold alone takes one; that the noise also takes another is borne.
                share, why = borne, sizing.below_threshold(room, pool.spec.threshold_bytes)
            told = f"{why}, at {pool.deficit_checks} of {DEFICIT_CHECKS} checks running"
        elif deficit > 0 or pool.is_low or pool.mode is model.PoolMode.MANUAL:
            pool.deficit_checks, has_lasted = 0, False
            short = amounts.text(max(0, deficit))
            told = f"stays at {pool.wanted}: {short} short, which the hysteresis of {hysteresis} bears"
        else:
            pool.deficit_checks, has_lasted = 0, pool.equal_checks >= EQUAL_CHECKS
            equal = min(pool.equal_checks, EQUAL_CHECKS)
            told = f"others need the memory more, at {equal} of {EQUAL_CHECKS} equal checks"
        pool.reasons += (told,)
        if has_lasted:
            self._resize(now, pool, share, trigger, is_urgent=False, room=room)
            pool.deficit_checks = 0

    def _grow(self, now: float, room: sizing.Room, shares: Mapping[str, int], trigger: str) -> None:
        """Have more, as far as memory is free already: what shrinks elsewhere counts when it has gone."""
        left = room.safe - sum(
            max(pool.live, pool.wanted) * pool.spec.worker_limit_bytes for pool in self._pools.values()
        )
        is_frozen = self._pressure.level >= pressure.Pressure.FREEZE
        for pool in sorted(self._pools.values(), key=lambda each: (-each.spec.priority, each.name)):
            share = shares[pool.name]
            is_first, pool.is_told = not pool.is_told, True
            if pool.desired is None:
                # At the start what runs is kept, and judged by the checks that follow.
                pool.desired = max(pool.live, pool.least)
                left -= max(0, pool.desired - pool.live) * pool.spec.worker_limit_bytes
            goal = pool.wanted
            if pool.mode in pool_sizing.SIZED_MODES:
                floor = min(share, pool.least)
                while goal < share and (
                    goal < floor or (not is_frozen and left >= pool.spec.worker_limit_bytes)
                ):
                    goal += 1
                    left -= pool.spec.worker_limit_bytes
                if is_frozen and goal < share:
                    pool.reasons += (f"growth is frozen by memory pressure: {self._told_pressure()}",)
            if goal != pool.wanted or is_first:
                self._resize(now, pool, goal, "START" if is_first else trigger, is_urgent=False, room=room)

    def _reasons(self, pool: pool_sizing.PoolSizing, room: sizing.Room, share: int) -> list[str]:
        spec = pool.spec
        others = sum(
            other.live * other.spec.worker_limit_bytes for other in self._pools.values() if other is not pool
        )
        by_memory = (room.divisible - others) // spec.worker_limit_bytes
        reasons = [sizing.explained(room, pool.live, spec.worker_limit_bytes, by_memory, others_bytes=others)]
        if len(self._pools) > 1:
            backlog = pool.depth.backlog if pool.depth is not None else None
            shown = "not known, counts as an equal" if backlog is None else str(backlog)
            reasons.append(f"of {len(self._pools)} pools, priority {spec.priority}, backlog {shown}: {share}")
        if share == pool.most and pool.mode is model.PoolMode.AUTO:
            reasons.append(f"MAX_WORKERS {spec.max_workers} is in force")
        if share == pool.least:
            reasons.append(f"MIN_WORKERS {pool.least} is in force")
        if pool.is_low:
            reasons.append(f"one less: {sizing.below_threshold(room, spec.threshold_bytes)}")
        if pool.is_overcommitted:
            reasons.append("overcommitted: the MINs are more than memory allows")
        if pool.mode is model.PoolMode.MANUAL:
            reasons.append(f"manual target {pool.manual_target}")
        return reasons

    # Between checks

    def _act_between_checks(self, now: float) -> None:
        """The hard floor and pressure stop one worker at once, and wait for what that brings."""
        memory = self._memory
        if memory is None or self._is_draining:
            return
        floor = self.host.reserve_bytes // 2
        if memory.available_bytes < floor and now >= self._floor_quiet_until:
            victim = self._victim()
            if victim is not None:
                self._floor_quiet_until = now + FLOOR_PAUSE_SECONDS
                why = (
                    f"available {amounts.text(memory.available_bytes)} ({memory.bound_by}) is below the hard "
                    f"floor of {amounts.text(floor)}, half the reserve"
                )
                self._stop_one(now, victim, "HARD_FLOOR", why)
        elif self._pressure.may_act(now):
            victim = self._victim()
            if victim is not None:
                self._pressure.acted(now)
                self._stop_one(now, victim, "PRESSURE", f"memory pressure: {self._told_pressure()}")

    def _victim(self) -> pool_sizing.PoolSizing | None:
        """The lowest pool that has more than its MIN."""
        candidates = [
            pool
            for pool in self._pools.values()
            if pool.mode is not model.PoolMode.STOPPED and min(pool.wanted, pool.live) > pool.least
        ]
        return min(candidates, key=lambda each: (each.spec.priority, each.name), default=None)

    def _stop_one(self, now: float, pool: pool_sizing.PoolSizing, trigger: str, why: str) -> None:
        assert self._memory is not None
        pool.reasons = (why,)
        goal = min(pool.wanted, pool.live) - 1
        self._resize(now, pool, goal, trigger, is_urgent=True, room=self._room(self._memory))

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
        for each in chosen:
            if each.mode is not model.PoolMode.AUTO:
                each.become(model.PoolMode.AUTO)
        self._save(now)
        self._check(now, "MODE")

    def _set_by_hand(
        self, now: float, pool: pool_sizing.PoolSizing, workers: int, trigger: str, why: str
    ) -> None:
        pool.reasons = (why,)
        room = self._room(self._memory) if self._memory is not None else None
        self._resize(now, pool, workers, trigger, is_urgent=False, room=room)

    def _resize(
        self,
        now: float,
        pool: pool_sizing.PoolSizing,
        desired: int,
        trigger: str,
        *,
        is_urgent: bool,
        room: sizing.Room | None,
    ) -> None:
        self._number += 1
        decision = model.Decision(
            number=self._number,
            at_seconds=now,
            pool=pool.name,
            before=pool.live if trigger == "START" else pool.wanted,
            after=desired,
            trigger=trigger,
            reasons=pool.reasons,
            numbers=sizing.numbers(
                room,
                limit_bytes=pool.spec.worker_limit_bytes,
                threshold_bytes=pool.spec.threshold_bytes,
                live=pool.live,
            )
            if room is not None
            else {},
        )
        pool.desired, pool.is_told = desired, True
        pool.decisions.append(decision)
        self._effects.append(governor_effects.Resize(pool.name, desired, is_urgent, decision))

    def _save(self, now: float) -> None:
        saved = {pool.name: pool.to_save(now) for pool in self._pools.values()}
        modes = saved_modes.SavedModes(
            pools={name: mode for name, mode in saved.items() if mode is not None}, at_seconds=now
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
