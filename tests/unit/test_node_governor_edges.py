"""What went wrong once in sizing by memory over time, told again one scene each."""

import dataclasses

import sizing_host
from governor_kit import GB, HOST, PLAIN, POOL, begun, memory, resizes, workers
from leasehold.core.node import governor, governor_effects, model, pressure, settings


def test_a_worker_that_takes_its_time_to_end_brings_no_second_stop() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)
    for now in (30.0, 60.0):
        sizer.sample(now, memory(2.5), {POOL: workers(8)})
    assert resizes(sizer) == [(POOL, 7)]

    for check in range(3, 20):
        sizer.sample(check * 30.0, memory(2.5), {POOL: workers(7, leaving=1)})

    assert resizes(sizer) == []
    view = sizer.view(600.0, POOL)
    assert (view.desired, view.optimal) == (7, 6)
    assert "4.0 GB come back when those on their way out have ended" in view.reasons


def test_growth_waits_for_the_memory_of_those_on_their_way_out_and_says_so() -> None:
    sizer = begun(dataclasses.replace(PLAIN, max_workers=16), 4.1, workers(6, leaving=2))

    assert resizes(sizer) == [(POOL, 6)]
    assert any(
        "stays at 6 until memory is free" in reason and "8.0 GB of it on its way out" in reason
        for reason in sizer.view(0.0, POOL).reasons
    )
    sizer.sample(30.0, memory(12.1), {POOL: workers(6)})
    assert resizes(sizer) == [(POOL, 8)]


def test_the_threshold_takes_exactly_one_even_where_little_lacks_for_another_worker() -> None:
    # 23.5 GB are room for 5, half a GB short of 6; the system then takes 0.2 and free falls below 27.4.
    spec = sizing_host.spec(threshold_gb=27.4)
    sizer = begun(spec, 27.5, [])
    assert resizes(sizer) == [(POOL, 5)]

    for check in range(1, 20):
        sizer.sample(check * 30.0, memory(7.3), {POOL: workers(5)})
        if sizer.view(0.0, POOL).desired == 4:
            break
    for later in range(check + 1, check + 20):
        sizer.sample(later * 30.0, memory(11.3), {POOL: workers(4)})

    assert check == 2
    assert resizes(sizer) == [(POOL, 4)]


def test_no_two_checks_decide_by_one_sample() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)
    sizer.sample(29.0, memory(2.5), {POOL: workers(8)})

    for now in (30.0, 60.0, 90.0, 120.0):
        sizer.tick(now)
    assert resizes(sizer) == []
    assert sizer.next_deadline() > 120.0  # a sample is awaited, in no haste
    sizer.sample(121.0, memory(2.5), {POOL: workers(8)})

    assert resizes(sizer) == [(POOL, 7)]


def test_starts_that_are_still_to_come_are_called_off_when_memory_goes() -> None:
    sizer = begun(PLAIN, 36.1, [])
    assert resizes(sizer) == [(POOL, 8)]

    # Two have started, the others are in a backoff; something else then takes the memory.
    for now in (30.0, 60.0):
        sizer.sample(now, memory(8.1), {POOL: workers(2)})

    assert resizes(sizer) == [(POOL, 3)]


def test_the_hard_floor_awaits_what_is_on_its_way_out_until_little_is_left() -> None:
    sizer = begun(PLAIN, 4.1, workers(8))
    resizes(sizer)
    sizer.sample(1.0, memory(1.9), {POOL: workers(8)})
    assert resizes(sizer) == [(POOL, 7)]

    for now in range(2, 28):
        sizer.sample(float(now), memory(1.2), {POOL: workers(7, leaving=1)})
    assert resizes(sizer) == []
    sizer.sample(28.0, memory(0.9), {POOL: workers(7, leaving=1)})

    assert resizes(sizer) == [(POOL, 6)]


def test_a_check_that_shrinks_a_low_pool_leaves_the_floor_no_cause_to_take_from_a_high_one() -> None:
    high, low = sizing_host.spec("high", priority=9, most=3), sizing_host.spec("low")
    pools = [dataclasses.replace(each, threshold_bytes=0) for each in (high, low)]
    sizer = governor.Governor(HOST, pools, now=0.0)
    found = {"high": workers(3, pool="high"), "low": workers(3, pool="low")}
    sizer.sample(0.0, memory(4.1), found)
    sizer.sample(30.0, memory(2.5), found)
    assert resizes(sizer)[2:] == []

    sizer.sample(60.0, memory(0.5), found)

    assert resizes(sizer) == [("low", 2)]


def test_after_a_stop_for_pressure_nothing_grows_for_a_minute() -> None:
    """The pressure is gone because the worker is: to start it again would bring both back."""
    sizer = begun(PLAIN, 20.1, workers(5))
    sizer.set_auto(0.0, POOL)
    resizes(sizer)
    for now in range(1, 12):
        sizer.sample(float(now), memory(20.1, some=90.0, full=20.0, reclaimed=9), {POOL: workers(5)})
    assert resizes(sizer) == [(POOL, 4)]

    told = {}
    for now in range(12, 140):
        sizer.sample(float(now), memory(24.1), {POOL: workers(4)})
        for each in resizes(sizer):
            told[now] = each
        if now == 31:
            assert any("memory pressure stopped a worker" in why for why in sizer.view(31.0, POOL).reasons)

    assert list(told.values()) == [(POOL, 9)]
    assert 11 + pressure.COOL_DOWN_SECONDS <= min(told) <= 11 + pressure.COOL_DOWN_SECONDS + 30


def test_full_pressure_awaits_a_slow_stop_for_a_minute_an_emergency_does_not() -> None:
    stops: dict[str, list[tuple[int, int, bool]]] = {}
    for name, full in (("calm", 20.0), ("alarmed", 50.0)):
        sizer, found = begun(PLAIN, 4.1, workers(8)), workers(8)
        sizer.take_effects()
        stops[name] = []
        for now in range(1, 90):
            sizer.sample(float(now), memory(4.1, some=90.0, full=full, reclaimed=9), {POOL: found})
            for each in sizer.take_effects():
                if isinstance(each, governor_effects.Resize):
                    stops[name].append((now, each.desired, each.is_urgent))
                    found = workers(each.desired, leaving=1)

    assert stops["calm"] == [(11, 7, False), (71, 6, False)]
    assert stops["alarmed"][:3] == [(11, 7, True), (16, 6, True), (21, 5, True)]
    assert "memory pressure (emergency): some 90%, full 50%" in sizer.decisions(POOL, 1)[0].reasons[0]


def test_pressure_counts_only_while_it_lasts() -> None:
    watch = pressure.PressureWatch()
    for now in range(30):
        is_gap = now % 10 == 9
        watch.sample(float(now), memory(8.0, some=5.0 if is_gap else 99.0, full=0.0 if is_gap else 99.0))
        assert watch.level is pressure.Pressure.NONE


def test_reclaim_that_was_long_ago_is_no_evidence() -> None:
    watch = pressure.PressureWatch()
    watch.sample(0.0, memory(8.0, some=20.0, full=20.0, reclaimed=500))
    for now in range(1, 30):
        level = watch.sample(float(now), memory(8.0, some=20.0, full=20.0, reclaimed=0))

    assert level is pressure.Pressure.FREEZE


def test_a_full_host_whose_memory_does_not_shrink_is_sampled_at_the_usual_pace() -> None:
    sizer = begun(sizing_host.spec(least=2, most=2), 1.0, workers(2))
    for now in range(1, 30):
        sizer.sample(float(now), memory(1.0), {POOL: workers(2)})

    assert [each for each in sizer.take_effects() if isinstance(each, governor_effects.SampleFaster)] == []


def test_a_worker_that_is_reaped_is_charged_to_nobody() -> None:
    ended = dataclasses.replace(workers(1)[0], state=model.WorkerState.EXITED)

    ended = dataclasses.replace(ended, held_bytes=GB)
    sizer = begun(dataclasses.replace(PLAIN, max_workers=16), 20.1, [ended])

    assert resizes(sizer) == [(POOL, 4)]


def test_the_steps_of_the_ladder_are_among_the_decisions_with_their_numbers() -> None:
    sizer = begun(PLAIN, 20.1, workers(1, held_gb=3.75))

    latest = sizer.decisions(POOL, 5)[-1]

    assert (latest.trigger, latest.before, latest.after) == ("LIMIT", 1, 1)
    assert latest.reasons == (
        "translation_1@h holds 3.8 GB, 94% of its limit of 4.0 GB: is replaced after its task",
    )


def test_the_last_two_hundred_decisions_are_kept() -> None:
    sizer = begun(PLAIN, 40.1, [])
    for number in range(300):
        sizer.set_target(float(number), POOL, 1 + number % 2)

    kept = sizer.decisions(POOL, 1000)
    assert len(kept) == 200
    assert [each.number for each in kept] == list(range(301, 101, -1))


def test_nothing_is_hard_wired_in_gigabytes() -> None:
    """The scene of the demonstration: workers of 64 MB, checks each second, a budget of half a GB."""
    mib = model.MIB
    host = settings.HostSettings(reserve_bytes=32 * mib, hysteresis_bytes=8 * mib, check_interval_seconds=1.0)
    small = dataclasses.replace(PLAIN, worker_limit_bytes=64 * mib, max_workers=8)
    sizer = governor.Governor(host, [small], now=0.0)

    def sample(now: float, available_mib: int, live: int) -> list[tuple[str, int]]:
        found = workers(live, held_gb=1 / 16)
        sizer.sample(
            now, model.MemorySample(total_bytes=4 * GB, available_bytes=available_mib * mib), {POOL: found}
        )
        return resizes(sizer)

    assert sample(0.0, 512, 0) == [(POOL, 7)]
    assert sample(1.0, 64, 7) == []
    assert sample(2.0, 23, 7) == []  # 9 MB short, once
    assert sample(3.0, 23, 7) == [(POOL, 6)]
    assert sample(3.5, 15, 6) == []  # the stop begins
    assert sample(4.0, 15, 6) == [(POOL, 5)]  # below half the reserve
    assert "available 15 MB (MemAvailable) is below the hard floor of 16 MB" in sizer.view(4.0, POOL).reasons[0]
