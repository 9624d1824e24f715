"""The verdict on a run of jobs: every way in which it can be bad is seen."""

from collections.abc import Sequence

import pytest
from leasehold.demo import job_audit, job_plan
from leasehold.demo.job_audit import AllocationRow, TotalRow

TOTALS = (TotalRow("n", 1, 4, 100),)


def _judge(
    *journal: str,
    states: str = "COMPLETED",
    rows: Sequence[AllocationRow] = (AllocationRow("1", 1, "n", 2, 50, 2, 3),),
    totals: Sequence[TotalRow] = TOTALS,
) -> job_audit.Verdict:
    return job_audit.judge(states={"1": states}, keys={"1": "a"}, journal=journal, rows=rows, totals=totals)


def test_a_job_that_was_executed_once_within_the_totals_is_good() -> None:
    verdict = _judge("start a 7", "end a 7")

    assert verdict.is_good
    assert verdict.peaks["n"] == job_audit.Peak(2, 50, 2, 50)
    assert verdict.lines()[0] == "jobs submitted               1 = 1 completed + 0 failed + 0 cancelled"


def test_a_job_that_was_interrupted_and_run_again_is_told_apart() -> None:
    verdict = _judge("start a 7", "start b 9", "end b 9")

    assert verdict.unknown == ("b",)
    assert _judge("start a 7", "start a 8", "end a 8").interrupted_and_run_again == ("a",)


@pytest.mark.parametrize(
    ("journal", "state", "field"),
    [
        (("start a 7", "end a 7"), "RUNNING", "lost"),
        (("start a 7", "end a 7"), "PENDING", "lost"),
        (("start a 7",), "COMPLETED", "unproven"),
        ((), "COMPLETED", "unproven"),
        (("start a 7", "end a 7", "start a 8", "end a 8"), "COMPLETED", "completed_twice"),
        (("start a 7", "start a 8", "end a 7"), "COMPLETED", "overlapped"),
        (("start a 7", "end a 7", "start b 8"), "COMPLETED", "unknown"),
    ],
)
def test_what_must_not_happen_is_bad(journal: tuple[str, ...], state: str, field: str) -> None:
    verdict = _judge(*journal, states=state)

    assert not verdict.is_good
    assert getattr(verdict, field)


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ((AllocationRow("1", 1, "n", 3, 1, 2, 4), AllocationRow("1", 2, "n", 2, 1, 3, 4)), "over"),
        ((AllocationRow("1", 1, "n", 1, 101, 2, 4),), "over"),
        ((AllocationRow("1", 1, "other", 1, 1, 2, 4),), "over"),
        ((AllocationRow("1", 1, "n", 1, 1, 2, 0),), "leaked"),
    ],
)
def test_a_bad_ledger_is_seen(rows: tuple[AllocationRow, ...], field: str) -> None:
    verdict = _judge("start a 7", "end a 7", rows=rows)

    assert not verdict.is_good
    assert getattr(verdict, field)


def test_what_is_released_in_the_flush_that_gives_it_out_again_is_not_over() -> None:
    rows = (AllocationRow("1", 1, "n", 4, 1, 2, 3), AllocationRow("1", 2, "n", 4, 1, 3, 5))

    assert _judge("start a 7", "end a 7", rows=rows).over == ()


def test_a_total_that_shrinks_counts_from_its_own_number_on() -> None:
    rows = (AllocationRow("1", 1, "n", 4, 1, 2, 9), AllocationRow("1", 2, "n", 4, 1, 10, 12))
    shrunk = (*TOTALS, TotalRow("n", 9, 3, 100))

    assert _judge("start a 7", "end a 7", rows=rows, totals=shrunk).over == ("n",)
    assert _judge("start a 7", "end a 7", rows=rows[:1], totals=shrunk).over == ()


def test_the_script_is_the_same_in_each_run_and_fits_its_hosts() -> None:
    wanted = job_plan.jobs(job_plan.Script())

    assert wanted == job_plan.jobs(job_plan.Script())
    assert len({job.key for job in wanted}) == 2000
    assert max(job.cpus for job in wanted) <= job_plan.NODE_CPUS
    assert max(job.memory_bytes for job in wanted) <= job_plan.NODE_MEMORY_GB * job_plan.GIB
    assert {job.exit_code for job in wanted} == {0, 1}
