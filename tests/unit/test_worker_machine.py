"""A pool's workers over time: stop contracts, victims, restarts, adoption. Time is an input."""

import dataclasses

import pytest
import worker_scene
from leasehold.core import errors
from leasehold.core.node import model, start_gate, stopping, worker_effects, worker_records
from leasehold.core.node.model import ExitCause, WorkerState
from worker_scene import Scene, exited, killed


def test_workers_start_one_second_apart() -> None:
    scene = Scene()
    scene.resize(3)
    counts = []
    for _ in range(4):
        counts.append(len(scene.alive))
        scene.pass_time(1.0)

    assert counts == [1, 2, 3, 3]
    assert [worker.start.name for worker in scene.alive.values()] == ["p_1@r620", "p_2@r620", "p_3@r620"]


def test_nothing_happens_before_the_first_size_is_known() -> None:
    scene = Scene()
    scene.run(2)
    scene.succeed_agent()
    scene.pass_time(100.0)

    assert [worker.signals for worker in scene.alive.values()] == [[], []]
    assert scene.machine.count(WorkerState.RUNNING) == 2


def test_an_idle_worker_goes_first_then_the_newest_and_one_at_a_time() -> None:
    scene = Scene()
    first, second, third, fourth = scene.run(4)
    for worker_id in (first, third, fourth):
        scene.machine.activity(scene.now, worker_id, True, f"task-{worker_id}", "work")
    scene.machine.activity(scene.now, second, False)

    scene.resize(1)
    assert [scene.state(worker_id) for worker_id in (first, second, third, fourth)] == [
        WorkerState.RUNNING,
        WorkerState.STOPPING,
        WorkerState.RUNNING,
        WorkerState.RUNNING,
    ]
    scene.machine.tick(scene.now)
    scene.drive()
    assert scene.machine.count(WorkerState.STOPPING) == 1
    scene.tell_ended(second, exited(0))
    scene.pass_time(50.0)
    assert scene.state(fourth) is WorkerState.STOPPING
    assert scene.state(third) is WorkerState.RUNNING
    scene.tell_ended(fourth, exited(0))
    scene.tell_ended(third, exited(0))

    assert list(scene.alive) == [first]
    assert scene.alive[first].signals == []


def test_where_memory_is_short_all_go_at_once_and_busy_ones_give_their_tasks_back() -> None:
    scene = Scene()
    first, second, third = scene.run(3)
    for worker_id in (first, third):
        scene.machine.activity(scene.now, worker_id, True, "task", "work")
    scene.machine.activity(scene.now, second, False)

    scene.resize(1, is_urgent=True)

    assert scene.alive[second].signals == ["TERM"]
    assert scene.alive[first].signals == []
    assert scene.alive[third].signals == ["QUIT"]


def test_the_stop_contract_is_climbed_step_by_step_to_the_kill() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.resize(0)
    assert (scene.view(worker_id).stop_step, scene.view(worker_id).stop_step_remaining_seconds) == (
        "TERM",
        100.0,
    )

    scene.pass_time(99.9)
    assert scene.alive[worker_id].signals == ["TERM"]
    scene.pass_time(0.1)
    assert scene.alive[worker_id].signals == ["TERM", "QUIT"]
    scene.pass_time(9.9)
    assert scene.state(worker_id) is WorkerState.STOPPING
    scene.pass_time(0.1)
    assert scene.state(worker_id) is WorkerState.KILLING
    assert scene.view(worker_id).stop_step == "KILL"
    scene.tell_ended(worker_id, killed())

    ended = scene.kept[worker_id]
    assert (ended.cause, ended.signal) == (ExitCause.STOPPED, 9)
    assert ended.in_doubt_until_seconds == 1e9 + 4500.0


def test_a_kill_that_does_not_work_is_told_again() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.machine.stop_all(scene.now, is_immediate=True)
    scene.drive()
    scene.pass_time(10.0)
    scene.alive[worker_id].is_killed = False

    scene.pass_time(stopping.KILL_AGAIN_SECONDS)

    assert scene.alive[worker_id].is_killed


def test_an_immediate_stop_begins_where_the_task_is_given_back_and_skips_the_wait_for_it() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.stop_worker(scene.now, scene.view(first).name)
    scene.drive()
    assert scene.alive[first].signals == ["TERM"]

    scene.machine.stop_all(scene.now, is_immediate=True)
    scene.drive()

    assert scene.alive[first].signals == ["TERM", "QUIT"]
    assert scene.alive[second].signals == ["QUIT"]


def test_a_worker_that_was_idle_leaves_no_doubt_when_it_is_killed() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.activity(scene.now, first, False)
    scene.machine.activity(scene.now, second, True, "task-7", "work")
    scene.tell_ended(first, killed())
    scene.tell_ended(second, killed(ExitCause.OOM_KILLED))

    assert scene.kept[first].in_doubt_until_seconds == 0
    assert scene.kept[second].in_doubt_until_seconds == 1e9 + 4500.0
    assert scene.kept[second].task_id == "task-7"
    assert scene.machine.totals.in_doubt == 1


def test_stopping_a_worker_before_it_has_started_waits_for_its_process() -> None:
    scene = Scene()
    scene.resize(1)
    (worker_id,) = scene.alive
    scene.resize(0)
    assert scene.state(worker_id) is WorkerState.STOPPING

    scene.tell_started(worker_id)

    assert scene.alive[worker_id].signals == ["TERM"]


def test_a_worker_that_does_not_start_in_time_is_killed_and_replaced_after_a_backoff() -> None:
    scene = Scene()
    scene.resize(1)
    (worker_id,) = scene.alive
    scene.pass_time(30.0)
    assert scene.state(worker_id) is WorkerState.KILLING
    del scene.alive[worker_id]
    scene.machine.start_failed(scene.now, worker_id, "its shim ended before it could start it")
    scene.drive()
    assert scene.alive == {}
    scene.pass_time(0.5)

    assert [worker.start.name for worker in scene.alive.values()] == ["p_1@r620"]


def test_an_agent_that_was_frozen_over_the_time_to_start_hears_first_whether_the_worker_runs() -> None:
    """The word of a start may be waiting for it when it wakes; it gets a little more time, once."""
    scene = Scene()
    scene.resize(2)
    scene.pass_time(1.0)
    late, silent = scene.alive
    scene.now += 60.0
    scene.machine.tick(scene.now)
    scene.drive()
    scene.tell_started(late)
    scene.pass_time(4.9)
    assert [scene.state(late), scene.state(silent)] == [WorkerState.RUNNING, WorkerState.STARTING]

    scene.now += 60.0
    scene.machine.tick(scene.now)
    scene.drive()

    assert [scene.state(late), scene.state(silent)] == [WorkerState.RUNNING, WorkerState.KILLING]


def test_a_worker_that_is_stopped_by_hand_keeps_its_place_until_it_has_ended() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.replace(scene.now, scene.view(first).name, "over 90 % of its limit")
    scene.drive()
    scene.pass_time(50.0)
    assert set(scene.alive) == {first, second}

    scene.tell_ended(first, exited(0))
    scene.pass_time(1.0)

    assert scene.kept[first].cause is ExitCause.STOPPED
    assert [worker.start.name for worker in scene.alive.values()] == ["p_2@r620", "p_1@r620"]


def test_one_that_is_being_replaced_is_not_replaced_when_fewer_are_wanted() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.stop_worker(scene.now, scene.view(first).name)
    scene.drive()
    scene.resize(1)
    assert scene.alive[second].signals == []
    scene.tell_ended(first, exited(0))
    scene.pass_time(10.0)

    assert list(scene.alive) == [second]


def test_backoff_doubles_to_its_limit_and_begins_anew_after_a_clean_spell() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    delays = []
    for _ in range(9):
        scene.pass_time(1.0)
        scene.tell_ended(worker_id, exited(1))
        delay = scene.machine.backoff_remaining(scene.now)
        assert delay is not None and scene.alive == {}
        delays.append(delay)
        scene.pass_time(delay + 1.0)
        scene.start_all()
        (worker_id,) = scene.alive
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert scene.machine.totals.crashes == 9

    scene.pass_time(60.0)
    assert scene.machine.failures == 0
    assert "pool_backoff_over" in scene.events()
    scene.tell_ended(worker_id, exited(1))

    assert scene.machine.backoff_remaining(scene.now) == 0.5


def test_jitter_takes_off_up_to_a_quarter_and_never_adds() -> None:
    scene = Scene(chance=0.999)
    (worker_id,) = scene.run(1)
    scene.tell_ended(worker_id, exited(1))

    assert scene.machine.backoff_remaining(scene.now) == pytest.approx(0.375, abs=0.001)


def test_workers_that_fail_together_count_as_one_failure() -> None:
    """The broker went away: all eight end, and all come back soon."""
    scene = Scene()
    for worker_id in scene.run(8):
        scene.tell_ended(worker_id, exited(1))

    assert scene.machine.failures == 1
    assert scene.machine.totals.crashes == 8
    assert scene.machine.backoff_remaining(scene.now) == 0.5


def test_oom_kills_are_counted_apart_and_slow_the_restart_too() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.oom_killed(scene.now, first, 2)
    scene.drive()
    scene.tell_ended(second, killed(ExitCause.OOM_KILLED))

    assert scene.machine.totals == worker_records.Totals(starts=2, oom_kills=3, in_doubt=1)
    assert scene.machine.backoff_remaining(scene.now) == 0.5


def test_a_clean_exit_is_followed_by_a_start_at_once_unless_it_goes_round_and_round() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    backoffs = []
    for _ in range(5):
        scene.pass_time(1.0)
        scene.tell_ended(worker_id, exited(0))
        backoffs.append(scene.machine.backoff_remaining(scene.now))
        scene.pass_time(2.0)
        scene.start_all()
        (worker_id,) = scene.alive
    assert backoffs == [None, None, None, 0.5, 1.0]

    scene.pass_time(5.0)
    scene.tell_ended(worker_id, exited(0))

    assert scene.machine.backoff_remaining(scene.now) is None
    assert len(scene.alive) == 1
    assert scene.machine.totals.crashes == 0


def test_an_exit_code_that_is_declared_permanent_blocks_the_pool_until_a_person_ends_that() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.tell_ended(first, exited(125))
    scene.pass_time(1000.0)
    assert scene.kept[first].cause is ExitCause.PERMANENT
    assert "ended with code 125" in scene.machine.blocked_reason
    assert list(scene.alive) == [second]

    scene.machine.unblock(scene.now)
    scene.drive()

    assert scene.machine.blocked_reason == ""
    assert len(scene.alive) == 2


def test_the_same_code_after_a_stop_order_blocks_nothing() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.machine.stop_worker(scene.now, scene.view(worker_id).name)
    scene.drive()
    scene.tell_ended(worker_id, exited(125))

    assert scene.kept[worker_id].cause is ExitCause.STOPPED
    assert scene.machine.blocked_reason == ""


def test_a_pool_that_starts_for_ever_leaves_every_second_start_to_another() -> None:
    gate = start_gate.StartGate(1.0)
    policy = model.RestartPolicy(initial_seconds=0.0, max_seconds=0.0)
    looping = Scene(worker_scene.spec(name="looping", restart=policy), gate=gate)
    calm = Scene(worker_scene.spec(name="calm"), gate=gate)
    looping.resize(4)
    calm.resize(4)
    for _ in range(8):
        for scene in (looping, calm):
            scene.now += 1.0
            scene.last_start = float("-inf")
            scene.machine.tick(scene.now)
            scene.drive()
        for worker_id in list(looping.alive):
            looping.tell_ended(worker_id, exited(1))

    assert len(calm.alive) == 4


def test_a_pool_in_its_backoff_does_not_keep_the_start_from_another() -> None:
    gate = start_gate.StartGate(1.0)
    looping, calm = (
        Scene(worker_scene.spec(name="looping"), gate=gate),
        Scene(worker_scene.spec(name="calm"), gate=gate),
    )
    for worker_id in looping.run(1):
        looping.tell_ended(worker_id, exited(1))
    calm.now = looping.now
    calm.last_start = float("-inf")
    calm.resize(2)
    calm.pass_time(2.0)

    assert len(calm.alive) == 2


def test_an_unknown_end_is_never_taken_for_a_clean_one() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.resize(0)
    scene.tell_ended(worker_id, model.WorkerExit(cause=ExitCause.UNKNOWN, end_time_seconds=1e9))

    assert scene.kept[worker_id].cause is ExitCause.UNKNOWN
    assert scene.kept[worker_id].exit_code is None
    assert scene.kept[worker_id].in_doubt_until_seconds == 1e9 + 4500.0


def test_one_that_was_not_wanted_any_more_is_no_failure_however_it_ended() -> None:
    """Killed before its shim told a process, or with its shim gone: neither slows down the next start."""
    scene = Scene(worker_scene.spec(stop=model.StopContract(steps=())))
    scene.resize(1)
    (not_started,) = scene.alive
    scene.resize(0)
    scene.tell_ended(not_started, model.WorkerExit(cause=ExitCause.NOT_STARTED))
    scene.now += 1.0
    (unseen,) = scene.run(1)
    scene.resize(0)
    scene.tell_ended(unseen, model.WorkerExit(cause=ExitCause.UNKNOWN))

    assert scene.kept[not_started].cause is ExitCause.STOPPED
    assert scene.kept[unseen].cause is ExitCause.UNKNOWN
    assert scene.machine.totals.crashes == 0
    assert scene.machine.backoff_remaining(scene.now) is None


def test_a_worker_over_its_limit_is_killed_with_that_as_the_cause() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.machine.kill(scene.now, scene.view(worker_id).name, "4.1 GiB of 4.0")
    scene.drive()
    scene.pass_time(10.0)
    assert list(scene.alive) == [worker_id]
    scene.tell_ended(worker_id, killed())

    assert scene.kept[worker_id].cause is ExitCause.MEMORY_LIMIT
    assert "4.1 GiB of 4.0" in scene.kept[worker_id].detail
    assert scene.machine.totals.memory_limit_kills == 1


def test_an_adopted_worker_goes_on_with_the_stop_that_an_earlier_agent_began() -> None:
    scene = Scene()
    first, second = scene.run(2)
    scene.machine.stop_worker(scene.now, scene.view(first).name)
    scene.drive()
    scene.pass_time(60.0)

    scene.succeed_agent()
    assert scene.state(first) is WorkerState.STOPPING
    assert scene.view(first).stop_step_remaining_seconds == 40.0
    scene.resize(2)
    scene.pass_time(40.0)

    assert scene.alive[first].signals == ["TERM", "QUIT"]
    assert scene.alive[second].signals == []


def test_a_signal_that_an_earlier_agent_may_not_have_sent_is_sent_by_the_next() -> None:
    scene = Scene()
    worker = worker_scene.HostWorker(worker_effects.Start("id9", "p_1@r620", 1, 7), 55)
    scene.alive["id9"] = worker
    stopping_then = worker_records.StopProgress(
        contract=scene.machine.spec.stop, step=0, remaining_seconds=60.0, is_replaced=True, is_sent=False
    )
    scene.machine.adopt(scene.now, dataclasses.replace(scene.record("id9", worker), stopping=stopping_then))
    scene.drive()

    assert worker.signals == ["TERM"]
    assert scene.view("id9").stop_step_remaining_seconds == 100.0
    assert scene.view("id9").is_replaced


def test_an_adopted_worker_that_died_meanwhile_counts_once() -> None:
    scene = Scene()
    record = dataclasses.replace(
        scene.record("id9", worker_scene.HostWorker(worker_effects.Start("id9", "p_3@r620", 3, 7), 55)),
        exit=exited(4),
    )
    scene.machine.adopt(0.0, record)
    scene.drive()
    assert scene.machine.totals.crashes == 1
    assert scene.kept["id9"].exit_code == 4
    assert scene.machine.start_number == 7

    again = Scene()
    again.machine.adopt(0.0, dataclasses.replace(record, is_exit_counted=True))
    again.drive()

    assert again.machine.totals.crashes == 0
    assert again.view("id9").exit == exited(4)


def test_two_living_workers_of_one_name_are_not_adopted() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    record = dataclasses.replace(scene.record(worker_id, scene.alive[worker_id]), worker_id="other")

    with pytest.raises(errors.AlreadyExists, match="p_1@r620"):
        scene.machine.adopt(scene.now, record)


def test_workers_that_ended_are_shown_for_a_while() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.resize(0)
    scene.tell_ended(worker_id, exited(0))
    assert scene.view(worker_id).state is WorkerState.EXITED

    scene.pass_time(300.0)

    assert scene.machine.workers(scene.now) == []
    assert scene.forgotten == {worker_id}


def test_what_is_told_twice_or_of_nobody_changes_nothing() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.machine.ended(scene.now, "nobody", exited(1))
    scene.machine.started(scene.now, worker_id, worker_scene.process(999), None)
    assert scene.drive() == []
    scene.tell_ended(worker_id, exited(1))
    scene.machine.ended(scene.now, worker_id, exited(0))
    scene.drive()

    assert scene.kept[worker_id].exit_code == 1
    assert scene.machine.totals.crashes == 1


@pytest.mark.parametrize("desired", [-1, 1001])
def test_a_size_out_of_range_is_refused_and_changes_nothing(desired: int) -> None:
    scene = Scene()
    scene.run(1)
    with pytest.raises(errors.InvalidArgument, match="0 to 1000") as caught:
        scene.machine.resize(scene.now, desired)

    assert caught.value.field == "workers"
    assert scene.machine.desired == 1


def test_a_name_that_nobody_has_is_told() -> None:
    with pytest.raises(errors.NotFound, match="p_9@r620"):
        Scene().machine.stop_worker(0.0, "p_9@r620")


def test_an_illegal_move_raises_with_the_story() -> None:
    scene = Scene()
    (worker_id,) = scene.run(1)
    scene.tell_ended(worker_id, exited(1))
    life = scene.machine._workers[worker_id]

    with pytest.raises(errors.FailedPrecondition, match=r"from exited to running: .*running -> exited"):
        life.move(scene.now, WorkerState.RUNNING)
