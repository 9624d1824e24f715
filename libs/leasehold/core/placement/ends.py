"""When what runs ends, and so from when on there is room for more."""

import bisect
import math
from collections.abc import Iterable
from typing import NamedTuple

from leasehold.core.placement import model


class Bounded(NamedTuple):
    """What is held until then at the latest."""

    ends_by: float
    job_id: str
    held: model.Resources


class Wait(NamedTuple):
    """Until when to wait for room at the latest; waits sort by how good they are."""

    #: Jobs whose end nobody can tell, and which must end as well.
    unbounded: int
    #: When all others that must end have ended.
    until: float
    #: What is left over then, besides what was waited for.
    extra: model.Resources


class Ends:
    """Running jobs of a node, or of a queue, by when they end."""

    __slots__ = ("bounded", "unbounded")

    def __init__(self) -> None:
        #: Sorted.
        self.bounded: list[Bounded] = []
        self.unbounded: dict[str, model.Resources] = {}

    def add(self, running: model.Running) -> None:
        """It has begun."""
        if running.ends_by is None:
            self.unbounded[running.job_id] = running.held
        else:
            bisect.insort(self.bounded, Bounded(running.ends_by, running.job_id, running.held))

    def remove(self, running: model.Running) -> None:
        """It has ended; `running` is as it was added."""
        if running.ends_by is None:
            del self.unbounded[running.job_id]
        else:
            begun = Bounded(running.ends_by, running.job_id, running.held)
            del self.bounded[bisect.bisect_left(self.bounded, begun)]

    def first_end(self) -> float:
        """When the first has ended at the latest; infinite: nobody can tell of any."""
        return self.bounded[0].ends_by if self.bounded else math.inf

    def is_empty(self) -> bool:
        """Whether nothing runs."""
        return not self.bounded and not self.unbounded


def wait_for(
    required: model.Resources,
    free: model.Resources,
    bounded: Iterable[Bounded],
    unbounded: Iterable[model.Resources],
) -> Wait | None:
    """How long it takes until `required` is free, if each of `bounded` (sorted) ends as late as it may.

    Those without a known end are waited for only where the others are not enough. None: it would not be free
    even when all have ended.
    """
    until = float("-inf")
    cpus, memory_bytes = free
    need_cpus, need_bytes = required
    for ends_by, _, held in bounded:
        if cpus >= need_cpus and memory_bytes >= need_bytes:
            break
        cpus += held[0]
        memory_bytes += held[1]
        until = ends_by
    awaited = 0
    for held in unbounded:
        if cpus >= need_cpus and memory_bytes >= need_bytes:
            break
        cpus += held[0]
        memory_bytes += held[1]
        awaited += 1
    if cpus < need_cpus or memory_bytes < need_bytes:
        return None
    return Wait(awaited, until, model.Resources(cpus - need_cpus, memory_bytes - need_bytes))
