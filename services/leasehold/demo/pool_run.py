"""The workers' scenes: a real Celery pool on a real broker, sized by memory, that no crash loses.

``python -m leasehold.demo.pool_run``; `make run-workers` calls it.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from leasehold.core.node import model
from leasehold.demo import entry, pool_audit, pool_plan, pool_scenes, pool_stack, pool_view, report
from leasehold.sim import auditor
from rich import console


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.parser(
        "leasehold.demo.pool_run",
        "A Celery pool that grows and shrinks with memory, and that no SIGKILL loses.",
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path(".leasehold") / "workers",
        help="servers' data, the ledger and the logs of the last run",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenes; see the exit codes in `--help`."""
    options = _options(arguments)
    return entry.run("the scenes", lambda screen: _run(options.folder, screen))


def _run(folder: pathlib.Path, screen: console.Console) -> int:
    pool_stack.check_installed()
    script = pool_plan.Script()
    entry.say(screen, _told(script))
    with pool_stack.host(folder, lambda line: entry.say(screen, line)) as host:
        with pool_view.on(screen) as shown:
            player = pool_scenes.Player(host, script, shown.say, shown.draw)
            seen = player.play()
        verdict = player.judge()
        agents = " ".join(f"--agent-pid {pid}" for pid in host.agent_pids)
    found = claims(seen, verdict)
    for line in verdict.lines():
        entry.say(screen, line)
    for line in report.verdict_lines(found):
        entry.say(screen, line)
    command = f"{sys.executable} -m leasehold.demo.pool_ledger audit {host.ledger_file} {agents}"
    entry.say(screen, f"judge the ledger again: {command}")
    return entry.judged(found)


def claims(seen: pool_scenes.Seen, verdict: pool_audit.Verdict) -> list[auditor.Claim]:
    """Every claim about a run."""
    kept = [life for life, pid in seen.before_agent.items() if seen.after_agent.get(life) == pid]
    interrupted = [task for task in verdict.interrupted_and_run_again if task != seen.killed_task]
    return [
        auditor.Claim(
            "every task was completed once, and no agent wrote into the ledger",
            verdict.is_good,
            f"{verdict.submitted} submitted = {verdict.completed_once} completed once, "
            f"lost {len(verdict.lost)}, completed twice {len(verdict.completed_twice)}",
        ),
        auditor.Claim(
            "the pool grew to its optimum",
            seen.most_ample == pool_plan.WORKERS_AMPLE,
            f"{seen.most_ample} of {pool_plan.WORKERS_AMPLE} workers",
        ),
        auditor.Claim(
            "it shrank when memory got tight",
            seen.fewest_tight == pool_plan.WORKERS_TIGHT,
            f"to {seen.fewest_tight}; memory allowed {pool_plan.WORKERS_TIGHT}",
        ),
        auditor.Claim(
            "it grew again with the memory",
            seen.most_again == pool_plan.WORKERS_AMPLE,
            f"{seen.most_again} of {pool_plan.WORKERS_AMPLE} workers",
        ),
        auditor.Claim(
            "no task but the killed worker's was interrupted",
            not interrupted,
            f"interrupted: {', '.join(interrupted) or 'none'}; the killed worker's: {seen.killed_task}",
        ),
        auditor.Claim(
            "workers never held more than the budget",
            seen.over_budget_bytes <= 0,
            f"at most {seen.held_bytes_max / model.MIB:.0f} of {pool_plan.AMPLE_MB} MB",
        ),
        auditor.Claim(
            "the killed worker's end is told", "SIGKILL" in seen.kill_told, seen.kill_told or "it was not told"
        ),
        auditor.Claim(
            "every worker outlived its agent, and the next one adopted it",
            bool(seen.before_agent) and len(kept) == len(seen.before_agent) and seen.adopted >= len(kept),
            f"{len(kept)} of {len(seen.before_agent)} with their PIDs, {seen.adopted} adopted",
        ),
    ]


def _told(script: pool_plan.Script) -> str:
    return (
        f"a pool of Celery workers with a limit of {pool_plan.WORKER_LIMIT_MB} MB each, an agent that may use "
        f"{pool_plan.AMPLE_MB} MB of this host,\n"
        f"and tasks that take {pool_plan.TASK_MB} MB for {script.task_seconds_min:g} to "
        f"{script.task_seconds_max:g} s; {script.tasks_per_second:g} a second for {script.feed_until:g} s"
    )


if __name__ == "__main__":
    sys.exit(main())
