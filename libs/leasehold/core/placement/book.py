"""What the scheduler knows as committed: nodes, queues, who runs and who waits, kept ready for planning."""

import heapq
import math

from leasehold.core.placement import ends, fit, model, order, room

#: So many changed nodes are tried one by one; of more, the index is asked.
_GROWN_MAX = 8


class Group:
    """Nodes that labels and templates allow to jobs with one selector and template."""

    __slots__ = ("names", "shapes")

    def __init__(self) -> None:
        self.names: set[str] = set()
        #: How many use it.
        self.shapes = 0


class ShapeState:
    """Waiting jobs of one shape, and what is known of their chances."""

    __slots__ = ("group", "hopeless_since", "is_blocked", "lines", "shape", "waits")

    def __init__(self, shape: model.Shape, group: Group) -> None:
        self.shape = shape
        self.group = group
        #: By queue.
        self.lines: dict[str, JobLine] = {}
        #: No node has room for it; so it stays until one grows.
        self.is_blocked = False
        #: The topology in which no open node could hold it, even when all that runs has ended.
        self.hopeless_since = -1
        #: For a promise: by node, the version of its room and how long to wait there.
        self.waits: dict[str, tuple[int, ends.Wait | None]] = {}


class JobLine(order.Line):
    """Waiting jobs of one shape and queue."""

    __slots__ = ("queue", "state")

    def __init__(self, state: ShapeState, queue: "QueueState") -> None:
        super().__init__()
        self.state = state
        self.queue = queue


class QueueState:
    """A queue, and what runs of it."""

    __slots__ = ("ends", "is_limited", "queue", "used")

    def __init__(self, queue: model.Queue) -> None:
        self.put(queue)
        self.used = model.Resources(0, 0)
        self.ends = ends.Ends()

    def put(self, queue: model.Queue) -> None:
        """So it is from now on."""
        self.queue = queue
        self.is_limited = queue.nominal_cpus is not None or queue.nominal_memory_bytes is not None


class Book:
    """The state; the planner reads it and writes only what it found out (`is_blocked`, `waits`)."""

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds
        self.rooms: dict[str, room.Room] = {}
        self.free: dict[str, model.Resources] = {}
        self.index = room.FreeIndex()
        self.shapes: dict[model.Shape, ShapeState] = {}
        self._groups: dict[tuple[tuple[tuple[str, str], ...], str], Group] = {}
        self.queues: dict[str, QueueState] = {}
        #: Queues that were put, rather than only named by jobs.
        self.known_queues: set[str] = set()
        self.waiting: dict[str, tuple[order.Entry, JobLine]] = {}
        #: Jobs that may not start yet.
        self.resting: dict[str, model.Waiting] = {}
        self._alarms: list[tuple[float, str]] = []
        self._running: dict[str, model.Running] = {}
        self._ends: dict[str, ends.Ends] = {}
        self._versions = 0
        #: Another one whenever a node comes, goes or changes other than by what runs on it.
        self.topology = 0
        #: Nodes that may have more room than when shapes were found to be blocked.
        self._grown: set[str] = set()
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

    def _queue(self, name: str) -> QueueState:
        state = self.queues.get(name)
        if state is None:
            state = self.queues[name] = QueueState(model.Queue(name=name))
        return state

    def put_node(self, node: model.Node) -> None:
        """Create or replace."""
        self.topology += 1
        before = self.rooms.get(node.name)
        self._hide(before)
        found = room.Room(node, self._ends.setdefault(node.name, ends.Ends()), self._next_version())
        self.rooms[node.name] = found
        self._show(found)
        self._grown.add(node.name)
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
        if name in self._ends and self._ends[name].is_empty():
            del self._ends[name]
        for group in self._groups.values():
            group.names.discard(name)
        for state in self.shapes.values():
            state.waits.pop(name, None)

    def _next_version(self) -> int:
        self._versions += 1
        return self._versions

    def _show(self, found: room.Room) -> None:
        if found.node.openness is model.Openness.OPEN:
            self.free[found.node.name] = found.free
            self.index.add(found.node.name, found.free)

    def _hide(self, found: room.Room | None) -> None:
        if found is not None and found.node.openness is model.Openness.OPEN:
            del self.free[found.node.name]
            self.index.remove(found.node.name, found.free)

    def add(self, waiting: model.Waiting) -> None:
        """Join the line, or rest; one that waits already is replaced."""
        self.remove(waiting.job_id)
        if waiting.not_before > -math.inf:
            self.resting[waiting.job_id] = waiting
            heapq.heappush(self._alarms, (waiting.not_before, waiting.job_id))
        else:
            self._join(waiting)

    def _join(self, waiting: model.Waiting) -> None:
        state = self.shapes.get(waiting.shape)
        if state is None:
            state = self.shapes[waiting.shape] = ShapeState(waiting.shape, self.group_of(waiting.shape))
            state.group.shapes += 1
        entry = self.entry_of(waiting)
        line = state.lines.get(waiting.queue)
        if line is None:
            line = state.lines[waiting.queue] = JobLine(state, self._queue(waiting.queue))
        line.add(entry)
        self.waiting[waiting.job_id] = (entry, line)

    def group_of(self, shape: model.Shape) -> Group:
        """The nodes that `shape` is allowed on."""
        key = (shape.selector, shape.template)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group()
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
        line.remove(entry)
        if len(line) == 0:
            self._drop_line(line)

    def _drop_line(self, line: JobLine) -> None:
        state = line.state
        del state.lines[line.queue.queue.name]
        if state.lines:
            return
        del self.shapes[state.shape]
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
        self._grown.add(running.node)

    def _use(self, name: str, more: model.Resources) -> None:
        found = self.rooms.get(name)
        if found is None:
            return
        self._hide(found)
        found.use(found.used.plus(more), self._next_version())
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
        return sum(line.rank(entry) for state in self.shapes.values() for line in state.lines.values())

    def proposed(self, left: dict[str, model.Resources]) -> None:
        """A plan leaves so much on the nodes that it fills; shapes were found blocked beside that."""
        self._proposed = left

    def look_again(self) -> None:
        """Unblock the shapes that a node which has grown has room for."""
        for name, left in self._proposed.items():
            free = self.free.get(name)
            if free is not None and not left.holds(free):
                self._grown.add(name)
        self._proposed = {}
        grown = [self.rooms[name] for name in self._grown if name in self.rooms]
        self._grown.clear()
        for state in self.shapes.values():
            if state.is_blocked:
                state.is_blocked = len(grown) <= _GROWN_MAX and not _has_room(state, grown)


def _has_room(state: ShapeState, rooms: list[room.Room]) -> bool:
    required = state.shape.required
    return any(
        # The first two are what most fail by, and quick.
        found.free.holds(required)
        and found.node.name in state.group.names
        and fit.block(state.shape, found.node, found.free) is None
        for found in rooms
    )


def _bare_shape(selector: tuple[tuple[str, str], ...], template: str) -> model.Shape:
    return model.Shape(required=model.Resources(1, 1), selector=selector, template=template)
