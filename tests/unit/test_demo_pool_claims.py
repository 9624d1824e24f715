"""The claims of the workers' scenes: each can be broken."""

import dataclasses
from typing import Any

import pytest
from leasehold.demo import pool_audit, pool_plan, pool_run, pool_scenes


def sound() -> pool_scenes.Seen:
    return pool_scenes.Seen(
        most_ample=pool_plan.WORKERS_AMPLE,
        fewest_tight=pool_plan.WORKERS_TIGHT,
        most_again=pool_plan.WORKERS_AMPLE,
        held_bytes_max=1,
        killed_worker="life-1",
        killed_task="task-0007",
        kill_told="EXIT_CAUSE_CRASHED: ended by SIGKILL",
        before_agent={"life-2": 20, "life-3": 30},
        after_agent={"life-2": 20, "life-3": 30},
        adopted=2,
    )


def verdict(**fields: Any) -> pool_audit.Verdict:
    values: dict[str, Any] = {
        "submitted": 9,
        "completed_once": 9,
        "lost": (),
        "completed_twice": (),
        "unknown": (),
        "interrupted_and_run_again": ("task-0007",),
        "forged": 0,
    }
    return pool_audit.Verdict(**{**values, **fields})


def broken(seen: pool_scenes.Seen, judged: pool_audit.Verdict) -> list[str]:
    return [claim.name for claim in pool_run.claims(seen, judged) if not claim.is_upheld]


def test_a_sound_run_breaks_no_claim() -> None:
    assert broken(sound(), verdict()) == []


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"most_ample": 5}, "grew to its optimum"),
        ({"fewest_tight": 4}, "shrank when memory got tight"),
        ({"fewest_tight": 2}, "shrank when memory got tight"),
        ({"most_again": 3}, "grew again"),
        ({"over_budget_bytes": 1}, "never held more"),
        ({"kill_told": ""}, "end is told"),
        ({"adopted": 1}, "outlived its agent"),
        ({"after_agent": {"life-2": 20, "life-3": 31}}, "outlived its agent"),
        ({"before_agent": {}}, "outlived its agent"),
    ],
)
def test_what_a_run_did_not_show_breaks_its_claim(fields: dict[str, Any], part: str) -> None:
    (name,) = broken(dataclasses.replace(sound(), **fields), verdict())

    assert part in name


@pytest.mark.parametrize(
    "fields",
    [
        {"completed_once": 8, "lost": ("task-0003",)},
        {"completed_once": 8, "completed_twice": ("task-0003",)},
        {"forged": 1},
        {"unknown": ("task-9999",)},
    ],
)
def test_a_ledger_that_does_not_add_up_breaks_the_first_claim(fields: dict[str, Any]) -> None:
    assert broken(sound(), verdict(**fields)) == [
        "every task was completed once, and no agent wrote into the ledger"
    ]


def test_a_task_that_a_shrink_interrupted_breaks_a_claim() -> None:
    judged = verdict(interrupted_and_run_again=("task-0007", "task-0008"))

    assert broken(sound(), judged) == ["no task but the killed worker's was interrupted"]
