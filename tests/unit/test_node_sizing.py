"""The formulas of sizing, as tables and as properties; and `leasehold node plan`, which shows them."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.cli import main
from leasehold.core import errors
from leasehold.core.node import division, model, plan, settings, sizing

GB = model.GIB
MANAGED, LITERAL = settings.Formula.MANAGED, settings.Formula.LITERAL
RUNNING, STOPPING = model.WorkerState.RUNNING, model.WorkerState.STOPPING


def worker(held_gb: float, state: model.WorkerState = RUNNING) -> model.WorkerMemory:
    return model.WorkerMemory(name="w", state=state, held_bytes=round(held_gb * GB))


def optimal(formula: settings.Formula, available_gb: float, *workers: model.WorkerMemory) -> sizing.Sizing:
    """Of an R620's pool: reserve 4, limit 6, threshold 12, 2 to 8 workers."""
    return sizing.optimal(
        formula=formula,
        available_bytes=round(available_gb * GB),
        reserve_bytes=4 * GB,
        limit_bytes=6 * GB,
        threshold_bytes=12 * GB,
        min_workers=2,
        max_workers=8,
        workers=workers,
    )


@pytest.mark.parametrize(
    ("available_gb", "workers", "managed", "literal"),
    [
        (60.0, [], 8, 8),  # 9 by memory, MAX 8
        (52.0, [], 8, 8),
        (51.9, [], 7, 7),
        (16.0, [], 2, 2),
        (11.9, [], 2, 2),  # below the threshold, but MIN
        (0.0, [], 2, 2),
        (32.1, [worker(3.5)], 5, 4),
        (32.1, [worker(0.064)], 4, 4),  # an idle one is charged its whole limit
        (26.6, [worker(7.0)], 4, 3),  # one above its limit is charged what it holds
        (20.0, [worker(5.0), worker(5.0)], 4, 2),
        (20.0, [worker(5.0), worker(5.0, STOPPING)], 3, 2),  # charged until it is reaped
        (11.0, [worker(6.0), worker(6.0), worker(6.0)], 4, 2),
    ],
)
def test_the_table(available_gb: float, workers: list[model.WorkerMemory], managed: int, literal: int) -> None:
    assert optimal(MANAGED, available_gb, *workers).optimal == managed
    assert optimal(LITERAL, available_gb, *workers).optimal == literal


def test_below_the_threshold_there_is_one_less_with_its_reason() -> None:
    found = sizing.optimal(
        formula=MANAGED,
        available_bytes=20 * GB,
        reserve_bytes=4 * GB,
        limit_bytes=4 * GB,
        threshold_bytes=24 * GB,
        min_workers=1,
        max_workers=8,
        workers=[],
    )

    assert found.optimal == 3
    assert found.reasons[-1] == "one less: free 20.0 GB is below the threshold of 24.0 GB"


def test_a_least_that_memory_does_not_allow_is_told() -> None:
    found = optimal(MANAGED, 9.0)

    assert (found.optimal, found.is_overcommitted) == (2, True)
    assert found.reasons[-1] == "overcommitted: memory allows 0, MIN is 2"


amounts_of_memory = st.integers(0, 128 * GB)
limits = st.integers(GB // 64, 16 * GB)
bounds = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted)
workers_lists = st.lists(
    st.builds(
        model.WorkerMemory,
        name=st.just("w"),
        state=st.sampled_from(sorted(model.ALIVE_STATES)),
        held_bytes=st.integers(0, 20 * GB),
    ),
    max_size=12,
)


@given(amounts_of_memory, amounts_of_memory, limits, amounts_of_memory, bounds)
def test_the_formulas_agree_while_no_worker_runs(
    available: int, reserve: int, limit: int, threshold: int, least_most: list[int]
) -> None:
    both = {
        sizing.optimal(
            formula=formula,
            available_bytes=available,
            reserve_bytes=reserve,
            limit_bytes=limit,
            threshold_bytes=threshold,
            min_workers=least_most[0],
            max_workers=least_most[1],
            workers=[],
        ).optimal
        for formula in settings.Formula
    }

    assert len(both) == 1


@given(
    st.sampled_from(sorted(settings.Formula)),
    amounts_of_memory,
    amounts_of_memory,
    limits,
    amounts_of_memory,
    bounds,
    workers_lists,
)
def test_the_optimum_is_within_bounds_and_memory_and_more_memory_gives_no_less(
    formula: settings.Formula,
    available: int,
    more: int,
    limit: int,
    threshold: int,
    least_most: list[int],
    workers: list[model.WorkerMemory],
) -> None:
    least, most = least_most
    found, with_more = (
        sizing.optimal(
            formula=formula,
            available_bytes=amount,
            reserve_bytes=4 * GB,
            limit_bytes=limit,
            threshold_bytes=threshold,
            min_workers=least,
            max_workers=most,
            workers=workers,
        )
        for amount in (available, available + more)
    )

    assert least <= found.optimal <= with_more.optimal <= most
    if formula is MANAGED and found.optimal > least:
        numbers = found.numbers
        room = numbers["free_bytes"] - numbers["reserve_bytes"]
        assert found.optimal * limit <= room - numbers["leaving_bytes"] - numbers["excess_bytes"]


claims = st.lists(
    st.builds(
        lambda priority, limit, both, backlog: (priority, limit, both, backlog),
        st.integers(0, 2),
        limits,
        bounds,
        st.none() | st.integers(0, 50),
    ),
    min_size=1,
    max_size=5,
).map(
    lambda found: [
        division.Claim(
            pool=f"p{number}",
            priority=priority,
            limit_bytes=limit,
            min_workers=both[0],
            max_workers=both[1],
            backlog=backlog,
        )
        for number, (priority, limit, both, backlog) in enumerate(found)
    ]
)


@given(claims, st.integers(-8 * GB, 128 * GB))
def test_a_division_never_gives_more_than_there_is_above_the_least(
    found: list[division.Claim], room: int
) -> None:
    divided = division.divide(found, room)

    given_bytes = sum(divided.workers[each.pool] * each.limit_bytes for each in found)
    least_bytes = sum(each.min_workers * each.limit_bytes for each in found)
    assert given_bytes <= max(room, least_bytes)
    assert divided.left_bytes == room - given_bytes
    for each in found:
        assert each.min_workers <= divided.workers[each.pool] <= each.max_workers
        # Nothing that anyone could use lies idle.
        assert divided.workers[each.pool] == each.max_workers or each.limit_bytes > divided.left_bytes


@given(claims, st.integers(-8 * GB, 128 * GB))
def test_a_lower_priority_takes_nothing_that_a_higher_could_use(found: list[division.Claim], room: int) -> None:
    """Above its MIN, a pool is given nothing before each higher one has what its backlog can use."""
    divided = division.divide(found, room)

    for high in found:
        useful = high.max_workers if high.backlog is None else min(high.max_workers, high.backlog)
        if divided.workers[high.pool] >= useful:
            continue
        for low in found:
            if low.priority < high.priority and low.limit_bytes >= high.limit_bytes:
                assert divided.workers[low.pool] == low.min_workers


R620 = {
    "formula": "managed",
    "available_gb": 32.1,
    "reserve_gb": 4,
    "worker_limit_gb": 6,
    "threshold_gb": 12,
    "min": 2,
    "max": 8,
    "workers": [{"held_gb": 3.5, "state": "running"}],
}


def test_a_plan_is_answered_without_a_host(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(R620))

    code = main.run(["node", "plan", "--file", str(file)])

    answer = json.loads(capsys.readouterr().out)
    assert (code, answer["optimal"]) == (0, 5)
    assert "free 35.6 GB (available 32.1 GB + held 3.5 GB)" in answer["reasons"][0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"available_gb": "32"}, "available_gb"),
        ({"available_gb": -1}, "available_gb"),
        ({"available_gb": float("nan")}, "available_gb"),
        ({"available_gb": True}, "available_gb"),
        ({"min": 9}, "min"),
        ({"min": 1.5}, "min"),
        ({"max": 10**400}, "max"),
        ({"worker_limit_gb": 0}, "worker_limit_gb"),
        ({"formula": "manged"}, "formula"),
        ({"treshold_gb": 1}, "treshold_gb"),
        ({"workers": 3}, "workers"),
        ({"workers": [{"held_gb": -1}]}, "workers[0].held_gb"),
        ({"workers": [{"state": "gone"}]}, "workers[0].state"),
        ({"workers": [{"hold_gb": 1}]}, "workers[0].hold_gb"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_by_its_field(change: Mapping[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        plan.run({**R620, **change})

    assert refused.value.field == field
    assert field in refused.value.message


def test_settings_have_the_defaults_of_the_first_users() -> None:
    parsed = settings.parse({})
    spec = settings.pool_spec(name="p", template="celery", defaults=parsed)

    assert (spec.min_workers, spec.max_workers) == (1, 6)
    assert (spec.worker_limit_bytes, spec.threshold_bytes) == (4 * GB, 8 * GB)
    assert (parsed.host.reserve_bytes, parsed.host.check_interval_seconds) == (4 * GB, 30.0)


def test_a_preset_and_a_pools_own_settings_are_taken() -> None:
    parsed = settings.parse(settings.PRESETS["r620"])
    spec = settings.pool_spec(name="p", template="celery", defaults=parsed, own={"MAX_WORKERS": "3"})

    assert (spec.min_workers, spec.max_workers) == (2, 3)
    assert (spec.worker_limit_bytes, spec.threshold_bytes) == (6 * GB, 12 * GB)


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"MIN_WORKERS": "7"}, "MIN_WORKERS", "above MAX_WORKERS, which is 6"),
        ({"MAX_WORKERS": "-1"}, "MAX_WORKERS", "not in 0 to 1000"),
        ({"MAX_WORKERS": "2.5"}, "MAX_WORKERS", "not a whole number"),
        ({"WORKER_MEMORY_LIMIT_GB": "0"}, "WORKER_MEMORY_LIMIT_GB", "above 0"),
        ({"MEMORY_THRESHOLD_GB": "nan"}, "MEMORY_THRESHOLD_GB", "not in"),
        ({"MEMORY_THRESHOLD_GB": "lots"}, "MEMORY_THRESHOLD_GB", "'lots' is not a number"),
        ({"MEMORY_CHECK_INTERVAL": "0"}, "MEMORY_CHECK_INTERVAL", "not in 0.1 to 86400"),
        ({"ENABLE_AUTO_SCALING": "maybe"}, "ENABLE_AUTO_SCALING", "neither true nor false"),
        ({"SIZING_FORMULA": "magic"}, "SIZING_FORMULA", "none of managed, literal"),
        ({"MAX_WORKER": "4"}, "MAX_WORKER", "MAX_WORKERS was probably meant"),
        ({"COLOUR": "red"}, "COLOUR", "no such setting"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(values: dict[str, str], field: str, part: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        settings.parse(values)

    assert refused.value.field == field
    assert part in refused.value.message


def test_other_names_of_a_shared_file_are_no_near_misses() -> None:
    settings.check_near_misses(("DATABASE_URL", "MAX_CONNECTIONS", "WORKER_COUNT", "MEMORY"), where=".env")
