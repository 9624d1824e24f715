"""The jobs' scene: short jobs on four hosts, a leader and an agent killed in the midst, judged from outside.

``python -m leasehold.demo.job_run``; `make run-jobs` calls it.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from leasehold.demo import entry, job_audit, job_plan, job_scenes, job_stack, report
from leasehold.sim import auditor
from rich import console

LINE_EVERY_SECONDS = 3.0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.parser(
        "leasehold.demo.job_run", "Short jobs on four hosts; the leader and an agent are killed in the midst."
    )
    parser.add_argument("--jobs", type=int, default=job_plan.Script().jobs, help="how many jobs")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path(".leasehold") / "jobs",
        help=f"where `{job_stack.RUN}` has servers' data, journal and logs; emptied by the next run",
    )
    options = parser.parse_args(arguments)
    if not 100 <= options.jobs <= 20_000:
        parser.error("--jobs: 100 to 20000")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scene; see the exit codes in `--help`."""
    options = _options(arguments)
    script = job_plan.Script(jobs=options.jobs)
    return entry.run("the scene", lambda screen: _run(options.folder, script, screen))


def _run(folder: pathlib.Path, script: job_plan.Script, screen: console.Console) -> int:
    lines = _Lines(screen, script.jobs)
    lines.plain(
        f"{script.jobs} jobs of 1 to 4 CPUs on {len(job_plan.NODES)} hosts of {job_plan.NODE_CPUS} CPUs "
        f"and {job_plan.NODE_MEMORY_GB} GB each;\n"
        "the leader and an agent are killed with SIGKILL in the midst"
    )
    with job_stack.hosts(folder, lines.plain) as hosts:
        player = job_scenes.Player(hosts, script, lines.say, lines.draw)
        seen = player.play()
        verdict = player.judge()
    found = claims(script, seen, verdict)
    for line in (*verdict.lines(), *report.verdict_lines(found)):
        lines.plain(line)
    lines.plain(f"it took {seen.ended_seconds:.0f} s; logs, journal and data are in {folder / job_stack.RUN}")
    return entry.judged(found)


def claims(script: job_plan.Script, seen: job_scenes.Seen, verdict: job_audit.Verdict) -> list[auditor.Claim]:
    """Every claim about a run."""
    failing = sum(job.exit_code != 0 for job in job_plan.jobs(script))
    failed = verdict.states.get("FAILED", 0)
    most = ", ".join(f"{node} {peak.cpus}" for node, peak in sorted(verdict.peaks.items()))
    return [
        auditor.Claim(
            "every job reached exactly one end",
            verdict.submitted == script.jobs and not (verdict.lost or verdict.unproven or verdict.unknown),
            f"{verdict.submitted} submitted, {len(verdict.lost)} lost",
        ),
        auditor.Claim(
            "none was completed twice",
            not verdict.completed_twice,
            f"{len(verdict.completed_twice)}",
        ),
        auditor.Claim(
            "executions of one job never overlapped", not verdict.overlapped, f"{len(verdict.overlapped)}"
        ),
        auditor.Claim(
            "those that exit with an error failed, and no others",
            failed == failing,
            f"{failed} failed, {failing} exit with an error",
        ),
        auditor.Claim(
            "no node was over its total at any sequence number",
            not verdict.over and len(verdict.peaks) == len(job_plan.NODES),
            f"most CPUs allocated: {most}; of {job_plan.NODE_CPUS}",
        ),
        auditor.Claim("no allocation is left", not verdict.leaked, f"{len(verdict.leaked)} live"),
        auditor.Claim(
            "the leader and an agent were killed in the midst",
            0 < seen.ended_at_leader_kill < seen.ended_at_agent_kill < script.jobs,
            f"after {seen.ended_at_leader_kill} and {seen.ended_at_agent_kill} of {script.jobs} jobs",
        ),
    ]


class _Lines:
    """A line for each event, and one on the state now and then."""

    def __init__(self, screen: console.Console, jobs: int) -> None:
        self._screen = screen
        self._jobs = jobs
        self._next_seconds = 0.0

    def plain(self, line: str) -> None:
        entry.say(self._screen, line)

    def say(self, seconds: float, line: str) -> None:
        self.plain(f"{seconds:6.1f} s  {line}")

    def draw(self, seconds: float, counts: dict[str, int]) -> None:
        if seconds >= self._next_seconds:
            self._next_seconds = seconds + LINE_EVERY_SECONDS
            ended = sum(counts.get(state, 0) for state in job_audit.TERMINAL)
            self.say(
                seconds,
                f"pending {counts.get('PENDING', 0)}, running {counts.get('RUNNING', 0)}, "
                f"ended {ended} of {self._jobs}",
            )


if __name__ == "__main__":
    sys.exit(main())
