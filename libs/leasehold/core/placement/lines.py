"""Waiting jobs by shape and queue, and which of them are worth a turn.

A shape for which no node has room is blocked until one grows; then the few shapes that fit there are found by
what they need, and the others are not looked at.
"""

import bisect
from collections.abc import Iterator

from leasehold.core.placement import ends, model, order

#: By node: until when it is kept, and what is left beside.
Promises = tuple[tuple[str, float, model.Resources], ...]


class Group:
    """Nodes that labels and templates allow to jobs with one selector and template."""

    __slots__ = ("names", "shapes")

    def __init__(self) -> None:
        self.names: set[str] = set()
        #: How many use it.
        self.shapes = 0


class ShapeState:
    """Waiting jobs of one shape, and what is known of their chances."""

    __slots__ = ("group", "hopeless_since", "is_blocked", "kept_out_by", "lines", "number", "shape")

    def __init__(self, shape: model.Shape, group: Group, number: int) -> None:
        self.shape = shape
        self.group = group
        #: No other has it.
        self.number = number
        #: By queue.
        self.lines: dict[str, JobLine] = {}
        #: No node has room for it; so it stays until one grows. Set by `Shapes`.
        self.is_blocked = False
        #: Promises that let none of its jobs pass; none has come since.
        self.kept_out_by: Promises | None = None
        #: The topology in which no open node could hold it, even when all that runs has ended.
        self.hopeless_since = -1


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


class JobLine(order.Line):
    """Waiting jobs of one shape and queue."""

    __slots__ = ("queue", "state")

    def __init__(self, state: ShapeState, queue: QueueState) -> None:
        super().__init__()
        self.state = state
        self.queue = queue


class Heads:
    """The first of every line, in order; so that who is next is known without a look at every line."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        #: Sorted.
        self.items: list[tuple[order.Entry, JobLine]] = []

    def moved(self, line: JobLine, before: order.Entry | None) -> None:
        """A line's first was `before`, and may be another now; None: the line was empty, or is."""
        if line.head is before:
            return
        if before is not None:
            del self.items[bisect.bisect_left(self.items, (before,))]
        if line.head is not None:
            # No two entries are equal, so lines are never compared.
            bisect.insort(self.items, (line.head, line))


class Shapes:
    """Those that have jobs in line, and which are blocked."""

    def __init__(self) -> None:
        self._states: dict[model.Shape, ShapeState] = {}
        self._made = 0
        #: Not blocked, as far as is known.
        self.open: dict[ShapeState, None] = {}
        #: Blocked, by CPUs; sorted by memory.
        self._blocked: dict[int, list[tuple[int, int, ShapeState]]] = {}

    def __iter__(self) -> Iterator[ShapeState]:
        return iter(self._states.values())

    def get(self, shape: model.Shape) -> ShapeState | None:
        """None: no job of it waits."""
        return self._states.get(shape)

    def add(self, shape: model.Shape, group: Group) -> ShapeState:
        """A shape of which no job has waited yet."""
        self._made += 1
        state = self._states[shape] = ShapeState(shape, group, self._made)
        self.open[state] = None
        return state

    def remove(self, state: ShapeState) -> None:
        """None of its jobs waits any more."""
        self.unblock(state)
        del self.open[state], self._states[state.shape]

    def block(self, state: ShapeState) -> None:
        """No node has room for it."""
        if not state.is_blocked:
            state.is_blocked = True
            del self.open[state]
            cpus, memory_bytes = state.shape.required
            bisect.insort(self._blocked.setdefault(cpus, []), (memory_bytes, state.number, state))

    def unblock(self, state: ShapeState) -> None:
        """A node may have."""
        if state.is_blocked:
            state.is_blocked = False
            self.open[state] = None
            cpus, memory_bytes = state.shape.required
            bucket = self._blocked[cpus]
            del bucket[bisect.bisect_left(bucket, (memory_bytes, state.number))]
            if not bucket:
                del self._blocked[cpus]

    def blocked_within(self, free: model.Resources) -> list[ShapeState]:
        """Blocked shapes that so much is enough for."""
        return [
            state
            for cpus, bucket in self._blocked.items()
            if cpus <= free.cpus
            for _, _, state in bucket[: bisect.bisect_left(bucket, (free.memory_bytes + 1,))]
        ]

    def unblock_all(self) -> None:
        """Nothing is known any more."""
        for state in self._states.values():
            state.is_blocked = False
        self.open = dict.fromkeys(self._states.values())
        self._blocked.clear()
