"""Which nodes have how much room, sorted so that the best that fits is found without asking each."""

import bisect
import itertools
from collections.abc import Container, Iterable, Mapping

from leasehold.core.placement import ends, model


class Room:
    """A node, what is free on it, and when what runs there ends."""

    __slots__ = ("ends", "free", "node", "used")

    def __init__(self, node: model.Node, found: ends.Ends) -> None:
        self.node = node
        self.used = node.used
        self.free = node.total.minus(node.used)
        self.ends = found

    def use(self, used: model.Resources) -> None:
        """So much is used from now on."""
        self.used = used
        self.free = self.node.total.minus(used)


class FreeIndex:
    """Names of nodes by what they have free: by CPUs, then by memory, then by name.

    Best fit (`PACK`) is the first in that order that is large enough, `SPREAD` the last. Nodes without a free
    CPU or without free memory are left out: no job fits there.
    """

    __slots__ = ("_by_cpus", "_cpus", "_shared")

    def __init__(self) -> None:
        self._by_cpus: dict[int, list[tuple[int, str]]] = {}
        #: Keys of buckets that are another index's, and are copied before a change.
        self._shared: set[int] = set()
        #: Sorted: the keys of `_by_cpus`.
        self._cpus: list[int] = []

    def copy(self) -> "FreeIndex":
        """One that changes by itself, for as long as this one does not."""
        copied = FreeIndex()
        copied._by_cpus = self._by_cpus.copy()
        copied._cpus = self._cpus[:]
        copied._shared = set(self._cpus)
        return copied

    def _bucket(self, cpus: int) -> list[tuple[int, str]] | None:
        """To be changed."""
        if cpus in self._shared:
            self._shared.remove(cpus)
            self._by_cpus[cpus] = self._by_cpus[cpus][:]
        return self._by_cpus.get(cpus)

    def add(self, name: str, free: model.Resources) -> None:
        """Put a node in."""
        cpus, memory_bytes = free
        if cpus < 1 or memory_bytes < 1:
            return
        bucket = self._bucket(cpus)
        if bucket is None:
            self._by_cpus[cpus] = [(memory_bytes, name)]
            bisect.insort(self._cpus, cpus)
        else:
            bisect.insort(bucket, (memory_bytes, name))

    def remove(self, name: str, free: model.Resources) -> None:
        """Take out a node that was put in with so much `free`."""
        cpus, memory_bytes = free
        if cpus < 1 or memory_bytes < 1:
            return
        bucket = self._bucket(cpus) or []
        del bucket[bisect.bisect_left(bucket, (memory_bytes, name))]
        if not bucket:
            del self._by_cpus[cpus]
            del self._cpus[bisect.bisect_left(self._cpus, cpus)]

    def best(self, shape: model.Shape, allowed: Container[str]) -> str | None:
        """The node to take among those `allowed` that have room for a job of `shape`."""
        cpus, memory_bytes = shape.required
        first = bisect.bisect_left(self._cpus, cpus)
        if shape.spreading is model.Spreading.PACK:
            for found in itertools.islice(self._cpus, first, None):
                bucket = self._by_cpus[found]
                if bucket[-1][0] < memory_bytes:
                    continue
                for _, name in itertools.islice(bucket, bisect.bisect_left(bucket, (memory_bytes,)), None):
                    if name in allowed:
                        return name
            return None
        for at in range(len(self._cpus) - 1, first - 1, -1):
            for free_bytes, name in reversed(self._by_cpus[self._cpus[at]]):
                if free_bytes < memory_bytes:
                    break
                if name in allowed:
                    return name
        return None


def best_of(shape: model.Shape, names: Iterable[str], free: Mapping[str, model.Resources]) -> str | None:
    """As `FreeIndex.best`, by looking at each of `names` that is in `free`."""
    fitting = [
        (*found, name)
        for name in names
        if (found := free.get(name)) is not None and found.holds(shape.required)
    ]
    if not fitting:
        return None
    return (min if shape.spreading is model.Spreading.PACK else max)(fitting)[2]
