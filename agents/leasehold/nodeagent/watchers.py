"""What the agent asks of others beside its loop: checks before a pool starts, and what waits at the brokers."""

import asyncio
import random
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import messages, pools, preflight
from leasehold.observe import logs

DEPTH_SECONDS: Final = 5.0
#: How long a pool that failed its checks waits for the next look.
RETRY_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.5

_log = logs.get_logger(__name__)


class Preflights:
    """Holds each pool back until its checks have passed once; those that fail are repeated."""

    def __init__(self, host: agents.Agent, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._host = host
        self._retry_seconds = retry_seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def hold_back(self) -> None:
        """No pool that was not checked starts a worker. Before the first decision, and after each change."""
        for pool in self._host.pools.values():
            if pool.declared is not None and not pool.is_checked and not pool.held_back:
                self._block(pool, messages.CHECKING)

    async def run(self) -> None:
        """Check until cancelled."""
        try:
            while True:
                self.hold_back()
                now = self._host.clock()
                for name, pool in list(self._host.pools.items()):
                    is_due = pool.declared is not None and not pool.is_checked and now >= pool.next_check_at
                    if is_due and name not in self._tasks:
                        self._tasks[name] = asyncio.create_task(self._check(pool), name=f"preflight-{name}")
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _check(self, pool: pools.Pool) -> None:
        declared = pool.declared
        try:
            try:
                subject = pool.subject(self._host.folder.logs, self._host.config.environment)
                outcome = await preflight.check(subject)
            except errors.LeaseholdError as error:
                outcome = preflight.Outcome((preflight.Failure(error.message, ""),))
            if pool.declared is not declared:
                return  # it was declared anew meanwhile: another look follows
            self._settle(pool, outcome)
        finally:
            self._tasks.pop(pool.name, None)

    def _settle(self, pool: pools.Pool, outcome: preflight.Outcome) -> None:
        pool.warnings = tuple(str(warning) for warning in outcome.warnings)
        if outcome.failures:
            # Spread, so that a broker which came back is not asked by a whole fleet at one instant.
            pause = self._retry_seconds * random.uniform(0.75, 1.25)  # noqa: S311
            pool.next_check_at = self._host.clock() + pause
            self._block(pool, preflight.told(outcome))
            return
        pool.is_checked = True
        held, pool.held_back = pool.held_back, ""
        if held and pool.machine.blocked_reason == held:
            pool.machine.unblock(self._host.clock())
        for warning in pool.warnings:
            _log.warning("pool_warning", pool=pool.name, warning=warning)
        self._host.settle(self._host.clock())

    def _block(self, pool: pools.Pool, reason: str) -> None:
        if pool.machine.blocked_reason not in ("", pool.held_back):
            return  # something graver is in the way
        pool.held_back = reason
        pool.machine.block(self._host.clock(), reason)
        self._host.settle(self._host.clock())


async def ask_depths(host: agents.Agent, *, interval_seconds: float = DEPTH_SECONDS) -> None:
    """Ask the brokers what waits, until cancelled. A broker that does not answer delays only its own pool."""
    asking: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for name, task in list(asking.items()):
                if task.done():
                    del asking[name]
                    task.result()  # a fault of the agent's own is not passed over
            for pool in host.pools.values():
                if pool.has_depth and pool.name not in asking:
                    asking[pool.name] = asyncio.create_task(_ask_depth(host, pool), name=f"depth-{pool.name}")
            await asyncio.sleep(interval_seconds)
    finally:
        for task in asking.values():
            task.cancel()
        await asyncio.gather(*asking.values(), return_exceptions=True)


async def _ask_depth(host: agents.Agent, pool: pools.Pool) -> None:
    depth = await pool.ask_depth(host.config.environment)
    if host.pools.get(pool.name) is pool:
        host.told_depths({pool.name: depth})
