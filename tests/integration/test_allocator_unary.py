"""Leases held by hand, call by call, as a shell script does."""

import allocator_kit as kit
import pytest
from allocator_holders import report
from allocator_kit import until
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import lease_pb2
from leasehold.core import errors

CALLS = "max_concurrent_requests"


async def acquire(service: kit.Fleet, budget: str, holder: str, request_id: str) -> lease_pb2.LeaseGrant:
    request = wire.AcquireLeaseRequest(budget=budget, holder=holder, request_id=request_id)
    answer = await service.call("AcquireLease", request)
    grant: lease_pb2.LeaseGrant = answer.grant
    return grant


async def acquire_again(service: kit.Fleet, budget: str) -> lease_pb2.LeaseGrant:
    """Repeat `request-1`; where its lease ends in that very instant, once more, as the answer asks for."""
    try:
        return await acquire(service, budget, "script", "request-1")
    except errors.Unavailable as error:
        assert error.retry_after_seconds
        return await acquire(service, budget, "script", "request-1")


async def renew(service: kit.Fleet, message: lease_pb2.LeaseReport) -> lease_pb2.LeaseGrant:
    answer = await service.call("RenewLease", wire.RenewLeaseRequest(report=message))
    grant: lease_pb2.LeaseGrant = answer.grant
    return grant


def seconds(grant: lease_pb2.LeaseGrant) -> float:
    return grant.ttl.ToNanoseconds() / 1e9


async def test_a_repeated_acquire_returns_the_same_lease_and_never_extends_it(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name, max_call_seconds=0.2))
    first = await acquire(service, budget_name, "script", "request-1")
    answered_at = kit.now()
    assert first.amounts == {CALLS: 40, "rpm_limit": 800}
    assert first.lease_id and first.terms.dimensions and seconds(first) == 1.5
    repeats = []
    asked_at = kit.now()
    while (repeat := await acquire_again(service, budget_name)).lease_id == first.lease_id:
        assert repeat.amounts == first.amounts
        # The remaining time, so that the end stays where it was.
        assert asked_at + seconds(repeat) <= answered_at + 1.51
        repeats.append(seconds(repeat))
        asked_at = kit.now()
    assert repeats == sorted(repeats, reverse=True)
    assert repeats[-1] < 1.0
    # When it had run out, the same id was a new life of the same holder, or its last word.
    assert repeat.lease_id != first.lease_id


async def test_a_repeated_renewal_tells_the_remaining_time(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    grant = await acquire(service, budget_name, "script", "request-1")
    message = report(
        "script", 2, budget=budget_name, incarnation="request-1", lease_id=grant.lease_id, is_active=True
    )
    first = await renew(service, message)
    assert seconds(first) == 1.5 and first.answered_sequence == 2
    repeat = await until_less(service, message, 1.4)
    assert repeat.lease_id == grant.lease_id and repeat.answered_sequence == 2
    later = report(
        "script", 3, budget=budget_name, incarnation="request-1", lease_id=grant.lease_id, is_active=True
    )
    assert seconds(await renew(service, later)) == 1.5


async def until_less(service: kit.Fleet, message: lease_pb2.LeaseReport, ttl: float) -> lease_pb2.LeaseGrant:
    async def shorter() -> lease_pb2.LeaseGrant | None:
        grant = await renew(service, message)
        return grant if seconds(grant) < ttl else None

    found: lease_pb2.LeaseGrant = await until(shorter, "time runs")
    return found


async def test_a_shrink_of_a_unary_holder_counts_until_it_is_acknowledged(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name, ttl_seconds=8.0, max_call_seconds=0.2))
    first = await acquire(service, budget_name, "first", "request-1")
    assert first.amounts[CALLS] == 40
    # A second one gets nothing yet: nobody has told the first, which may use all that it has.
    second = await acquire(service, budget_name, "second", "request-2")
    assert second.amounts[CALLS] == 0

    def told(sequence: int, version: int) -> lease_pb2.LeaseReport:
        return report(
            "first",
            sequence,
            budget=budget_name,
            incarnation="request-1",
            lease_id=first.lease_id,
            grant_version=version,
            is_active=True,
        )

    shrunk = await renew(service, told(2, first.version))
    assert shrunk.amounts[CALLS] == 20
    view = await service.snapshot(budget_name)
    assert next(each.bound for each in view.holders if each.holder == "first")[CALLS] == 40
    # Acknowledged: what it gave up counts as just used for max_call, then it is the second's.
    await renew(service, told(3, shrunk.version))

    async def second_has() -> bool:
        grant = await acquire(service, budget_name, "second", "request-2")
        return grant.amounts[CALLS] == 20

    sequence = 2

    async def second_renews() -> bool:
        nonlocal sequence
        grant = await renew(
            service,
            report(
                "second",
                sequence,
                budget=budget_name,
                incarnation="request-2",
                lease_id=second.lease_id,
                is_active=True,
            ),
        )
        sequence += 1
        return grant.amounts[CALLS] == 20

    await until(second_renews, "the second has its share")
    assert await second_has()


async def test_a_release_may_be_repeated_and_leaves_units_cooling(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    grant = await acquire(service, budget_name, "script", "request-1")
    release = wire.ReleaseLeaseRequest(
        release=wire.LeaseRelease(
            budget=budget_name, holder="script", incarnation="request-1", lease_id=grant.lease_id
        )
    )
    await service.call("ReleaseLease", release)
    await service.call("ReleaseLease", release)
    view = await service.snapshot(budget_name)
    # It did not say what it had used, so all counts as just used.
    assert [(each.holder, each.state) for each in view.holders] == [("script", wire.HOLDER_STATE_COOLING)]
    assert view.pool == {CALLS: 0, "rpm_limit": 0}
    await until(lambda: _is_empty(service, budget_name), "all have cooled")


async def _is_empty(service: kit.Fleet, budget: str) -> bool:
    view = await service.snapshot(budget)
    return not view.holders and dict(view.pool) == {CALLS: 40, "rpm_limit": 800}


async def test_a_superseded_incarnation_is_told_so_by_each_call(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    old = await acquire(service, budget_name, "script", "request-1")
    await acquire(service, budget_name, "script", "request-2")
    message = report("script", 2, budget=budget_name, incarnation="request-1", lease_id=old.lease_id)
    assert (await renew(service, message)).end == lease_pb2.LEASE_END_SUPERSEDED
    again = await acquire(service, budget_name, "script", "request-1")
    assert again.end == lease_pb2.LEASE_END_SUPERSEDED and not again.amounts


async def test_renewing_a_lease_that_nobody_has_is_a_join_of_what_the_report_tells(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name))
    message = report("late", 7, budget=budget_name, lease_id=12345, holdings={CALLS: 3.0})
    grant = await renew(service, message)
    assert grant.lease_id not in (0, 12345)
    with pytest.raises(errors.NotFound) as caught:
        await renew(service, report("late", 1, budget="no-such-budget"))
    assert caught.value.field == "budget"
