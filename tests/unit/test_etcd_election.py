"""Elections where replies are lost, clients are cut off, and clusters vanish; on the in-memory etcd."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from leasehold.core import errors
from leasehold.etcd import clock, election, memory, observer

TTL_SECONDS = 6


@pytest.fixture
def manual() -> clock.ManualClock:
    return clock.ManualClock()


@pytest.fixture
def cluster(manual: clock.ManualClock) -> memory.MemoryCluster:
    return memory.MemoryCluster(manual)


class Candidate:
    def __init__(self, cluster: memory.MemoryCluster, name: str, manual: clock.ManualClock) -> None:
        self.etcd = cluster.connect()
        self.election = election.Election(
            self.etcd,
            "/e",
            name,
            f"{name}:1",
            TTL_SECONDS,
            clock=manual,
            randomness=random.Random(name),
        )


@pytest.fixture
async def a(cluster: memory.MemoryCluster, manual: clock.ManualClock) -> AsyncIterator[Candidate]:
    candidate = Candidate(cluster, "a", manual)
    async with candidate.election:
        yield candidate


@pytest.fixture
async def b(cluster: memory.MemoryCluster, manual: clock.ManualClock) -> AsyncIterator[Candidate]:
    candidate = Candidate(cluster, "b", manual)
    async with candidate.election:
        yield candidate


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_candidate_whose_put_lost_its_reply_wins_whether_or_not_it_was_committed(
    a: Candidate, cluster: memory.MemoryCluster, manual: clock.ManualClock, is_committed: bool
) -> None:
    await a.etcd.put("/before", b"")
    # The grant's reply first, then the put's: both are written.
    campaign = asyncio.create_task(a.election.campaign())
    a.etcd.lose_next_reply(is_committed=True)
    a.etcd.lose_next_reply(is_committed=is_committed)
    await manual.advance(1)
    won = campaign.result()
    record = await a.etcd.get("/e/leader")
    assert record is not None
    assert won == election.Won(record.create_revision, cluster.id)
    assert record.version == 1
    await manual.advance(3 * TTL_SECONDS)  # the lease that is kept is the one that holds the key
    assert not a.election.lost.is_set()


async def test_the_revision_grows_with_each_election(
    a: Candidate, b: Candidate, manual: clock.ManualClock
) -> None:
    revisions = []
    for candidate in (a, b, a, b):
        campaign = asyncio.create_task(candidate.election.campaign())
        await manual.settle()
        revisions.append(campaign.result().revision)
        await candidate.election.resign()
    assert revisions == sorted(set(revisions))


async def test_a_leader_that_is_cut_off_stops_before_another_is_elected(
    a: Candidate, b: Candidate, manual: clock.ManualClock
) -> None:
    await a.election.campaign()
    waiting = asyncio.create_task(b.election.campaign())
    await manual.advance(1)
    a.etcd.go_away()
    for _ in range(10 * TTL_SECONDS):
        await manual.advance(0.1)
        assert a.election.lost.is_set() or not waiting.done()
    assert waiting.done()
    assert a.election.lost_reason == "no renewal succeeded within the TTL"
    a.etcd.come_back()
    await manual.settle()
    leader = a.election.leader()
    assert leader == observer.Leader("b", "b:1", waiting.result().revision)


async def test_a_campaign_goes_on_through_an_absence_of_etcd(
    a: Candidate, cluster: memory.MemoryCluster, manual: clock.ManualClock
) -> None:
    await a.election.observer.wait_until(lambda leader: leader is None)
    cluster.go_away()
    campaign = asyncio.create_task(a.election.campaign())
    await manual.advance(60)
    assert not campaign.done()
    cluster.come_back()
    await manual.advance(2)
    assert campaign.result().cluster_id == cluster.id


async def test_an_absence_between_grant_and_put_is_overcome(a: Candidate, manual: clock.ManualClock) -> None:
    await a.election.observer.wait_until(lambda leader: leader is None)
    campaign = asyncio.create_task(a.election.campaign())
    await asyncio.sleep(0)  # the campaign asks for a lease
    await asyncio.sleep(0)  # it is granted
    assert a.etcd.cluster.store().next_expiry() == TTL_SECONDS
    a.etcd.go_away()
    await manual.advance(2 * TTL_SECONDS)
    assert not campaign.done()
    a.etcd.come_back()
    await manual.advance(2)
    assert campaign.result().revision == 2


async def test_a_campaign_ends_when_the_cluster_is_wiped_or_the_client_closed(
    a: Candidate, b: Candidate, cluster: memory.MemoryCluster, manual: clock.ManualClock
) -> None:
    await a.election.campaign()
    waiting = asyncio.create_task(b.election.campaign())
    await manual.settle()
    await b.etcd.close()
    await manual.settle()
    assert isinstance(waiting.exception(), errors.EtcdUnavailable)
    cluster.wipe()
    await manual.settle()
    assert a.election.lost.is_set()
    assert "cluster" in a.election.lost_reason or "etcd" in a.election.lost_reason
    with pytest.raises(errors.ForeignEtcdCluster):
        await a.election.campaign()


async def test_a_candidate_with_a_late_watch_does_not_campaign_in_a_loop(
    a: Candidate, b: Candidate, manual: clock.ManualClock
) -> None:
    """b's put fails because a leads; b takes that in from the answer, before its watch tells it."""
    await b.election.observer.wait_until(lambda leader: leader is None)
    campaigns = [asyncio.create_task(one.election.campaign()) for one in (a, b)]
    await manual.advance(1)
    status = await a.etcd.status()
    await manual.advance(10 * TTL_SECONDS)
    assert [campaign.done() for campaign in campaigns].count(True) == 1
    assert (await a.etcd.status()).revision == status.revision
    for campaign in campaigns:
        campaign.cancel()


async def test_old_news_does_not_replace_newer(cluster: memory.MemoryCluster) -> None:
    news = observer.LeaderObserver(cluster.connect(), "/e")
    new = observer.Leader("b", "b:1", 9)
    news.note(9, new)
    news.note(8, None)
    assert await news.wait_until(lambda leader: leader is not None) == new
    news.note(10, None)
    assert news.leader is None
