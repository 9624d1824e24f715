"""Races that the simulated world found, each told again as a pure test of the core."""

import dataclasses

import pytest
from leasehold.core import processes
from leasehold.core.budget import allocator, effects, messages, model, quantity, stock
from leasehold.core.budget import holder as holders
from leasehold.core.budget import lease as leases
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget.machine import BudgetMachine
from leasehold.core.epoch import Epoch

MICRO = quantity.MICRO
OLD, NEW = Epoch(1, 5, 7), Epoch(1, 9, 7)
RATE = "rpm_limit"


def spec(**changes: object) -> model.BudgetSpec:
    base = model.BudgetSpec(
        name="llm",
        dimensions=(
            model.Dimension(
                name="max_concurrent_requests", kind=model.DimensionKind.CONCURRENCY, limit=4 * MICRO
            ),
            model.Dimension(name=RATE, kind=model.DimensionKind.RATE, limit=800 * MICRO),
        ),
        max_call_seconds=20.0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


class Scene:
    """One allocator, told what happens by hand."""

    def __init__(self, definition: model.BudgetSpec | None = None, epoch: Epoch = OLD) -> None:
        self.core = allocator.Allocator(epoch)
        self.now = 1_000.0
        self.core.define(definition or spec(), 1, self.now)
        self.effects = self.core.finish(self.now)

    @property
    def budget(self) -> BudgetMachine:
        return self.core.budgets["llm"]

    def pass_to(self, now: float) -> list[effects.Effect]:
        self.now = now
        self.core.tick(now)
        return self.finish()

    def finish(self) -> list[effects.Effect]:
        self.effects = self.core.finish(self.now)
        self.core.audit()
        return self.effects

    def report(self, holder: str, sequence: int, *, session: int = 1, **fields: object) -> list[effects.Effect]:
        held = fields.pop("held", 0)
        age = fields.pop("age_seconds", None)
        report = messages.Report(
            budget="llm",
            holder=holder,
            incarnation=f"{holder}-incarnation",
            sequence=sequence,
            is_active=True,
            holdings=messages.Holdings(held={RATE: held * MICRO}, largest_cost={RATE: MICRO}),  # type: ignore[operator]
            **fields,  # type: ignore[arg-type]
        )
        self.core.report(report, self.now, session=session, age_seconds=age)  # type: ignore[arg-type]
        return self.finish()

    def lease(self, holder: str) -> leases.Lease:
        return self.budget.book.leases[holder]

    def counted(self, holder: str) -> int:
        """Units of the rate that count for a holder, whatever they are called."""
        book = self.budget.book
        held = book.leases.get(holder)
        return (book.stranded_of(holder)[1] + (held.bound[1] if held is not None else 0)) // MICRO

    def grants(self, holder: str) -> list[messages.Grant]:
        return [
            effect.message
            for effect in self.effects
            if isinstance(effect, effects.Send)
            and isinstance(effect.message, messages.Grant)
            and effect.message.holder == holder
        ]


def joined(scene: Scene, holder: str = "w0", *, session: int = 1) -> messages.Grant:
    scene.report(holder, 1, session=session)
    return scene.grants(holder)[-1]


def test_report_that_outlived_its_lease_does_not_wipe_what_was_granted_since_it_was_made() -> None:
    scene = Scene()
    granted = joined(scene)
    # The second report leaves the holder before it hears of 800 and is held up; the lease expires meanwhile.
    scene.pass_to(scene.now + 10.02)
    # What it can have spent of 800 by its pace.
    assert scene.counted("w0") == 247
    scene.report("w0", 2, lease_id=granted.lease_id, held=0)
    assert scene.counted("w0") >= 247


def test_repeated_join_does_not_void_the_grant_that_answered_the_first() -> None:
    scene = Scene()
    granted = joined(scene)
    scene.now += 1.0
    scene.report("w0", 2, held=0)
    assert scene.lease("w0").lease_id == granted.lease_id
    assert scene.counted("w0") >= 800


def test_rejoin_on_a_new_connection_is_the_whole_truth() -> None:
    scene = Scene()
    granted = joined(scene)
    scene.report("w0", 2, lease_id=granted.lease_id, grant_version=granted.version, held=800)
    scene.pass_to(scene.now + 10.02)
    scene.report("w0", 3, session=2, is_rejoin=True, held=30)
    assert scene.budget.book.stranded_of("w0") == (0, 0)


def test_report_of_a_dead_process_is_passed_over() -> None:
    scene = Scene()
    process = processes.ProcessKey("boot", 1, 7, 7)
    scene.report("w0", 1, process=process)
    scene.core.process_exited(process, scene.now)
    scene.finish()
    scene.report("w0", 2, held=0)
    assert "w0" not in scene.budget.book.leases
    assert scene.counted("w0") > 0


def test_released_incarnation_never_comes_back() -> None:
    scene = Scene()
    granted = joined(scene)
    used = messages.Holdings(held={RATE: 30 * MICRO}, cooling=(messages.Cooling(RATE, (30 * MICRO,), (50.0,)),))
    scene.core.release(
        messages.Release(
            budget="llm",
            holder="w0",
            incarnation="w0-incarnation",
            lease_id=granted.lease_id,
            holdings=used,
        ),
        scene.now,
    )
    scene.finish()
    scene.report("w0", 2, session=9, held=0)
    assert scene.grants("w0")[-1].end is messages.LeaseEnd.RELEASED
    assert scene.counted("w0") == 30


def test_deleted_and_recreated_budget_lends_nothing_of_leases_that_may_still_be_used() -> None:
    scene = Scene()
    joined(scene)
    scene.core.delete("llm", scene.now)
    scene.core.define(spec(), 2, scene.now)
    scene.finish()
    assert scene.budget.book.pool()[1] == 0
    # Its tombstone tells a new leader that the lease may have been in use.
    record = [e.record for e in scene.effects if isinstance(e, effects.PutRecord)][-1]
    assert record.is_cooling and record.ttl_seconds == pytest.approx(10.0, abs=0.02)


def test_lowered_ttl_does_not_shorten_what_an_earlier_answer_promised() -> None:
    scene = Scene()
    granted = joined(scene)
    promised = scene.lease("w0").expires_at
    scene.core.define(spec(ttl_seconds=2.0, refresh_seconds=0.5), 2, scene.now)
    scene.now += 1.0
    scene.report("w0", 2, lease_id=granted.lease_id)
    assert scene.lease("w0").expires_at == promised


def test_raised_ttl_is_in_etcd_before_the_holder_hears_of_it() -> None:
    scene = Scene()
    granted = joined(scene)
    scene.core.define(spec(ttl_seconds=30.0), 2, scene.now)
    scene.report("w0", 2, lease_id=granted.lease_id)
    assert 30.0 in [
        e.record.ttl_seconds
        for e in scene.effects
        if isinstance(e, effects.PutRecord) and e.record.holder == "w0"
    ]
    assert scene.grants("w0")[-1].ttl_seconds == 30.0


def test_terms_pushed_before_the_holder_knows_its_new_lease_go_with_the_answer_too() -> None:
    scene = Scene()
    granted = joined(scene)
    scene.pass_to(scene.now + 10.02)
    report = messages.Report(
        budget="llm",
        holder="w0",
        incarnation="w0-incarnation",
        sequence=2,
        lease_id=granted.lease_id,
        holdings=messages.Holdings(held={}),
    )
    scene.core.report(report, scene.now, session=1)
    scene.core.define(spec(max_call_seconds=5.0), 2, scene.now)
    scene.finish()
    # The push names a lease that the holder hears of only by the answer.
    assert [grant.answered_sequence for grant in scene.grants("w0")] == [0, 2]
    answer = scene.grants("w0")[-1]
    assert answer.lease_id != granted.lease_id
    assert answer.terms is not None and answer.terms.max_call_seconds == 5.0


def test_under_a_new_leader_a_superseded_lease_does_not_end_the_incarnation_that_superseded_it() -> None:
    scene = Scene()
    granted = joined(scene)
    scene.report("w0", 2, lease_id=granted.lease_id, grant_version=granted.version, held=400)
    records: dict[str, effects.Record] = {}

    def joins(core: allocator.Allocator, *, is_rejoin: bool) -> list[messages.LeaseEnd | None]:
        report = messages.Report(
            budget="llm",
            holder="w0",
            incarnation="w0-the-newer",
            sequence=9 if is_rejoin else 1,
            is_rejoin=is_rejoin,
            holdings=messages.Holdings(held={}),
        )
        core.report(report, scene.now, session=2)
        told = core.finish(scene.now)
        records.update({e.record.incarnation: e.record for e in told if isinstance(e, effects.PutRecord)})
        grants = [e.message for e in told if isinstance(e, effects.Send)]
        return [g.end for g in grants if isinstance(g, messages.Grant) and g.incarnation == "w0-the-newer"]

    assert joins(scene.core, is_rejoin=False) == [None]
    assert records["w0-incarnation"].is_superseded
    # The newer one expired with nothing used, so etcd knows the older one only.
    successor = allocator.Allocator(NEW)
    successor.restore_definition(spec(), 1, scene.now)
    successor.restore_record(records["w0-incarnation"], scene.now)
    assert joins(successor, is_rejoin=True) == [None]
    book = successor.budgets["llm"].book
    assert book.leases["w0"].incarnation == "w0-the-newer"
    assert book.outstanding[1] >= 400 * MICRO
    successor.audit()


def test_ttl_raised_between_a_report_and_its_answer_is_not_promised_to_it() -> None:
    scene = Scene(spec(ttl_seconds=2.0, refresh_seconds=0.5))
    granted = joined(scene)
    report = messages.Report(
        budget="llm",
        holder="w0",
        incarnation="w0-incarnation",
        sequence=2,
        lease_id=granted.lease_id,
        holdings=messages.Holdings(held={RATE: 0}),
    )
    scene.core.report(report, scene.now, session=1)
    scene.core.define(spec(ttl_seconds=30.0), 2, scene.now)
    scene.finish()
    assert [g.ttl_seconds for g in scene.grants("w0") if g.answered_sequence == 2] == [2.0]
    assert scene.lease("w0").expires_at == pytest.approx(scene.now + 2.0, abs=0.01)


def test_ttl_raised_while_an_acquire_waits_is_not_promised_to_it() -> None:
    scene = Scene(spec(ttl_seconds=2.0, refresh_seconds=0.5))
    granted = joined(scene)
    scene.core.acquire(
        budget="llm",
        holder="script",
        incarnation="script-request",
        demand={},
        process=None,
        token=7,
        now=scene.now,
    )
    assert not any(isinstance(effect, effects.Reply) for effect in scene.finish())
    asked_at, scene.now = scene.now, scene.now + 0.5
    scene.core.define(spec(ttl_seconds=30.0), 2, scene.now)
    shrunk = scene.finish() and scene.grants("w0")[-1]
    assert isinstance(shrunk, messages.Grant)
    told = scene.report("w0", 2, lease_id=granted.lease_id, grant_version=shrunk.version, held=400)
    told += scene.pass_to(scene.now + 0.1)
    answers = [effect.message for effect in told if isinstance(effect, effects.Reply)]
    assert [answer.ttl_seconds for answer in answers if isinstance(answer, messages.Grant)] == [2.0]
    assert scene.lease("script").expires_at == pytest.approx(asked_at + 2.0, abs=0.01)


def _lost(lease: leases.Lease, **named: object) -> int:
    rules = leases.StrandRules.of(spec())
    arguments = {"is_certified": True} | named
    parts = leases.strand_lost(lease, rules, 1_010.0, **arguments)  # type: ignore[arg-type]
    return sum(part.amount for part in parts if part.index == 1 and part.until > 1_060.0) // MICRO


def _lease(**changes: object) -> leases.Lease:
    caps = (0, 200 * MICRO)
    lease = leases.Lease("w0", "w0-incarnation", 1, 1_010.0, 1_000.0, caps, caps)
    lease.held, lease.largest_cost, lease.ttl_seconds, lease.is_age_known = caps, (None, MICRO), 10.0, True
    for name, value in changes.items():
        setattr(lease, name, value)
    return lease


def test_quarantine_of_200_of_800_after_ten_seconds_is_about_62() -> None:
    assert _lost(_lease(), is_certified=False) == 62


def test_certified_death_quarantines_all_that_was_free_if_the_reports_age_is_not_known() -> None:
    assert _lost(_lease(last_report_at=1_009.9)) == 21
    assert _lost(_lease(last_report_at=1_009.9, is_age_known=False)) == 200


def test_step_of_merged_cooling_units_may_have_been_spent_again() -> None:
    # 200 cool, 40 of them told as coming back 1 s after the death; all but the last of those may be free.
    cooling = (messages.Cooling(RATE, (40 * MICRO, 160 * MICRO), (11.0, 30.0)),)
    assert _lost(_lease(cooling=cooling, cooling_since=1_000.0)) == 40


def test_repeated_shrink_and_growth_gives_credit_each_time() -> None:
    quiet = _lost(_lease(last_report_at=1_010.0))
    shaken = _lease(last_report_at=1_010.0)
    for cap in (100, 200, 100, 200):
        shaken.set_caps((0, cap * MICRO))
    assert _lost(shaken) == quiet + 20


def test_pace_counts_only_from_the_one_that_was_acknowledged() -> None:
    lease = _lease(last_report_at=1_010.0)
    for share in (100, 800, 200, 400):
        lease.tell_pace((0, share * MICRO))
    # The burst of 800, and the growths of 600 and 200.
    assert _lost(lease) == 80 + 60 + 20 + 1
    lease.acknowledge(lease.version, lease.held)
    assert _lost(lease) == 40 + 1


def test_pace_that_was_told_before_a_shrink_gives_credit_for_the_growth_after_it() -> None:
    lease = _lease(last_report_at=1_010.0, caps=(0, 100 * MICRO))
    lease.tell_pace((0, 200 * MICRO))
    lease.acknowledge(1, lease.caps)
    # Taken one after the other: the pace falls to 100, and only then the share grows to 200.
    lease.tell_pace((0, 50 * MICRO))
    lease.set_caps((0, 200 * MICRO))
    lease.unacknowledged = [(lease.paces[-1][0], lease.caps)]
    assert lease.paced_shares(1) == [200 * MICRO, 100 * MICRO, 200 * MICRO]


def test_deaths_of_many_do_not_make_the_next_one_dearer() -> None:
    """Each join and each death moved everybody's pace; those moves are no credit of one who came after them."""
    scene = Scene(spec(orphan_seconds=0.0))
    joined(scene)
    for number in range(1, 9):
        name, process = f"w{number}", processes.ProcessKey("boot", 1, number, 1)
        scene.report("w0", number * 2, **_applied(scene, "w0"))
        scene.report(name, 1, session=number + 1, process=process)
        scene.pass_to(scene.now + 0.1)
        scene.report("w0", number * 2 + 1, **_applied(scene, "w0"))
        scene.pass_to(scene.now + 0.1)
        scene.report(name, 2, session=number + 1, **_applied(scene, name), age_seconds=0.0)
        share = scene.counted(name)
        assert share >= 200
        scene.core.process_exited(process, scene.now)
        scene.finish()
        # The burst of half the limit, and one request; the budget is young, but how it was paced is known.
        assert scene.counted(name) == 41


def _applied(scene: Scene, holder: str) -> dict[str, int]:
    """What a report says of one who has applied all that it was told, and uses nothing."""
    held = scene.lease(holder)
    return {"lease_id": held.lease_id, "grant_version": held.version, "held": held.caps[1] // MICRO}


def test_safe_capacity_is_quarantined_from_when_its_use_ends() -> None:
    rules = leases.StrandRules.of(spec(safe_ttl_seconds=60.0))
    lease = _lease(safe=(0, 50 * MICRO))
    parts = leases.strand_lost(lease, rules, 1_010.0, is_certified=False)
    late = [part for part in parts if part.until >= 1_010.0 + 60.0 + 61.0]
    assert sum(part.amount for part in late) == 50 * MICRO


def test_no_cap_is_raised_while_more_is_outstanding_than_the_limit() -> None:
    scene = Scene()
    first = joined(scene)
    # A holder that slept tells of 30 units that have been lent anew.
    scene.report("w1", 1, session=2, held=30)
    assert scene.budget.book.is_overcommitted(1)
    assert scene.lease("w1").caps[1] == 0
    scene.pass_to(scene.now + 1.0)
    assert scene.lease("w1").caps[1] == 0
    scene.report("w0", 2, lease_id=first.lease_id, grant_version=scene.lease("w0").version, held=400)
    scene.pass_to(scene.now + 1.0)
    assert scene.lease("w1").caps[1] == 400 * MICRO
    assert scene.lease("w0").bound[1] + scene.lease("w1").bound[1] == 800 * MICRO


def test_new_leader_takes_nothing_back_of_a_holder_on_a_connection_that_it_left() -> None:
    holder = holders.Holder(budget="llm", name="w0", incarnation="w0-incarnation")
    scene = Scene()
    holder.connected(1)
    scene.core.report(holder.make_report(50.0), scene.now, session=1)
    scene.finish()
    holder.granted(1, scene.grants("w0")[-1], 50.1)
    before = holder.limiter.amounts()[RATE]
    assert before == 200 * MICRO
    late = dataclasses.replace(
        scene.grants("w0")[-1], answered_sequence=0, version=99, amounts={RATE: 1_600 * MICRO}
    )
    holder.disconnected(1)
    holder.connected(2)
    holder.make_report(50.2)
    holder.granted(1, late, 50.3)
    assert holder.limiter.amounts()[RATE] == before
    # Nor of a lower epoch, on whatever connection.
    holder.granted(2, dataclasses.replace(late, epoch=NEW, version=3, amounts={RATE: 10 * MICRO}), 50.4)
    holder.granted(2, late, 50.5)
    assert holder.limiter.amounts()[RATE] == 10 * MICRO


def _stock(cap: int, now: float = 1_000.0) -> stock.RateStock:
    held = stock.RateStock(window_seconds=60.0, jitter_seconds=1.0, now=now)
    held.set_cap(cap)
    return held


def test_shrink_of_odd_amounts_never_makes_held_grow() -> None:
    held = _stock(1_000_003)
    for number in range(30):
        held.charge(1_000.0 + number, 33_333)
    before = held.held
    for cap in (777_777, 500_001, 3, 0):
        held.set_cap(cap)
        held.audit()
        assert held.held <= before


def test_shrink_of_a_holder_in_debt_never_makes_held_grow() -> None:
    held = _stock(100)
    held.charge(1_000.0, 150)
    held.set_cap(0)
    held.audit()
    assert held.held == 100


def test_pacing_debt_is_not_forgiven_by_a_shrink() -> None:
    held = _stock(1_000)
    held.level = -400.0
    held.set_cap(500)
    assert held.level == -400.0


def test_joiner_is_paced_by_its_coming_share_rather_than_by_what_it_owns_yet() -> None:
    held = _stock(5 * MICRO)
    held.set_pace(400 * MICRO)
    held.advance(1_001.0)
    assert held.can_admit(MICRO)
    assert held.burst == 40 * MICRO


def test_time_alone_does_not_help_a_cost_that_waits_for_credit() -> None:
    held = _stock(100)
    held.credit_max = 5
    held.advance(1_100.0)
    assert not held.can_admit(50)
    assert held.seconds_until(50, 1_100.0) == float("inf")


def test_lack_of_credit_is_reported_once() -> None:
    holder = holders.Holder(budget="llm", name="w0", incarnation="w0-incarnation")
    scene = Scene()
    holder.connected(1)
    scene.core.report(holder.make_report(50.0), scene.now, session=1)
    scene.finish()
    holder.granted(1, scene.grants("w0")[-1], 50.1)
    holder.make_report(50.15)
    holder.limiter.enqueue(limiters.Waiter(holder.limiter.cost(200)))
    assert holder.wants_report(50.2)
    holder.make_report(50.2)
    assert not holder.wants_report(50.2001)


def test_holder_takes_no_pace_from_a_grant_that_was_overtaken() -> None:
    """The allocator takes the pace of the version that was acknowledged for the one in force."""
    holder = holders.Holder(budget="llm", name="w0", incarnation="w0-incarnation")
    scene = Scene()
    holder.connected(1)
    scene.core.report(holder.make_report(50.0), scene.now, session=1)
    scene.finish()
    alone = scene.grants("w0")[-1]
    holder.granted(1, alone, 50.1)
    holder.make_report(50.2)
    later = dataclasses.replace(
        alone, version=alone.version + 1, answered_sequence=2, active_workers=4, terms=None
    )
    holder.granted(1, later, 50.3)
    holder.granted(1, dataclasses.replace(alone, answered_sequence=0, terms=None, active_workers=1), 50.4)
    held = holder.limiter.stocks[RATE]
    assert isinstance(held, stock.RateStock)
    assert (held.pace_share, holder.active_workers) == (200 * MICRO, 4)


def test_unary_holder_is_told_the_terms_again_until_it_has_applied_them() -> None:
    scene = Scene()

    def renew(sequence: int, lease_id: int = 0, grant_version: int = 0) -> messages.Grant:
        report = messages.Report(
            budget="llm",
            holder="w0",
            incarnation="w0-incarnation",
            sequence=sequence,
            lease_id=lease_id,
            grant_version=grant_version,
            holdings=messages.Holdings(held={}),
        )
        scene.core.report(report, scene.now, token=sequence)
        return [e.message for e in scene.finish() if isinstance(e, effects.Reply)][-1]  # type: ignore[return-value]

    first = renew(1)
    known = {"lease_id": first.lease_id, "grant_version": first.version}
    assert renew(2, **known).terms is None
    scene.core.define(spec(max_call_seconds=7.0), 2, scene.now)
    # This answer is lost.
    assert renew(3, **known).terms is not None
    told = renew(4, **known)
    assert told.terms is not None and told.terms.max_call_seconds == 7.0
    assert renew(5, lease_id=told.lease_id, grant_version=told.version).terms is None
