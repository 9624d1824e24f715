"""Runs the demo from beginning to end: the stack, two fleets, four scenes, the table, the verdict."""

import argparse
import asyncio
import os
import pathlib
import sys
from collections.abc import Sequence

from leasehold.demo import board, children, entry, evidence, journal, plan, report, scenes, stack, view
from leasehold.sim import auditor, traces
from rich import console

SHIPPED_TRACE = pathlib.Path(__file__).parent / "data" / "conversation.csv"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.parser(
        "leasehold.demo", "Workers share a provider's limits through leases, beside a static split of them."
    )
    parser.add_argument(
        "--trace", type=pathlib.Path, default=SHIPPED_TRACE, help="CSV TIMESTAMP,ContextTokens,GeneratedTokens"
    )
    parser.add_argument("--seconds", type=float, default=165.0, help="length of the four scenes together")
    parser.add_argument("--window-seconds", type=float, default=20.0, help="the provider's window")
    parser.add_argument("--allocator", help="host:port of an allocator that runs; default: one of its own")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path(".leasehold") / "demo",
        help="servers' data, and the logs of the last run",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; see the exit codes in `--help`."""
    options = _options(arguments)
    return entry.run("the demo", lambda screen: _run(options, screen))


def _run(options: argparse.Namespace, screen: console.Console) -> int:
    wanted = plan.make(
        traces.read(options.trace), seconds=options.seconds, window_seconds=options.window_seconds
    )
    entry.say(screen, _told(wanted, options.trace))
    logs = options.folder / "logs"
    # A name of this run's own: what an earlier run left cooling under another name does not count here.
    budget = f"llm-api-{os.getpid()}"
    with (
        stack.allocator(
            options.allocator, options.folder / "stack", lambda line: entry.say(screen, line)
        ) as address,
        stack.budget(address, budget, wanted),
        # Once nobody else has the folder.
        children.Children(_emptied(logs)) as kids,
    ):
        leased, static = (
            scenes.Fleet(name, wanted, kids, logs, options.trace.absolute(), worker_arguments)
            for name, worker_arguments in (
                ("leased", scenes.leased_arguments(address, budget)),
                ("static", scenes.static_arguments(wanted)),
            )
        )
        state = board.Board(
            board.FleetBoard("leased", wanted.limits, leased.logs, plan.WORKERS),
            board.FleetBoard("static split", wanted.limits, static.logs, plan.WORKERS),
            wanted.script,
        )
        with view.on(screen) as shown:
            played = asyncio.run(scenes.play(wanted, leased, static, kids, state, shown))
    return _judge(screen, wanted, played, leased.logs, static.logs)


def _emptied(logs: pathlib.Path) -> pathlib.Path:
    """Without what an earlier run has left there."""
    logs.mkdir(parents=True, exist_ok=True)
    for path in logs.iterdir():
        if path.name.startswith(("leased-", "static-")) and path.suffix in (".jsonl", ".out"):
            path.unlink()
    return logs


def _judge(
    screen: console.Console,
    wanted: plan.Plan,
    played: scenes.Played,
    leased: board.Logs,
    static: board.Logs,
) -> int:
    events = {name: journal.read(leased.worker(name)) for name in plan.WORKERS}
    outcome = report.Outcome(
        wanted=wanted,
        played=played,
        leased=auditor.audit(leased.provider),
        static=auditor.audit(static.provider),
        story=evidence.Story(events, wanted, kill_ns=played.kill_ns, end_ns=played.end_ns),
    )
    screen.print(report.results(outcome))
    found = report.claims(outcome)
    for line in report.verdict_lines(found):
        entry.say(screen, line)
    entry.say(
        screen,
        f"logs: {leased.folder}; judge one again: {_python()} -m leasehold.sim.auditor {leased.provider}",
    )
    return entry.judged(found)


def _told(wanted: plan.Plan, trace: pathlib.Path) -> str:
    limits, speed = wanted.limits, wanted.speed
    minutes = 60 / limits.window_seconds
    return (
        f"limits: {limits.concurrency} concurrent; {limits.requests} requests and {limits.tokens:,} tokens "
        f"in any {limits.window_seconds:g} s\n"
        f"  (the usual minute is shortened to {limits.window_seconds:g} s, so that shares settle while you "
        f"watch; a minute's worth: {limits.requests * minutes:,.0f} RPM, {limits.tokens * minutes:,.0f} TPM)\n"
        f"trace: {trace}, {wanted.trace_rows:,} requests, replayed {wanted.replay_factor:.1f} times as fast by "
        f"each of {len(plan.WORKERS)} workers, over and over\n"
        f"model: {speed.first_token_seconds:g} s to the first token, {speed.seconds_per_token * 1000:.1f} ms a "
        f"token, no answer longer than {speed.answer_seconds_max:g} s\n"
        f"a worker is idle after {wanted.activity_timeout_seconds:g} s; {wanted.script.end_seconds:g} s in all"
    )


def _python() -> str:
    """This interpreter as a person would type it here."""
    interpreter = pathlib.Path(sys.executable)
    if interpreter.is_relative_to(pathlib.Path.cwd()):
        return str(interpreter.relative_to(pathlib.Path.cwd()))
    return str(interpreter)
