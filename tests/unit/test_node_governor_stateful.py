"""Hypothesis drives a governor by hand: any order of samples, orders, reloads, restarts and leaps of memory.

The invariants are the rules of sizing that hold at every instant, judged from outside by what was told.
"""

import dataclasses
import itertools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from leasehold.core import errors
from leasehold.core.node import governor, governor_effects, model, saved_modes
from leasehold.core.node import settings as node_settings

GB = model.GIB
NAMES = ("high", "low", "other")
MODES_OF_SIZING = (model.PoolMode.AUTO, model.PoolMode.MANUAL)

pools = st.sampled_from(NAMES)
specs = st.builds(
    lambda least, more, limit, threshold, is_auto: {
        "min_workers": least,
        "max_workers": least + more,
        "worker_limit_bytes": limit * GB,
        "threshold_bytes": threshold * GB,
        "is_auto_scaling": is_auto,
    },
    st.integers(0, 2),
    st.integers(0, 6),
    st.integers(1, 6),
    st.integers(0, 40),
    st.booleans(),
)


@dataclasses.dataclass
class Worker:
    """A worker of the host, as far as its governor can tell."""

    pool: str
    number: int
    held: int = 0
    leaves_at: float | None = None


class SizedHost(RuleBasedStateMachine):
    """A host of 64 GB whose workers hold at most their limits, as a kernel would have it."""

    @initialize(first=specs, second=specs, third=specs, formula=st.sampled_from(node_settings.Formula))
    def begin(
        self,
        first: dict[str, int],
        second: dict[str, int],
        third: dict[str, int],
        formula: node_settings.Formula,
    ) -> None:
        self.now = 0.0
        self.host = node_settings.HostSettings(formula=formula)
        self.specs = {
            name: model.PoolSpec(name=name, template="command", priority=10 - 5 * rank, **given)  # type: ignore[arg-type]
            for rank, (name, given) in enumerate(zip(NAMES, (first, second, third), strict=True))
        }
        self.others = 4 * GB
        self.workers: list[Worker] = []
        self.numbers = itertools.count(1)
        self.told: dict[str, int] = {}
        self.last: dict[str, model.Decision] = {}
        self.saved: saved_modes.SavedModes | None = None
        self.decided = 0
        self.is_draining = False
        self.sizer = governor.Governor(self.host, list(self.specs.values()), now=self.now)
        self._sample()

    # What the environment does

    @rule(seconds=st.sampled_from((1, 2, 10, 30, 61)), fill=st.floats(0, 1))
    def time_passes(self, seconds: int, fill: float) -> None:
        """Workers start, fill and end; a sample each second."""
        for _ in range(seconds):
            self.now += 1.0
            self.workers = [
                each for each in self.workers if each.leaves_at is None or each.leaves_at > self.now
            ]
            for worker in self.workers:
                worker.held = max(worker.held, int(fill * self.specs[worker.pool].worker_limit_bytes))
            self._sample()

    @rule(gb=st.integers(0, 62))
    def others_take(self, gb: int) -> None:
        """Other programs have so much of the host."""
        self.others = gb * GB

    @rule(pool=pools)
    def a_worker_crashes(self, pool: str) -> None:
        """One is gone, without being asked."""
        alive = [each for each in self.workers if each.pool == pool]
        if alive:
            self.workers.remove(alive[0])

    @rule(pool=pools, ready=st.none() | st.integers(0, 50))
    def depth(self, pool: str, ready: int | None) -> None:
        """A queue tells what waits, or does not."""
        self.sizer.depths(self.now, {pool: model.Depth(ready=ready)})

    # What persons order

    @rule(pool=pools, workers=st.integers(0, 9), hold=st.none() | st.sampled_from((5.0, 100.0)))
    def scale(self, pool: str, workers: int, hold: float | None) -> None:
        """A target, that may be refused; then nothing has changed."""
        before = self._shown()
        try:
            self.sizer.set_target(self.now, pool, workers, hold_seconds=hold)
        except (errors.InvalidArgument, errors.FailedPrecondition) as error:
            assert any(sign.isdigit() for sign in error.message) or self.is_draining
            assert self._shown() == before
        self._settle()

    @rule(pool=st.none() | pools, order=st.sampled_from(("auto", "pause", "resume", "stop", "start")))
    def order(self, pool: str | None, order: str) -> None:
        """Each is idempotent: a second one changes nothing."""
        for _ in range(2):
            before = self._shown()
            if order == "auto" and pool is not None:
                self.sizer.set_auto(self.now, pool)
            elif order in ("pause", "resume"):
                self.sizer.set_monitoring(self.now, pool, order == "resume")
            elif order in ("stop", "start"):
                self.sizer.set_stopped(self.now, pool, order == "stop")
            self._settle()
        assert self._shown() == before

    @rule(is_draining=st.booleans())
    def drain(self, is_draining: bool) -> None:
        """Have none at all, or go on."""
        self.is_draining = is_draining
        self.sizer.set_draining(self.now, is_draining)
        self._settle()

    @rule(pool=pools, given=specs)
    def reload(self, pool: str, given: dict[str, int]) -> None:
        """Other settings for a pool."""
        self.specs[pool] = dataclasses.replace(self.specs[pool], **given)  # type: ignore[arg-type]
        self.sizer.reconfigure(self.now, self.host, list(self.specs.values()))
        self._settle()

    @precondition(lambda self: not self.is_draining)
    @rule()
    def another_agent(self) -> None:
        """The agent is killed; the next one goes on by what is on disk."""
        before = {name: self.sizer.view(self.now, name) for name in NAMES}
        saved = saved_modes.SavedModes.decode(self.saved.encode()) if self.saved is not None else None
        self.sizer = governor.Governor(
            self.host,
            list(self.specs.values()),
            now=self.now,
            saved=saved,
            decision_number=self.decided,
        )
        for name in NAMES:
            after = self.sizer.view(self.now, name)
            assert after.mode is before[name].mode
            assert after.manual_target == before[name].manual_target
        self.told.clear()
        self._sample()
        assert set(self.told) == set(NAMES)

    # How it is carried out

    def _available(self) -> int:
        return max(0, 64 * GB - self.others - sum(each.held for each in self.workers))

    def _seen(self, pool: str) -> list[model.WorkerMemory]:
        return [
            model.WorkerMemory(
                name=f"{pool}_{each.number}@h",
                state=model.WorkerState.RUNNING if each.leaves_at is None else model.WorkerState.STOPPING,
                held_bytes=each.held,
                start_number=each.number,
                is_limit_enforced=True,
            )
            for each in self.workers
            if each.pool == pool
        ]

    def _sample(self) -> None:
        memory = model.MemorySample(total_bytes=64 * GB, available_bytes=self._available())
        self.sizer.sample(self.now, memory, {name: self._seen(name) for name in NAMES})
        self._settle()

    def _live(self, pool: str) -> list[Worker]:
        return [each for each in self.workers if each.pool == pool and each.leaves_at is None]

    def _settle(self) -> None:
        """Take effects; judge each against what the host is at this instant; then carry them out."""
        for effect in self.sizer.take_effects():
            if isinstance(effect, governor_effects.Resize):
                self._judge(effect)
                self.told[effect.pool] = effect.desired
                self.last[effect.pool] = effect.decision
                self.decided = effect.decision.number
            elif isinstance(effect, governor_effects.SaveModes):
                self.saved = effect.modes
        for pool, desired in self.told.items():
            live = self._live(pool)
            for each in live[desired:]:
                each.leaves_at = self.now + 20.0
            self.workers += [Worker(pool, next(self.numbers)) for _ in range(desired - len(live))]

    def _judge(self, resize: governor_effects.Resize) -> None:
        spec, decision = self.specs[resize.pool], resize.decision
        assert decision.reasons, "a decision without a reason"
        assert decision.after == resize.desired
        assert decision.number > self.decided
        assert 0 <= resize.desired <= spec.max_workers
        if decision.trigger in ("HARD_FLOOR", "PRESSURE"):
            assert resize.desired < decision.before
            assert resize.desired >= min(spec.min_workers, decision.before - 1)
        if decision.trigger == "CHECK" and resize.desired > max(decision.before, spec.min_workers):
            assert self._charges({**self.told, resize.pool: resize.desired}) <= self._room(), "over memory"

    def _charges(self, wanted: dict[str, int]) -> int:
        """Every worker that runs, or is wanted, at its limit; those on their way out, too."""
        total = 0
        for name in NAMES:
            count = max(len(self._live(name)), wanted.get(name, 0))
            leaving = sum(each.pool == name and each.leaves_at is not None for each in self.workers)
            total += (count + leaving) * self.specs[name].worker_limit_bytes
        return total

    def _room(self) -> int:
        held = sum(each.held for each in self.workers)
        return self._available() + held - self.host.reserve_bytes

    def _shown(self) -> dict[str, tuple[object, ...]]:
        views = {name: self.sizer.view(self.now, name) for name in NAMES}
        return {name: (view.mode, view.desired, view.manual_target) for name, view in views.items()}

    # What holds at every instant

    @invariant()
    def what_was_told_is_what_is_wanted(self) -> None:
        """The driver's number is the governor's, so neither waits for the other."""
        for name, told in self.told.items():
            assert self.sizer.view(self.now, name).desired == told

    @invariant()
    def the_bounds_hold(self) -> None:
        """MIN to MAX of those that size themselves; a person's target is above none; stopped is none."""
        for name in self.told:
            view, spec = self.sizer.view(self.now, name), self.specs[name]
            if self.is_draining or view.mode is model.PoolMode.STOPPED:
                assert view.desired == 0
            elif view.mode is model.PoolMode.MANUAL:
                assert view.manual_target is not None
                assert spec.min_workers <= view.manual_target <= spec.max_workers
                assert spec.min_workers <= view.desired <= view.manual_target
            elif view.mode is model.PoolMode.PAUSED:
                assert spec.min_workers <= view.desired <= spec.max_workers
            else:
                assert spec.min_workers <= view.desired <= spec.max_workers
            assert spec.min_workers <= view.optimal <= spec.max_workers

    @invariant()
    def everything_can_be_explained(self) -> None:
        """Each pool has a summary and, once decided about, reasons."""
        for name in self.told:
            view = self.sizer.view(self.now, name)
            assert view.summary and view.reasons
            assert len(self.sizer.decisions(name, 1000)) <= 200

    @invariant()
    def no_deadline_is_in_the_past_for_long(self) -> None:
        """After a tick nothing is due any more: a driver that waits for the deadline does not spin."""
        self.sizer.tick(self.now)
        self._settle()
        assert self.sizer.next_deadline() > self.now


TestSizedHost = SizedHost.TestCase
TestSizedHost.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
