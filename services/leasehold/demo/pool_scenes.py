"""Plays the workers' scenes: feeds tasks, moves memory, kills, and notes what it saw."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from leasehold.api.node.v1 import node_pb2, pool_pb2, worker_pb2
from leasehold.core.node import model
from leasehold.demo import journal, pool_app, pool_audit, pool_plan, pool_stack
from leasehold.runtime import identity

STEP_SECONDS = 0.2
LOOK_SECONDS = 0.5
DONE_LOOK_SECONDS = 1.0
SEED = 20_261_125


@dataclass
class Seen:
    """What a run has shown, for the claims."""

    #: Most workers that ran at once in each of the scenes about memory, and the fewest when it was tight.
    most_ample: int = 0
    fewest_tight: int = 99
    most_again: int = 0
    held_bytes_max: int = 0
    #: Held over the budget, while it had not just been lowered.
    over_budget_bytes: int = 0
    killed_worker: str = ""
    killed_task: str = ""
    kill_told: str = ""
    #: Lives of workers before the agent was killed, and after the next one began.
    before_agent: dict[str, int] = field(default_factory=dict)
    after_agent: dict[str, int] = field(default_factory=dict)
    adopted: int = 0
    ended_seconds: float = 0.0


class Player:
    """One run of the scenes. `say` shows a line with its instant; `draw` shows the present state."""

    def __init__(
        self,
        host: pool_stack.Host,
        script: pool_plan.Script,
        say: Callable[[float, str], None],
        draw: Callable[[float, node_pb2.NodeStatus | None, pool_audit.Verdict], None],
    ) -> None:
        self.seen = Seen()
        self._host = host
        self._script = script
        self._say = say
        self._draw = draw
        self._random = random.Random(SEED)  # noqa: S311 - lengths of tasks, the same in each run
        self._began = time.monotonic()
        self._fed = 0
        self._next_look = 0.0
        self._told: set[tuple[int, int]] = set()
        self._title = ""
        self._steps: list[tuple[float, Callable[[], None]]] = [
            (script.tight_at, lambda: self._set_budget(pool_plan.TIGHT_MB)),
            (script.ample_at, lambda: self._set_budget(pool_plan.AMPLE_MB)),
            (script.kill_worker_at, self._kill_worker),
            (script.kill_agent_at, self._kill_agent),
            (script.new_agent_at, self._new_agent),
        ]

    def play(self) -> Seen:
        """Run to the end: until every task is done, or the script's last instant."""
        self._began = time.monotonic()
        next_audit, verdict = 0.0, self.judge()
        while True:
            now = self._elapsed()
            self._announce_scene(now)
            while self._steps and now >= self._steps[0][0]:
                self._steps.pop(0)[1]()
            self._feed(now)
            if now >= next_audit:
                next_audit, verdict = now + DONE_LOOK_SECONDS, self.judge()
            self._look(now, verdict)
            is_done = not self._steps and now >= self._script.feed_until and verdict.is_good
            if is_done or now >= self._script.end_at:
                self.seen.ended_seconds = now
                return self.seen
            time.sleep(STEP_SECONDS)

    def judge(self) -> pool_audit.Verdict:
        """What the ledger says now."""
        return pool_audit.judge(journal.read(self._host.ledger_file), forbidden_pids=self._host.agent_pids)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _announce_scene(self, now: float) -> None:
        title = self._script.title_at(now)
        if title != self._title:
            self._title = title
            self._say(now, f"--- {title} ---")

    def _feed(self, now: float) -> None:
        """As many tasks as are due; told to the ledger before they are queued."""
        due = int(min(now, self._script.feed_until) * self._script.tasks_per_second) + 8
        while self._fed < due:
            self._fed += 1
            task_id = f"task-{self._fed:04d}"
            seconds = self._random.uniform(self._script.task_seconds_min, self._script.task_seconds_max)
            pool_app.submit(
                self._host.broker_url,
                str(self._host.ledger_address),
                task_id,
                memory_mib=pool_plan.TASK_MB,
                seconds=seconds,
            )

    # What happens

    def _set_budget(self, megabytes: int) -> None:
        self._host.set_budget(megabytes)
        self._say(self._elapsed(), f"the agent's memory budget is now {megabytes} MB")

    def _kill_worker(self) -> None:
        """The first that has a task."""
        pool = self._pool(self._host.status())
        busy = [worker for worker in pool_stack.alive(pool) if worker.is_busy] if pool is not None else []
        if not busy:  # between two tasks: soon one has the next
            self._steps.insert(0, (self._elapsed() + STEP_SECONDS, self._kill_worker))
            return
        victim = busy[0]
        _kill(victim)
        self.seen.killed_worker, self.seen.killed_task = victim.worker_id, victim.task_id
        self._say(
            self._elapsed(),
            f"SIGKILL to {victim.name}, PID {victim.process.pid}, in the midst of {victim.task_id}",
        )

    def _kill_agent(self) -> None:
        pool = self._pool(self._host.status())
        self._keep_decisions()
        if pool is not None:
            self.seen.before_agent = {each.worker_id: each.process.pid for each in pool_stack.alive(pool)}
        self._host.kill_agent()
        self._say(self._elapsed(), f"SIGKILL to the agent; {len(self.seen.before_agent)} workers go on")

    def _new_agent(self) -> None:
        self._host.start_agent(adopts=True)
        pool = self._pool(self._host.status())
        assert pool is not None
        workers = pool_stack.alive(pool)
        self.seen.after_agent = {each.worker_id: each.process.pid for each in workers}
        self.seen.adopted = sum(each.is_adopted for each in workers)
        self._say(self._elapsed(), f"a new agent has adopted {self.seen.adopted} workers")

    # What is seen

    def _look(self, now: float, verdict: pool_audit.Verdict) -> None:
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        status = self._host.status()
        pool = self._pool(status)
        if pool is not None:
            self._note(now, pool)
        self._draw(now, status, verdict)

    def _note(self, now: float, pool: pool_pb2.PoolStatus) -> None:
        seen, script, running = self.seen, self._script, pool.running
        held = sum(worker.held_bytes for worker in pool_stack.alive(pool))
        seen.held_bytes_max = max(seen.held_bytes_max, held)
        is_tight = script.tight_at <= now < script.ample_at
        # Running tasks are waited for after the budget was lowered; so long more may be held.
        if not is_tight or now >= script.tight_at + pool_app.TASK_TIME_LIMIT:
            budget_mb = pool_plan.TIGHT_MB if is_tight else pool_plan.AMPLE_MB
            seen.over_budget_bytes = max(seen.over_budget_bytes, held - budget_mb * model.MIB)
        if now < script.tight_at:
            seen.most_ample = max(seen.most_ample, running)
        elif is_tight:
            seen.fewest_tight = min(seen.fewest_tight, running + pool.stopping)
        elif now < script.kill_worker_at:
            seen.most_again = max(seen.most_again, running)
        for worker in pool.workers:
            if worker.worker_id == seen.killed_worker and worker.HasField("exit"):
                seen.kill_told = f"{worker_pb2.ExitCause.Name(worker.exit.cause)}: {worker.exit.detail}"
        self._keep_decisions()

    def _keep_decisions(self) -> None:
        for decision in self._host.decisions():
            # Each agent counts its own.
            key = (len(self._host.agent_pids), decision.decision_id)
            if key not in self._told and decision.before != decision.after:
                self._told.add(key)
                self._say(
                    self._elapsed(),
                    f"scaling: {decision.before} -> {decision.after} workers; {'; '.join(decision.reasons)}",
                )

    def _pool(self, status: node_pb2.NodeStatus | None) -> pool_pb2.PoolStatus | None:
        return next((pool for pool in status.pools if pool.name == pool_plan.POOL), None) if status else None


def _kill(worker: worker_pb2.WorkerStatus) -> None:
    """SIGKILL to a worker's main process, and to no other that has its PID by now."""
    process = worker.process
    handle = identity.open_pidfd(
        identity.ProcessIdentity(process.boot_id, process.pid_namespace, process.pid, process.start_time_ticks)
    )
    if handle is not None:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
