"""What holds of every plan: nothing is over-allocated, quotas and promises are kept, and all get their turn."""

import dataclasses

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leasehold.core.placement import model, scheduler

MIB = 1 << 20
QUEUES = (
    model.Queue(name="free"),
    model.Queue(name="cpus", nominal_cpus=6),
    model.Queue(name="both", nominal_cpus=9, nominal_memory_bytes=10 * MIB),
)
ZONES = ("a", "b")
FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.builds(
    model.Shape,
    required=st.builds(model.Resources, st.integers(1, 8), st.integers(1, 8).map(lambda amount: amount * MIB)),
    selector=st.sampled_from(((), (), (("zone", "a"),))),
    template=st.sampled_from(("", "run")),
    spreading=st.sampled_from(model.Spreading),
)
waits = st.builds(
    model.Waiting,
    job_id=st.just(""),
    shape=shapes,
    queue=st.sampled_from([queue.name for queue in QUEUES]),
    priority=st.integers(0, 3),
    submit_time_seconds=st.integers(0, 50).map(float),
    max_run_seconds=st.none() | st.integers(1, 40).map(float),
)
nodes = st.builds(
    model.Node,
    name=st.just(""),
    total=st.builds(model.Resources, st.integers(1, 10), st.integers(1, 10).map(lambda amount: amount * MIB)),
    used=st.just(model.Resources(0, 0)),
    openness=st.sampled_from((model.Openness.OPEN, model.Openness.OPEN, model.Openness.DRAINING)),
    labels=st.sampled_from(ZONES).map(lambda zone: {"zone": zone}),
    templates=st.sampled_from((frozenset[str](), frozenset({"run"}))),
)


class World:
    """A scheduler, the books of an onlooker, and jobs that run as long as they may."""

    def __init__(self, found: list[model.Node]) -> None:
        self.scheduler = scheduler.Scheduler(ageing_seconds=10.0)
        self.now = 0.0
        self.nodes: dict[str, model.Node] = {}
        self.waiting: dict[str, model.Waiting] = {}
        self.running: dict[str, model.Running] = {}
        self.began: dict[str, float] = {}
        for queue in QUEUES:
            self.scheduler.put_queue(queue)
        for number, node in enumerate(found):
            self.nodes[f"n{number}"] = named = dataclasses.replace(node, name=f"n{number}")
            self.scheduler.put_node(named)

    def submit(self, waiting: model.Waiting) -> str:
        name = f"j{len(self.waiting) + len(self.began):04}"
        self.waiting[name] = dataclasses.replace(waiting, job_id=name)
        self.scheduler.add(self.waiting[name])
        return name

    def change(self, name: str, node: model.Node) -> None:
        """Another capacity, state, labels; never less than what runs there."""
        held = [one.held for one in self.running.values() if one.node == name]
        used = model.Resources(sum(one.cpus for one in held), sum(one.memory_bytes for one in held))
        total = model.Resources(
            max(node.total.cpus, used.cpus), max(node.total.memory_bytes, used.memory_bytes)
        )
        self.nodes[name] = dataclasses.replace(node, name=name, total=total, used=used)
        self.scheduler.put_node(self.nodes[name])

    def forgetful(self) -> scheduler.Scheduler:
        """Another scheduler, which is told what there is now."""
        made = scheduler.Scheduler(ageing_seconds=10.0)
        for queue in QUEUES:
            made.put_queue(queue)
        for running in self.running.values():
            made.started(running)
        for name, node in self.nodes.items():
            held = [one.held for one in self.running.values() if one.node == name]
            used = model.Resources(sum(one.cpus for one in held), sum(one.memory_bytes for one in held))
            made.put_node(dataclasses.replace(node, used=used))
        made.add_all(self.waiting.values())
        return made

    def plan(self) -> list[model.Placement]:
        placements = self.scheduler.plan(self.now)
        for job_id, node in placements:
            self._start(job_id, node)
            self.judge()
        return placements

    def _start(self, job_id: str, node: str) -> None:
        waiting = self.waiting.pop(job_id)
        shape, run = waiting.shape, waiting.max_run_seconds
        found = self.nodes[node]
        assert found.openness is model.Openness.OPEN
        assert all(found.labels.get(key) == value for key, value in shape.selector)
        assert not shape.template or shape.template in found.templates
        ends_by = None if run is None else self.now + run
        self.running[job_id] = model.Running(
            job_id=job_id, node=node, queue=waiting.queue, held=shape.required, ends_by=ends_by
        )
        self.began[job_id] = self.now
        self.scheduler.started(self.running[job_id])

    def end(self, job_id: str) -> None:
        del self.running[job_id]
        self.scheduler.ended(job_id)

    def judge(self) -> None:
        """No node and no queue has given out more than it has."""
        for name, node in self.nodes.items():
            held = [one.held for one in self.running.values() if one.node == name]
            assert sum(one.cpus for one in held) <= node.total.cpus
            assert sum(one.memory_bytes for one in held) <= node.total.memory_bytes
        for queue in QUEUES:
            held = [one.held for one in self.running.values() if one.queue == queue.name]
            if queue.nominal_cpus is not None:
                assert sum(one.cpus for one in held) <= queue.nominal_cpus
            if queue.nominal_memory_bytes is not None:
                assert sum(one.memory_bytes for one in held) <= queue.nominal_memory_bytes

    def could_run(self, waiting: model.Waiting) -> bool:
        if self.scheduler.check(waiting.shape, waiting.queue) is not None:
            return False
        return any(
            node.openness is model.Openness.OPEN
            and node.total.holds(waiting.shape.required)
            and all(node.labels.get(key) == value for key, value in waiting.shape.selector)
            and (not waiting.shape.template or waiting.shape.template in node.templates)
            for node in self.nodes.values()
        )


@FEW
@given(st.lists(nodes, min_size=1, max_size=20), st.lists(waits, max_size=25), st.data())
def test_at_every_step_no_node_and_no_quota_is_exceeded(
    found: list[model.Node], jobs: list[model.Waiting], data: st.DataObject
) -> None:
    world = World(found)
    for waiting in jobs:
        world.submit(waiting)
    for _ in range(4):
        world.plan()
        for job_id in data.draw(st.sets(st.sampled_from(sorted(world.running)))) if world.running else ():
            world.end(job_id)
        world.now += data.draw(st.integers(0, 10))


@FEW
@given(st.lists(nodes, min_size=1, max_size=20), st.lists(waits, max_size=25), st.data())
def test_what_is_remembered_of_earlier_plans_changes_none(
    found: list[model.Node], jobs: list[model.Waiting], data: st.DataObject
) -> None:
    """Who is blocked, and for how long, is kept from plan to plan; one that remembers nothing agrees."""
    world = World(found)
    for _ in range(6):
        more: list[model.Waiting] = data.draw(st.lists(st.sampled_from(jobs), max_size=8)) if jobs else []
        for waiting in more:
            world.submit(waiting)
        is_explained = data.draw(st.booleans())
        if world.waiting and is_explained:
            world.scheduler.explain(data.draw(st.sampled_from(sorted(world.waiting))), world.now)
        if data.draw(st.booleans()):
            number = data.draw(st.integers(0, len(found) - 1))
            world.change(f"n{number}", data.draw(nodes))
        # Proposed, and never carried out.
        assert world.scheduler.plan(world.now, most=2) == world.forgetful().plan(world.now, most=2)
        expected = world.forgetful().plan(world.now)
        assert world.plan() == expected
        for job_id in data.draw(st.sets(st.sampled_from(sorted(world.running)))) if world.running else ():
            world.end(job_id)
        world.now += data.draw(st.integers(0, 10))


@FEW
@given(st.lists(nodes, min_size=1, max_size=20), st.lists(waits, max_size=15), st.data())
def test_what_explain_tells_is_what_plan_does(
    found: list[model.Node], jobs: list[model.Waiting], data: st.DataObject
) -> None:
    world = World(found)
    for _ in range(3):
        for waiting in jobs:
            world.submit(waiting)
        told = {job_id: world.scheduler.explain(job_id, world.now) for job_id in world.waiting}
        line = sorted(told, key=lambda job_id: told[job_id].place_in_line)
        for explanation in told.values():
            open_to_it = len(world.nodes) - sum(one.nodes for one in explanation.blocked)
            assert open_to_it >= (1 if explanation.node else 0)
            assert open_to_it == 0 or explanation.node or explanation.held_back
        placements = world.plan()

        assert {job_id: one.node for job_id, one in told.items() if one.node} == dict(placements)
        assert [told[job_id].place_in_line for job_id in line] == list(range(1, len(line) + 1))
        for job_id in data.draw(st.sets(st.sampled_from(sorted(world.running)))) if world.running else ():
            world.end(job_id)
        world.now += 5.0


@FEW
@given(st.lists(nodes, min_size=1, max_size=6), st.lists(waits, max_size=15), st.lists(waits, max_size=20))
def test_no_job_behind_it_delays_the_start_that_the_head_was_promised(
    found: list[model.Node], jobs: list[model.Waiting], later: list[model.Waiting]
) -> None:
    the_head_starts_as_promised(World(found), jobs, later)


#: Every job may run on every node, and most nodes are full: whoever passes the head is in its way.
crowds = st.builds(
    model.Waiting,
    job_id=st.just(""),
    shape=st.builds(model.Shape, required=st.builds(model.Resources, st.integers(1, 6), st.just(MIB))),
    queue=st.just("free"),
    priority=st.just(0),
    submit_time_seconds=st.integers(0, 50).map(float),
    max_run_seconds=st.none() | st.integers(1, 40).map(float),
)
crowded = st.builds(
    model.Node,
    name=st.just(""),
    total=st.builds(model.Resources, st.integers(4, 8), st.just(100 * MIB)),
    used=st.just(model.Resources(0, 0)),
)


@FEW
@given(
    st.lists(crowded, min_size=1, max_size=2),
    st.lists(crowds, min_size=4, max_size=12),
    st.lists(crowds, min_size=8, max_size=20),
)
def test_where_it_is_crowded_the_head_starts_as_promised_too(
    found: list[model.Node], jobs: list[model.Waiting], later: list[model.Waiting]
) -> None:
    the_head_starts_as_promised(World(found), jobs, later)


def the_head_starts_as_promised(world: World, jobs: list[model.Waiting], later: list[model.Waiting]) -> None:
    """Jobs run for exactly as long as they may; others keep coming, all behind the head."""
    for waiting in jobs:
        world.submit(waiting)
    world.plan()
    told = {
        job_id: world.scheduler.explain(job_id, world.now)
        for job_id, waiting in world.waiting.items()
        if world.could_run(waiting)
    }
    if not told:
        return
    head = min(told, key=lambda job_id: told[job_id].place_in_line)
    starts_by = told[head].starts_by
    if starts_by is None:
        return
    coming = [dataclasses.replace(one, submit_time_seconds=100.0 + one.submit_time_seconds) for one in later]
    while head in world.waiting:
        for waiting in coming[:2]:
            world.submit(waiting)
        del coming[:2]
        world.plan()
        ends = [one.ends_by for one in world.running.values() if one.ends_by is not None]
        world.now = min([*ends, world.now + 1.0]) if coming else min(ends)
        for job_id, one in list(world.running.items()):
            if one.ends_by is not None and one.ends_by <= world.now:
                world.end(job_id)
        world.plan()
        assert head in world.began or world.now < starts_by

    assert world.began[head] <= starts_by


@FEW
@given(st.lists(nodes, min_size=1, max_size=4), waits, st.lists(waits, min_size=1, max_size=6))
def test_a_job_starts_whatever_keeps_coming_behind_it(
    found: list[model.Node], chosen: model.Waiting, stream: list[model.Waiting]
) -> None:
    """Each round as many come as the first time, at any priority; what has no known end ends after 7 rounds."""
    world = World(found)
    if not world.could_run(chosen):
        return
    for waiting in stream * 3:
        world.submit(waiting)
    world.plan()
    name = world.submit(chosen)
    for number in range(1, 400):
        world.now = float(number)
        for waiting in stream:
            world.submit(dataclasses.replace(waiting, submit_time_seconds=50.0 + world.now))
        for job_id, one in list(world.running.items()):
            run = 7.0 if one.ends_by is None else one.ends_by - world.began[job_id]
            if world.began[job_id] + run <= world.now:
                world.end(job_id)
        world.plan()
        if name in world.began:
            return
    raise AssertionError(f"{name} never started")
