"""What watches promise, on the in-memory twin and on a real server alike."""

import contextlib

import pytest
from etcd_world import World
from leasehold.core import errors
from leasehold.etcd import port
from leasehold.etcd.port import Delete, KeyDeleted, KeyPut, Put, Reset


async def test_a_watch_tells_each_change_once_in_order(etcd: port.EtcdPort, world: World, key: str) -> None:
    start = (await etcd.get_prefix(world.prefix)).revision + 1
    async with contextlib.aclosing(etcd.watch_prefix(key, start)) as watch:
        first = await etcd.put(f"{key}/a", b"1")
        await etcd.put(f"{world.prefix}other", b"unseen")
        both = (await etcd.txn([], [Put(f"{key}/b", b"2"), Delete(f"{key}/a")])).revision
        last = await etcd.put(f"{key}/b", b"3")
        events = await world.events(watch, 4)
    assert events == [
        KeyPut(port.KeyValue(f"{key}/a", b"1", first, first, 1)),
        KeyPut(port.KeyValue(f"{key}/b", b"2", both, both, 1)),
        KeyDeleted(f"{key}/a", both),
        KeyPut(port.KeyValue(f"{key}/b", b"3", both, last, 2)),
    ]


async def test_a_watch_without_a_start_begins_with_the_listing(
    etcd: port.EtcdPort, world: World, key: str
) -> None:
    await etcd.put(key, b"1")
    async with contextlib.aclosing(etcd.watch_prefix(key)) as watch:
        reset = await world.within(10, anext(watch))
        assert isinstance(reset, Reset)
        assert [record.value for record in reset.listing.records] == [b"1"]
        revision = await etcd.put(key, b"2")
        (event,) = await world.events(watch, 1)
    assert isinstance(event, KeyPut)
    assert event.record.mod_revision == revision > reset.listing.revision


async def test_a_watch_from_the_past_tells_what_was_missed(etcd: port.EtcdPort, world: World, key: str) -> None:
    start = await etcd.put(key, b"0")
    for value in range(1, 50):
        await etcd.put(key, str(value).encode())
    async with contextlib.aclosing(etcd.watch_prefix(key, start)) as watch:
        events = await world.events(watch, 50)
    assert [event.record.value for event in events if isinstance(event, KeyPut)] == [
        str(value).encode() for value in range(50)
    ]


async def test_a_watch_from_before_a_compaction_is_reset(etcd: port.EtcdPort, world: World, key: str) -> None:
    start = await etcd.put(key, b"1")
    await etcd.put(f"{key}/2", b"2")
    newest = await etcd.put(key, b"3")
    await etcd.compact(newest)
    async with contextlib.aclosing(etcd.watch_prefix(key, start)) as watch:
        (reset,) = await world.events(watch, 1)
        after = await etcd.put(key, b"4")
        (event,) = await world.events(watch, 1)
    assert isinstance(reset, Reset)
    assert [record.value for record in reset.listing.records] == [b"3", b"2"]
    assert event == KeyPut(port.KeyValue(key, b"4", start, after, 3))


async def test_a_deletion_at_the_compacted_revision_is_not_lost(
    etcd: port.EtcdPort, world: World, key: str
) -> None:
    seen = await etcd.put(key, b"1")
    await etcd.delete(key)
    await etcd.compact(seen + 1)
    async with contextlib.aclosing(etcd.watch_prefix(key, seen + 1)) as watch:
        (event,) = await world.events(watch, 1)
    assert isinstance(event, Reset)
    assert event.listing.records == ()


async def test_a_compaction_does_not_disturb_a_watch_that_has_kept_up(
    etcd: port.EtcdPort, world: World, key: str
) -> None:
    start = await etcd.put(key, b"1")
    async with contextlib.aclosing(etcd.watch_prefix(key, start)) as watch:
        await world.events(watch, 1)
        revision = await etcd.put(f"{world.prefix}other", b"")
        await etcd.compact(revision)
        await etcd.put(key, b"2")
        (event,) = await world.events(watch, 1)
    assert isinstance(event, KeyPut)
    assert event.record.value == b"2"


async def test_a_watch_from_a_revision_never_reached_says_the_cluster_was_wiped(
    etcd: port.EtcdPort, world: World, key: str
) -> None:
    revision = await etcd.put(key, b"1")
    watch = etcd.watch_prefix(key, revision + 1_000_000)
    with pytest.raises(errors.ForeignEtcdCluster):
        await world.within(10, anext(watch))
