"""Bad input: an exact code, the field named, and nothing changed."""

import math
from typing import Any

import allocator_kit as kit
import pytest
from allocator_holders import DrivenHolder, report, running
from allocator_kit import until
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors

LONG = "n" * 300

WRONG, UNKNOWN = errors.InvalidArgument, errors.NotFound


def changed(name: str, **fields: Any) -> wire.PutBudgetRequest:
    """A budget with something wrong set on the message itself."""
    budget = kit.budget("x")
    budget.name = name
    for path, value in fields.items():
        if path == "limit":
            budget.dimensions[0].limit = value
        elif path == "refresh_seconds":
            budget.refresh_interval.FromNanoseconds(int(value * 1e9))
        elif path == "dimensions":
            del budget.dimensions[:]
        else:
            setattr(budget, path, value)
    return wire.PutBudgetRequest(budget=budget)


def safe_capacity_of_another_dimension(name: str) -> wire.PutBudgetRequest:
    request = changed(name)
    request.budget.holder_classes.add(pattern="*", safe_capacity={"no_such": 1.0})
    return request


CASES: dict[str, tuple[str, Any, type[errors.LeaseholdError], str]] = {
    "negative limit": ("PutBudget", changed("ok", limit=-1.0), WRONG, "dimensions.*.limit"),
    "limit NaN": ("PutBudget", changed("ok", limit=math.nan), WRONG, "dimensions.*.limit"),
    "limit infinite": (
        "PutBudget",
        changed("ok", limit=math.inf),
        WRONG,
        "dimensions.*.limit",
    ),
    "limit too large": ("PutBudget", changed("ok", limit=1e10), WRONG, "dimensions.*.limit"),
    "no dimensions": ("PutBudget", changed("ok", dimensions=None), WRONG, "dimensions"),
    "name of 300": ("PutBudget", changed(LONG), WRONG, "name"),
    "name with a slash": ("PutBudget", changed("a/b"), WRONG, "name"),
    "name with a newline": ("PutBudget", changed("a\nb"), WRONG, "name"),
    "no name": ("PutBudget", changed(""), WRONG, "name"),
    "refresh above TTL": (
        "PutBudget",
        changed("ok", refresh_seconds=9.0),
        WRONG,
        "refresh_seconds",
    ),
    "workers above the maximum": (
        "PutBudget",
        changed("ok", expected_workers=1_000_000),
        WRONG,
        "expected_workers",
    ),
    "safe capacity of an unknown dimension": (
        "PutBudget",
        safe_capacity_of_another_dimension("ok"),
        WRONG,
        "holder_classes.safe_capacity.no_such",
    ),
    "request id of 300": (
        "PutBudget",
        wire.PutBudgetRequest(budget=kit.budget("ok"), request_id=LONG),
        WRONG,
        "request_id",
    ),
    "get unknown": ("GetBudget", wire.GetBudgetRequest(name="no-such"), UNKNOWN, "budget"),
    "get a slash": ("GetBudget", wire.GetBudgetRequest(name="a/b"), WRONG, "name"),
    "delete unknown": ("DeleteBudget", wire.DeleteBudgetRequest(name="no-such"), UNKNOWN, ""),
    "page too large": (
        "ListBudgets",
        wire.ListBudgetsRequest(page_size=251),
        WRONG,
        "page_size",
    ),
    "status unknown": (
        "GetBudgetStatus",
        wire.GetBudgetStatusRequest(budget="no-such"),
        UNKNOWN,
        "budget",
    ),
    "ledger's token": (
        "ListLedgerEntries",
        wire.ListLedgerEntriesRequest(page_token="x"),
        WRONG,
        "page_token",
    ),
    "plan without limits": ("PlanShares", wire.PlanSharesRequest(), WRONG, "limits"),
    "acquire unknown": (
        "AcquireLease",
        wire.AcquireLeaseRequest(budget="no-such", holder="h", request_id="request-1"),
        UNKNOWN,
        "budget",
    ),
    "acquire without an id": (
        "AcquireLease",
        wire.AcquireLeaseRequest(budget="no-such", holder="h"),
        WRONG,
        "request_id",
    ),
    "renew unknown": (
        "RenewLease",
        wire.RenewLeaseRequest(report=report("h", 1, budget="no-such")),
        UNKNOWN,
        "budget",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_it_is_refused_by_field_and_code(service: kit.Fleet, case: str) -> None:
    method, request, kind, field = CASES[case]
    with pytest.raises(kind) as caught:
        await service.call(method, request)
    assert type(caught.value) is kind
    first = kit.budget("x").dimensions[0].name
    assert (caught.value.field or "") == field.replace("*", first)
    assert "\n" not in caught.value.message
    listed = await service.call("ListBudgets", wire.ListBudgetsRequest())
    assert not {"ok", "x", LONG} & {budget.name for budget in listed.budgets}


HOLDERS = {
    "a slash": ("h/1", "holder"),
    "a newline": ("h\n1", "holder"),
    "300 characters": (LONG, "holder"),
    "nothing": ("", "holder"),
}


@pytest.mark.parametrize("case", HOLDERS)
async def test_a_holder_of_a_wrong_name_gets_no_lease(service: kit.Fleet, budget_name: str, case: str) -> None:
    name, field = HOLDERS[case]
    await service.put(kit.budget(budget_name))
    with pytest.raises(errors.InvalidArgument) as caught:
        await service.call(
            "AcquireLease", wire.AcquireLeaseRequest(budget=budget_name, holder=name, request_id="r")
        )
    assert caught.value.field == field
    assert not (await service.snapshot(budget_name)).holders


async def test_a_change_that_is_refused_leaves_definition_leases_and_limits_as_they_were(
    service: kit.Fleet, budget_name: str
) -> None:
    stored = await service.put(kit.budget(budget_name))
    holder = DrivenHolder([await address(service)], "h", budget=budget_name)
    async with running(holder):
        await until(lambda: holder.has() == 40, "it has it all")
        lease = holder.core.lease_id
        for request in (changed(budget_name, limit=math.nan), changed(budget_name, refresh_seconds=9.0)):
            with pytest.raises(errors.InvalidArgument):
                await service.call("PutBudget", request)
        other_kind = kit.budget(budget_name)
        other_kind.dimensions[0].kind = budget_pb2.DIMENSION_KIND_RATE
        with pytest.raises(errors.InvalidArgument) as caught:
            await service.call("PutBudget", wire.PutBudgetRequest(budget=other_kind))
        assert caught.value.field == "dimensions.max_concurrent_requests.kind"
        with pytest.raises(errors.VersionConflict):
            await service.put(kit.budget(budget_name, ttl_seconds=3.0), expected_version=7)
        answer = await service.call("GetBudget", wire.GetBudgetRequest(name=budget_name))
        assert answer.budget == stored
        await until(lambda: holder.answers_since(kit.now() - 0.3), "it is still renewed")
        assert holder.core.lease_id == lease and holder.has() == 40


async def address(service: kit.Fleet) -> str:
    return service.members[0].address


async def test_on_a_stream_each_wrong_report_is_refused_alone(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    stream = service.stub(service.members[0]).HoldLeases()
    wrong = {
        1: report("a/b", 1, budget=budget_name),
        2: report("h", 2, budget="no-such"),
        3: report("h", 3, budget=budget_name, demand={"no_such": 1.0}),
        4: report("h", 4, budget=budget_name, waiting_cost={"max_concurrent_requests": math.nan}),
        5: report("h", 5, budget=budget_name, incarnation="short"),
        6: report("h", 6, budget=budget_name, holdings={"max_concurrent_requests": -1.0}),
    }
    fields = {
        1: "holder",
        2: "budget",
        3: "demand.no_such",
        4: "waiting_cost.max_concurrent_requests",
        5: "incarnation",
        6: "holdings.held.max_concurrent_requests",
    }
    await stream.write(wire.HoldLeasesRequest(reports=[*wrong.values(), report("good", 1, budget=budget_name)]))
    await stream.write(wire.HoldLeasesRequest(releases=[wire.LeaseRelease(budget="a/b", holder="h")]))
    await stream.done_writing()
    refused: dict[int, str] = {}
    granted: list[str] = []
    while isinstance(response := await stream.read(), wire.HoldLeasesResponse):
        refused.update({each.sequence: each.field for each in response.refusals})
        granted += [each.holder for each in response.grants]
    # The refused release has no sequence. What was reported was answered before the stream ended.
    assert refused == {**fields, 0: "budget"}
    assert set(granted) == {"good"}
    view = await service.snapshot(budget_name)
    assert [each.holder for each in view.holders] == ["good"]


async def test_more_than_a_thousand_reports_at_once_end_the_stream(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name))
    stream = service.stub(service.members[0]).HoldLeases()
    reports = [report(f"h{number}", 1, budget=budget_name) for number in range(1001)]
    await stream.write(wire.HoldLeasesRequest(reports=reports))
    with pytest.raises(errors.InvalidArgument) as caught:
        await kit.read(stream)
    assert caught.value.field == "reports"
    assert not (await service.snapshot(budget_name)).holders
