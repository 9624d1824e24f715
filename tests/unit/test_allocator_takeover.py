"""What a new leader makes of what it finds in etcd and Postgres; on the in-memory twins."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from leasehold.allocator import job_gauges, leadership, records, takeover
from leasehold.allocator import reign as reigns
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import codec, machine, messages, model
from leasehold.etcd import clock, election
from leasehold.etcd import memory as etcd_memory
from leasehold.etcd import port as etcd_port
from leasehold.observe import metrics
from leasehold.postgres import job_memory
from leasehold.postgres import memory as postgres_memory

CALLS = "max_concurrent_requests"
KEYS = records.Keys("/t")


def spec(name: str = "llm", limit: int = 40) -> model.BudgetSpec:
    return codec.decode_budget({"name": name, "dimensions": {CALLS: limit}})


class Installation:
    """One etcd and one Postgres, and replicas that come and go."""

    def __init__(self) -> None:
        self.cluster = etcd_memory.MemoryCluster(clock.ManualClock())
        self.database = postgres_memory.MemoryDatabase()
        self.store = postgres_memory.MemoryStore(self.database)
        self.replicas = 0

    @contextlib.asynccontextmanager
    async def leading(self, *, accept_new_etcd: bool = False) -> AsyncIterator[leadership.Leadership]:
        """A replica that leads and is in line with Postgres."""
        async with self.standing(accept_new_etcd=accept_new_etcd) as (leader, task):
            synchronized = asyncio.create_task(leader.administration.is_synchronized.wait())
            await asyncio.wait([synchronized, task], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                synchronized.cancel()
                task.result()
            yield leader

    @contextlib.asynccontextmanager
    async def standing(
        self, *, accept_new_etcd: bool = False
    ) -> AsyncIterator[tuple[leadership.Leadership, asyncio.Task[None]]]:
        """A replica that campaigns."""
        self.replicas += 1
        etcd = self.cluster.connect()
        leader = leadership.Leadership(
            self.store,
            KEYS,
            job_store=job_memory.MemoryJobStore(),
            job_metrics=job_gauges.FlushMetrics(metrics.Registry()),
            candidate_id=f"r{self.replicas}",
            accept_new_etcd=accept_new_etcd,
        )
        candidate = election.Election(
            etcd,
            KEYS.prefix,
            f"r{self.replicas}",
            f"r{self.replicas}:1",
            5,
            clock=clock.ManualClock(),
            randomness=random.Random(1),
        )
        # A bound for what would hang; nothing here takes long.
        async with asyncio.timeout(10), candidate:
            task: asyncio.Task[None] = asyncio.create_task(leader.run(etcd, candidate))
            try:
                yield leader, task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await etcd.close()

    async def put(self, key: str, value: bytes) -> None:
        await self.cluster.connect().put(key, value)

    async def get(self, key: str) -> etcd_port.KeyValue | None:
        return await self.cluster.connect().get(key)


@pytest.fixture
def site() -> Installation:
    return Installation()


async def turns_until(condition: Callable[..., Any], *arguments: Any) -> None:
    """Let the loop turn until the condition, which may be a coroutine function, is true."""
    for _ in range(10_000):
        found = condition(*arguments)
        if await found if asyncio.iscoroutine(found) else found:
            return
        await asyncio.sleep(0)
    raise AssertionError("the loop turned in vain")


def core(leader: leadership.Leadership, name: str = "llm") -> machine.BudgetMachine:
    return leader.require().core.budget(name)


async def joined(reign: reigns.Reign, holder: str) -> messages.Grant:
    return await reign.acquire(
        budget="llm", holder=holder, incarnation=f"{holder}-incarnation", demand={}, process=None
    )


async def test_the_first_leader_ever_quarantines_nothing(site: Installation) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        assert (await joined(leader.require(), "a")).amounts[CALLS] == 40 * 10**6
    assert await site.get(KEYS.unknown_past) is None


async def test_a_successor_knows_every_lease_and_gives_out_none_of_it_twice(site: Installation) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        await joined(leader.require(), "a")
    async with site.leading() as leader:
        assert list(core(leader).book.leases) == ["a"]
        assert core(leader).book.pool() == [0]
        assert leader.require().epoch.revision > 1


async def test_a_wiped_etcd_is_quarantined_also_by_the_second_leader_if_the_first_died_too_early(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
    site.cluster.wipe()
    site.database.go_away()
    async with site.standing(accept_new_etcd=True) as (_, task):
        site.database.come_back()
        # The first dies between its epoch and the quarantine.
        await turns_until(site.get, KEYS.epoch)
        assert not task.done()
    assert await site.get(KEYS.unknown_past) is not None
    async with site.leading() as leader:
        assert leader.require().epoch.generation == 2
        assert core(leader).book.pool() == [0]
        assert machine.UNKNOWN_PAST in core(leader).book.stranded
    assert await site.get(KEYS.unknown_past) is None


async def test_a_wiped_etcd_is_refused_without_the_flag(site: Installation) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
    site.cluster.wipe()
    with pytest.raises(errors.ForeignEtcdCluster) as caught:
        async with site.leading():
            pass
    assert "--accept-new-etcd" in caught.value.message


async def test_an_etcd_whose_epoch_postgres_has_overtaken_is_refused_and_accepted_by_the_flag(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        epoch = leader.require().epoch
    site.database.fence = epochs.Epoch(1, epoch.revision + 1000, epoch.etcd_cluster_id)
    with pytest.raises(errors.ForeignEtcdCluster):
        async with site.leading():
            pass
    async with site.leading(accept_new_etcd=True) as leader:
        assert leader.require().epoch.generation == 2
        assert core(leader).book.pool() == [0]


async def test_an_unreadable_record_quarantines_its_budget_alone_and_is_cleared_away(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        await leader.administration.put_budget(spec("other"))
    bad = KEYS.lease(("llm", "a", "a-incarnation"))
    await site.put(bad, b"not JSON")
    async with site.leading() as leader:
        assert core(leader).book.pool() == [0]
        assert core(leader, "other").book.pool() == [40 * 10**6]
        assert await site.get(bad) is None


async def test_a_holder_that_joins_again_over_its_unreadable_record_keeps_the_new_one(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
    key = KEYS.lease(("llm", "a", "a-incarnation"))
    await site.put(key, b"not JSON")
    site.database.go_away()
    async with site.standing() as (leader, _):
        await turns_until(lambda: leader.reign is not None)
        in_use = messages.Holdings(held={CALLS: 10**6})
        report = messages.Report(
            budget="llm", holder="a", incarnation="a-incarnation", sequence=1, holdings=in_use
        )
        await leader.require().report_once(report)
        site.database.come_back()
        await leader.administration.is_synchronized.wait()

        found = await site.get(key)
        assert found is not None
        assert records.decode_record(KEYS, key, found.value).amounts == {CALLS: 10**6}


async def test_a_budget_whose_copy_is_unreadable_comes_from_postgres_with_its_leases_quarantined(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        await joined(leader.require(), "a")
    await site.put(KEYS.budget("llm"), b"{}")
    async with site.leading() as leader:
        assert core(leader).spec == spec()
        assert core(leader).book.pool() == [0]


async def test_what_postgres_got_but_its_leader_never_brought_in_force_is_in_force_with_the_next(
    site: Installation,
) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        await leader.administration.put_budget(spec("gone"))
        epoch = leader.require().epoch
    await site.store.put_budget(epoch, spec(limit=60))
    await site.store.delete_budget(epoch, "gone")
    async with site.leading() as leader:
        assert core(leader).spec == spec(limit=60)
        assert core(leader).version == 2
        with pytest.raises(errors.NotFound):
            core(leader, "gone")


async def test_a_change_of_unknown_outcome_is_read_again_before_the_next(site: Installation) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
        # Postgres commits it, and the answer is lost.
        site.database.lose_next_answer()
        with pytest.raises(errors.PostgresUnavailable):
            await leader.administration.put_budget(spec(limit=60))
        await leader.administration.is_synchronized.wait()
        assert core(leader).spec == spec(limit=60)
        assert core(leader).version == 2


async def test_a_change_goes_on_when_its_caller_is_gone(site: Installation) -> None:
    async with site.leading() as leader:
        change = asyncio.create_task(leader.administration.put_budget(spec()))
        await asyncio.sleep(0)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        # The next change waits for it.
        await leader.administration.put_budget(spec("other"))
        assert core(leader).version == 1


async def test_while_postgres_is_away_changes_are_refused_and_leases_served(site: Installation) -> None:
    async with site.leading() as leader:
        await leader.administration.put_budget(spec())
    site.database.go_away()
    async with site.standing() as (leader, task):
        await turns_until(lambda: leader.reign)
        assert not task.done()
        with pytest.raises(errors.PostgresUnavailable) as caught:
            await leader.administration.put_budget(spec(limit=60))
        assert caught.value.retry_after_seconds
        assert (await joined(leader.require(), "a")).amounts[CALLS] == 40 * 10**6


async def test_a_failing_core_ends_the_reign_loudly_and_the_next_leader_begins_from_etcd(
    site: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.standing() as (leader, task):
        await leader.administration.is_synchronized.wait()
        await leader.administration.put_budget(spec())
        reign = leader.require()

        def fail(now: float) -> None:
            raise AssertionError("the sums are wrong")

        monkeypatch.setattr(core(leader), "finish", fail)
        with pytest.raises(errors.NotLeader):
            await joined(reign, "a")
        with pytest.raises(AssertionError):
            await task
        with pytest.raises(errors.NotLeader):
            leader.require()
    async with site.leading() as leader:
        assert (await joined(leader.require(), "a")).amounts[CALLS] == 40 * 10**6


async def test_a_call_under_way_when_the_reign_ends_is_told_and_nothing_hangs(site: Installation) -> None:
    async with site.standing() as (leader, task):
        await leader.administration.is_synchronized.wait()
        await leader.administration.put_budget(spec())
        reign = leader.require()
        site.cluster.go_away()
        waiting = asyncio.create_task(joined(reign, "a"))
        changing = asyncio.create_task(leader.administration.put_budget(spec(limit=60)))
        await turns_until(lambda: reign.committer.is_etcd_away)
        reign.fence("a later leader was seen")
        with pytest.raises(errors.NotLeader):
            await waiting
        with pytest.raises(errors.NotLeader):
            await changing
        assert not task.done()
        with pytest.raises(errors.StaleEpoch):
            await reign.flush()


async def test_a_leader_whose_epoch_was_overwritten_delivers_nothing_more(site: Installation) -> None:
    async with site.standing() as (leader, _):
        await leader.administration.is_synchronized.wait()
        await leader.administration.put_budget(spec())
        reign = leader.require()
        session = reign.open_session()
        await site.put(KEYS.epoch, epochs.Epoch(1, 10**6, site.cluster.id).encode().encode())
        reign.report(
            messages.Report(budget="llm", holder="a", incarnation="a-incarnation", sequence=1), session
        )
        with pytest.raises(errors.NotLeader):
            await session.next_response()


async def test_records_say_what_they_said() -> None:
    assert takeover.KNOWN.must_quarantine("llm") is False
    assert takeover.Past(is_unknown=True).must_quarantine("llm")
    with pytest.raises(errors.InvalidArgument):
        records.decode_record(KEYS, KEYS.leases + "llm/a", b"{}")
    with pytest.raises(errors.InvalidArgument):
        records.decode_definition(json.dumps({"definition": {}}).encode())
