"""The scheduler: what is committed goes in, proposals and explanations come out.

1. Tell it what is committed: `put_queue`, `put_node` (with what is in use by then), `started` for what runs,
   `add` for what waits. After that `started` and `ended` keep each node's use; `put_node` is for what else
   changes: totals, openness, labels, templates.
2. `plan` proposes. It changes nothing that can be seen: a proposal that is not carried out was never made.
3. For each proposal that is committed, call `started`; the job leaves the line by that.

Promises (see `backfill`) hold if a job's `Running.ends_by` is no later than the plan's `now` plus its
`max_run_seconds`; so the latter must include what its start and its stop may take. `ends_by` and `not_before`
go by the clock that `now` is of; submit times by the wall clock.
"""

from collections.abc import Iterable

from leasehold.core import errors
from leasehold.core.placement import book, explain, fit, lines, model, planner

#: Of those before a job, so many are placed to tell what it would meet.
_EXPLAINED_BEFORE_MAX = 10_000


class Scheduler:
    """Places waiting jobs on nodes. Not thread-safe; nothing here waits or takes the time."""

    def __init__(self, *, ageing_seconds: float = 60.0) -> None:
        """A point of priority is worth having waited `ageing_seconds`; above 0, or nothing ages."""
        self._book = book.Book(ageing_seconds)

    def put_queue(self, queue: model.Queue) -> None:
        """Create a queue or replace its quota; what runs of it counts on."""
        self._book.put_queue(queue)

    def remove_queue(self, name: str) -> None:
        """Forget a queue, if known."""
        self._book.remove_queue(name)

    def put_node(self, node: model.Node) -> None:
        """Create a node or replace all that is known of it, what is in use included."""
        self._book.put_node(node)

    def remove_node(self, name: str) -> None:
        """Forget a node, if known. What runs there counts in its queues until it has `ended`."""
        self._book.remove_node(name)

    def add(self, waiting: model.Waiting) -> None:
        """Put a job in line, or replace it there. A job of an unknown queue has no quota to keep to."""
        self._book.add(waiting)

    def add_all(self, found: Iterable[model.Waiting]) -> None:
        """Put jobs in line that are not in it; for many, much quicker than one by one."""
        self._book.add_all(found)

    def remove(self, job_id: str) -> None:
        """Take a job out of the line, if it is there."""
        self._book.remove(job_id)

    def started(self, running: model.Running) -> None:
        """A job has an allocation: it leaves the line, and its node and queue have less left."""
        self._book.started(running)

    def ended(self, job_id: str) -> None:
        """A job's allocation is released, if it has one."""
        self._book.ended(job_id)

    def plan(self, now: float, *, most: int = 1000) -> list[model.Placement]:
        """Who can start where, in the order of the line; at most `most`. All of it fits together."""
        made = self._planner(now)
        made.run(most)
        return made.placements

    def _planner(self, now: float) -> planner.Planner:
        self._book.wake(now)
        return planner.Planner(self._book, now)

    def next_wake(self, now: float) -> float:
        """When a plan may differ though nothing was told: the end of a backoff; infinite: never.

        Time alone opens no reservation: that takes an end, which is told.
        """
        return max(now, self._book.next_alarm())

    def check(self, shape: model.Shape, queue: str) -> model.Explanation | None:
        """Why no known node, or not the queue's whole quota, could ever hold such a job; None: it could."""
        state = self._book.queues.get(queue)
        told = "" if state is None else explain.over_nominal(state.queue, shape.required)
        rooms = self._book.rooms.values()
        # The first that could is enough: this is asked for every job.
        if not told and any(fit.never(shape, room.node) is None for room in rooms):
            return None
        reasons = [fit.never(shape, room.node) for room in rooms]
        blocked = explain.blocked(shape, reasons)
        return model.Explanation(
            summary=explain.summary(len(reasons), blocked, more=told),
            blocked=blocked,
            held_back=model.HeldBack.QUEUE_QUOTA if told else None,
            held_back_detail=told,
        )

    def has_template(self, name: str) -> bool:
        """Whether a known node has a template of that name."""
        return any(name in room.node.templates for room in self._book.rooms.values())

    def queues(self) -> list[model.Queue]:
        """All queues, by name."""
        return [self._book.queues[name].queue for name in sorted(self._book.known_queues)]

    def usage(self, queue: str) -> model.Resources:
        """What jobs of a queue have allocated."""
        state = self._book.queues.get(queue)
        return model.Resources(0, 0) if state is None else state.used

    def explain(self, job_id: str, now: float) -> model.Explanation:
        """What keeps a waiting job, and where it would start if it were planned now. Raises `NotFound`."""
        self._book.wake(now)
        resting = self._book.resting.get(job_id)
        if resting is not None:
            return self._explain_resting(resting, now)
        if job_id not in self._book.waiting:
            raise errors.NotFound(f"job {job_id} is not in line")
        return self._explain_waiting(job_id, now)

    def rehearse(self, waiting: model.Waiting, now: float) -> model.Explanation:
        """What would become of a job if it were added now; nothing stays of it. Its id must be new."""
        self._book.add(waiting)
        try:
            return self.explain(waiting.job_id, now)
        finally:
            self._book.remove(waiting.job_id)

    def _explain_resting(self, waiting: model.Waiting, now: float) -> model.Explanation:
        shape = waiting.shape
        reasons = [fit.block(shape, room.node, room.free) for room in self._book.rooms.values()]
        blocked = explain.blocked(shape, reasons)
        told = f"it is tried again in {waiting.not_before - now:.1f} s"
        return model.Explanation(
            summary=explain.summary(len(reasons), blocked, more=told),
            blocked=blocked,
            held_back=model.HeldBack.BACKOFF,
            held_back_detail=told,
            line_length=len(self._book.waiting),
        )

    def _explain_waiting(self, job_id: str, now: float) -> model.Explanation:
        entry, line = self._book.waiting[job_id]
        made = self._planner(now)
        made.run(_EXPLAINED_BEFORE_MAX, before=entry)
        turn = made.turn(entry, line.state, line.queue)
        shape = line.state.shape
        reasons = [made.reason(shape, entry, room) for room in self._book.rooms.values()]
        blocked = explain.blocked(shape, reasons)
        starts_by: float | None = now
        if turn.chance is not planner.Chance.FITS:
            made.refuse(turn, entry, line.rank(entry), line)
            starts_by = made.promise_to(job_id, now)
        held_back, told = self._held_back(turn, made, line)
        more = f"starts now on {turn.node}" if turn.node else told
        return model.Explanation(
            summary=explain.summary(len(reasons), blocked, more=more),
            blocked=blocked,
            held_back=held_back,
            held_back_detail=told,
            place_in_line=1 + self._book.rank(entry),
            line_length=len(self._book.waiting),
            starts_by=starts_by,
            node=turn.node,
        )

    def _held_back(
        self, turn: planner.Turn, made: planner.Planner, line: lines.JobLine
    ) -> tuple[model.HeldBack | None, str]:
        queue, required = line.queue.queue, line.state.shape.required
        if turn.chance is planner.Chance.QUOTA:
            never = explain.over_nominal(queue, required)
            left = made.left(line.queue) or model.Resources(0, 0)
            return model.HeldBack.QUEUE_QUOTA, never or explain.over_quota(queue, required, left)
        if turn.chance is planner.Chance.QUOTA_KEPT:
            told = f"what is left of queue {queue.name} is kept for a job before it"
            return model.HeldBack.QUEUE_QUOTA, told
        if turn.chance is planner.Chance.ROOM_KEPT:
            return model.HeldBack.BEHIND_RESERVATION, "the room that there is is kept for jobs before it"
        return None, ""
