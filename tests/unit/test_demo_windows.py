"""Sliding windows at their boundaries, and three limits as one decision."""

import random
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.demo import windows

SECOND = windows.NANOS_PER_SECOND
WINDOW_NS = 60 * SECOND


def limits(requests: int = 10, tokens: int = 1000, concurrency: int = 10) -> windows.Limits:
    return windows.Limits(requests=requests, tokens=tokens, concurrency=concurrency, window_seconds=60.0)


def admitted(quota: windows.Quota, now_ns: int, tokens: int = 1) -> windows.Admission:
    decision = quota.try_admit(now_ns, tokens)
    assert isinstance(decision, windows.Admission), decision
    return decision


def refused(quota: windows.Quota, now_ns: int, tokens: int = 1) -> windows.Refusal:
    decision = quota.try_admit(now_ns, tokens)
    assert isinstance(decision, windows.Refusal)
    return decision


def test_amount_counts_until_just_before_a_window_later() -> None:
    window = windows.SlidingWindow(10, WINDOW_NS)
    window.add(5, 4)

    assert window.used(5) == 4
    assert window.used(5 + WINDOW_NS - 1) == 4
    assert window.used(5 + WINDOW_NS) == 0


def test_wait_is_until_enough_has_left() -> None:
    window = windows.SlidingWindow(10, WINDOW_NS)
    window.add(0, 4)
    window.add(SECOND, 4)

    assert window.wait_ns(2 * SECOND, 2) == 0
    assert window.wait_ns(2 * SECOND, 6) == 58 * SECOND
    assert window.wait_ns(2 * SECOND, 7) == 59 * SECOND
    assert window.wait_ns(2 * SECOND, 10) == 59 * SECOND
    assert window.wait_ns(2 * SECOND, 11) is None


def test_correction_counts_at_the_old_instant_and_not_after_it_left() -> None:
    window = windows.SlidingWindow(10, WINDOW_NS)
    early, late = window.add(0, 8), window.add(SECOND, 1)

    window.correct(early, 3)
    assert window.used(SECOND) == 4
    assert window.used(WINDOW_NS) == 1
    window.correct(early, 100)
    window.correct(late, 12)
    assert window.used(WINDOW_NS) == 12
    assert window.wait_ns(WINDOW_NS, 1) == SECOND
    assert window.empty_in_ns(WINDOW_NS) == SECOND
    assert window.used(WINDOW_NS + SECOND) == 0
    assert window.empty_in_ns(WINDOW_NS + SECOND) == 0


def test_window_agrees_with_a_plain_recount() -> None:
    draw = random.Random(4)
    window = windows.SlidingWindow(1000, 50)
    charges: list[windows.Charge] = []
    now_ns = 0
    for _ in range(3000):
        now_ns += draw.randrange(4)
        if draw.random() < 0.5:
            charges.append(window.add(now_ns, draw.randrange(100)))
        elif charges:
            window.correct(draw.choice(charges[-20:]), draw.randrange(100))
        assert window.used(now_ns) == sum(c.amount for c in charges if now_ns - 50 < c.at_ns <= now_ns)


def test_request_limit_refuses_until_the_oldest_request_leaves() -> None:
    quota = windows.Quota(limits(requests=2))
    admitted(quota, 0)
    admitted(quota, SECOND)

    assert refused(quota, 2 * SECOND) == windows.Refusal(windows.Limit.REQUESTS, 58 * SECOND, True)
    assert refused(quota, WINDOW_NS - 1).retry_after_ns == 1
    admitted(quota, WINDOW_NS)


def test_token_limit_counts_the_reservation_and_then_the_actual_tokens() -> None:
    quota = windows.Quota(limits(tokens=100))
    first = admitted(quota, 0, tokens=80)

    assert refused(quota, 1, tokens=30).limit is windows.Limit.TOKENS
    assert quota.end(first, tokens=20)
    admitted(quota, 2, tokens=80)
    assert quota.use(2) == windows.Use(requests=2, tokens=100, concurrency=1)


def test_slot_is_free_once_the_request_ends_and_ends_once() -> None:
    quota = windows.Quota(limits(concurrency=1))
    first = admitted(quota, 0, tokens=50)

    assert refused(quota, 1) == windows.Refusal(windows.Limit.CONCURRENCY, None, True)
    assert quota.end(first)
    assert not quota.end(first, tokens=0)
    assert quota.use(1) == windows.Use(requests=1, tokens=50, concurrency=0)
    admitted(quota, 2)


def test_refusal_counts_nothing_under_any_limit() -> None:
    for quota in (
        windows.Quota(limits(requests=1)),
        windows.Quota(limits(tokens=10)),
        windows.Quota(limits(concurrency=1)),
    ):
        admitted(quota, 0, tokens=10)
        refused(quota, 1, tokens=10)
        assert quota.use(1) == windows.Use(requests=1, tokens=10, concurrency=1)


def test_request_larger_than_the_token_limit_can_never_be_let_in() -> None:
    assert refused(windows.Quota(limits(tokens=10)), 0, tokens=11) == windows.Refusal(
        windows.Limit.TOKENS, None, False
    )


@pytest.mark.parametrize("field", ["requests", "tokens", "concurrency", "window_seconds"])
def test_limit_that_is_not_above_zero_is_refused_by_name(field: str) -> None:
    values: dict[str, Any] = {"requests": 1, "tokens": 1, "concurrency": 1, "window_seconds": 1, field: 0}
    with pytest.raises(errors.InvalidArgument, match=f"{field}: 0 is not above 0"):
        windows.Limits(**values)
