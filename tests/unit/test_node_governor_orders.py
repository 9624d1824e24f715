"""What went wrong once with orders, pauses, holds and drains, told again one scene each."""

import dataclasses

import pytest
import sizing_host
from governor_kit import HOST, PLAIN, POOL, begun, memory, resizes, workers
from leasehold.core import errors
from leasehold.core.node import governor, governor_effects, model, saved_modes


def test_below_the_threshold_noise_takes_no_second_worker_and_brings_none_back() -> None:
    spec = sizing_host.spec(threshold_gb=40)
    sizer = begun(spec, 24.2, [])  # 20.2 GB are room for 5, less one
    assert resizes(sizer) == [(POOL, 4)]

    for check in range(1, 40):
        wave = 0.5 if check % 4 < 2 else -0.5  # twice below what 5 need, twice above
        sizer.sample(check * 30.0, memory(8.2 + wave), {POOL: workers(4)})

    assert resizes(sizer) == []


def test_below_the_threshold_another_goes_when_what_is_kept_free_for_it_is_short_beyond_the_hysteresis() -> (
    None
):
    sizer = begun(sizing_host.spec(threshold_gb=40), 24.1, [])
    assert resizes(sizer) == [(POOL, 4)]

    for check in (1, 2):
        sizer.sample(check * 30.0, memory(7.2), {POOL: workers(4)})  # 19.2 are 0.8 short of 5
    assert resizes(sizer) == []
    for check in (3, 4):
        sizer.sample(check * 30.0, memory(6.9), {POOL: workers(4)})  # 1.1 short

    assert resizes(sizer) == [(POOL, 3)]


def test_a_raised_min_is_in_force_at_once_memory_or_not() -> None:
    sizer = begun(PLAIN, 4.1, workers(2))
    resizes(sizer)

    sizer.reconfigure(1.0, HOST, [dataclasses.replace(PLAIN, min_workers=4)])

    assert resizes(sizer) == [(POOL, 4)]
    assert sizer.view(1.0, POOL).is_overcommitted


def test_a_target_is_refused_for_what_other_pools_have_and_are_about_to_have() -> None:
    one, two = sizing_host.spec("one", most=9, threshold_gb=0), sizing_host.spec("two", most=9, threshold_gb=0)
    sizer = governor.Governor(HOST, [one, two], now=0.0)
    sizer.sample(0.0, memory(28.1), {})
    assert resizes(sizer) == [("one", 3), ("two", 3)]

    with pytest.raises(errors.FailedPrecondition) as refused:
        sizer.set_target(1.0, "one", 4)

    assert refused.value.metadata["memory_allows"] == "3"
    sizer.set_target(2.0, "two", 1)
    sizer.set_target(3.0, "one", 5)


def test_the_end_of_a_hold_is_a_deadline() -> None:
    sizer = begun(PLAIN, 20.1, [])
    sizer.set_target(1.0, POOL, 2, hold_seconds=5.0)

    assert sizer.next_deadline() == 6.0


@pytest.mark.parametrize(("workers_saved", "expected"), [(9, 4), (0, 1)])
def test_a_saved_target_stays_within_bounds_that_were_narrowed_since(workers_saved: int, expected: int) -> None:
    saved = saved_modes.SavedMode(mode=model.PoolMode.MANUAL, workers=workers_saved)

    sizer = begun(
        dataclasses.replace(PLAIN, max_workers=4),
        60.1,
        [],
        saved=saved_modes.SavedModes(pools={POOL: saved}),
    )

    assert sizer.view(0.0, POOL).manual_target == expected
    assert resizes(sizer) == [(POOL, expected)]


def test_orders_act_at_once_but_count_for_no_checks_running() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)
    sizer.sample(1.0, memory(2.5), {POOL: workers(8)})

    for now in range(2, 20):
        sizer.set_monitoring(float(now), None, True)
        sizer.reconfigure(float(now), HOST, [PLAIN])

    assert resizes(sizer) == []


def test_an_order_that_changes_nothing_decides_nothing() -> None:
    sizer = begun(PLAIN, 36.1, workers(5))
    sizer.set_stopped(1.0, POOL, True)
    sizer.set_stopped(1.1, POOL, False)
    told = resizes(sizer)[-1]

    for _ in range(3):
        sizer.set_stopped(1.2, POOL, False)
        sizer.set_monitoring(1.2, POOL, True)
        sizer.set_auto(1.2, POOL)

    assert resizes(sizer) == []
    assert sizer.view(1.2, POOL).desired == told[1]


def test_orders_do_not_put_off_the_check_that_is_due() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)

    for now in range(1, 62):
        sizer.reconfigure(float(now), HOST, [PLAIN])
        sizer.sample(float(now), memory(2.5), {POOL: workers(8)})

    assert resizes(sizer) == [(POOL, 7)]


@pytest.mark.parametrize(
    ("saved", "least", "expected", "why"),
    [
        (None, 2, 2, "ENABLE_AUTO_SCALING is false: paused, at MIN_WORKERS 2 from the start"),
        (saved_modes.SavedMode(mode=model.PoolMode.PAUSED, workers=5), 1, 5, "sizing was paused by hand at 5"),
        (saved_modes.SavedMode(mode=model.PoolMode.STOPPED), 1, 0, "stopped by hand"),
    ],
)
def test_a_pool_that_sizes_itself_not_at_the_start_is_told_its_number_and_says_why(
    saved: saved_modes.SavedMode | None, least: int, expected: int, why: str
) -> None:
    modes = saved_modes.SavedModes(pools={POOL: saved}) if saved is not None else None
    spec = sizing_host.spec(least=least, is_auto_scaling=False)

    sizer = begun(spec, 60.0, workers(3), saved=modes)

    assert resizes(sizer) == [(POOL, expected)]
    assert sizer.view(0.0, POOL).reasons == (why,)
    assert [each.reasons for each in sizer.decisions(POOL, 9) if each.trigger == "START"] == [(why,)]


def test_a_pause_by_the_settings_is_no_order_and_ends_with_them() -> None:
    sizer = begun(sizing_host.spec(is_auto_scaling=False), 60.0, [])
    sizer.set_stopped(1.0, POOL, False)  # changes nothing, but saves

    saves = [each for each in sizer.take_effects() if isinstance(each, governor_effects.SaveModes)]
    later = begun(sizing_host.spec(), 60.0, [], saved=saves[-1].modes)

    assert saves[-1].modes.pools == {}
    assert later.view(0.0, POOL).mode is model.PoolMode.AUTO


def test_a_pause_by_hand_of_a_pool_that_is_paused_by_the_settings_is_an_order() -> None:
    sizer = begun(sizing_host.spec(is_auto_scaling=False), 60.0, [])
    sizer.set_monitoring(1.0, POOL, False)

    saves = [each for each in sizer.take_effects() if isinstance(each, governor_effects.SaveModes)]
    later = begun(sizing_host.spec(), 60.0, [], saved=saves[-1].modes)

    assert later.view(0.0, POOL).mode is model.PoolMode.PAUSED


def test_a_hold_ends_where_the_settings_say_paused_at_min() -> None:
    sizer = begun(sizing_host.spec(least=1, is_auto_scaling=False), 60.0, workers(1))
    sizer.set_target(1.0, POOL, 4, hold_seconds=10.0)
    assert resizes(sizer) == [(POOL, 1), (POOL, 4)]

    sizer.tick(11.0)

    assert resizes(sizer) == [(POOL, 1)]
    assert sizer.view(11.0, POOL).mode is model.PoolMode.PAUSED


def test_auto_by_hand_survives_the_agent_where_the_settings_say_paused() -> None:
    spec = sizing_host.spec(is_auto_scaling=False)
    sizer = begun(spec, 60.0, workers(1))
    sizer.set_auto(1.0, POOL)
    saves = [each for each in sizer.take_effects() if isinstance(each, governor_effects.SaveModes)]

    later = begun(spec, 40.0, workers(5), saved=saves[-1].modes)

    assert later.view(0.0, POOL).mode is model.PoolMode.AUTO
    assert resizes(later) == [(POOL, 14)]


@pytest.mark.parametrize("saved", [None, saved_modes.SavedMode(mode=model.PoolMode.MANUAL, workers=3)])
def test_an_agent_that_adopts_more_than_is_allowed_has_them_end(saved: saved_modes.SavedMode | None) -> None:
    modes = saved_modes.SavedModes(pools={POOL: saved}) if saved is not None else None

    sizer = begun(sizing_host.spec(most=3 if saved is None else 8), 40.0, workers(5), saved=modes)

    assert resizes(sizer) == [(POOL, 3)]


def test_a_drain_keeps_the_number_of_a_paused_pool() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    sizer.set_monitoring(1.0, None, False)
    sizer.set_draining(2.0, True)
    assert (resizes(sizer)[-1], sizer.view(2.0, POOL).desired) == ((POOL, 0), 0)
    sizer.set_monitoring(3.0, None, False)  # while it drains: nothing to pause at 0

    sizer.set_draining(4.0, False)

    assert resizes(sizer) == [(POOL, 8)]


def test_what_is_ordered_during_a_drain_starts_nothing_until_it_ends() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    sizer.set_draining(1.0, True)
    resizes(sizer)

    sizer.set_auto(2.0, POOL)
    sizer.set_stopped(3.0, POOL, True)
    sizer.set_monitoring(4.0, None, True)
    sizer.sample(40.0, memory(36.0), {POOL: []})
    assert resizes(sizer) == []
    sizer.set_draining(41.0, False)

    assert resizes(sizer) == [(POOL, 0)]  # stopped by hand meanwhile


def test_a_lowered_max_is_in_force_at_once_and_is_told() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)

    sizer.reconfigure(1.0, HOST, [dataclasses.replace(PLAIN, max_workers=4)])

    assert resizes(sizer) == [(POOL, 4)]
    assert sizer.decisions(POOL, 1)[0].reasons == ("MAX_WORKERS is 4 now",)


@pytest.mark.parametrize("least", [1, 3])
def test_a_paused_pool_follows_a_raised_min(least: int) -> None:
    sizer = begun(sizing_host.spec(least=1, is_auto_scaling=False), 60.0, workers(1))
    resizes(sizer)

    sizer.reconfigure(1.0, HOST, [sizing_host.spec(least=least, is_auto_scaling=False)])

    assert resizes(sizer) == ([] if least == 1 else [(POOL, 3)])


def test_a_manual_target_ignores_the_threshold_which_is_sizing_not_safety() -> None:
    sizer = begun(sizing_host.spec(threshold_gb=40), 8.1, workers(4))
    resizes(sizer)
    sizer.set_target(1.0, POOL, 5)
    assert resizes(sizer) == [(POOL, 5)]

    for check in range(1, 10):
        sizer.sample(check * 30.0, memory(4.1), {POOL: workers(5)})

    assert resizes(sizer) == []
    assert sizer.view(300.0, POOL).summary == "manual 5, running 5; auto would be 4"


def test_a_pool_of_a_higher_priority_leaves_a_manual_one_alone() -> None:
    high, low = sizing_host.spec("high", priority=9, threshold_gb=0), sizing_host.spec("low", threshold_gb=0)
    sizer = governor.Governor(HOST, [high, low], now=0.0)
    sizer.sample(0.0, memory(36.1), {})
    assert resizes(sizer) == [("high", 7), ("low", 1)]
    found = {"high": workers(2, pool="high"), "low": workers(1, pool="low")}
    sizer.set_target(1.0, "high", 2)
    sizer.set_target(2.0, "low", 1)
    sizer.sample(3.0, memory(24.1), found)
    sizer.set_target(4.0, "low", 6)
    sizer.set_auto(5.0, "high")
    resizes(sizer)
    found = {"high": workers(2, pool="high"), "low": workers(6, pool="low")}
    for check in range(1, 10):
        # 1.5 GB short of 8 workers: one must go, and it is not the one that a person ordered.
        sizer.sample(check * 30.0, memory(2.6), found)

    assert resizes(sizer) == [("high", 1)]
    assert sizer.view(300.0, "low").desired == 6


def test_a_manual_target_grows_only_when_the_pressure_is_gone() -> None:
    sizer = begun(PLAIN, 20.1, workers(2))
    sizer.set_target(0.5, POOL, 2)
    for now in range(1, 13):
        sizer.sample(float(now), memory(20.1, some=20.0), {POOL: workers(2)})
    resizes(sizer)

    sizer.set_target(13.0, POOL, 4)

    assert resizes(sizer) == [(POOL, 2)]
    view = sizer.view(13.0, POOL)
    assert view.summary.startswith("manual 4, running 2: memory; auto would be ")
    assert view.reasons == (
        "manual target 4; growth is frozen by memory pressure: some 20%, full 0% of the last 10 s, for 10 s",
    )
    sizer.sample(30.0, memory(20.1), {POOL: workers(2)})
    assert resizes(sizer) == [(POOL, 4)]


def test_what_the_floor_left_of_a_paused_pool_is_what_a_later_agent_pauses_at() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    sizer.set_monitoring(1.0, POOL, False)
    sizer.sample(2.0, memory(1.9), {POOL: workers(8)})
    saves = [each for each in sizer.take_effects() if isinstance(each, governor_effects.SaveModes)]

    later = begun(PLAIN, 8.1, workers(7), saved=saves[-1].modes)

    assert resizes(later) == [(POOL, 7)]


@pytest.mark.parametrize(("available_gb", "live", "expected"), [(16.1, 0, 3), (60.1, 0, 5), (4.1, 2, 2)])
def test_a_paused_pool_comes_back_only_as_far_as_memory_allows(
    available_gb: float, live: int, expected: int
) -> None:
    """Its workers went with the agent or the host, and what they held may be taken by now."""
    paused = saved_modes.SavedMode(mode=model.PoolMode.PAUSED, workers=5)

    sizer = begun(PLAIN, available_gb, workers(live), saved=saved_modes.SavedModes(pools={POOL: paused}))

    taken = sizer.take_effects()
    assert [each.desired for each in taken if isinstance(each, governor_effects.Resize)] == [expected]
    assert sizer.view(0.0, POOL).mode is model.PoolMode.PAUSED
    if expected < 5:
        assert any("paused at 5, of which memory allows" in reason for reason in sizer.view(0.0, POOL).reasons)
        saves = [each.modes for each in taken if isinstance(each, governor_effects.SaveModes)]
        assert saves[-1].pools[POOL].workers == expected


def test_a_drain_by_order_outlives_the_agent() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    sizer.set_draining(1.0, True)
    saves = [each for each in sizer.take_effects() if isinstance(each, governor_effects.SaveModes)]
    saved = saved_modes.SavedModes.decode(saves[-1].modes.encode())

    later = begun(PLAIN, 36.1, [], saved=saved)
    assert (resizes(later), later.is_draining, later.view(0.0, POOL).desired) == ([], True, 0)
    later.set_draining(1.0, False)

    taken = later.take_effects()
    assert [each.desired for each in taken if isinstance(each, governor_effects.Resize)] == [8]
    assert [each.modes.is_draining for each in taken if isinstance(each, governor_effects.SaveModes)] == [False]


def test_a_boot_in_between_takes_nothing_off_a_hold() -> None:
    """The clock began anew: what it shows has nothing to do with what was noted."""
    held = saved_modes.SavedMode(mode=model.PoolMode.MANUAL, workers=2, hold_remaining_seconds=100.0)
    noted = saved_modes.SavedModes(pools={POOL: held}, at_seconds=50.0, boot_id="a")
    saved = saved_modes.SavedModes.decode(noted.encode())

    same = governor.Governor(HOST, [PLAIN], now=90.0, saved=saved, boot_id="a")
    other = governor.Governor(HOST, [PLAIN], now=5_000.0, saved=saved, boot_id="b")

    assert same.view(90.0, POOL).hold_remaining_seconds == 60.0
    assert other.view(5_000.0, POOL).hold_remaining_seconds == 100.0


def test_within_the_hysteresis_of_the_threshold_the_reason_is_true() -> None:
    sizer = begun(sizing_host.spec(threshold_gb=25), 24.5, [])
    for check in range(1, 4):
        sizer.sample(check * 30.0, memory(9.5), {POOL: workers(4)})

    assert (
        "one less: free 25.5 GB has not yet cleared by the hysteresis the threshold of 25.0 GB"
        in sizer.view(90.0, POOL).reasons
    )
