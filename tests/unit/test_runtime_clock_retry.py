import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.core import errors
from leasehold.runtime import clock, retry


@pytest.mark.parametrize("real", [clock.MonotonicClock(), clock.BootClock()])
def test_real_clocks_do_not_go_back(real: clock.Clock) -> None:
    readings = [real.now() for _ in range(1_000)]
    assert readings == sorted(readings)


def test_a_manual_clock_moves_only_when_told() -> None:
    manual = clock.ManualClock(100.0)
    assert manual.now() == manual.now() == 100.0
    assert manual.advance(2.5) == manual.now() == 102.5


@pytest.mark.parametrize("seconds", [-0.1, math.nan])
def test_a_manual_clock_is_not_set_back(seconds: float) -> None:
    manual = clock.ManualClock()
    with pytest.raises(errors.InvalidArgument):
        manual.advance(seconds)
    assert manual.now() == 0.0


@given(seed=st.integers(), initial=st.floats(0.001, 1), growth=st.floats(1, 100))
def test_each_delay_lies_between_half_of_its_step_and_the_step(
    seed: int, initial: float, growth: float
) -> None:
    backoff = retry.Backoff(initial_seconds=initial, max_seconds=initial * growth)
    step = initial
    for delay in itertools.islice(backoff.delays(random.Random(seed)), 12):
        assert step / 2 <= delay <= step
        step = min(step * 2, initial * growth)


def test_two_callers_that_failed_together_come_back_apart() -> None:
    backoff = retry.Backoff()
    first, second = (list(itertools.islice(backoff.delays(random.Random(seed)), 5)) for seed in (1, 2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_same_seed_gives_the_same_delays() -> None:
    first, second = (list(itertools.islice(retry.Backoff().delays(random.Random(7)), 9)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("initial", "most"), [(0, 1), (-1, 1), (2, 1), (math.nan, 1)])
def test_a_backoff_that_does_not_grow_is_refused(initial: float, most: float) -> None:
    with pytest.raises(errors.InvalidArgument):
        retry.Backoff(initial_seconds=initial, max_seconds=most)
