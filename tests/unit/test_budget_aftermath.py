"""What earlier definitions of a budget still bind, and that no change of leaders forgets it."""

import dataclasses
from typing import Any

import pytest
from leasehold.allocator import records
from leasehold.core import epoch as epochs
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import allocator as allocators
from leasehold.core.budget import codec, effects, messages, model
from leasehold.core.budget.lease import TTL_FACTOR
from leasehold.core.budget.quantity import MICRO

CALLS, REQUESTS = "max_concurrent_requests", "rpm_limit"
KEYS = records.Keys("/leasehold")


def spec(**changes: Any) -> model.BudgetSpec:
    """Ten calls at once, 100 requests a minute; TTL 10 s, calls of at most 600 s."""
    document = {
        "name": "llm",
        "dimensions": {CALLS: 10, REQUESTS: 100},
        "max_call_seconds": 600,
        "safe_ttl_seconds": 0,
        **changes,
    }
    return codec.decode_budget(document)


WITHOUT_REQUESTS = {"dimensions": {CALLS: 10}}


class Reigns:
    """One leader after the other; what they write goes through etcd's keys and values."""

    def __init__(self) -> None:
        self.now = 0.0
        self.written: dict[str, bytes] = {}
        self.version = 0
        self._reigns = 0
        self._begin()

    def _begin(self) -> None:
        self._reigns += 1
        self.core = allocators.Allocator(epochs.Epoch(1, self._reigns))
        self._sequences: dict[str, int] = {}

    def do(self, out: list[effects.Effect]) -> list[messages.Grant]:
        """Write what is to be written; the grants that are sent."""
        grants = []
        for effect in out:
            match effect:
                case effects.PutDefinition():
                    self.written[KEYS.budget(effect.spec.name)] = records.encode_definition(effect)
                case effects.DeleteDefinition(budget):
                    del self.written[KEYS.budget(budget)]
                case effects.PutRecord(record):
                    self.written[KEYS.lease(record.key)] = records.encode_record(record)
                case effects.DeleteRecord(key):
                    del self.written[KEYS.lease(key)]
                case effects.Send(message=messages.Grant() as grant):
                    grants.append(grant)
                case _:
                    continue
        self.core.audit()
        return grants

    def define(self, **changes: Any) -> None:
        self.version += 1
        self.core.define(spec(**changes), self.version, self.now)
        self.do(self.core.finish(self.now))

    def pass_to(self, now: float) -> None:
        """Time goes on, and every deadline is kept."""
        while (due := self.core.next_deadline()) <= now:
            self.now = max(self.now, due)
            self.core.tick(self.now)
            self.do(self.core.finish(self.now))
        self.now = now

    def fail_over(self) -> None:
        """Another one leads, whose clock is another."""
        self._begin()
        self.now += 1_000_000.0
        found = sorted(self.written.items())
        for key, value in found:
            if key.startswith(KEYS.budgets):
                put = records.decode_definition(value)
                self.core.restore_definition(
                    put.spec, put.version, self.now, is_retired=put.is_retired, aftermath=put.aftermath
                )
        for key, value in found:
            if key.startswith(KEYS.leases):
                assert self.core.restore_record(records.decode_record(KEYS, key, value), self.now)
        self.do(self.core.finish(self.now))

    def join(self, holder: str = "h") -> None:
        """A holder that has, and uses, all that it was granted."""
        grant = self.say(holder)
        held = dict(grant.amounts)
        self.say(holder, grant, holdings=messages.Holdings(held=held))

    def say(self, holder: str, grant: messages.Grant | None = None, **more: Any) -> messages.Grant:
        self._sequences[holder] = self._sequences.get(holder, 0) + 1
        report = messages.Report(
            budget="llm",
            holder=holder,
            incarnation=f"{holder}-incarnation",
            sequence=self._sequences[holder],
            is_active=True,
            **more,
        )
        if grant is not None:
            report = dataclasses.replace(report, lease_id=grant.lease_id, grant_version=grant.version)
        self.core.report(report, self.now, session=1)
        return self.do(self.core.finish(self.now))[-1]

    def taken(self, name: str) -> float:
        """Units that nobody else may have."""
        book = self.core.budgets["llm"].book
        return book.outstanding[book.index[name]] / MICRO


@pytest.fixture
def reigns() -> Reigns:
    """A budget all of which is in use."""
    made = Reigns()
    made.define()
    made.pass_to(1.0)
    made.join()
    assert (made.taken(CALLS), made.taken(REQUESTS)) == (10, 100)
    return made


@pytest.mark.parametrize("leaders", [0, 1, 2])
def test_calls_that_began_under_a_longer_bound_count_through_any_number_of_leaders(
    reigns: Reigns, leaders: int
) -> None:
    reigns.define(max_call_seconds=5)
    for _ in range(leaders):
        reigns.pass_to(reigns.now + 1.0)
        reigns.fail_over()
    began_at = reigns.now

    reigns.pass_to(began_at + 609.0)
    assert reigns.taken(CALLS) == 10
    reigns.pass_to(began_at + 625.0)
    assert reigns.taken(CALLS) == 0


def test_what_is_over_is_not_written_down_for_the_next_leader(reigns: Reigns) -> None:
    reigns.define(max_call_seconds=5)
    assert records.decode_definition(reigns.written[KEYS.budget("llm")]).aftermath.terms is not None
    reigns.pass_to(700.0)
    assert records.decode_definition(reigns.written[KEYS.budget("llm")]).aftermath == aftermaths.NOTHING
    reigns.fail_over()
    reigns.join()
    left_at = reigns.now

    reigns.pass_to(left_at + 16.0)
    assert reigns.taken(CALLS) == 0


def test_safe_capacity_that_was_taken_away_may_be_in_use_under_the_next_leader() -> None:
    classes = [{"pattern": "h", "safe_capacity": {REQUESTS: 20}}]
    reigns = Reigns()
    reigns.define(holder_classes=classes, safe_ttl_seconds=300)
    reigns.pass_to(1.0)
    reigns.join()
    reigns.define(safe_ttl_seconds=30)
    reigns.fail_over()
    began_at = reigns.now

    # TTL, then safe capacity for 300 s, then the window and its jitter.
    reigns.pass_to(began_at + 10.0 + 61.0 + 250.0)
    assert reigns.taken(REQUESTS) == 20
    reigns.pass_to(began_at + 10.1 + 61.0 + 301.0)
    assert reigns.taken(REQUESTS) == 0


@pytest.mark.parametrize("leaders", [(), ("removed",), ("removed", "back"), ("back",)])
def test_a_dimension_that_comes_back_waits_for_what_was_used_of_it(
    reigns: Reigns, leaders: tuple[str, ...]
) -> None:
    reigns.core.session_closed(1, reigns.now)  # it is given nothing anew
    reigns.define(**WITHOUT_REQUESTS)
    if "removed" in leaders:
        reigns.fail_over()
    reigns.pass_to(reigns.now + 2.0)
    reigns.define()
    back_at = reigns.now
    assert reigns.taken(REQUESTS) == 100
    if "back" in leaders:
        reigns.fail_over()
        back_at = reigns.now

    # Who did not hear of it spends on until its lease has run out; the provider counts that for a window.
    reigns.pass_to(back_at + 10.0 + 61.0 - 2.1)
    assert reigns.taken(REQUESTS) == 100
    reigns.pass_to(back_at + 2 * 10.1 + 62.0)
    assert reigns.taken(REQUESTS) == 0
    assert KEYS.lease(("llm", *2 * (aftermaths.EARLIER_DEFINITION,))) not in reigns.written


def test_a_dimension_that_comes_back_late_is_free(reigns: Reigns) -> None:
    reigns.define(**WITHOUT_REQUESTS)
    reigns.pass_to(80.0)
    reigns.define()
    assert reigns.taken(REQUESTS) == 0


def test_a_dimension_that_comes_back_with_a_longer_window_or_of_another_kind_waits_by_its_former_one(
    reigns: Reigns,
) -> None:
    for dimension in (
        {"kind": "rate", "limit": 50, "window_seconds": 3600},
        {"kind": "concurrency", "limit": 50},
    ):
        other = Reigns()
        other.define()
        other.join()
        other.define(**WITHOUT_REQUESTS)
        other.define(dimensions={CALLS: 10, REQUESTS: dimension})
        assert other.taken(REQUESTS) == 100
        book = other.core.budgets["llm"].book
        assert book.pool()[book.index[REQUESTS]] == 0
        other.pass_to(70.9)
        assert other.taken(REQUESTS) == 100
        other.pass_to(71.1)
        assert other.taken(REQUESTS) == 0


def test_a_budget_is_not_forgotten_while_a_removed_dimension_of_it_may_come_back() -> None:
    reigns = Reigns()
    reigns.define(max_call_seconds=1)
    reigns.join()
    reigns.define(max_call_seconds=1, **WITHOUT_REQUESTS)
    reigns.core.delete("llm", reigns.now)
    reigns.do(reigns.core.finish(reigns.now))
    reigns.pass_to(30.0)
    assert reigns.core.budgets["llm"].book.stranded == {}
    reigns.fail_over()

    reigns.define(max_call_seconds=1)
    assert reigns.taken(REQUESTS) == 100
    reigns.core.delete("llm", reigns.now)
    reigns.pass_to(reigns.now + 200.0)
    assert reigns.written == {}


def test_calls_of_a_lease_that_ran_out_count_as_long_as_the_providers_longer_bound() -> None:
    reigns = Reigns()
    reigns.define(max_call_seconds=20, orphan_seconds=120)
    reigns.join()

    reigns.pass_to(10.0 + 119.0)
    assert reigns.taken(CALLS) == 10
    reigns.pass_to(10.1 + 121.0)
    assert reigns.taken(CALLS) == 0


def test_what_an_older_allocator_wrote_is_read_as_bound_by_nothing() -> None:
    put = effects.PutDefinition(spec(), 7)
    assert records.decode_definition(records.encode_definition(put)) == put
    written = records.encode_definition(put).replace(b',"aftermath":{}', b"")
    assert b"aftermath" not in written
    assert records.decode_definition(written) == put


def test_many_sets_of_safe_capacities_are_told_apart_only_as_far_as_there_is_room() -> None:
    left = aftermaths.NOTHING
    for number in range(20):
        classes = [{"pattern": f"h{number}", "safe_capacity": {REQUESTS: number + 1}}]
        left = left.after(spec(holder_classes=classes), spec(), (0, 0), 0.0)
    assert left.terms is not None and len(left.terms.safe_classes) == aftermaths.SAFE_CLASSES_MAX
    # Of the oldest ones anybody may have had the most; of the latest it is known who.
    assert left.safe_of("h19", (REQUESTS,)) == (20 * MICRO,)
    assert left.safe_of("someone", (REQUESTS,)) == (13 * MICRO,)
    assert left.safe_of("someone", (CALLS,)) == ()


def test_seconds_that_were_left_begin_anew_and_allow_for_a_slower_clock() -> None:
    left = aftermaths.NOTHING.after(spec(), spec(**WITHOUT_REQUESTS), (0, 5 * MICRO), 100.0).left_at(110.0)
    again = left.begun_at(1000.0)
    assert left.terms is not None and again.terms is not None
    assert again.terms.until == 1000.0 + left.terms.until * TTL_FACTOR
    (removed,), (removed_again,) = left.removed, again.removed
    assert removed_again == dataclasses.replace(removed, until=1000.0 + removed.until * TTL_FACTOR)
