"""The demo's processes: they end with their parent, keep to their part, and play the scenes to the end."""

import asyncio
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from leasehold.core import errors
from leasehold.demo import board, children, journal, plan, scenes, service_time, static_split, view, windows
from leasehold.sim import auditor
from rich import console

DEADLINE_SECONDS = 20.0
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(600)"
)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_seconds = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline_seconds, f"waited in vain until {what}"
        time.sleep(0.02)


def has_event(path: pathlib.Path, kind: str) -> bool:
    return any(event["event"] == kind for event in journal.read(path))


@pytest.fixture
def kids(tmp_path: pathlib.Path) -> Iterator[children.Children]:
    with children.Children(tmp_path) as kids:
        yield kids


def test_child_that_ignores_sigterm_is_killed_at_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "STOP_SECONDS", 0.2)
    with children.Children(tmp_path) as kids:
        process = kids.start("stubborn", [sys.executable, "-c", STUBBORN])
        until(lambda: kids.output_path("stubborn").read_text() == "up\n", "it ignores SIGTERM")

    assert process.returncode == -signal.SIGKILL


def test_child_that_ends_by_itself_is_told_with_its_output(kids: children.Children) -> None:
    process = kids.start("brief", [sys.executable, "-c", "import sys; sys.exit('no such luck')"])
    process.wait(DEADLINE_SECONDS)

    with pytest.raises(errors.Unavailable, match="brief ended by itself with code 1: no such luck"):
        kids.check_running()


def test_killed_child_is_not_missed(kids: children.Children) -> None:
    process = kids.start("victim", [sys.executable, "-c", STUBBORN])

    before_ns = time.monotonic_ns()
    kill_ns = kids.kill("victim")

    assert before_ns <= kill_ns <= time.monotonic_ns()
    assert process.returncode == -signal.SIGKILL
    kids.check_running()


def test_children_end_when_their_parent_is_killed(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "provider.jsonl"
    code = (
        "import pathlib, time; from leasehold.demo import children\n"
        f"kids = children.Children(pathlib.Path({str(tmp_path)!r}))\n"
        f"kid = kids.start_module('provider', 'leasehold.demo.provider', ['--log', {str(log)!r}])\n"
        "print(kid.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    try:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        until(lambda: has_event(log, "start"), "the provider serves")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()

    try:
        is_over, _, _ = select.select([pidfd], [], [], DEADLINE_SECONDS)
    finally:
        os.close(pidfd)
    assert is_over
    assert has_event(log, "stop")


async def test_static_split_admits_in_order_and_never_above_its_part() -> None:
    split = static_split.StaticSplit(windows.Limits(requests=2, tokens=100, concurrency=2, window_seconds=0.3))
    admitted: list[tuple[int, float]] = []

    async def one(number: int) -> None:
        async with split.acquire(tokens=40) as permit:
            admitted.append((number, time.monotonic()))
            permit.settle(tokens=10)

    await asyncio.gather(*(one(number) for number in range(6)))

    assert [number for number, _ in admitted] == list(range(6))
    instants = [instant for _, instant in admitted]
    assert all(later - earlier >= 0.3 for earlier, later in zip(instants, instants[2:], strict=False))


async def test_static_split_wakes_a_waiter_when_a_slot_is_freed_and_keeps_its_deadline() -> None:
    split = static_split.StaticSplit(
        windows.Limits(requests=9, tokens=900, concurrency=1, window_seconds=600.0)
    )
    async with split.acquire(tokens=100):
        with pytest.raises(errors.DeadlineExceeded):
            async with split.acquire(tokens=100, timeout_seconds=0.05):
                pass
        waiting = asyncio.create_task(split.acquire(tokens=100).__aenter__())
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, DEADLINE_SECONDS)

    with pytest.raises(errors.ResourceExhausted):
        async with split.acquire(tokens=901):
            pass
    with pytest.raises(errors.InvalidArgument):
        async with split.acquire(requests=2, tokens=1):
            pass


def start_provider(kids: children.Children, log: pathlib.Path, *arguments: str) -> str:
    kids.start_module("provider", "leasehold.demo.provider", ["--log", str(log), *arguments])
    until(lambda: has_event(log, "start"), "the provider serves")
    return f"{journal.read(log)[0]['address']}/v1"


def worker_arguments(log: pathlib.Path, provider: str, trace: pathlib.Path) -> list[str]:
    return [
        *("--mode", "static", "--worker-id", "w1", "--log", str(log)),
        *("--provider", provider, "--trace", str(trace), "--replay-factor", "1000"),
    ]


def test_worker_replays_its_part_over_and_over_within_its_limits(
    kids: children.Children, tmp_path: pathlib.Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-01-01 00:00:00,100,3\n2024-01-01 00:00:01,7,7\n2024-01-01 00:00:02,200,4\n"
    )
    provider_log, worker_log = tmp_path / "provider.jsonl", tmp_path / "worker.jsonl"
    limits = ["--requests", "40", "--tokens", "9000", "--concurrency", "5", "--window-seconds"]
    provider = start_provider(kids, provider_log, *limits, "0.5", "--first-token-seconds", "0.01")
    arguments = worker_arguments(worker_log, provider, trace)
    arguments += [*limits, "0.6", "--part", "0", "--parts", "2"]

    kids.start_module("worker", "leasehold.demo.worker", arguments)
    until(lambda: sum(event["event"] == "done" for event in journal.read(worker_log)) >= 100, "100 are done")
    kids.stop(["worker"])
    kids.stop(["provider"])

    verdict = auditor.audit(provider_log)
    assert verdict.broken == ()
    assert verdict.workers["w1"].requests_done >= 100
    assert 20 < verdict.peaks["requests"].highest <= 40
    events = journal.read(worker_log)
    assert [event["event"] for event in (events[0], events[1], events[-1])] == ["join", "connected", "leave"]
    tokens = {event["request"]: event["tokens"] for event in events if event["event"] == "admitted"}
    assert [tokens[number] for number in (1, 2, 3, 4)] == [164, 264, 164, 264]
    settled = {event["request"]: event["tokens"] for event in events if event["event"] == "done"}
    assert (settled[1], settled[2]) == (103, 204)


def test_worker_tells_429s_and_refusals_and_goes_on(kids: children.Children, tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-01-01 00:00:00,1000000,3\n2024-01-01 00:00:01,7,7\n2024-01-01 00:00:02,7,7\n"
    )
    worker_log = tmp_path / "worker.jsonl"
    provider = start_provider(kids, tmp_path / "provider.jsonl", "--requests", "1")

    kids.start_module("worker", "leasehold.demo.worker", worker_arguments(worker_log, provider, trace))
    until(lambda: has_event(worker_log, "throttled"), "a 429 is told")

    failed = next(event for event in journal.read(worker_log) if event["event"] == "failed")
    assert failed["request"] == 1
    assert failed["error"].startswith("RESOURCE_EXHAUSTED: 1000064 tokens are more than")
    kids.check_running()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nonsense\n", "line 1: the header is"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
    ],
)
def test_worker_with_a_wrong_trace_ends_with_one_line(
    kids: children.Children, tmp_path: pathlib.Path, text: str, told: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)

    process = kids.start_module(
        "worker", "leasehold.demo.worker", worker_arguments(tmp_path / "log", "http://127.0.0.1:9/v1", trace)
    )

    assert process.wait(DEADLINE_SECONDS) == 1
    output = kids.output_path("worker").read_text()
    assert told in output
    assert len(output.splitlines()) == 1


def test_scenes_are_played_by_two_fleets_and_nothing_is_left(tmp_path: pathlib.Path) -> None:
    wanted = plan.Plan(
        limits=windows.Limits(requests=400, tokens=400_000, concurrency=40, window_seconds=1.0),
        speed=service_time.ServiceTime(first_token_seconds=0.01, seconds_per_token=0.0005),
        script=plan.script(12.0),
        replay_factor=20.0,
        trace_rows=600,
        arrival_jitter_seconds=1.0,
    )
    trace = pathlib.Path(plan.__file__).parent / "data" / "conversation.csv"
    with children.Children(tmp_path) as kids:
        first, second = (
            scenes.Fleet(name, wanted, kids, tmp_path, trace, scenes.static_arguments(wanted))
            for name in ("leased", "static")
        )
        state = board.Board(
            board.FleetBoard("leased", wanted.limits, first.logs, plan.WORKERS),
            board.FleetBoard("static split", wanted.limits, second.logs, plan.WORKERS),
            wanted.script,
        )
        with (tmp_path / "shown").open("w") as output:
            shown = view.LineView(console.Console(file=output, width=100))
            played = asyncio.run(scenes.play(wanted, first, second, kids, state, shown))
        kids.check_running()

    for fleet in (first, second):
        verdict = auditor.audit(fleet.logs.provider)
        assert verdict.broken == ()
        assert sorted(verdict.workers) == list(plan.WORKERS)
        for name in plan.WORKERS:
            is_killed = name == plan.KILLED_WORKER
            assert has_event(fleet.logs.worker(name), "leave") is not is_killed
    # An answer that was sent may not have been read when its worker ended.
    answered = auditor.audit(first.logs.provider).requests_done
    assert answered - wanted.limits.concurrency <= state.leased.done <= answered
    idle_events = [event["event"] for event in journal.read(first.logs.worker(plan.IDLE_WORKER))]
    assert idle_events.index("idle") < idle_events.index("resume")
    last_ns = journal.read(first.logs.worker(plan.KILLED_WORKER))[-1]["mono_ns"]
    assert played.begin_ns < last_ns < played.kill_ns + 10_000_000 < played.end_ns
    shown_text = (tmp_path / "shown").read_text()
    assert all(f"--- {name} ---" in shown_text for name in plan.SceneName)
