"""Simulated hours of a host: it reaches the optimum and stays there."""

import itertools
import random
from collections.abc import Callable

import pytest
import sizing_host
from hypothesis import example, given
from hypothesis import strategies as st
from leasehold.core.node import model, settings

GB = model.GIB


@pytest.mark.parametrize("stop_seconds", [10.0, 60.0, 300.0])
def test_an_hour_has_only_the_starts_that_it_needs_and_no_stop(stop_seconds: float) -> None:
    host = sizing_host.Host([sizing_host.spec()], stop_seconds=stop_seconds)

    host.run(3600)

    # 64 GB - 3 of the system - 4 of reserve are room for 14 workers of 4 GB.
    assert (len(host.starts), len(host.stops), host.live("translation")) == (14, 0, 14)


def test_a_small_host_settles_too() -> None:
    host = sizing_host.Host([sizing_host.spec(threshold_gb=8)], total_bytes=16 * GB)

    host.run(3600)

    # 16 - 3 - 4 are room for two.
    assert (len(host.starts), len(host.stops)) == (2, 0)


def test_the_older_formula_counts_workers_against_themselves() -> None:
    host = sizing_host.Host(
        [sizing_host.spec()],
        host=settings.HostSettings(
            formula=settings.Formula.LITERAL, hysteresis_bytes=0, check_interval_seconds=10.0
        ),
    )

    host.run(3600)

    assert len(host.stops) > 20


def _noise(seed: int, amplitude_bytes: int) -> Callable[[float], int]:
    chance = random.Random(seed)
    return lambda now: chance.randint(-amplitude_bytes, amplitude_bytes)


@given(
    seed=st.integers(0, 2**32),
    # What else runs puts the optimum anywhere between two whole numbers of workers.
    other_bytes=st.integers(2 * GB, 40 * GB),
    threshold_gb=st.integers(0, 60),
    interval_seconds=st.sampled_from((5.0, 20.0, 30.0)),
)
@example(seed=0, other_bytes=29_581_943_965, threshold_gb=36, interval_seconds=5.0)
def test_noise_of_half_a_gigabyte_moves_it_at_most_once_in_ten_minutes(
    seed: int, other_bytes: int, threshold_gb: int, interval_seconds: float
) -> None:
    host = sizing_host.Host(
        [sizing_host.spec(threshold_gb=threshold_gb)],
        host=settings.HostSettings(check_interval_seconds=interval_seconds),
        other_bytes=other_bytes,
        noise=_noise(seed, GB // 2),
        use_bytes=4 * GB,
        ramp_seconds=0.0,
    )
    # The first growth, and the noise's own highest reading, are no oscillation.
    host.run(300)
    settled = len(host.resizes)

    host.run(1200)

    actions = [each.decision.at_seconds for each in host.resizes[settled:]]
    assert all(later - earlier >= 600 for earlier, later in itertools.pairwise(actions)), actions


@given(
    other_bytes=st.lists(st.integers(0, 62 * GB), min_size=1, max_size=6),
    least=st.integers(0, 3),
    limit_gb=st.sampled_from((1.0, 4.0, 6.0)),
)
def test_it_never_decides_for_more_than_memory_has_above_the_least(
    other_bytes: list[int], least: int, limit_gb: float
) -> None:
    host = sizing_host.Host(
        [sizing_host.spec(least=least, limit_gb=limit_gb, threshold_gb=0)],
        use_bytes=int(limit_gb * GB),
        ramp_seconds=30.0,
    )
    for others in other_bytes:
        host.other_bytes = others
        before = len(host.resizes)
        host.run(90)
        for resize in host.resizes[before:]:
            numbers = resize.decision.numbers
            if resize.desired > max(resize.decision.before, least):
                room = numbers["free_bytes"] - numbers["reserve_bytes"]
                room -= numbers["leaving_bytes"] + numbers["excess_bytes"]
                assert resize.desired * numbers["limit_bytes"] <= room
