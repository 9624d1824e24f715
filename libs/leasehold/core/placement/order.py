"""Who is before whom: lines of waiting jobs, sorted by a key that never changes.

A job's key is ``submit time - priority * ageing``. It never changes, yet jobs age: one that is submitted
later needs a point of priority more for every `ageing` seconds to overtake, and priorities are bounded; so
whoever waits long enough has only finitely many before it. Nothing is ever sorted again.

Jobs of one shape and queue stand in one line: where its first finds no room, or no quota, neither
do the others.
"""

import bisect
import math
from collections.abc import Iterable
from typing import NamedTuple

from leasehold.core.placement import model


class Entry(NamedTuple):
    """A job in line; entries sort by key, then by id."""

    key: float
    job_id: str
    #: Longest run in seconds; infinite: no end is known.
    run_seconds: float


def entry_of(waiting: model.Waiting, ageing_seconds: float) -> Entry:
    """The entry of a job that waits."""
    run_seconds = math.inf if waiting.max_run_seconds is None else waiting.max_run_seconds
    return Entry(waiting.submit_time_seconds - waiting.priority * ageing_seconds, waiting.job_id, run_seconds)


class Line:
    """Entries in order. Taking the first is cheap, whatever the length; so is joining as the last."""

    __slots__ = ("_entries", "_first", "_shortest_seconds", "head")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        #: Those before it are gone, and are dropped together now and then.
        self._first = 0
        #: No entry runs for less.
        self._shortest_seconds = math.inf
        #: The first, if there is one.
        self.head: Entry | None = None

    def __len__(self) -> int:
        return len(self._entries) - self._first

    def add(self, entry: Entry) -> None:
        """Join."""
        bisect.insort(self._entries, entry, lo=self._first)
        self._shortest_seconds = min(self._shortest_seconds, entry.run_seconds)
        self.head = self._entries[self._first]

    def extend(self, entries: Iterable[Entry]) -> None:
        """Join, all of them."""
        self._entries = sorted([*self._entries[self._first :], *entries])
        self._first = 0
        self._shortest_seconds = min(entry.run_seconds for entry in self._entries)
        self.head = self.at(0)

    def remove(self, entry: Entry) -> None:
        """Leave; `entry` is in line."""
        at = bisect.bisect_left(self._entries, entry, lo=self._first)
        if at != self._first:
            del self._entries[at]
            return
        self._first += 1
        self.head = self.at(0)
        if self._first > 64 and self._first * 2 > len(self._entries):
            del self._entries[: self._first]
            self._first = 0

    def rank(self, entry: Entry) -> int:
        """How many are before `entry`, which need not be in line."""
        return bisect.bisect_left(self._entries, entry, lo=self._first) - self._first

    def at(self, position: int) -> Entry | None:
        """The entry at `position` (from 0), if the line is that long."""
        index = self._first + position
        return self._entries[index] if index < len(self._entries) else None

    def next_within(self, position: int, run_seconds: float) -> int | None:
        """Position of the first from `position` on whose longest run is at most `run_seconds`."""
        if run_seconds < self._shortest_seconds:
            return None
        for index in range(self._first + position, len(self._entries)):
            if self._entries[index].run_seconds <= run_seconds:
                return index - self._first
        # Those that were are gone: else all would be asked again for each plan.
        self._shortest_seconds = min(entry.run_seconds for entry in self._entries[self._first :])
        return None
