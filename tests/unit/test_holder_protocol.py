"""When a holder reports, and what it believes: the rules of `core.budget.holder`, one by one."""

import dataclasses
from typing import Any

import pytest
from leasehold.core import epoch as epochs
from leasehold.core.budget import holder as holders
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import messages, model
from leasehold.core.budget.quantity import MICRO

CALLS, REQUESTS = "max_concurrent_requests", "rpm_limit"
LIMITS = {CALLS: 4, REQUESTS: 100}


def _terms(**changes: Any) -> messages.Terms:
    given: dict[str, Any] = {
        "dimensions": (
            model.Dimension(name=CALLS, kind=model.DimensionKind.CONCURRENCY, limit=4 * MICRO),
            model.Dimension(name=REQUESTS, kind=model.DimensionKind.RATE, limit=100 * MICRO),
        ),
        "arrival_jitter_seconds": 1.0,
        "max_call_seconds": 600.0,
        "activity_timeout_seconds": 30.0,
        "safe_ttl_seconds": 60.0,
        "max_tokens_per_request": 0,
        "charged_at": model.ChargedAt.ARRIVAL,
    }
    return messages.Terms(**(given | changes))


class Scene:
    """A holder, and an allocator's words by hand."""

    def __init__(self) -> None:
        self.holder = holders.Holder(budget="b", name="w", incarnation="0123456789")
        self.holder.connected(1)
        self.version = 0

    def grant(self, sequence: int, amounts: dict[str, float] | None = None, **changes: Any) -> messages.Grant:
        """A grant of `amounts` (all of it) of a new version."""
        self.version += 1
        given: dict[str, Any] = {
            "budget": "b",
            "holder": "w",
            "incarnation": "0123456789",
            "lease_id": 7,
            "epoch": epochs.Epoch(1, 5),
            "version": self.version,
            "answered_sequence": sequence,
            "ttl_seconds": 10.0,
            "refresh_seconds": 2.0,
            "amounts": {name: round(units * MICRO) for name, units in (amounts or LIMITS).items()},
        }
        return messages.Grant(**(given | changes))

    def joined(self, now: float = 100.0) -> "Scene":
        """Holding all of it since `now`."""
        report = self.holder.make_report(now)
        self.holder.granted(1, self.grant(report.sequence, terms=_terms()), now)
        return self


@pytest.fixture
def scene() -> Scene:
    """A holder with a lease until 110."""
    return Scene().joined()


def test_the_ttl_counts_from_the_sending_of_the_answered_report(scene: Scene) -> None:
    report = scene.holder.make_report(102.0)
    scene.holder.granted(1, scene.grant(report.sequence), 105.0)

    assert scene.holder.limiter.expires_at == 112.0


def test_an_answer_that_comes_after_its_own_expiry_gives_nothing() -> None:
    scene = Scene()
    report = scene.holder.make_report(100.0)
    scene.holder.granted(1, scene.grant(report.sequence, terms=_terms()), 111.0)

    assert scene.holder.state is holders.HolderState.JOINING


def test_a_push_changes_amounts_and_never_the_expiry(scene: Scene) -> None:
    scene.holder.granted(1, scene.grant(0, {CALLS: 2, REQUESTS: 50}), 105.0)

    assert scene.holder.limiter.amounts() == {CALLS: 2 * MICRO, REQUESTS: 50 * MICRO}
    assert scene.holder.limiter.expires_at == 110.0


def test_a_push_to_an_expired_lease_is_void(scene: Scene) -> None:
    scene.holder.tick(110.0)
    scene.holder.granted(1, scene.grant(0), 110.5)

    assert scene.holder.state is holders.HolderState.EXPIRED
    assert not any(scene.holder.limiter.amounts().values())


def test_what_an_older_connection_says_is_void(scene: Scene) -> None:
    report = scene.holder.make_report(104.0)
    scene.holder.connected(2)
    scene.holder.granted(1, scene.grant(report.sequence), 105.0)
    scene.holder.granted(1, scene.grant(0, {CALLS: 1}), 105.0)

    assert scene.holder.limiter.expires_at == 110.0
    assert scene.holder.limiter.amounts()[CALLS] == 4 * MICRO


def test_a_lower_epoch_is_refused(scene: Scene) -> None:
    scene.holder.granted(1, scene.grant(0, {CALLS: 1}, epoch=epochs.Epoch(1, 4)), 105.0)

    assert scene.holder.limiter.amounts()[CALLS] == 4 * MICRO


def test_an_expired_holder_asks_again_with_what_it_still_has(scene: Scene) -> None:
    limiter = scene.holder.limiter
    cost = limiter.cost(5)
    assert limiter.try_admit(cost, 101.0)
    scene.holder.tick(110.0)
    report = scene.holder.make_report(110.0)

    assert (report.lease_id, report.is_rejoin) == (0, True)
    assert report.holdings is not None
    assert report.holdings.held == {CALLS: MICRO, REQUESTS: 5 * MICRO}


def test_a_refused_rejoin_of_a_superseded_incarnation_ends_it(scene: Scene) -> None:
    scene.holder.tick(110.0)
    report = scene.holder.make_report(110.0)
    refusal = messages.Refusal(
        budget="b",
        holder="w",
        incarnation="0123456789",
        sequence=report.sequence,
        reason="HOLDER_SUPERSEDED",
        message="a newer incarnation has joined",
    )
    scene.holder.refused(1, refusal, 110.1)

    assert scene.holder.end is messages.LeaseEnd.SUPERSEDED
    assert scene.holder.report_due(1000.0) == float("inf")


def test_a_refusal_of_another_connection_or_report_is_passed_over(scene: Scene) -> None:
    refusal = messages.Refusal(
        budget="b", holder="w", incarnation="0123456789", sequence=99, reason="HOLDER_SUPERSEDED", message=""
    )
    scene.holder.refused(1, refusal, 101.0)
    scene.holder.refused(2, dataclasses.replace(refusal, sequence=1), 101.0)

    assert scene.holder.end is None and scene.holder.refusal is None


def test_an_answer_clears_an_earlier_refusal() -> None:
    scene = Scene()
    report = scene.holder.make_report(100.0)
    refusal = messages.Refusal(
        budget="b",
        holder="w",
        incarnation="0123456789",
        sequence=report.sequence,
        reason="NOT_FOUND",
        message="",
    )
    scene.holder.refused(1, refusal, 100.1)
    assert scene.holder.refusal is refusal

    scene.joined(101.5)

    assert scene.holder.refusal is None


def test_who_wants_units_asks_at_once_if_nothing_is_under_way() -> None:
    scene = Scene()
    scene.holder.make_report(100.0)
    scene.holder.ask_again()
    assert scene.holder.report_due(100.1) == 100.0 + holders.RESEND_SECONDS, "one is under way"

    scene.holder.disconnected(1)
    scene.holder.connected(2)

    assert scene.holder.wants_report(100.1)


def test_new_terms_give_a_new_dimension_its_amount_though_the_version_is_known(scene: Scene) -> None:
    images = model.Dimension(name="images", kind=model.DimensionKind.RATE, limit=9 * MICRO)
    terms = _terms(dimensions=(*_terms().dimensions, images))
    grant = scene.grant(0, {**LIMITS, "images": 9}, terms=terms, version=scene.version)

    scene.holder.granted(1, grant, 101.0)

    assert scene.holder.limiter.amounts()["images"] == 9 * MICRO


def test_a_changed_window_keeps_what_is_held_and_lets_it_cool_anew(scene: Scene) -> None:
    limiter = scene.holder.limiter
    assert limiter.try_admit(limiter.cost(5), 101.0)
    dimensions = tuple(
        dataclasses.replace(each, window_seconds=30.0) if each.is_rate else each for each in _terms().dimensions
    )
    scene.holder.granted(1, scene.grant(0, terms=_terms(dimensions=dimensions)), 105.0)

    assert limiter.held()[REQUESTS] == 100 * MICRO
    part = limiter.holdings(105.0).cooling[0]
    assert part.amounts == (5 * MICRO,)
    assert 31.0 <= part.remaining_seconds[0] <= 31.1


def test_a_cost_beyond_the_credit_is_reported_once_until_the_answer(scene: Scene) -> None:
    holder, limiter = scene.holder, scene.holder.limiter
    limiter.is_idle_reported = False
    holder.granted(1, scene.grant(holder.make_report(101.0).sequence), 101.0)
    limiter.enqueue(limiters.Waiter(limiter.cost(20)))
    assert holder.wants_report(101.1), "twenty at once is more than pacing lets through unreported"

    report = holder.make_report(101.1)
    assert not holder.wants_report(101.2)
    holder.granted(1, scene.grant(report.sequence), 101.3)

    assert len(limiter.admit_waiting(101.3)) == 1


def test_a_long_queue_is_news_only_by_what_is_new_in_it(scene: Scene) -> None:
    holder, limiter = scene.holder, scene.holder.limiter
    holder.granted(1, scene.grant(0, {CALLS: 4, REQUESTS: 10}), 101.0)
    for requests in (20, 30):
        limiter.enqueue(limiters.Waiter(limiter.cost(requests)))
    report = holder.make_report(101.1)
    assert report.waiting_cost[REQUESTS] == 30 * MICRO
    limiter.enqueue(limiters.Waiter(limiter.cost(25)))
    assert not holder.wants_report(101.2)

    limiter.enqueue(limiters.Waiter(limiter.cost(40)))

    assert holder.wants_report(101.2)


def test_safe_capacity_is_usable_for_its_time_after_expiry() -> None:
    scene = Scene()
    report = scene.holder.make_report(100.0)
    terms = _terms(safe_capacity={CALLS: MICRO, REQUESTS: 2 * MICRO})
    scene.holder.granted(1, scene.grant(report.sequence, terms=terms), 100.0)
    limiter = scene.holder.limiter
    scene.holder.tick(110.0)
    assert limiter.try_admit(limiter.cost(1), 111.0)

    scene.holder.tick(170.0)

    assert not limiter.try_admit(limiter.cost(1), 170.0)
    assert not any(limiter.amounts().values())
