"""Agents, streams and leaders in any order, judged by an auditor with books of its own.

The auditor believes none of the registry's: it knows when it let an agent speak, what was written to Postgres,
what each stream was told. A leader may change at any instant, and what the next one knows is Postgres.
"""

import itertools
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from leasehold.core import errors, processes
from leasehold.core.node import registry, registry_effects, registry_invariants
from leasehold.core.node import registry_model as model
from leasehold.core.node.registry_model import NodeState

TTL_SECONDS = 4.0
NAMES = st.sampled_from(["a", "b", "c", "d"])
ALIVE = (NodeState.READY, NodeState.DRAINING)


class Registries(RuleBasedStateMachine):
    """Rules are what agents, networks and leaders may do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.counter = itertools.count(1)
        self.leader = registry.NodeRegistry()
        self.is_loaded = True
        # The auditor's books.
        self.postgres: dict[str, model.NodeRecord] = {}
        #: From when on each node has a whole TTL of the present leader.
        self.heard_at: dict[str, float] = {}
        self.streams: dict[int, tuple[str, str, int]] = {}
        self.ended: set[int] = set()
        self.asked: dict[int, set[processes.ProcessKey]] = {}
        self.watched: set[processes.ProcessKey] = set()
        self.waiting: dict[str, model.NodeRecord] = {}

    # Effects

    def settle(self) -> list[registry_effects.Effect]:
        taken = self.leader.take_effects()
        for effect in taken:
            if isinstance(effect, registry_effects.PutNode):
                self._written(effect.record)
            elif isinstance(effect, registry_effects.EndSession):
                assert effect.session in self.streams, "a stream is ended once"
                self.ended.add(effect.session)
                del self.streams[effect.session]
            elif isinstance(effect, registry_effects.AskWatch):
                assert effect.session in self.streams, "nobody is there to be asked"
                self.asked[effect.session].update(effect.processes)
            elif isinstance(effect, registry_effects.AskUnwatch):
                assert self.asked[effect.session] >= set(effect.processes), "only what was asked is taken back"
                self.asked[effect.session].difference_update(effect.processes)
        return taken

    def _written(self, record: model.NodeRecord) -> None:
        # Until it has read Postgres a leader keeps what it has to say; of one node only the newest.
        self.waiting[record.name] = record
        if self.is_loaded:
            self._flush()

    def _flush(self) -> None:
        for name, record in self.waiting.items():
            stored = self.postgres.get(name)
            there, written = None if stored is None else stored.registration, record.registration
            if there is not None and there.node_id == written.node_id:
                assert written.incarnation >= there.incarnation, "an older agent was written over a newer one"
                if written.incarnation == there.incarnation and stored is not None:
                    assert record.register_time_seconds == stored.register_time_seconds
            self.postgres[name] = record
        self.waiting.clear()

    # Agents

    @rule(name=NAMES, host=st.integers(0, 1), incarnation=st.integers(1, 4), is_unary=st.booleans())
    def register(self, name: str, host: int, incarnation: int, is_unary: bool) -> None:
        node_id = f"id-of-host-{host}"
        registration = model.Registration(
            name=name, node_id=node_id, incarnation=incarnation, boot_id=f"boot-{host}", pid_namespace=7
        )
        session = None if is_unary else next(self.counter)
        before = self.leader.nodes.get(name)
        is_alive = before is not None and before.state in ALIVE
        known = None if before is None else before.record.registration
        try:
            self.leader.register(registration, self.now, wall_seconds=self.now, session=session)
        except errors.AlreadyExists:
            assert known is not None
            assert is_alive
            assert known.node_id != node_id
            assert self.settle() == []
            return
        except errors.NodeSuperseded:
            assert known is not None
            assert known.node_id == node_id
            assert known.incarnation > incarnation
            assert self.settle() == []
            return
        assert not (is_alive and known is not None and known.node_id != node_id), "a living name was taken"
        self.heard_at[name] = self.now
        if session is not None:
            self.streams[session] = (name, node_id, incarnation)
            self.asked.setdefault(session, set())
        self.settle()
        assert self.leader.nodes[name].state in ALIVE

    def _stream(self, data: Any) -> int | None:
        return data.draw(st.sampled_from(sorted(self.streams))) if self.streams else None

    @rule(data=st.data(), is_draining=st.sampled_from([None, None, True, False]))
    def report(self, data: Any, is_draining: bool | None) -> None:
        session = self._stream(data)
        if session is None:
            return
        name = self.streams[session][0]
        state = self.leader.nodes[name].state
        assert self.leader.report(session, self.now, is_draining=is_draining)
        self.heard_at[name] = self.now
        taken = self.settle()
        wanted = NodeState.DRAINING if is_draining else NodeState.READY
        if state in ALIVE and (is_draining is None or wanted is state):
            assert taken == [], "a report without news costs nothing"

    @rule(data=st.data(), is_leaving=st.booleans())
    def close(self, data: Any, is_leaving: bool) -> None:
        session = self._stream(data)
        if session is None:
            return
        name, _, _ = self.streams.pop(session)
        if is_leaving:
            self.leader.report(session, self.now, is_leaving=True)
            self.heard_at[name] = self.now
        self.leader.session_closed(session, self.now)
        self.settle()
        if is_leaving:
            assert self.leader.nodes[name].state is NodeState.GONE

    @rule(data=st.data())
    def a_stream_that_was_ended_still_talks(self, data: Any) -> None:
        if self.ended:
            session = data.draw(st.sampled_from(sorted(self.ended)))
            assert not self.leader.report(session, self.now, is_draining=True, is_leaving=True)
            self.leader.session_closed(session, self.now)
            assert self.settle() == []

    @rule(host=st.integers(0, 1), pid=st.integers(1, 3), is_wanted=st.booleans())
    def watch(self, host: int, pid: int, is_wanted: bool) -> None:
        process = processes.ProcessKey(f"boot-{host}", 7, pid, 1)
        if is_wanted:
            self.leader.watch(process)
            self.watched.add(process)
        else:
            self.leader.unwatch(process)
            self.watched.discard(process)
        self.settle()

    # Time, leaders, administrators

    @rule(seconds=st.sampled_from([0.1, 0.9, 2.0, 3.99, 5.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.leader.next_deadline() <= end:
            self.now = self.leader.next_deadline()
            before = {name: node.state for name, node in self.leader.nodes.items()}
            self.leader.tick(self.now)
            self.settle()
            for name, node in self.leader.nodes.items():
                if node.state is NodeState.LOST and before[name] in ALIVE:
                    assert self.now - self.heard_at[name] >= TTL_SECONDS - 1e-6, f"{name} was lost too soon"
        self.now = end

    @rule()
    def everything_is_held_up(self) -> None:
        self.now += 30.0
        before = {name: node.state for name, node in self.leader.nodes.items()}
        self.leader.tick(self.now)
        self.settle()
        assert {name: node.state for name, node in self.leader.nodes.items()} == before
        # Everyone has one interval more, as if it had been heard when that much of its TTL was left.
        least = self.now - TTL_SECONDS + self.leader.terms.report_interval_seconds
        self.heard_at = {name: max(at, least) for name, at in self.heard_at.items()}

    @rule(is_postgres_there=st.booleans())
    def another_leader(self, is_postgres_there: bool) -> None:
        self.leader = registry.NodeRegistry()
        self.streams, self.asked, self.ended = {}, {}, set()
        # A new leader is asked by holders anew.
        self.watched.clear()
        self.waiting.clear()
        self.heard_at.clear()
        self.is_loaded = False
        if is_postgres_there:
            self.postgres_is_read()

    @rule()
    def postgres_is_read(self) -> None:
        if not self.is_loaded:
            for name, stored in self.postgres.items():
                mine = self.waiting.get(name)
                there = stored.registration
                if mine is None or (
                    mine.registration.node_id == there.node_id
                    and mine.registration.incarnation < there.incarnation
                ):
                    # Not heard by this leader, but perhaps an agent that gives way.
                    self.heard_at[name] = self.now
            self.leader.restore([record for _, record in sorted(self.postgres.items())], self.now)
            self.settle()
            self.is_loaded = True
            self._flush()

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        if not self.is_loaded:
            return
        try:
            self.leader.check_forget(name)
        except errors.LeaseholdError:
            return
        assert self.leader.nodes[name].state not in ALIVE
        self.leader.forget(name)
        del self.postgres[name]
        self.heard_at.pop(name, None)
        self.settle()

    # Judgement

    @invariant()
    def the_registry_is_in_order(self) -> None:
        registry_invariants.check(self.leader)

    @invariant()
    def postgres_knows_what_is_durable(self) -> None:
        for name, node in self.leader.nodes.items():
            assert self.waiting.get(name, self.postgres.get(name)) == node.record
        if self.is_loaded:
            assert set(self.postgres) == set(self.leader.nodes)

    @invariant()
    def whoever_is_silent_for_a_ttl_is_not_alive(self) -> None:
        for name, node in self.leader.nodes.items():
            if node.state in ALIVE:
                last = self.heard_at[name]
                assert self.now - last <= TTL_SECONDS + 1e-6, f"{name} is not lost, silent since {last}"

    @invariant()
    def every_stream_was_asked_for_what_is_watched_at_its_place(self) -> None:
        for session, (name, _, _) in self.streams.items():
            boot = self.leader.nodes[name].record.registration.boot_id
            assert self.asked[session] == {process for process in self.watched if process.boot_id == boot}

    @invariant()
    def a_stream_that_is_not_ended_is_its_nodes(self) -> None:
        for session, (name, node_id, incarnation) in self.streams.items():
            node = self.leader.nodes[name]
            assert node.session == session
            registration = node.record.registration
            assert (registration.node_id, registration.incarnation) == (node_id, incarnation)


Registries.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestRegistries = Registries.TestCase
