"""A deterministic world around the real budget core: holders, allocators, etcd, a network, and faults.

One thread, one seed, virtual time. Everything that decides is the production core; the world plays the shells
by the driver's contract, the operating system, the network, etcd, the provider and the users. An auditor that
shares nothing with the core judges after every step.

`python -m leasehold.sim.world --scenario chaos --seed 7 [--steps 1234]` replays one run; a violation is printed
with the step at which it showed.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Mapping, Sequence

from leasehold.core import processes
from leasehold.core.budget import aftermath, allocator, effects, machine, messages, model, quantity
from leasehold.sim import (
    actors_allocator,
    actors_holder,
    actors_unary,
    budget_auditor,
    network,
    store,
    world_faults,
    world_scenarios,
    world_time,
)
from leasehold.sim.world_scenarios import Scenario

#: Clocks differ by at most this part of 1 in either direction, so two by less than TTL_FACTOR allows.
CLOCK_SKEW = 0.00045
#: The provider counts an arrival at the latest so long after the admission, as part of the budget's jitter; the
#: rest of the jitter is for clocks that differ in rate over a window.
ARRIVAL_PART = 0.9
#: Under these names the book counts units that may be anybody's.
_NOBODYS = (machine.UNKNOWN_PAST, aftermath.EARLIER_DEFINITION)


class World:
    """Everything of one run."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.rng = random.Random(seed)  # noqa: S311 - a simulation wants repeatable numbers
        self.scheduler = world_time.Scheduler()
        self.spec = scenario.spec
        self.version = 1
        self.network = network.Network(self.scheduler, self.rng, scenario.conditions)
        self.store = store.Store(self.network, elector_ttl_seconds=scenario.elector_ttl_seconds)
        self.store.observer = self._observe
        self.store.lost_answer_probability = scenario.lost_answer_probability
        self.accepted_generation = self.store.generation
        self.auditor = budget_auditor.BudgetAuditor(
            windows={d.name: d.window_seconds for d in self.spec.dimensions if d.is_rate},
            is_charged_at_completion=self.spec.charged_at is model.ChargedAt.COMPLETION,
        )
        self.arrival_seconds_max = self.spec.arrival_jitter_seconds * ARRIVAL_PART
        self.is_deleted = False
        self._ttl_before = self.spec.ttl_seconds
        self._orphan_seconds_in_force = self.spec.orphan_call_seconds
        self._definition_settles_at = 0.0
        for dimension in self.spec.dimensions:
            self.auditor.set_limit(0.0, dimension.name, dimension.limit, grace_seconds=0.0)
        self.replicas: dict[str, actors_allocator.Replica] = {}
        self.holders: dict[str, actors_holder.HolderProcess] = {}
        #: Every process life that ever was, by incarnation.
        self.lives: dict[str, actors_holder.HolderProcess] = {}
        #: Those of them that have, or may still get, something.
        self._spending: dict[str, actors_holder.HolderProcess] = {}
        self.unaries: list[actors_unary.UnaryHolder] = []
        self.leader_changes = 0
        self.checks = 0
        self._streams: dict[int, tuple[network.Stream, actors_holder.HolderProcess, str]] = {}
        self._numbers = 0
        self._tokens: dict[int, actors_unary.UnaryHolder] = {}
        self._hint = ""
        self._started = 0
        for _ in range(scenario.replicas):
            self.start_replica(self.replica_name())
        for number in range(scenario.holders):
            delay = self.rng.uniform(0.0, scenario.start_spread_seconds)
            self.scheduler.after(delay, functools.partial(self._start, f"w{number}"))
        for number in range(scenario.unary_holders):
            self.unaries.append(actors_unary.UnaryHolder(self, f"script-{number}"))
        self.faults = world_faults.Faults(self)
        self.faults.begin()

    def run(self, *, until: float | None = None, steps_max: int | None = None) -> World:
        """Let time pass up to `until` (default: the scenario's end)."""
        end = self.scenario.seconds if until is None else until
        self.scheduler.run(end, steps_max=steps_max)
        self.auditor.advance(self.scheduler.now)
        return self

    def number(self) -> int:
        """A number that no other thing has."""
        self._numbers += 1
        return self._numbers

    # Processes

    def clock(self) -> world_time.Clock:
        """A clock of some machine."""
        return world_time.Clock(
            offset=self.rng.uniform(10.0, 1e5), rate=1.0 + self.rng.uniform(-CLOCK_SKEW, CLOCK_SKEW)
        )

    def replica_name(self) -> str:
        """A name, and so a place, that no allocator process has had."""
        return f"allocator-{self.number()}"

    def start_replica(self, name: str) -> None:
        """An allocator process starts."""
        self.replicas[name] = actors_allocator.Replica(self, name, self.clock())

    def _start(self, name: str) -> None:
        self.start_holder(name)

    def start_holder(
        self, name: str, *, place: str | None = None, clock: world_time.Clock | None = None
    ) -> actors_holder.HolderProcess:
        """A new life of a holder begins."""
        self._started += 1
        incarnation = f"{name}.{self._started:06d}"
        # Every second holder runs where its death can be certified.
        host = place or (f"host-{name}" if self._started % 2 else "near")
        process = processes.ProcessKey(host, 1, self._started, self._started)
        holder = actors_holder.HolderProcess(
            self,
            name=name,
            incarnation=incarnation,
            place=f"{host}/{name}",
            clock=clock or self.clock(),
            process=process,
            load=self.scenario.load_of(name),
        )
        self.holders[name] = holder
        self.lives[incarnation] = self._spending[incarnation] = holder
        return holder

    def is_visible(self, process: processes.ProcessKey, _replica: actors_allocator.Replica) -> bool:
        """Whether an allocator can open a pidfd of it."""
        return self.scenario.certifies and (process.boot_id == "near" or self.scenario.certifies_all)

    def is_running(self, process: processes.ProcessKey) -> bool:
        """Whether that process lives."""
        return any(life.process == process and life.is_alive for life in self.lives.values())

    def age_of(self, report: messages.Report, _replica: actors_allocator.Replica) -> float | None:
        """Seconds since a report was made, where holder and allocator read the same CLOCK_BOOTTIME."""
        life = self.lives.get(report.incarnation)
        if life is None or life.process is None or not self.is_visible(life.process, _replica):
            return None
        return max(0.0, life.now - report.boottime_nanos / 1e9)

    def crash_holder(self, name: str, *, restart_after: float | None) -> None:
        """SIGKILL a holder; its death is certified where an allocator sees the process."""
        life = self.holders[name]
        if not life.is_alive:
            return
        life.crash(min(self.spec.orphan_call_seconds, self._orphan_seconds_in_force))
        process = life.process
        if process is not None:
            for replica in list(self.replicas.values()):
                self.scheduler.after(
                    self.rng.uniform(0.0005, 0.01),
                    lambda replica=replica: replica.process_exited(process),  # type: ignore[misc]
                )
        if restart_after is not None:
            self.scheduler.after(restart_after, lambda: self._restart(name, life))

    def _restart(self, name: str, life: actors_holder.HolderProcess) -> None:
        if self.holders.get(name) is life:
            self.start_holder(name)

    def holder_ended(self, life: actors_holder.HolderProcess) -> None:
        """A life heard the last word on its lease; where the budget was deleted, its program starts anew."""
        if self.holders.get(life.name) is life and life.core.end is messages.LeaseEnd.BUDGET_DELETED:
            self.scheduler.after(self.rng.uniform(0.0, 0.2), lambda: self._restart(life.name, life))

    def fork(self, life: actors_holder.HolderProcess) -> None:
        """A child with the parent's memory: the shell's at-fork rule throws the lease away and joins anew."""
        name = life.name if self.rng.random() < 0.5 else f"{life.name}-child"
        if name in self.holders and name != life.name and self.holders[name].is_alive:
            return
        child = self.start_holder(name, place=life.place.split("/")[0], clock=life.clock)
        if name != life.name:
            self.scheduler.after(self.rng.uniform(0.5, 4.0), lambda: self._child_ends(child))

    def _child_ends(self, child: actors_holder.HolderProcess) -> None:
        if self.holders.get(child.name) is child:
            self.crash_holder(child.name, restart_after=None)
            del self.holders[child.name]

    def woke_from_suspend(self, life: actors_holder.HolderProcess, seconds: float) -> None:
        """A machine slept: CLOCK_BOOTTIME, which holders read, has gone on."""

    def wipe_etcd(self) -> None:
        """etcd is lost, and with it the reign; an operator accepts the new cluster as a new generation.

        The quarantine goes by the present definition. One that was changed just before the loss had promised
        something else, which nobody knows any more: that is not covered, and not simulated.
        """
        if self.scheduler.now >= self._definition_settles_at:
            self.store.wipe()

    # Streams

    def open_stream(self, holder: actors_holder.HolderProcess) -> network.Stream | None:
        """Connect to a replica: the leader that was heard of last, or any."""
        names = sorted(self.replicas)
        place = self._hint if self._hint in self.replicas else ""
        if not place or self.rng.random() < 0.3:
            place = self.rng.choice(names)
        replica = self.replicas[place]
        if self.network.is_cut(holder.place, place) or not replica.is_alive:
            return None
        if replica.is_frozen and self.rng.random() < 0.5:
            return None
        number = self.number()
        stream = network.Stream(
            self.network,
            number,
            holder.place,
            place,
            up=lambda message: replica.received(stream, message),
            down=lambda message: holder.heard(stream, message),
        )
        if not replica.opened(stream):
            return None
        self._streams[number] = (stream, holder, place)
        return stream

    def break_stream(
        self, stream: network.Stream, *, is_heard: bool = False, holder_hears_after: float | None = None
    ) -> None:
        """A stream breaks. Either end may hear of it late; some of what is under way may still arrive."""
        entry = self._streams.pop(stream.number, None)
        if entry is None:
            return
        _, holder, place = entry
        last_at = stream.break_off(may_linger=not is_heard)
        rng = self.rng
        heard_at = last_at + rng.uniform(0.0005, 0.02)
        replica = self.replicas[place]
        self.scheduler.at(heard_at, lambda: replica.closed(stream))
        after = rng.uniform(0.0005, 0.02) if holder_hears_after is None else holder_hears_after
        self.scheduler.after(after, lambda: holder.lost(stream))

    def live_streams(self) -> Sequence[tuple[network.Stream, actors_holder.HolderProcess, str]]:
        """Streams that nobody has broken."""
        return list(self._streams.values())

    # Unary calls

    def ask(self, unary: actors_unary.UnaryHolder, place: str) -> int:
        """The token of a unary call."""
        token = self.number()
        self._tokens[token] = unary
        del place
        return token

    def reply(self, replica: actors_allocator.Replica, reply: effects.Reply) -> None:
        """An answer to a unary call goes out."""
        unary = self._tokens.pop(reply.token, None)
        if unary is not None:
            self.network.call(replica.place, unary.place, lambda: unary.answered(reply.token, reply.message))

    def leader_place(self) -> str:
        """Where a leader was heard of last."""
        return self._hint if self._hint in self.replicas else sorted(self.replicas)[0]

    # Leaders and definitions

    def leader_changed(self, replica: actors_allocator.Replica) -> None:
        """A replica begins its reign."""
        self._hint = replica.place
        self.leader_changes += 1

    def defined_for(self, core: allocator.Allocator, now: float, *, is_wiped: bool) -> None:
        """What Postgres knows of the budget, told to a leader that has read etcd."""
        if self.is_deleted:
            if self.spec.name in core.names():
                core.delete(self.spec.name, now)
            return
        core.define(self.spec, self.version, now)
        if is_wiped:
            core.budgets[self.spec.name].quarantine_all(now)

    def redefine(self, spec: model.BudgetSpec) -> None:
        """An administrator changes the budget: Postgres first, then the leader."""
        # Between the loss of etcd and its acceptance nobody can tell what the old definition had granted.
        if self.is_deleted or self.accepted_generation < self.store.generation:
            return
        longest = max(self._grace(definition, d) for definition in (self.spec, spec) for d in spec.dimensions)
        self._definition_settles_at = self.scheduler.now + longest
        self.spec, self.version = spec, self.version + 1
        for dimension in spec.dimensions:
            # A raise is in force at once, for a leader that takes over too; a cut counts from when etcd has it.
            if dimension.limit > self.auditor.allowed(float("inf"), dimension.name):
                self.auditor.set_limit(self.scheduler.now, dimension.name, dimension.limit, grace_seconds=0.0)
        version = self.version
        for replica in self.replicas.values():
            replica.administer(lambda core, now: core.define(spec, version, now))

    def delete_and_create(self) -> None:
        """An administrator deletes the budget and creates it again at once."""
        self.version += 1
        spec, version = self.spec, self.version

        def change(core: allocator.Allocator, now: float) -> None:
            core.delete(spec.name, now)
            core.define(spec, version, now)

        for replica in self.replicas.values():
            replica.administer(change)

    def _grace(self, spec: model.BudgetSpec, dimension: model.Dimension) -> float:
        """How long after a limit is lowered the old one may still be used."""
        lasting = (
            dimension.window_seconds + spec.arrival_jitter_seconds
            if dimension.is_rate
            else spec.max_call_seconds
        )
        ttl = max(spec.ttl_seconds, self._ttl_before)
        return ttl * 1.001 + lasting + 0.1

    def _observe(self, write: store.Write) -> None:
        if isinstance(write, store.Put) and isinstance(write.value, effects.Record):
            if write.value.holder == machine.UNKNOWN_PAST:
                # Only now may the next leader take this cluster for one whose records tell all.
                self.accepted_generation = self.store.generation
            return
        if isinstance(write, store.Put) and isinstance(write.value, actors_allocator.StoredDefinition):
            spec = write.value.spec
            for dimension in spec.dimensions:
                if dimension.is_rate:
                    self.auditor.add_window(dimension.name, dimension.window_seconds)
                grace_seconds = self._grace(spec, dimension)
                self.auditor.set_limit(
                    self.scheduler.now, dimension.name, dimension.limit, grace_seconds=grace_seconds
                )
            self._ttl_before = spec.ttl_seconds
            self._orphan_seconds_in_force = spec.orphan_call_seconds

    # Judgement

    def leader(self) -> actors_allocator.Replica | None:
        """The replica whose writes etcd takes."""
        for replica in self.replicas.values():
            if replica.is_alive and replica.is_legitimate:
                return replica
        return None

    def physical(self) -> dict[str, dict[str, int]]:
        """What every life, and every script, physically has."""
        physical = {}
        for incarnation, life in list(self._spending.items()):
            physical[incarnation] = amounts = life.physical()
            if life.is_over and not any(amounts.values()):
                del self._spending[incarnation]
        for unary in self.unaries:
            physical.update(unary.physical())
        return physical

    def check(self, replica: actors_allocator.Replica) -> None:
        """Judge the book of a replica, if it is the leader's, against what is true."""
        core = replica.core
        if core is None:
            return
        core.audit()
        if not replica.is_legitimate:
            return
        budget = core.budgets.get(self.spec.name)
        if budget is None:
            return
        self.checks += 1
        now = self.scheduler.now
        self.auditor.advance(now)
        physical = _within(budget.book.names, self.physical())
        self.auditor.check_bounds(now, "the leader's book", physical, self._believed(budget))
        self.auditor.check_stock(
            now,
            physical,
            dict(zip(budget.book.names, budget.book.pool(), strict=True)),
            dict(zip(budget.book.names, budget.book.in_force, strict=True)),
        )

    @staticmethod
    def _believed(budget: machine.BudgetMachine) -> dict[str, dict[str, int]]:
        book = budget.book
        believed: dict[str, dict[str, int]] = {}

        def add(incarnation: str, amounts: Mapping[str, int]) -> None:
            known = believed.setdefault(incarnation, {})
            for name, amount in amounts.items():
                known[name] = known.get(name, 0) + amount

        for held in book.all_leases():
            add(held.incarnation, dict(zip(book.names, held.bound, strict=True)))
        for parts in book.stranded.values():
            for part in parts:
                whose = budget_auditor.ANYBODY if part.holder in _NOBODYS else part.incarnation
                add(whose, {book.names[part.index]: part.amount})
        return believed

    def check_etcd(self) -> None:
        """Judge etcd's records: each is an upper bound of what its incarnation has."""
        believed: dict[str, dict[str, int]] = {}
        names: Sequence[str] = ()
        for value in self.store.values.values():
            if isinstance(value, effects.Record):
                whose = budget_auditor.ANYBODY if value.holder in _NOBODYS else value.incarnation
                known = believed.setdefault(whose, {})
                for name, amount in value.amounts.items():
                    known[name] = known.get(name, 0) + amount
            elif isinstance(value, actors_allocator.StoredDefinition):
                names = [dimension.name for dimension in value.spec.dimensions]
        if self.accepted_generation < self.store.generation:
            return
        now = self.scheduler.now
        self.auditor.advance(now)
        self.auditor.check_bounds(now, "etcd", _within(names, self.physical()), believed)

    def shares(self) -> dict[str, dict[str, float]]:
        """What each living holder owns, units."""
        return {
            name: {n: quantity.to_units(a) for n, a in life.limiter.amounts().items()}
            for name, life in sorted(self.holders.items())
            if life.is_alive
        }


def _within(names: Sequence[str], physical: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Amounts of these dimensions: of one that was taken out nobody keeps book."""
    return {
        whose: {name: amount for name, amount in amounts.items() if name in names}
        for whose, amounts in physical.items()
    }


def run(scenario: Scenario, seed: int, *, steps_max: int | None = None) -> World:
    """One run; raises `budget_auditor.Violation` or `AssertionError`, told with the command that replays it."""
    world = World(scenario, seed)
    try:
        return world.run(steps_max=steps_max)
    except AssertionError as error:
        command = f"python -m leasehold.sim.world --scenario {scenario.name} --seed {seed}"
        error.add_note(f"{command} --steps {world.scheduler.steps}")
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay one run, or search for a seed that fails."""
    parser = argparse.ArgumentParser(prog="python -m leasehold.sim.world", description=main.__doc__)
    parser.add_argument("--scenario", default="chaos", choices=sorted(world_scenarios.SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="run so many, beginning with --seed")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps")
    chosen = parser.parse_args(arguments)
    out = sys.stdout.write
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        scenario = world_scenarios.SCENARIOS[chosen.scenario](seed)
        try:
            world = run(scenario, seed, steps_max=chosen.steps)
        except AssertionError as error:
            out(f"seed {seed}: {error}\n")
            out("".join(f"  {note}\n" for note in getattr(error, "__notes__", ())))
            return 1
        out(
            f"seed {seed}: {world.scheduler.steps} steps, {world.auditor.admissions} admissions, "
            f"{world.leader_changes} reigns, {world.checks} checks\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
