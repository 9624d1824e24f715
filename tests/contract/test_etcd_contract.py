"""What `EtcdPort` promises, on the in-memory twin and on a real server alike: keys, transactions, leases."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from etcd_world import World
from leasehold.core import errors
from leasehold.etcd import keeper, port
from leasehold.etcd.port import Compare, Delete, Get, KeyDeleted, Put

# -- records


async def test_a_missing_key_reads_as_none(etcd: port.EtcdPort, key: str) -> None:
    assert await etcd.get(key) is None
    assert await etcd.delete(key) == 0


async def test_a_record_tells_its_revisions_and_version(etcd: port.EtcdPort, key: str) -> None:
    created = await etcd.put(key, b"one")
    changed = await etcd.put(key, b"two")
    assert await etcd.get(key) == port.KeyValue(key, b"two", created, changed, version=2, lease_id=0)
    assert changed > created


async def test_a_key_created_again_begins_anew(etcd: port.EtcdPort, key: str) -> None:
    await etcd.put(key, b"one")
    assert await etcd.delete(key) == 1
    created = await etcd.put(key, b"two")
    assert await etcd.get(key) == port.KeyValue(key, b"two", created, created, version=1)


async def test_keys_may_hold_any_text(etcd: port.EtcdPort, world: World) -> None:
    keys = [f"{world.prefix}{name}" for name in ("grün/1", "日本", "\udcff", "a b", "z\x00z")]
    for key in keys:
        await etcd.put(key, b"")
    assert {record.key for record in (await etcd.get_prefix(world.prefix)).records} == set(keys)
    assert (await etcd.get_prefix(f"{world.prefix}\udcff")).records[0].key == f"{world.prefix}\udcff"


async def test_an_empty_key_is_refused(etcd: port.EtcdPort) -> None:
    with pytest.raises(errors.InvalidArgument):
        await etcd.put("", b"x")
    with pytest.raises(errors.InvalidArgument):
        await etcd.get("")


async def test_deleting_a_prefix_leaves_its_neighbours(etcd: port.EtcdPort, world: World) -> None:
    for name in ("a", "b/1", "b/2", "c"):
        await etcd.put(world.prefix + name, b"")
    assert await etcd.delete(f"{world.prefix}b/", is_prefix=True) == 2
    names = [record.key.removeprefix(world.prefix) for record in (await etcd.get_prefix(world.prefix)).records]
    assert names == ["a", "c"]


# -- listings


async def test_a_listing_is_in_order_and_only_of_its_prefix(etcd: port.EtcdPort, world: World) -> None:
    for number in (3, 1, 4, 7, 5, 2, 6):
        await etcd.put(f"{world.prefix}in/{number}", str(number).encode())
    last = await etcd.put(f"{world.prefix}in0", b"a neighbour")
    listing = await etcd.get_prefix(f"{world.prefix}in/")
    assert [record.value for record in listing.records] == [b"1", b"2", b"3", b"4", b"5", b"6", b"7"]
    assert listing.revision >= last


async def test_a_listing_of_nothing_is_empty(etcd: port.EtcdPort, world: World) -> None:
    assert (await etcd.get_prefix(world.prefix)).records == ()


async def test_a_listing_is_of_one_revision_while_writers_write(etcd: port.EtcdPort, world: World) -> None:
    """A writer keeps all values equal, in one transaction each; a torn listing would show two of them."""
    keys = [f"{world.prefix}{number}" for number in range(10)]

    async def write(value: int) -> None:
        await etcd.txn([], [Put(key, str(value).encode()) for key in keys])

    await write(0)
    stop = asyncio.Event()

    async def keep_writing() -> int:
        value = 0
        while not stop.is_set():
            value += 1
            await write(value)
        return value

    writer = asyncio.create_task(keep_writing())
    listings = [await etcd.get_prefix(world.prefix) for _ in range(20)]
    stop.set()
    assert await writer > 5
    assert all(len({record.value for record in listing.records}) == 1 for listing in listings)
    assert len({listing.revision for listing in listings}) > 5


async def test_an_older_revision_can_be_listed(etcd: port.EtcdPort, world: World, key: str) -> None:
    before = await etcd.put(key, b"one")
    await etcd.delete(key)
    listing = await etcd.get_prefix(world.prefix, revision=before)
    assert listing == port.Listing(before, (port.KeyValue(key, b"one", before, before, 1),))
    assert (await etcd.get_prefix(world.prefix)).records == ()


async def test_revisions_out_of_reach_are_refused_with_their_cause(etcd: port.EtcdPort, world: World) -> None:
    old = await etcd.put(f"{world.prefix}a", b"1")
    new = await etcd.put(f"{world.prefix}a", b"2")
    with pytest.raises(errors.FailedPrecondition) as future:
        await etcd.get_prefix(world.prefix, revision=new + 1_000_000)
    assert future.value.metadata["cause"] == "future_revision"
    await etcd.compact(new)
    with pytest.raises(errors.FailedPrecondition) as compacted:
        await etcd.get_prefix(world.prefix, revision=old)
    assert compacted.value.metadata["cause"] == "compacted"
    with pytest.raises(errors.FailedPrecondition) as again:
        await etcd.compact(new)
    assert again.value.metadata["cause"] == "compacted"
    assert (await etcd.get_prefix(world.prefix, revision=new)).records[0].value == b"2"


# -- transactions


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (lambda key, first, last: Compare.value(key, b"now"), True),
        (lambda key, first, last: Compare.value(key, b"then"), False),
        (lambda key, first, last: Compare.value(key, b""), False),
        (lambda key, first, last: Compare.create_revision(key, first), True),
        (lambda key, first, last: Compare.create_revision(key, last), False),
        (lambda key, first, last: Compare.mod_revision(key, last), True),
        (lambda key, first, last: Compare.mod_revision(key, first), False),
        (lambda key, first, last: Compare.version(key, 2), True),
        (lambda key, first, last: Compare.version(key, 1), False),
        (lambda key, first, last: Compare.missing(key), False),
        (lambda key, first, last: Compare.missing(f"{key}/none"), True),
        (lambda key, first, last: Compare.version(f"{key}/none", 0), True),
        (lambda key, first, last: Compare.mod_revision(f"{key}/none", 0), True),
        (lambda key, first, last: Compare.create_revision(f"{key}/none", first), False),
        (lambda key, first, last: Compare.value(f"{key}/none", b""), False),
    ],
)
async def test_a_compare_holds_or_not(
    etcd: port.EtcdPort, key: str, compare: Callable[[str, int, int], Compare], holds: bool
) -> None:
    first = await etcd.put(key, b"then")
    last = await etcd.put(key, b"now")
    result = await etcd.txn([compare(key, first, last)], [Put(f"{key}/done", b"")])
    assert result.succeeded is holds
    assert (await etcd.get(f"{key}/done") is not None) is holds


async def test_one_compare_that_fails_fails_all(etcd: port.EtcdPort, key: str) -> None:
    await etcd.put(key, b"epoch")
    compares = [Compare.value(key, b"epoch"), Compare.missing(key)]
    result = await etcd.txn(compares, [Put(key, b"then")], [Get(key)])
    assert not result.succeeded
    assert result.found[0] is not None
    assert result.found[0].value == b"epoch"


async def test_a_transaction_puts_all_at_one_revision(etcd: port.EtcdPort, world: World) -> None:
    keys = [f"{world.prefix}{number}" for number in range(5)]
    result = await etcd.txn([], [Put(key, b"x") for key in keys])
    records = (await etcd.get_prefix(world.prefix)).records
    assert {record.mod_revision for record in records} == {result.revision}
    assert len(records) == 5


async def test_a_transaction_that_changes_nothing_keeps_the_revision(etcd: port.EtcdPort, key: str) -> None:
    revision = await etcd.put(key, b"x")
    result = await etcd.txn([Compare.missing(key)], [Put(key, b"y")])
    assert result == port.TxnResult(succeeded=False, revision=revision)
    result = await etcd.txn([], [Delete(f"{key}/none")])
    assert result == port.TxnResult(succeeded=True, revision=revision)


async def test_a_transaction_tells_what_it_found_and_deleted(etcd: port.EtcdPort, key: str) -> None:
    await etcd.put(f"{key}/a", b"a")
    await etcd.put(f"{key}/b", b"b")
    result = await etcd.txn(
        [],
        [Get(f"{key}/none"), Put(f"{key}/new", b"n"), Get(f"{key}/new"), Delete(f"{key}/a"), Get(f"{key}/a")],
    )
    assert result.deleted == 1
    assert [record and record.value for record in result.found] == [None, b"n", None]
    result = await etcd.txn([], [Delete(f"{key}/", is_prefix=True), Delete(f"{key}/none")])
    assert (result.deleted, result.found) == (2, ())


@pytest.mark.parametrize(
    "ops",
    [
        lambda key: [Put(key, b"1"), Put(key, b"2")],
        lambda key: [Put(f"{key}/a", b"1"), Delete(f"{key}/a")],
        lambda key: [Delete(key, is_prefix=True), Put(f"{key}/a", b"1")],
        lambda key: [Put(f"{key}/{number}", b"") for number in range(5000)],
        lambda key: [Put("", b"1")],
    ],
    ids=["put twice", "put and deleted", "put under a deleted prefix", "too many", "empty key"],
)
async def test_an_impossible_transaction_is_refused_and_changes_nothing(
    etcd: port.EtcdPort, key: str, ops: Callable[[str], list[port.Op]]
) -> None:
    with pytest.raises(errors.InvalidArgument):
        await etcd.txn([], ops(key))
    with pytest.raises(errors.InvalidArgument):
        await etcd.txn([Compare.missing(key)], [], ops(key))  # the list that would not run, too
    assert (await etcd.get_prefix(key)).records == ()


async def test_a_transaction_of_compares_alone_tells_whether_they_hold(etcd: port.EtcdPort, key: str) -> None:
    revision = await etcd.put(key, b"epoch")
    assert await etcd.txn([Compare.value(key, b"epoch")], []) == port.TxnResult(True, revision)
    assert await etcd.txn([Compare.value(key, b"other")], []) == port.TxnResult(False, revision)


async def test_overlapping_deletes_are_allowed(etcd: port.EtcdPort, key: str) -> None:
    await etcd.put(key, b"")
    assert (await etcd.txn([], [Delete(key), Delete(key, is_prefix=True)])).deleted == 1


async def test_a_compare_of_the_wrong_type_is_refused(etcd: port.EtcdPort, key: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        await etcd.txn([Compare(key, port.CompareTarget.VALUE, 7)], [Put(key, b"")])
    with pytest.raises(errors.InvalidArgument):
        await etcd.txn([Compare(key, port.CompareTarget.VERSION, b"7")], [Put(key, b"")])
    assert await etcd.get(key) is None


# -- leases


async def test_a_lease_that_is_not_renewed_takes_its_keys_along(
    etcd: port.EtcdPort, world: World, key: str
) -> None:
    lease = await etcd.grant_lease(1)
    await etcd.put(f"{key}/b", b"", lease_id=lease.lease_id)
    await etcd.txn([], [Put(f"{key}/a", b"", lease.lease_id)])
    revision = await etcd.put(f"{key}/stays", b"")
    async with contextlib.aclosing(etcd.watch_prefix(key, revision + 1)) as watch:
        gone = await world.events(watch, 2)
    assert [event.key for event in gone if isinstance(event, KeyDeleted)] == [f"{key}/a", f"{key}/b"]
    assert [record.key for record in (await etcd.get_prefix(key)).records] == [f"{key}/stays"]
    with pytest.raises(errors.NotFound):
        await etcd.keep_alive(lease.lease_id)
    with pytest.raises(errors.NotFound):
        await etcd.time_to_live(lease.lease_id)


async def test_a_lease_tells_its_time_to_live(etcd: port.EtcdPort) -> None:
    lease = await etcd.grant_lease(60)
    assert lease.ttl_seconds == 60
    assert 58 <= await etcd.time_to_live(lease.lease_id) <= 60
    assert await etcd.keep_alive(lease.lease_id) == 60
    await etcd.revoke_lease(lease.lease_id)


async def test_a_revoked_lease_takes_its_keys_along_at_once(etcd: port.EtcdPort, key: str) -> None:
    lease = await etcd.grant_lease(60)
    await etcd.put(key, b"", lease_id=lease.lease_id)
    record = await etcd.get(key)
    assert record is not None
    assert record.lease_id == lease.lease_id
    await etcd.revoke_lease(lease.lease_id)
    assert await etcd.get(key) is None
    await etcd.revoke_lease(lease.lease_id)  # no error


async def test_a_key_put_again_without_its_lease_outlives_it(etcd: port.EtcdPort, key: str) -> None:
    lease = await etcd.grant_lease(60)
    await etcd.put(key, b"", lease_id=lease.lease_id)
    await etcd.put(key, b"own")
    await etcd.revoke_lease(lease.lease_id)
    record = await etcd.get(key)
    assert record is not None
    assert (record.value, record.lease_id) == (b"own", 0)


async def test_an_unknown_lease_is_refused_and_nothing_is_put(etcd: port.EtcdPort, key: str) -> None:
    with pytest.raises(errors.NotFound):
        await etcd.put(key, b"", lease_id=12345)
    with pytest.raises(errors.NotFound):
        await etcd.txn([], [Put(f"{key}/a", b""), Put(f"{key}/b", b"", 12345)])
    with pytest.raises(errors.NotFound):
        await etcd.keep_alive(12345)
    assert (await etcd.get_prefix(key)).records == ()


async def test_a_lease_of_no_time_is_refused(etcd: port.EtcdPort) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        await etcd.grant_lease(0)
    assert refused.value.field == "ttl_seconds"


async def test_a_kept_lease_outlives_its_ttl_several_times(world: World, etcd: port.EtcdPort, key: str) -> None:
    asked_at = world.clock.now()
    lease = await etcd.grant_lease(1)
    await etcd.put(key, b"", lease_id=lease.lease_id)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=asked_at, clock=world.clock) as kept:
        await world.within(5, world.clock.sleep(4 * lease.ttl_seconds))
        assert await etcd.get(key) is not None
        assert not kept.lost.is_set()
        assert 0 < kept.remaining_seconds <= lease.ttl_seconds


async def test_a_keeper_tells_when_its_lease_is_gone(world: World, etcd: port.EtcdPort) -> None:
    asked_at = world.clock.now()
    lease = await etcd.grant_lease(2)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=asked_at, clock=world.clock) as kept:
        await etcd.revoke_lease(lease.lease_id)
        await world.within(2, kept.lost.wait())
        assert "not found" in kept.reason
        assert kept.remaining_seconds == 0


# -- clients


async def test_clients_agree_on_the_cluster(etcd: port.EtcdPort, world: World) -> None:
    other = await world.connect()
    status = await etcd.status()
    assert await etcd.cluster_id() == await other.cluster_id() == status.cluster_id != 0
    assert status.leader_member_id == status.member_id != 0
    assert status.version
    assert status.revision >= 1


async def test_closing_a_client_ends_its_calls_and_watches_with_an_error(etcd: port.EtcdPort, key: str) -> None:
    watch = etcd.watch_prefix(key)
    await anext(watch)

    async def next_event() -> port.WatchEvent:
        return await anext(watch)

    waiting = asyncio.create_task(next_event())
    await asyncio.sleep(0)
    await etcd.close()
    with pytest.raises(errors.EtcdUnavailable):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(errors.EtcdUnavailable) as refused:
        await etcd.put(key, b"")
    assert refused.value.metadata["outcome"] == "not_applied"
