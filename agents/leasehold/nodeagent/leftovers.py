"""Ends what an agent left: every worker and shim of a state folder, by identity, never a stranger's process."""

import asyncio
import os
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import agent, cgroups, endings, state
from leasehold.nodeagent import config as configs

WAIT_SECONDS: Final = 60.0


async def end(config: configs.Config) -> list[str]:
    """End the workers of a folder without an agent: at once, tasks given back; their names.

    Raises `FailedPrecondition` while an agent has the folder ("already running, PID n"), `DeadlineExceeded` if
    one does not end.
    """
    if not os.path.isdir(config.state_dir):  # noqa: ASYNC240  nothing else runs on this loop yet
        return []
    folder = state.StateFolder(config.state_dir)
    folder.open()
    try:
        host = agent.Agent(config, folder, cgroups.detect(config.workers_cgroup))
        try:
            return await _end(host)
        finally:
            host.close()
    finally:
        folder.close()


async def _end(host: agent.Agent) -> list[str]:
    host.ends_jobs = True
    host.end_starts()
    host.adopt()
    names = [
        view.name
        for pool in host.pools.values()
        for view in pool.machine.workers(host.clock())
        if view.state in model.ALIVE_STATES
    ]
    names += [life.ref.log_name for life in host.jobs.machine.lives() if life.is_alive]
    ending = endings.Ending(host)
    ending.ask(endings.Stage.IMMEDIATE, "nobody looks after these workers any more")
    driver = asyncio.create_task(host.run())
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await ending.carry_out()
    except TimeoutError:
        pass
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
    if host.unended_count():
        raise errors.DeadlineExceeded(f"{host.unended_count()} workers of {host.folder.path} do not end")
    return names
