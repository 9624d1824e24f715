"""A governor in scenes that tests set by hand: what the host has, who works, what is decided."""

from collections.abc import Sequence

import sizing_host
from leasehold.core.node import governor, governor_effects, model, saved_modes, settings

GB = model.GIB
POOL = "translation"
HOST = settings.HostSettings()


def workers(live: int, leaving: int = 0, *, pool: str = POOL, held_gb: float = 4.0) -> list[model.WorkerMemory]:
    """So many running, and so many more on their way out."""
    states = [model.WorkerState.RUNNING] * live + [model.WorkerState.STOPPING] * leaving
    return [
        model.WorkerMemory(
            name=f"{pool}_{number}@h",
            state=state,
            held_bytes=round(held_gb * GB),
            start_number=number,
            is_limit_enforced=True,
        )
        for number, state in enumerate(states, start=1)
    ]


def memory(
    available_gb: float, *, some: float = 0.0, full: float = 0.0, reclaimed: int | None = 0
) -> model.MemorySample:
    return model.MemorySample(
        total_bytes=64 * GB,
        available_bytes=round(available_gb * GB),
        pressure_some_percent=some,
        pressure_full_percent=full,
        reclaimed_pages=reclaimed,
    )


def resizes(sizer: governor.Governor) -> list[tuple[str, int]]:
    """What was told since the last time."""
    return [
        (each.pool, each.desired) for each in sizer.take_effects() if isinstance(each, governor_effects.Resize)
    ]


def begun(
    spec: model.PoolSpec,
    available_gb: float,
    found: Sequence[model.WorkerMemory],
    *,
    saved: saved_modes.SavedModes | None = None,
) -> governor.Governor:
    """A governor that has adopted `found` and decided once, at 0."""
    sizer = governor.Governor(HOST, [spec], now=0.0, saved=saved)
    sizer.sample(0.0, memory(available_gb), {spec.name: found})
    return sizer


PLAIN = sizing_host.spec(threshold_gb=0)
