"""Dividing a host between its pools, and corners of the formulas: tables that a person can check by hand."""

import pytest
from leasehold.core.node import division, model, settings, sizing

GB = model.GIB


def claim(
    pool: str,
    *,
    priority: int = 0,
    limit: int = 4,
    least: int = 0,
    most: int = 8,
    backlog: int | None = None,
    is_manual: bool = False,
) -> division.Claim:
    return division.Claim(
        pool=pool,
        priority=priority,
        limit_bytes=limit * GB,
        min_workers=least,
        max_workers=most,
        backlog=backlog,
        is_manual=is_manual,
    )


@pytest.mark.parametrize(
    ("claims", "room_gb", "expected"),
    [
        # Alone a pool has what fits, whatever waits: idle memory helps nobody.
        ([claim("a", backlog=2)], 24, {"a": 6}),
        ([claim("a", backlog=0)], 24, {"a": 6}),
        # MINs first, by priority, memory or not.
        ([claim("a", least=2), claim("b", least=2, priority=5)], 4, {"a": 2, "b": 2}),
        # Then strict priority.
        ([claim("a", least=1), claim("b", least=1, priority=5)], 24, {"a": 1, "b": 5}),
        # What a high one has no work for goes on, and comes back where others have none.
        ([claim("a", backlog=9), claim("b", priority=5, backlog=2)], 24, {"a": 4, "b": 2}),
        ([claim("a", backlog=1), claim("b", priority=5, backlog=2)], 24, {"a": 1, "b": 5}),
        # Equals by backlog.
        ([claim("a", backlog=30), claim("b", backlog=10)], 32, {"a": 6, "b": 2}),
        # By backlog x cost in bytes: as many tasks of twice the cost have twice the memory.
        ([claim("a", limit=4, backlog=9), claim("b", limit=2, backlog=9)], 24, {"a": 4, "b": 4}),
        # Not known counts as an equal of the others, alone among unknown ones as well.
        ([claim("a", backlog=30), claim("b")], 32, {"a": 4, "b": 4}),
        ([claim("a"), claim("b")], 32, {"a": 4, "b": 4}),
        # What a person has ordered comes before what others could use, not before their MINs.
        (
            [claim("a", most=4, is_manual=True), claim("b", priority=5, least=1, backlog=50)],
            20,
            {"a": 4, "b": 1},
        ),
    ],
)
def test_a_division(claims: list[division.Claim], room_gb: int, expected: dict[str, int]) -> None:
    assert division.divide(claims, room_gb * GB).workers == expected


def test_the_pools_whose_min_is_not_covered_are_the_lowest_ones() -> None:
    divided = division.divide([claim("a", least=2), claim("b", least=2, priority=5)], 12 * GB)

    assert divided.overcommitted == {"a"}
    assert divided.left_bytes == -4 * GB


def test_the_order_of_the_pools_decides_nothing() -> None:
    claims = [claim("a", backlog=3), claim("b"), claim("c", priority=1), claim("d", limit=3, least=1)]

    assert division.divide(claims, 50 * GB) == division.divide(claims[::-1], 50 * GB)


def _optimal(
    formula: settings.Formula, available_gb: float, held_gb: float, *, state: model.WorkerState
) -> int:
    worker = model.WorkerMemory(name="w", state=state, held_bytes=round(held_gb * GB))
    return sizing.optimal(
        formula=formula,
        available_bytes=round(available_gb * GB),
        reserve_bytes=4 * GB,
        limit_bytes=4 * GB,
        threshold_bytes=32 * GB,
        min_workers=0,
        max_workers=16,
        workers=[worker],
    ).optimal


RUNNING, STOPPING, EXITED = model.WorkerState.RUNNING, model.WorkerState.STOPPING, model.WorkerState.EXITED
MANAGED, LITERAL = settings.Formula.MANAGED, settings.Formula.LITERAL


@pytest.mark.parametrize(
    ("formula", "available_gb", "held_gb", "state", "expected"),
    [
        (MANAGED, 28.0, 4.0, RUNNING, 7),  # free = 32: not below the threshold
        (MANAGED, 27.9, 4.0, RUNNING, 5),  # free = 31.9: 6 by memory, one less
        (LITERAL, 31.0, 4.0, RUNNING, 5),  # available is below it, though free is not
        (LITERAL, 32.0, 4.0, RUNNING, 7),
        (MANAGED, 33.0, 7.0, RUNNING, 8),  # 40 - 4 - 3 above its limit = 33
        (MANAGED, 30.0, 7.0, RUNNING, 7),  # 30: not 33, which would be 8
        (MANAGED, 33.0, 7.0, STOPPING, 7),  # 40 - 4 - 7 = 29
        (MANAGED, 33.0, 1.0, STOPPING, 6),  # 34 - 4 - 4 = 26: charged its limit until it is reaped
        (MANAGED, 40.0, 3.5, EXITED, 9),  # what it held is available already
    ],
)
def test_a_corner_of_the_formulas(
    formula: settings.Formula, available_gb: float, held_gb: float, state: model.WorkerState, expected: int
) -> None:
    assert _optimal(formula, available_gb, held_gb, state=state) == expected


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("dev", ("8", "4", "1", "30", "4")), ("r620", ("12", "8", "2", "20", "6"))],
)
def test_a_preset(preset: str, expected: tuple[str, ...]) -> None:
    names = (
        "MEMORY_THRESHOLD_GB",
        "MAX_WORKERS",
        "MIN_WORKERS",
        "MEMORY_CHECK_INTERVAL",
        "WORKER_MEMORY_LIMIT_GB",
    )

    assert dict(settings.PRESETS[preset]) == dict(zip(names, expected, strict=True))
