"""The leader dies, freezes, or is cut off while holders spend: nobody has too much, nothing is lost."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import allocator_kit as kit
import pytest
from allocator_holders import Auditor, DrivenHolder, report, running
from allocator_kit import until
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.etcd import adapter

CALLS = "max_concurrent_requests"
LIMITS = {CALLS: 40.0, "rpm_limit": 800.0}

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def spending(fleet: kit.Fleet, count: int = 4) -> AsyncIterator[list[DrivenHolder]]:
    """Holders that spend all that they get, and already share the budget evenly."""
    auditor = Auditor(LIMITS)
    holders = [DrivenHolder(fleet.addresses, f"h{number}", auditor=auditor) for number in range(count)]
    async with running(*holders):
        for each in holders:
            each.spend(calls=50)
        share = LIMITS[CALLS] / count
        await until(lambda: all(each.has() == share for each in holders), "everyone has its share")
        yield holders
    auditor.check()


async def test_sigkill_of_the_leader_of_three_under_load_overgrants_nobody_and_loses_no_lease(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=3)
    leader = await fleet.start()
    # As the rule is: TTL >= refresh + etcd's election + reconnecting.
    await fleet.put(kit.budget(ttl_seconds=4.0))
    async with spending(fleet) as holders:
        leases = {each.name: each.core.lease_id for each in holders}

        killed_at = leader.kill()

        successor = await fleet.leader(other_than=leader)
        elected_at = successor.logged_at("leader_elected")
        await until(lambda: all(each.answers_since(killed_at) for each in holders), "everyone is renewed")
        first_at = min(each.answers_since(killed_at)[0][0] for each in holders)
        renewed_at = max(each.answers_since(killed_at)[0][0] for each in holders)
        # The successor knew each lease: nobody had to ask for a new one, and nobody lost units.
        assert {each.name: each.core.lease_id for each in holders} == leases
        assert all(each.has() == 10 for each in holders)
        assert all(each.is_held for each in holders)
        # Growth works again: one leaves, and the others share what it had.
        left_at = kit.now()
        await holders[0].release()
        await until(lambda: sum(each.has() for each in holders[1:]) == 40, "the others have it all")
        grown_at = max(each.heard[-1][0] for each in holders[1:])
    kit.tell(
        f"SIGKILL of the leader: another one elected {1000 * (elected_at - killed_at):.0f} ms later (TTL 1 s); "
        f"from the election: first renewal {1000 * (first_at - elected_at):.0f} ms, "
        f"all four {1000 * (renewed_at - elected_at):.0f} ms; "
        f"growth {1000 * (grown_at - left_at):.0f} ms after a release with calls in flight (max_call 1 s)"
    )
    assert first_at - elected_at < 1.0


async def test_sigstop_of_the_leader_past_its_ttl_and_sigcont_writes_nothing_late_and_ends_its_streams(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    await fleet.put(kit.budget())
    async with spending(fleet) as holders:
        # One more, which knows only the leader: it stays on the frozen one's stream.
        faithful = DrivenHolder([leader.address], "faithful", auditor=holders[0].auditor)
        async with running(faithful):
            await until(lambda: all(each.has() == 8 for each in (*holders, faithful)), "everyone has its share")

            frozen_at = leader.freeze()

            successor = await fleet.leader(other_than=leader)
            await until(
                lambda: all(each.answers_since(frozen_at) for each in holders), "the others are renewed"
            )
            epoch = holders[0].core.epoch
            # The faithful one's lease runs out, and the successor deals its calls out again.
            await until(lambda: sum(each.has() for each in holders) == 40, "the others have it all")
            assert not faithful.is_held
            thawed_at = leader.thaw()
            await until(lambda: len(faithful.failures) > 0 and "reign_ended" in leader.log(), "it steps down")
            refused = await until(
                lambda: next((e for e in faithful.failures if _names_a_leader(e)), None),
                "it is told, at the latest when it asks again",
            )
            assert refused.leader_address == successor.address
            # What the late leader said after it woke up renewed nobody and gave nobody anything.
            assert not [grant for at, grant in faithful.heard if at > thawed_at and grant.answered_sequence]
            assert faithful.has() == 0
            assert all(each.core.epoch == epoch for each in holders)
            assert await fleet.leader() is successor
    assert "Traceback" not in leader.log()


async def test_a_leader_that_still_believes_it_leads_writes_and_says_nothing_once_a_later_epoch_is_there(
    make_fleet: MakeFleet, etcd_server: str, etcd_prefix: str
) -> None:
    # Its lease in etcd is kept all along: nothing but the comparison in each transaction can stop it.
    fleet = make_fleet(LEASEHOLD_ELECTION_TTL_SECONDS="60")
    leader = await fleet.start()
    await fleet.put(kit.budget())
    holders = [DrivenHolder([leader.address], f"h{number}") for number in range(2)]
    etcd = await adapter.connect([etcd_server])
    prefix = etcd_prefix.rstrip("/")
    async with running(*holders):
        await until(lambda: all(each.has() == 20 for each in holders), "both have their share")
        own = (await fleet.snapshot(at=leader)).epoch
        later = epochs.Epoch(own.generation, own.revision + 10_000, own.etcd_cluster_id)

        revision = await etcd.put(f"{prefix}/epoch", later.encode().encode())
        overtaken_at = kit.now()

        await until(lambda: "another leader has written its epoch" in leader.log(), "it is refused")
        await until(lambda: all(each.failures for each in holders), "its streams end")
        late = [grant for each in holders for grant in each.renewed_since(overtaken_at)]
        assert not [grant for grant in late if grant.epoch.revision == own.revision]
        # It resigned, and stood for election as anybody else: what is written since is of its new epoch.
        await until(lambda: all(each.core.epoch.revision > own.revision for each in holders), "it leads anew")
        assert all(each.core.epoch.revision > revision for each in holders)
    await etcd.close()


async def test_a_leader_cut_off_from_etcd_alone_renews_nobody_while_its_holders_stay_connected(
    make_fleet: MakeFleet, etcd_server: str
) -> None:
    async with kit.Proxy(etcd_server) as proxy:
        fleet = make_fleet(size=1, LEASEHOLD_ETCD_ENDPOINTS=proxy.address, LEASEHOLD_ELECTION_TTL_SECONDS="3")
        leader = await fleet.start()
        await fleet.put(kit.budget())
        auditor = Auditor(LIMITS)
        holders = [DrivenHolder([leader.address], f"h{number}", auditor=auditor) for number in range(2)]
        async with running(*holders):
            await until(lambda: all(each.has() == 20 for each in holders), "everyone has its share")
            cut_at = proxy.mute()
            last_renewal = max(each.expires_at for each in holders)
            # The stream is up, reports are sent, and the leader believes that it leads: no renewal comes.
            await until(lambda: not any(each.is_held for each in holders), "leases run out", seconds=3)
            assert not any(each.failures for each in holders)
            assert kit.now() >= min(each.expires_at for each in holders)
            late = [grant for each in holders for grant in each.renewed_since(cut_at)]
            assert not late, "a renewal was answered without etcd"
            assert last_renewal <= cut_at + 1.5
            proxy.mend()
            await until(lambda: all(each.has() == 20 for each in holders), "everyone is served again")
        auditor.check()


async def test_a_stream_cut_by_a_proxy_while_its_holder_spends_on_lets_nobody_grow_before_expiry(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    await fleet.put(kit.budget(max_call_seconds=0.3))
    auditor = Auditor(LIMITS)
    async with kit.Proxy(leader.address) as proxy:
        lonely = DrivenHolder([proxy.address], "lonely", auditor=auditor)
        other = DrivenHolder([leader.address], "other", auditor=auditor)
        async with running(lonely, other):
            lonely.spend(calls=50)
            await until(lambda: lonely.has() == 20 and other.has() == 20, "both have their share")
            cut_at = await proxy.cut()
            admitted_before = len(auditor.admissions)
            seen = await until(
                lambda: not lonely.is_held or (other.has() > 20 and "grew"), "the lease of the cut-off one ends"
            )
            assert seen is True, "the other grew while the cut-off one could spend"
            expired_at = lonely.expires_at
            assert expired_at - cut_at > 0.8, "it had most of its TTL left"
            assert len(auditor.admissions) > admitted_before, "it spent on"
            view = await fleet.snapshot(at=leader)
            await until(lambda: other.has() == 40, "the other has it all")
            grew_at = next(at for at, grant in other.heard if at > cut_at and grant.amounts[CALLS] > 20e6)
            # Not before the last call that it may have begun is over: TTL, then max_call.
            assert grew_at >= expired_at + 0.3
            assert grew_at <= expired_at + 0.3 + 1.5
            assert view.holders
        auditor.check()


async def test_sigterm_hands_the_leadership_over_at_once_drains_and_leaves_no_process(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=2, LEASEHOLD_ELECTION_TTL_SECONDS="20")
    leader = await fleet.start()
    await fleet.put(kit.budget())
    async with spending(fleet, count=2) as holders:
        told_at = kit.now()
        ending = asyncio.create_task(leader.terminate())
        successor = await fleet.leader(other_than=leader, seconds=5)
        handed_over_at = kit.now()
        assert successor is not leader
        await until(lambda: all(each.answers_since(handed_over_at) for each in holders), "everyone is renewed")
        assert all(each.is_held for each in holders)
        assert await ending == 0
    assert "Traceback" not in leader.log()
    kit.tell(f"SIGTERM: another leader after {1000 * (handed_over_at - told_at):.0f} ms")


async def test_sigterm_of_a_follower_ends_it_without_a_campaign(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=2, LEASEHOLD_ELECTION_TTL_SECONDS="20")
    leader = await fleet.start()
    follower = next(member for member in fleet.members if member is not leader)
    assert await follower.terminate() == 0
    assert "leader_elected" not in follower.log()
    assert await fleet.leader() is leader


async def test_followers_refuse_with_the_leaders_address(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    follower = next(member for member in fleet.members if member is not leader)
    requests = {
        "PutBudget": wire.PutBudgetRequest(budget=kit.budget()),
        "GetBudget": wire.GetBudgetRequest(name="llm"),
        "ListBudgets": wire.ListBudgetsRequest(),
        "DeleteBudget": wire.DeleteBudgetRequest(name="llm"),
        "AcquireLease": wire.AcquireLeaseRequest(budget="llm", holder="h", request_id="request-1"),
        "RenewLease": wire.RenewLeaseRequest(report=report("h", 1)),
        "ReleaseLease": wire.ReleaseLeaseRequest(
            release=wire.LeaseRelease(budget="llm", holder="h", incarnation="h-incarnation")
        ),
        "GetBudgetStatus": wire.GetBudgetStatusRequest(budget="llm"),
        "ExplainLease": wire.ExplainLeaseRequest(budget="llm", holder="h"),
    }

    async def points_at_leader() -> bool:
        with pytest.raises(errors.NotLeader) as caught:
            await fleet.call("ListBudgets", wire.ListBudgetsRequest(), at=follower)
        return caught.value.leader_address == leader.address

    await until(points_at_leader, "the follower has heard who leads")
    for method, request in requests.items():
        with pytest.raises(errors.NotLeader) as caught:
            await fleet.call(method, request, at=follower)
        assert caught.value.leader_address == leader.address, method
        assert caught.value.retry_after_seconds == 0.1
    lost = DrivenHolder([follower.address], "lost")
    async with running(lost):
        # gRPC may lose the status of a stream that ends while it is written to; the holder then asks again.
        refused = await until(
            lambda: [each for each in lost.failures if isinstance(each, errors.NotLeader)],
            "the stream is refused",
        )
    assert refused[0].leader_address == leader.address


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        ("GetBudget", wire.GetBudgetRequest(name="late")),
        ("GetBudgetStatus", wire.GetBudgetStatusRequest(budget="late")),
        ("AcquireLease", wire.AcquireLeaseRequest(budget="late", holder="h", request_id="request-1")),
    ],
)
async def test_a_leader_that_was_deposed_unseen_does_not_deny_a_budget_that_came_after_it(
    make_fleet: MakeFleet, etcd_server: str, etcd_prefix: str, method: str, request_message: Any
) -> None:
    fleet = make_fleet(LEASEHOLD_ELECTION_TTL_SECONDS="60")
    leader = await fleet.start()
    with pytest.raises(errors.NotFound):
        await fleet.call(method, request_message, at=leader)
    own = epochs.Epoch.decode(fleet_epoch(leader.log()))
    etcd = await adapter.connect([etcd_server])
    later = epochs.Epoch(own.generation, own.revision + 10_000, own.etcd_cluster_id)
    await etcd.put(f"{etcd_prefix.rstrip('/')}/epoch", later.encode().encode())
    await etcd.close()

    with pytest.raises(errors.NotLeader):
        await fleet.call(method, request_message, at=leader)


def fleet_epoch(log: str) -> str:
    """The epoch of which a leader's log tells."""
    (line,) = [line for line in log.splitlines() if '"leading"' in line]
    return str(json.loads(line)["epoch"])


def _names_a_leader(error: Exception) -> bool:
    return isinstance(error, errors.NotLeader) and bool(error.leader_address)
