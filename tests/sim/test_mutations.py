"""Each safety rule of the budget design is broken once, on purpose, and a short world must go red.

A rule whose absence nobody notices is a rule that no test holds. `RULES` lists the rules; each has a scenario
in which it matters, and the seeds to try. The same scenarios are green with the rule in force. That messages of
a former connection or epoch are void is held by lease ids and versions too, so a world does not notice one of
these missing; `test_budget_machine_races.py` breaks it by hand.
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
from leasehold.core.budget import aftermath, messages, model, stock
from leasehold.core.budget import book as books
from leasehold.core.budget import holder as holders
from leasehold.core.budget import lease as leases
from leasehold.core.budget import limiter as limiters
from leasehold.core.budget import machine as machines
from leasehold.sim import actors_allocator, actors_holder, store, world, world_scenarios
from leasehold.sim.world_scenarios import Scenario

Break = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Rule:
    name: str
    family: str
    breaks: Break
    seeds: int = 12
    change: Callable[[Scenario], Scenario] = lambda scenario: scenario
    #: Of a rule that matters seldom: where to look first.
    first_seed: int = 0


def _steady(scenario: Scenario, users: int = 6) -> Scenario:
    """Enough users to use up everything, charged at arrival."""
    spec = dataclasses.replace(scenario.spec, charged_at=model.ChargedAt.ARRIVAL)
    load = dataclasses.replace(scenario.load, users=users)
    return dataclasses.replace(scenario, spec=spec, load=load)


def _slow(scenario: Scenario) -> Scenario:
    """Messages are held up for long, and nobody leaves a silent connection soon."""
    conditions = dataclasses.replace(
        scenario.conditions, stall_probability=0.03, stall_seconds_max=2.5 * scenario.spec.ttl_seconds
    )
    return dataclasses.replace(_steady(scenario), conditions=conditions, keepalive_seconds=6.0)


def _faults(**kinds: float) -> Callable[[Scenario], Scenario]:
    return lambda scenario: dataclasses.replace(scenario, faults=world_scenarios.Faults(**kinds))


def _units_do_not_cool(patch: pytest.MonkeyPatch) -> None:
    """A token bucket: what is spent comes back with time, here as soon as the window's tenth is over."""
    plain = stock.RateStock.__init__

    def init(self: stock.RateStock, *, window_seconds: float, jitter_seconds: float, now: float) -> None:
        plain(self, window_seconds=window_seconds / 10, jitter_seconds=jitter_seconds, now=now)
        self.window_seconds = window_seconds

    patch.setattr(stock.RateStock, "__init__", init)


def _no_jitter(patch: pytest.MonkeyPatch) -> None:
    plain = stock.RateStock.__init__

    def init(self: stock.RateStock, *, window_seconds: float, jitter_seconds: float, now: float) -> None:
        plain(self, window_seconds=window_seconds, jitter_seconds=0.0 * jitter_seconds, now=now)

    patch.setattr(stock.RateStock, "__init__", init)


def _growth_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    """A shrink counts as given up before the holder acknowledged it."""

    def set_caps(self: leases.Lease, caps: leases.Vector) -> None:
        self.version += 1
        self.caps = caps
        self.bound = caps

    patch.setattr(leases.Lease, "set_caps", set_caps)


def _cooling_returns_at_once(patch: pytest.MonkeyPatch) -> None:
    """A shrink gives up cooling units as if they were free."""

    def shrink(self: stock.RateStock, cap: int) -> None:
        delta, whole = self.cap - cap, self.cap
        for slot, kept in enumerate(self._kept):
            self._kept[slot] -= kept * delta // whole
        self.free = cap - self.withheld - sum(self._kept) - (self.in_use - self.owed)
        self.cap = cap

    patch.setattr(stock.RateStock, "_shrink", shrink)


def _no_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "_unknown_spend", lambda *_, **__: 0)


def _all_that_cools_is_spent_anew(patch: pytest.MonkeyPatch) -> None:
    """The holder promises not to, and does."""
    patch.setattr(stock.RateStock, "let_respend", lambda self, until, now: None)


def _dead_calls_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    plain = leases.StrandRules.lost_seconds

    def lost(self: leases.StrandRules, index: int, *, is_certified: bool = False) -> float:
        return plain(self, index, is_certified=is_certified) if self.dimensions[index].is_rate else 0.0

    patch.setattr(leases.StrandRules, "lost_seconds", lost)


def _nothing_is_stranded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "strand_lost", lambda *_, **__: [])


def _certified_death_frees_all(patch: pytest.MonkeyPatch) -> None:
    plain = leases.strand_lost

    def strand(*arguments: object, is_certified: bool, **named: object) -> list[leases.Stranded]:
        return [] if is_certified else plain(*arguments, is_certified=False, **named)  # type: ignore[arg-type]

    patch.setattr(leases, "strand_lost", strand)


def _ttl_from_receipt(patch: pytest.MonkeyPatch) -> None:
    plain = holders.Holder._answered

    def answered(self: holders.Holder, grant: messages.Grant, now: float) -> None:
        sent = self._sent.get(grant.answered_sequence)
        if sent is not None:
            sent.at = now
        plain(self, grant, now)

    patch.setattr(holders.Holder, "_answered", answered)


def _push_extends_expiry(patch: pytest.MonkeyPatch) -> None:
    plain = holders.Holder.granted

    def granted(self: holders.Holder, session: int, grant: messages.Grant, now: float) -> None:
        plain(self, session, grant, now)
        if session == self.session and self.state is holders.HolderState.HELD and not grant.answered_sequence:
            self.limiter.expires_at = max(self.limiter.expires_at, now + 2.0)

    patch.setattr(holders.Holder, "granted", granted)


def _expiry_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    """A holder that was stopped goes on with its lease until it hears otherwise."""
    patch.setattr(holders.Holder, "tick", lambda self, now: None)
    plain = limiters.Limiter._fits

    def fits(self: limiters.Limiter, cost: limiters.Cost, now: float) -> bool:
        return plain(self, cost, min(now, self.expires_at - 1e-6))

    patch.setattr(limiters.Limiter, "_fits", fits)


def _commit_is_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """A leader answers before, and without, its transaction."""
    plain = actors_allocator.Replica._commit

    def commit(self: actors_allocator.Replica, number: int, writes: list, sends: list) -> None:  # type: ignore[type-arg]
        for effect in sends:
            self._send(effect)
        plain(self, number, writes, [])

    patch.setattr(actors_allocator.Replica, "_commit", commit)


def _epoch_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    plain = store.Store._apply

    def apply(self: store.Store, epoch: store.EpochKey, batch: int, writes: object) -> store.Outcome:
        return plain(self, self.epoch or epoch, self.batch, writes)  # type: ignore[arg-type]

    patch.setattr(store.Store, "_apply", apply)


def _records_are_not_raised_first(patch: pytest.MonkeyPatch) -> None:
    """etcd keeps what was acknowledged, not the upper bound of what was granted."""
    plain = books.Book._record

    def record(self: books.Book, key: books.Key):  # type: ignore[no-untyped-def]
        made = plain(self, key)
        held = self.leases.get(key[0])
        if made is None or held is None or held.incarnation != key[1] or not held.held:
            return made
        return dataclasses.replace(made, amounts=dict(zip(self.names, held.held, strict=True)))

    patch.setattr(books.Book, "_record", record)


def _tombstones_are_dropped_at_takeover(patch: pytest.MonkeyPatch) -> None:
    plain = machines.BudgetMachine.restore

    def restore(self: machines.BudgetMachine, record, now: float) -> None:  # type: ignore[no-untyped-def]
        if record.is_cooling:
            self.book.restored(record)
        else:
            plain(self, record, now)

    patch.setattr(machines.BudgetMachine, "restore", restore)


def _takeover_does_not_restart_ttls(patch: pytest.MonkeyPatch) -> None:
    plain = machines.BudgetMachine.restore

    def restore(self: machines.BudgetMachine, record, now: float) -> None:  # type: ignore[no-untyped-def]
        plain(self, dataclasses.replace(record, ttl_seconds=0.05), now)

    patch.setattr(machines.BudgetMachine, "restore", restore)


def _wipe_is_not_quarantined(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machines.BudgetMachine, "quarantine_all", lambda self, now: None)


def _broken_stream_is_taken_for_death(patch: pytest.MonkeyPatch) -> None:
    def closed(self: machines.BudgetMachine, holder: str, session: int, now: float) -> None:
        held = self.book.leases.get(holder)
        if held is not None and held.session == session:
            self._lose(held, now, now, None)

    patch.setattr(machines.BudgetMachine, "session_closed", closed)


def _every_report_is_the_whole_truth(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases.Lease, "is_whole_truth", lambda self, report, session: True)


def _fork_keeps_the_lease(patch: pytest.MonkeyPatch) -> None:
    """The child goes on with the memory of its parent, lease and all."""
    plain = world.World.fork

    def fork(self: world.World, life: actors_holder.HolderProcess) -> None:
        plain(self, life)
        child = self.holders.get(f"{life.name}-child")
        if child is not None and child.is_alive:
            child.core.limiter = copy.deepcopy(life.core.limiter)
            child.core.limiter.waiters.clear()

    patch.setattr(world.World, "fork", fork)


def _boottime_stands_still(patch: pytest.MonkeyPatch) -> None:
    """A holder that reads CLOCK_MONOTONIC does not notice that its machine slept."""
    patch.setattr(world.World, "woke_from_suspend", lambda self, life, seconds: life.clock.stand_still(seconds))


def _lowered_ttl_is_believed_at_once(patch: pytest.MonkeyPatch) -> None:
    def extend(self: machines.BudgetMachine, held: leases.Lease, now: float) -> None:
        held.expires_at = now + self.spec.ttl_seconds * leases.TTL_FACTOR
        held.ttl_seconds = self.spec.ttl_seconds

    patch.setattr(machines.BudgetMachine, "_extend", extend)


def _lowered_limit_does_not_bind(patch: pytest.MonkeyPatch) -> None:
    plain = books.Book.redefine

    def redefine(self: books.Book, spec: model.BudgetSpec, now: float) -> None:
        known = {d.name: d.limit for d in self.spec.dimensions}
        higher = tuple(
            dataclasses.replace(d, limit=max(d.limit, known.get(d.name, 0))) for d in spec.dimensions
        )
        plain(self, dataclasses.replace(spec, dimensions=higher), now)

    patch.setattr(books.Book, "redefine", redefine)


def _refund_into_the_wrong_bucket(patch: pytest.MonkeyPatch) -> None:
    plain = stock.RateStock.refund

    def refund(self: stock.RateStock, admitted_at: float, amount: int) -> None:
        plain(self, self._level_at, amount)

    patch.setattr(stock.RateStock, "refund", refund)


def _late_batches_are_taken(patch: pytest.MonkeyPatch) -> None:
    plain = store.Store.__init__

    def init(self: store.Store, *arguments: object, **named: object) -> None:
        plain(self, *arguments, **named)  # type: ignore[arg-type]
        self.compares_batch = False

    patch.setattr(store.Store, "__init__", init)
    patch.setattr(store.Store, "timeout_seconds", 0.02)


def _overcommitment_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(books.Book, "is_overcommitted", lambda self, index: False)


def _safe_capacity_is_not_kept_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases.Lease, "safe", property(lambda self: (), lambda self, value: None))


def _durations_are_those_of_the_present(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aftermath.Aftermath, "rules", lambda self, spec: leases.StrandRules.of(spec))


def _a_removed_dimension_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(books.Book, "_quarantine_again", lambda self, removed, now: None)


def _a_successor_forgets_removed_dimensions(patch: pytest.MonkeyPatch) -> None:
    plain = aftermath.Aftermath.begun_at
    patch.setattr(
        aftermath.Aftermath, "begun_at", lambda self, now: dataclasses.replace(plain(self, now), removed=())
    )


def _with_safe(scenario: Scenario) -> Scenario:
    safe = {d.name: d.limit // 4 // 1_000_000 * 1_000_000 for d in scenario.spec.dimensions}
    classes = (model.HolderClass(pattern="w0", safe_capacity=safe),)
    return dataclasses.replace(scenario, spec=dataclasses.replace(scenario.spec, holder_classes=classes))


RULES = [
    Rule("used units cool for a window", "calm", _units_do_not_cool, 3, _steady),
    Rule("the window is longer by the arrival jitter", "calm", _no_jitter, 12, _steady),
    Rule("growth waits for acknowledged shrinks", "calm", _growth_does_not_wait, 12, _steady),
    Rule("a shrink gives up cooling units as they cool", "calm", _cooling_returns_at_once, 12, _steady),
    Rule("a refund goes to the bucket it was charged in", "calm", _refund_into_the_wrong_bucket, 12, _steady),
    Rule("unknown spend of the dead is quarantined", "crashes", _no_quarantine, 12, _steady),
    Rule("what cools late is not spent anew unheard", "partitions", _all_that_cools_is_spent_anew, 25, _steady),
    Rule("calls outlive their holder", "crashes", _dead_calls_are_forgotten, 12, _steady),
    Rule("what an expired lease used is stranded", "crashes", _nothing_is_stranded, 12, _steady),
    Rule("a certified death strands what was used", "crashes", _certified_death_frees_all, 12, _steady),
    Rule("the TTL counts from the send", "streams", _ttl_from_receipt, 25, _slow),
    Rule("a push does not extend the expiry", "freezes", _push_extends_expiry),
    Rule("expiry is checked at every admission", "freezes", _expiry_is_not_checked),
    Rule("answers wait for the commit", "leaders", _commit_is_not_awaited),
    Rule("the epoch is compared", "leaders", _epoch_is_not_compared),
    Rule("a record is raised before the holder is told", "leaders", _records_are_not_raised_first),
    Rule(
        "tombstones survive a takeover",
        "leaders",
        _tombstones_are_dropped_at_takeover,
        25,
        _faults(crash=2.0, leader_crash=4.0),
    ),
    Rule(
        "a new leader starts every TTL again",
        "leaders",
        _takeover_does_not_restart_ttls,
        25,
        _faults(partition=0.7, leader_crash=2.5),
    ),
    Rule("an unknown past is quarantined", "wipes", _wipe_is_not_quarantined),
    Rule("a broken stream is not a death", "streams", _broken_stream_is_taken_for_death),
    Rule(
        "a report is the whole truth only if no grant can follow it",
        "streams",
        _every_report_is_the_whole_truth,
        40,
        _slow,
    ),
    Rule("a forked child is fenced", "forks", _fork_keeps_the_lease),
    Rule("a holder's clock goes on through a suspend", "clocks", _boottime_stands_still),
    Rule("a lowered TTL does not shorten an earlier answer", "admin", _lowered_ttl_is_believed_at_once, 40),
    Rule(
        "a lowered limit binds in time",
        "admin",
        _lowered_limit_does_not_bind,
        25,
        lambda s: _faults(limit_change=2.0)(_steady(s, users=20)),
    ),
    Rule(
        "calls go by the bound under which they began", "redefinitions", _durations_are_those_of_the_present, 40
    ),
    Rule(
        "use of a removed dimension counts if it comes back", "redefinitions", _a_removed_dimension_is_forgotten
    ),
    Rule(
        "a removed dimension is remembered by the next leader",
        "redefinitions",
        _a_successor_forgets_removed_dimensions,
        25,
    ),
    Rule(
        "a transaction that was overtaken is refused",
        "leaders",
        _late_batches_are_taken,
        40,
        lambda s: dataclasses.replace(s, lost_answer_probability=0.1),
    ),
    Rule(
        "no cap is raised while too much is outstanding",
        "clocks",
        _overcommitment_is_ignored,
        40,
        lambda s: _faults(suspend=0.7)(_steady(s)),
        first_seed=60,
    ),
    Rule(
        "safe capacity is kept back after expiry", "partitions", _safe_capacity_is_not_kept_back, 25, _with_safe
    ),
]


def _first_violation(rule: Rule) -> str | None:
    for seed in range(rule.first_seed, rule.first_seed + rule.seeds):
        scenario = rule.change(world_scenarios.SCENARIOS[rule.family](seed))
        try:
            world.run(scenario, seed)
        except AssertionError as error:
            return f"seed {seed}: {error}"
    return None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name.replace(" ", "-"))
def test_breaking_the_rule_is_noticed(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    rule.breaks(monkeypatch)
    seen = _first_violation(rule)
    assert seen is not None, f"nobody noticed that this rule was broken: {rule.name}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name.replace(" ", "-"))
def test_the_same_world_is_green_with_the_rule_in_force(rule: Rule) -> None:
    world.run(rule.change(world_scenarios.SCENARIOS[rule.family](0)), 0)
