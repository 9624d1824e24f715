"""The verdict on the pool's ledger: every way in which it can be bad is seen."""

from typing import Any

import pytest
from leasehold.demo import pool_audit


def _events(*told: str) -> list[dict[str, Any]]:
    return [{"event": event, "key": key, "pid": 7} for event, key in (each.split() for each in told)]


def test_every_task_completed_once_is_good() -> None:
    verdict = pool_audit.judge(
        _events("submitted a", "submitted b", "started a", "completed a", "started b", "completed b")
    )

    assert verdict.is_good
    assert (verdict.submitted, verdict.completed_once) == (2, 2)


def test_a_task_that_was_interrupted_and_run_again_is_good_and_told_apart() -> None:
    verdict = pool_audit.judge(_events("submitted a", "started a", "started a", "completed a"))

    assert verdict.is_good
    assert verdict.interrupted_and_run_again == ("a",)
    assert "interrupted and run again    1" in verdict.lines()


@pytest.mark.parametrize(
    ("told", "field"),
    [
        (("submitted a", "started a"), "lost"),
        (("submitted a", "started a", "completed a", "started a", "completed a"), "completed_twice"),
        (("started a", "completed a"), "unknown"),
    ],
)
def test_what_must_not_happen_is_bad(told: tuple[str, ...], field: str) -> None:
    verdict = pool_audit.judge(_events(*told))

    assert not verdict.is_good
    assert getattr(verdict, field) == ("a",)


def test_a_ledger_that_an_agent_wrote_in_is_not_to_be_trusted() -> None:
    events = _events("submitted a", "started a", "completed a")

    assert pool_audit.judge(events, forbidden_pids=[8]).is_good
    assert pool_audit.judge(events, forbidden_pids=[7]).forged == 3
    assert not pool_audit.judge(events, forbidden_pids=[7]).is_good


def test_an_empty_ledger_promises_nothing() -> None:
    assert pool_audit.judge([]).is_good
    assert pool_audit.judge([]).submitted == 0
