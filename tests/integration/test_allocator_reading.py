"""What people and tools read of a running allocator."""

import asyncio
import itertools

import allocator_kit as kit
import pytest
from allocator_holders import DrivenHolder, running
from allocator_kit import until
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors

CALLS = "max_concurrent_requests"


def at(service: kit.Fleet, name: str, budget: str) -> DrivenHolder:
    return DrivenHolder([service.members[0].address], name, budget=budget)


async def test_a_watcher_sees_joins_shares_and_the_end(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    watch = service.stub(service.members[0]).WatchBudget(wire.WatchBudgetRequest(budget=budget_name))
    seen: list[wire.WatchBudgetResponse] = []

    async def follow() -> None:
        while True:
            seen.append(await kit.read(watch))

    following = asyncio.create_task(follow())
    await until(lambda: seen, "the budget as it is")
    assert not seen[0].holders and seen[0].pool == {CALLS: 40, "rpm_limit": 800}
    first, second = at(service, "first", budget_name), at(service, "second", budget_name)
    async with running(first, second):
        await until(lambda: [each.amounts[CALLS] for each in seen[-1].holders] == [20, 20], "both are shown")
        assert [each.holder for each in seen[-1].holders] == ["first", "second"]
        assert all(each.state == kit.LIVE and each.is_active for each in seen[-1].holders)
        assert seen[-1].epoch.revision > 0
    await until(lambda: all(each.state == kit.SUSPECT for each in seen[-1].holders), "their streams are gone")
    # At most ten times a second.
    read = [each.read_time.ToNanoseconds() for each in seen]
    gaps = [later - earlier for earlier, later in itertools.pairwise(read)]
    assert min(gaps) > 0.09e9
    await service.call("DeleteBudget", wire.DeleteBudgetRequest(name=budget_name))
    with pytest.raises(errors.NotFound):
        await following


async def test_status_and_explanation_tell_who_has_what_and_why(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    status = await service.call("GetBudgetStatus", wire.GetBudgetStatusRequest(budget=budget_name))
    assert not status.HasField("worker_id") and status.total_workers == 0
    assert status.base_allocation.amounts == {CALLS: 10, "rpm_limit": 200}
    holders = [at(service, name, budget_name) for name in ("a", "b")]
    async with running(*holders):
        await until(lambda: all(each.has() == 20 for each in holders), "both have their share")
        status = await service.call("GetBudgetStatus", wire.GetBudgetStatusRequest(budget=budget_name))
        assert status.worker_id == "a" and status.active_worker_ids == ["a", "b"]
        assert status.current_allocation.amounts[CALLS] == 20
        assert status.utilization_ratio.amounts[CALLS] == 2.0
        explained = await service.call("ExplainLease", wire.ExplainLeaseRequest(budget=budget_name, holder="b"))
        calls = next(each for each in explained.dimensions if each.dimension == CALLS)
        assert calls.amount == calls.target == 20 and calls.bound == 20
        assert "20 = 1/2 of 40" in calls.reason
        assert any("joined" in line for line in explained.story)
    with pytest.raises(errors.NotFound) as caught:
        await service.call("ExplainLease", wire.ExplainLeaseRequest(budget=budget_name, holder="nobody"))
    assert caught.value.field == "holder"


async def test_the_ledger_tells_the_story_newest_first_in_pages(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    holder = at(service, "h", budget_name)
    async with running(holder):
        await until(lambda: holder.has() == 40, "it has it all")
        await holder.release()

    async def page(token: str = "", size: int = 2) -> wire.ListLedgerEntriesResponse:
        request = wire.ListLedgerEntriesRequest(budget=budget_name, page_size=size, page_token=token)
        answer: wire.ListLedgerEntriesResponse = await service.call("ListLedgerEntries", request)
        return answer

    async def is_whole() -> bool:
        answer = await page(size=100)
        return "RELEASED" in {entry.event for entry in answer.entries}

    await until(is_whole, "the release is in the ledger")
    entries: list[wire.LedgerEntry] = []
    token = ""
    while True:
        answer = await page(token)
        assert len(answer.entries) <= 2
        entries += answer.entries
        token = answer.next_page_token
        if not token:
            break
    ids = [entry.id for entry in entries]
    assert ids == sorted(ids, reverse=True) and len(set(ids)) == len(ids)
    story = [entry.event for entry in reversed(entries) if entry.holder == "h"]
    assert story[0] == "JOINED" and "GRANTED" in story and story[-1] == "RELEASED"
    granted = next(entry for entry in entries if entry.event == "GRANTED")
    assert granted.amounts == {CALLS: 40, "rpm_limit": 800} and granted.epoch.revision > 0


async def test_a_plan_answers_by_policy_and_changes_nothing(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    plan = wire.PlanSharesRequest(
        policy=budget_pb2.POLICY_MAX_MIN,
        limits={"rpm_limit": 120},
        holders=[
            wire.PlanHolder(name="a", demand={"rpm_limit": 1000}),
            wire.PlanHolder(name="b", demand={"rpm_limit": 60}),
            wire.PlanHolder(name="c", demand={"rpm_limit": 10}),
        ],
    )
    answer = await service.call("PlanShares", plan)
    shares = {share.holder: share.amounts["rpm_limit"] for share in answer.shares}
    assert shares == {"a": 55, "b": 55, "c": 10}
    of_budget = wire.PlanSharesRequest(budget=budget_name, holders=[wire.PlanHolder(name="only")])
    answer = await service.call("PlanShares", of_budget)
    assert dict(answer.shares[0].amounts) == {CALLS: 40, "rpm_limit": 800}
    assert not (await service.snapshot(budget_name)).holders


async def test_budgets_are_listed_in_pages_by_name(service: kit.Fleet, budget_name: str) -> None:
    names = [f"{budget_name}-{letter}" for letter in "abc"]
    for name in names:
        await service.put(kit.budget(name))
    first = await service.call("ListBudgets", wire.ListBudgetsRequest(page_size=2, page_token=budget_name))
    assert [budget.name for budget in first.budgets] == names[:2] and first.next_page_token == names[1]
    rest = await service.call(
        "ListBudgets", wire.ListBudgetsRequest(page_size=250, page_token=first.next_page_token)
    )
    assert rest.budgets[0].name == names[2] and rest.budgets[0].version == 1
    assert rest.budgets[0].HasField("update_time")


async def test_health_reflection_and_channelz_answer(service: kit.Fleet) -> None:
    channel = service.channel(service.members[0])
    health = health_pb2_grpc.HealthStub(channel)
    services = ("budget.v1.BudgetService", "node.v1.NodeService", "job.v1.JobService")
    for name in ("", *(f"leasehold.api.{each}" for each in services)):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    for name in services:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"leasehold.api.{name}")
        calls = reflection.ServerReflectionInfo(iter([request]), timeout=5)
        described = await calls.read()
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(each)
            for each in described.file_descriptor_response.file_descriptor_proto
        ]
        assert name.rpartition(".")[2] in {each.name for file in files for each in file.service}
        calls.cancel()
    servers = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(
        channelz_pb2.GetServersRequest(), timeout=5
    )
    assert servers.server[0].data.calls_started > 0
