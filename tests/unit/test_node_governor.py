"""A host's governor, rule by rule: each test sets one scene and asserts what is decided, and why."""

import math

import pytest
import sizing_host
from leasehold.core import errors
from leasehold.core.node import governor, governor_effects, model, pool_sizing, saved_modes, settings

GB = model.GIB
POOL = "translation"
MANUAL, AUTO, PAUSED, STOPPED = (
    model.PoolMode.MANUAL,
    model.PoolMode.AUTO,
    model.PoolMode.PAUSED,
    model.PoolMode.STOPPED,
)


class Scene:
    """A governor, fed by hand: `available_gb` is what the host has beside the workers."""

    def __init__(
        self,
        *pools: model.PoolSpec,
        host: settings.HostSettings | None = None,
        saved: saved_modes.SavedModes | None = None,
        now: float = 1000.0,
    ) -> None:
        self.now = now
        self.host = host or settings.HostSettings()
        specs = pools or (sizing_host.spec(most=8),)
        self.governor = governor.Governor(self.host, specs, now=now, saved=saved)
        self.live = dict.fromkeys((spec.name for spec in specs), 0)
        self.held_gb = 4.0
        self.psi: tuple[float, float] = (0.0, 0.0)
        self.reclaimed: int | None = 0
        self.effects: list[governor_effects.Effect] = []

    def workers(self, pool: str) -> list[model.WorkerMemory]:
        return [
            model.WorkerMemory(
                name=f"{pool}_{number}@h",
                state=model.WorkerState.RUNNING,
                held_bytes=int(self.held_gb * GB),
                start_number=number,
            )
            for number in range(1, self.live[pool] + 1)
        ]

    def sample(self, available_gb: float, seconds: float = 1.0) -> list[governor_effects.Resize]:
        """Time passes, a sample is taken; every resize is carried out at once. Returns the resizes."""
        self.now += seconds
        memory = model.MemorySample(
            total_bytes=64 * GB,
            available_bytes=int(available_gb * GB),
            pressure_some_percent=self.psi[0],
            pressure_full_percent=self.psi[1],
            reclaimed_pages=self.reclaimed,
        )
        self.governor.sample(self.now, memory, {pool: self.workers(pool) for pool in self.live})
        return self.settle()

    def settle(self) -> list[governor_effects.Resize]:
        taken = self.governor.take_effects()
        self.effects += taken
        resizes = [effect for effect in taken if isinstance(effect, governor_effects.Resize)]
        for resize in resizes:
            self.live[resize.pool] = resize.desired
        return resizes

    def check(self, available_gb: float) -> list[governor_effects.Resize]:
        """The next check."""
        return self.sample(available_gb, self.host.check_interval_seconds)

    def view(self, pool: str = POOL) -> pool_sizing.PoolView:
        return self.governor.view(self.now, pool)


def test_growth_goes_to_the_optimum_in_one_decision_with_its_numbers() -> None:
    scene = Scene()

    scene.sample(32.0)
    resizes = scene.settle() or [
        effect for effect in scene.effects if isinstance(effect, governor_effects.Resize)
    ]

    assert resizes[-1].desired == 7  # (32 - 4) / 4
    decision = scene.governor.decisions(POOL, 1)[0]
    assert (decision.before, decision.after, decision.trigger) == (0, 7, "START")
    assert decision.numbers["available_bytes"] == 32 * GB
    assert "free 32.0 GB (available 32.0 GB + held 0 MB) - reserve 4.0 GB" in decision.reasons[0]


def grown(*pools: model.PoolSpec, available_gb: float = 24.1, **more: float) -> Scene:
    """A scene whose one pool has 5 workers that hold all of what there was, 4 GB and a bit left available."""
    scene = Scene(*pools)
    scene.sample(available_gb)
    scene.sample(available_gb - 4.0 * scene.live[next(iter(scene.live))])
    return scene


def test_a_shrink_needs_a_deficit_beyond_the_hysteresis_at_two_checks_running() -> None:
    scene = grown()
    assert scene.live[POOL] == 5

    assert scene.check(2.9) == []  # 1.1 GB short, once
    assert scene.check(4.1) == []  # and gone again
    assert scene.check(2.9) == []
    second = scene.check(2.9)

    assert [(each.desired, each.is_urgent) for each in second] == [(4, False)]
    assert "short, more than the hysteresis of 1.0 GB" in " ".join(second[0].decision.reasons)


def test_a_deficit_within_the_hysteresis_is_borne_and_told() -> None:
    scene = grown()

    for _ in range(5):
        assert scene.check(3.1) == []

    assert any("which the hysteresis of 1.0 GB bears" in reason for reason in scene.view().reasons)


def test_below_the_threshold_there_is_one_less_and_it_clears_a_gigabyte_higher() -> None:
    scene = Scene(sizing_host.spec(most=2, threshold_gb=20))
    scene.sample(21.0)
    assert scene.live[POOL] == 2

    assert scene.check(11.9) == []  # free = 19.9
    assert [each.desired for each in scene.check(11.9)] == [1]
    assert scene.check(16.5) == []  # free = 20.5: above, but not by a gigabyte
    assert [each.desired for each in scene.check(17.1)] == [2]


def test_the_least_beats_memory_and_is_told_as_overcommitted() -> None:
    scene = Scene(sizing_host.spec(least=3))

    scene.sample(5.0)
    scene.check(3.0)

    assert scene.live[POOL] == 3
    assert scene.view().is_overcommitted
    assert "overcommitted" in scene.view().summary


def test_the_hard_floor_acts_at_once_one_worker_at_a_time() -> None:
    scene = grown()

    first = scene.sample(1.9)
    assert [(each.desired, each.is_urgent, each.decision.trigger) for each in first] == [
        (4, True, "HARD_FLOOR")
    ]
    assert "below the hard floor of 2.0 GB" in first[0].decision.reasons[0]
    assert scene.sample(1.9) == []  # the memory of the first is awaited
    assert [each.desired for each in scene.sample(1.9, 5.0)] == [3]


def test_the_hard_floor_leaves_the_least() -> None:
    scene = Scene(sizing_host.spec(least=2, most=2))
    scene.sample(20.0)

    assert scene.sample(0.1) == []


def test_pressure_freezes_growth_after_ten_seconds_and_says_so() -> None:
    scene = Scene()
    scene.psi = (12.0, 0.0)
    scene.sample(4.5)
    for _ in range(11):
        scene.sample(4.5)

    assert scene.check(30.0) == []

    assert any("growth is frozen by memory pressure: some 12%" in reason for reason in scene.view().reasons)
    scene.psi = (0.0, 0.0)
    assert [each.desired for each in scene.check(30.0)] == [7]


def test_full_pressure_shrinks_by_one_and_awaits_the_effect() -> None:
    scene = grown()
    scene.psi, scene.reclaimed = (30.0, 12.0), 500

    told = [resize for _ in range(14) for resize in scene.sample(4.1)]

    assert [(each.desired, each.decision.trigger) for each in told] == [(4, "PRESSURE")]
    told = [resize for _ in range(15) for resize in scene.sample(4.1)]
    assert [each.desired for each in told] == [3]


def test_full_pressure_without_reclaimed_pages_only_freezes() -> None:
    scene = grown()
    scene.psi, scene.reclaimed = (30.0, 12.0), 0

    assert [resize for _ in range(25) for resize in scene.sample(4.1)] == []


def test_an_emergency_needs_no_such_evidence_and_goes_faster() -> None:
    scene = grown()
    scene.psi, scene.reclaimed = (80.0, 50.0), 0

    told = [resize for _ in range(17) for resize in scene.sample(4.1)]

    assert [each.desired for each in told] == [4, 3]


def test_a_manual_target_is_kept_and_memory_may_hold_it_lower() -> None:
    scene = grown()
    scene.governor.set_target(scene.now, POOL, 4)
    scene.settle()
    scene.sample(8.1)
    assert scene.view().summary == "manual 4, running 4; auto would be 5"

    scene.check(2.0)
    scene.check(2.0)

    assert scene.live[POOL] == 3
    assert scene.view().manual_target == 4
    scene.sample(6.0)
    assert scene.view().summary.startswith("manual 4, running 3: memory; auto would be ")
    assert [each.desired for each in scene.check(12.1)] == [4]


@pytest.mark.parametrize("workers", [0, 9])
def test_a_target_outside_the_bounds_is_refused_and_changes_nothing(workers: int) -> None:
    scene = grown()

    with pytest.raises(errors.InvalidArgument) as refused:
        scene.governor.set_target(scene.now, POOL, workers)

    assert refused.value.field == "target_workers"
    assert (scene.view().mode, scene.settle()) == (AUTO, [])


def test_a_target_beyond_memory_is_refused_with_the_numbers() -> None:
    scene = grown()

    with pytest.raises(errors.FailedPrecondition) as refused:
        scene.governor.set_target(scene.now, POOL, 7)

    assert "7 workers of 4.0 GB are beyond memory now, which allows 5" in refused.value.message
    assert refused.value.metadata["memory_allows"] == "5"
    assert scene.view().mode is AUTO


def test_a_hold_ends_by_itself() -> None:
    scene = grown()
    scene.governor.set_target(scene.now, POOL, 2, hold_seconds=60.0)
    scene.settle()
    assert scene.view().hold_remaining_seconds == 60.0
    assert scene.governor.next_deadline() <= scene.now + 60.0

    scene.sample(16.1, 59.0)
    assert scene.view().mode is MANUAL
    scene.sample(16.1, 1.5)

    assert scene.view().mode is AUTO
    assert scene.live[POOL] == 5


@pytest.mark.parametrize("hold_seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_hold_that_is_no_time_is_refused(hold_seconds: float) -> None:
    scene = grown()

    with pytest.raises(errors.InvalidArgument, match="hold_seconds"):
        scene.governor.set_target(scene.now, POOL, 2, hold_seconds=hold_seconds)


def test_paused_means_sizing_only() -> None:
    scene = grown()
    scene.governor.set_monitoring(scene.now, None, False)
    scene.governor.set_monitoring(scene.now, None, False)

    assert [resize for _ in range(4) for resize in scene.check(2.5)] == []
    assert [resize for _ in range(4) for resize in scene.check(40.0)] == []
    assert scene.view().mode is PAUSED
    assert [each.decision.trigger for each in scene.sample(1.0)] == ["HARD_FLOOR"]


def test_monitoring_again_ends_manual_and_paused_and_decides_at_once() -> None:
    scene = grown()
    scene.governor.set_target(scene.now, POOL, 2)
    scene.settle()
    scene.sample(16.1)

    scene.governor.set_monitoring(scene.now, POOL, True)

    assert [each.desired for each in scene.settle()] == [5]
    assert scene.view().mode is AUTO


def test_without_auto_scaling_a_pool_starts_paused_at_its_least() -> None:
    scene = Scene(sizing_host.spec(least=2, is_auto_scaling=False))

    scene.sample(60.0)

    resizes = [effect for effect in scene.effects if isinstance(effect, governor_effects.Resize)]
    assert (scene.view().mode, scene.view().desired) == (PAUSED, 2)
    assert [each.desired for each in resizes] == [2]


def test_a_stopped_pool_stays_at_nothing_until_it_is_started() -> None:
    scene = grown()
    scene.governor.set_stopped(scene.now, POOL, True)
    assert [each.desired for each in scene.settle()] == [0]

    assert scene.check(30.0) == []
    scene.governor.set_monitoring(scene.now, None, True)
    assert (scene.settle(), scene.view().mode) == ([], STOPPED)
    scene.governor.set_stopped(scene.now, POOL, False)

    assert [each.desired for each in scene.settle()] == [6]


def test_draining_stops_all_and_refuses_targets() -> None:
    scene = grown()
    scene.governor.set_draining(scene.now, True)
    assert [(each.desired, each.decision.trigger) for each in scene.settle()] == [(0, "DRAIN")]
    assert scene.check(30.0) == []

    with pytest.raises(errors.FailedPrecondition, match="draining"):
        scene.governor.set_target(scene.now, POOL, 2)

    scene.governor.set_draining(scene.now, False)
    assert [each.desired for each in scene.settle()] == [6]


def _saved(scene: Scene) -> saved_modes.SavedModes:
    saves = [effect for effect in scene.effects if isinstance(effect, governor_effects.SaveModes)]
    return saved_modes.SavedModes.decode(saves[-1].modes.encode())


def test_a_manual_target_survives_the_agent() -> None:
    scene = grown()
    scene.governor.set_target(scene.now, POOL, 3, hold_seconds=100.0)
    scene.settle()

    later = Scene(sizing_host.spec(most=8), saved=_saved(scene), now=scene.now + 40.0)
    later.sample(24.1)

    assert (later.live[POOL], later.view().mode) == (3, MANUAL)
    assert later.view().hold_remaining_seconds == pytest.approx(59.0)
    too_late = Scene(sizing_host.spec(most=8), saved=_saved(scene), now=scene.now + 140.0)
    assert too_late.view().mode is AUTO


@pytest.mark.parametrize("mode", [PAUSED, STOPPED])
def test_a_pause_and_a_stop_survive_the_agent(mode: model.PoolMode) -> None:
    scene = grown()
    if mode is PAUSED:
        scene.governor.set_monitoring(scene.now, None, False)
    else:
        scene.governor.set_stopped(scene.now, None, True)
    scene.settle()

    later = Scene(sizing_host.spec(most=8), saved=_saved(scene))
    later.sample(60.0)

    assert later.view().mode is mode
    assert later.live[POOL] == (5 if mode is PAUSED else 0)


@pytest.mark.parametrize(
    "document", [None, [], {}, {"version": 2, "pools": {}, "at_seconds": 0}, {"version": 1}]
)
def test_a_record_of_modes_that_is_none_is_refused(document: object) -> None:
    with pytest.raises(errors.InvalidArgument):
        saved_modes.SavedModes.decode(document)


def test_two_pools_get_their_least_then_the_higher_priority_the_rest() -> None:
    high, low = sizing_host.spec("high", priority=10), sizing_host.spec("low")
    scene = Scene(high, low)

    scene.sample(24.0)

    assert scene.live == {"high": 4, "low": 1}


def test_a_pool_is_given_no_memory_that_another_still_has() -> None:
    first, second = sizing_host.spec("first", threshold_gb=0), sizing_host.spec("second", threshold_gb=0)
    scene = Scene(first, second)
    scene.governor.depths(scene.now, {"first": model.Depth(ready=9), "second": model.Depth(ready=1)})
    scene.sample(28.0)
    assert scene.live == {"first": 5, "second": 1}
    scene.governor.depths(scene.now, {"first": model.Depth(ready=1), "second": model.Depth(ready=9)})

    # Its workers take their time: they run on, though they are asked to end.
    told = []
    for _ in range(5):
        running = dict(scene.live)
        told += [(resize.pool, resize.desired) for resize in scene.check(28.0 - 6 * 4.0)]
        scene.live = {"first": 5, "second": running["second"]}

    assert told == [("first", 1)]


def test_pools_exchange_workers_only_after_three_equal_checks() -> None:
    scene = Scene(sizing_host.spec("first", threshold_gb=0), sizing_host.spec("second", threshold_gb=0))
    scene.governor.depths(scene.now, {"first": model.Depth(ready=9), "second": model.Depth(ready=1)})
    scene.sample(28.0)
    scene.governor.depths(scene.now, {"first": model.Depth(ready=1), "second": model.Depth(ready=9)})

    rounds = [[(each.pool, each.desired) for each in scene.check(4.0)] for _ in range(2)]
    assert rounds == [[], []]
    assert [(each.pool, each.desired) for each in scene.check(4.0)] == [("first", 1)]
    assert [(each.pool, each.desired) for each in scene.check(20.0)] == [("second", 5)]


def test_a_depth_that_is_not_known_counts_as_an_equal() -> None:
    scene = Scene(sizing_host.spec("known", threshold_gb=0), sizing_host.spec("unknown", threshold_gb=0))
    scene.governor.depths(
        scene.now, {"known": model.Depth(ready=100), "unknown": model.Depth(error="no broker")}
    )

    scene.sample(28.0)

    assert scene.live == {"known": 3, "unknown": 3}


def test_the_ladder_before_a_limit_warns_replaces_and_kills_once_each() -> None:
    scene = Scene(sizing_host.spec(most=1))
    scene.sample(20.0)
    scene.held_gb = 3.3
    scene.sample(20.0)
    assert scene.view().warnings == ("translation_1@h holds 3.3 GB, 82% of its limit of 4.0 GB",)

    for held_gb in (3.7, 3.8, 4.1, 4.2):
        scene.held_gb = held_gb
        scene.sample(20.0)

    ladder = [
        effect
        for effect in scene.effects
        if isinstance(effect, (governor_effects.Replace | governor_effects.KillWorker))
    ]
    assert [type(effect).__name__ for effect in ladder] == ["Replace", "KillWorker"]
    assert "102% of its limit" in ladder[1].reason


def test_sampling_is_faster_while_memory_lasts_no_five_seconds() -> None:
    scene = grown()
    for available_gb in (3.9, 3.4, 2.9, 2.4):
        scene.sample(available_gb)
    for _ in range(30):
        scene.sample(20.0)

    paces = [
        effect.interval_seconds for effect in scene.effects if isinstance(effect, governor_effects.SampleFaster)
    ]
    assert paces == [0.1, 1.0]


def test_new_settings_are_in_force_at_once_and_orders_stay_within_them() -> None:
    scene = grown()
    scene.governor.set_target(scene.now, POOL, 5)
    scene.settle()

    scene.governor.reconfigure(scene.now, scene.host, [sizing_host.spec(most=3)])

    assert scene.view().manual_target == 3


def test_an_unknown_pool_is_not_found() -> None:
    with pytest.raises(errors.NotFound, match="known are translation"):
        grown().governor.view(0.0, "trnslation")
