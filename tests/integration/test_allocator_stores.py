"""etcd and Postgres die, come back, or come back empty, under a real allocator with holders that spend."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import allocator_kit as kit
import pytest
from allocator_holders import Auditor, DrivenHolder, running
from allocator_kit import until
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.postgres import store

CALLS = "max_concurrent_requests"
LIMITS = {CALLS: 40.0, "rpm_limit": 800.0}

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def sharing(
    fleet: kit.Fleet, leader: kit.AllocatorProcess, *, auditor: Auditor | None = None
) -> AsyncIterator[list[DrivenHolder]]:
    """Two holders that spend, each with half."""
    judge = auditor or Auditor(LIMITS)
    holders = [DrivenHolder([leader.address], f"h{number}", auditor=judge) for number in range(2)]
    async with running(*holders):
        for each in holders:
            each.spend(calls=50)
        await until(lambda: all(each.has() == 20 for each in holders), "both have their share")
        yield holders
    judge.check()


async def ledger(fleet: kit.Fleet, leader: kit.AllocatorProcess) -> list[wire.LedgerEntry]:
    answer = await fleet.call("ListLedgerEntries", wire.ListLedgerEntriesRequest(page_size=1000), at=leader)
    return list(answer.entries)


# etcd.


async def test_sigkill_of_etcd_and_its_restart_within_the_ttl_lose_no_lease(
    make_fleet: MakeFleet, own_etcd: devstack.EtcdServer
) -> None:
    fleet = make_fleet(etcd=own_etcd.endpoint, LEASEHOLD_ELECTION_TTL_SECONDS="5")
    leader = await fleet.start()
    await fleet.put(kit.budget(ttl_seconds=6.0))
    async with sharing(fleet, leader) as holders:
        leases = [each.core.lease_id for each in holders]

        await asyncio.to_thread(own_etcd.kill)
        killed_at = kit.now()

        await until(lambda: "etcd_away" in leader.log(), "the leader notices")
        assert not any(each.answers_since(killed_at + 0.2) for each in holders)
        admitted = len(_auditor(holders).admissions)
        await until(lambda: len(_auditor(holders).admissions) > admitted + 50, "holders spend on")
        await asyncio.to_thread(own_etcd.start)
        await until(lambda: all(each.answers_since(killed_at + 0.2) for each in holders), "renewals resume")
        assert [each.core.lease_id for each in holders] == leases
        assert all(each.has() == 20 for each in holders)


async def test_sigkill_of_etcd_for_longer_than_the_ttl_ends_leases_at_their_expiry_and_serves_again_after_it(
    make_fleet: MakeFleet, own_etcd: devstack.EtcdServer
) -> None:
    fleet = make_fleet(etcd=own_etcd.endpoint)
    leader = await fleet.start()
    await fleet.put(kit.budget())
    async with sharing(fleet, leader) as holders:
        await asyncio.to_thread(own_etcd.kill)
        await until(lambda: not any(each.is_held for each in holders), "leases run out", seconds=4)
        await until(lambda: "reign_ended" in leader.log(), "the leader steps down")
        await asyncio.to_thread(own_etcd.start)
        await until(lambda: all(each.has() == 20 for each in holders), "both are served again")
    assert leader.is_running
    assert "Traceback" not in leader.log()


@pytest.mark.parametrize("keeps_its_id", [False, True], ids=["another cluster id", "the same id"])
async def test_a_wiped_etcd_is_refused_in_one_line_and_accepted_by_the_flag_with_everything_quarantined(
    make_fleet: MakeFleet, tmp_path: Path, keeps_its_id: bool
) -> None:
    token = (lambda: "the-same-token") if keeps_its_id else None
    with devstack.EtcdServer(tmp_path / "etcd", token=token) as etcd:
        fleet = make_fleet(etcd=etcd.endpoint)
        leader = await fleet.start()
        await fleet.put(kit.budget())
        auditor = Auditor(LIMITS)
        holders = [DrivenHolder(fleet.addresses, f"h{number}", auditor=auditor) for number in range(2)]
        async with running(*holders):
            for each in holders:
                each.spend(calls=50)
            await until(lambda: all(each.has() == 20 for each in holders), "both have their share")

            await asyncio.to_thread(etcd.wipe)
            await asyncio.to_thread(etcd.start)

            # The one that was running cannot go on, and says so.
            assert await leader.wait() == 1
            # A new one is refused, in one line.
            leader.log_path.unlink()
            leader.start()
            assert await leader.wait() == 1
            last = leader.log().strip().splitlines()[-1]
            assert last.startswith("leasehold allocator: etcd cluster ")
            assert "--accept-new-etcd" in last
            assert "Traceback" not in leader.log()

            leader.start("--accept-new-etcd")
            await fleet.ready()
            view = await fleet.snapshot(at=leader)
            assert view.epoch.generation == 2
            assert view.pool == {CALLS: 0, "rpm_limit": 0}
            past = [each for each in view.holders if each.holder == "unknown-past"]
            assert past[0].bound == {CALLS: 40, "rpm_limit": 800}
            # TTL + max(window + jitter, max_call) later everything is dealt out again.
            await until(lambda: all(each.has() == 20 for each in holders), "both are served again")
            assert all(each.core.epoch.generation == 2 for each in holders)
        auditor.check()
        # The flag is not needed again.
        leader.process.kill()
        leader.process.wait()
        leader.start()
        again = await fleet.ready()
        assert (await fleet.snapshot(at=again)).epoch.generation == 2


async def test_an_etcd_that_went_back_to_an_older_epoch_is_refused_like_a_wiped_one(
    make_fleet: MakeFleet, postgres_dsn: str
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    await fleet.put(kit.budget())
    epoch = (await fleet.snapshot(at=leader)).epoch
    leader.kill()
    # As if a later leader had been elected before etcd's disk was put back to an earlier state.
    async with store.PostgresStore(postgres_dsn) as facts:
        await facts.raise_epoch(epochs.Epoch(1, epoch.revision + 10_000, epoch.etcd_cluster_id))
    leader.start()
    assert await leader.wait() == 1
    assert "--accept-new-etcd" in leader.log().strip().splitlines()[-1]
    leader.start("--accept-new-etcd")
    await fleet.ready()
    view = await fleet.snapshot(at=leader)
    assert view.epoch.generation == 2
    assert [each.holder for each in view.holders] == ["unknown-past"]


# Postgres.


async def test_with_postgres_killed_leases_are_served_admin_writes_wait_and_the_ledger_catches_up(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer
) -> None:
    fleet = make_fleet(dsn=own_postgres.dsn)
    leader = await fleet.start()
    await fleet.put(kit.budget())
    async with sharing(fleet, leader) as holders:
        await asyncio.to_thread(own_postgres.kill)
        killed_at = kit.now()

        with pytest.raises(errors.PostgresUnavailable) as caught:
            await fleet.call("PutBudget", wire.PutBudgetRequest(budget=kit.budget(ttl_seconds=3.0)), at=leader)
        assert caught.value.retry_after_seconds
        with pytest.raises(errors.PostgresUnavailable):
            await fleet.call("ListLedgerEntries", wire.ListLedgerEntriesRequest(), at=leader)
        # Leases go on, and shares still move.
        third = DrivenHolder([leader.address], "third", auditor=_auditor(holders))
        async with running(third):
            await until(lambda: third.has() in (13, 14), "a third one has its share")
            await until(
                lambda: all(each.answers_since(kit.now() - 0.5) for each in holders), "others are renewed"
            )
            await asyncio.to_thread(own_postgres.start)
            await fleet.ready()
            await fleet.put(kit.budget(ttl_seconds=3.0))
            joined = await until(lambda: _joined(fleet, leader, "third"), "the ledger catches up")
        assert joined.epoch.revision > 0
        events = {entry.event for entry in await ledger(fleet, leader)}
        assert "GAP" not in events
    kit.tell(f"Postgres away for {kit.now() - killed_at:.1f} s")


async def test_failover_with_postgres_killed_serves_leases_and_aligns_when_it_is_back(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer
) -> None:
    fleet = make_fleet(dsn=own_postgres.dsn, size=2)
    leader = await fleet.start()
    await fleet.put(kit.budget(ttl_seconds=4.0))
    auditor = Auditor(LIMITS)
    holders = [DrivenHolder(fleet.addresses, f"h{number}", auditor=auditor) for number in range(2)]
    async with running(*holders):
        await until(lambda: all(each.has() == 20 for each in holders), "both have their share")
        await asyncio.to_thread(own_postgres.kill)

        killed_at = leader.kill()

        successor = await fleet.leader(other_than=leader)
        await until(lambda: all(each.answers_since(killed_at) for each in holders), "both are renewed")
        with pytest.raises(errors.PostgresUnavailable):
            await fleet.call("PutBudget", wire.PutBudgetRequest(budget=kit.budget()), at=successor)
        status = await fleet.call("GetBudgetStatus", wire.GetBudgetStatusRequest(budget="llm"), at=successor)
        assert status.total_workers == 2
        await asyncio.to_thread(own_postgres.start)
        assert await fleet.ready() is successor
        assert (await fleet.put(kit.budget())).version == 2
    auditor.check()


async def _joined(fleet: kit.Fleet, leader: kit.AllocatorProcess, name: str) -> wire.LedgerEntry | None:
    with contextlib.suppress(errors.PostgresUnavailable):
        for entry in await ledger(fleet, leader):
            if entry.holder == name and entry.event == "JOINED":
                return entry
    return None


def _auditor(holders: list[DrivenHolder]) -> Auditor:
    auditor = holders[0].auditor
    assert auditor is not None
    return auditor
