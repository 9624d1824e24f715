"""One plan: every job in line gets its turn, on a scratch copy of room, so that each sees those before it."""

import enum
import heapq
import math
from typing import NamedTuple

from leasehold.core.placement import backfill, book, ends, fit, model, order, room

#: Of groups as small as this, each node is looked at; for larger ones the index is asked.
_SMALL_GROUP = 16


class Chance(enum.Enum):
    """What a job meets at its turn."""

    FITS = enum.auto()
    #: Its queue has no quota left for it.
    QUOTA = enum.auto()
    #: What is left of its queue's quota is kept for a job before it.
    QUOTA_KEPT = enum.auto()
    #: No node has room for it.
    BLOCKED = enum.auto()
    #: Only nodes that are kept for others have.
    ROOM_KEPT = enum.auto()


class Turn(NamedTuple):
    """What came of a job's turn."""

    chance: Chance
    node: str = ""
    #: Jobs like it that run no longer than so many seconds may pass.
    longest_seconds: float = -math.inf


class Planner:
    """A scratch copy of room and quota, and the line's turns on it. Made anew for each plan."""

    def __init__(self, found: book.Book, now: float) -> None:
        self._book = found
        self._now = now
        self.free = dict(found.free)
        self._index = found.index.copy()
        self.placements: list[model.Placement] = []
        #: By node.
        self.promised: dict[str, backfill.Promise] = {}
        #: By queue.
        self._quota_kept: dict[str, backfill.Promise] = {}
        self._used: dict[str, model.Resources] = {}
        #: By node, and by queue: what this plan has placed.
        self._on_node: dict[str, ends.Ends] = {}
        self._of_queue: dict[str, ends.Ends] = {}
        #: Shapes for which a promise was sought.
        self._sought: set[model.Shape] = set()

    def run(self, most: int, *, before: order.Entry | None = None) -> None:
        """Give turns in line, until `most` are placed, or to those before an entry only."""
        heap = [
            (entry, 0, line)
            for state in self._book.shapes.values()
            for line in state.lines.values()
            if (entry := line.head) is not None
        ]
        heapq.heapify(heap)
        while heap and len(self.placements) < most:
            entry, position, line = heap[0]
            if before is not None and entry >= before:
                break
            turn = self.turn(entry, line.state, line.queue)
            if turn.chance is Chance.FITS:
                self._place(turn.node, entry, line)
                following: int | None = position + 1
            else:
                kept = len(self.promised) + len(self._quota_kept)
                following = self.refuse(turn, entry, position, line)
                if len(self.promised) + len(self._quota_kept) != kept and self._is_full():
                    heap = self._without_the_hopeless(heap)
                    if not heap or heap[0][2] is not line:
                        continue
            later = None if following is None else line.at(following)
            if later is None or following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (later, following, line))
        self._book.proposed({name: self.free[name] for name in self._on_node})

    def _is_full(self) -> bool:
        return len(self.promised) >= backfill.PROMISES_MAX

    def _without_the_hopeless(
        self, heap: list[tuple[order.Entry, int, book.JobLine]]
    ) -> list[tuple[order.Entry, int, book.JobLine]]:
        """All promises are made: lines for which there is no room have nothing to gain from a turn.

        Save those that may be the first to have their queue's quota kept for them.
        """
        unkept = {
            name
            for name, state in self._book.queues.items()
            if name not in self._quota_kept and self.left(state) is not None
        }
        kept = [item for item in heap if not item[2].state.is_blocked or item[2].queue.queue.name in unkept]
        heapq.heapify(kept)
        return kept

    def turn(self, entry: order.Entry, state: book.ShapeState, queue: book.QueueState) -> Turn:
        """What a job meets now. Changes nothing."""
        shape = state.shape
        ends_by = self._now + entry.run_seconds
        left = self.left(queue)
        if left is not None:
            if not left.holds(shape.required):
                return Turn(Chance.QUOTA)
            kept = self._quota_kept.get(queue.queue.name)
            if kept is not None and not kept.admits(shape.required, ends_by):
                return Turn(Chance.QUOTA_KEPT, longest_seconds=kept.until - self._now)
        if state.is_blocked:
            return Turn(Chance.BLOCKED)
        node = self._best(state)
        if node is not None:
            return Turn(Chance.FITS, node)
        turn = Turn(Chance.BLOCKED)
        for name, promise in self.promised.items():
            # The first is what most fail by, and quick.
            if not self.free[name].holds(shape.required) or name not in state.group.names:
                continue
            if not self._fits(shape, name):
                continue
            if promise.admits(shape.required, ends_by):
                return Turn(Chance.FITS, name)
            longest_seconds = max(turn.longest_seconds, promise.until - self._now)
            turn = Turn(Chance.ROOM_KEPT, longest_seconds=longest_seconds)
        return turn

    def left(self, queue: book.QueueState) -> model.Resources | None:
        """What a queue's jobs may still take, this plan counted; None: no limit."""
        if not queue.is_limited:
            return None
        return backfill.quota_left(queue.queue, self._used.get(queue.queue.name, queue.used))

    def reason(self, shape: model.Shape, entry: order.Entry, found: room.Room) -> model.BlockReason | None:
        """Why a node does not take a job now, reservations included; None: it does."""
        name = found.node.name
        reason = fit.block(shape, found.node, self.free.get(name, found.free))
        promise = self.promised.get(name)
        if reason is not None or promise is None:
            return reason
        is_admitted = promise.admits(shape.required, self._now + entry.run_seconds)
        return None if is_admitted else model.BlockReason.RESERVED

    def promise_to(self, job_id: str, now: float) -> float | None:
        """Until when a job has started for certain; None: nobody can tell."""
        for promise in self.promised.values():
            if promise.job_id == job_id and promise.is_known:
                return max(now, promise.until)
        return None

    def _fits(self, shape: model.Shape, name: str) -> bool:
        free = self.free.get(name)
        return free is not None and fit.block(shape, self._book.rooms[name].node, free) is None

    def _best(self, state: book.ShapeState) -> str | None:
        """The node to take, of those that are kept for nobody."""
        names = state.group.names
        if len(names) > _SMALL_GROUP:
            node = self._index.best(state.shape, names)
        else:
            node = room.best_of(state.shape, names.difference(self.promised), self.free)
        # The index only proposes; whether it fits is for the one function to say.
        return node if node is not None and self._fits(state.shape, node) else None

    def _place(self, node: str, entry: order.Entry, line: book.JobLine) -> None:
        required = line.state.shape.required
        ends_by = self._now + entry.run_seconds
        free = self.free[node]
        left = self.free[node] = free.minus(required)
        promise = self.promised.get(node)
        if promise is None:
            self._index.remove(node, free)
            self._index.add(node, left)
        else:
            promise.take(required, ends_by)
        running = model.Running(
            job_id=entry.job_id,
            node=node,
            queue=line.queue.queue.name,
            held=required,
            ends_by=None if math.isinf(ends_by) else ends_by,
        )
        _ends_of(self._on_node, node).add(running)
        if self.left(line.queue) is not None:
            name = line.queue.queue.name
            _ends_of(self._of_queue, name).add(running)
            self._used[name] = self._used.get(name, line.queue.used).plus(required)
            kept = self._quota_kept.get(name)
            if kept is not None:
                kept.take(required, ends_by)
        self.placements.append(model.Placement(entry.job_id, node))

    def refuse(self, turn: Turn, entry: order.Entry, position: int, line: book.JobLine) -> int | None:
        """Keep quota or room for it if it is the first to need that; gives the line's next that may pass."""
        if turn.chance is Chance.QUOTA:
            self._keep_quota(entry, line)
            return None
        if turn.chance is not Chance.QUOTA_KEPT:
            self._keep_room(entry, line)
        if turn.chance is Chance.BLOCKED:
            line.state.is_blocked = True
            return None
        return line.next_within(position + 1, turn.longest_seconds)

    def _keep_quota(self, entry: order.Entry, line: book.JobLine) -> None:
        name = line.queue.queue.name
        left = self.left(line.queue)
        if name in self._quota_kept or left is None:
            return
        placed = self._of_queue.get(name, _NOTHING_PLACED)
        wait = backfill.wait_beside(line.state.shape.required, left, line.queue.ends, placed)
        if wait is not None:
            self._quota_kept[name] = backfill.Promise(entry.job_id, wait, self._now)

    def _keep_room(self, entry: order.Entry, line: book.JobLine) -> None:
        state = line.state
        if self._is_full() or state.shape in self._sought:
            return
        self._sought.add(state.shape)
        if state.hopeless_since == self._book.topology:
            return
        found = self._soonest(state)
        if found is None:
            return
        node, wait = found
        self.promised[node] = backfill.Promise(entry.job_id, wait, self._now)
        self._index.remove(node, self.free[node])
        name = line.queue.queue.name
        left = self.left(line.queue)
        if left is not None and name not in self._quota_kept:
            placed = self._of_queue.get(name, _NOTHING_PLACED)
            quota = backfill.quota_at(wait.until, state.shape.required, left, line.queue.ends, placed)
            self._quota_kept[name] = backfill.Promise(entry.job_id, quota, self._now)

    def _soonest(self, state: book.ShapeState) -> tuple[str, ends.Wait] | None:
        """The node where a blocked job can start soonest, among those that are kept for nobody."""
        best: tuple[int, float, str] | None = None
        best_wait: ends.Wait | None = None
        is_hopeless = True
        required = state.shape.required
        waits, rooms = state.waits, self._book.rooms
        for name in state.group.names:
            if name not in self.free:
                continue  # not open
            found = rooms[name]
            known = waits.get(name)
            if name in self._on_node:
                wait = self._wait_on(required, found, self._on_node[name])
            elif known is not None and known[0] == found.version:
                wait = known[1]
            else:
                wait = self._wait_on(required, found, _NOTHING_PLACED)
                waits[name] = (found.version, wait)
            if wait is None:
                continue
            is_hopeless = False
            if name in self.promised:
                continue
            if best is None or (wait.unbounded, wait.until, name) < best:
                best, best_wait = (wait.unbounded, wait.until, name), wait
        if is_hopeless:
            state.hopeless_since = self._book.topology
        return None if best is None or best_wait is None else (best[2], best_wait)

    def _wait_on(self, required: model.Resources, found: room.Room, placed: ends.Ends) -> ends.Wait | None:
        if not found.node.total.holds(required):
            return None
        return backfill.wait_beside(required, self.free[found.node.name], found.ends, placed)


def _ends_of(by_name: dict[str, ends.Ends], name: str) -> ends.Ends:
    found = by_name.get(name)
    if found is None:
        found = by_name[name] = ends.Ends()
    return found


_NOTHING_PLACED = ends.Ends()
