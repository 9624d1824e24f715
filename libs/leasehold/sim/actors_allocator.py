"""A replica of the allocator in a simulated world: the driver's contract around the real core.

(1) events are fed as they come; (2) `finish` takes the effects; (3) the records go into one transaction that
compares the epoch and starts now, after the events arrived; (4) only after its commit are messages sent;
(5) an unknown outcome is written again under the same number, and nothing is said meanwhile. One batch is under
way at a time. A stream belongs to the reign in which it was opened: it ends with the reign.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import allocator, effects, messages, model
from leasehold.sim import actors, network, store, world_time

if TYPE_CHECKING:
    from leasehold.sim.world import World

#: Seconds between two looks at the election.
ELECTION_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class StoredDefinition:
    """A definition as etcd keeps it."""

    spec: model.BudgetSpec
    version: int
    is_retired: bool
    aftermath: aftermaths.Aftermath


class Replica(actors.Process):
    """One allocator process."""

    def __init__(self, world: World, name: str, clock: world_time.Clock) -> None:
        super().__init__(world.scheduler, name)
        self.world = world
        #: CLOCK_MONOTONIC.
        self.clock = clock
        self.core: allocator.Allocator | None = None
        self.epoch: store.EpochKey | None = None
        self.streams: dict[int, network.Stream] = {}
        self._watched: set[processes.ProcessKey] = set()
        self._is_dirty = False
        self._is_committing = False
        self._batch = 0
        #: A leader that does not step down by itself when etcd is away.
        self.is_stubborn = True
        self._alarm = actors.Alarm(self, self._time_passed)
        self.wake_at(world.rng.uniform(0.0, ELECTION_SECONDS), self._look_at_election)

    @property
    def now(self) -> float:
        """Seconds on its CLOCK_MONOTONIC."""
        return self.clock.at(self.scheduler.now)

    # Election

    def _look_at_election(self) -> None:
        world = self.world
        if not world.network.is_cut(self.place, store.STORE):
            if self.core is None:
                won = world.store.campaign(self.place)
                if won is not None:
                    self._batch = 0
                    self.epoch = won
                    self.wake_at(self.scheduler.now + world.network.latency(), lambda: self._take_over(won))
            elif not world.store.keep_alive(self.place):
                self.step_down()
        elif self.core is not None and not self.is_stubborn:
            self.step_down()
        seconds = ELECTION_SECONDS * world.rng.uniform(0.8, 1.2)
        self.wake_at(self.scheduler.now + seconds, self._look_at_election)

    def _take_over(self, won: store.EpochKey) -> None:
        """Read everything after winning; T0 is now."""
        world = self.world
        if self.epoch != won or self.core is not None:
            return
        if world.store.epoch != won:
            self.epoch = None
            return
        generation, revision, cluster_id = won
        core = allocator.Allocator(epochs.Epoch(generation, revision, cluster_id))
        now = self.now
        stored = list(world.store.values.items())
        for _, value in stored:
            if isinstance(value, StoredDefinition):
                core.restore_definition(
                    value.spec, value.version, now, is_retired=value.is_retired, aftermath=value.aftermath
                )
        for _, value in stored:
            if isinstance(value, effects.Record):
                core.restore_record(value, now)
        is_wiped = world.accepted_generation < generation
        self.core = core
        world.defined_for(core, now, is_wiped=is_wiped)
        world.leader_changed(self)
        self._changed()

    def step_down(self) -> None:
        """The reign is over: its machine is thrown away and its streams are closed."""
        self.core = self.epoch = None
        self._is_dirty = self._is_committing = False
        self._watched.clear()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            self.world.break_stream(stream, is_heard=True)

    @property
    def is_legitimate(self) -> bool:
        """Whether etcd would take its writes."""
        return self.core is not None and self.epoch == self.world.store.epoch

    # Holders

    def opened(self, stream: network.Stream) -> bool:
        """A holder connects; False if this replica does not lead."""
        if self.core is None:
            return False
        self.streams[stream.number] = stream
        return True

    def received(self, stream: network.Stream, message: Any) -> None:
        """A message on a stream."""
        self.do(lambda: self._handle(stream, message))

    def _handle(self, stream: network.Stream, message: Any) -> None:
        if self.core is None or self.streams.get(stream.number) is not stream:
            return
        try:
            if isinstance(message, messages.Release):
                self.core.release(message, self.now)
            else:
                age = self.world.age_of(message, self)
                self.core.report(message, self.now, session=stream.number, age_seconds=age)
        except errors.LeaseholdError as error:
            stream.down(
                messages.Refusal(
                    budget=message.budget,
                    holder=message.holder,
                    incarnation=message.incarnation,
                    sequence=getattr(message, "sequence", 0),
                    reason=error.reason,
                    message=str(error),
                )
            )
        self._changed()

    def closed(self, stream: network.Stream) -> None:
        """It hears that a stream is broken."""
        self.do(lambda: self._handle_closed(stream))

    def _handle_closed(self, stream: network.Stream) -> None:
        if self.streams.pop(stream.number, None) is not None and self.core is not None:
            self.core.session_closed(stream.number, self.now)
            self._changed()

    def process_exited(self, process: processes.ProcessKey) -> None:
        """Its pidfd of that process becomes readable."""

        def handle() -> None:
            if self.core is not None and process in self._watched:
                self.core.process_exited(process, self.now)
                self._changed()

        self.do(handle)

    def unary(self, ask: Any) -> None:
        """A unary call: `ask(core, now)` feeds it."""

        def handle() -> None:
            if self.core is not None:
                try:
                    ask(self.core, self.now)
                except errors.LeaseholdError:
                    return
                self._changed()

        self.do(handle)

    def administer(self, change: Any) -> None:
        """An administrator's change, durable already: `change(core, now)`."""
        self.unary(change)

    # The driver

    def _changed(self) -> None:
        self._is_dirty = True
        if self._is_committing:
            self.world.check(self)
        else:
            self._finish()

    def _time_passed(self) -> None:
        if self.core is None:
            return
        if self.core.next_deadline() <= self.now:
            self.core.tick(self.now)
            self._changed()
        else:
            self._set_alarm()

    def _set_alarm(self) -> None:
        assert self.core is not None
        due = self.core.next_deadline()
        self._alarm.set(float("inf") if due == float("inf") else self.clock.when(due) + 1e-9)

    def _finish(self) -> None:
        assert self.core is not None
        self._is_dirty = False
        if self.core.next_deadline() <= self.now:
            self.core.tick(self.now)
        batch = self.core.finish(self.now)
        self.world.check(self)
        self._set_alarm()
        if not batch:
            return
        for effect in batch:
            if isinstance(effect, effects.WatchProcess):
                self._watch(effect.process)
        sends = [effect for effect in batch if isinstance(effect, effects.Send | effects.Reply)]
        writes = _writes_of(batch)
        if sends or writes:
            self._batch += 1
            self._commit(self._batch, writes, sends)

    def _commit(
        self, number: int, writes: list[store.Write], sends: list[effects.Send | effects.Reply]
    ) -> None:
        assert self.epoch is not None
        epoch = self.epoch
        self._is_committing = True

        def learnt(outcome: store.Outcome) -> None:
            self.do(lambda: self._committed(epoch, number, writes, sends, outcome))

        self.world.store.transact(self.place, epoch, number, writes, learnt)

    def _committed(
        self,
        epoch: store.EpochKey,
        number: int,
        writes: list[store.Write],
        sends: list[effects.Send | effects.Reply],
        outcome: store.Outcome,
    ) -> None:
        if self.epoch != epoch or self.core is None:
            return
        if outcome is store.Outcome.UNKNOWN:
            self._commit(number, writes, sends)
            return
        self._is_committing = False
        if outcome is store.Outcome.FENCED:
            self.step_down()
            return
        for effect in sends:
            self._send(effect)
        if self._is_dirty:
            self._finish()

    def _send(self, effect: effects.Send | effects.Reply) -> None:
        if isinstance(effect, effects.Reply):
            self.world.reply(self, effect)
            return
        stream = self.streams.get(effect.session)
        if stream is not None:
            stream.down(effect.message)

    def _watch(self, process: processes.ProcessKey) -> None:
        if not self.world.is_visible(process, self):
            return
        self._watched.add(process)
        if not self.world.is_running(process):
            self.wake_at(self.scheduler.now, lambda: self.process_exited(process))


def _writes_of(batch: list[effects.Effect]) -> list[store.Write]:
    writes: list[store.Write] = []
    for effect in batch:
        if isinstance(effect, effects.PutRecord):
            writes.append(store.Put(effect.record.key, effect.record))
        elif isinstance(effect, effects.DeleteRecord):
            writes.append(store.Delete(effect.key))
        elif isinstance(effect, effects.PutDefinition):
            stored = StoredDefinition(effect.spec, effect.version, effect.is_retired, effect.aftermath)
            writes.append(store.Put(effect.spec.name, stored))
        elif isinstance(effect, effects.DeleteDefinition):
            writes.append(store.Delete(effect.budget))
    return writes
