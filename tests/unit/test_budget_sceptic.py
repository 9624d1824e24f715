"""Interleavings that would break the limit or strand a waiter, found by argument; each failed once."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import client_scene
import pytest
from fake_allocator import CALLS, LIMITS, REQUESTS
from leasehold.allocator import committer, records
from leasehold.client import engine as engines
from leasehold.client import gates
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import effects, messages, stock
from leasehold.core.budget.quantity import MICRO
from leasehold.etcd import clock
from leasehold.etcd import memory as etcd_memory
from leasehold.etcd import port as etcd_port

MINUTE_LIMITS = LIMITS | {CALLS: 1}


def _scene(limits: Mapping[str, float] = LIMITS) -> client_scene.Scene:
    scene = client_scene.Scene()
    scene.join(limits)
    scene.renew()
    return scene


def _cooling(scene: client_scene.Scene) -> int:
    held = scene.limiter.stocks[REQUESTS]
    scene.limiter.holdings(scene.now)
    return int(sum(amount for _, amount in held.cooling(scene.now))) // MICRO


def _admitted_and_asleep(scene: client_scene.Scene) -> engines.Ticket:
    """An acquire that was admitted when another ended, and has not woken yet."""
    first = scene.budget.try_acquire(tokens=1)
    assert first is not None
    ticket = scene.engine.submit(engines.Request(tokens=1), gates.ThreadGate())
    assert scene.limiter.waiters
    first.release()
    assert ticket.is_admitted
    return ticket


def test_a_turn_for_another_budgets_sake_opens_no_path_that_forgets_what_it_admits() -> None:
    scene = _scene()
    scene.engine.update_activity(is_active=False, current_load=0.0, active_tasks=0)
    sent: list[float] = []

    def send() -> None:
        permit = scene.budget.try_acquire(tokens=1)
        assert permit is not None
        permit.release()
        sent.append(scene.now)

    for _ in range(40):
        scene.advance(2.0)
        send()
        scene.renew()
    # Twelve buckets after the last report: the ring of the stock has eight spare places.
    scene.advance(1.5)
    scene.engine.turn()
    for _ in range(20):
        send()
    scene.advance(0.3)

    assert _cooling(scene) >= sum(at > scene.now - 60.0 for at in sent)
    scene.limiter.audit()


def test_a_late_waker_goes_on_counting_what_a_shrink_has_marked_to_leave() -> None:
    held = stock.RateStock(window_seconds=60.0, jitter_seconds=1.0, now=1000.0)
    held.set_cap(40 * MICRO)
    held.charge(1000.0, 30 * MICRO)
    held.set_cap(20 * MICRO)
    assert held.held == 35 * MICRO

    held.advance(1000.3)
    held.recharge(1000.0, 1000.3, 30 * MICRO)

    assert held.held == 35 * MICRO
    assert held.free == 5 * MICRO
    held.audit()
    held.advance(1061.1)
    assert held.held == 35 * MICRO, "it cools from when it was sent"
    held.advance(1061.6)
    assert held.held == 20 * MICRO
    assert held.free == 20 * MICRO


def test_a_waker_so_late_that_its_units_have_cooled_asks_anew() -> None:
    scene = _scene(MINUTE_LIMITS)
    ticket = _admitted_and_asleep(scene)
    for _ in range(35):
        scene.advance(2.0)
        scene.renew()
    held = scene.limiter.stocks[REQUESTS]
    held.charge(scene.now, held.free)  # others have all of it now

    assert not scene.engine.claim(ticket)

    assert held.free == 0
    assert [waiter.payload for waiter in scene.limiter.waiters] == [ticket]
    assert scene.limiter.stocks[CALLS].in_use == 0


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (messages.LeaseEnd.SUPERSEDED, errors.Superseded),
        (messages.LeaseEnd.BUDGET_DELETED, errors.NotFound),
        (None, errors.FailedPrecondition),
    ],
)
def test_who_was_admitted_but_woke_after_the_last_word_is_told_rather_than_queued_for_ever(
    end: messages.LeaseEnd | None, error: type[errors.LeaseholdError]
) -> None:
    scene = _scene(MINUTE_LIMITS)
    ticket = _admitted_and_asleep(scene)
    if end is None:
        scene.engine.close()
    else:
        scene.grant({}, answered_sequence=0, end=end)

    with pytest.raises(error):
        scene.engine.claim(ticket)

    assert not scene.limiter.waiters


KEYS = records.Keys("/t")
EPOCH = epochs.Epoch(1, 5)
RECORD_KEY = KEYS.lease(("llm", "h", "h-incarnation"))


class _Procrastinator(etcd_memory.MemoryEtcd):
    """An etcd that leaves transactions unanswered, and carries them out when it is let."""

    def __init__(self, cluster: etcd_memory.MemoryCluster) -> None:
        super().__init__(cluster)
        self.is_delayed: Callable[[Sequence[etcd_port.Op]], bool] = lambda _: False
        self.under_way: list[tuple[Sequence[etcd_port.Compare], Sequence[etcd_port.Op]]] = []

    async def txn(
        self,
        compares: Sequence[etcd_port.Compare],
        then: Sequence[etcd_port.Op],
        otherwise: Sequence[etcd_port.Op] = (),
    ) -> etcd_port.TxnResult:
        """See `EtcdPort`."""
        if self.is_delayed(then):
            self.is_delayed = lambda _: False
            self.under_way.append((compares, then))
            raise errors.DeadlineExceeded("no answer")
        return await super().txn(compares, then, otherwise)

    async def catch_up(self) -> list[bool]:
        """Carry out what is under way; which of it changed anything."""
        return [(await super(_Procrastinator, self).txn(*late)).succeeded for late in self.under_way]


def _record(calls: int) -> effects.PutRecord:
    return effects.PutRecord(effects.Record("llm", "h", "h-incarnation", 1, {"calls": calls}, 10.0))


def _writes(key: str) -> Callable[[Sequence[etcd_port.Op]], bool]:
    return lambda ops: any(isinstance(op, etcd_port.Put) and op.key == key for op in ops)


@pytest.mark.parametrize("key", [RECORD_KEY, KEYS.epoch])
async def test_a_write_that_etcd_carries_out_late_undoes_no_later_one_and_ends_no_reign(key: str) -> None:
    etcd = _Procrastinator(etcd_memory.MemoryCluster(clock.ManualClock()))
    await etcd.put(KEYS.epoch, EPOCH.encode().encode())
    group = committer.Committer(
        etcd, KEYS, EPOCH, deliver=lambda _: None, on_overflow=lambda: None, collect=lambda: None
    )
    running = asyncio.create_task(group.run())
    etcd.is_delayed = _writes(key)
    async with asyncio.timeout(10):
        group.add([_record(20)])
        await group.barrier()
        group.add([_record(40)])
        await group.barrier()
        late = await etcd.catch_up()
        assert late == [key == KEYS.epoch]
        await group.barrier()

    found = await etcd.get(RECORD_KEY)
    assert found is not None
    assert records.decode_record(KEYS, RECORD_KEY, found.value).amounts == {"calls": 40}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await etcd.close()
