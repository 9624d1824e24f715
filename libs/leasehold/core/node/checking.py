"""One check: memory is divided, and each pool moves towards its share, or says why not yet.

A shrink waits: for want of memory until that has lasted, for other pools until the division has. Workers that
are on their way out are credited: while one takes its time, nobody else need stop for what it holds. Growth
takes only memory that is free already.
"""

from collections.abc import Sequence
from typing import Final

from leasehold.core.node import amounts, division, model, pool_sizing, settings, sizing

#: Checks running with a deficit before a pool shrinks, and with the same division before pools exchange.
DEFICIT_CHECKS: Final = 2
EQUAL_CHECKS: Final = 3


class Check:
    """Moves `desired` of the pools that memory decides about; the governor tells what changed.

    `frozen`: why nothing may grow, empty: it may. `is_counted`: a check that was due; others, which a person's
    order brings, act at once but count for no "checks running".
    """

    def __init__(
        self,
        host: settings.HostSettings,
        pools: Sequence[pool_sizing.PoolSizing],
        room: sizing.Room,
        *,
        frozen: str,
        is_counted: bool,
    ) -> None:
        self._host, self._room, self._frozen, self._is_counted = host, room, frozen, is_counted
        self._pools = sorted(pools, key=lambda pool: (-pool.spec.priority, pool.name))
        for pool in self._pools:
            bound = pool.spec.threshold_bytes + (host.hysteresis_bytes if pool.is_low else 0)
            pool.is_low = room.judged < bound
            pool.has_given = pool.has_given and pool.is_low
        plain = [division.claim(pool.spec, pool.depth) for pool in self._pools]
        optima, _ = self._divide(plain, room.divisible, [pool for pool in self._pools if pool.is_low])
        for pool in self._pools:
            pool.optimal = optima.workers[pool.name]

    def move(self) -> None:
        """Set what each pool wants, and its reasons."""
        claims = [_claim(pool) for pool in self._pools]
        low = [pool for pool in self._pools if pool.is_low and pool.mode is model.PoolMode.AUTO]
        shares, giver = self._divide(claims, self._room.settled, low)
        overcommitted = division.divide(claims, self._room.divisible).overcommitted
        wanted = sum(max(pool.wanted, pool.least) * pool.spec.worker_limit_bytes for pool in self._pools)
        deficit = wanted - self._room.settled
        for pool in self._pools:
            share = shares.workers[pool.name]
            pool.is_overcommitted = pool.name in overcommitted
            if self._is_counted:
                pool.equal_checks = pool.equal_checks + 1 if share == pool.last_share else 1
                pool.last_share = share
            if pool.mode in pool_sizing.SIZED_MODES:
                pool.reasons = self._reasons(pool, share, gives=pool is giver)
                self._shrink(pool, share, deficit, gives=pool is giver)
        self._grow(shares)

    def _divide(
        self, claims: Sequence[division.Claim], room_bytes: int, low: Sequence[pool_sizing.PoolSizing]
    ) -> tuple[division.Division, pool_sizing.PoolSizing | None]:
        """The division, less one worker of the lowest pool whose threshold is not met; and that pool."""
        found = division.divide(claims, room_bytes)
        least = {each.pool: each.min_workers for each in claims}
        for pool in sorted(low, key=lambda each: (each.spec.priority, each.name)):
            if found.workers[pool.name] > least[pool.name]:
                workers = {**found.workers, pool.name: found.workers[pool.name] - 1}
                return division.Division(workers, found.overcommitted, found.left_bytes), pool
        return found, None

    def _shrink(self, pool: pool_sizing.PoolSizing, share: int, deficit: int, *, gives: bool) -> None:
        """Want fewer, once the reason has lasted."""
        if pool.desired is None or share >= pool.wanted:
            pool.deficit_checks = 0
            pool.has_given = pool.has_given or gives
            return
        if gives and pool.has_given:
            # The one that the threshold took is part of what must fit, or noise would take another.
            deficit += pool.spec.worker_limit_bytes
        is_short = deficit > self._host.hysteresis_bytes
        takes_one = gives and not pool.has_given
        if is_short or takes_one:
            pool.deficit_checks += 1 if self._is_counted else 0
            why = (
                f"{amounts.text(deficit)} short, more than the hysteresis of "
                f"{amounts.text(self._host.hysteresis_bytes)}"
                if is_short
                else sizing.below_threshold(self._room, pool.spec.threshold_bytes)
            )
            pool.reasons += (f"{why}, at {pool.deficit_checks} of {DEFICIT_CHECKS} checks running",)
            if pool.deficit_checks >= DEFICIT_CHECKS:
                pool.desired = share if is_short else max(share, pool.wanted - 1)
                pool.has_given = pool.has_given or gives
                pool.deficit_checks = 0
            return
        pool.deficit_checks = 0
        if deficit > 0:
            pool.reasons += (
                f"stays at {pool.wanted}: {amounts.text(deficit)} short, which the hysteresis of "
                f"{amounts.text(self._host.hysteresis_bytes)} bears",
            )
        elif pool.mode is model.PoolMode.AUTO and not gives:
            equal = min(pool.equal_checks, EQUAL_CHECKS)
            pool.reasons += (f"others need the memory more, at {equal} of {EQUAL_CHECKS} equal checks",)
            if pool.equal_checks >= EQUAL_CHECKS:
                pool.desired = share

    def _grow(self, shares: division.Division) -> None:
        """Want more, as far as memory is free already: what shrinks elsewhere counts when it has gone."""
        left = self._room.safe - sum(
            max(pool.live, pool.wanted) * pool.spec.worker_limit_bytes for pool in self._pools
        )
        left = self._come_back(left)
        for pool in self._pools:
            limit, share = pool.spec.worker_limit_bytes, shares.workers[pool.name]
            if pool.desired is None:
                # At the start what runs is kept, within the bounds, and judged by the checks that follow.
                pool.desired = min(max(pool.live, pool.least), pool.most)
                left -= max(0, pool.desired - pool.live) * limit
            if pool.mode not in pool_sizing.SIZED_MODES:
                continue
            goal, floor = pool.desired, min(share, pool.least)
            while goal < share and (goal < floor or (not self._frozen and left >= limit)):
                goal += 1
                left -= limit
            pool.desired = goal
            if goal < share and self._frozen:
                pool.reasons += (f"growth is frozen by {self._frozen}",)
            elif goal < share:
                pool.reasons += (
                    f"stays at {goal} until memory is free: {amounts.text(max(0, left))} are left beside what "
                    f"others have, {amounts.text(self._room.leaving)} of it on its way out",
                )

    def _come_back(self, left: int) -> int:
        """At the start a paused pool has what it was paused at again, as far as memory allows; what is left."""
        for pool in reversed(self._pools):
            paused_at = pool.desired
            if pool.is_told or pool.mode is not model.PoolMode.PAUSED or paused_at is None:
                continue
            while left < 0 and pool.desired is not None and pool.desired > max(pool.live, pool.least):
                pool.desired -= 1
                left += pool.spec.worker_limit_bytes
            if pool.desired != paused_at:
                pool.reasons = (f"paused at {paused_at}, of which memory allows {pool.desired} at the start",)
        return left

    def _reasons(self, pool: pool_sizing.PoolSizing, share: int, *, gives: bool) -> tuple[str, ...]:
        spec, room = pool.spec, self._room
        others = sum(other.live * other.spec.worker_limit_bytes for other in self._pools if other is not pool)
        by_memory = (room.divisible - others) // spec.worker_limit_bytes
        reasons = [sizing.explained(room, pool.live, spec.worker_limit_bytes, by_memory, others_bytes=others)]
        if len(self._pools) > 1:
            backlog = pool.depth.backlog if pool.depth is not None else None
            shown = "not known, counts as an equal" if backlog is None else str(backlog)
            reasons.append(f"of {len(self._pools)} pools, priority {spec.priority}, backlog {shown}: {share}")
        if pool.mode is model.PoolMode.MANUAL:
            reasons.append(f"manual target {pool.manual_target}")
        elif share == spec.max_workers:
            reasons.append(f"MAX_WORKERS {spec.max_workers} is in force")
        if share == pool.least and by_memory <= share:
            reasons.append(f"MIN_WORKERS {pool.least} is in force")
        if gives:
            reasons.append(f"one less: {sizing.below_threshold(room, spec.threshold_bytes)}")
        if pool.is_overcommitted:
            reasons.append("overcommitted: the MINs are more than memory allows")
        if room.settled != room.divisible:
            reasons.append(f"{amounts.text(room.leaving)} come back when those on their way out have ended")
        return tuple(reasons)


def _claim(pool: pool_sizing.PoolSizing) -> division.Claim:
    """What a pool may have, as persons have ordered."""
    is_auto = pool.mode is model.PoolMode.AUTO
    return division.Claim(
        pool=pool.name,
        priority=pool.spec.priority,
        limit_bytes=pool.spec.worker_limit_bytes,
        # A paused pool keeps what it has; the others must do with the rest.
        min_workers=pool.most if pool.mode is model.PoolMode.PAUSED else pool.least,
        max_workers=pool.most,
        backlog=pool.depth.backlog if is_auto and pool.depth is not None else None,
        is_manual=pool.mode is model.PoolMode.MANUAL,
    )
