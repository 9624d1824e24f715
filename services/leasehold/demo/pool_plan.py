"""The script of the workers' scenes: when what happens, and the memory that there is to share."""

import pathlib
from dataclasses import dataclass
from typing import Final

from leasehold.demo import pool_app

POOL: Final = "translation"
NODE: Final = "demo"

#: A Celery worker with one child holds 60 to 70 MB idle; a task takes 24 more.
WORKER_LIMIT_MB: Final = 112
TASK_MB: Final = 24
RESERVE_MB: Final = 24
HYSTERESIS_MB: Final = 8
WORKERS_MAX: Final = 6
#: With the first the optimum is 6 workers, with the second 3.
AMPLE_MB: Final = RESERVE_MB + 6 * WORKER_LIMIT_MB + 32
TIGHT_MB: Final = RESERVE_MB + 3 * WORKER_LIMIT_MB + 32
WORKERS_AMPLE: Final = 6
WORKERS_TIGHT: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Instants of the scenes, in seconds from the first task on."""

    tight_at: float = 28.0
    ample_at: float = 48.0
    kill_worker_at: float = 66.0
    kill_agent_at: float = 76.0
    new_agent_at: float = 80.0
    feed_until: float = 95.0
    #: At the latest; it ends when every task is done.
    end_at: float = 165.0
    tasks_per_second: float = 2.5
    task_seconds_min: float = 0.8
    task_seconds_max: float = 2.4

    def title_at(self, seconds: float) -> str:
        """Which scene it is."""
        if seconds < self.tight_at:
            return "tasks are queued: the pool grows to its optimum"
        if seconds < self.ample_at:
            return "memory gets tight: the pool shrinks, and loses no task"
        if seconds < self.kill_worker_at:
            return "memory is back: the pool grows again"
        if seconds < self.kill_agent_at:
            return "a worker is killed with SIGKILL: another takes its place"
        if seconds < self.new_agent_at:
            return "the agent is killed with SIGKILL: the workers go on"
        if seconds < self.feed_until:
            return "a new agent adopts the workers"
        return "the last tasks"


def agent_yaml(budget_mb: int, ledger: pathlib.Path) -> str:
    """The agent's configuration with a memory budget of its own: the host is never filled."""
    return f"""\
# Written by the demo; the agent follows it while it changes.
node: {NODE}
settings:
  MEMORY_BUDGET_GB: {_gb(budget_mb)}
  SYSTEM_RESERVE_GB: {_gb(RESERVE_MB)}
  MEMORY_HYSTERESIS_GB: {_gb(HYSTERESIS_MB)}
  MEMORY_CHECK_INTERVAL: 1
pools:
  - name: {POOL}
    template: celery
    parameters:
      app: leasehold.demo.pool_app
      queues: {pool_app.QUEUE}
      task_time_limit: {pool_app.TASK_TIME_LIMIT}
      task_soft_time_limit: {pool_app.TASK_SOFT_TIME_LIMIT}
      soft_shutdown_timeout: {pool_app.SOFT_SHUTDOWN_TIMEOUT}
      visibility_timeout: {pool_app.VISIBILITY_TIMEOUT}
      max_tasks_per_child: 50
    min_workers: 1
    max_workers: {WORKERS_MAX}
    worker_memory_limit_gb: {_gb(WORKER_LIMIT_MB)}
    memory_threshold_gb: 0
    env:
      {pool_app.LEDGER_VARIABLE}: {ledger}
"""


def write_agent_yaml(path: pathlib.Path, budget_mb: int, ledger: pathlib.Path) -> None:
    """Put the file in place whole, writable for its owner alone."""
    draft = path.with_suffix(".new")
    draft.write_text(agent_yaml(budget_mb, ledger), encoding="utf-8")
    draft.chmod(0o600)
    draft.replace(path)


def _gb(megabytes: int) -> str:
    return f"{megabytes / 1024:.6f}"
