"""EASY backfill: room and quota kept for the first job that is blocked, and who may pass it.

The first job in line that finds no room is promised a node: the one where it can start soonest if all that
runs there ends as late as it may (`Promise`). A job behind it may take room of that node only if it has ended
by then, or if it fits into what is left over beside the promised job; so the promise is never delayed by it. A
job without a longest run ends never, as far as this goes. The same holds for a queue's quota: jobs of the
queue pass the first that waits for quota by the same two rules, and other queues do not notice.

Where a node is awaited on which jobs run whose end nobody can tell, the promise says "when those have ended,
and not later than `until`"; no job that passes makes either later.

After a plan is carried out, the promise that the next plan makes to the same job is never later: the node is
still there, and all that was placed on it obeyed. Only jobs before it in line, loss of a node, or a change of
totals or quotas delay it. (Jobs must end within the longest run that they were placed with.)

Up to `PROMISES_MAX` jobs of different shapes have a node each, so that a job which waits for something rare
does not leave those behind it without protection until it starts.
"""

import heapq
import itertools

from leasehold.core.placement import ends, model, room

#: Jobs that may have a node kept for them at once.
PROMISES_MAX = 4

_NOTHING_PLACED = ends.Ends()


class Promise:
    """Room of a node, or of a queue's quota, that is kept for a job."""

    __slots__ = ("extra", "is_known", "job_id", "until")

    def __init__(self, job_id: str, wait: ends.Wait, now: float) -> None:
        self.job_id = job_id
        #: Whether that is all that it waits for.
        self.is_known = wait.unbounded == 0 and (wait.until == float("-inf") or wait.until >= now)
        #: What passes must have ended by then.
        self.until = wait.until
        #: Or it must fit in here.
        self.extra = wait.extra

    def admits(self, required: model.Resources, ends_by: float) -> bool:
        """Whether a job may pass."""
        return ends_by <= self.until or self.extra.holds(required)

    def take(self, required: model.Resources, ends_by: float) -> None:
        """A job that it admits passes."""
        if ends_by > self.until:
            self.extra = self.extra.minus(required)


def quota_left(queue: model.Queue, used: model.Resources) -> model.Resources | None:
    """What a queue's jobs may still take, negative where its quota has shrunk; None: no limit at all."""
    if queue.nominal_cpus is None and queue.nominal_memory_bytes is None:
        return None
    cpus = _BOUNDLESS if queue.nominal_cpus is None else queue.nominal_cpus
    memory_bytes = _BOUNDLESS if queue.nominal_memory_bytes is None else queue.nominal_memory_bytes
    return model.Resources(cpus - used.cpus, memory_bytes - used.memory_bytes)


def wait_beside(
    required: model.Resources, free: model.Resources, running: ends.Ends, placed: ends.Ends
) -> ends.Wait | None:
    """How long until `required` is free, of a node or of a quota; `placed` is what the plan adds."""
    if placed.is_empty():
        return ends.wait_for(required, free, running.bounded, running.unbounded.values())
    return ends.wait_for(
        required,
        free,
        heapq.merge(running.bounded, placed.bounded),
        itertools.chain(running.unbounded.values(), placed.unbounded.values()),
    )


def wait_on(
    required: model.Resources, found: room.Room, free: model.Resources, placed: ends.Ends = _NOTHING_PLACED
) -> ends.Wait | None:
    """How long until `required` is free of a node, of which `free` is now; None: never."""
    if not found.node.total.holds(required):
        return None
    return wait_beside(required, free, found.ends, placed)


def quota_at(
    until: float, required: model.Resources, left: model.Resources, running: ends.Ends, placed: ends.Ends
) -> ends.Wait:
    """What is kept of a quota for a job that starts when room is there, at `until`: it must have quota then."""
    cpus, memory_bytes = left
    for ends_by, _, held in heapq.merge(running.bounded, placed.bounded):
        if ends_by > until:
            break
        cpus += held.cpus
        memory_bytes += held.memory_bytes
    return ends.Wait(0, until, model.Resources(cpus, memory_bytes).minus(required))


#: Larger than all quotas and nodes together.
_BOUNDLESS = 2**80
