"""A simulated network: ordered streams that stall and break, and calls that are lost, doubled and overtaken."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leasehold.sim import world_time

Deliver = Callable[[Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How bad the network is. Times in seconds, the rest probabilities."""

    latency_min: float = 0.0002
    latency_max: float = 0.004
    #: A message, and all behind it on its stream, is held up for up to `stall_seconds_max`.
    stall_probability: float = 0.0
    stall_seconds_max: float = 0.0
    #: Of calls that are not on a stream.
    loss_probability: float = 0.0
    duplication_probability: float = 0.0


class Network:
    """Latencies and partitions between named places."""

    def __init__(self, scheduler: world_time.Scheduler, rng: random.Random, conditions: Conditions) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.conditions = conditions
        self._cut: set[frozenset[str]] = set()
        self._stalled: dict[frozenset[str], list[world_time.Action]] = {}

    def latency(self) -> float:
        """Seconds that the next message takes."""
        conditions, rng = self.conditions, self.rng
        seconds = rng.uniform(conditions.latency_min, conditions.latency_max)
        if conditions.stall_probability and rng.random() < conditions.stall_probability:
            seconds += rng.uniform(0.0, conditions.stall_seconds_max)
        return seconds

    # Partitions

    def cut(self, here: str, there: str) -> None:
        """Nothing passes between the two from now on."""
        self._cut.add(frozenset((here, there)))

    def heal(self, here: str, there: str) -> None:
        """What was held up arrives."""
        pair = frozenset((here, there))
        self._cut.discard(pair)
        for action in self._stalled.pop(pair, []):
            self.scheduler.after(self.rng.uniform(0.0, 0.001), action)

    def heal_all(self) -> None:
        """No partition is left."""
        for here, there in [sorted(pair) for pair in sorted(self._cut, key=sorted)]:
            self.heal(here, there)

    def is_cut(self, here: str, there: str) -> bool:
        """Whether a partition lies between the two."""
        return bool(self._cut) and frozenset((here, there)) in self._cut

    def hold_up(self, here: str, there: str, action: world_time.Action) -> None:
        """Run `action` once the partition between the two is healed."""
        self._stalled.setdefault(frozenset((here, there)), []).append(action)

    # Calls outside streams

    def call(self, here: str, there: str, deliver: world_time.Action) -> None:
        """One message: it may be lost, doubled, or overtaken by a later one."""
        conditions, rng = self.conditions, self.rng
        copies = 1
        if conditions.loss_probability and rng.random() < conditions.loss_probability:
            copies = 0
        elif conditions.duplication_probability and rng.random() < conditions.duplication_probability:
            copies = 2
        for _ in range(copies):
            if not self.is_cut(here, there):
                self.scheduler.after(self.latency(), deliver)


class _Direction:
    """One way of a stream: messages arrive in order; a break loses those from some number on."""

    def __init__(self, network: Network, here: str, there: str, deliver: Deliver) -> None:
        self.deliver = deliver
        self.last_at = 0.0
        self.delivered = 0
        self._network = network
        self._here = here
        self._there = there
        self._sent = 0
        self._keep = 1 << 60
        self._queue: list[Any] = []

    def send(self, message: Any) -> None:
        self._sent += 1
        self._queue.append(message)
        network = self._network
        self.last_at = max(self.last_at, network.scheduler.now + network.latency())
        network.scheduler.at(self.last_at, self._arrive)

    def _arrive(self) -> None:
        network = self._network
        if network.is_cut(self._here, self._there):
            network.hold_up(self._here, self._there, self._arrive)
            return
        message = self._queue.pop(0)
        if self.delivered >= self._keep:
            return
        self.delivered += 1
        self.deliver(message)

    def break_off(self, rng: random.Random, *, may_linger: bool) -> None:
        waiting = self._sent - self.delivered
        self._keep = min(self._keep, self.delivered + (rng.randint(0, waiting) if may_linger else 0))

    @property
    def is_drained(self) -> bool:
        return self.delivered >= min(self._keep, self._sent)


class Stream:
    """A bidirectional stream between a holder and a replica of the allocator."""

    def __init__(
        self, network: Network, number: int, here: str, there: str, *, up: Deliver, down: Deliver
    ) -> None:
        self.number = number
        self.is_broken = False
        self._network = network
        self._up = _Direction(network, here, there, up)
        self._down = _Direction(network, there, here, down)

    def up(self, message: Any) -> None:
        """From the holder to the replica; lost silently if the stream is broken."""
        if not self.is_broken:
            self._up.send(message)

    def down(self, message: Any) -> None:
        """From the replica to the holder; lost silently if the stream is broken."""
        if not self.is_broken:
            self._down.send(message)

    def break_off(self, *, may_linger: bool) -> float:
        """End it. Some of what is under way may still arrive; gives the instant after the last of that."""
        if self.is_broken:
            return self._network.scheduler.now
        self.is_broken = True
        self._up.break_off(self._network.rng, may_linger=may_linger)
        self._down.break_off(self._network.rng, may_linger=may_linger)
        now = self._network.scheduler.now
        return now if self._up.is_drained else max(now, self._up.last_at)
