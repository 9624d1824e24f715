"""The machine of jobs in a world where anything comes in any order: shrunk to the least, and long walks."""

import job_walks
import pytest
from hypothesis import settings

SEEDS = [*range(60), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(60, 2_000))]


@pytest.mark.parametrize("seed", SEEDS)
def test_long_walks_end_well(seed: int) -> None:
    """Longer than what is shrunk well; `pytest -k 'walks and SEED'` replays one."""
    job_walks.walk(seed)


job_walks.Jobs.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestJobs = job_walks.Jobs.TestCase
