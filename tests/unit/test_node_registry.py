"""The registry of nodes, event by event."""

from typing import Any

import pytest
from leasehold.core import errors, processes
from leasehold.core.node import registry, registry_effects, registry_invariants
from leasehold.core.node import registry_model as model
from leasehold.core.node.registry_model import NodeState

WALL = 1_900_000_000.0


def registration(name: str = "r620-1", **fields: Any) -> model.Registration:
    known: dict[str, Any] = {
        "name": name,
        "node_id": f"id-of-node-{name}",
        "incarnation": 1,
        "boot_id": f"boot-of-{name}",
        "pid_namespace": 7,
    }
    return model.Registration(**{**known, **fields})


class Scene:
    """A registry, its clock, and what came of every event."""

    def __init__(self, records: tuple[model.NodeRecord, ...] = ()) -> None:
        self.registry = registry.NodeRegistry()
        self.now = 100.0
        self.effects: list[registry_effects.Effect] = []
        if records:
            self.registry.restore(records, self.now)
        self.settle()

    def settle(self) -> list[registry_effects.Effect]:
        registry_invariants.check(self.registry)
        taken = self.registry.take_effects()
        self.effects += taken
        return taken

    def register(self, session: int | None = None, name: str = "r620-1", **fields: Any) -> None:
        self.registry.register(
            registration(name, **fields), self.now, wall_seconds=WALL + self.now, session=session, actor="me"
        )
        self.settle()

    def report(self, session: int, **fields: Any) -> bool:
        heard = self.registry.report(session, self.now, **fields)
        self.settle()
        return heard

    def close(self, session: int) -> None:
        self.registry.session_closed(session, self.now)
        self.settle()

    def until(self, instant: float) -> None:
        """Let time pass, ticking whenever the registry asks for it."""
        while self.registry.next_deadline() <= instant:
            self.now = self.registry.next_deadline()
            self.registry.tick(self.now)
            self.settle()
        self.now = instant

    def state(self, name: str = "r620-1") -> NodeState:
        return self.registry.get(name).state

    def is_mass_loss(self) -> bool:
        return self.registry.is_mass_loss

    def puts(self, name: str = "r620-1") -> list[model.NodeRecord]:
        found = [each for each in self.effects if isinstance(each, registry_effects.PutNode)]
        return [each.record for each in found if each.record.name == name]

    def ended(self) -> dict[int, errors.LeaseholdError]:
        return {e.session: e.error for e in self.effects if isinstance(e, registry_effects.EndSession)}


def test_postgres_hears_of_registrations_and_moves_and_not_of_reports() -> None:
    scene = Scene()
    scene.register(1)
    for _ in range(50):
        scene.until(scene.now + 1.0)
        scene.report(1)
    assert len(scene.puts()) == 1
    scene.report(1, is_draining=True)
    scene.report(1)
    assert [record.state for record in scene.puts()] == [NodeState.READY, NodeState.DRAINING]


def test_a_silent_node_is_lost_after_its_ttl_and_not_before() -> None:
    scene = Scene()
    scene.register(1)
    scene.until(scene.now + 3.9)
    assert scene.state() is NodeState.READY
    scene.until(scene.now + 0.1)
    assert scene.state() is NodeState.LOST
    assert scene.puts()[-1].cause == "no report for 4.0 s, its TTL is 4 s"
    scene.report(1)
    assert scene.state() is NodeState.READY


def test_a_broken_stream_leaves_the_node_the_rest_of_its_ttl() -> None:
    scene = Scene()
    scene.register(1)
    scene.until(scene.now + 1.0)
    scene.close(1)
    scene.until(scene.now + 2.9)
    assert scene.state() is NodeState.READY
    scene.until(scene.now + 0.1)
    assert scene.state() is NodeState.LOST


def test_an_agent_that_says_that_it_ends_is_gone_once_its_stream_closes() -> None:
    scene = Scene()
    scene.register(1)
    scene.report(1, is_leaving=True)
    assert scene.state() is NodeState.READY
    scene.close(1)
    assert scene.state() is NodeState.GONE
    scene.register(2, incarnation=2)
    assert scene.state() is NodeState.READY
    scene.close(2)
    assert scene.state() is NodeState.READY


def test_a_newer_incarnation_ends_the_older_stream_and_the_older_is_refused_from_then_on() -> None:
    scene = Scene()
    scene.register(1)
    scene.register(2, incarnation=2)
    assert isinstance(scene.ended()[1], errors.NodeSuperseded)
    assert not scene.report(1)
    with pytest.raises(errors.NodeSuperseded):
        scene.register(3)
    scene.close(1)
    assert scene.registry.get("r620-1").session == 2
    assert scene.puts()[-1].register_time_seconds == WALL + scene.now


def test_the_same_agent_on_another_stream_takes_its_place_without_being_superseded() -> None:
    scene = Scene()
    scene.register(1)
    scene.report(1, is_draining=True)
    scene.until(scene.now + 1.0)
    scene.register(2)
    assert type(scene.ended()[1]) is errors.Unavailable
    assert scene.state() is NodeState.DRAINING
    assert len({record.register_time_seconds for record in scene.puts()}) == 1


@pytest.mark.parametrize("ending", ["lost", "gone"])
def test_a_name_is_another_hosts_only_once_its_node_is_lost_or_gone(ending: str) -> None:
    scene = Scene()
    scene.register(1)
    with pytest.raises(errors.AlreadyExists, match="id-of-node-r620-1") as caught:
        scene.register(2, node_id="id-of-another")
    assert caught.value.metadata["state"] == "READY"
    if ending == "gone":
        scene.report(1, is_leaving=True)
    scene.close(1)
    scene.until(scene.now + 4.0)
    scene.register(2, node_id="id-of-another", incarnation=1)
    assert scene.registry.get("r620-1").record.registration.node_id == "id-of-another"
    with pytest.raises(errors.AlreadyExists):
        scene.register(3)


def test_a_copied_state_folder_on_another_boot_is_refused_while_the_first_is_there() -> None:
    scene = Scene()
    scene.register(1)
    with pytest.raises(errors.AlreadyExists, match="copied"):
        scene.register(2, boot_id="another-boot")


def test_a_refused_registration_changes_nothing() -> None:
    scene = Scene()
    scene.register(1, incarnation=5)
    before = scene.registry.get("r620-1").record
    told = len(scene.effects)
    for fields in ({"incarnation": 4}, {"node_id": "id-of-another", "incarnation": 9}):
        with pytest.raises(errors.LeaseholdError):
            scene.register(2, **fields)
    assert scene.registry.get("r620-1").record == before
    assert scene.report(1)
    assert len(scene.effects) == told


def test_terms_grow_with_the_nodes_and_each_stream_hears_of_it_once() -> None:
    scene = Scene()
    scene.register(1)
    assert scene.registry.terms_due(1) == model.Terms(4.0, 1.0)
    assert scene.registry.terms_due(1) is None
    for number in range(999):
        scene.register(name=f"n{number}")
    assert scene.registry.terms_due(1) == model.Terms(8.0, 2.0)
    assert scene.registry.terms_due(1) is None


def test_a_node_that_was_told_a_longer_ttl_has_it_until_it_hears_of_the_shorter() -> None:
    scene = Scene()
    for number in range(999):
        scene.register(name=f"n{number}")
    scene.register(1)
    assert scene.registry.terms_due(1) == model.Terms(8.0, 2.0)
    scene.until(scene.now + 1.0)
    scene.report(1)
    for number in range(999):
        node = scene.registry.get(f"n{number}")
        assert node.is_alive
    scene.until(scene.now + 7.5)
    for number in range(999):
        scene.registry.forget(f"n{number}")
    assert scene.registry.terms == model.Terms(4.0, 1.0)
    assert scene.state() is NodeState.READY
    scene.report(1)
    scene.until(scene.now + 7.9)
    assert scene.state() is NodeState.READY
    assert scene.registry.terms_due(1) == model.Terms(4.0, 1.0)
    scene.report(1)
    scene.until(scene.now + 4.0)
    assert scene.state() is NodeState.LOST


def test_most_nodes_lost_together_are_flagged_until_they_are_back() -> None:
    scene = Scene()
    for number in range(10):
        scene.register(number, f"n{number}")
    for _ in range(10):
        scene.until(scene.now + 1.0)
        scene.report(0)
        scene.report(1)
    assert scene.is_mass_loss()
    assert scene.registry.counts() == {NodeState.READY: 2, NodeState.LOST: 8}
    for number in range(2, 7):
        scene.report(number)
    assert not scene.is_mass_loss()
    changes = [e for e in scene.effects if isinstance(e, registry_effects.MassLossChanged)]
    assert [(e.is_mass_loss, e.nodes) for e in changes] == [(True, 10), (False, 10)]


def test_deaths_one_after_the_other_are_no_mass_loss() -> None:
    scene = Scene()
    for number in range(10):
        scene.register(number, f"n{number}")
    for living in range(10, 0, -1):
        for _ in range(9):
            scene.until(scene.now + 1.0)
            for number in range(living):
                scene.report(number)
    scene.until(scene.now + 9.0)
    assert scene.registry.counts()[NodeState.LOST] == 10
    assert not any(isinstance(e, registry_effects.MassLossChanged) for e in scene.effects)


def test_a_registry_that_was_held_up_itself_gives_everyone_time_to_be_heard() -> None:
    scene = Scene()
    for number in range(5):
        scene.register(number, f"n{number}")
    scene.now += 60.0
    scene.registry.tick(scene.now)
    scene.settle()
    assert scene.registry.counts() == {NodeState.READY: 5}
    scene.until(scene.now + 1.0)
    assert scene.registry.counts() == {NodeState.LOST: 5}


def record(name: str = "r620-1", state: NodeState = NodeState.READY, **fields: Any) -> model.NodeRecord:
    return model.NodeRecord(registration=registration(name, **fields), state=state, register_time_seconds=WALL)


def test_a_new_leader_gives_every_node_a_whole_ttl_from_its_own_takeover() -> None:
    scene = Scene(
        (record(), record("b", NodeState.DRAINING), record("c", NodeState.LOST), record("d", NodeState.GONE))
    )
    assert scene.effects == []
    scene.until(scene.now + 3.9)
    states = [scene.state(name) for name in ("r620-1", "b", "c", "d")]
    assert states == [NodeState.READY, NodeState.DRAINING, NodeState.LOST, NodeState.GONE]
    scene.until(scene.now + 0.1)
    assert [scene.state(name) for name in ("r620-1", "b")] == [NodeState.LOST] * 2
    assert scene.puts()[-1].cause == "no report, its TTL is 4 s"


def test_a_node_that_came_before_postgres_did_keeps_its_place_and_its_first_registration() -> None:
    scene = Scene()
    scene.until(scene.now + 50.0)
    scene.register(1)
    scene.registry.restore((record(state=NodeState.LOST),), scene.now)
    scene.settle()
    assert scene.state() is NodeState.READY
    assert scene.puts()[-1].register_time_seconds == WALL
    assert scene.report(1)


def test_an_older_agent_that_came_before_postgres_did_gives_way_to_the_newer_that_postgres_knows() -> None:
    scene = Scene()
    scene.register(1, incarnation=4)
    scene.registry.restore((record(incarnation=5),), scene.now)
    scene.settle()
    assert isinstance(scene.ended()[1], errors.NodeSuperseded)
    assert scene.puts()[-1].registration.incarnation == 5
    assert not scene.report(1)
    scene.until(scene.now + 4.0)
    assert scene.state() is NodeState.LOST


def test_only_a_node_that_is_lost_or_gone_can_be_forgotten() -> None:
    scene = Scene((record(), record("gone", NodeState.GONE)))
    with pytest.raises(errors.FailedPrecondition):
        scene.registry.check_forget("r620-1")
    scene.registry.forget("r620-1")
    assert scene.state() is NodeState.READY
    scene.registry.check_forget("gone")
    scene.registry.forget("gone")
    with pytest.raises(errors.NotFound):
        scene.registry.check_forget("gone")
    scene.settle()


def test_the_only_node_needs_no_name_whoever_is_gone() -> None:
    scene = Scene((record("gone", NodeState.GONE),))
    with pytest.raises(errors.NotFound):
        scene.registry.only()
    scene.register(1)
    assert scene.registry.only().record.name == "r620-1"
    scene.register(2, "r620-2")
    with pytest.raises(errors.InvalidArgument, match="r620-1, r620-2"):
        scene.registry.only()


def key(pid: int, name: str = "r620-1") -> processes.ProcessKey:
    return processes.ProcessKey(f"boot-of-{name}", 7, pid, 1_000)


def test_an_agent_is_asked_to_watch_what_is_at_its_place_and_each_new_stream_is_asked_again() -> None:
    scene = Scene()
    scene.registry.watch(key(1))
    scene.registry.watch(key(2, "elsewhere"))
    scene.register(1)
    scene.registry.watch(key(3))
    scene.registry.watch(key(3))
    scene.registry.unwatch(key(1))
    scene.register(2)
    asked = [
        (type(e).__name__, e.session, [process.pid for process in e.processes])
        for e in scene.effects
        if isinstance(e, registry_effects.AskWatch | registry_effects.AskUnwatch)
    ]
    assert asked == [
        ("AskWatch", 1, [1]),
        ("AskWatch", 1, [3]),
        ("AskUnwatch", 1, [1]),
        ("AskWatch", 2, [3]),
    ]


def test_an_agent_certifies_only_processes_of_its_own_boot_and_namespace() -> None:
    scene = Scene()
    scene.register(1)
    scene.registry.watch(key(1))
    for foreign in (key(1, "elsewhere"), processes.ProcessKey("boot-of-r620-1", 8, 1, 1_000)):
        with pytest.raises(errors.InvalidArgument):
            scene.registry.certify("r620-1", foreign)
    assert len(scene.registry.watched) == 1
    assert not scene.registry.certify("r620-1", key(2))
    assert scene.registry.certify("r620-1", key(1))
    assert not scene.registry.certify("r620-1", key(1))
    assert len(scene.registry.watched) == 0


def test_there_is_a_most_of_nodes() -> None:
    scene = Scene(tuple(record(f"n{number}", NodeState.GONE) for number in range(model.NODES_MAX)))
    with pytest.raises(errors.ResourceExhausted):
        scene.register(1)
    scene.register(2, "n0")
