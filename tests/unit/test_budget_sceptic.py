"""Interleavings that would break the limit or strand a waiter, found by argument; each failed once."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence

import client_scene
import pytest
from fake_allocator import CALLS, LIMITS, REQUESTS, SLOTS
from leasehold.allocator import committer, records
from leasehold.client import engine as engines
from leasehold.client import gates
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import allocator as allocators
from leasehold.core.budget import codec, effects, messages, stock
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


PROCESS = processes.ProcessKey("boot", 1, 2, 3)


def _report(sequence: int, grant: messages.Grant | None = None, **holdings: object) -> messages.Report:
    """A report of a holder that owns 100 of a rate and may spend it in one request."""
    told = {
        "held": {REQUESTS: 100 * MICRO},
        "refundable": {REQUESTS: 0},
        "largest_cost": {REQUESTS: 100 * MICRO},
    }
    return messages.Report(
        budget="llm",
        holder="h",
        incarnation="h-incarnation",
        sequence=sequence,
        lease_id=grant.lease_id if grant else 0,
        grant_version=grant.version if grant else 0,
        is_active=True,
        holdings=messages.Holdings(**(told | holdings)) if grant else messages.Holdings(held={}),  # type: ignore[arg-type]
        process=PROCESS if sequence == 1 else None,
    )


def _grants(caused: list[effects.Effect]) -> list[messages.Grant]:
    sent = [effect.message for effect in caused if isinstance(effect, effects.Send)]
    return [message for message in sent if isinstance(message, messages.Grant)]


def _allocator(**changes: object) -> allocators.Allocator:
    made = allocators.Allocator(EPOCH)
    made.define(codec.decode_budget({"name": "llm", "dimensions": {REQUESTS: 100}, **changes}), 1, 0.0)
    made.finish(0.0)
    return made


@pytest.mark.parametrize("age_seconds", [2.0, None])
def test_what_cooled_while_the_last_report_of_the_dead_was_on_its_way_counts_as_spent_anew(
    age_seconds: float | None,
) -> None:
    core = _allocator()
    core.report(_report(1), 100.0, session=1, age_seconds=0.0)
    grant = _grants(core.finish(100.0))[-1]
    for sequence in range(2, 31):
        now = 100.0 + 2.0 * sequence
        core.report(_report(sequence, grant), now, session=1, age_seconds=0.0)
        core.tick(now)
        grant = (_grants(core.finish(now)) or [grant])[-1]
    # Made at 160.5: all of it cools by 161.7. It arrives at 162.5, when all of it has been spent once more.
    parts = messages.Cooling(REQUESTS, (10 * MICRO,) * 10, tuple(0.3 + 0.1 * number for number in range(10)))
    core.report(_report(31, grant, cooling=(parts,)), 162.5, session=1, age_seconds=age_seconds)
    core.finish(162.5)
    core.process_exited(PROCESS, 162.51)
    core.finish(162.51)

    book = core.budgets["llm"].book
    for until in (163.8, 221.7, 222.7):
        book.release_stranded(until)
        assert book.stranded_of("h") == (100 * MICRO,)
    book.release_stranded(162.51 + 61.0)
    assert book.stranded_of("h") == (0,)


def test_a_join_that_is_repeated_is_told_the_terms_again_for_the_first_answer_may_have_come_too_late() -> None:
    core = _allocator(ttl_seconds=1.0, refresh_seconds=0.5)
    core.report(_report(1), 1.0, session=1)
    core.report(_report(2), 2.0, session=1)

    answers = _grants(core.finish(2.0))

    assert [grant.answered_sequence for grant in answers] == [1, 2]
    assert answers[-1].terms is not None


def test_a_shorter_max_call_does_not_shorten_the_calls_that_run_already() -> None:
    def defined(max_call_seconds: float, version: int, now: float) -> None:
        document = {"name": "llm", "dimensions": {CALLS: 10}, "max_call_seconds": max_call_seconds}
        core.define(codec.decode_budget(document), version, now)
        core.finish(now)

    core = allocators.Allocator(EPOCH)
    defined(600.0, 1, 0.0)
    core.report(_report(1), 1.0, session=1)
    grant = _grants(core.finish(1.0))[-1]
    core.report(_report(2, grant, held={CALLS: 10 * MICRO}), 2.0, session=1)  # ten calls begin
    core.finish(2.0)
    defined(10.0, 2, 3.0)
    core.session_closed(1, 3.5)
    for now in (12.1, 601.9):
        core.tick(now)
        core.finish(now)
        assert core.budgets["llm"].book.stranded_of("h") == (10 * MICRO,)

    core.tick(613.0)
    core.finish(613.0)
    assert core.budgets["llm"].book.pool() == [10 * MICRO]
    # The news is as old as its longest call: from now on the new bound is the only one.
    core.report(_report(40), 700.0, session=2)
    core.finish(700.0)
    core.session_closed(2, 700.5)
    for now in (710.1, 720.2):
        core.tick(now)
        core.finish(now)
    assert core.budgets["llm"].book.stranded_of("h") == (0,)


def _join(incarnation: str, process: processes.ProcessKey) -> messages.Report:
    return dataclasses.replace(_report(1), incarnation=incarnation, process=process)


def test_a_late_join_of_an_earlier_process_does_not_end_the_one_that_took_its_place() -> None:
    core = _allocator()
    earlier, later = PROCESS, dataclasses.replace(PROCESS, pid=3, start_time_ticks=PROCESS.start_time_ticks + 1)
    core.report(_join("later-incarnation", later), 2.0, session=2)
    core.finish(2.0)
    core.report(_join("earlier-incarnation", earlier), 3.0, session=1)

    answers = _grants(core.finish(3.0))

    ended = [grant.incarnation for grant in answers if grant.end is messages.LeaseEnd.SUPERSEDED]
    assert ended == ["earlier-incarnation"]
    assert core.budgets["llm"].book.leases["h"].incarnation == "later-incarnation"


@pytest.mark.parametrize(("ticks", "left"), [(1, "comes-back"), (-1, "was-there")])
def test_of_two_processes_of_a_name_the_later_one_has_it_even_if_it_comes_back_to_a_leader_that_knows_the_other(
    ticks: int, left: str
) -> None:
    core = _allocator()
    other = dataclasses.replace(PROCESS, pid=3, start_time_ticks=PROCESS.start_time_ticks + ticks)
    core.report(_join("was-there", PROCESS), 2.0, session=1)
    core.finish(2.0)
    core.report(dataclasses.replace(_join("comes-back", other), is_rejoin=True), 3.0, session=2)

    answers = _grants(core.finish(3.0))

    (ended,) = {"was-there", "comes-back"} - {left}
    assert [grant.incarnation for grant in answers if grant.end is messages.LeaseEnd.SUPERSEDED] == [ended]
    assert core.budgets["llm"].book.leases["h"].incarnation == left


@pytest.mark.parametrize(
    ("age_seconds", "ended"), [(1.4, "late-one"), (0.2, "present-one"), (None, "present-one")]
)
def test_a_join_that_was_made_before_that_of_another_host_arrived_does_not_end_it(
    age_seconds: float | None, ended: str
) -> None:
    core = _allocator()
    core.report(_join("present-one", dataclasses.replace(PROCESS, boot_id="another-host")), 2.0, session=2)
    core.finish(2.0)
    core.report(_join("late-one", PROCESS), 3.0, session=1, age_seconds=age_seconds)

    answers = _grants(core.finish(3.0))

    assert [grant.incarnation for grant in answers if grant.end is messages.LeaseEnd.SUPERSEDED] == [ended]
    assert core.budgets["llm"].book.leases["h"].incarnation != ended


def test_an_earlier_process_takes_the_place_of_a_later_one_that_has_left() -> None:
    core = _allocator()
    later = dataclasses.replace(PROCESS, pid=3, start_time_ticks=PROCESS.start_time_ticks + 1)
    core.report(_join("later-incarnation", later), 2.0, session=2)
    core.finish(2.0)
    core.session_closed(2, 2.5)
    core.report(_join("earlier-incarnation", PROCESS), 3.0, session=1)
    core.finish(3.0)

    assert core.budgets["llm"].book.leases["h"].incarnation == "earlier-incarnation"


def test_what_a_failed_tasks_callback_waits_for_may_use_the_executor() -> None:
    scene = _scene({**LIMITS, SLOTS: 1})
    executor = scene.budget.executor(SLOTS)
    may_end, was_free = threading.Event(), threading.Event()

    def use_it() -> None:
        executor.shutdown(wait=False)
        was_free.set()

    def use_it_elsewhere(_: object) -> None:
        other = threading.Thread(target=use_it)
        other.start()
        other.join(timeout=10.0)

    executor.submit(may_end.wait)
    waiting = executor.submit(may_end.wait)
    waiting.add_done_callback(use_it_elsewhere)
    scene.engine.close()
    may_end.set()

    assert isinstance(waiting.exception(timeout=10.0), errors.FailedPrecondition)
    assert was_free.is_set()
