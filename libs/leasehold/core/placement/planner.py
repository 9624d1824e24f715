"""One plan: every job in line gets its turn, on a scratch copy of room, so that each sees those before it."""

import enum
import heapq
import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from leasehold.core.placement import backfill, book, ends, fit, lines, model, order, room

#: Of groups as small as this, each node is looked at; for larger ones the index is asked.
_SMALL_GROUP = 16
#: More lines than these are gone through anew once room that had been found is taken.
_AHEAD_MAX = 64


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
        #: Blocked shapes may have room there, and nowhere else.
        self._grown = found.look_again()
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
        #: Once all are made.
        self._promises: lines.Promises | None = None
        #: Shapes for which a promise was sought.
        self._sought: set[lines.ShapeState] = set()

    def run(self, most: int, *, before: order.Entry | None = None) -> None:
        """Give turns in line, until `most` are placed, or to those before an entry only."""
        line_up = _LineUp(self._book)
        item = None
        while len(self.placements) < most and (item := line_up.next()) is not None:
            entry, position, line = item
            if before is not None and entry >= before:
                break
            turn = self.turn(entry, line.state, line.queue)
            if turn.chance is Chance.FITS:
                self._place(turn.node, entry, line)
                line_up.follow(line, position + 1)
                if self._is_full() and turn.node in self._grown and line_up.ahead > _AHEAD_MAX:
                    # Most of those that would have had room there have none any more.
                    line_up.leave_out_blocked(self._unkept(), self._perhaps_open())
                continue
            kept = len(self.promised) + len(self._quota_kept)
            following = self.refuse(turn, entry, position, line)
            if following is not None:
                line_up.follow(line, following)
            if len(self.promised) + len(self._quota_kept) != kept and self._is_full():
                line_up.leave_out_blocked(self._unkept(), self._perhaps_open())
        self._book.looked({name: self.free[name] for name in self._on_node}, at_all=item is None)

    def _perhaps_open(self) -> Iterable[lines.ShapeState]:
        """Shapes that are not known to be blocked, nor to be kept out by the promises that are made now."""
        shapes = self._book.shapes
        self._promises = tuple(
            (name, promise.until, promise.extra) for name, promise in sorted(self.promised.items())
        )
        still = [
            state for state in shapes.open if state.kept_out_by != self._promises or self._has_grown_for(state)
        ]
        grown = [state for name in self._grown for state in shapes.blocked_within(self.free[name])]
        return dict.fromkeys([*still, *grown])

    def _has_grown_for(self, state: lines.ShapeState) -> bool:
        return any(
            # The first is what most fail by, and quick.
            self.free[name].holds(state.shape.required) and name in state.group.names
            for name in self._grown
        )

    def _is_blocked(self, state: lines.ShapeState) -> bool:
        if state.is_blocked and self._has_grown_for(state):
            self._book.shapes.unblock(state)
        return state.is_blocked

    def _is_full(self) -> bool:
        return len(self.promised) >= backfill.PROMISES_MAX

    def _unkept(self) -> set[str]:
        """Queues whose quota may yet be kept, for the first that lacks it."""
        return {
            name
            for name, state in self._book.queues.items()
            if name not in self._quota_kept and self.left(state) is not None
        }

    def turn(self, entry: order.Entry, state: lines.ShapeState, queue: lines.QueueState) -> Turn:
        """What a job meets now. Changes nothing."""
        shape = state.shape
        ends_by = self._now + entry.run_seconds
        # Be there quota or not: what has grown is looked at once.
        is_blocked = self._is_blocked(state)
        left = self.left(queue)
        if left is not None:
            if not left.holds(shape.required):
                return Turn(Chance.QUOTA)
            kept = self._quota_kept.get(queue.queue.name)
            if kept is not None and not kept.admits(shape.required, ends_by):
                return Turn(Chance.QUOTA_KEPT, longest_seconds=kept.until - self._now)
        if is_blocked:
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

    def left(self, queue: lines.QueueState) -> model.Resources | None:
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

    def _best(self, state: lines.ShapeState) -> str | None:
        """The node to take, of those that are kept for nobody."""
        names = state.group.names
        if len(names) > _SMALL_GROUP:
            node = self._index.best(state.shape, names)
        else:
            node = room.best_of(state.shape, names.difference(self.promised), self.free)
        # The index only proposes; whether it fits is for the one function to say.
        return node if node is not None and self._fits(state.shape, node) else None

    def _place(self, node: str, entry: order.Entry, line: lines.JobLine) -> None:
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

    def refuse(self, turn: Turn, entry: order.Entry, position: int, line: lines.JobLine) -> int | None:
        """Keep quota or room for it if it is the first to need that; gives the line's next that may pass."""
        if turn.chance is Chance.QUOTA:
            self._keep_quota(entry, line)
            return None
        if turn.chance is not Chance.QUOTA_KEPT:
            self._keep_room(entry, line)
        if turn.chance is Chance.BLOCKED:
            self._book.shapes.block(line.state)
            return None
        following = line.next_within(position + 1, turn.longest_seconds)
        if (
            following is None
            and position == 0
            and turn.chance is Chance.ROOM_KEPT
            and len(line.state.lines) == 1
        ):
            line.state.kept_out_by = self._promises
        return following

    def _keep_quota(self, entry: order.Entry, line: lines.JobLine) -> None:
        name = line.queue.queue.name
        left = self.left(line.queue)
        if name in self._quota_kept or left is None:
            return
        placed = self._of_queue.get(name, _NOTHING_PLACED)
        wait = backfill.wait_beside(line.state.shape.required, left, line.queue.ends, placed)
        if wait is not None:
            self._quota_kept[name] = backfill.Promise(entry.job_id, wait, self._now)

    def _keep_room(self, entry: order.Entry, line: lines.JobLine) -> None:
        state = line.state
        if self._is_full() or state in self._sought:
            return
        self._sought.add(state)
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

    def _soonest(self, state: lines.ShapeState) -> tuple[str, ends.Wait] | None:
        """The node where a blocked job can start soonest, among those that are kept for nobody."""
        is_hopeless, best = True, None
        for name, wait in self._book.soonest(state):
            is_hopeless = False
            if name not in self.promised and name not in self._on_node:
                best = (wait.unbounded, wait.until, name, wait)
                break
        # Of those the ranking does not know what this plan has placed there.
        for name, placed in self._on_node.items():
            if name in self.promised or name not in state.group.names:
                continue
            found = backfill.wait_on(state.shape.required, self._book.rooms[name], self.free[name], placed)
            if found is not None and (best is None or (found.unbounded, found.until, name) < best[:3]):
                best = (found.unbounded, found.until, name, found)
        if is_hopeless and best is None:
            state.hopeless_since = self._book.topology
        return None if best is None else best[2:]


class _LineUp:
    """Whose turn it is: the first of each line by and by, and of those that go on, who follows."""

    def __init__(self, found: book.Book) -> None:
        self._book = found
        self._heads = found.heads.items
        self._at = 0
        self._following: list[tuple[order.Entry, int, lines.JobLine]] = []

    def next(self) -> tuple[order.Entry, int, lines.JobLine] | None:
        """An entry with its position in its line; None: there is none."""
        head = self._heads[self._at] if self._at < len(self._heads) else None
        if self._following and (head is None or self._following[0][0] < head[0]):
            return heapq.heappop(self._following)
        if head is None:
            return None
        self._at += 1
        entry, line = head
        return entry, 0, line

    @property
    def ahead(self) -> int:
        """Lines that had no turn yet."""
        return len(self._heads) - self._at

    def follow(self, line: lines.JobLine, position: int) -> None:
        """The line goes on at this position, if it is that long."""
        entry = line.at(position)
        if entry is not None:
            heapq.heappush(self._following, (entry, position, line))

    def leave_out_blocked(self, queues: Collection[str], chosen: Iterable[lines.ShapeState]) -> None:
        """Of lines that had no turn yet, only those of `chosen` shapes, and of `queues`, may gain by one."""
        if self._at == len(self._heads):
            return
        since = self._heads[self._at][0]
        heads = [
            (line.head, line)
            for state in chosen
            for line in state.lines.values()
            if line.head is not None and line.head >= since and line.queue.queue.name not in queues
        ]
        if queues:
            heads += [item for item in self._heads[self._at :] if item[1].queue.queue.name in queues]
        heads.sort()
        self._heads, self._at = heads, 0


def _ends_of(by_name: dict[str, ends.Ends], name: str) -> ends.Ends:
    found = by_name.get(name)
    if found is None:
        found = by_name[name] = ends.Ends()
    return found


_NOTHING_PLACED = ends.Ends()
