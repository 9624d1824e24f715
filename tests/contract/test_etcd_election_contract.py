"""What the election promises, on the in-memory twin and on a real server alike."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable

import pytest
from etcd_world import World
from leasehold.etcd import election, observer, port


async def candidate(world: World, name: str, stack: contextlib.AsyncExitStack) -> election.Election:
    return await stack.enter_async_context(
        election.Election(
            await world.connect(),
            world.prefix,
            name,
            f"{name}.example:7700",
            ttl_seconds=2,
            clock=world.clock,
            randomness=random.Random(name),
        )
    )


def is_led_by(name: str) -> Callable[[observer.Leader | None], bool]:
    return lambda leader: leader is not None and leader.candidate_id == name


@pytest.fixture
async def pair(world: World) -> AsyncIterator[tuple[election.Election, election.Election]]:
    async with contextlib.AsyncExitStack() as stack:
        yield await candidate(world, "a", stack), await candidate(world, "b", stack)


async def test_of_two_candidates_one_leads_and_both_know_it(
    pair: tuple[election.Election, election.Election], world: World, etcd: port.EtcdPort
) -> None:
    campaigns = [asyncio.create_task(one.campaign()) for one in pair]

    async def first_won() -> election.Won:
        (done, _) = await asyncio.wait(campaigns, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    won = await world.within(10, first_won())
    record = await etcd.get(f"{world.prefix}leader")
    assert record is not None
    assert won == election.Won(record.create_revision, await etcd.cluster_id())
    leader = await world.within(10, pair[0].observer.wait_until(lambda leader: leader is not None))
    assert leader is not None
    assert leader == await world.within(10, pair[1].observer.wait_until(lambda leader: leader is not None))
    assert leader == observer.Leader(leader.candidate_id, f"{leader.candidate_id}.example:7700", won.revision)
    assert sum(campaign.done() for campaign in campaigns) == 1
    for campaign in campaigns:
        campaign.cancel()
    await asyncio.wait(campaigns)


async def test_resigning_hands_over_without_waiting_for_the_ttl(
    pair: tuple[election.Election, election.Election], world: World
) -> None:
    a, b = pair
    first = await world.within(10, a.campaign())
    waiting = asyncio.create_task(b.campaign())
    await world.within(10, b.observer.wait_until(is_led_by("a")))
    resigned_at = world.clock.now()
    assert await a.resign()
    second = await world.within(10, waiting)
    assert world.clock.now() - resigned_at < 1
    assert second.revision > first.revision
    assert not a.lost.is_set()
    await world.within(10, a.observer.wait_until(is_led_by("b")))


async def test_a_leader_whose_lease_is_gone_hears_of_it_and_another_leads(
    pair: tuple[election.Election, election.Election], world: World, etcd: port.EtcdPort
) -> None:
    a, b = pair
    await world.within(10, a.campaign())
    record = await etcd.get(f"{world.prefix}leader")
    assert record is not None
    waiting = asyncio.create_task(b.campaign())
    await etcd.revoke_lease(record.lease_id)
    await world.within(10, a.lost.wait())
    assert a.lost_reason
    await world.within(10, waiting)
    again = asyncio.create_task(a.campaign())
    await b.resign()
    assert (await world.within(10, again)).revision > record.create_revision
    assert not a.lost.is_set()


async def test_a_leader_whose_key_is_deleted_hears_of_it(
    pair: tuple[election.Election, election.Election], world: World, etcd: port.EtcdPort
) -> None:
    a, _ = pair
    await world.within(10, a.campaign())
    await etcd.delete(f"{world.prefix}leader")
    await world.within(10, a.lost.wait())
    assert a.lost_reason == "the leader's key is gone or taken"


async def test_a_cancelled_candidate_leaves_no_key_behind(
    pair: tuple[election.Election, election.Election], world: World, etcd: port.EtcdPort
) -> None:
    a, b = pair
    await world.within(10, a.campaign())
    waiting = asyncio.create_task(b.campaign())
    await world.within(10, b.observer.wait_until(is_led_by("a")))
    waiting.cancel()
    await asyncio.wait([waiting])
    await a.resign()
    await world.within(10, a.observer.wait_until(lambda leader: leader is None))
    assert await etcd.get(f"{world.prefix}leader") is None


async def test_a_record_that_cannot_be_read_still_counts_as_a_leader(
    pair: tuple[election.Election, election.Election], world: World, etcd: port.EtcdPort
) -> None:
    a, _ = pair
    revision = await etcd.put(f"{world.prefix}leader", b"not JSON")
    leader = await world.within(10, a.observer.wait_until(lambda leader: leader is not None))
    assert leader == observer.Leader("", "", revision)
    campaign = asyncio.create_task(a.campaign())
    await etcd.put(f"{world.prefix}leaders", b"a longer key is not the leader's")
    await etcd.delete(f"{world.prefix}leader")
    assert (await world.within(10, campaign)).revision > revision
