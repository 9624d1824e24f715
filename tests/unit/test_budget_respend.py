"""A holder that hears nothing does not spend anew what cools late; if it is lost, less is quarantined."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.core import epoch as epochs
from leasehold.core.budget import allocator, effects, messages, model, quantity, stock
from leasehold.core.budget import holder as holders
from leasehold.core.budget import lease as leases

MICRO = quantity.MICRO
RATE = "rpm_limit"
SPEC = model.BudgetSpec(
    name="llm",
    dimensions=(model.Dimension(name=RATE, kind=model.DimensionKind.RATE, limit=610 * MICRO),),
    expected_workers=1,
)


class Scene:
    """A holder that owns all of a rate, and its allocator, told what happens by hand."""

    def __init__(self, spec: model.BudgetSpec = SPEC) -> None:
        self.core = allocator.Allocator(epochs.Epoch(1, 5, 7))
        self.core.define(spec, 1, 0.0)
        self.holder = holders.Holder(budget="llm", name="w0", incarnation="w0-incarnation")
        self.holder.connected(1)
        self.told: list[messages.Grant] = []

    def report(self, now: float) -> messages.Report:
        report = self.holder.make_report(now)
        self.core.tick(now)
        self.core.report(report, now, session=1, age_seconds=0.0)
        self.told = [
            effect.message
            for effect in self.core.finish(now)
            if isinstance(effect, effects.Send) and isinstance(effect.message, messages.Grant)
        ]
        return report

    def answer(self, now: float) -> None:
        for grant in self.told:
            self.holder.granted(1, grant, now)
        self.told = []

    def renew(self, now: float) -> None:
        self.report(now)
        self.answer(now)

    def spend(self, now: float) -> int:
        """One unit after the other, as long as there is one."""
        spent = 0
        limiter = self.holder.limiter
        while limiter.try_admit((MICRO,), now):
            limiter.release((MICRO,), {}, now, now)
            spent += 1
        return spent

    def spend_steadily(self, begin: float, end: float) -> int:
        spent, number = 0, 0
        while begin + number * 0.1 < end:
            spent += self.spend(begin + number * 0.1)
            number += 1
        return spent

    @property
    def stock(self) -> stock.RateStock:
        held = self.holder.limiter.stocks[RATE]
        assert isinstance(held, stock.RateStock)
        return held

    def lease(self) -> leases.Lease:
        return self.core.budgets["llm"].book.leases["w0"]


def saturated(spec: model.BudgetSpec = SPEC) -> Scene:
    """A scene at 200 s, in which everything is spent as soon as it cools, renewed up to then."""
    scene = Scene(spec)
    for step in range(101):
        scene.renew(step * 2.0)
        scene.spend_steadily(step * 2.0, step * 2.0 + 1.99)
    scene.renew(202.0)
    return scene


def test_what_cools_late_waits_for_an_answer() -> None:
    scene = saturated()
    assert 20 <= scene.spend_steadily(202.0, 206.0) <= 50
    scene.report(206.0)  # on its way
    assert scene.spend_steadily(206.0, 207.0) == 0
    scene.stock.advance(207.0)
    withheld = scene.stock.withheld
    assert withheld >= 10 * MICRO
    scene.answer(207.0)
    assert scene.stock.withheld == 0
    assert scene.spend(207.0) * MICRO == withheld


def test_renewals_that_are_answered_in_time_let_nothing_wait() -> None:
    scene = saturated()
    spent = 0
    for step in range(30):
        now = 202.0 + step * 2.0
        scene.report(now)
        spent += scene.spend_steadily(now, now + 0.99)
        scene.answer(now + 0.99)
        spent += scene.spend_steadily(now + 0.99, now + 1.99)
        assert scene.stock.withheld == 0
    assert spent == pytest.approx(600, abs=25)


def test_an_answer_that_is_late_frees_nothing_that_cooled_after_what_it_allows() -> None:
    scene = saturated()
    scene.report(202.5)
    scene.spend_steadily(202.5, 208.0)
    withheld = scene.stock.withheld
    scene.answer(208.0)
    assert scene.stock.withheld >= withheld > 0


def test_of_a_lost_holder_that_reported_only_what_it_could_spend_unheard_is_quarantined() -> None:
    scene = saturated()
    scene.spend_steadily(202.0, 203.99)
    scene.report(204.0)
    lease = scene.lease()
    parts = leases.strand_lost(lease, leases.StrandRules.of(SPEC), lease.expires_at, is_certified=False)
    quarantined = sum(part.amount for part in parts if part.is_quarantine)
    # What cools in three and a half seconds, of the ten that the lease lasts.
    assert quarantined <= 50 * MICRO
    unheard = scene.spend_steadily(204.0, 213.9) * MICRO
    assert 0 < unheard <= quarantined


def test_a_holder_that_promises_nothing_may_have_spent_all_that_cooled() -> None:
    scene = saturated()
    scene.report(204.0)
    lease = scene.lease()
    promised = leases.strand_lost(lease, leases.StrandRules.of(SPEC), lease.expires_at, is_certified=False)
    lease.respend_seconds = 0.0
    silent = leases.strand_lost(lease, leases.StrandRules.of(SPEC), lease.expires_at, is_certified=False)
    assert sum(p.amount for p in silent if p.is_quarantine) >= 80 * MICRO
    assert sum(p.amount for p in promised) == sum(p.amount for p in silent) == 610 * MICRO


def test_a_promise_is_never_shorter_than_an_earlier_one() -> None:
    scene = saturated()
    first = scene.report(204.0)
    assert first.holdings is not None and first.holdings.respend_seconds == pytest.approx(3.5)
    scene.answer(204.1)
    scene.core.define(dataclasses.replace(SPEC, ttl_seconds=2.0, refresh_seconds=0.5), 2, 204.2)
    scene.renew(204.3)
    second = scene.report(204.4)
    assert second.holdings is not None
    # The one before, by the old refresh interval, may be answered yet.
    assert second.holdings.respend_seconds == pytest.approx(204.3 + 3.5 - 204.4)
    assert scene.report(208.0).holdings is not None


def test_safe_capacity_is_spent_anew_without_an_answer() -> None:
    safe = model.HolderClass(pattern="w*", safe_capacity={RATE: 61 * MICRO})
    scene = saturated(dataclasses.replace(SPEC, holder_classes=(safe,)))
    scene.spend_steadily(202.0, 212.0)
    scene.holder.tick(212.1)
    assert scene.holder.state is holders.HolderState.EXPIRED
    assert scene.stock.withheld == 0
    assert scene.stock.respend_until == float("inf")
    assert scene.spend_steadily(212.1, 260.0) > 20


def test_where_completion_is_charged_nothing_is_promised() -> None:
    scene = Scene(dataclasses.replace(SPEC, charged_at=model.ChargedAt.COMPLETION))
    scene.renew(0.0)
    report = scene.report(2.0)
    assert report.holdings is not None and report.holdings.respend_seconds == 0.0
    assert scene.holder.limiter.respend_until == float("inf")


def test_where_a_window_passes_within_a_ttl_nothing_is_promised() -> None:
    scene = saturated()
    assert scene.holder.limiter.respend_until < float("inf")
    short = dataclasses.replace(SPEC.dimensions[0], window_seconds=5.0)
    scene.core.define(dataclasses.replace(SPEC, dimensions=(short,)), 2, 203.0)
    scene.renew(203.0)
    late = scene.report(203.1)
    assert late.holdings is not None and late.holdings.respend_seconds == 0.0
    # The promise before holds until it is answered that there is none any more.
    assert scene.holder.limiter.respend_until < float("inf")
    scene.answer(203.2)
    assert scene.holder.limiter.respend_until == float("inf")


def test_a_report_without_a_promise_that_is_answered_late_does_not_undo_a_later_promise() -> None:
    scene = saturated()
    short = dataclasses.replace(SPEC.dimensions[0], window_seconds=5.0)
    scene.core.define(dataclasses.replace(SPEC, dimensions=(short,)), 2, 203.0)
    scene.renew(203.0)
    scene.report(203.1)
    answer = scene.told
    # The terms are as before again, and told in a push; what was promised before still holds.
    scene.core.define(SPEC, 3, 203.2)
    for effect in scene.core.finish(203.2):
        if isinstance(effect, effects.Send) and isinstance(effect.message, messages.Grant):
            scene.holder.granted(1, effect.message, 203.2)
    promise = scene.report(203.3)
    assert promise.holdings is not None and promise.holdings.respend_seconds > 0.0
    for grant in answer:
        scene.holder.granted(1, grant, 203.4)
    assert scene.holder.limiter.respend_until <= 203.3 + promise.holdings.respend_seconds


def test_who_waits_for_what_is_withheld_waits_for_an_answer_and_not_for_time() -> None:
    scene = saturated()
    scene.spend_steadily(202.0, 207.0)
    scene.stock.advance(207.0)
    assert scene.stock.seconds_until(MICRO, 207.0) == float("inf")


def test_a_shrink_gives_up_what_is_withheld_at_once() -> None:
    scene = saturated()
    scene.spend_steadily(202.0, 207.0)
    held, withheld = scene.stock, scene.stock.withheld
    before = held.held
    held.set_cap(held.cap // 2)
    held.audit()
    assert held.withheld == pytest.approx(withheld / 2, abs=2)
    assert before - held.held == pytest.approx(withheld / 2, abs=2 + max(0, held.free))


@pytest.mark.parametrize("shrinks_at", [1_030.0, 1_062.0], ids=["as it cools", "when it has cooled"])
def test_what_left_late_comes_back_withheld(shrinks_at: float) -> None:
    held = stock.RateStock(window_seconds=60.0, jitter_seconds=1.0, now=1_000.0)
    held.set_cap(10 * MICRO)
    held.charge(1_000.0, 10 * MICRO)
    held.let_respend(1_040.0, 1_000.0)
    held.advance(shrinks_at)
    held.set_cap(4 * MICRO)
    held.advance(1_062.0)
    held.set_cap(10 * MICRO)
    held.audit()
    # As the last report told it, and the allocator believes: all ten cool, and are not spent anew.
    assert (held.free, held.withheld) == (0, 10 * MICRO)
    held.set_cap(12 * MICRO)
    assert (held.free, held.withheld) == (2 * MICRO, 10 * MICRO)
    held.let_respend(1_070.0, 1_062.0)
    assert (held.free, held.withheld, held.left_late) == (12 * MICRO, 0, 0)


@given(
    parts=st.lists(st.tuples(st.floats(0.0, 61.0), st.integers(1, 1000)), max_size=600),
    edge=st.floats(0.0, 61.0),
    parts_max=st.integers(2, 24),
)
def test_no_step_spans_the_edge_and_none_is_told_to_cool_too_early(
    parts: list[tuple[float, int]], edge: float, parts_max: int
) -> None:
    parts.sort()
    steps = stock.merge_parts(parts, parts_max, edge)
    assert len(steps) <= parts_max
    assert steps == sorted(steps, key=lambda step: step[0])
    for instant in {seconds for seconds, _ in steps} | {edge}:
        told = sum(amount for seconds, amount in steps if seconds <= instant)
        true = sum(amount for seconds, amount in parts if seconds <= instant)
        assert told == true if instant == edge else told <= true
