"""Holders that die, or only seem to: what is freed at once, what is freed late, and what never comes back."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import allocator_holder_child
import allocator_kit as kit
from allocator_holders import Auditor, DrivenHolder, running
from allocator_kit import until
from leasehold.core.budget import holder, messages

CALLS = "max_concurrent_requests"
CHILD = Path(allocator_holder_child.__file__)

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def child(address: str, name: str, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A holder's process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), address, name, *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_sigkill_of_a_holder_process_that_told_who_it_is_frees_its_calls_within_milliseconds(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    # Without the certificate its calls would come back after 10 s + 10 s.
    await fleet.put(kit.budget(ttl_seconds=10.0, max_call_seconds=10.0, orphan_seconds=0.0))
    auditor = Auditor({CALLS: 40, "rpm_limit": 800})
    survivor = DrivenHolder([leader.address], "survivor", auditor=auditor)
    async with running(survivor), child(leader.address, "victim") as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"holds\n"
        assert survivor.has() == 20

        process.kill()
        killed_at = kit.now()

        await until(lambda: survivor.has() == 40, "the survivor has all calls", seconds=5, pause=0.001)
        grown_at = next(at for at, grant in survivor.heard if at > killed_at and grant.amounts[CALLS] == 40e6)
        assert grown_at - killed_at < 1.0
        # Rates cool: what the victim spent still counts at the provider.
        assert survivor.has("rpm_limit") < 800
        await until(lambda: survivor.has("rpm_limit") == 800, "its requests have cooled", seconds=5)
        cooled_at = next(at for at, g in survivor.heard if at > killed_at and g.amounts["rpm_limit"] == 800e6)
        assert cooled_at - killed_at > 1.5
    auditor.check()
    kit.tell(
        f"certified death: calls moved {1000 * (grown_at - killed_at):.0f} ms after SIGKILL, "
        f"rates {cooled_at - killed_at:.2f} s (window 2 s, jitter 0.2 s)"
    )


async def test_sigkill_of_a_holder_process_that_told_nothing_frees_its_calls_only_after_its_ttl(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    await fleet.put(kit.budget(ttl_seconds=1.5, max_call_seconds=0.3))
    survivor = DrivenHolder([leader.address], "survivor")
    async with running(survivor), child(leader.address, "victim", "anonymous") as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"holds\n"

        process.kill()
        killed_at = kit.now()

        suspect = await until(lambda: _state(fleet, leader, "victim"), "the victim is seen")
        assert suspect in (kit.LIVE, kit.SUSPECT)
        await until(lambda: survivor.has() == 40, "the survivor has all calls", seconds=5)
        grown_at = next(at for at, grant in survivor.heard if at > killed_at and grant.amounts[CALLS] == 40e6)
        # Its last renewal was at most a refresh interval before: TTL - refresh + max_call at the least.
        assert 1.5 - 0.25 + 0.3 < grown_at - killed_at < 1.5 + 0.3 + 1.5


async def _state(fleet: kit.Fleet, leader: kit.AllocatorProcess, name: str) -> int | None:
    view = await fleet.snapshot(at=leader)
    return next((each.state for each in view.holders if each.holder == name), None)


async def test_a_newer_incarnation_supersedes_the_older_which_is_told_and_never_rejoins(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    await fleet.put(kit.budget())
    auditor = Auditor({CALLS: 40, "rpm_limit": 800})
    older = DrivenHolder([leader.address], "twin", auditor=auditor)
    async with running(older):
        older.spend(calls=50, call_seconds=0.1)
        await until(lambda: older.has() == 40, "the older has it all")
        newer = DrivenHolder([leader.address], "twin", auditor=auditor)
        async with running(newer):
            await until(lambda: older.core.state is holder.HolderState.ENDED, "the older hears of it")
            assert older.core.end is messages.LeaseEnd.SUPERSEDED
            assert older.has() == 0
            await until(lambda: newer.has() == 40, "the newer has it all", seconds=8)
            # Whoever is superseded may come back only by another incarnation: a stubborn one is told again.
            stubborn = DrivenHolder([leader.address], "twin", incarnation=older.core.incarnation)
            async with running(stubborn):
                await until(lambda: stubborn.core.state is holder.HolderState.ENDED, "it is refused")
            assert stubborn.core.end is messages.LeaseEnd.SUPERSEDED
            assert newer.has() == 40
    auditor.check()
