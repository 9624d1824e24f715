"""Streams of holders: what is said in which order, what ends them, and a holder that does not read."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from leasehold.allocator import committer, holding, job_gauges, leadership, records, reign, sessions
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import lease_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import codec, effects, messages
from leasehold.etcd import clock
from leasehold.etcd import memory as etcd_memory
from leasehold.observe import metrics
from leasehold.postgres import job_memory
from leasehold.postgres import memory as postgres_memory
from leasehold.runtime import clock as clocks

EPOCH = epochs.Epoch(1, 7, 1)
KEYS = records.Keys("/t")


def _nothing() -> None:
    pass


def refusal(number: int) -> messages.Refusal:
    return messages.Refusal(
        budget="llm", holder="h", incarnation="h-incarnation", sequence=number, reason="X", message="no"
    )


async def test_a_session_gives_out_what_is_in_line_and_ends_in_peace_after_it() -> None:
    session = sessions.Session(1)
    session.say(refusal(1))
    session.end(None)
    response = await session.next_response()
    assert response is not None and [each.sequence for each in response.refusals] == [1]
    assert await session.next_response() is None


async def test_a_session_ends_at_once_with_the_first_error_that_it_was_given() -> None:
    session = sessions.Session(1)
    session.say(refusal(1))
    session.end(errors.NotLeader("127.0.0.1:1"))
    session.end(None)
    with pytest.raises(errors.NotLeader):
        await session.next_response()


async def test_a_session_is_cut_into_messages_of_bounded_size() -> None:
    session = sessions.Session(1)
    for number in range(sessions.GRANTS_MAX + 1):
        session.say(refusal(number))
    first, second = await session.next_response(), await session.next_response()
    assert first is not None and second is not None
    assert (len(first.refusals), len(second.refusals)) == (sessions.GRANTS_MAX, 1)


class StuckContext:
    """A stream whose holder does not read: a write never ends."""

    def __init__(self) -> None:
        self.is_writing = asyncio.Event()

    async def write(self, response: wire.HoldLeasesResponse) -> None:
        self.is_writing.set()
        await asyncio.Event().wait()


async def nothing() -> AsyncIterator[wire.HoldLeasesRequest]:
    await asyncio.Event().wait()
    yield wire.HoldLeasesRequest()


@pytest.fixture
async def leader() -> AsyncIterator[leadership.Leadership]:
    """A leader on the in-memory twins; its committer runs only where a test lets it."""
    cluster = etcd_memory.MemoryCluster(clock.ManualClock())
    etcd = cluster.connect()
    await etcd.put(KEYS.epoch, EPOCH.encode().encode())
    store = postgres_memory.MemoryStore()
    leading = leadership.Leadership(
        store,
        KEYS,
        job_store=job_memory.MemoryJobStore(),
        job_metrics=job_gauges.FlushMetrics(metrics.Registry()),
        candidate_id="r",
    )
    leading.reign = reign.Reign(
        EPOCH, etcd, KEYS, store, clock=clocks.MonotonicClock(), boot_clock=clocks.BootClock()
    )
    spec = codec.decode_budget({"name": "llm", "dimensions": {"max_concurrent_requests": 40}})
    leading.reign.core.define(spec, 1, leading.reign.now())
    async with asyncio.timeout(10):
        yield leading
        await leading.reign.close(errors.NotLeader())
    await etcd.close()


async def test_a_holder_that_never_reads_is_given_up_once_too_much_is_in_line(
    leader: leadership.Leadership,
) -> None:
    context: Any = StuckContext()
    ruling = leader.require()
    serving = asyncio.create_task(holding.hold(leader, nothing(), context))
    await asyncio.sleep(0)
    session = ruling._sessions[1]
    session.say(refusal(0))
    await context.is_writing.wait()
    for number in range(sessions.UNSENT_MAX + 1):
        session.say(refusal(number))
    with pytest.raises(errors.ResourceExhausted):
        await serving
    # Its holders are suspect from then on, and nothing gathers for it any more.
    assert ruling._sessions == {}


async def test_a_call_that_is_cancelled_while_it_writes_stays_cancelled(leader: leadership.Leadership) -> None:
    context: Any = StuckContext()
    serving = asyncio.create_task(holding.hold(leader, nothing(), context))
    await asyncio.sleep(0)
    leader.require()._sessions[1].say(refusal(0))
    await context.is_writing.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert leader.require()._sessions == {}


async def test_reports_are_answered_before_a_stream_that_was_half_closed_ends(
    leader: leadership.Leadership,
) -> None:
    written: list[wire.HoldLeasesResponse] = []

    class Context:
        async def write(self, response: wire.HoldLeasesResponse) -> None:
            written.append(response)

    async def one() -> AsyncIterator[wire.HoldLeasesRequest]:
        report = lease_pb2.LeaseReport(budget="llm", holder="h", incarnation="h-incarnation", sequence=1)
        yield wire.HoldLeasesRequest(reports=[report])

    context: Any = Context()
    committing = asyncio.create_task(leader.require().run())
    await holding.hold(leader, one(), context)
    assert [grant.answered_sequence for response in written for grant in response.grants] == [1]
    committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)


async def test_when_too_much_gathers_behind_an_absent_etcd_connections_go_and_unary_answers_stay() -> None:
    overflows = 0

    def overflow() -> None:
        nonlocal overflows
        overflows += 1

    delivered: list[committer.Message] = []
    cluster = etcd_memory.MemoryCluster(clock.ManualClock())
    etcd = cluster.connect()
    await etcd.put(KEYS.epoch, EPOCH.encode().encode())
    group = committer.Committer(
        etcd, KEYS, EPOCH, deliver=delivered.extend, on_overflow=overflow, collect=_nothing
    )
    group.add([effects.Reply(1, None)])
    group.add([effects.Send(1, refusal(number)) for number in range(committer.MESSAGES_MAX)])
    assert overflows == 1
    running = asyncio.create_task(group.run())
    await group.barrier()
    assert delivered == [effects.Reply(1, None)]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(errors.StaleEpoch):
        await group.barrier()
    await etcd.close()


async def test_records_are_written_before_what_depends_on_them_is_said_and_again_if_unanswered() -> None:
    order: list[str] = []
    cluster = etcd_memory.MemoryCluster(clock.ManualClock())
    etcd = cluster.connect()
    await etcd.put(KEYS.epoch, EPOCH.encode().encode())
    key = KEYS.lease(("llm", "h", "h-incarnation"))

    def deliver(batch: object) -> None:
        order.append("said" if cluster.store().get(key) else "said too early")

    group = committer.Committer(etcd, KEYS, EPOCH, deliver=deliver, on_overflow=_nothing, collect=_nothing)
    record = effects.Record("llm", "h", "h-incarnation", 1, {"max_concurrent_requests": 1}, 10.0)
    etcd.lose_next_reply(is_committed=False)
    group.add([effects.Send(1, refusal(1)), effects.PutRecord(record)])
    running = asyncio.create_task(group.run())
    async with asyncio.timeout(10):
        await group.barrier()
    assert order == ["said"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await etcd.close()
