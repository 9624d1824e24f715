"""One worker of a pool: its state, its story, and what its end means."""

import dataclasses
from dataclasses import dataclass, field

from leasehold.core import errors, processes
from leasehold.core.node import model, stopping, worker_records
from leasehold.core.node.model import ExitCause, WorkerState

_STORY_LINES_MAX = 20


@dataclass(slots=True)
class WorkerLife:
    """One worker from its start to some time after its end."""

    worker_id: str
    name: str
    number: int
    start_number: int
    started_at: float
    state: WorkerState = WorkerState.STARTING
    process: processes.ProcessKey | None = None
    shim: processes.ProcessKey | None = None
    is_adopted: bool = False
    #: It was given more time to start, since its driver was frozen: once.
    is_excused: bool = False
    is_busy: bool | None = None
    task_id: str = ""
    task_name: str = ""
    ladder: stopping.Ladder | None = None
    #: Its place is kept for the one that replaces it.
    is_replaced: bool = False
    why: str = ""
    #: The agent killed it for this.
    killed_for: ExitCause | None = None
    exit: model.WorkerExit | None = None
    ended_at: float = 0.0
    story: list[str] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        """Whether its process lives, or may."""
        return self.state in model.ALIVE_STATES

    @property
    def is_live(self) -> bool:
        """Whether it counts as one of those that are wanted."""
        return self.state in model.LIVE_STATES

    @property
    def is_asked(self) -> bool:
        """Whether it ends because it is not wanted, and not for a fault of its own."""
        return self.ladder is not None and self.killed_for in (None, ExitCause.STOPPED)

    def move(self, now: float, state: WorkerState) -> None:
        """Change the state along a legal edge.

        Anything else is a mistake of the machine: raises `FailedPrecondition` with the story.
        """
        if (self.state, state) not in model.WORKER_EDGES:
            told = "; ".join(self.story) or "nothing happened yet"
            raise errors.FailedPrecondition(f"{self.name} cannot go from {self.state} to {state}: {told}")
        self.tell(now, f"{self.state} -> {state}")
        self.state = state

    def tell(self, now: float, line: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{now:.3f} {line}")
        del self.story[:-_STORY_LINES_MAX]

    def view(self, now: float, pool: str) -> worker_records.WorkerView:
        """As status shows it."""
        ladder = self.ladder
        until = None if ladder is None else ladder.until
        end = self.ended_at if self.state is WorkerState.EXITED else now
        return worker_records.WorkerView(
            worker_id=self.worker_id,
            name=self.name,
            pool=pool,
            number=self.number,
            start_number=self.start_number,
            state=self.state,
            process=self.process,
            shim=self.shim,
            uptime_seconds=max(0.0, end - self.started_at),
            is_adopted=self.is_adopted,
            is_busy=self.is_busy,
            task_id=self.task_id,
            task_name=self.task_name,
            stop_step="" if ladder is None else ladder.shown,
            stop_step_remaining_seconds=None if until is None else max(0.0, until - now),
            is_replaced=self.is_replaced,
            exit=self.exit,
        )

    def judged(self, told: model.WorkerExit, spec: model.PoolSpec) -> model.WorkerExit:
        """What was asked of the worker decides what its end means."""
        cause = told.cause
        if cause is ExitCause.NOT_STARTED and self.is_asked:
            cause = ExitCause.STOPPED
        if cause in (ExitCause.CLEAN, ExitCause.CRASHED):
            if self.killed_for is not None and told.signal == 9:
                cause = self.killed_for
            elif self.ladder is not None:
                cause = ExitCause.STOPPED
            elif told.exit_code in spec.restart.permanent_exit_codes:
                cause = ExitCause.PERMANENT
        contract = spec.stop if self.ladder is None else self.ladder.contract
        detail = told.detail
        if self.why:
            detail = f"{detail} ({self.why})" if detail else self.why
        return dataclasses.replace(
            told,
            cause=cause,
            detail=detail,
            task_id=told.task_id or self.task_id,
            in_doubt_until_seconds=stopping.in_doubt_until(told, contract, is_busy=self.is_busy),
        )
