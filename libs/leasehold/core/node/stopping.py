"""How workers are asked to end: the steps of a stop contract over time, and whom to choose."""

from collections.abc import Iterable
from dataclasses import dataclass

from leasehold.core.node import model

#: A kill that was not seen to work is told again: the process may hang in the kernel.
KILL_AGAIN_SECONDS = 5.0

_BUSY_RANK = {False: 0, None: 1, True: 2}


@dataclass(slots=True)
class Ladder:
    """Where a worker stands in its stop contract."""

    contract: model.StopContract
    #: The number of steps means the kill.
    step: int
    #: When the step's wait is over. None: it was not sent, since the process is not known yet.
    until: float | None = None

    @property
    def is_at_kill(self) -> bool:
        """Whether there is nothing left but the kill."""
        return self.step >= len(self.contract.steps)

    @property
    def shown(self) -> str:
        """The signal of the step that is in force."""
        return "KILL" if self.is_at_kill else self.contract.steps[self.step].signal

    def skip_to_immediate(self) -> bool:
        """Go on to the step at which an immediate stop begins; False if it is there already."""
        if self.step >= self.contract.immediate_step:
            return False
        self.step, self.until = self.contract.immediate_step, None
        return True

    def begin(self, now: float) -> None:
        """The step was carried out: its wait begins."""
        wait = KILL_AGAIN_SECONDS if self.is_at_kill else self.contract.steps[self.step].wait_seconds
        self.until = now + wait


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may be chosen to end."""

    worker_id: str
    #: None: not known. One that is starting has no task yet, so it counts as idle.
    is_busy: bool | None
    start_number: int


def victims(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """Whom to stop: idle ones first, then those that do not tell, then busy ones; among equals the newest."""
    ranked = sorted(candidates, key=lambda worker: (_BUSY_RANK[worker.is_busy], -worker.start_number))
    return ranked[:count]


def in_doubt_until(
    worker_exit: model.WorkerExit, contract: model.StopContract, *, is_busy: bool | None
) -> float:
    """Until when (wall clock) the broker may hide the task of a worker that ended so; 0: there is no doubt.

    Only SIGKILL leaves no time to give a task back; how a worker ended that nobody saw is not known.
    """
    had_no_time = worker_exit.signal == 9 or worker_exit.cause is model.ExitCause.UNKNOWN
    if not had_no_time or is_busy is False or contract.visibility_timeout_seconds <= 0:
        return 0.0
    return worker_exit.end_time_seconds + contract.visibility_timeout_seconds
