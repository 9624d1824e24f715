"""What every store of durable facts does: one suite over PostgreSQL and the in-memory twin."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.postgres import memory, port, store

CLUSTER = 0xCDF818194E3A8C32
EPOCH = epochs.Epoch(1, 10, CLUSTER)
NEXT_EPOCH = epochs.Epoch(1, 11, CLUSTER)
NOON = datetime(2030, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)

OpenStore = Callable[[], Awaitable[port.Store]]


@pytest.fixture(params=["memory", "postgres"])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[OpenStore]:
    """Opens any number of stores on one database, which is empty and not migrated."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            database = memory.MemoryDatabase(now=TickingClock())

            async def open_one() -> port.Store:
                return memory.MemoryStore(database)
        else:
            dsn = request.getfixturevalue("postgres_dsn")

            async def open_one() -> port.Store:
                # The deadline is long, for machines that are busy with other tests.
                return await stack.enter_async_context(
                    store.PostgresStore(dsn, deadline_seconds=20.0, connections_max=4)
                )

        yield open_one


@pytest.fixture
async def facts(open_store: OpenStore) -> port.Store:
    """A migrated store."""
    opened = await open_store()
    await opened.migrate()
    return opened


class TickingClock:
    """Never the same instant twice, as Postgres's clock at transactions that follow each other."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)

    def __call__(self) -> datetime:
        self._now += timedelta(microseconds=1)
        return self._now


def spec_of(name: str = "openai", rpm: int = 800, **fields: Any) -> model.BudgetSpec:
    limits = {"rpm_limit": rpm, "max_concurrent_requests": 40}
    dimensions = tuple(
        model.Dimension(name=key, kind=model.STANDARD_KINDS[key], limit=limit * quantity.MICRO)
        for key, limit in limits.items()
    )
    return model.BudgetSpec(name=name, dimensions=dimensions, **fields)


def entry(event: str = "GRANTED", **fields: Any) -> port.LedgerEntry:
    return port.LedgerEntry(**{"time": NOON, "event": event, "budget": "openai", "holder": "w1", **fields})


async def causes(facts: port.Store, **filters: Any) -> list[str]:
    return [stored.entry.cause for stored in (await facts.list_ledger(**filters)).items]


# Migrations.


async def test_migrating_twice_applies_nothing_the_second_time(open_store: OpenStore) -> None:
    facts = await open_store()
    assert await facts.migrate() >= 1
    assert await facts.migrate() == 0
    assert await (await open_store()).migrate() == 0


async def test_a_database_without_the_schema_is_told_apart_from_one_that_is_away(open_store: OpenStore) -> None:
    facts = await open_store()
    await facts.ping()
    with pytest.raises(errors.FailedPrecondition, match="schema"):
        await facts.all_budgets()
    with pytest.raises(errors.FailedPrecondition, match="schema"):
        await facts.raise_epoch(EPOCH)


# Generations.


async def test_the_first_etcd_cluster_is_generation_one_and_stays_so(facts: port.Store) -> None:
    assert await facts.claim_generation(CLUSTER, accept_foreign=False) == 1
    assert await facts.claim_generation(CLUSTER, accept_foreign=False) == 1
    assert await facts.claim_generation(CLUSTER, accept_foreign=True) == 1


async def test_a_foreign_etcd_cluster_is_refused_in_one_line_that_names_the_flag(facts: port.Store) -> None:
    await facts.claim_generation(CLUSTER, accept_foreign=False)
    with pytest.raises(errors.ForeignEtcdCluster) as caught:
        await facts.claim_generation(7, accept_foreign=False)
    assert "--accept-new-etcd" in caught.value.message
    assert "cdf818194e3a8c32" in caught.value.message
    assert "\n" not in caught.value.message
    assert await facts.claim_generation(CLUSTER, accept_foreign=False) == 1


async def test_an_accepted_foreign_cluster_is_the_next_generation_and_the_old_one_is_foreign(
    facts: port.Store,
) -> None:
    await facts.claim_generation(CLUSTER, accept_foreign=False)
    assert await facts.claim_generation(7, accept_foreign=True) == 2
    assert await facts.claim_generation(7, accept_foreign=False) == 2
    with pytest.raises(errors.ForeignEtcdCluster):
        await facts.claim_generation(CLUSTER, accept_foreign=False)
    assert await facts.claim_generation(CLUSTER, accept_foreign=True) == 3


async def test_a_blank_cluster_that_keeps_its_id_is_foreign_once_the_fence_knows_its_generation(
    facts: port.Store,
) -> None:
    assert await facts.claim_generation(CLUSTER, accept_foreign=False, is_blank=True) == 1
    assert await facts.claim_generation(CLUSTER, accept_foreign=False, is_blank=True) == 1
    await facts.raise_epoch(epochs.Epoch(1, 10, CLUSTER))
    with pytest.raises(errors.ForeignEtcdCluster) as caught:
        await facts.claim_generation(CLUSTER, accept_foreign=False, is_blank=True)
    assert "--accept-new-etcd" in caught.value.message
    assert "\n" not in caught.value.message
    # One that still holds its epoch goes on.
    assert await facts.claim_generation(CLUSTER, accept_foreign=False) == 1


async def test_an_accepted_blank_cluster_is_the_next_generation_once(facts: port.Store) -> None:
    await facts.claim_generation(CLUSTER, accept_foreign=False)
    await facts.raise_epoch(epochs.Epoch(1, 10, CLUSTER))
    assert await facts.claim_generation(CLUSTER, accept_foreign=True, is_blank=True) == 2
    # Still blank, for the leader that asked died before it wrote its epoch: the same generation.
    assert await facts.claim_generation(CLUSTER, accept_foreign=False, is_blank=True) == 2
    await facts.raise_epoch(epochs.Epoch(2, 3, CLUSTER))
    with pytest.raises(errors.ForeignEtcdCluster):
        await facts.claim_generation(CLUSTER, accept_foreign=False, is_blank=True)


async def test_stores_that_claim_at_once_agree_on_the_generation(open_store: OpenStore) -> None:
    first, second = await open_store(), await open_store()
    await first.migrate()
    claims = [facts.claim_generation(CLUSTER, accept_foreign=False) for facts in [first, second] * 5]
    assert set(await asyncio.gather(*claims)) == {1}


@pytest.mark.parametrize("cluster_id", [0, 2**64 - 1])
async def test_any_64_bit_cluster_id_can_be_claimed(facts: port.Store, cluster_id: int) -> None:
    assert await facts.claim_generation(cluster_id, accept_foreign=False) == 1
    assert await facts.claim_generation(cluster_id, accept_foreign=False) == 1


@pytest.mark.parametrize("cluster_id", [-1, 2**64])
async def test_a_cluster_id_beyond_64_bits_is_refused(facts: port.Store, cluster_id: int) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await facts.claim_generation(cluster_id, accept_foreign=False)
    assert caught.value.field == "etcd_cluster_id"


# The fence.


async def test_the_fence_rises_and_never_falls(facts: port.Store) -> None:
    await facts.raise_epoch(epochs.Epoch(1, 10, CLUSTER))
    await facts.raise_epoch(epochs.Epoch(1, 10, CLUSTER))
    await facts.raise_epoch(epochs.Epoch(1, 11, CLUSTER))
    with pytest.raises(errors.StaleEpoch) as caught:
        await facts.raise_epoch(epochs.Epoch(1, 10, CLUSTER))
    assert caught.value.metadata["fence"] == epochs.Epoch(1, 11, CLUSTER).encode()
    # A new etcd counts revisions from the start again: the generation is compared first.
    await facts.raise_epoch(epochs.Epoch(2, 3, 7))
    with pytest.raises(errors.StaleEpoch):
        await facts.raise_epoch(epochs.Epoch(1, 9999, CLUSTER))


WRITES: dict[str, Callable[[port.Store, epochs.Epoch], Awaitable[object]]] = {
    "put_budget": lambda facts, epoch: facts.put_budget(epoch, spec_of(rpm=1)),
    "delete_budget": lambda facts, epoch: facts.delete_budget(epoch, "openai"),
    "append_ledger": lambda facts, epoch: facts.append_ledger(epoch, [entry()]),
    "append_ledger numbered": lambda facts, epoch: facts.append_ledger(epoch, [entry()], batch=99),
    "delete_ledger_before": lambda facts, epoch: facts.delete_ledger_before(epoch, 0.0),
    "delete_requests_before": lambda facts, epoch: facts.delete_requests_before(epoch, 0.0),
}


@pytest.mark.parametrize("write", WRITES)
async def test_every_write_of_an_overtaken_leader_is_refused_and_changes_nothing(
    open_store: OpenStore, write: str
) -> None:
    old, new = await open_store(), await open_store()
    await old.migrate()
    before = await old.put_budget(EPOCH, spec_of(), request_id="r1")
    await old.append_ledger(EPOCH, [entry(time=NOON - timedelta(days=9999))])
    ledger, audit = await old.list_ledger(), await old.list_audit()
    await new.raise_epoch(NEXT_EPOCH)

    with pytest.raises(errors.StaleEpoch):
        await WRITES[write](old, EPOCH)

    assert await new.all_budgets() == (before,)
    assert await new.list_ledger() == ledger
    assert await new.list_audit() == audit
    assert (await new.put_budget(NEXT_EPOCH, spec_of(), request_id="r1")) == before


async def test_a_write_of_a_higher_epoch_takes_the_fence_by_itself(facts: port.Store) -> None:
    await facts.put_budget(NEXT_EPOCH, spec_of())
    with pytest.raises(errors.StaleEpoch):
        await facts.raise_epoch(EPOCH)


async def test_a_write_that_was_refused_has_not_taken_the_fence(facts: port.Store) -> None:
    with pytest.raises(errors.NotFound):
        await facts.delete_budget(NEXT_EPOCH, "nothing")
    await facts.raise_epoch(EPOCH)


# Budgets.


async def test_a_budget_is_versioned_from_one_and_each_change_counts(facts: port.Store) -> None:
    first = await facts.put_budget(EPOCH, spec_of(rpm=800))
    second = await facts.put_budget(EPOCH, spec_of(rpm=900))
    assert (first.version, second.version) == (1, 2)
    assert first.spec == spec_of(rpm=800)
    assert first.update_time < second.update_time
    assert await facts.get_budget("openai") == second


async def test_an_equal_definition_changes_nothing(facts: port.Store) -> None:
    first = await facts.put_budget(EPOCH, spec_of())
    assert await facts.put_budget(EPOCH, spec_of()) == first
    assert len((await facts.list_audit()).items) == 1


async def test_every_field_of_a_definition_is_kept(facts: port.Store) -> None:
    spec = spec_of(
        policy=model.Policy.PROPORTIONAL,
        holder_classes=(
            model.HolderClass(pattern="b-*", weight=0.25, priority=-3, safe_capacity={"rpm_limit": 5_500_000}),
        ),
        expected_workers=9,
        scaling_enabled=False,
        ttl_seconds=12.5,
        orphan_seconds=0.0,
        charged_at=model.ChargedAt.COMPLETION,
    )
    await facts.put_budget(EPOCH, spec)
    assert (await facts.get_budget("openai")).spec == spec


async def test_a_put_that_expects_another_version_is_refused_and_names_the_present_one(
    facts: port.Store,
) -> None:
    with pytest.raises(errors.VersionConflict, match="does not exist"):
        await facts.put_budget(EPOCH, spec_of(), expected_version=1)
    await facts.put_budget(EPOCH, spec_of(rpm=1))
    changed = await facts.put_budget(EPOCH, spec_of(rpm=2), expected_version=1)
    with pytest.raises(errors.VersionConflict, match="at version 2") as caught:
        await facts.put_budget(EPOCH, spec_of(rpm=3), expected_version=1)
    assert caught.value.metadata["version"] == "2"
    assert not isinstance(caught.value, errors.StaleEpoch)
    assert await facts.get_budget("openai") == changed


async def test_of_puts_at_once_that_expect_one_version_one_succeeds(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(rpm=1))
    puts = [facts.put_budget(EPOCH, spec_of(rpm=10 + n), expected_version=1) for n in range(8)]
    answers = await asyncio.gather(*puts, return_exceptions=True)
    assert sum(isinstance(answer, port.StoredBudget) for answer in answers) == 1
    assert sum(isinstance(answer, errors.VersionConflict) for answer in answers) == 7
    assert (await facts.get_budget("openai")).version == 2


async def test_a_deleted_budget_is_gone_and_a_new_one_begins_again(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(rpm=1))
    await facts.put_budget(EPOCH, spec_of(rpm=2))
    await facts.delete_budget(EPOCH, "openai")
    with pytest.raises(errors.NotFound, match="openai"):
        await facts.get_budget("openai")
    with pytest.raises(errors.NotFound):
        await facts.delete_budget(EPOCH, "openai")
    assert (await facts.put_budget(EPOCH, spec_of())).version == 1


async def test_budgets_are_listed_by_code_point(facts: port.Store) -> None:
    for name in ["b", "a", "a-1", "B", "a.1", "a_1", "10", "2"]:
        await facts.put_budget(EPOCH, spec_of(name))
    in_order = ["10", "2", "B", "a", "a-1", "a.1", "a_1", "b"]
    assert [stored.spec.name for stored in await facts.all_budgets()] == in_order


# Repeats.


async def test_a_repeated_put_returns_the_first_answer_even_after_later_changes(facts: port.Store) -> None:
    first = await facts.put_budget(EPOCH, spec_of(rpm=1), request_id="r1", actor="ann", cause="c1")
    await facts.put_budget(EPOCH, spec_of(rpm=2))
    again = await facts.put_budget(EPOCH, spec_of(rpm=1), request_id="r1", actor="bob", cause="c2")
    assert again == first
    assert (await facts.get_budget("openai")).version == 2


async def test_a_repeat_under_the_next_leader_returns_the_first_answer(facts: port.Store) -> None:
    first = await facts.put_budget(EPOCH, spec_of(), request_id="r1", expected_version=0)
    assert await facts.put_budget(NEXT_EPOCH, spec_of(), request_id="r1") == first


@pytest.mark.parametrize(
    "other",
    [
        lambda facts: facts.put_budget(EPOCH, spec_of(rpm=2), request_id="r1"),
        lambda facts: facts.put_budget(EPOCH, spec_of("other"), request_id="r1"),
        lambda facts: facts.put_budget(EPOCH, spec_of(rpm=1), request_id="r1", expected_version=1),
    ],
)
async def test_a_request_id_that_comes_again_with_something_else_is_refused(
    facts: port.Store, other: Callable[[port.Store], Awaitable[object]]
) -> None:
    first = await facts.put_budget(EPOCH, spec_of(rpm=1), request_id="r1")
    with pytest.raises(errors.InvalidArgument) as caught:
        await other(facts)
    assert caught.value.field == "request_id"
    assert await facts.all_budgets() == (first,)


async def test_a_repeated_delete_is_answered_and_spares_a_newer_budget(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(), request_id="r1")
    await facts.delete_budget(EPOCH, "openai", request_id="r1")
    newer = await facts.put_budget(EPOCH, spec_of(rpm=5), request_id="r2")
    await facts.delete_budget(EPOCH, "openai", request_id="r1")
    assert await facts.all_budgets() == (newer,)


async def test_a_request_that_failed_may_be_tried_again_under_its_id(facts: port.Store) -> None:
    with pytest.raises(errors.NotFound):
        await facts.delete_budget(EPOCH, "openai", request_id="r1")
    await facts.put_budget(EPOCH, spec_of())
    await facts.delete_budget(EPOCH, "openai", request_id="r1")
    assert await facts.all_budgets() == ()


async def test_repeats_at_once_make_one_change(facts: port.Store) -> None:
    puts = [facts.put_budget(EPOCH, spec_of(), request_id="r1") for _ in range(6)]
    answers = await asyncio.gather(*puts)
    assert {answer.version for answer in answers} == {1}
    assert len((await facts.list_audit()).items) == 1


async def test_answers_are_forgotten_after_their_age(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(rpm=1), request_id="r1")
    assert await facts.delete_requests_before(EPOCH) == 0
    assert await facts.delete_requests_before(EPOCH, 0.0) == 1
    assert (await facts.put_budget(EPOCH, spec_of(rpm=2), request_id="r1")).version == 2


@pytest.mark.parametrize("request_id", ["x" * 65, "a\nb", "é", "a\0"])
async def test_a_request_id_that_cannot_be_kept_is_refused(facts: port.Store, request_id: str) -> None:
    for write in (
        facts.put_budget(EPOCH, spec_of(), request_id=request_id),
        facts.delete_budget(EPOCH, "openai", request_id=request_id),
    ):
        with pytest.raises(errors.InvalidArgument) as caught:
            await write
        assert caught.value.field == "request_id"


# The audit log.


async def test_each_change_is_audited_with_who_why_before_and_after(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(rpm=1), actor="ann", cause="launch")
    await facts.put_budget(EPOCH, spec_of(rpm=2), actor="bob")
    await facts.put_budget(EPOCH, spec_of("other"), actor="bob")
    await facts.delete_budget(NEXT_EPOCH, "openai", actor="eve", cause="clean-up")
    page = await facts.list_audit(target="budget/openai", page_size=2)
    deleted, changed = page.items
    assert page.has_more
    (created,) = (await facts.list_audit(target="budget/openai", page_size=2, before_id=changed.id)).items

    assert (created.actor, created.method, created.cause) == ("ann", "PutBudget", "launch")
    assert created.before is None
    assert created.epoch == EPOCH
    assert created.after is not None and created.after["version"] == 1
    assert created.after == changed.before
    assert changed.after == deleted.before
    assert changed.after is not None and changed.after["definition"]["dimensions"][0]["limit"] == 2
    assert (deleted.actor, deleted.method, deleted.target) == ("eve", "DeleteBudget", "budget/openai")
    assert deleted.after is None
    assert deleted.epoch == NEXT_EPOCH
    assert len((await facts.list_audit()).items) == 4


async def test_words_of_people_that_postgres_cannot_hold_are_mended_not_refused(facts: port.Store) -> None:
    await facts.put_budget(EPOCH, spec_of(), actor="a\0b", cause="\ud800" + "x" * 2000)
    (record,) = (await facts.list_audit()).items
    assert record.actor == "a\ufffdb"
    assert len(record.cause) == 1000


# The ledger.


async def test_a_ledger_entry_is_kept_as_it_was(facts: port.Store) -> None:
    written = entry(
        "LIMIT_CHANGED",
        holder="w@host:1",
        incarnation="0123456789abcdef",
        lease_id=2**64 - 1,
        amounts={"rpm_limit": 200.5, "num_workers": 0.0},
        cause="ünïcode — \t and a NUL \0",
    )
    await facts.append_ledger(EPOCH, [written])
    (stored,) = (await facts.list_ledger()).items
    assert stored.entry == written
    assert stored.entry.cause.endswith("NUL \ufffd")
    assert stored.epoch == EPOCH


async def test_the_ledger_is_paged_newest_first(facts: port.Store) -> None:
    await facts.append_ledger(EPOCH, [entry(cause=str(n)) for n in range(5)])
    await facts.append_ledger(NEXT_EPOCH, [entry(cause=str(n)) for n in range(5, 7)])
    first = await facts.list_ledger(page_size=4)
    assert [stored.entry.cause for stored in first.items] == ["6", "5", "4", "3"]
    assert [stored.epoch for stored in first.items] == [NEXT_EPOCH, NEXT_EPOCH, EPOCH, EPOCH]
    assert first.has_more
    await facts.append_ledger(NEXT_EPOCH, [entry(cause="new")])
    rest = await facts.list_ledger(page_size=4, before_id=first.items[-1].id)
    assert [stored.entry.cause for stored in rest.items] == ["2", "1", "0"]
    assert not rest.has_more


async def test_the_ledger_is_filtered_by_budget_and_by_holder(facts: port.Store) -> None:
    await facts.append_ledger(
        EPOCH,
        [
            entry(budget=budget, holder=holder, cause=budget + holder)
            for budget in "ab"
            for holder in ("w1", "w2")
        ]
        + [entry(port.GAP, budget="", holder="", cause="gap")],
    )
    assert await causes(facts) == ["gap", "bw2", "bw1", "aw2", "aw1"]
    assert await causes(facts, budget="a") == ["aw2", "aw1"]
    assert await causes(facts, holder="w1") == ["bw1", "aw1"]
    assert await causes(facts, budget="b", holder="w1") == ["bw1"]
    assert await causes(facts, budget="c") == []
    assert await causes(facts, budget="b", holder="w1", page_size=1) == ["bw1"]


async def test_a_batch_that_is_repeated_is_written_once(facts: port.Store) -> None:
    await facts.append_ledger(EPOCH, [entry(cause="1")], batch=1)
    await facts.append_ledger(EPOCH, [entry(cause="1")], batch=1)
    await facts.append_ledger(EPOCH, [entry(cause="2")], batch=2)
    await facts.append_ledger(EPOCH, [entry(cause="1")], batch=1)
    await facts.append_ledger(EPOCH, [entry(cause="unnumbered")])
    assert await causes(facts) == ["unnumbered", "2", "1"]


async def test_batches_are_counted_from_one_again_in_each_epoch(facts: port.Store) -> None:
    await facts.append_ledger(EPOCH, [entry(cause="old")], batch=5)
    await facts.raise_epoch(NEXT_EPOCH)
    await facts.append_ledger(NEXT_EPOCH, [entry(cause="new")], batch=1)
    await facts.append_ledger(NEXT_EPOCH, [entry(cause="new")], batch=1)
    await facts.raise_epoch(NEXT_EPOCH)
    await facts.append_ledger(NEXT_EPOCH, [entry(cause="new")], batch=1)
    assert await causes(facts) == ["new", "old"]


async def test_old_entries_are_deleted_and_young_ones_stay(facts: port.Store) -> None:
    now = datetime.now(UTC)
    old = [entry(time=now - timedelta(days=8), cause="old") for _ in range(3)]
    await facts.append_ledger(EPOCH, [*old, entry(time=now - timedelta(days=6), cause="young")])
    assert await facts.delete_ledger_before(EPOCH) == 3
    assert await causes(facts) == ["young"]
    assert await facts.delete_ledger_before(EPOCH) == 0
    assert await facts.delete_ledger_before(EPOCH, 5 * 86_400.0) == 1


async def test_more_entries_than_one_step_deletes_all_go(facts: port.Store) -> None:
    old = [entry(time=NOON - timedelta(days=9999))] * port.LEDGER_BATCH_ENTRIES_MAX
    await facts.append_ledger(EPOCH, old)
    await facts.append_ledger(EPOCH, old[:1])
    assert await facts.delete_ledger_before(EPOCH) == len(old) + 1
    assert (await facts.list_ledger()).items == ()


async def test_a_batch_that_is_too_long_is_refused_whole(facts: port.Store) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await facts.append_ledger(EPOCH, [entry()] * (port.LEDGER_BATCH_ENTRIES_MAX + 1))
    assert caught.value.field == "entries"
    assert await causes(facts) == []


# Bounds.


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda facts: facts.get_budget("x" * 300), "name"),
        (lambda facts: facts.delete_budget(EPOCH, "a\nb"), "name"),
        (lambda facts: facts.list_ledger(page_size=1001), "page_size"),
        (lambda facts: facts.list_ledger(budget="a/b"), "budget"),
        (lambda facts: facts.list_ledger(holder="\0"), "holder"),
        (lambda facts: facts.list_ledger(before_id=2**63), "before_id"),
        (lambda facts: facts.list_audit(page_size=-1), "page_size"),
        (lambda facts: facts.list_audit(before_id=-1), "before_id"),
        (lambda facts: facts.append_ledger(EPOCH, [], batch=-1), "batch"),
        (lambda facts: facts.delete_ledger_before(EPOCH, -1.0), "age_seconds"),
        (lambda facts: facts.delete_requests_before(EPOCH, float("nan")), "age_seconds"),
    ],
)
async def test_an_argument_out_of_bounds_is_refused_by_name(
    facts: port.Store, call: Callable[[port.Store], Awaitable[object]], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await call(facts)
    assert caught.value.field == field


async def test_a_closed_store_says_so_and_may_be_closed_again(open_store: OpenStore) -> None:
    facts = await open_store()
    await facts.migrate()
    await facts.close()
    await facts.close()
    with pytest.raises(errors.PostgresUnavailable, match="closed"):
        await facts.ping()
    with pytest.raises(errors.PostgresUnavailable, match="closed"):
        await facts.put_budget(EPOCH, spec_of())
