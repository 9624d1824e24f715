"""Where a blocked job could start soonest: found out as far as is asked for, and kept up to date."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from leasehold.core.placement import ends

#: How good a wait is, and where; the smaller, the better.
_Place = tuple[int, float, str]
#: How long a shape's jobs would wait on a node; None: for ever, or they are not allowed there.
WaitOn = Callable[[str], ends.Wait | None]


class Ranking:
    """Nodes by how long one shape's jobs would wait there.

    A node on which there is no room now is waited for at least until the first of its jobs ends; so, gone
    through in the order of first ends, few nodes are looked at until the best is known.
    """

    __slots__ = ("_places", "_unseen", "_waits", "version")

    def __init__(self, version: int, first_ends: Sequence[tuple[float, str]]) -> None:
        #: All changes of nodes up to this one are known.
        self.version = version
        #: The first to be looked at is the last.
        self._unseen = list(reversed(first_ends))
        self._places: list[_Place] = []
        self._waits: dict[str, ends.Wait | None] = {}

    def update(self, version: int, names: Iterable[str], wait_on: WaitOn) -> None:
        """These nodes have changed since `self.version`."""
        for name in names:
            before = self._waits.get(name)
            if before is not None:
                del self._places[bisect.bisect_left(self._places, (before.unbounded, before.until, name))]
            self._see(name, wait_on)
        self.version = version

    def _see(self, name: str, wait_on: WaitOn) -> None:
        wait = self._waits[name] = wait_on(name)
        if wait is not None:
            bisect.insort(self._places, (wait.unbounded, wait.until, name))

    def best(self, wait_on: WaitOn) -> Iterator[tuple[str, ends.Wait]]:
        """Nodes on which there is no room now, the best first; others may come anywhere."""
        given: set[str] = set()
        while True:
            place = next((each for each in self._places if each[2] not in given), None)
            if self._unseen and (place is None or (0, self._unseen[-1][0], "") < place):
                _, name = self._unseen.pop()
                if name not in self._waits:
                    self._see(name, wait_on)
                continue
            if place is None:
                return
            given.add(place[2])
            wait = self._waits[place[2]]
            if wait is not None:
                yield place[2], wait
