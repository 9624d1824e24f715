"""Definitions change under holders that spend: by calls, by a file, and by calls whose callers are gone."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import allocator_kit as kit
import pytest
import yaml
from allocator_holders import DrivenHolder, running
from allocator_kit import until
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.budget import codec, holder, messages
from leasehold.postgres import store
from leasehold.rpc import budget_codec

CALLS = "max_concurrent_requests"
HALF = {CALLS: 20, "rpm_limit": 400}

MakeFleet = Callable[..., kit.Fleet]


def at(service: kit.Fleet, name: str, budget: str, **fields: object) -> DrivenHolder:
    return DrivenHolder([service.members[0].address], name, budget=budget, **fields)  # type: ignore[arg-type]


async def in_force(service: kit.Fleet, budget: str) -> dict[str, float]:
    answer = await service.call("GetBudget", wire.GetBudgetRequest(name=budget))
    return dict(answer.limits_in_force)


# Changes reach holders.


async def test_a_raised_limit_and_new_terms_reach_holders_at_once(service: kit.Fleet, budget_name: str) -> None:
    await service.put(kit.budget(budget_name))
    first, second = at(service, "first", budget_name), at(service, "second", budget_name)
    async with running(first, second):
        await until(lambda: first.has() == 20 and second.has() == 20, "both have their share")
        changed = kit.budget(
            budget_name,
            dimensions={CALLS: 60, "rpm_limit": 800, "tpm_limit": 1000},
            max_tokens_per_request=10,
            refresh_seconds=0.1,
        )
        stored = await service.put(changed)
        assert stored.version == 2
        await until(lambda: first.has() == 30 and second.has() == 30, "both have half of the new limit")
        await until(lambda: first.has("tpm_limit") == 500, "the new dimension is dealt out")
        assert first.core.limiter.terms is not None
        assert first.core.limiter.terms.max_tokens_per_request == 10 * 10**6
        await until(lambda: first.core.refresh_seconds == 0.1, "the new refresh interval is heard")
        assert first.is_held and second.is_held


async def test_a_lowered_limit_falls_monotonically_and_is_reached_in_time(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name, max_call_seconds=0.5))
    holders = [at(service, f"h{number}", budget_name) for number in range(2)]
    async with running(*holders):
        for each in holders:
            each.spend(calls=50, call_seconds=0.1)
        await until(lambda: all(each.has() == 20 for each in holders), "both have their share")
        await service.put(kit.budget(budget_name, dimensions=HALF, max_call_seconds=0.5))
        lowered_at = kit.now()
        seen = [await in_force(service, budget_name)]

        async def is_reached() -> bool:
            seen.append(await in_force(service, budget_name))
            return seen[-1] == HALF

        await until(is_reached, "the new limit is in force")
        # TTL + max(window + jitter, max_call).
        assert kit.now() - lowered_at < 1.5 + 2.2
        for name in HALF:
            values = [limits[name] for limits in seen]
            assert values == sorted(values, reverse=True), name
        # What is in force covers what is out there, at each step down.
        await until(lambda: all(each.has() == 10 for each in holders), "both have half of it")
        assert sum(each.truly_held("rpm_limit", kit.now()) for each in holders) <= 400


async def test_a_deleted_budget_ends_its_leases_and_made_anew_it_waits_for_what_still_cools(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name))
    old = at(service, "old", budget_name)
    async with running(old):
        await until(lambda: old.has() == 40, "it has it all")
        await service.call("DeleteBudget", wire.DeleteBudgetRequest(name=budget_name))
        deleted_at = kit.now()
        await until(lambda: old.core.state is holder.HolderState.ENDED, "its holder hears of it")
        assert old.core.end is messages.LeaseEnd.BUDGET_DELETED
    with pytest.raises(errors.NotFound):
        await service.call("GetBudget", wire.GetBudgetRequest(name=budget_name))
    assert (await service.put(kit.budget(budget_name))).version == 1
    new = at(service, "new", budget_name)
    async with running(new):
        await until(lambda: new.is_held, "a new holder joins")
        assert new.has() == 0, "the old one may not have heard before its lease runs out"
        await until(lambda: new.has() == 40, "it has it all")
        assert kit.now() - deleted_at > 1.2


# Requests that are repeated, or whose callers are gone.


async def test_the_repeat_of_an_old_request_is_answered_as_at_first_and_reverts_nothing(
    service: kit.Fleet, budget_name: str
) -> None:
    first = await service.put(kit.budget(budget_name), request_id=f"{budget_name}-1")
    await service.put(kit.budget(budget_name, ttl_seconds=9.0))
    repeat = await service.put(kit.budget(budget_name), request_id=f"{budget_name}-1")
    assert repeat == first
    answer = await service.call("GetBudget", wire.GetBudgetRequest(name=budget_name))
    assert answer.budget.version == 2 and answer.budget.ttl.seconds == 9
    with pytest.raises(errors.InvalidArgument) as caught:
        await service.put(kit.budget(budget_name, ttl_seconds=3.0), request_id=f"{budget_name}-1")
    assert caught.value.field == "request_id"


async def test_the_repeat_of_an_old_deletion_spares_the_budget_made_since(
    service: kit.Fleet, budget_name: str
) -> None:
    await service.put(kit.budget(budget_name))
    delete = wire.DeleteBudgetRequest(name=budget_name, request_id=f"{budget_name}-d")
    await service.call("DeleteBudget", delete)
    await service.put(kit.budget(budget_name))
    await service.call("DeleteBudget", delete)
    answer = await service.call("GetBudget", wire.GetBudgetRequest(name=budget_name))
    assert answer.budget.name == budget_name


async def test_a_change_whose_caller_hangs_up_is_wholly_in_force_or_not_at_all(
    make_fleet: MakeFleet, own_postgres: devstack.PostgresServer
) -> None:
    fleet = make_fleet(dsn=own_postgres.dsn)
    leader = await fleet.start()
    await fleet.put(kit.budget())
    own_postgres.freeze()
    changes = [wire.PutBudgetRequest(budget=kit.budget(ttl_seconds=2.0 + number)) for number in range(3)]
    calls = [fleet.call("PutBudget", change, at=leader, seconds=0.3) for change in changes]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, errors.DeadlineExceeded)
    own_postgres.thaw()
    await fleet.ready()
    async with store.PostgresStore(own_postgres.dsn) as facts:
        durable = await facts.get_budget("llm")
    answer = await fleet.call("GetBudget", wire.GetBudgetRequest(name="llm"), at=leader)
    assert budget_codec.decode_budget(answer.budget) == durable.spec
    assert answer.budget.version == durable.version
    # Nothing is stuck: the next change goes through.
    assert (await fleet.put(kit.budget(ttl_seconds=7.0))).version == durable.version + 1


# The file of budgets.


def write(path: Path, *budgets: dict[str, object], text: str | None = None) -> None:
    path.write_text(text if text is not None else yaml.safe_dump({"budgets": list(budgets)}))


def plain(name: str, **fields: object) -> dict[str, object]:
    return codec.encode_budget(budget_codec.decode_budget(kit.budget(name, **fields)))


async def test_the_file_of_budgets_is_followed_and_the_last_good_one_stays_in_force(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    path = tmp_path / "budgets.yaml"
    write(path, plain("a"), plain("b"))
    fleet = make_fleet()
    leader = await fleet.start("--budgets-file", str(path))
    await until(lambda: names_of(fleet, ["a", "b"]), "the file is applied")

    def refusals() -> int:
        return leader.log().count("budgets_file_refused")

    # A key misspelt, a kind changed beside a good change, no YAML at all: each is told, none is applied.
    wrong = plain("a", ttl_seconds=4.0)
    wrong["ttl_secnods"] = wrong.pop("ttl_seconds")
    write(path, wrong)
    await until(lambda: refusals() == 1, "the misspelt key is told")
    assert "ttl_secnods" in leader.log()
    other_kind = plain("b", dimensions={CALLS: {"kind": "rate", "limit": 5}})
    write(path, plain("a", ttl_seconds=4.0), other_kind)
    await until(lambda: refusals() == 2, "the changed kind is told")
    write(path, text="budgets: [")
    await until(lambda: refusals() == 3, "the broken file is told")
    path.unlink()
    await until(lambda: refusals() == 4, "the missing file is told")
    answer = await fleet.call("GetBudget", wire.GetBudgetRequest(name="a"), at=leader)
    assert answer.budget.version == 1
    # A good one again; a budget that left the file stays.
    write(path, plain("a", ttl_seconds=4.0))
    await until(lambda: version_of(fleet, "a", 2), "the change is applied")
    assert await names_of(fleet, ["a", "b"])
    assert refusals() == 4 and leader.is_running


async def names_of(fleet: kit.Fleet, wanted: list[str]) -> bool:
    answer = await fleet.call("ListBudgets", wire.ListBudgetsRequest())
    return [budget.name for budget in answer.budgets] == wanted


async def version_of(fleet: kit.Fleet, name: str, version: int) -> bool:
    answer = await fleet.call("GetBudget", wire.GetBudgetRequest(name=name))
    return bool(answer.budget.version == version)
