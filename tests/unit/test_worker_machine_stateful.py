"""Hypothesis drives a pool's machine: any order of sizes, stops, ends, late and lost starts, agent successions.

The pretended host checks each effect as it comes (nobody runs twice under a name, nobody who is gone is
signalled, starts are spaced, no start while blocked), and the invariants run after every step.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause, WorkerState
from worker_scene import CELERY_STOP, Scene, exited, killed, spec

STOPS = (
    CELERY_STOP,
    model.PLAIN_STOP,
    model.StopContract(steps=()),
    model.StopContract(steps=CELERY_STOP.steps, immediate_step=2),
)
EXITS = (exited(0), exited(1), exited(125), killed(), killed(ExitCause.OOM_KILLED))
UNKNOWN = model.WorkerExit(cause=ExitCause.UNKNOWN, end_time_seconds=1e9)


class PoolOnAHost(RuleBasedStateMachine):
    """Rules are what people, workers and the kernel may do; time passes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        #: What was asked of the present agent; None: nothing yet.
        self.wanted: int | None = None

    def _one(self, index: int) -> str | None:
        ids = list(self.scene.alive)
        return ids[index % len(ids)] if ids else None

    @rule(stop=st.sampled_from(STOPS), chance=st.sampled_from([0.0, 0.5, 0.99]))
    def reconfigure(self, stop: model.StopContract, chance: float) -> None:
        self.scene.chance = chance
        self.scene.spec = spec(stop=stop)
        self.scene.machine.reconfigure(self.scene.now, self.scene.spec)
        self.scene.drive()

    @rule(desired=st.integers(0, 6), is_urgent=st.booleans())
    def resize(self, desired: int, is_urgent: bool) -> None:
        self.wanted = desired
        self.scene.resize(desired, is_urgent=is_urgent)

    @rule(seconds=st.sampled_from([0.01, 0.6, 1.0, 5.0, 31.0, 70.0, 400.0]))
    def pass_time(self, seconds: float) -> None:
        self.scene.pass_time(seconds)

    @rule(index=st.integers(0, 10))
    def start(self, index: int) -> None:
        worker_id = self._one(index)
        if worker_id is not None and not self.scene.alive[worker_id].pid:
            self.scene.tell_started(worker_id)

    @rule(index=st.integers(0, 10))
    def fail_to_start(self, index: int) -> None:
        worker_id = self._one(index)
        if worker_id is not None and not self.scene.alive[worker_id].pid:
            del self.scene.alive[worker_id]
            self.scene.machine.start_failed(self.scene.now, worker_id, "no space left on device")
            self.scene.drive()

    @rule(index=st.integers(0, 10), worker_exit=st.sampled_from([*EXITS, UNKNOWN]))
    def end(self, index: int, worker_exit: model.WorkerExit) -> None:
        worker_id = self._one(index)
        if worker_id is not None:
            self.scene.tell_ended(worker_id, worker_exit)

    @rule(index=st.integers(0, 10), is_busy=st.sampled_from([None, False, True]))
    def tell_activity(self, index: int, is_busy: bool | None) -> None:
        worker_id = self._one(index)
        if worker_id is not None:
            self.scene.machine.activity(self.scene.now, worker_id, is_busy, "task" if is_busy else "")

    @rule(index=st.integers(0, 10), is_immediate=st.booleans())
    def stop_one(self, index: int, is_immediate: bool) -> None:
        worker_id = self._one(index)
        if worker_id is not None:
            name = self.scene.alive[worker_id].start.name
            self.scene.machine.stop_worker(self.scene.now, name, is_immediate=is_immediate)
            self.scene.drive()

    @rule(index=st.integers(0, 10))
    def kill_one(self, index: int) -> None:
        worker_id = self._one(index)
        if worker_id is not None:
            self.scene.machine.kill(self.scene.now, self.scene.alive[worker_id].start.name, "over its limit")
            self.scene.drive()

    @rule(is_immediate=st.booleans())
    def stop_all(self, is_immediate: bool) -> None:
        self.wanted = 0
        self.scene.machine.stop_all(self.scene.now, is_immediate=is_immediate)
        self.scene.drive()

    @rule()
    def block(self) -> None:
        self.scene.machine.block(self.scene.now, "the broker cannot be reached")
        self.scene.drive()

    @rule()
    def unblock(self) -> None:
        self.scene.machine.unblock(self.scene.now)
        self.scene.drive()

    @rule()
    def succeed_agent(self) -> None:
        self.wanted = None
        self.scene.succeed_agent()

    @precondition(lambda self: self.wanted is not None)
    @rule()
    def settle(self) -> None:
        """From any state, on a host that answers, the pool comes to the wanted size, and stays there."""
        scene = self.scene
        scene.machine.unblock(scene.now)
        scene.drive()
        for _ in range(200):
            scene.start_all()
            for worker_id in list(scene.alive):
                if scene.state(worker_id) in (WorkerState.STOPPING, WorkerState.KILLING):
                    scene.tell_ended(worker_id, exited(0))
            if scene.machine.count(WorkerState.RUNNING) == self.wanted == len(scene.alive):
                break
            scene.pass_time(1.0)
        assert scene.machine.count(WorkerState.RUNNING) == self.wanted == len(scene.alive)
        before = list(scene.alive)
        scene.pass_time(500.0)
        assert list(scene.alive) == before
        assert [scene.state(worker_id) for worker_id in before] == [WorkerState.RUNNING] * len(before)

    @invariant()
    def holds(self) -> None:
        self.scene.check()
        shown = {view.worker_id for view in self.scene.machine.workers(self.scene.now)}
        assert set(self.scene.alive) <= shown
        for worker_id, worker in self.scene.alive.items():
            assert self.scene.state(worker_id) in model.ALIVE_STATES
            if worker.pid:
                assert self.scene.state(worker_id) is not WorkerState.STARTING


TestPoolOnAHost = PoolOnAHost.TestCase
TestPoolOnAHost.settings = settings(max_examples=150, stateful_step_count=40)
