"""Leases of external holders: workloads that run elsewhere, which nobody here can kill.

A holder counts its TTL from the send of its renewal, and stops when it is over. The leader waits for the TTL
from the receipt, which is later, stretched by what clocks may differ, and for as long as the work may take to
stop. Leases live in the leader's memory: a new leader begins each anew.
"""

import heapq
from collections.abc import Iterator

from leasehold.core.job import model

TTL_SECONDS = 30.0
#: Clocks of different machines go so differently at most.
DRIFT = 1.001
#: From the end of a TTL until the work has stopped.
OVERRUN_SECONDS = 30.0

_NEVER = float("inf")


class Holders:
    """Who must have renewed by when. Times are the leader's monotonic clock, in seconds."""

    def __init__(self, *, ttl_seconds: float = TTL_SECONDS, overrun_seconds: float = OVERRUN_SECONDS) -> None:
        self.ttl_seconds = ttl_seconds
        self._wait_seconds = ttl_seconds * DRIFT + overrun_seconds
        self._deadlines: dict[model.AttemptRef, float] = {}
        self._queue: list[tuple[float, model.AttemptRef]] = []

    def __len__(self) -> int:
        return len(self._deadlines)

    def __contains__(self, ref: object) -> bool:
        return ref in self._deadlines

    def __iter__(self) -> Iterator[model.AttemptRef]:
        return iter(self._deadlines)

    def renew(self, now: float, ref: model.AttemptRef) -> None:
        """It was heard of, for the first time or again."""
        self._set(now, ref, now + self._wait_seconds)

    def _set(self, now: float, ref: model.AttemptRef, deadline: float) -> None:
        # A later deadline is found when the queued one comes up; one that is over is in the queue no more.
        if self._deadlines.get(ref, now) <= now:
            heapq.heappush(self._queue, (deadline, ref))
        self._deadlines[ref] = deadline

    def remove(self, ref: model.AttemptRef) -> None:
        """It has ended."""
        self._deadlines.pop(ref, None)

    def give_time(self, now: float) -> None:
        """Renewals may wait unread: everyone has a TTL more."""
        for ref, deadline in list(self._deadlines.items()):
            if deadline < now + self.ttl_seconds:
                self._set(now, ref, now + self.ttl_seconds)

    def is_overdue(self, now: float, ref: model.AttemptRef) -> bool:
        """Whether it must have stopped by itself."""
        return self._deadlines.get(ref, _NEVER) <= now

    def overdue(self, now: float) -> list[model.AttemptRef]:
        """Who must have stopped by now, the longest overdue first. They stay until they are removed."""
        found = [ref for ref, deadline in self._deadlines.items() if deadline <= now]
        return sorted(found, key=lambda ref: (self._deadlines[ref], ref))

    def next_deadline(self, now: float) -> float:
        """When the next one is overdue that is not by `now`; infinity: none will be."""
        while self._queue:
            at, ref = self._queue[0]
            deadline = self._deadlines.get(ref)
            if deadline is None or deadline <= now:
                heapq.heappop(self._queue)
            elif deadline > at:
                heapq.heapreplace(self._queue, (deadline, ref))
            else:
                return at
        return _NEVER
