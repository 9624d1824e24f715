"""The short path is never looser than the exact one, whatever order things happen in."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import client_scene
import hypothesis
from fake_allocator import CALLS, REQUESTS, TOKENS, terms_of
from hypothesis import strategies as st
from leasehold.client import permits
from leasehold.core.budget import messages, model
from leasehold.core.budget.quantity import MICRO

WINDOW_SECONDS = 10.0
LIMITS = {CALLS: 5, REQUESTS: 60, TOKENS: 3_000}

cost = st.tuples(st.integers(0, 3), st.integers(0, 200))
instant = st.sampled_from((0.0, 0.001, 0.02, 0.3, 1.7, 4.0))
share = st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), cost, instant),
        st.tuples(st.just("burst"), cost, st.just(0.0)),
        st.tuples(st.just("end"), st.floats(0, 1), instant),
        st.tuples(st.just("settle_above"), st.integers(1, 50), instant),
        st.tuples(st.just("grant"), share, instant),
        st.tuples(st.just("report"), st.none(), instant),
    ),
    max_size=60,
)


@dataclass
class Auditor:
    """What the provider counts, kept apart from the code under test."""

    admitted: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def count(self, now: float, used: Mapping[str, int]) -> dict[str, int]:
        """One more request, whose use may still be corrected through what is returned."""
        entry = dict(used)
        self.admitted.append((now, entry))
        return entry

    def in_window(self, now: float, name: str) -> int:
        """Micro-units used by what arrived within the last window."""
        return sum(used[name] for at, used in self.admitted if at > now - WINDOW_SECONDS)


class Schedule:
    """Random steps of one worker, checked after each."""

    def __init__(self) -> None:
        self.scene = client_scene.Scene()
        self.scene.join(LIMITS, window_seconds=WINDOW_SECONDS)
        self.scene.renew()
        self.auditor = Auditor()
        self.running: list[tuple[permits.Permit, dict[str, int]]] = []
        self.short_admissions = 0
        self.held_before = dict(self.scene.limiter.held())

    def acquire(self, requests: int, tokens: int) -> bool:
        """Try; the exact path, on a copy of the state before, must admit whatever the short one did."""
        scene = self.scene
        before = copy.deepcopy(scene.limiter)
        permit = scene.budget.try_acquire(requests=requests, tokens=tokens)
        if permit is None:
            return False
        if client_scene.is_short(permit):
            self.short_admissions += 1
            assert before.try_admit(before.cost(requests, tokens), scene.now)
        used = self.auditor.count(scene.now, {REQUESTS: requests * MICRO, TOKENS: tokens * MICRO})
        self.running.append((permit, used))
        return True

    def end(self, fraction: float) -> None:
        """The oldest call ends, having used a part of its tokens."""
        if not self.running:
            return
        permit, used = self.running.pop(0)
        tokens = int(used[TOKENS] // MICRO * fraction)
        permit.settle(tokens=tokens)
        used[TOKENS] = tokens * MICRO
        permit.release()

    def check(self) -> None:
        """What the provider counts is within what the allocator counts against this worker."""
        scene, limiter = self.scene, self.scene.limiter
        limiter.fold(scene.now)
        limiter._advance(scene.now)
        limiter.audit()
        held = limiter.held()
        for name in (REQUESTS, TOKENS):
            assert self.auditor.in_window(scene.now, name) <= held[name], name
        assert len(self.running) * MICRO <= held[CALLS]
        limiter.reopen(scene.now)
        holdings = limiter.holdings(scene.now)
        in_flight = sum(used[TOKENS] for _, used in self.running)
        assert holdings.refundable[TOKENS] >= in_flight

    def grant(self, fraction: float) -> None:
        """The allocator gives this part of the limits."""
        scene = self.scene
        held = scene.limiter.held()
        scene.grant({name: int(units * fraction) for name, units in LIMITS.items()}, answered_sequence=0)
        for name, micros in scene.limiter.held().items():
            assert micros <= max(held[name], int(LIMITS[name] * fraction) * MICRO), "only a grant makes more"


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(steps)
def test_no_window_ever_holds_more_than_the_worker_owns(plan: list[tuple[str, Any, float]]) -> None:
    schedule = Schedule()
    for what, value, seconds in plan:
        schedule.scene.advance(seconds)
        if schedule.scene.now > schedule.scene.limiter.expires_at - 5:
            schedule.scene.renew()
        if what in ("acquire", "burst"):
            requests, tokens = value
            for _ in range(1 if what == "acquire" else 8):
                if not schedule.acquire(requests, tokens):
                    break
                if what == "burst":
                    schedule.end(0.5)
        elif what == "end":
            schedule.end(value)
        elif what == "grant":
            schedule.grant(value)
        elif what == "report":
            schedule.scene.report()
        elif what == "settle_above" and schedule.running:
            # Over-use is debt, told as overdraft, and not what is promised: what was reserved is.
            permit, used = schedule.running.pop(0)
            permit.settle(tokens=used[TOKENS] // MICRO + value)
            permit.release()
        schedule.check()
    for permit, _ in schedule.running:
        permit.release()
    schedule.running.clear()
    schedule.check()
    assert not schedule.scene.limiter._unended


def test_most_admissions_take_the_short_path() -> None:
    scene = client_scene.Scene()
    scene.join()
    scene.renew()

    taken = []
    for _ in range(50):
        permit = scene.budget.acquire(tokens=100)
        with permit:
            taken.append(client_scene.is_short(permit))
            permit.settle(tokens=50)

    assert taken.count(True) >= 49
    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[TOKENS].admitted_total == 50 * 50 * MICRO
    assert scene.limiter.stocks[REQUESTS].admitted_total == 50 * MICRO


def test_a_worker_known_as_idle_takes_the_exact_path() -> None:
    scene = client_scene.Scene()
    scene.engine.connected(1)
    scene.report()
    scene.grant(terms=terms_of())

    with scene.budget.acquire(tokens=1) as permit:
        assert not client_scene.is_short(permit)
    assert scene.pokes, "the allocator must hear of it"


def test_a_worker_reported_as_idle_leaves_the_short_path() -> None:
    scene = client_scene.Scene()
    scene.join()
    scene.renew()
    scene.engine.update_activity(is_active=False, current_load=0.0, active_tasks=0)
    scene.advance(1.0)
    report = scene.report()

    assert report is not None and not report.is_active
    with scene.budget.acquire(tokens=1) as permit:
        assert not client_scene.is_short(permit)


def test_nothing_is_admitted_from_the_instant_of_expiry() -> None:
    scene = client_scene.Scene()
    scene.join()
    scene.advance(9.99)
    assert scene.budget.try_acquire(tokens=1) is not None

    scene.advance(0.02)

    assert scene.budget.try_acquire(tokens=1) is None


def test_other_costs_and_odd_numbers_take_the_exact_path() -> None:
    limits = {CALLS: 5, REQUESTS: 60, TOKENS: 3_000, "images": 100}
    scene = client_scene.Scene()
    scene.join(limits)
    scene.renew()

    odd: list[dict[str, Any]] = [
        {"tokens": 1.5},
        {"tokens": 1, "costs": {"images": 2}},
        {"tokens": 1, "requests": 0.5},
    ]
    for arguments in odd:
        with scene.budget.acquire(**arguments) as permit:
            assert not client_scene.is_short(permit)
    assert scene.limiter.stocks["images"].admitted_total == 2 * MICRO


def test_a_standard_name_of_another_kind_shuts_the_short_path() -> None:
    scene = client_scene.Scene()
    terms = messages.Terms(
        dimensions=(
            model.Dimension(name=CALLS, kind=model.DimensionKind.CONCURRENCY, limit=5 * MICRO),
            model.Dimension(name=REQUESTS, kind=model.DimensionKind.SLOTS, limit=2 * MICRO),
        ),
        arrival_jitter_seconds=1.0,
        max_call_seconds=600.0,
        activity_timeout_seconds=30.0,
        safe_ttl_seconds=60.0,
        max_tokens_per_request=0,
        charged_at=model.ChargedAt.ARRIVAL,
    )
    scene.engine.connected(1)
    scene.engine.update_activity(is_active=True, current_load=0.0, active_tasks=0)
    scene.report()
    scene.grant({CALLS: 5, REQUESTS: 2}, terms=terms)
    scene.renew()

    held = [scene.budget.try_acquire(tokens=0) for _ in range(3)]

    assert [permit is not None for permit in held] == [True, True, False]
