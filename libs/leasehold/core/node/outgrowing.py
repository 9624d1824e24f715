"""The ladder before a worker's limit: told at 80%, replaced after its task at 90%, ended at 100%.

The last step is the kernel's where a cgroup enforces the limit; elsewhere it is this one's.
"""

from typing import Final

from leasehold.core.node import amounts, governor_effects, model, pool_sizing

WARN_RATIO: Final = 0.8
REPLACE_RATIO: Final = 0.9


def judge(
    pool: pool_sizing.PoolSizing,
) -> list[governor_effects.Replace | governor_effects.KillWorker]:
    """What the sizes of a pool's workers ask for, each step once in a life. Sets the pool's warnings."""
    effects: list[governor_effects.Replace | governor_effects.KillWorker] = []
    warnings = []
    limit = pool.spec.worker_limit_bytes
    lives = {(worker.name, worker.start_number) for worker in pool.workers}
    pool.outgrown = {each for each in pool.outgrown if each[:2] in lives}
    for worker in pool.workers:
        ratio = worker.held_bytes / limit
        if ratio < WARN_RATIO or worker.state not in model.ALIVE_STATES:
            continue
        told = f"holds {amounts.text(worker.held_bytes)}, {ratio:.0%} of its limit of {amounts.text(limit)}"
        warnings.append(f"{worker.name} {told}")
        if ratio >= 1.0 and not worker.is_limit_enforced and worker.state is not model.WorkerState.KILLING:
            if _is_first(pool, worker, "kill"):
                effects.append(governor_effects.KillWorker(worker.name, told))
        elif (
            ratio >= REPLACE_RATIO and worker.state in model.LIVE_STATES and _is_first(pool, worker, "replace")
        ):
            effects.append(governor_effects.Replace(worker.name, told))
    pool.warnings = tuple(warnings)
    return effects


def _is_first(pool: pool_sizing.PoolSizing, worker: model.WorkerMemory, step: str) -> bool:
    key = (worker.name, worker.start_number, step)
    if key in pool.outgrown:
        return False
    pool.outgrown.add(key)
    return True
