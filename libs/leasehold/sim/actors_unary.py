"""A script in a simulated world that holds leases by unary calls and does not tell its use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leasehold.core.budget import allocator, messages, quantity
from leasehold.sim import actors, budget_auditor

if TYPE_CHECKING:
    from leasehold.sim.world import World


class UnaryHolder(actors.Process):
    """Takes a lease, repeats requests whose answer got lost, spends all, lets it expire or releases it.

    It keeps to what an answer says: `ttl` counts from the instant at which that request was *sent*.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.scheduler, f"host-{name}/{name}")
        self.world = world
        self.name = name
        self.clock = world.clock()
        self.incarnation = ""
        self.lease_id = 0
        self.leases = 0
        self._sent: dict[int, tuple[str, float]] = {}
        self._expires_at = 0.0
        self._amounts: dict[str, int] = {}
        self._old: set[str] = set()
        self.wake_at(world.rng.uniform(0.5, 2.0), self._begin)

    @property
    def now(self) -> float:
        """Seconds on its CLOCK_BOOTTIME."""
        return self.clock.at(self.scheduler.now)

    def _begin(self) -> None:
        world = self.world
        if self.incarnation:
            self._old.add(self.incarnation)
        self.incarnation = f"{self.name}.request-{world.number():05d}"
        self.lease_id, self._amounts, self._expires_at = 0, {}, 0.0
        self._sent.clear()
        self._ask()
        self.wake_at(self.scheduler.now + world.spec.ttl_seconds * world.rng.uniform(1.1, 2.5), self._again)

    def _again(self) -> None:
        if self.world.faults.is_over:
            self._release()
            # A lease that was never granted is not asked for any more.
            self._old.add(self.incarnation)
            self.incarnation = ""
            return
        if self.world.rng.random() < 0.5:
            self._release()
        self.wake_at(self.scheduler.now + self.world.rng.uniform(0.1, 1.0), self._begin)

    def _ask(self) -> None:
        """Acquire; the same request id makes it a repeat, which never extends."""
        world = self.world
        place = world.leader_place()
        replica = world.replicas[place]
        token = world.ask(self, place)
        incarnation = self.incarnation
        self._sent[token] = (incarnation, self.now)

        def ask(core: allocator.Allocator, now: float) -> None:
            core.acquire(
                budget=world.spec.name,
                holder=self.name,
                incarnation=incarnation,
                demand={},
                process=None,
                token=token,
                now=now,
            )

        world.network.call(self.place, place, lambda: replica.unary(ask))
        seconds = world.rng.uniform(0.3, 1.5)
        self.wake_at(self.scheduler.now + seconds, lambda: self._repeat(incarnation))

    def _repeat(self, incarnation: str) -> None:
        if incarnation == self.incarnation and (not self.lease_id or self.world.rng.random() < 0.3):
            self._ask()

    def answered(self, token: int, message: messages.Grant | messages.Refusal | None) -> None:
        """An answer arrived; maybe a second time, maybe late."""
        incarnation, sent_at = self._sent.get(token, ("", 0.0))
        if (
            incarnation != self.incarnation
            or not isinstance(message, messages.Grant)
            or message.end is not None
        ):
            return
        expires_at = sent_at + message.ttl_seconds
        if self.now >= expires_at:
            return
        if message.lease_id != self.lease_id:
            self._amounts = {}
        self.lease_id = message.lease_id
        self.leases += 1
        self._amounts = dict(message.amounts)
        self._expires_at = max(self._expires_at, expires_at)
        self._spend()

    def _spend(self) -> None:
        """Use up what is left of the lease, in some pieces, while it lasts."""
        if not self._amounts or self.now >= self._expires_at:
            return
        world = self.world
        spent = world.auditor.spent(self.scheduler.now, self.incarnation)
        left = {name: amount - spent.get(name, 0) for name, amount in self._amounts.items()}
        part = world.rng.choice((1, 2, 3))
        amounts = {
            name: max(0, amount) // part // quantity.MICRO * quantity.MICRO for name, amount in left.items()
        }
        amounts = {name: amount for name, amount in amounts.items() if amount}
        if amounts:
            arrives_at = self.scheduler.now + world.rng.random() * world.arrival_seconds_max
            ticket = world.auditor.admitted(self.scheduler.now, self.incarnation, amounts, arrives_at)
            end = self.scheduler.now + max(
                arrives_at - self.scheduler.now, world.rng.random() * world.spec.max_call_seconds
            )
            self.scheduler.at(end, lambda: self._done(ticket))
        self.wake_at(self.scheduler.now + world.rng.uniform(0.05, 0.5), self._spend)

    def _done(self, ticket: budget_auditor.Ticket) -> None:
        self.world.auditor.completed(self.scheduler.now, ticket, {})

    def _release(self) -> None:
        """Give it back; what was used still counts."""
        if not self.lease_id:
            return
        world = self.world
        release = messages.Release(
            budget=world.spec.name, holder=self.name, incarnation=self.incarnation, lease_id=self.lease_id
        )
        self._amounts, self._expires_at = {}, 0.0
        place = world.leader_place()
        replica = world.replicas[place]
        token = world.ask(self, place)
        world.network.call(
            self.place,
            place,
            lambda: replica.unary(lambda core, now: core.release(release, now, token=token)),
        )

    def physical(self) -> dict[str, dict[str, int]]:
        """What each of its leases physically has."""
        world = self.world
        physical: dict[str, dict[str, int]] = {}
        for incarnation in list(self._old):
            spent = world.auditor.spent(self.scheduler.now, incarnation)
            if any(spent.values()):
                physical[incarnation] = spent
        if self.incarnation:
            spent = world.auditor.spent(self.scheduler.now, self.incarnation)
            if self._amounts and self.now < self._expires_at:
                spent = {n: max(a, spent.get(n, 0)) for n, a in self._amounts.items()}
            physical[self.incarnation] = spent
        return physical
