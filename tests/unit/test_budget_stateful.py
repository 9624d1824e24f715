"""Hypothesis drives the simulated world by hand: any order of joins, leaves, freezes, lost and late messages,
leader changes, forks and clock jumps. The auditor judges at every step, as do the core's own audits.
"""

import dataclasses
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from leasehold.core.budget import holder as holders
from leasehold.core.budget import model
from leasehold.sim import actors_holder, network, store, world, world_scenarios

TTL_SECONDS = 2.0


class BudgetWorld(RuleBasedStateMachine):
    """Rules are what the environment may do; time passes between them."""

    names = Bundle("names")

    @initialize(
        seed=st.integers(0, 10_000),
        charged_at=st.sampled_from(model.ChargedAt),
        users=st.integers(1, 8),
        certifies=st.booleans(),
    )
    def begin(self, seed: int, charged_at: model.ChargedAt, users: int, certifies: bool) -> None:
        spec = dataclasses.replace(world_scenarios.quick_spec(random.Random(seed)), charged_at=charged_at)
        scenario = world_scenarios.Scenario(
            name="stateful",
            spec=spec,
            holders=0,
            replicas=2,
            unary_holders=1,
            conditions=network.Conditions(),
            keepalive_seconds=3.0,
            certifies=certifies,
            load=actors_holder.Load(users=users),
            faults_until=1e9,
        )
        self.world = world.World(scenario, seed)
        self.clean = scenario.conditions
        self._pass(1.0)

    def _pass(self, seconds: float) -> None:
        self.world.run(until=self.world.scheduler.now + seconds)

    def _life(self, name: str) -> actors_holder.HolderProcess | None:
        life = self.world.holders.get(name)
        return life if life is not None and life.is_alive else None

    # Holders

    @rule(target=names, number=st.integers(0, 5))
    def join(self, number: int) -> Any:
        """A first life, or another that supersedes one which may be alive."""
        name = f"w{number}"
        self.world.start_holder(name)
        return name

    @rule(name=names)
    def leave(self, name: str) -> None:
        life = self._life(name)
        if life is None or life.is_frozen or life.stream is None:
            return
        if life.core.state is not holders.HolderState.ENDED:
            life.stream.up(life.core.make_release(life.now))
            life.work(False)

    @rule(name=names, restart=st.sampled_from([None, 0.01, 1.0]))
    def crash(self, name: str, restart: float | None) -> None:
        if self._life(name) is not None:
            self.world.crash_holder(name, restart_after=restart)

    @rule(name=names)
    def freeze(self, name: str) -> None:
        life = self._life(name)
        if life is not None:
            life.freeze()

    @rule(name=names)
    def thaw(self, name: str) -> None:
        life = self._life(name)
        if life is not None:
            life.thaw()

    @rule(name=names, seconds=st.floats(0.1, 3 * TTL_SECONDS))
    def suspend(self, name: str, seconds: float) -> None:
        life = self._life(name)
        if life is not None and not life.is_frozen:
            life.freeze()
            self._pass(seconds)
            life.thaw()

    @rule(target=names, name=names)
    def fork(self, name: str) -> Any:
        life = self._life(name)
        if life is None or life.core.state is not holders.HolderState.HELD:
            return multiple()
        self.world.fork(life)
        return multiple()

    @rule(name=names, is_working=st.booleans())
    def work(self, name: str, is_working: bool) -> None:
        life = self._life(name)
        if life is not None:
            life.work(is_working)

    # Messages

    @rule(stall=st.sampled_from([0.0, 0.05, 0.3]), loss=st.sampled_from([0.0, 0.3]))
    def network_turns(self, stall: float, loss: float) -> None:
        """Messages are held up, and so overtaken by those of other connections; calls are lost and doubled."""
        self.world.network.conditions = dataclasses.replace(
            self.clean,
            stall_probability=stall,
            stall_seconds_max=2 * TTL_SECONDS,
            loss_probability=loss,
            duplication_probability=loss,
        )

    @rule(name=names, hidden=st.sampled_from([None, 1.0, 4.0]))
    def break_stream(self, name: str, hidden: float | None) -> None:
        """Replies are lost; some of what is under way may arrive later than what is said on the next stream."""
        for stream, life, _ in self.world.live_streams():
            if life.name == name:
                self.world.break_stream(stream, holder_hears_after=hidden)
                return

    @rule(name=names, is_cut=st.booleans(), number=st.integers(0, 1))
    def partition(self, name: str, is_cut: bool, number: int) -> None:
        life, place = self._life(name), sorted(self.world.replicas)[number]
        if life is not None:
            (self.world.network.cut if is_cut else self.world.network.heal)(life.place, place)

    # Leaders

    @rule(lost=st.sampled_from([0.0, 0.1]))
    def answers_of_etcd_get_lost(self, lost: float) -> None:
        self.world.store.lost_answer_probability = lost

    @rule(number=st.integers(0, 1), is_cut=st.booleans())
    def cut_leader_off(self, number: int, is_cut: bool) -> None:
        """It goes on talking to holders."""
        place = sorted(self.world.replicas)[number]
        (self.world.network.cut if is_cut else self.world.network.heal)(place, store.STORE)

    @rule(number=st.integers(0, 1), seconds=st.floats(0.05, 2 * TTL_SECONDS))
    def freeze_replica(self, number: int, seconds: float) -> None:
        replica = self.world.replicas[sorted(self.world.replicas)[number]]
        replica.freeze()
        self.world.scheduler.after(seconds, replica.thaw)

    @rule()
    def leader_resigns(self) -> None:
        leader = self.world.leader()
        if leader is not None:
            self.world.store.resign(leader.place)

    @rule()
    def wipe_etcd(self) -> None:
        self.world.wipe_etcd()

    # Administrators

    @rule(halves=st.lists(st.booleans(), min_size=3, max_size=3), ttl=st.sampled_from([1.0, 2.0, 3.0]))
    def change_limits(self, halves: list[bool], ttl: float) -> None:
        first = self.world.scenario.spec.dimensions
        dimensions = tuple(
            dataclasses.replace(d, limit=d.limit // 2 // 1_000_000 * 1_000_000 if half else d.limit)
            for d, half in zip(first, halves, strict=True)
        )
        self.world.redefine(dataclasses.replace(self.world.spec, dimensions=dimensions, ttl_seconds=ttl))

    @rule()
    def delete_and_create(self) -> None:
        self.world.delete_and_create()

    # Time

    @rule(seconds=st.sampled_from([0.005, 0.1, 0.5, 2.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self._pass(seconds)

    @invariant()
    def the_stock_is_conserved(self) -> None:
        if not hasattr(self, "world"):
            return
        for replica in self.world.replicas.values():
            self.world.check(replica)
        self.world.check_etcd()
        for life in self.world.holders.values():
            life.limiter.audit()


BudgetWorld.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestBudgetWorld = BudgetWorld.TestCase


def test_a_raise_that_a_frozen_leader_never_heard_of_is_in_force_under_the_next() -> None:
    state = BudgetWorld()
    state.begin(seed=2, charged_at=model.ChargedAt.ARRIVAL, users=1, certifies=False)
    state.change_limits(halves=[True, False, False], ttl=3.0)
    state.time_passes(seconds=5.0)
    # The cut's grace is not over yet when the limit is raised again.
    state.freeze_replica(number=0, seconds=1.0)
    state.change_limits(halves=[False, False, False], ttl=1.0)
    state.time_passes(seconds=2.0)
    state.the_stock_is_conserved()
    leader = state.world.leader()
    assert leader is not None and leader.core is not None
    assert leader.place == sorted(state.world.replicas)[1]
    assert leader.core.budget("llm").book.in_force[0] == state.world.scenario.spec.dimensions[0].limit
