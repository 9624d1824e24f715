"""MetricsService of a real allocator: its calls, its nodes, its budgets."""

import re
from collections.abc import Callable

import allocator_kit as kit
from allocator_holders import DrivenHolder
from allocator_holders import running as holding
from allocator_kit import until
from leasehold.api.budget.v1 import budget_service_pb2 as budgets
from leasehold.api.common.v1 import metrics_service_pb2 as wire
from leasehold.api.common.v1 import metrics_service_pb2_grpc as wire_grpc
from node_agents import Agent, node_name, registration, running

MakeFleet = Callable[..., kit.Fleet]


async def exposed(fleet: kit.Fleet, member: kit.AllocatorProcess) -> dict[str, float]:
    """Samples by series."""
    stub = wire_grpc.MetricsServiceStub(fleet.channel(member))
    answer = await stub.ExposeMetrics(wire.ExposeMetricsRequest(), timeout=5.0)
    families = re.findall(r"^# TYPE (\S+)", answer.text, re.MULTILINE)
    assert len(families) == len(set(families))
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


async def test_the_leader_tells_its_nodes_and_budgets_and_a_follower_only_that_it_is_one(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    (follower,) = [member for member in fleet.members if member is not leader]
    await fleet.put(kit.budget())
    holder = DrivenHolder([leader.address], "w1")
    agents = [Agent([leader.address], registration(node_name())) for _ in range(3)]
    async with holding(holder), running(*agents):
        await until(lambda: holder.has() == 40 and all(agent.responses for agent in agents), "all are there")
        agents[0].leave()

        async def is_told() -> bool:
            told = await exposed(fleet, leader)
            return told['leasehold_nodes{state="gone"}'] == 1

        await until(is_told, "one is gone")
        told = await exposed(fleet, leader)
        where = '{budget="llm",dimension="max_concurrent_requests"}'
        assert told["leasehold_allocator_is_leader"] == 1
        assert (told['leasehold_nodes{state="ready"}'], told["leasehold_nodes_connected"]) == (2, 2)
        assert told[f"leasehold_budget_limit_in_force{where}"] == 40
        assert told[f"leasehold_budget_granted{where}"] == 40
        assert told['leasehold_budget_holders{budget="llm"}'] == 1
        assert told["leasehold_ledger_entries_waiting"] >= 0
        assert told["leasehold_ledger_entries_lost_total"] == 0
        assert any(series.startswith("grpc_server_handled_total") for series in told)
        assert (await exposed(fleet, follower))["leasehold_allocator_is_leader"] == 0
    await until(lambda: holder.has() == 0, "the holder is gone")
    await fleet.call("DeleteBudget", budgets.DeleteBudgetRequest(name="llm"))

    async def is_forgotten() -> bool:
        return not any("llm" in series for series in await exposed(fleet, leader))

    await until(is_forgotten, "a budget that is gone is not told any more")
