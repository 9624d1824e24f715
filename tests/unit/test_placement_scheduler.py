"""The scheduler by examples: who goes where, who waits for whom, and what it says about it."""

import pytest
from leasehold.core import errors
from leasehold.core.placement import model, scheduler

GIB = 1 << 30


def node(
    name: str,
    cpus: int = 8,
    gib: int = 64,
    *,
    used: tuple[int, int] = (0, 0),
    openness: model.Openness = model.Openness.OPEN,
    labels: dict[str, str] | None = None,
    templates: tuple[str, ...] = ("run",),
) -> model.Node:
    return model.Node(
        name=name,
        total=model.Resources(cpus, gib * GIB),
        used=model.Resources(used[0], used[1] * GIB),
        openness=openness,
        labels=labels or {},
        templates=frozenset(templates),
    )


def shape(
    cpus: int = 1,
    gib: int = 1,
    *,
    selector: tuple[tuple[str, str], ...] = (),
    template: str = "run",
    spreading: model.Spreading = model.Spreading.PACK,
) -> model.Shape:
    return model.Shape(
        required=model.Resources(cpus, gib * GIB), selector=selector, template=template, spreading=spreading
    )


def job(
    name: str,
    found: model.Shape | None = None,
    *,
    queue: str = "default",
    priority: int = 0,
    at: float = 0.0,
    run: float | None = None,
    not_before: float = float("-inf"),
) -> model.Waiting:
    return model.Waiting(
        job_id=name,
        shape=found or shape(),
        queue=queue,
        priority=priority,
        submit_time_seconds=at,
        max_run_seconds=run,
        not_before=not_before,
    )


def running(
    name: str, on: str, cpus: int = 1, gib: int = 1, *, queue: str = "default", ends_by: float | None = None
) -> model.Running:
    return model.Running(
        job_id=name, node=on, queue=queue, held=model.Resources(cpus, gib * GIB), ends_by=ends_by
    )


def world(*nodes: model.Node, ageing_seconds: float = 60.0) -> scheduler.Scheduler:
    made = scheduler.Scheduler(ageing_seconds=ageing_seconds)
    made.put_queue(model.Queue(name="default"))
    for one in nodes:
        made.put_node(one)
    return made


def planned(made: scheduler.Scheduler, now: float = 0.0, *, most: int = 1000) -> dict[str, str]:
    return dict(made.plan(now, most=most))


def test_packing_takes_the_fullest_node_that_fits_and_spreading_the_emptiest() -> None:
    made = world(node("a", used=(5, 1)), node("b", used=(2, 1)), node("c", used=(6, 1)))
    made.add(job("pack", shape(3)))
    made.add(job("spread", shape(3, spreading=model.Spreading.SPREAD)))

    assert planned(made) == {"pack": "a", "spread": "b"}


def test_placements_of_one_plan_see_each_other_and_fit_together() -> None:
    made = world(node("a", 4), node("b", 4))
    for number in range(5):
        made.add(job(f"j{number}", shape(2)))

    assert planned(made) == {"j0": "a", "j1": "a", "j2": "b", "j3": "b"}


def test_a_plan_that_is_not_carried_out_changes_nothing() -> None:
    made = world(node("a", 4))
    made.add(job("x", shape(4)))
    made.add(job("y", shape(4), at=1.0))

    assert planned(made) == planned(made) == {"x": "a"}
    made.remove("x")
    assert planned(made) == {"y": "a"}


def test_memory_counts_as_cpus_do() -> None:
    made = world(node("a", 64, 4), node("b", 2, 64))
    made.add(job("x", shape(1, 8)))
    made.add(job("y", shape(3, 1)))
    made.add(job("z", shape(3, 8)))

    assert planned(made) == {"x": "b", "y": "a"}


def test_labels_and_templates_decide_where() -> None:
    made = world(node("a", labels={"disk": "ssd"}, templates=()), node("b"), node("c", labels={"disk": "ssd"}))
    made.add(job("x", shape(selector=(("disk", "ssd"),))))
    made.add(job("anywhere", shape(8, selector=(("disk", "ssd"),), template="")))

    assert planned(made) == {"x": "c", "anywhere": "a"}


def test_a_node_whose_labels_change_is_judged_anew() -> None:
    made = world(node("a"))
    made.add(job("x", shape(selector=(("gpu", "yes"),))))
    assert planned(made) == {}

    made.put_node(node("a", labels={"gpu": "yes"}))

    assert planned(made) == {"x": "a"}


@pytest.mark.parametrize("openness", [model.Openness.DRAINING, model.Openness.NOT_READY])
def test_nodes_that_are_not_open_take_nothing(openness: model.Openness) -> None:
    made = world(node("a", openness=openness))
    made.add(job("x"))

    assert planned(made) == {}
    made.put_node(node("a"))
    assert planned(made) == {"x": "a"}


def test_a_point_of_priority_is_worth_so_long_a_wait() -> None:
    made = world(node("a", 1), ageing_seconds=60.0)
    made.add(job("old", at=0.0))
    made.add(job("urgent", at=59.0, priority=1))
    made.add(job("late", at=61.0, priority=1))

    order = []
    for _ in range(3):
        ((name, on),) = made.plan(100.0)
        made.started(running(name, on))
        made.ended(name)
        order.append(name)

    assert order == ["urgent", "old", "late"]


def test_a_job_in_backoff_joins_when_it_is_over() -> None:
    made = world(node("a"))
    made.add(job("x", not_before=10.0))

    assert planned(made, 9.9) == {}
    assert made.next_wake(9.9) == 10.0
    assert planned(made, 10.0) == {"x": "a"}
    assert made.next_wake(10.0) == float("inf")


def test_a_short_job_passes_the_head_and_a_long_or_endless_one_does_not() -> None:
    made = world(node("a", 4))
    made.started(running("r", "a", 2, ends_by=100.0))
    made.add(job("head", shape(4), at=0.0, run=10.0))
    made.add(job("endless", shape(1), at=1.0))
    made.add(job("long", shape(1), at=2.0, run=101.0))
    made.add(job("short", shape(1), at=3.0, run=100.0))

    assert planned(made) == {"short": "a"}
    assert made.explain("head", 0.0).starts_by == 100.0
    assert made.explain("endless", 0.0).held_back is model.HeldBack.BEHIND_RESERVATION
    assert made.explain("long", 0.0).blocked[0].reason is model.BlockReason.RESERVED


def test_an_endless_job_passes_into_what_is_left_over_beside_the_head() -> None:
    made = world(node("a", 8))
    made.started(running("r", "a", 2, ends_by=100.0))
    made.add(job("head", shape(7), at=0.0, run=10.0))
    made.add(job("x", shape(1), at=1.0))
    made.add(job("y", shape(1), at=2.0))

    assert planned(made) == {"x": "a"}


def test_a_job_that_found_no_room_is_tried_again_once_something_ends() -> None:
    made = world(node("a", 4), node("b", 1))
    made.started(running("r", "a", 4))
    made.add(job("x", shape(4)))
    assert planned(made) == {}

    made.ended("r")

    assert planned(made) == {"x": "a"}


def test_other_nodes_are_free_for_all_while_the_head_waits() -> None:
    made = world(node("a", 4), node("b", 2))
    made.started(running("r", "a", 4))
    made.add(job("head", shape(4), at=0.0))
    made.add(job("x", shape(2), at=1.0))

    assert planned(made) == {"x": "b"}
    assert made.explain("head", 0.0).starts_by is None


def test_a_job_that_no_node_could_hold_keeps_nothing_from_the_others() -> None:
    made = world(node("a", 4))
    made.started(running("r", "a", 2))
    made.add(job("giant", shape(100), at=0.0))
    made.add(job("x", shape(2), at=1.0))

    assert planned(made) == {"x": "a"}


def test_a_head_that_waits_for_quota_blocks_no_other_queue() -> None:
    made = world(node("a", 8))
    made.put_queue(model.Queue(name="small", nominal_cpus=2))
    made.started(running("r", "a", 2, queue="small"))
    made.add(job("head", shape(2), queue="small", at=0.0))
    made.add(job("x", shape(6), at=1.0))

    assert planned(made) == {"x": "a"}
    told = made.explain("head", 0.0)
    assert told.held_back is model.HeldBack.QUEUE_QUOTA
    assert told.held_back_detail == "queue small: 0 of 2 CPUs left, 2 needed"


def test_jobs_of_a_queue_pass_its_head_only_if_its_quota_is_there_in_time() -> None:
    made = world(node("a", 64))
    made.put_queue(model.Queue(name="q", nominal_cpus=10))
    made.started(running("r", "a", 4, queue="q", ends_by=100.0))
    made.add(job("head", shape(8), queue="q", at=0.0))
    made.add(job("endless", shape(3), queue="q", at=1.0))
    made.add(job("fits-beside", shape(2), queue="q", at=2.0))
    made.add(job("short", shape(3), queue="q", at=3.0, run=50.0))

    assert planned(made) == {"fits-beside": "a", "short": "a"}


def test_quota_is_kept_for_a_head_that_waits_for_room() -> None:
    made = world(node("a", 8), node("b", 8))
    made.put_queue(model.Queue(name="q", nominal_cpus=10))
    made.started(running("r", "a", 8, ends_by=100.0))
    made.started(running("s", "b", 4, ends_by=200.0))
    made.add(job("head", shape(8), queue="q", at=0.0))
    made.add(job("endless", shape(4), queue="q", at=1.0))
    made.add(job("short", shape(4), queue="q", at=2.0, run=90.0))

    assert planned(made) == {"short": "b"}


def test_a_job_larger_than_its_queues_quota_blocks_nobody() -> None:
    made = world(node("a", 64))
    made.put_queue(model.Queue(name="q", nominal_cpus=10))
    made.add(job("never", shape(11), queue="q", at=0.0))
    made.add(job("x", shape(10), queue="q", at=1.0))

    assert planned(made) == {"x": "a"}


def test_a_smaller_quota_stops_new_jobs_until_enough_have_ended() -> None:
    made = world(node("a", 64))
    made.put_queue(model.Queue(name="q", nominal_memory_bytes=8 * GIB))
    made.started(running("r", "a", 1, 6, queue="q"))
    made.add(job("x", shape(1, 2), queue="q"))
    made.put_queue(model.Queue(name="q", nominal_memory_bytes=4 * GIB))

    assert planned(made) == {}
    assert made.usage("q") == model.Resources(1, 6 * GIB)
    made.ended("r")
    assert planned(made) == {"x": "a"}


def test_several_blocked_jobs_of_different_shapes_have_a_node_each() -> None:
    made = world(node("a", 8, labels={"gpu": "yes"}), node("b", 16))
    made.started(running("service", "a", 2))
    made.started(running("r", "b", 14, ends_by=50.0))
    made.add(job("gpu", shape(8, selector=(("gpu", "yes"),)), at=0.0))
    made.add(job("large", shape(16), at=1.0))
    made.add(job("endless", shape(1), at=2.0))

    assert planned(made) == {}
    assert made.explain("large", 0.0).starts_by == 50.0


def test_every_node_is_counted_under_one_reason() -> None:
    made = world(
        *(node(f"full{number}", used=(6, 0)) for number in range(4)),
        node("d1", openness=model.Openness.DRAINING),
        node("d2", openness=model.Openness.DRAINING, labels={"zone": "a"}),
        node("other", labels={"zone": "b"}),
    )
    for number in range(4):
        made.put_node(node(f"full{number}", used=(6, 0), labels={"zone": "a"}))
    made.add(job("before", shape(8, selector=(("zone", "a"),)), at=-1.0))
    made.add(job("x", shape(4, selector=(("zone", "a"),))))

    told = made.explain("x", 0.0)

    assert told.summary == "7 nodes: 4 lack 4 CPUs, 2 draining, 1 wrong label"
    assert (told.place_in_line, told.line_length, told.starts_by, told.node) == (2, 2, None, "")


def test_all_other_reasons_have_their_words() -> None:
    made = world(
        node("a", openness=model.Openness.NOT_READY),
        node("b", templates=()),
        node("c", 1),
        node("d", 8, 64, used=(0, 60)),
    )
    made.add(job("x", shape(2, 8)))

    assert made.explain("x", 0.0).summary == (
        "4 nodes: 1 not ready, 1 without template run, 1 too small, 1 lacks 8.0 GB"
    )


def test_a_job_in_backoff_is_told_so() -> None:
    made = world(node("a"))
    made.add(job("x", not_before=12.0))

    told = made.explain("x", 2.0)

    assert told.held_back is model.HeldBack.BACKOFF
    assert told.summary == "1 node: 1 has room; it is tried again in 10.0 s"
    assert told.place_in_line == 0


def test_what_no_known_node_could_ever_hold_is_told_at_once() -> None:
    made = world(node("a", 8), node("b", 16, openness=model.Openness.DRAINING))
    made.put_queue(model.Queue(name="q", nominal_cpus=4))

    assert made.check(shape(16), "default") is None
    too_large = made.check(shape(17), "default")
    over_quota = made.check(shape(5), "q")
    assert too_large is not None
    assert too_large.summary == "2 nodes: 2 too small"
    assert over_quota is not None
    assert over_quota.held_back_detail == "queue q has a quota of 4 CPUs, 5 needed"
    nowhere = world().check(shape(1), "default")
    assert nowhere is not None
    assert nowhere.summary == "no nodes are known"


def test_a_rehearsal_says_where_and_leaves_nothing() -> None:
    made = world(node("a", 4))
    made.add(job("x", shape(2), at=0.0))

    assert made.rehearse(job("y", shape(2), at=1.0), 0.0).node == "a"
    assert made.rehearse(job("y", shape(3), at=1.0), 0.0).summary == "1 node: 1 lacks 3 CPUs"
    assert planned(made) == {"x": "a"}
    with pytest.raises(errors.NotFound):
        made.explain("y", 0.0)


def test_templates_and_queues_are_known_while_they_are_there() -> None:
    made = world(node("a", templates=("run", "train")))
    made.put_queue(model.Queue(name="batch", nominal_cpus=3))

    assert made.has_template("train")
    assert [queue.name for queue in made.queues()] == ["batch", "default"]
    made.remove_node("a")
    made.remove_queue("batch")
    assert not made.has_template("train")
    assert [queue.name for queue in made.queues()] == ["default"]


def test_what_runs_on_a_node_that_went_counts_in_its_queue_and_ends_there() -> None:
    made = world(node("a"))
    made.put_queue(model.Queue(name="q", nominal_cpus=1))
    made.started(running("r", "a", 1, queue="q"))
    made.remove_node("a")
    made.put_node(node("b"))
    made.add(job("x", queue="q"))

    assert planned(made) == {}
    made.ended("r")
    assert planned(made) == {"x": "b"}


def test_a_large_group_of_nodes_is_served_from_the_index() -> None:
    made = world(*(node(f"n{number:03}", used=(number % 8, 0)) for number in range(200)))
    made.add(job("pack", shape(3)))
    made.add(job("spread", shape(3, spreading=model.Spreading.SPREAD)))
    made.add(job("memory", shape(1, 65)))

    assert planned(made) == {"pack": "n005", "spread": "n192"}


def test_one_plan_places_no_more_than_was_asked_for() -> None:
    made = world(node("a", 64))
    for number in range(10):
        made.add(job(f"j{number}"))

    assert len(made.plan(0.0, most=3)) == 3


def crowded() -> scheduler.Scheduler:
    """Four nodes with 4 CPUs free until 100 s, each kept for a job that needs nearly all of it by then."""
    made = world(*(node(f"n{number}", cpus=10) for number in range(4)))
    for number in range(4):
        made.started(running(f"r{number}", f"n{number}", 6, ends_by=100.0))
        made.add(job(f"head{number}", shape(7 + number), priority=9))
    made.add(job("long", shape(4), run=1000.0))
    assert made.plan(0.0) == made.plan(0.0) == []
    return made


def test_a_short_job_passes_where_those_like_it_were_kept_out() -> None:
    made = crowded()
    made.add(job("short", shape(4), at=1.0, run=50.0))

    assert [placed.job_id for placed in made.plan(0.0)] == ["short"]


def test_those_kept_out_go_where_room_comes_that_is_kept_for_nobody() -> None:
    made = crowded()
    made.put_node(node("n4", cpus=4))

    assert made.plan(0.0) == [model.Placement("long", "n4")]


def test_those_kept_out_pass_once_what_is_kept_is_for_others() -> None:
    made = crowded()
    made.remove("head3")
    made.add(job("head4", shape(5), priority=9))

    assert [placed.job_id for placed in made.plan(0.0)] == ["long"]
