"""Callers, agents, holders, leaders and Postgres in any order, judged by a ledger and by what really ran."""

import inspect
import itertools
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import job_world
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from leasehold.core import errors
from leasehold.core.job import changes, effects, invariants, machine, model
from leasehold.core.job.model import AttemptRef, EndCause, JobState
from leasehold.core.placement import model as placement

NAMES = ("a", "b", "c")
NODES = st.sampled_from(NAMES)
TTL_SECONDS = 30.0
GRACE_SECONDS = 90.0
PICKS = st.integers(0, 1_000)
CAUSES = [EndCause.SUCCEEDED, EndCause.FAILED, EndCause.OOM_KILLED, EndCause.NODE_LOST]
ENDS = st.sampled_from(CAUSES)


Value = TypeVar("Value")


def _picked(values: Sequence[Value], pick: int) -> Value:
    return values[pick % len(values)]


class Jobs(RuleBasedStateMachine):
    """Rules are what the world may do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.counter = itertools.count(1)
        self.ledger = job_world.Ledger()
        self.executions = job_world.Executions()
        self.agents = {name: job_world.Agent(name, self.executions) for name in NAMES}
        self.flight: changes.Batch | None = None
        self.is_lost = False
        #: What was asked under a ticket of the present leader, and what was answered to a key, whoever led.
        self.asked: dict[int, tuple[changes.RequestKey, bytes] | None] = {}
        self.hung_up: set[int] = set()
        self.told: dict[changes.RequestKey, tuple[bytes, Any]] = {}
        #: Until when each holder works, as it counts.
        self.holders: dict[AttemptRef, float] = {}
        self.leader = self._new_leader()

    def _new_leader(self) -> machine.JobMachine:
        leader = machine.JobMachine(new_id=self._new_id, fence_grace_seconds=GRACE_SECONDS)
        leader.restore(self.now, self.now, self.ledger.snapshot())
        return leader

    def _new_id(self) -> str:
        return f"00000000-0000-0000-0000-{next(self.counter):012d}"

    # Effects

    def settle(self) -> None:
        while caused := self.leader.take_effects():
            for effect in caused:
                self._execute(effect)
        invariants.check(self.leader)

    def _execute(self, effect: effects.Effect) -> None:
        if isinstance(effect, effects.Answer):
            self._answered(effect)
        elif isinstance(effect, effects.Assign | effects.Stop | effects.Forget):
            agent = self.agents[effect.node]
            if isinstance(effect, effects.Assign):
                row = self.ledger.live.get(effect.ref.job_id)
                assert row is not None, "dispatched before its commit"
                assert row.ref == effect.ref, "dispatched before its commit"
            if isinstance(effect, effects.Forget):
                assert effect.ref in self.ledger.ended, "forgotten before its commit"
            if agent.is_connected:
                agent.inbox.append(effect)
        elif isinstance(effect, effects.SaveBreaker):
            self.ledger.is_breaker_open = effect.is_open
            self.leader.breaker_saved(self.now, effect)
        assert not isinstance(effect, effects.Reload), effect

    def _answered(self, effect: effects.Answer) -> None:
        if effect.ticket in self.hung_up:
            return
        assert effect.ticket in self.asked, "a ticket is answered once"
        asked = self.asked.pop(effect.ticket)
        value = effect.value
        if isinstance(value, effects.Acquired):
            ref = value.allocation.ref
            assert self.ledger.live[ref.job_id].ref == ref
            self.holders[ref] = self.now + TTL_SECONDS
            value = ref.job_id
        elif isinstance(value, tuple):
            for verdict in value:
                assert verdict.error is not None or verdict.job_id in self.ledger.jobs, (
                    "answered before its commit"
                )
                assert verdict.error is None or verdict.error.field != "spec", "Postgres has refused nothing"
            value = tuple((verdict.job_id, verdict.error and verdict.error.reason) for verdict in value)
        if asked is not None and effect.error is None:
            key, payload = asked
            told = self.told.setdefault(key, (payload, value))
            assert told == (payload, value), "a repeat was told another answer, or another request the same one"

    # Callers

    @rule(
        cpus=st.integers(1, 5),
        count=st.integers(1, 3),
        request=st.sampled_from(["", "", "r1", "r2"]),
        attempts=st.integers(1, 2),
        on_lost=st.sampled_from(model.OnLost),
        queue=st.sampled_from(["default", "narrow"]),
        is_all_or_none=st.booleans(),
    )
    def submit(
        self,
        cpus: int,
        count: int,
        request: str,
        attempts: int,
        on_lost: model.OnLost,
        queue: str,
        is_all_or_none: bool,
    ) -> None:
        spec = model.JobSpec(
            required=placement.Resources(cpus, 10),
            template=job_world.TEMPLATE,
            max_run_seconds=20.0,
            queue=queue,
            retry=model.RetryPolicy(max_attempts=attempts),
            on_lost=on_lost,
        )
        key = changes.RequestKey("someone", request) if request else None
        try:
            ticket = self.leader.submit(
                self.now,
                self.now,
                [spec] * count,
                principal="someone",
                key=key,
                payload_sha256=bytes([count]) * 32,
                is_all_or_none=is_all_or_none,
            )
        except errors.RequestIdReused:
            assert key is not None
            return
        self.asked[ticket] = None if key is None else (key, bytes([count]))
        self.settle()

    @rule(
        cpus=st.integers(1, 2),
        request=st.sampled_from(["h1", "h2", "h3"]),
        wait=st.sampled_from([0.0, 5.0, 60.0]),
    )
    def acquire(self, cpus: int, request: str, wait: float) -> None:
        key = changes.RequestKey("holder", request)
        try:
            ticket = self.leader.acquire(
                self.now,
                self.now,
                model.JobSpec(required=placement.Resources(cpus, 10)),
                principal="holder",
                key=key,
                payload_sha256=bytes([cpus]) * 32,
                wait_seconds=wait,
            )
        except errors.RequestIdReused:
            return
        self.asked[ticket] = (key, bytes([cpus]))
        self.settle()

    @rule(pick=PICKS)
    def a_caller_hangs_up(self, pick: int) -> None:
        if self.asked:
            ticket = _picked(sorted(self.asked), pick)
            self.leader.give_up(self.now, ticket)
            del self.asked[ticket]
            self.hung_up.add(ticket)
            self.settle()

    @rule(pick=PICKS)
    def cancel(self, pick: int) -> None:
        if self.ledger.jobs:
            job_id = _picked(sorted(self.ledger.jobs), pick)
            self.asked[self.leader.cancel(self.now, job_id, "someone")] = None
            self.settle()

    @rule(pick=PICKS)
    def renew(self, pick: int) -> None:
        if not self.holders:
            return
        ref = _picked(sorted(self.holders), pick)
        try:
            self.leader.renew(self.now, ref)
        except errors.AllocationLapsed:
            # Its work stops now; it must have stopped before, if its TTL is over.
            del self.holders[ref]
        else:
            assert self.ledger.live[ref.job_id].ref == ref
            self.holders[ref] = self.now + TTL_SECONDS
        self.settle()

    @rule(pick=PICKS, is_failed=st.booleans())
    def release(self, pick: int, is_failed: bool) -> None:
        if self.holders:
            ref = _picked(sorted(self.holders), pick)
            del self.holders[ref]
            self.asked[self.leader.release(self.now, ref, is_failed=is_failed, detail="")] = None
            self.settle()

    @rule()
    def an_operator_acknowledges_silence(self) -> None:
        try:
            ticket = self.leader.acknowledge_silence(self.now, cause="looked at it", actor="someone")
        except errors.FailedPrecondition:
            return
        self.asked[ticket] = None
        self.settle()

    @rule(quota=st.sampled_from([None, 1, 3]))
    def put_queue(self, quota: int | None) -> None:
        queue = placement.Queue(name="narrow", nominal_cpus=quota)
        self.asked[self.leader.put_queue(self.now, queue, "someone")] = None
        self.settle()

    @rule()
    def delete_queue(self) -> None:
        try:
            self.asked[self.leader.delete_queue(self.now, "narrow", "someone")] = None
        except (errors.NotFound, errors.FailedPrecondition):
            return
        self.settle()

    @rule()
    def an_operator_forces_what_is_surely_over(self) -> None:
        for job_id, row in list(self.ledger.live.items()):
            agent = self.agents[row.node]
            if job_id in {ref.job_id for ref in self.holders} or row.ref in agent.known or agent.inbox:
                continue
            if row.ref in self.executions.running:
                continue
            if self.leader.phase(row.ref) is model.AttemptPhase.UNKNOWN:
                ticket = self.leader.force_release(self.now, row.ref, cause="looked at it", actor="someone")
                self.asked[ticket] = None
                self.settle()
                return

    # Postgres

    @rule(fate=st.sampled_from(["done", "done", "done", "cut before", "cut after"]))
    def flush(self, fate: str) -> None:
        if self.flight is not None:
            return
        batch = self.leader.take_batch(self.now, self.now)
        self.settle()
        if batch is None:
            return
        assert self.leader.take_batch(self.now, self.now) is None, "one in flight"
        self.flight = batch
        self.fate = fate

    @rule()
    def the_answer_comes(self) -> None:
        if self.flight is None:
            return
        batch, self.flight = self.flight, None
        if self.fate == "done":
            result = self.ledger.commit(batch, self.now)
            self._released(batch)
            self.leader.batch_done(self.now, self.now, result)
            self.settle()
            return
        self._cut(batch)
        self.leader.batch_lost(self.now)
        self.settle()
        self.is_lost = True

    def _cut(self, batch: changes.Batch) -> None:
        if self.fate == "cut after":
            self.ledger.commit(batch, self.now)
            self._released(batch)

    @rule()
    def postgres_is_read_anew(self) -> None:
        if self.is_lost:
            self.is_lost = False
            loaded = self.leader.prepare(self.now, self.now, self.ledger.snapshot())
            self.leader.reloaded(self.now, loaded, self.fate == "cut after")
            self.settle()

    @rule()
    def flush_at_once(self) -> None:
        self.the_answer_comes()
        self.postgres_is_read_anew()
        for _ in range(50):
            self.flush("done")
            if self.flight is None:
                return
            self.the_answer_comes()
        raise AssertionError("batches without end")

    def _released(self, batch: changes.Batch) -> None:
        """What is free again must not run any more, here or anywhere."""
        for end in batch.ends:
            assert end.ref not in self.executions.running, f"{end} was released, and runs"
            until = self.holders.pop(end.ref, None)
            if until is not None and end.outcome.cause is EndCause.LAPSED:
                assert self.now >= until + 29.0, "its holder may still be stopping"

    @rule()
    def another_leader(self) -> None:
        if self.flight is not None:
            self._cut(self.flight)
        self.flight, self.is_lost = None, False
        self.asked.clear()
        self.hung_up.clear()
        for agent in self.agents.values():
            agent.disconnect()
        self.leader = self._new_leader()
        self.settle()

    # Hosts

    @rule(name=NODES)
    def connect(self, name: str) -> None:
        agent = self.agents[name]
        agent.disconnect()
        agent.is_connected = True
        self.leader.node_seen(self.now, agent.facts())
        self.settle()
        self.leader.inventory(self.now, name, agent.inventory())
        self.settle()

    @rule(name=NODES)
    def disconnect(self, name: str) -> None:
        agent = self.agents[name]
        if agent.is_connected:
            agent.disconnect()
            self.leader.node_seen(self.now, agent.facts())
            self.settle()

    @rule(name=NODES)
    def reboot(self, name: str) -> None:
        self.disconnect(name)
        self.agents[name].reboot()

    @rule(name=NODES)
    def the_state_folder_is_lost(self, name: str) -> None:
        """What was started runs on, and the next agent knows nothing of it."""
        self.disconnect(name)
        agent = self.agents[name]
        agent.folder += 1
        agent.known.clear()

    @rule(name=NODES, cpus=st.integers(0, 6), is_draining=st.booleans())
    def declare(self, name: str, cpus: int, is_draining: bool) -> None:
        agent = self.agents[name]
        agent.cpus, agent.is_draining = cpus, is_draining
        if agent.is_connected:
            self.leader.node_seen(self.now, agent.facts())
            self.settle()

    @rule(name=NODES)
    def the_agent_hears(self, name: str) -> None:
        agent = self.agents[name]
        if agent.inbox:
            agent.take(agent.inbox.pop(0))

    @rule(name=NODES)
    def the_leader_hears(self, name: str) -> None:
        agent = self.agents[name]
        if agent.outbox:
            self.leader.attempt_reported(self.now, name, agent.outbox.pop(0))
            self.settle()

    @rule(name=NODES, pick=PICKS)
    def the_agent_tells_again(self, name: str, pick: int) -> None:
        """What it has told already; it may arrive late."""
        agent = self.agents[name]
        if agent.is_connected and agent.known:
            agent.outbox.append(agent.report(_picked(sorted(agent.known), pick)))

    @rule(name=NODES)
    def start(self, name: str) -> None:
        agent = self.agents[name]
        for ref in agent.waiting_to_start():
            agent.start(ref, self.now)

    @rule(name=NODES, cause=ENDS, pick=PICKS)
    def end(self, name: str, cause: EndCause, pick: int) -> None:
        agent = self.agents[name]
        running = agent.running()
        if running:
            agent.end(_picked(sorted(running), pick), cause)

    @rule(name=NODES)
    def stop(self, name: str) -> None:
        agent = self.agents[name]
        for ref in agent.running():
            if ref in agent.asked_to_stop:
                agent.end(ref, EndCause.CANCELLED)

    @rule(name=NODES, cause=ENDS)
    def all_goes_well(self, name: str, cause: EndCause) -> None:
        """What is asked for is committed, told, begun; and something ends."""
        self.flush_at_once()
        if not self.agents[name].is_connected:
            self.connect(name)
        self.flush_at_once()
        self._hosts_go_on()
        self.end(name, cause, 0)

    def _hosts_go_on(self) -> None:
        for name, agent in self.agents.items():
            while agent.inbox or agent.outbox:
                self.the_agent_hears(name)
                self.the_leader_hears(name)
            self.start(name)
            while agent.outbox:
                self.the_leader_hears(name)

    # Time

    @rule(seconds=st.sampled_from([0.5, 5.0, 29.0, 70.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(1000):
            due = max(self.now, self.leader.next_deadline())
            if due > end or due == self.now:
                break
            self._until(due)
        self._until(end)

    def _until(self, at: float) -> None:
        self.now = at
        # Shims keep to their max_run, whether anybody hears of them or not.
        for agent in self.agents.values():
            for ref in agent.running():
                if self.executions.running[ref][1] + 20.0 + GRACE_SECONDS <= at:
                    agent.end(ref, EndCause.TIMED_OUT)
        self.leader.tick(at, at)
        self.settle()

    # Judgement

    @invariant()
    def holders_that_obey_have_what_they_hold(self) -> None:
        for ref, until in self.holders.items():
            if self.now < until:
                row = self.ledger.live.get(ref.job_id)
                assert row is not None, f"{ref} was given up within its TTL"

    @invariant()
    def the_leader_knows_what_is_committed(self) -> None:
        if self.flight is None and not self.is_lost:
            live = {
                job_id: job
                for job_id, job in self.ledger.jobs.items()
                if job.state not in model.TERMINAL_STATES
            }
            known = {job_id: self.leader.job(job_id) for job_id in live}
            assert known == live
            assert self.leader.pending_count + self.leader.running_count == len(live)

    def teardown(self) -> None:
        """Once all is well again, everything comes to its end and nothing is left."""
        for ref in list(self.holders):
            del self.holders[ref]
        for name, agent in self.agents.items():
            agent.cpus, agent.is_draining = 6, False
            if agent.folder > 1:
                # Nothing less proves that what the lost folder knew is over.
                self.reboot(name)
            self.connect(name)
        for _ in range(60):
            self.flush_at_once()
            self._hosts_go_on()
            for agent in self.agents.values():
                for ref in agent.running():
                    agent.end(ref, EndCause.SUCCEEDED)
            self.time_passes(29.0)
            self.holders.clear()
            self.an_operator_acknowledges_silence()
            if not self.ledger.live and all(
                job.state in model.TERMINAL_STATES or job.spec.queue == "narrow"
                for job in self.ledger.jobs.values()
            ):
                break
        assert not self.ledger.live, f"leaked: {self.ledger.live}"
        for job in self.ledger.jobs.values():
            quota = self.ledger.queues[job.spec.queue].nominal_cpus if job.state is JobState.PENDING else None
            is_held_back = quota is not None and quota < 6
            assert job.state in model.TERMINAL_STATES or is_held_back, f"never came to its end: {job}"
        assert not self.executions.running
        assert not self.asked, "somebody was never answered"


def _arguments(chance: random.Random) -> dict[str, Any]:
    return {
        "name": chance.choice(NAMES),
        "pick": chance.randrange(1_000),
        "cause": chance.choice(CAUSES),
        "cpus": chance.randint(1, 4),
        "count": chance.randint(1, 3),
        "request": chance.choice(["", "", f"r{chance.randint(1, 9)}"]),
        "attempts": chance.randint(1, 3),
        "on_lost": chance.choice(list(model.OnLost)),
        "queue": chance.choice(["default", "default", "narrow"]),
        "is_all_or_none": chance.random() < 0.5,
        "wait": chance.choice([0.0, 5.0, 60.0]),
        "is_failed": chance.random() < 0.5,
        "quota": chance.choice([None, 1, 3]),
        "fate": chance.choice(["done", "done", "done", "cut before", "cut after"]),
        "is_draining": chance.random() < 0.2,
        "seconds": chance.choice([0.5, 0.5, 5.0, 29.0, 70.0, 200.0]),
    }


STEPS = 300
WEIGHTS = {
    "submit": 12, "acquire": 8, "a_caller_hangs_up": 2, "cancel": 3, "renew": 10, "release": 3, "put_queue": 1,
    "an_operator_acknowledges_silence": 1,
    "delete_queue": 1, "an_operator_forces_what_is_surely_over": 1, "flush": 15, "the_answer_comes": 15,
    "postgres_is_read_anew": 5, "flush_at_once": 6, "another_leader": 1, "connect": 4, "disconnect": 3,
    "reboot": 1, "the_state_folder_is_lost": 1, "declare": 2, "the_agent_hears": 15, "the_leader_hears": 15,
    "the_agent_tells_again": 2,
    "start": 10, "end": 6, "stop": 5, "all_goes_well": 2, "time_passes": 6,
}  # fmt: skip


def walk(seed: int, **weights: int) -> None:
    """A long way in a world, the same for each seed; raises `AssertionError` at what must not be.

    `weights` makes rules more or less frequent than `WEIGHTS` does.
    """
    chance = random.Random(seed)
    world = Jobs()
    chosen = {**WEIGHTS, **weights}
    for _ in range(STEPS):
        made = _arguments(chance)
        step = getattr(world, chance.choices(list(chosen), list(chosen.values()))[0])
        step(**{name: made[name] for name in inspect.signature(step).parameters})
        world.holders_that_obey_have_what_they_hold()
        world.the_leader_knows_what_is_committed()
    world.teardown()
