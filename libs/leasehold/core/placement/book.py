"""What the scheduler knows as committed: nodes, queues, who runs and who waits, kept ready for planning."""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator

from leasehold.core.placement import backfill, ends, fit, lines, model, order, ranking, room

#: On so many changed nodes blocked shapes are tried; with more, no shape counts as blocked any more.
_GROWN_MAX = 32
#: So many shapes' rankings are kept: those of the few that are first in line are asked for again and again.
_RANKINGS_MAX = 16


class Book:
    """The state; the planner reads it and writes only what it found out of shapes' chances."""

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds
        self.rooms: dict[str, room.Room] = {}
        self.free: dict[str, model.Resources] = {}
        self.index = room.FreeIndex()
        self.shapes = lines.Shapes()
        self.heads = lines.Heads()
        #: Of open nodes, when the first of their jobs ends at the latest; and sorted by that.
        self._first_end: dict[str, float] = {}
        self._first_ends: list[tuple[float, str]] = []
        self._rankings: dict[lines.ShapeState, ranking.Ranking] = {}
        self._groups: dict[tuple[tuple[tuple[str, str], ...], str], lines.Group] = {}
        self.queues: dict[str, lines.QueueState] = {}
        #: Queues that were put, rather than only named by jobs.
        self.known_queues: set[str] = set()
        self.waiting: dict[str, tuple[order.Entry, lines.JobLine]] = {}
        #: Jobs that may not start yet.
        self.resting: dict[str, model.Waiting] = {}
        self._alarms: list[tuple[float, str]] = []
        self._running: dict[str, model.Running] = {}
        self._ends: dict[str, ends.Ends] = {}
        self._version = 0
        #: Number of the last change of each node, the newest last.
        self._changes: dict[str, int] = {}
        #: Another one whenever a node comes, goes or changes other than by what runs on it.
        self.topology = 0
        #: Nodes that may have more room than when shapes were found to be blocked.
        self._grown: dict[str, None] = {}
        #: Nodes that the last plan filled, and what it left: less than that is no news.
        self._proposed: dict[str, model.Resources] = {}

    def entry_of(self, waiting: model.Waiting) -> order.Entry:
        """Where it would stand in line."""
        return order.entry_of(waiting, self._ageing_seconds)

    def put_queue(self, queue: model.Queue) -> None:
        """Create or replace; what runs of it counts on."""
        self._queue(queue.name).put(queue)
        self.known_queues.add(queue.name)

    def remove_queue(self, name: str) -> None:
        """Forget; jobs of it that there still are have no limit."""
        self.known_queues.discard(name)
        state = self.queues.get(name)
        if state is not None:
            state.put(model.Queue(name=name))

    def _queue(self, name: str) -> lines.QueueState:
        state = self.queues.get(name)
        if state is None:
            state = self.queues[name] = lines.QueueState(model.Queue(name=name))
        return state

    def put_node(self, node: model.Node) -> None:
        """Create or replace."""
        self.topology += 1
        before = self.rooms.get(node.name)
        self._hide(before)
        self._changed(node.name)
        found = room.Room(node, self._ends.setdefault(node.name, ends.Ends()))
        self.rooms[node.name] = found
        self._show(found)
        self._grown[node.name] = None
        if before and before.node.labels == node.labels and before.node.templates == node.templates:
            return
        for (selector, template), group in self._groups.items():
            if fit.is_eligible(_bare_shape(selector, template), node):
                group.names.add(node.name)
            else:
                group.names.discard(node.name)

    def remove_node(self, name: str) -> None:
        """Forget; what runs there counts on in its queues."""
        self.topology += 1
        self._hide(self.rooms.pop(name, None))
        self._changed(name)
        if name in self._ends and self._ends[name].is_empty():
            del self._ends[name]
        for group in self._groups.values():
            group.names.discard(name)

    def _changed(self, name: str) -> None:
        self._version += 1
        self._changes.pop(name, None)
        self._changes[name] = self._version

    def _changed_since(self, version: int) -> list[str]:
        return [
            name
            for name, _ in itertools.takewhile(lambda item: item[1] > version, reversed(self._changes.items()))
        ]

    def soonest(self, state: lines.ShapeState) -> Iterator[tuple[str, ends.Wait]]:
        """Nodes where a job that finds no room would start soonest by what is committed; see `ranking`."""

        def wait_on(name: str) -> ends.Wait | None:
            if name not in self.free or name not in state.group.names:
                return None
            return backfill.wait_on(state.shape.required, self.rooms[name], self.free[name])

        found = self._rankings.pop(state, None)
        if found is None:
            found = ranking.Ranking(self._version, self._first_ends)
        elif found.version != self._version:
            found.update(self._version, self._changed_since(found.version), wait_on)
        # The one that was asked for last is the last.
        self._rankings[state] = found
        if len(self._rankings) > _RANKINGS_MAX:
            del self._rankings[next(iter(self._rankings))]
        return found.best(wait_on)

    def _show(self, found: room.Room) -> None:
        if found.node.openness is model.Openness.OPEN:
            name = found.node.name
            self.free[name] = found.free
            self.index.add(name, found.free)
            self._first_end[name] = found.ends.first_end()
            bisect.insort(self._first_ends, (self._first_end[name], name))

    def _hide(self, found: room.Room | None) -> None:
        if found is not None and found.node.openness is model.Openness.OPEN:
            name = found.node.name
            del self.free[name]
            self.index.remove(name, found.free)
            del self._first_ends[bisect.bisect_left(self._first_ends, (self._first_end.pop(name), name))]

    def add(self, waiting: model.Waiting) -> None:
        """Join the line, or rest; one that waits already is replaced."""
        self.remove(waiting.job_id)
        if waiting.not_before > -math.inf:
            self.resting[waiting.job_id] = waiting
            heapq.heappush(self._alarms, (waiting.not_before, waiting.job_id))
        else:
            self._join(waiting)

    def add_all(self, found: Iterable[model.Waiting]) -> None:
        """Jobs that are not in line yet join it, or rest."""
        joining: dict[lines.JobLine, list[order.Entry]] = {}
        for waiting in found:
            if waiting.not_before > -math.inf:
                self.add(waiting)
                continue
            entry, line = self.entry_of(waiting), self._line_of(waiting)
            joining.setdefault(line, []).append(entry)
            self.waiting[waiting.job_id] = (entry, line)
        for line, entries in joining.items():
            before = line.head
            line.extend(entries)
            self.heads.moved(line, before)

    def _join(self, waiting: model.Waiting) -> None:
        entry, line = self.entry_of(waiting), self._line_of(waiting)
        before = line.head
        line.add(entry)
        self.heads.moved(line, before)
        self.waiting[waiting.job_id] = (entry, line)

    def _line_of(self, waiting: model.Waiting) -> lines.JobLine:
        state = self.shapes.get(waiting.shape)
        if state is not None:
            # A job that may pass, perhaps.
            state.kept_out_by = None
        if state is None:
            state = self.shapes.add(waiting.shape, self.group_of(waiting.shape))
            state.group.shapes += 1
        line = state.lines.get(waiting.queue)
        if line is None:
            line = state.lines[waiting.queue] = lines.JobLine(state, self._queue(waiting.queue))
        return line

    def group_of(self, shape: model.Shape) -> lines.Group:
        """The nodes that `shape` is allowed on."""
        key = (shape.selector, shape.template)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = lines.Group()
            group.names.update(name for name, found in self.rooms.items() if fit.is_eligible(shape, found.node))
        return group

    def remove(self, job_id: str) -> None:
        """Leave the line, if it is in."""
        if self.resting.pop(job_id, None) is not None:
            return
        found = self.waiting.pop(job_id, None)
        if found is None:
            return
        entry, line = found
        before = line.head
        line.remove(entry)
        self.heads.moved(line, before)
        if len(line) == 0:
            self._drop_line(line)

    def _drop_line(self, line: lines.JobLine) -> None:
        state = line.state
        del state.lines[line.queue.queue.name]
        if state.lines:
            return
        self.shapes.remove(state)
        self._rankings.pop(state, None)
        state.group.shapes -= 1
        if state.group.shapes == 0:
            del self._groups[(state.shape.selector, state.shape.template)]

    def started(self, running: model.Running) -> None:
        """It has an allocation from now on."""
        self.remove(running.job_id)
        self.ended(running.job_id)
        self._running[running.job_id] = running
        self._ends.setdefault(running.node, ends.Ends()).add(running)
        queue = self._queue(running.queue)
        queue.ends.add(running)
        queue.used = queue.used.plus(running.held)
        self._use(running.node, running.held)

    def ended(self, job_id: str) -> None:
        """Its allocation is released, if it has one."""
        running = self._running.pop(job_id, None)
        if running is None:
            return
        on_node = self._ends[running.node]
        on_node.remove(running)
        if on_node.is_empty() and running.node not in self.rooms:
            del self._ends[running.node]
        queue = self.queues[running.queue]
        queue.ends.remove(running)
        queue.used = queue.used.minus(running.held)
        self._use(running.node, model.Resources(0, 0).minus(running.held))
        self._grown[running.node] = None

    def _use(self, name: str, more: model.Resources) -> None:
        found = self.rooms.get(name)
        if found is None:
            return
        self._hide(found)
        self._changed(name)
        found.use(found.used.plus(more))
        self._show(found)

    def wake(self, now: float) -> None:
        """Let those join the line whose rest is over."""
        while self._alarms and self._alarms[0][0] <= now:
            _, job_id = heapq.heappop(self._alarms)
            waiting = self.resting.get(job_id)
            if waiting is not None and waiting.not_before <= now:
                del self.resting[job_id]
                self._join(waiting)

    def next_alarm(self) -> float:
        """When the next rest is over; infinite: none rests."""
        while self._alarms:
            at, job_id = self._alarms[0]
            waiting = self.resting.get(job_id)
            if waiting is not None and waiting.not_before == at:
                return at
            heapq.heappop(self._alarms)
        return math.inf

    def rank(self, entry: order.Entry) -> int:
        """How many are before an entry in all lines."""
        return sum(line.rank(entry) for state in self.shapes for line in state.lines.values())

    def look_again(self) -> list[str]:
        """Nodes that have grown since blocked shapes were tried there; all others have no room for them."""
        for name, left in self._proposed.items():
            free = self.free.get(name)
            if free is not None and not left.holds(free):
                self._grown[name] = None
        self._proposed = {}
        if len(self._grown) > _GROWN_MAX:
            self.shapes.unblock_all()
            self._grown.clear()
        return [name for name in self._grown if name in self.free]

    def looked(self, left: dict[str, model.Resources], *, at_all: bool) -> None:
        """A plan leaves so much on the nodes that it fills; what is blocked now is so beside that.

        `at_all`: every blocked shape was tried on the nodes that had grown.
        """
        self._proposed = left
        if at_all:
            self._grown.clear()


def _bare_shape(selector: tuple[tuple[str, str], ...], template: str) -> model.Shape:
    return model.Shape(required=model.Resources(1, 1), selector=selector, template=template)
