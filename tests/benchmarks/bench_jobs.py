"""Jobs: what their ledger bears."""

import sys

import bench_jobs_flush
import harness


def run() -> list[harness.Result]:
    """All figures of jobs."""
    return bench_jobs_flush.run()


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
