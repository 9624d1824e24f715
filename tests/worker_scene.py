"""A pretended host for a pool's machine: its processes, and what the driver does with the machine's effects."""

import itertools
from dataclasses import dataclass, field

from leasehold.core import processes
from leasehold.core.node import invariants, model, start_gate, worker_effects, worker_machine, worker_records
from leasehold.core.node.model import ExitCause, StopContract, StopStep, WorkerState

NODE = "r620"
CELERY_STOP = StopContract(
    steps=(StopStep(signal="TERM", wait_seconds=100.0), StopStep(signal="QUIT", wait_seconds=10.0)),
    immediate_step=1,
    visibility_timeout_seconds=4500.0,
)


def spec(
    *,
    name: str = "p",
    stop: StopContract = CELERY_STOP,
    restart: model.RestartPolicy = model.RestartPolicy(),  # noqa: B008
) -> model.PoolSpec:
    return model.PoolSpec(
        name=name,
        template="command",
        min_workers=0,
        max_workers=8,
        worker_limit_bytes=model.GIB,
        threshold_bytes=0,
        stop=stop,
        restart=restart,
    )


def process(pid: int) -> processes.ProcessKey:
    return processes.ProcessKey("boot", 1, pid, pid)


def exited(code: int) -> model.WorkerExit:
    cause = ExitCause.CLEAN if code == 0 else ExitCause.CRASHED
    return model.WorkerExit(cause=cause, exit_code=code, detail=f"exit code {code}", end_time_seconds=1e9)


def killed(cause: ExitCause = ExitCause.CRASHED) -> model.WorkerExit:
    return model.WorkerExit(cause=cause, signal=9, detail="ended by SIGKILL", end_time_seconds=1e9)


@dataclass
class HostWorker:
    """A worker's process on the pretended host."""

    start: worker_effects.Start
    pid: int = 0
    signals: list[str] = field(default_factory=list)
    is_killed: bool = False
    step: worker_effects.SendSignal | None = None


class Scene:
    """One pool on one host. Every effect is checked as it comes out; `check` runs the invariants."""

    def __init__(
        self,
        declared: model.PoolSpec | None = None,
        *,
        gate: start_gate.StartGate | None = None,
        chance: float = 0.0,
    ) -> None:
        self.spec = declared or spec()
        self.gate = gate or start_gate.StartGate()
        self.chance = chance
        self.now = 0.0
        self.ids = (f"id{number}" for number in itertools.count(1))
        self.pids = itertools.count(101)
        self.alive: dict[str, HostWorker] = {}
        self.notes: list[worker_effects.Note] = []
        self.kept: dict[str, model.WorkerExit] = {}
        self.forgotten: set[str] = set()
        self.last_start = float("-inf")
        self.machine = self.new_machine()

    def new_machine(self, start_number: int = 0) -> worker_machine.PoolMachine:
        return worker_machine.PoolMachine(
            self.spec,
            NODE,
            new_id=lambda: next(self.ids),
            chance=lambda: self.chance,
            gate=self.gate,
            start_number=start_number,
        )

    # The driver

    def drive(self) -> list[worker_effects.Effect]:
        """Execute what the machine wants; what that was."""
        effects = self.machine.take_effects()
        for effect in effects:
            self._execute(effect)
        self.check()
        return effects

    def check(self) -> None:
        assert invariants.violations(self.machine, self.now) == []

    def _execute(self, effect: worker_effects.Effect) -> None:
        match effect:
            case worker_effects.Start():
                names = [worker.start.name for worker in self.alive.values()]
                assert effect.name not in names, f"{effect.name} would run twice"
                assert self.now - self.last_start >= self.gate.spacing_seconds
                assert not self.machine.blocked_reason
                assert self.machine.backoff_remaining(self.now) is None
                self.last_start = self.now
                self.alive[effect.worker_id] = HostWorker(effect)
            case worker_effects.SendSignal():
                worker = self.alive[effect.worker_id]
                assert worker.pid, "nobody to signal"
                assert self.state(effect.worker_id) is WorkerState.STOPPING
                worker.signals.append(effect.signal)
                worker.step = effect
            case worker_effects.KillAll():
                assert self.state(effect.worker_id) is WorkerState.KILLING
                self.alive[effect.worker_id].is_killed = True
            case worker_effects.KeepExit():
                assert effect.worker_id not in self.alive
                self.kept[effect.worker_id] = effect.exit
            case worker_effects.Forget():
                assert effect.worker_id not in self.alive
                self.forgotten.add(effect.worker_id)
            case worker_effects.Note():
                assert tuple(effect.fields) == worker_effects.EVENTS[effect.event]
                self.notes.append(effect)

    # What happens

    def pass_time(self, seconds: float) -> None:
        """Let time pass; the machine is ticked whenever it asked for it."""
        until = self.now + seconds
        while (deadline := self.machine.next_deadline()) <= until:
            assert deadline > self.now or self.gate is not None
            self.now = max(self.now, deadline)
            before = deadline
            self.machine.tick(self.now)
            self.drive()
            assert self.machine.next_deadline() > before, "the machine asks for the same tick again"
        self.now = until

    def resize(self, desired: int, *, is_urgent: bool = False) -> None:
        self.machine.resize(self.now, desired, is_urgent)
        self.drive()

    def tell_started(self, worker_id: str) -> None:
        worker = self.alive[worker_id]
        worker.pid = next(self.pids)
        self.machine.started(self.now, worker_id, process(worker.pid), process(worker.pid + 100_000))
        self.drive()

    def start_all(self) -> None:
        """Every worker that was asked for starts."""
        for worker_id in [worker_id for worker_id, worker in self.alive.items() if not worker.pid]:
            self.tell_started(worker_id)

    def run(self, desired: int) -> list[str]:
        """Have so many running workers; their ids, oldest first."""
        self.resize(desired)
        for _ in range(desired):
            self.pass_time(1.0)
            self.start_all()
        return list(self.alive)

    def tell_ended(self, worker_id: str, worker_exit: model.WorkerExit) -> None:
        del self.alive[worker_id]
        self.machine.ended(self.now, worker_id, worker_exit)
        self.drive()

    def succeed_agent(self) -> None:
        """The agent goes and another adopts what runs."""
        self.gate = start_gate.StartGate(self.gate.spacing_seconds)
        self.last_start = float("-inf")
        self.machine = self.new_machine()
        for worker_id, worker in self.alive.items():
            self.machine.adopt(self.now, self.record(worker_id, worker))
            self.drive()

    def record(self, worker_id: str, worker: HostWorker) -> worker_records.AdoptedWorker:
        stopping = None
        if worker.is_killed:
            stopping = worker_records.StopProgress(
                contract=self.spec.stop, step=len(self.spec.stop.steps), remaining_seconds=0.0
            )
        elif worker.step is not None:
            remaining = worker.step.until_seconds - self.now
            stopping = worker_records.StopProgress(
                contract=worker.step.contract,
                step=worker.step.step,
                remaining_seconds=remaining,
                is_replaced=worker.step.is_replaced,
            )
        return worker_records.AdoptedWorker(
            worker_id=worker_id,
            name=worker.start.name,
            pool=self.spec.name,
            number=worker.start.number,
            start_number=worker.start.start_number,
            process=process(worker.pid) if worker.pid else None,
            shim=None,
            uptime_seconds=1.0,
            stop=self.spec.stop,
            stopping=stopping,
        )

    # Reading

    def view(self, worker_id: str) -> worker_records.WorkerView:
        return next(view for view in self.machine.workers(self.now) if view.worker_id == worker_id)

    def state(self, worker_id: str) -> WorkerState:
        return self.view(worker_id).state

    def events(self) -> list[str]:
        return [note.event for note in self.notes]
