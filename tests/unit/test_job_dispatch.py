"""Between nodes and jobs: what is told of a node and its attempts, when, and what its connection carries."""

from typing import Any

import pytest
from leasehold.allocator import job_dispatch, node_sessions, nodes, records
from leasehold.allocator import reign as reigns
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import effects, model
from leasehold.core.placement import model as placement
from leasehold.etcd import clock as etcd_clock
from leasehold.etcd import memory as etcd_memory
from leasehold.postgres import memory as postgres_memory
from leasehold.rpc import attempt_codec
from leasehold.runtime import clock as clocks

EPOCH = epochs.Epoch(1, 10, 5)
GIB = 2**30


def job_id(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012x}"


def ref(number: int, attempt: int = 1) -> model.AttemptRef:
    return model.AttemptRef(job_id(number), attempt)


class Machine:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def node_seen(self, now: float, facts: effects.NodeFacts) -> None:
        self.told.append(("seen", facts.name, facts.openness.value, facts.is_connected, facts.declared.cpus))

    def node_forgotten(self, name: str) -> None:
        self.told.append(("forgotten", name))

    def inventory(self, now: float, node: str, reports: Any) -> None:
        self.told.append(("inventory", node, [(each.ref.job_id[-1], each.phase.value) for each in reports]))

    def attempt_reported(self, now: float, node: str, report: model.Report) -> None:
        self.told.append(("reported", node, report.ref.job_id[-1], report.phase.value))

    def take(self) -> list[Any]:
        told, self.told = self.told, []
        return told


class Scene:
    """The nodes of a reign, with a machine that may not be there yet."""

    def __init__(self) -> None:
        etcd = etcd_memory.MemoryCluster(etcd_clock.ManualClock()).connect()
        store = postgres_memory.MemoryStore()
        self.reign = reigns.Reign(
            EPOCH,
            etcd,
            records.Keys("/t"),
            store,
            clock=clocks.MonotonicClock(),
            boot_clock=clocks.BootClock(),
        )
        self.known = nodes.Nodes(self.reign, store)
        self.machine = Machine()
        machine: Any = self.machine
        self.dispatch = job_dispatch.JobDispatch(self.known, lambda event: event(machine, 1.0))
        self.known.jobs = self.dispatch

    def connect(self, **fields: Any) -> node_sessions.NodeSession:
        """An agent's first message on a new connection."""
        session = self.known.open_session("test")
        told: dict[str, Any] = {"inventory": attempt_pb2.JobInventory(), **fields}
        registration = wire.NodeRegistration(
            name="r1",
            node_id="id-of-node-r1",
            incarnation=told.pop("incarnation", 1),
            boot_id="boot-1",
            job_resources=node_pb2.NodeResources(cpus=told.pop("cpus", 8), memory_bytes=GIB),
        )
        self.known.take(wire.SyncNodeRequest(sequence=1, registration=registration, **told), session)
        return session


@pytest.fixture
async def scene() -> Scene:
    return Scene()


def report(number: int, phase: "job_pb2.AttemptPhase.ValueType", **fields: Any) -> attempt_pb2.AttemptReport:
    return attempt_pb2.AttemptReport(
        attempt=attempt_pb2.AttemptRef(job_id=job_id(number), attempt=1), phase=phase, **fields
    )


STARTED = job_pb2.ATTEMPT_PHASE_STARTED
ENDED = job_pb2.ATTEMPT_PHASE_ENDED
SUCCEEDED = job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_SUCCEEDED, exit_code=0)


async def test_a_node_is_told_before_its_inventory_and_once_for_each_change(scene: Scene) -> None:
    scene.dispatch.begin(frozenset())
    inventory = attempt_pb2.JobInventory(attempts=[report(1, STARTED)])
    session = scene.connect(inventory=inventory)
    assert scene.machine.take() == [
        ("seen", "r1", "open", True, 8),
        ("inventory", "r1", [("1", "STARTED")]),
    ]
    scene.known.take(wire.SyncNodeRequest(sequence=2, status=node_pb2.NodeStatus()), session)
    scene.known.take(wire.SyncNodeRequest(sequence=3), session)
    assert scene.machine.take() == []
    scene.known.take(wire.SyncNodeRequest(sequence=4, status=node_pb2.NodeStatus(is_draining=True)), session)
    assert scene.machine.take() == [("seen", "r1", "draining", True, 8)]
    scene.known.take(wire.SyncNodeRequest(sequence=5, attempts=[report(1, ENDED, outcome=SUCCEEDED)]), session)
    assert scene.machine.take() == [("reported", "r1", "1", "ENDED")]
    scene.known.close_session(session)
    assert scene.machine.take() == [("seen", "r1", "not_ready", False, 8)]


async def test_what_agents_tell_before_postgres_is_read_is_told_once_it_is(scene: Scene) -> None:
    inventory = attempt_pb2.JobInventory(attempts=[report(1, STARTED), report(2, STARTED)])
    session = scene.connect(inventory=inventory)
    ended = report(2, ENDED, outcome=SUCCEEDED)
    scene.known.take(wire.SyncNodeRequest(sequence=2, attempts=[ended, report(3, STARTED)]), session)
    assert scene.machine.take() == []
    scene.dispatch.begin(frozenset())
    assert scene.machine.take() == [
        ("seen", "r1", "open", True, 8),
        ("inventory", "r1", [("1", "STARTED"), ("2", "ENDED"), ("3", "STARTED")]),
    ]


async def test_what_a_connection_told_that_is_gone_since_is_not_told_for_it(scene: Scene) -> None:
    session = scene.connect(inventory=attempt_pb2.JobInventory(attempts=[report(1, STARTED)]))
    scene.known.close_session(session)
    scene.dispatch.begin(frozenset())
    assert scene.machine.take() == []


async def test_a_host_that_declares_nothing_is_told_only_if_it_once_did(scene: Scene) -> None:
    scene.dispatch.begin(frozenset())
    session = scene.connect(cpus=0, incarnation=1)
    told = scene.machine.take()
    assert [each for each in told if each[0] == "seen"] == [("seen", "r1", "open", True, 0)]
    scene.known.close_session(session)


async def test_an_inventory_comes_first_or_not_at_all_and_a_report_is_checked(scene: Scene) -> None:
    scene.dispatch.begin(frozenset())
    session = scene.connect()
    with pytest.raises(errors.InvalidArgument) as caught:
        scene.known.take(wire.SyncNodeRequest(sequence=2, inventory=attempt_pb2.JobInventory()), session)
    assert caught.value.field == "inventory"
    for wrong, named in (
        (report(1, job_pb2.ATTEMPT_PHASE_UNSPECIFIED), "attempts.phase"),
        (report(1, ENDED), "attempts.outcome.cause"),
        (attempt_pb2.AttemptReport(phase=STARTED), "attempts.attempt.job_id"),
    ):
        scene.machine.take()
        with pytest.raises(errors.InvalidArgument) as caught:
            scene.known.take(wire.SyncNodeRequest(sequence=session.sequence + 1, attempts=[wrong]), session)
        assert caught.value.field == named
        assert scene.machine.take() == []


async def test_the_agent_of_another_connection_is_not_heard_any_more(scene: Scene) -> None:
    scene.dispatch.begin(frozenset())
    older = scene.connect()
    scene.connect(incarnation=2)
    scene.machine.take()
    scene.known.take(wire.SyncNodeRequest(sequence=2, attempts=[report(1, STARTED)]), older)
    assert scene.machine.take() == []


SPEC = model.JobSpec(
    required=placement.Resources(2, GIB),
    template="render",
    parameters={"frame": "7"},
    max_run_seconds=60.0,
    name="frame 7",
)


async def test_an_assignment_a_stop_and_a_forgetting_reach_the_agent_together(scene: Scene) -> None:
    session = scene.connect()
    await session.next_response()
    scene.dispatch.send(effects.Forget("r1", ref(3)))
    scene.dispatch.send(effects.Stop("r1", ref(1)))
    scene.dispatch.send(effects.Assign("r1", ref(1), SPEC, placement.Resources(2, GIB)))
    first = await session.next_response()
    assert first is not None
    (assignment,) = first.assignments
    assert (assignment.attempt.job_id, assignment.cpus, assignment.max_run.seconds) == (job_id(1), 2, 60)
    assert (dict(assignment.parameters), assignment.name) == ({"frame": "7"}, "frame 7")
    assert [each.job_id for each in first.forget] == [job_id(3)]
    # The agent takes assignments first: one that has not started never does.
    assert [each.job_id for each in first.stop] == [job_id(1)]
    # One that is not connected is told what it lacks when it comes back.
    scene.dispatch.send(effects.Stop("r2", ref(1)))


async def test_assignments_are_cut_to_what_one_message_can_carry(scene: Scene) -> None:
    session = scene.connect()
    await session.next_response()
    large = model.JobSpec(
        required=placement.Resources(1, 1),
        template="render",
        parameters={f"p{number}": "x" * 4096 for number in range(64)},
    )
    for number in range(20):
        scene.dispatch.send(effects.Assign("r1", ref(number), large, placement.Resources(1, 1)))
    got: list[Any] = []
    while len(got) < 20:
        response = await session.next_response()
        assert response is not None
        assert response.ByteSize() < 3 * 2**20
        got.extend(each.attempt.job_id for each in response.assignments)
    assert got == [job_id(number) for number in range(20)]


async def test_an_agent_that_takes_nothing_is_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_sessions, "UNSENT_ATTEMPTS_MAX", 10)
    session = scene.connect()
    for number in range(11):
        scene.dispatch.send(effects.Stop("r1", ref(number)))
    with pytest.raises(errors.ResourceExhausted):
        await session.next_response()


async def test_when_jobs_begin_anew_agents_tell_everything_again(scene: Scene) -> None:
    scene.dispatch.begin(frozenset())
    session = scene.connect()
    scene.dispatch.end(errors.Unavailable("jobs begin anew"))
    with pytest.raises(errors.Unavailable):
        await session.next_response()
    scene.known.close_session(session)
    scene.machine.take()
    scene.connect(inventory=attempt_pb2.JobInventory(attempts=[report(1, STARTED)]))
    assert scene.machine.take() == []
    scene.dispatch.begin(frozenset())
    assert scene.machine.take() == [
        ("seen", "r1", "open", True, 8),
        ("inventory", "r1", [("1", "STARTED")]),
    ]


@pytest.mark.parametrize(
    "given",
    [
        model.Report(ref=ref(1), phase=model.AttemptPhase.SENT),
        model.Report(ref=ref(1), phase=model.AttemptPhase.STARTED, start_time_seconds=1_800_000_000.5),
        model.Report(
            ref=ref(1, 7),
            phase=model.AttemptPhase.ENDED,
            outcome=model.Outcome(cause=model.EndCause.FAILED, exit_code=0, detail="no"),
            start_time_seconds=1_800_000_000.5,
            end_time_seconds=1_800_000_001.25,
        ),
    ],
)
def test_a_report_comes_back_as_it_was_given(given: model.Report) -> None:
    assert attempt_codec.decode_report(attempt_codec.encode_report(given)) == given
