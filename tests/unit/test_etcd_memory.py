"""The in-memory etcd's own abilities: faults at will, and a clock that is moved by hand."""

import asyncio
import contextlib

import pytest
from leasehold.core import errors
from leasehold.etcd import clock, keeper, memory, port
from leasehold.etcd.port import Compare, KeyPut, Put, Reset


@pytest.fixture
def manual() -> clock.ManualClock:
    return clock.ManualClock()


@pytest.fixture
def etcd(manual: clock.ManualClock) -> memory.MemoryEtcd:
    return memory.connect(manual)


async def test_calls_fail_unapplied_while_the_server_is_away(etcd: memory.MemoryEtcd) -> None:
    await etcd.put("/k", b"1")
    etcd.cluster.go_away()
    for call in (etcd.get("/k"), etcd.put("/k", b"2"), etcd.txn([], [Put("/k", b"2")])):
        with pytest.raises(errors.EtcdUnavailable) as failed:
            await call
        assert failed.value.metadata["outcome"] == "not_applied"
    etcd.cluster.come_back()
    record = await etcd.get("/k")
    assert record is not None
    assert record.value == b"1"


async def test_a_client_alone_can_be_cut_off(etcd: memory.MemoryEtcd) -> None:
    other = etcd.cluster.connect()
    async with contextlib.aclosing(etcd.watch_prefix("/k")) as watch:
        assert isinstance(await anext(watch), Reset)
        etcd.go_away()
        await other.put("/k", b"1")
        with pytest.raises(errors.EtcdUnavailable):
            await etcd.get("/k")
        await other.put("/k", b"2")
        etcd.come_back()
        values = [
            event.record.value
            for event in [await anext(watch), await anext(watch)]
            if isinstance(event, KeyPut)
        ]
    assert values == [b"1", b"2"]


async def test_a_watch_behind_a_compaction_is_reset_when_its_client_is_back(etcd: memory.MemoryEtcd) -> None:
    other = etcd.cluster.connect()
    async with contextlib.aclosing(etcd.watch_prefix("/k")) as watch:
        await anext(watch)
        etcd.go_away()
        await other.put("/k", b"1")
        await other.compact(await other.put("/k", b"2"))
        etcd.come_back()
        reset = await anext(watch)
    assert isinstance(reset, Reset)
    assert [record.value for record in reset.listing.records] == [b"2"]


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_lost_reply_leaves_the_outcome_unknown(etcd: memory.MemoryEtcd, is_committed: bool) -> None:
    etcd.lose_next_reply(is_committed=is_committed)
    assert await etcd.get("/k") is None  # reads lose no reply
    with pytest.raises(errors.EtcdUnavailable) as failed:
        await etcd.txn([Compare.missing("/k")], [Put("/k", b"1")])
    assert failed.value.metadata["outcome"] == "unknown"
    assert (await etcd.get("/k") is not None) is is_committed
    await etcd.put("/k", b"2")


async def test_a_wiped_cluster_is_foreign_to_its_clients_and_new_to_others(etcd: memory.MemoryEtcd) -> None:
    before = await etcd.cluster_id()
    await etcd.put("/k", b"1")
    watch = etcd.watch_prefix("/k")
    await anext(watch)
    etcd.cluster.wipe()
    with pytest.raises(errors.ForeignEtcdCluster):
        await etcd.get("/k")
    with pytest.raises(errors.ForeignEtcdCluster):
        await anext(watch)
    fresh = etcd.cluster.connect()
    assert await fresh.cluster_id() == etcd.cluster.id != before
    assert (await fresh.get_prefix("")) == port.Listing(1, ())
    assert await fresh.put("/k", b"2") == 2


async def test_leases_end_when_due_and_start_anew_when_the_server_comes_back(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    lease = await etcd.grant_lease(5)
    await etcd.put("/k", b"", lease_id=lease.lease_id)
    await manual.advance(4)
    etcd.cluster.go_away()
    await manual.advance(60)
    etcd.cluster.come_back()
    await manual.advance(4.9)
    assert await etcd.get("/k") is not None
    await manual.advance(0.2)
    assert await etcd.get("/k") is None


async def test_the_shorter_of_two_leases_ends_first_for_a_watch(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    for name, ttl_seconds in (("long", 20), ("short", 5)):
        lease = await etcd.grant_lease(ttl_seconds)
        await etcd.put(f"/k/{name}", b"", lease_id=lease.lease_id)
    ended: list[tuple[str, float]] = []

    watch = etcd.watch_prefix("/k")
    await anext(watch)

    async def record() -> None:
        for _ in range(2):
            event = await anext(watch)
            assert isinstance(event, port.KeyDeleted)
            ended.append((event.key, manual.now()))

    recording = asyncio.create_task(record())
    await manual.advance(30)
    await recording
    await watch.aclose()
    assert ended == [("/k/short", 5), ("/k/long", 20)]


async def test_history_stays_within_its_bound(manual: clock.ManualClock) -> None:
    etcd = memory.MemoryCluster(manual, history_revisions_max=100).connect()
    for number in range(1000):
        await etcd.put("/k", str(number).encode())
    newest = (await etcd.get_prefix("/k")).revision
    assert (await etcd.get_prefix("/k", revision=newest - 20)).records[0].value == b"979"
    with pytest.raises(errors.FailedPrecondition):
        await etcd.get_prefix("/k", revision=newest - 101)


async def test_concurrent_transactions_interleave_but_do_not_mix(etcd: memory.MemoryEtcd) -> None:
    results = await asyncio.gather(
        *(etcd.txn([Compare.missing("/leader")], [Put("/leader", str(n).encode())]) for n in range(20))
    )
    assert [result.succeeded for result in results].count(True) == 1


# -- the keeper, second by second


async def test_a_keeper_renews_every_third_of_the_ttl(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    lease = await etcd.grant_lease(9)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        left = []
        for _ in range(7):
            await manual.advance(1)
            left.append(kept.remaining_seconds)
    assert left == [8, 7, 9, 8, 7, 9, 8]


async def test_a_keeper_that_is_cut_off_reports_its_loss_no_later_than_the_server_ends_the_lease(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    other = etcd.cluster.connect()
    lease = await etcd.grant_lease(9)
    await etcd.put("/k", b"", lease_id=lease.lease_id)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        await manual.advance(3.5)  # renewed at 3
        etcd.go_away()
        await manual.advance(8.4)
        assert not kept.lost.is_set()
        assert await other.get("/k") is not None
        await manual.advance(0.1)
        assert kept.lost.is_set()
        assert kept.reason == "no renewal succeeded within the TTL"


async def test_a_keeper_outlives_an_absence_shorter_than_the_ttl(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    lease = await etcd.grant_lease(9)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        await manual.advance(2)
        etcd.go_away()
        await manual.advance(6.5)
        etcd.come_back()
        await manual.advance(20)
        assert not kept.lost.is_set()
        assert await etcd.time_to_live(lease.lease_id) > 0


async def test_a_renewal_that_hangs_does_not_put_off_the_report(manual: clock.ManualClock) -> None:
    class Hanging(memory.MemoryEtcd):
        async def keep_alive(self, lease_id: int) -> int:
            await asyncio.Event().wait()
            return 0

    etcd = Hanging(memory.MemoryCluster(manual))
    lease = await etcd.grant_lease(3)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        await manual.advance(2.9)
        assert not kept.lost.is_set()
        await manual.advance(0.1)
        assert kept.lost.is_set()


async def test_a_slow_renewal_counts_from_when_it_was_sent(manual: clock.ManualClock) -> None:
    class Slow(memory.MemoryEtcd):
        async def keep_alive(self, lease_id: int) -> int:
            await manual.sleep(2)
            return await super().keep_alive(lease_id)

    etcd = Slow(memory.MemoryCluster(manual))
    lease = await etcd.grant_lease(9)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        await manual.advance(5)  # sent at 3, answered at 5
        assert kept.remaining_seconds == 7


async def test_a_keeper_of_a_wiped_cluster_reports_at_once(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    lease = await etcd.grant_lease(9)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=0, clock=manual) as kept:
        etcd.cluster.wipe()
        await manual.advance(3)
        assert kept.lost.is_set()


async def test_releasing_tells_whether_etcd_confirmed(
    etcd: memory.MemoryEtcd, manual: clock.ManualClock
) -> None:
    for is_reachable in (True, False):
        lease = await etcd.grant_lease(9)
        kept = keeper.LeaseKeeper(etcd, lease, granted_at=manual.now(), clock=manual)
        kept.start()
        if not is_reachable:
            etcd.go_away()
        assert await keeper.release(etcd, kept) is is_reachable
        assert not kept.lost.is_set()
