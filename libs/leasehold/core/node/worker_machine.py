"""One pool's workers: when they start, restart and end.

Events go in by the methods, with the time; effects come out of `take_effects`. The driver

1. calls `adopt` for each worker of an earlier agent, before the first `resize`;
2. after every event executes `take_effects`, in order, before it gives the next event;
3. calls `tick` at `next_deadline` at the latest, on every machine of the host, since they share a `StartGate`;
4. tells `started`, `start_failed` and `ended` of workers as they happen, each at most once a worker.

Before the first `resize` nothing is started or stopped for size: what an earlier agent left runs on.
"""

import dataclasses
import math
from collections.abc import Callable

from leasehold.core import errors, processes
from leasehold.core.node import model, restarts, start_gate, stopping, worker_effects, worker_records
from leasehold.core.node.model import ExitCause, WorkerState
from leasehold.core.node.worker_life import WorkerLife

#: From the start of a shim to the word that its worker runs.
START_TIMEOUT_SECONDS = 30.0
#: A driver that comes so late to the end of that was frozen: the word may wait for it, so it gets some more.
FROZEN_SECONDS = 1.0
AFTER_FREEZE_SECONDS = 5.0
#: How long, and how many of, the workers that ended are shown.
EXITED_SHOWN_SECONDS = 300.0
EXITED_SHOWN_MAX = 10

_STORY_LINES_MAX = 20
_FAILURES = frozenset(
    {ExitCause.CRASHED, ExitCause.OOM_KILLED, ExitCause.MEMORY_LIMIT, ExitCause.NOT_STARTED, ExitCause.UNKNOWN}
)


class PoolMachine:
    """The workers of one pool. `new_id` gives a new UUID each time, `chance` a number from 0 up to 1."""

    def __init__(
        self,
        spec: model.PoolSpec,
        node: str,
        *,
        new_id: Callable[[], str],
        chance: Callable[[], float],
        gate: start_gate.StartGate | None = None,
        start_number: int = 0,
    ) -> None:
        self.spec = spec
        self._node = node
        self._new_id = new_id
        self._gate = gate or start_gate.StartGate()
        self._start_number = start_number
        self._restarts = restarts.Restarts(spec.restart, chance)
        self._workers: dict[str, WorkerLife] = {}
        #: None until the first `resize`.
        self._desired: int | None = None
        self._is_urgent = False
        self._effects: list[worker_effects.Effect] = []
        self._totals = worker_records.Totals()

    # What is wanted

    def resize(self, now: float, desired: int, is_urgent: bool = False) -> None:
        """Have so many workers.

        Fewer: idle ones go first, then the newest, one at a time. `is_urgent` (memory is short): all at once,
        and one that is busy gives its task back instead of finishing it. Raises `InvalidArgument` outside
        0 to 1,000.
        """
        if not 0 <= desired <= model.WORKERS_MAX:
            raise errors.InvalidArgument(f"{desired} workers: 0 to {model.WORKERS_MAX}", field="workers")
        self._desired, self._is_urgent = desired, is_urgent
        self._settle(now)

    def stop_worker(self, now: float, name: str, *, is_immediate: bool = False, why: str = "an order") -> None:
        """Stop one worker by contract; when it has ended another takes its place. Raises `NotFound`."""
        worker = self._alive(name)
        self._stop(now, worker, is_immediate=is_immediate, is_replaced=worker.is_live, why=why)
        self._settle(now)

    def replace(self, now: float, name: str, reason: str) -> None:
        """Have another in a worker's place after its current task. Raises `NotFound`."""
        self.stop_worker(now, name, why=reason)

    def kill(self, now: float, name: str, reason: str) -> None:
        """Kill a worker that is over its memory limit, where no cgroup does. Raises `NotFound`."""
        worker = self._alive(name)
        if worker.state is WorkerState.KILLING:
            return
        worker.is_replaced = worker.is_replaced or worker.is_live
        worker.killed_for = ExitCause.MEMORY_LIMIT
        self._kill(now, worker, reason)
        self._settle(now)

    def stop_all(self, now: float, *, is_immediate: bool = False, why: str = "an order") -> None:
        """Stop every worker by contract and have none, until the next `resize`."""
        self._desired = 0
        for worker in self._workers.values():
            if worker.is_alive:
                worker.is_replaced = False
                self._stop(now, worker, is_immediate=is_immediate, is_replaced=False, why=why)
        self._settle(now)

    def block(self, now: float, reason: str) -> None:
        """Start none until `unblock`; those that run go on."""
        if reason and reason != self._restarts.blocked_reason:
            self._restarts.blocked_reason = reason
            self._note("pool_blocked", pool=self.spec.name, why=reason)
        self._settle(now)

    def unblock(self, now: float) -> None:
        """Start again, at once: ends a block and the backoff."""
        if self._restarts.blocked_reason:
            self._note("pool_unblocked", pool=self.spec.name)
        self._restarts.clear()
        self._settle(now)

    def reconfigure(self, now: float, spec: model.PoolSpec) -> None:
        """Take over a changed declaration. Workers go on; a stop that has begun keeps its steps."""
        self.spec = spec
        self._restarts.policy = spec.restart
        self._settle(now)

    # What happened

    def adopt(self, now: float, record: worker_records.AdoptedWorker) -> None:
        """Take over a worker of an earlier agent. Raises `AlreadyExists` if there is one of its id or name."""
        if record.worker_id in self._workers or any(
            other.is_alive and other.name == record.name and record.exit is None
            for other in self._workers.values()
        ):
            raise errors.AlreadyExists(
                f"there is a worker {record.name} already", metadata={"id": record.worker_id}
            )
        self._start_number = max(self._start_number, record.start_number)
        worker = WorkerLife(
            record.worker_id,
            record.name,
            record.number,
            record.start_number,
            started_at=now - record.uptime_seconds,
            process=record.process,
            shim=record.shim,
            is_adopted=True,
        )
        self._workers[record.worker_id] = worker
        worker.tell(now, "adopted")
        if record.process is not None:
            worker.move(now, WorkerState.RUNNING)
        if record.exit is not None and record.is_exit_counted:
            worker.move(now, WorkerState.EXITED)
            worker.exit, worker.ended_at = record.exit, now
            return
        if record.stopping is not None:
            self._go_on_stopping(now, worker, record)
        if record.exit is not None:
            self.ended(now, record.worker_id, record.exit)
            return
        self._note(
            "worker_adopted", worker=worker.name, pid=0 if record.process is None else record.process.pid
        )
        self._settle(now)

    def started(
        self,
        now: float,
        worker_id: str,
        process: processes.ProcessKey,
        shim: processes.ProcessKey | None,
    ) -> None:
        """The shim told the worker's process. Of a worker that is not known, or was told before: nothing."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is not None or not worker.is_alive:
            return
        worker.process, worker.shim = process, shim
        self._note("worker_started", worker=worker.name, pid=process.pid)
        if worker.state is WorkerState.STARTING:
            worker.move(now, WorkerState.RUNNING)
            worker.started_at = now
        elif worker.state is WorkerState.STOPPING:
            self._carry_out(now, worker)
        else:
            self._effects.append(worker_effects.KillAll(worker_id, worker.why))
        self._settle(now)

    def start_failed(self, now: float, worker_id: str, detail: str) -> None:
        """The worker could not be started: `ended` with NOT_STARTED."""
        self.ended(now, worker_id, model.WorkerExit(cause=ExitCause.NOT_STARTED, detail=detail))

    def ended(self, now: float, worker_id: str, worker_exit: model.WorkerExit) -> None:
        """The worker's main process is dead. Of a worker that is not known, or has ended: nothing.

        `worker_exit` is what the kernel and the shim tell; what was asked of the worker is added here.
        """
        worker = self._workers.get(worker_id)
        if worker is None or not worker.is_alive:
            return
        self.oom_killed(now, worker_id, worker_exit.oom_kills)
        worker.exit = worker.judged(worker_exit, self.spec)
        worker.move(now, WorkerState.EXITED)
        worker.ended_at = now
        self._count(now, worker, worker.exit)
        worker.ladder = None
        self._effects.append(worker_effects.KeepExit(worker_id, worker.exit))
        self._note("worker_ended", worker=worker.name, cause=worker.exit.cause.value, detail=worker.exit.detail)
        self._settle(now)

    def activity(
        self, now: float, worker_id: str, is_busy: bool | None, task_id: str = "", task_name: str = ""
    ) -> None:
        """What the worker tells of itself; `is_busy` None: nothing."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.is_alive:
            worker.is_busy, worker.task_id, worker.task_name = is_busy, task_id, task_name

    def oom_killed(self, now: float, worker_id: str, count: int) -> None:
        """The OOM killer ended so many processes of a worker, other than its main process."""
        worker = self._workers.get(worker_id)
        if worker is not None and count > 0:
            worker.tell(now, f"{count} of its processes killed by the OOM killer")
            self._totals = dataclasses.replace(self._totals, oom_kills=self._totals.oom_kills + count)
            self._note("worker_oom_kill", worker=worker.name, count=count)

    def tick(self, now: float) -> None:
        """Time has passed."""
        for worker in list(self._workers.values()):
            if worker.state is WorkerState.RUNNING:
                if self._restarts.ran(now, worker.started_at):
                    self._note("pool_backoff_over", pool=self.spec.name)
            elif worker.ladder is not None and worker.is_alive:
                self._climb(now, worker)
            late_seconds = now - (worker.started_at + START_TIMEOUT_SECONDS)
            is_awaited = worker.is_alive and worker.process is None and worker.state is not WorkerState.KILLING
            if not is_awaited or late_seconds < 0.0:
                continue
            if late_seconds >= FROZEN_SECONDS and not worker.is_excused:
                worker.is_excused = True
                worker.started_at = now + AFTER_FREEZE_SECONDS - START_TIMEOUT_SECONDS
            else:
                worker.is_replaced = worker.is_replaced or worker.is_live
                worker.killed_for = worker.killed_for or ExitCause.NOT_STARTED
                self._kill(now, worker, f"it did not start within {START_TIMEOUT_SECONDS:g} s")
        self._settle(now)

    # What comes out

    def take_effects(self) -> list[worker_effects.Effect]:
        """What is to be done, in order; each is given out once."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When `tick` is due at the latest; infinity: not at all."""
        times = [math.inf]
        if self._missing() > 0 and not self._restarts.blocked_reason:
            times.append(max(self._restarts.until, self._gate.opens_at(self.spec.name)))
        for worker in self._workers.values():
            if worker.state is WorkerState.EXITED:
                times.append(worker.ended_at + EXITED_SHOWN_SECONDS)
            elif worker.ladder is not None and worker.ladder.until is not None:
                times.append(worker.ladder.until)
            elif worker.process is None:
                times.append(worker.started_at + START_TIMEOUT_SECONDS)
            else:
                times.append(self._restarts.clean_spell_at(worker.started_at))
        return min(times)

    @property
    def desired(self) -> int | None:
        """How many are wanted; None before the first `resize`."""
        return self._desired

    @property
    def totals(self) -> worker_records.Totals:
        """What was counted."""
        return self._totals

    @property
    def start_number(self) -> int:
        """Of the newest worker."""
        return self._start_number

    @property
    def blocked_reason(self) -> str:
        """Why none is started; empty: nothing is in the way."""
        return self._restarts.blocked_reason

    @property
    def failures(self) -> int:
        """Failures since the last clean spell, those of one wave counted once."""
        return self._restarts.failures

    def backoff_remaining(self, now: float) -> float | None:
        """Seconds until the next start after failures; None: no backoff."""
        remaining = self._restarts.until - now
        return remaining if remaining > 0 else None

    def count(self, *states: WorkerState) -> int:
        """How many workers are in one of these states."""
        return sum(worker.state in states for worker in self._workers.values())

    def workers(self, now: float) -> list[worker_records.WorkerView]:
        """Every worker, by number; those that ended recently included."""
        ordered = sorted(self._workers.values(), key=lambda worker: (worker.number, worker.start_number))
        return [worker.view(now, self.spec.name) for worker in ordered]

    def story(self, worker_id: str) -> list[str]:
        """What became of a worker, oldest first: for an error, or `explain`."""
        worker = self._workers.get(worker_id)
        return [] if worker is None else list(worker.story)

    # Inside

    def _alive(self, name: str) -> WorkerLife:
        for worker in self._workers.values():
            if worker.is_alive and worker.name == name:
                return worker
        raise errors.NotFound(f"there is no worker {name}", field="worker")

    def _note(self, event: str, **fields: str | int | float) -> None:
        self._effects.append(worker_effects.Note(event, fields))

    def _missing(self) -> int:
        """How many are to be started; below 0, to be stopped. Those that are replaced keep their place."""
        if self._desired is None:
            return 0
        held = sum(
            worker.is_live or (worker.is_alive and worker.is_replaced) for worker in self._workers.values()
        )
        return self._desired - held

    def _settle(self, now: float) -> None:
        """Bring what is there towards what is wanted, as far as may be now."""
        self._shrink(now)
        self._grow(now)
        self._expire(now)

    def _shrink(self, now: float) -> None:
        surplus = -self._missing()
        for worker in self._workers.values():
            # One that goes anyway need not be replaced.
            if surplus > 0 and worker.is_alive and worker.is_replaced:
                worker.is_replaced = False
                surplus -= 1
        if surplus <= 0:
            return
        if not self._is_urgent:
            is_one_going = any(worker.is_alive and not worker.is_live for worker in self._workers.values())
            surplus = 0 if is_one_going else 1
        candidates = [
            stopping.Candidate(
                worker.worker_id,
                False if worker.state is WorkerState.STARTING else worker.is_busy,
                worker.start_number,
            )
            for worker in self._workers.values()
            if worker.is_live
        ]
        for victim in stopping.victims(candidates, surplus):
            is_immediate = self._is_urgent and victim.is_busy is not False
            why = "memory is short" if self._is_urgent else f"{self._desired} wanted"
            worker = self._workers[victim.worker_id]
            self._stop(now, worker, is_immediate=is_immediate, is_replaced=False, why=why)

    def _grow(self, now: float) -> None:
        missing = self._missing()
        if missing <= 0 or not self._restarts.may_start(now):
            self._gate.withdraw(self.spec.name)
            return
        while missing > 0 and self._gate.ask(self.spec.name, now):
            self._start(now)
            missing -= 1
        if missing <= 0:
            self._gate.withdraw(self.spec.name)

    def _start(self, now: float) -> None:
        taken = {worker.number for worker in self._workers.values() if worker.is_alive}
        number = next(number for number in range(1, len(taken) + 2) if number not in taken)
        self._start_number += 1
        worker = WorkerLife(
            self._new_id(),
            model.worker_name(self.spec.name, number, self._node),
            number,
            self._start_number,
            started_at=now,
        )
        worker.tell(now, "started")
        self._workers[worker.worker_id] = worker
        self._totals = dataclasses.replace(self._totals, starts=self._totals.starts + 1)
        self._effects.append(worker_effects.Start(worker.worker_id, worker.name, number, worker.start_number))

    def _expire(self, now: float) -> None:
        ended = [worker for worker in self._workers.values() if not worker.is_alive]
        ended.sort(key=lambda worker: worker.ended_at)
        for position, worker in enumerate(ended):
            is_surplus = len(ended) - position > EXITED_SHOWN_MAX
            if is_surplus or now >= worker.ended_at + EXITED_SHOWN_SECONDS:
                del self._workers[worker.worker_id]
                self._effects.append(worker_effects.Forget(worker.worker_id))

    def _stop(self, now: float, worker: WorkerLife, *, is_immediate: bool, is_replaced: bool, why: str) -> None:
        if worker.is_live:
            contract = self.spec.stop
            worker.ladder = stopping.Ladder(contract, contract.immediate_step if is_immediate else 0)
            worker.is_replaced, worker.why = is_replaced, why
            if worker.ladder.is_at_kill:
                self._kill(now, worker, why)
                return
            worker.move(now, WorkerState.STOPPING)
        else:
            is_stopping = worker.state is WorkerState.STOPPING
            if not (is_immediate and is_stopping and worker.ladder and worker.ladder.skip_to_immediate()):
                return
        self._carry_out(now, worker)

    def _carry_out(self, now: float, worker: WorkerLife) -> None:
        """Do the step of the ladder that is in force; it waits for the process to be known."""
        ladder = worker.ladder
        assert ladder is not None
        if ladder.is_at_kill:
            self._kill(now, worker, f"{worker.why}; it did not end by its stop contract")
            return
        if worker.process is None:
            return
        step = ladder.contract.steps[ladder.step]
        ladder.begin(now)
        assert ladder.until is not None
        worker.tell(now, f"{step.signal} to its {step.scope}: {worker.why}")
        self._effects.append(
            worker_effects.SendSignal(
                worker.worker_id,
                step.signal,
                step.scope,
                ladder.step,
                ladder.until,
                ladder.contract,
                worker.is_replaced,
            )
        )
        self._note(
            "worker_stopping",
            worker=worker.name,
            signal=step.signal,
            wait_seconds=step.wait_seconds,
            why=worker.why,
        )

    def _climb(self, now: float, worker: WorkerLife) -> None:
        ladder = worker.ladder
        assert ladder is not None
        if ladder.until is None or now < ladder.until:
            return
        if ladder.is_at_kill:
            ladder.begin(now)
            self._effects.append(worker_effects.KillAll(worker.worker_id, f"{worker.why}; it is still there"))
            return
        ladder.step += 1
        self._carry_out(now, worker)

    def _kill(self, now: float, worker: WorkerLife, why: str) -> None:
        worker.why = why
        if worker.killed_for is None:
            worker.killed_for = ExitCause.STOPPED
        worker.ladder = worker.ladder or stopping.Ladder(self.spec.stop, 0)
        worker.ladder.step = len(worker.ladder.contract.steps)
        worker.ladder.begin(now)
        worker.move(now, WorkerState.KILLING)
        self._effects.append(worker_effects.KillAll(worker.worker_id, why))
        self._note("worker_killed", worker=worker.name, why=why)

    def _go_on_stopping(self, now: float, worker: WorkerLife, record: worker_records.AdoptedWorker) -> None:
        assert record.stopping is not None
        ladder = stopping.Ladder(record.stopping.contract, record.stopping.step)
        worker.ladder, worker.why = ladder, "an earlier agent's order"
        worker.is_replaced = record.stopping.is_replaced
        if ladder.is_at_kill:
            if record.exit is None:
                self._kill(now, worker, worker.why)
                return
            worker.killed_for = ExitCause.STOPPED
        worker.move(now, WorkerState.STOPPING)
        if record.stopping.is_sent or record.exit is not None:
            ladder.until = now + max(0.0, record.stopping.remaining_seconds)
        else:
            self._carry_out(now, worker)

    def _count(self, now: float, worker: WorkerLife, worker_exit: model.WorkerExit) -> None:
        totals, cause = self._totals, worker_exit.cause
        if cause is ExitCause.OOM_KILLED:
            totals = dataclasses.replace(totals, oom_kills=totals.oom_kills + 1)
        elif cause is ExitCause.MEMORY_LIMIT:
            totals = dataclasses.replace(totals, memory_limit_kills=totals.memory_limit_kills + 1)
        elif (cause in _FAILURES and not worker.is_asked) or cause is ExitCause.PERMANENT:
            totals = dataclasses.replace(totals, crashes=totals.crashes + 1)
        if worker_exit.in_doubt_until_seconds:
            totals = dataclasses.replace(totals, in_doubt=totals.in_doubt + 1)
        self._totals = totals
        delay = None
        if cause is ExitCause.PERMANENT:
            self.block(
                now, f"{worker.name} ended with code {worker_exit.exit_code}, which is declared permanent"
            )
        elif cause in _FAILURES and not worker.is_asked:
            delay = self._restarts.failed(now, worker.started_at)
        elif cause is ExitCause.CLEAN:
            delay = self._restarts.ended_clean(now, worker.started_at)
        if delay is not None:
            self._note(
                "pool_backoff",
                pool=self.spec.name,
                seconds=round(delay, 3),
                failures=self._restarts.failures,
                why=worker_exit.detail or cause.value,
            )
