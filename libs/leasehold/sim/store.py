"""A simulated etcd: records and definitions behind an epoch, and an election. It knows nothing of budgets."""

import enum
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from leasehold.sim import network as networks

STORE = "etcd"


class Outcome(enum.Enum):
    """What a client learns of its transaction."""

    COMMITTED = "committed"
    FENCED = "fenced"
    #: It may have been applied, or not, or be applied yet.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Put:
    """Write a value."""

    key: Hashable
    value: Any


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key."""

    key: Hashable


Write = Put | Delete
#: (generation, revision, cluster id) of a reign.
EpochKey = tuple[int, int, int]


class Store:
    """One etcd cluster; a wipe makes another one of it."""

    #: A transaction without an answer is given up after so long, seconds.
    timeout_seconds = 0.5

    def __init__(self, network: networks.Network, *, elector_ttl_seconds: float) -> None:
        self.values: dict[Hashable, Any] = {}
        self.epoch: EpochKey | None = None
        self.generation = 1
        self.cluster_id = 101
        self.revision = 1
        self.leader: str | None = None
        self.elector_ttl_seconds = elector_ttl_seconds
        #: Called with each write as it is applied.
        self.observer: Callable[[Write], None] = lambda _write: None
        #: Number of the last batch of the present reign.
        self.batch = 0
        #: Whether a transaction that was overtaken by a later one of its reign is refused.
        self.compares_batch = True
        #: Of transactions whose answer never arrives.
        self.lost_answer_probability = 0.0
        self._network = network
        self._leader_until = 0.0

    # Transactions

    def transact(
        self,
        client: str,
        epoch: EpochKey,
        batch: int,
        writes: Sequence[Write],
        done: Callable[[Outcome], None],
    ) -> None:
        """Apply `writes` if `epoch` is the present one. `done` is called once, the outcome may be unknown.

        `batch` numbers the transactions of a reign; one that is written again keeps its number. A first attempt
        that was given up may arrive after later batches: it would put old bounds back, so it is refused.
        """
        network = self._network
        is_answered = False

        def answer(outcome: Outcome) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                done(outcome)

        def execute() -> None:
            outcome = self._apply(epoch, batch, writes)
            is_lost = self.lost_answer_probability and network.rng.random() < self.lost_answer_probability
            if not is_lost and not network.is_cut(client, STORE):
                network.scheduler.after(network.latency(), lambda: answer(outcome))

        if not network.is_cut(client, STORE):
            network.scheduler.after(network.latency(), execute)
        network.scheduler.after(self.timeout_seconds, lambda: answer(Outcome.UNKNOWN))

    def _apply(self, epoch: EpochKey, batch: int, writes: Sequence[Write]) -> Outcome:
        if epoch != self.epoch or (self.compares_batch and batch < self.batch):
            return Outcome.FENCED
        self.revision += 1
        self.batch = max(self.batch, batch)
        for write in writes:
            if isinstance(write, Put):
                self.values[write.key] = write.value
            else:
                self.values.pop(write.key, None)
            self.observer(write)
        return Outcome.COMMITTED

    # Election

    def keep_alive(self, client: str) -> bool:
        """The leader is still there; False if it no longer leads."""
        now = self._network.scheduler.now
        if self.leader != client or now >= self._leader_until:
            return False
        self._leader_until = now + self.elector_ttl_seconds
        return True

    def campaign(self, client: str) -> EpochKey | None:
        """Win if nobody leads; the epoch of the new reign. Writes of earlier reigns are refused from now on."""
        now = self._network.scheduler.now
        if self.leader is not None and now < self._leader_until:
            return None
        self.revision += 1
        self.leader, self._leader_until = client, now + self.elector_ttl_seconds
        self.epoch = (self.generation, self.revision, self.cluster_id)
        self.batch = 0
        return self.epoch

    def resign(self, client: str) -> None:
        """A leader that stops in good order."""
        if self.leader == client:
            self.leader = None

    # Disaster

    def wipe(self) -> None:
        """All is lost; an operator accepts the new cluster as a new generation."""
        self.values.clear()
        self.epoch = self.leader = None
        self.generation += 1
        self.cluster_id += 1
        self.revision = 1
