"""The leader dies, freezes, or is cut off while holders spend: nobody has too much, nothing is lost."""

import contextlib
from collections.abc import AsyncIterator, Callable

import allocator_kit as kit
from allocator_holders import Auditor, DrivenHolder, running
from allocator_kit import until

LIMITS = {"max_concurrent_requests": 40.0, "rpm_limit": 800.0}

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def spending(fleet: kit.Fleet, count: int = 4) -> AsyncIterator[list[DrivenHolder]]:
    """Holders that spend all that they get, and already share the budget evenly."""
    auditor = Auditor(LIMITS)
    holders = [DrivenHolder(fleet.addresses, f"h{number}", auditor=auditor) for number in range(count)]
    async with running(*holders):
        for each in holders:
            each.spend(calls=50)
        share = LIMITS["max_concurrent_requests"] / count
        await until(lambda: all(each.has() == share for each in holders), "everyone has its share")
        yield holders
    auditor.check()


async def test_sigkill_of_the_leader_of_three_under_load_overgrants_nobody_and_loses_no_lease(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=3)
    leader = await fleet.start()
    await fleet.put(kit.budget())
    async with spending(fleet) as holders:
        leases = {each.name: each.core.lease_id for each in holders}

        killed_at = leader.kill()

        await fleet.leader(other_than=leader)
        elected_at = kit.now()
        await until(lambda: all(each.answers_since(killed_at) for each in holders), "everyone is renewed")
        renewed_at = max(each.answers_since(killed_at)[0][0] for each in holders)
        # The successor knew each lease: nobody had to ask for a new one, and nobody lost units.
        assert {each.name: each.core.lease_id for each in holders} == leases
        assert all(each.has() == 10 for each in holders)
        assert all(each.is_held for each in holders)
        # Growth works again: one leaves, and the others share what it had.
        await holders[0].release()
        await until(lambda: sum(each.has() for each in holders[1:]) == 40, "the others have it all")
    kit.tell(
        f"SIGKILL of the leader: another one seen after {1000 * (elected_at - killed_at):.0f} ms, "
        f"all renewed {1000 * (renewed_at - elected_at):+.0f} ms from then"
    )
