"""Faults of a simulated world: each kind strikes again and again until the scenario's faults are over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from leasehold.core.budget import holder as holders
from leasehold.core.budget import messages, model, quantity
from leasehold.sim import actors_holder, store

if TYPE_CHECKING:
    from leasehold.sim.world import World


class Faults:
    """Strikes, and stops."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_over = False
        self.strikes: dict[str, int] = {}
        self._restore: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Schedule the first strike of each kind, and the end of all."""
        chosen = self.world.scenario.faults
        for field in dataclasses.fields(chosen):
            mean_seconds = getattr(chosen, field.name)
            if mean_seconds:
                self._next(field.name, mean_seconds)
        self.world.scheduler.at(self.world.scenario.faults_until, self.end)

    def _next(self, kind: str, mean_seconds: float) -> None:
        seconds = self.world.rng.expovariate(1.0 / mean_seconds)
        self.world.scheduler.after(seconds, lambda: self._strike(kind, mean_seconds))

    def _strike(self, kind: str, mean_seconds: float) -> None:
        if self.is_over:
            return
        getattr(self, f"_{kind}")()
        self.strikes[kind] = self.strikes.get(kind, 0) + 1
        self._next(kind, mean_seconds)

    def end(self) -> None:
        """All is well from now on: whoever is frozen thaws, whoever is dead starts, everybody works."""
        self.is_over = True
        world = self.world
        if world.scenario.faults.term_change:
            world.redefine(world.scenario.spec)
        world.network.heal_all()
        world.network.conditions = dataclasses.replace(
            world.network.conditions, stall_probability=0.0, loss_probability=0.0, duplication_probability=0.0
        )
        world.store.lost_answer_probability = 0.0
        for action in self._restore:
            action()
        for replica in world.replicas.values():
            replica.thaw()
        for name, life in list(world.holders.items()):
            life.thaw()
            if not life.is_alive or life.core.state is holders.HolderState.ENDED:
                world.start_holder(name)
            else:
                life.work(True)

    # Whom it strikes

    def _holder(self) -> actors_holder.HolderProcess | None:
        lives = [life for _, life in sorted(self.world.holders.items()) if life.is_alive and not life.is_frozen]
        return self.world.rng.choice(lives) if lives else None

    # Holders

    def _crash(self) -> None:
        life = self._holder()
        if life is not None:
            self.world.crash_holder(life.name, restart_after=self.world.rng.choice((0.01, 0.5, 3.0)))

    def _leave(self) -> None:
        """A holder gives its lease back, and comes again later."""
        world = self.world
        life = self._holder()
        if life is None or life.core.state is holders.HolderState.ENDED or life.stream is None:
            return
        life.stream.up(life.core.make_release(life.now))
        life.work(False)
        world.scheduler.after(world.rng.uniform(0.1, 3.0), lambda: self._come_back(life))

    def _come_back(self, life: actors_holder.HolderProcess) -> None:
        if self.world.holders.get(life.name) is life:
            self.world.start_holder(life.name, place=None)

    def _freeze(self) -> None:
        life = self._holder()
        if life is not None:
            life.freeze()
            seconds = self.world.spec.ttl_seconds * self.world.rng.choice((0.3, 0.9, 1.0, 1.2, 3.0))
            self.world.scheduler.after(seconds, life.thaw)

    def _suspend(self) -> None:
        """A laptop sleeps with all on it: CLOCK_BOOTTIME goes on, CLOCK_MONOTONIC does not."""
        world = self.world
        seconds = world.spec.ttl_seconds * world.rng.uniform(0.5, 2.5)
        if world.rng.random() < 0.3:
            replica = world.replicas[world.rng.choice(sorted(world.replicas))]
            if replica.is_alive and not replica.is_frozen:
                replica.freeze()

                def wake() -> None:
                    replica.clock.stand_still(seconds)
                    replica.thaw()

                world.scheduler.after(seconds, wake)
            return
        life = self._holder()
        if life is not None:
            life.freeze()

            def wake_holder() -> None:
                world.woke_from_suspend(life, seconds)
                life.thaw()

            world.scheduler.after(seconds, wake_holder)

    def _fork(self) -> None:
        """A child copies the memory; by the shell's at-fork rule it starts fenced, as a new incarnation."""
        life = self._holder()
        if life is not None and life.core.state is holders.HolderState.HELD:
            self.world.fork(life)

    def _idle(self) -> None:
        life = self._holder()
        if life is not None:
            life.work(not life.is_working)

    def _throttle(self) -> None:
        """One provider event, seen by many."""
        world = self.world
        throttle = messages.Throttle("rpm_limit", world.rng.choice((0.0, 1.0, 2.0)))
        for life in world.holders.values():
            if life.is_alive and world.rng.random() < 0.8:
                life.do(lambda life=life: life.core.throttled(throttle))  # type: ignore[misc]

    # Network

    def _broken_stream(self) -> None:
        streams = self.world.live_streams()
        if streams:
            stream, _, _ = self.world.rng.choice(streams)
            self.world.break_stream(stream)

    def _hidden_break(self) -> None:
        """The allocator sees the stream break; its holder spends on, and hears of it late."""
        streams = self.world.live_streams()
        if streams:
            stream, _, _ = self.world.rng.choice(streams)
            seconds = self.world.spec.ttl_seconds * self.world.rng.uniform(0.5, 2.0)
            self.world.break_stream(stream, holder_hears_after=seconds)

    def _partition(self) -> None:
        world = self.world
        life = self._holder()
        if life is None:
            return
        place = world.rng.choice(sorted(world.replicas))
        world.network.cut(life.place, place)
        seconds = world.spec.ttl_seconds * world.rng.uniform(0.2, 2.0)
        world.scheduler.after(seconds, lambda: world.network.heal(life.place, place))

    # Leaders and etcd

    def _leader_crash(self) -> None:
        world = self.world
        leader = world.leader()
        if leader is None:
            return
        leader.die()
        for stream in list(leader.streams.values()):
            world.break_stream(stream, is_heard=world.rng.random() < 0.7)
        del world.replicas[leader.place]
        name = world.replica_name()
        if len(world.replicas) == 0 or world.rng.random() < 0.5:
            world.start_replica(name)
        else:
            world.scheduler.after(world.rng.uniform(0.1, 3.0), lambda: world.start_replica(name))

    def _leader_freeze(self) -> None:
        world = self.world
        leader = world.leader()
        if leader is not None and not leader.is_frozen:
            leader.freeze()
            ttl = world.scenario.elector_ttl_seconds
            world.scheduler.after(ttl * world.rng.choice((0.3, 1.2, 2.0, 5.0)), leader.thaw)

    def _leader_cut_off(self) -> None:
        """It goes on talking to holders."""
        world = self.world
        leader = world.leader()
        if leader is not None:
            world.network.cut(leader.place, store.STORE)
            seconds = world.scenario.elector_ttl_seconds * world.rng.uniform(0.3, 6.0)
            world.scheduler.after(seconds, lambda: world.network.heal(leader.place, store.STORE))

    def _wipe(self) -> None:
        """etcd loses everything; an operator accepts the new cluster."""
        self.world.wipe_etcd()

    # Administrators

    def _limit_change(self) -> None:
        world, rng = self.world, self.world.rng
        dimensions = []
        for index, known in enumerate(world.spec.dimensions):
            factor = rng.choice((0.5, 0.75, 1.0, 1.0, 1.5)) if known.limit < 4 * self._first(index) else 0.5
            limit = int(max(known.limit * factor, self._first(index) / 2)) // quantity.MICRO * quantity.MICRO
            if known.name == "tpm_limit":
                limit = max(limit, world.spec.max_tokens_per_request, 500 * quantity.MICRO)
            dimensions.append(dataclasses.replace(known, limit=limit))
        ttl = rng.choice((2.0, 2.0, 1.0, 3.0))
        world.redefine(dataclasses.replace(world.spec, dimensions=tuple(dimensions), ttl_seconds=ttl))

    def _first(self, index: int) -> int:
        dimensions = self.world.scenario.spec.dimensions
        return dimensions[min(index, len(dimensions) - 1)].limit

    def _new_dimension(self) -> None:
        world = self.world
        name = f"extra_{len(world.spec.dimensions)}"
        if len(world.spec.dimensions) < 6:
            added = model.Dimension(
                name=name, kind=model.DimensionKind.RATE, limit=50 * quantity.MICRO, window_seconds=5.0
            )
            world.redefine(dataclasses.replace(world.spec, dimensions=(added, *world.spec.dimensions)))

    def _term_change(self) -> None:
        """Calls and safe capacities may last shorter, or as long again as at first."""
        world, rng = self.world, self.world.rng
        first = world.scenario.spec
        changed = dataclasses.replace(
            world.spec,
            max_call_seconds=first.max_call_seconds * rng.choice((0.2, 0.5, 1.0)),
            safe_ttl_seconds=first.safe_ttl_seconds * rng.choice((0.0, 0.3, 1.0)),
            holder_classes=rng.choice(((), _safe_within(first, world.spec.dimensions))),
        )
        world.redefine(changed)

    def _removal(self) -> None:
        world, rng = self.world, self.world.rng
        if len(world.spec.dimensions) < 2:
            return
        gone = rng.choice(world.spec.dimensions)
        self._redimension(tuple(each for each in world.spec.dimensions if each is not gone))
        world.scheduler.after(rng.uniform(0.05, 4.0), lambda: self._bring_back(gone.name))

    def _bring_back(self, name: str) -> None:
        present = {each.name for each in self.world.spec.dimensions}
        if name in present:
            return
        present.add(name)
        self._redimension(tuple(each for each in self.world.scenario.spec.dimensions if each.name in present))

    def _redimension(self, dimensions: tuple[model.Dimension, ...]) -> None:
        spec = self.world.spec
        classes = _safe_within(spec, dimensions)
        self.world.redefine(dataclasses.replace(spec, dimensions=dimensions, holder_classes=classes))

    def _recreation(self) -> None:
        self.world.delete_and_create()


def _safe_within(
    spec: model.BudgetSpec, dimensions: tuple[model.Dimension, ...]
) -> tuple[model.HolderClass, ...]:
    """The classes of a budget, with safe capacity only in these dimensions."""
    names = {dimension.name for dimension in dimensions}
    return tuple(
        dataclasses.replace(
            each, safe_capacity={name: part for name, part in each.safe_capacity.items() if name in names}
        )
        for each in spec.holder_classes
    )
