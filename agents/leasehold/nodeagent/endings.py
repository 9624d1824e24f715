"""How an agent ends: what a signal or an order to end does to its workers, and how long that may take.

=========  =====================================================================  ==========================
asked by   workers                                                                a second one
=========  =====================================================================  ==========================
SIGTERM    each ends by its stop contract, within the drain deadline; those that  as SIGINT
           are still there then are stopped as by SIGINT
SIGINT     at once: tasks are given back to their queue where the contract can    every process is killed
SIGUSR1    stay, for the next agent, also those that are asked to end already    nothing more
=========  =====================================================================  ==========================
"""

import asyncio
import enum
from typing import Final

from leasehold.nodeagent import agent as agents
from leasehold.observe import logs

#: What an immediate stop may take beyond the contracts' own time, and a kill at all.
MARGIN_SECONDS: Final = 5.0
KILL_SECONDS: Final = 10.0

_log = logs.get_logger(__name__)


class Stage(enum.IntEnum):
    """How hard the workers are asked; it only rises."""

    NONE = 0
    DRAIN = 1
    IMMEDIATE = 2
    KILL = 3
    #: They stay.
    LEAVE = 4


class Ending:
    """The end of one agent."""

    def __init__(self, host: agents.Agent) -> None:
        self._host = host
        self.stage = Stage.NONE
        self.begun = asyncio.Event()
        self._harder = asyncio.Event()

    def ask(self, stage: Stage, why: str) -> float:
        """End, so hard at least; how long it may take, in seconds. A weaker wish changes nothing."""
        if stage > self.stage:
            self.stage = stage
            _log.info("ending", how=stage.name.lower(), why=why, workers=self._host.alive_count())
            self._harder.set()
            self.begun.set()
        return self.seconds(self.stage)

    def escalate(self, stage: Stage, why: str) -> None:
        """A signal: the first asks for `stage`, the next for one step more than what is under way."""
        if self.stage is Stage.NONE or stage is Stage.LEAVE:
            # To leave them is no harder way to end workers: those on their way out are the next agent's.
            self.ask(stage, why)
        elif self.stage is not Stage.LEAVE:
            self.ask(Stage(min(Stage.KILL, max(stage, self.stage + 1))), why)

    def seconds(self, stage: Stage) -> float:
        """How long a stage may take, with all that may come after it."""
        if stage in (Stage.NONE, Stage.LEAVE):
            return 0.0
        immediate = self._immediate_seconds() if stage <= Stage.IMMEDIATE else 0.0
        drain = self._host.config.drain_seconds() if stage is Stage.DRAIN else 0.0
        return drain + immediate + KILL_SECONDS

    async def carry_out(self) -> None:
        """See the workers off, stage by stage. Returns when none lives, or they stay, or nothing helps."""
        stage = Stage.NONE
        while self.stage is not Stage.LEAVE:
            if stage is not self.stage:
                stage = self.stage
                self._begin(stage)
            if await self._wait(self._stage_seconds(stage)):
                return
            if self.stage is not stage:
                continue  # a harder one was asked for
            if stage is Stage.KILL:
                _log.error("workers_do_not_end", workers=self._host.unended_count())
                return
            self.ask(Stage(stage + 1), f"the time for {stage.name.lower()} is over")

    def _begin(self, stage: Stage) -> None:
        self._host.end_starts()
        if stage is Stage.KILL:
            self._host.kill_all("it did not end in time, or the agent was told to end at once")
        else:
            self._host.stop_all(is_immediate=stage is Stage.IMMEDIATE, why="the agent ends")

    async def _wait(self, seconds: float) -> bool:
        """Whether the workers ended; False when the time is over or a harder stage was asked for."""
        self._harder.clear()
        ended = asyncio.ensure_future(self._host.wait_ended(self._host.clock() + seconds))
        harder = asyncio.ensure_future(self._harder.wait())
        try:
            await asyncio.wait((ended, harder), return_when=asyncio.FIRST_COMPLETED)
            return ended.done() and ended.result()
        finally:
            for task in (ended, harder):
                task.cancel()

    def _stage_seconds(self, stage: Stage) -> float:
        if stage is Stage.DRAIN:
            return self._host.config.drain_seconds()
        return self._immediate_seconds() if stage is Stage.IMMEDIATE else KILL_SECONDS

    def _immediate_seconds(self) -> float:
        contracts = [pool.machine.spec.stop for pool in self._host.pools.values()]
        times = [contract.deadline_seconds(is_immediate=True) for contract in contracts]
        if self._host.ends_jobs:
            lives = self._host.jobs.machine.lives()
            times += [life.stop.deadline_seconds() for life in lives if life.is_alive]
        longest = max(times, default=0.0)
        return longest + MARGIN_SECONDS
