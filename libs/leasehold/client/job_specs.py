"""What a job asks for, in the units that people write: gigabytes, minutes."""

import re
from collections.abc import Mapping
from typing import Final, TypeVar

from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement

GIB: Final = 2**30

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_MEMORY_UNITS: Final[Mapping[str, int]] = {"": 1, "k": 2**10, "m": 2**20, "g": GIB, "t": 2**40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|)")
_DURATION_UNITS: Final[Mapping[str, float]] = {
    "": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0,
}  # fmt: skip
_TEXT_LENGTH_MAX: Final = 40

Kind = TypeVar("Kind", model.OnLost, placement.Spreading)


def memory_bytes(text: str, *, field: str = "memory") -> int:
    """Bytes of ``4GB``, ``512MB``, ``1.5GiB`` or a plain number of bytes; a GB is 2**30 bytes.

    Raises `InvalidArgument`, naming `field`.
    """
    found = _MEMORY.fullmatch(text.strip()) if len(text) <= _TEXT_LENGTH_MAX else None
    if found is None:
        raise errors.InvalidArgument(
            f"{field}: {text[:_TEXT_LENGTH_MAX]!r} is no amount of memory, such as 4GB or 512MB", field=field
        )
    return round(float(found[1]) * _MEMORY_UNITS[found[2].lower()])


def duration_seconds(text: str, *, field: str = "duration") -> float:
    """Seconds of ``90s``, ``10m``, ``1.5h``, ``2d`` or a number. Raises `InvalidArgument`, naming `field`."""
    found = _DURATION.fullmatch(text.strip().lower()) if len(text) <= _TEXT_LENGTH_MAX else None
    if found is None:
        raise errors.InvalidArgument(
            f"{field}: {text[:_TEXT_LENGTH_MAX]!r} is no duration, such as 90s, 10m or 2h", field=field
        )
    return float(found[1]) * _DURATION_UNITS[found[2]]


def job_spec(
    template: str = "",
    *,
    cpus: int,
    memory_gb: float | None = None,
    memory: str | int | None = None,
    parameters: Mapping[str, str] | None = None,
    name: str = "",
    queue: str = model.DEFAULT_QUEUE,
    priority: int = 0,
    node_selector: Mapping[str, str] | None = None,
    max_run_seconds: float | None = None,
    max_attempts: int = 1,
    initial_backoff_seconds: float = 1.0,
    max_backoff_seconds: float = 60.0,
    on_lost: model.OnLost | str = model.OnLost.AFTER_PROOF,
    spreading: placement.Spreading | str = placement.Spreading.PACK,
    wait_for_capacity: bool = False,
) -> model.JobSpec:
    """A job of a command template that hosts declare; empty: the workload runs elsewhere.

    `cpus` is a whole number. Memory is `memory_gb` (2**30 bytes each) or `memory` (bytes, or as ``512MB``).
    Raises `InvalidArgument`, naming the field; see ``job.proto`` for the bounds.
    """
    if (memory_gb is None) == (memory is None):
        raise errors.InvalidArgument("memory: give memory_gb or memory, one of them", field="memory")
    if isinstance(cpus, bool) or not isinstance(cpus, int):
        raise errors.InvalidArgument(f"cpus: {cpus!r:.40} is not a whole number", field="cpus")
    if memory is not None:
        size = memory_bytes(memory) if isinstance(memory, str) else memory
    elif memory_gb is not None and 0 < memory_gb < model.MEMORY_BYTES_MAX / GIB:
        size = round(memory_gb * GIB)
    else:
        raise errors.InvalidArgument(f"memory_gb: {memory_gb!r:.40} is not above 0", field="memory_gb")
    return model.JobSpec(
        required=placement.Resources(cpus, size),
        name=name,
        queue=queue,
        priority=priority,
        node_selector=dict(node_selector or {}),
        template=template,
        parameters=dict(parameters or {}),
        max_run_seconds=max_run_seconds,
        retry=model.RetryPolicy(
            max_attempts=max_attempts,
            initial_backoff_seconds=initial_backoff_seconds,
            max_backoff_seconds=max_backoff_seconds,
        ),
        on_lost=choice(model.OnLost, on_lost, field="on_lost"),
        spreading=choice(placement.Spreading, spreading, field="spreading"),
        wait_for_capacity=wait_for_capacity,
    )


def choice(kinds: type[Kind], value: str, *, field: str) -> Kind:
    """The member whose value it is. Raises `InvalidArgument`, naming `field` and what is allowed."""
    try:
        return kinds(value)
    except ValueError:
        allowed = ", ".join(each.value for each in kinds)
        raise errors.InvalidArgument(f"{field}: one of {allowed}, not {value!r:.40}", field=field) from None
