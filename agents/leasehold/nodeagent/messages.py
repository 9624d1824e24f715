"""Lines of the agent's log whose form is fixed: people, and their scripts, look for them."""

from typing import TYPE_CHECKING, Any, Final

from leasehold.core.node import model, worker_effects
from leasehold.observe import logs

if TYPE_CHECKING:
    from leasehold.nodeagent import agent

_GIB: Final = model.GIB
#: Why a pool starts no worker yet, each time that an agent starts: nothing to warn of.
CHECKING: Final = "checks before the first start are under way"
_WARNINGS: Final = frozenset({"worker_killed", "worker_oom_kill", "pool_backoff", "pool_blocked"})
_log = logs.get_logger("leasehold.nodeagent")


def memory_line(host: "agent.Agent") -> str:
    """``memory 24.5/64.0 GB (38.3%), available 32.1 GB, workers 3/5 (optimal)``."""
    sample = host.sample
    if sample is None:
        return "memory unknown"
    used = sample.total_bytes - sample.available_bytes
    share = used / sample.total_bytes if sample.total_bytes else 0.0
    alive = host.alive_count()
    now = host.clock()
    declared = [name for name, pool in host.pools.items() if pool.declared is not None]
    optimal = sum(host.governor.view(now, name).optimal for name in declared)
    return (
        f"memory {used / _GIB:.1f}/{sample.total_bytes / _GIB:.1f} GB ({share:.1%}), "
        f"available {sample.available_bytes / _GIB:.1f} GB, workers {alive}/{optimal} (optimal)"
    )


def scaling_line(before: int, after: int) -> str:
    """``scaling: 3 -> 5 workers``."""
    return f"scaling: {before} -> {after} workers"


def decision_fields(decision: model.Decision) -> dict[str, Any]:
    """What a line about a decision tells beside itself."""
    return {"pool": decision.pool, "trigger": decision.trigger, "reasons": list(decision.reasons)}


def tell_note(note: worker_effects.Note) -> None:
    """Write what a pool's machine noted."""
    fields = dict(note.fields)
    if note.event == "worker_started":
        _log.info(f"worker {fields['worker']} started, PID {fields['pid']}", **fields)
    elif note.fields.get("why") == CHECKING:
        _log.debug(note.event, **fields)
    elif note.event in _WARNINGS:
        _log.warning(note.event, **fields)
    else:
        _log.info(note.event, **fields)
