"""Interleavings that would break the limit or strand a waiter, found by argument; each failed once."""

from collections.abc import Mapping

import client_scene
import pytest
from fake_allocator import CALLS, LIMITS, REQUESTS
from leasehold.client import engine as engines
from leasehold.client import gates
from leasehold.core import errors
from leasehold.core.budget import messages, stock
from leasehold.core.budget.quantity import MICRO

MINUTE_LIMITS = LIMITS | {CALLS: 1}


def _scene(limits: Mapping[str, float] = LIMITS) -> client_scene.Scene:
    scene = client_scene.Scene()
    scene.join(limits)
    scene.renew()
    return scene


def _cooling(scene: client_scene.Scene) -> int:
    held = scene.limiter.stocks[REQUESTS]
    scene.limiter.holdings(scene.now)
    return int(sum(amount for _, amount in held.cooling(scene.now))) // MICRO


def _admitted_and_asleep(scene: client_scene.Scene) -> engines.Ticket:
    """An acquire that was admitted when another ended, and has not woken yet."""
    first = scene.budget.try_acquire(tokens=1)
    assert first is not None
    ticket = scene.engine.submit(engines.Request(tokens=1), gates.ThreadGate())
    assert scene.limiter.waiters
    first.release()
    assert ticket.is_admitted
    return ticket


def test_a_turn_for_another_budgets_sake_opens_no_path_that_forgets_what_it_admits() -> None:
    scene = _scene()
    scene.engine.update_activity(is_active=False, current_load=0.0, active_tasks=0)
    sent: list[float] = []

    def send() -> None:
        permit = scene.budget.try_acquire(tokens=1)
        assert permit is not None
        permit.release()
        sent.append(scene.now)

    for _ in range(40):
        scene.advance(2.0)
        send()
        scene.renew()
    # Twelve buckets after the last report: the ring of the stock has eight spare places.
    scene.advance(1.5)
    scene.engine.turn()
    for _ in range(20):
        send()
    scene.advance(0.3)

    assert _cooling(scene) >= sum(at > scene.now - 60.0 for at in sent)
    scene.limiter.audit()


def test_a_late_waker_goes_on_counting_what_a_shrink_has_marked_to_leave() -> None:
    held = stock.RateStock(window_seconds=60.0, jitter_seconds=1.0, now=1000.0)
    held.set_cap(40 * MICRO)
    held.charge(1000.0, 30 * MICRO)
    held.set_cap(20 * MICRO)
    assert held.held == 35 * MICRO

    held.advance(1000.3)
    held.recharge(1000.0, 1000.3, 30 * MICRO)

    assert held.held == 35 * MICRO
    assert held.free == 5 * MICRO
    held.audit()
    held.advance(1061.1)
    assert held.held == 35 * MICRO, "it cools from when it was sent"
    held.advance(1061.6)
    assert held.held == 20 * MICRO
    assert held.free == 20 * MICRO


def test_a_waker_so_late_that_its_units_have_cooled_asks_anew() -> None:
    scene = _scene(MINUTE_LIMITS)
    ticket = _admitted_and_asleep(scene)
    for _ in range(35):
        scene.advance(2.0)
        scene.renew()
    held = scene.limiter.stocks[REQUESTS]
    held.charge(scene.now, held.free)  # others have all of it now

    assert not scene.engine.claim(ticket)

    assert held.free == 0
    assert [waiter.payload for waiter in scene.limiter.waiters] == [ticket]
    assert scene.limiter.stocks[CALLS].in_use == 0


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (messages.LeaseEnd.SUPERSEDED, errors.Superseded),
        (messages.LeaseEnd.BUDGET_DELETED, errors.NotFound),
        (None, errors.FailedPrecondition),
    ],
)
def test_who_was_admitted_but_woke_after_the_last_word_is_told_rather_than_queued_for_ever(
    end: messages.LeaseEnd | None, error: type[errors.LeaseholdError]
) -> None:
    scene = _scene(MINUTE_LIMITS)
    ticket = _admitted_and_asleep(scene)
    if end is None:
        scene.engine.close()
    else:
        scene.grant({}, answered_sequence=0, end=end)

    with pytest.raises(error):
        scene.engine.claim(ticket)

    assert not scene.limiter.waiters
