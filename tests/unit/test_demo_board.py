"""The board and its views, from logs that grow."""

import io
import json
import pathlib
from typing import Any

import pytest
from leasehold.demo import board, journal, plan, view, windows
from rich import console

SECOND = windows.NANOS_PER_SECOND
LIMITS = windows.Limits(requests=100, tokens=1000, concurrency=40, window_seconds=20.0)


def append(path: pathlib.Path, *events: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def allocation(
    concurrency: float, active: int, *, requests: float = 25.0, tokens: float = 250.0
) -> dict[str, Any]:
    amounts = {"max_concurrent_requests": concurrency, "rpm_limit": requests, "tpm_limit": tokens}
    return {
        "mono_ns": 1,
        "event": "allocation",
        "amounts": amounts,
        "total_workers": 4,
        "active_workers": active,
        "reason": "",
    }


@pytest.fixture
def logs(tmp_path: pathlib.Path) -> board.Logs:
    return board.Logs(tmp_path, "leased")


@pytest.fixture
def fleet(logs: board.Logs) -> board.FleetBoard:
    return board.FleetBoard("leased", LIMITS, logs, plan.WORKERS)


def test_missing_logs_are_workers_that_have_not_started(fleet: board.FleetBoard) -> None:
    assert list(fleet.update()) == []
    assert {row.state for row in fleet.rows.values()} == {board.WorkerState.ABSENT}


def test_half_a_line_is_read_once_it_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    tail = journal.Tail(path)
    path.write_text('{"event":"a"}\n{"eve')
    assert [event["event"] for event in tail.new_events()] == ["a"]
    with path.open("a") as file:
        file.write('nt":"b"}\n')
    assert [event["event"] for event in tail.new_events()] == ["b"]
    assert list(tail.new_events()) == []


def test_journal_appends_lines_with_their_instant(tmp_path: pathlib.Path) -> None:
    with journal.Journal(tmp_path / "log") as log:
        log.write("one", at_ns=5, value=1)
        later_ns = log.write("two")

    events = journal.read(tmp_path / "log")
    assert events[0] == {"mono_ns": 5, "event": "one", "value": 1}
    assert events[1] == {"mono_ns": later_ns, "event": "two"}


def test_worker_row_follows_its_log(fleet: board.FleetBoard, logs: board.Logs) -> None:
    path = logs.worker("worker-b")
    append(path, {"mono_ns": 1, "event": "join"}, {"mono_ns": 2, "event": "connected"}, allocation(10, 4))
    append(path, *({"mono_ns": 3, "event": "admitted", "request": n} for n in (1, 2, 3)))
    append(path, {"mono_ns": 4, "event": "done", "request": 1, "tokens": 5})
    append(path, {"mono_ns": 5, "event": "throttled", "request": 2, "retry_after_seconds": 1})

    messages = list(fleet.update())

    row = fleet.rows["worker-b"]
    assert (row.state, row.in_flight, row.done, row.throttled) == (board.WorkerState.WORKING, 1, 1, 1)
    assert row.share[windows.Limit.CONCURRENCY] == 10
    assert messages == [
        "worker-b joins",
        "worker-b has 10 concurrent, 25 requests, 250 tokens (4 of 4 workers active)",
        "worker-b request 2 throttled: answered 429",
    ]
    append(path, {"mono_ns": 6, "event": "idle"})
    assert list(fleet.update()) == ["worker-b pauses"]
    assert row.state is board.WorkerState.PAUSED


def test_small_steps_are_not_told_until_they_add_up(fleet: board.FleetBoard, logs: board.Logs) -> None:
    told = []
    for concurrency in (10, 12, 14, 15, 16):
        append(logs.worker("worker-a"), allocation(concurrency, 3))
        told.append(len(list(fleet.update())))
    append(logs.worker("worker-a"), allocation(16, 2))

    assert told == [1, 0, 0, 1, 0]
    assert len(list(fleet.update())) == 1


def test_killed_worker_stays_killed(fleet: board.FleetBoard, logs: board.Logs) -> None:
    fleet.killed("worker-d")
    append(logs.worker("worker-d"), {"mono_ns": 1, "event": "connected"})

    assert list(fleet.update()) == []
    assert fleet.rows["worker-d"].state is board.WorkerState.KILLED


def test_use_is_recounted_from_the_providers_log(fleet: board.FleetBoard, logs: board.Logs) -> None:
    append(logs.provider, {"mono_ns": 0, "event": "start"})
    for number, end in enumerate(("settle", "disconnect", "reject", None)):
        request = f"r{number}"
        arrival = {"mono_ns": number, "request": request, "reserved_tokens": 100}
        append(logs.provider, {**arrival, "event": "arrive"})
        if end != "reject":
            append(logs.provider, {"mono_ns": number, "event": "admit", "request": request})
        if end:
            append(logs.provider, {"mono_ns": 9, "event": end, "request": request, "tokens": 7})

    list(fleet.update())

    assert fleet.use(10) == windows.Use(requests=3, tokens=207, concurrency=1)
    assert fleet.use(20 * SECOND + 10) == windows.Use(requests=0, tokens=0, concurrency=1)
    assert fleet.rejected == 1


@pytest.fixture
def state(fleet: board.FleetBoard, tmp_path: pathlib.Path) -> board.Board:
    static = board.FleetBoard("static split", LIMITS, board.Logs(tmp_path, "static"), plan.WORKERS)
    return board.Board(fleet, static, plan.script(165.0))


def test_off_a_terminal_each_scene_and_change_is_a_line(state: board.Board, logs: board.Logs) -> None:
    output = io.StringIO()
    shown = view.on(console.Console(file=output, width=100))
    append(logs.worker("worker-a"), allocation(40, 1))

    with shown:
        for seconds in (0.0, 0.2, 10.0, 30.0):
            shown.show(state, state.update(seconds))

    lines = output.getvalue().splitlines()
    assert lines == [
        "   0.0 s  --- one worker alone ---",
        "   0.0 s  worker-a has 40 concurrent, 25 requests, 250 tokens (1 of 4 workers active)",
        "  10.0 s  in use: requests 0/100, tokens 0/1,000, concurrency 0/40; done: 0 leased, 0 static",
        "  30.0 s  --- several workers ---",
        "  30.0 s  in use: requests 0/100, tokens 0/1,000, concurrency 0/40; done: 0 leased, 0 static",
    ]


def test_on_a_terminal_a_picture_shows_shares_and_changes(state: board.Board, logs: board.Logs) -> None:
    output = io.StringIO()
    screen = console.Console(file=output, width=160, force_terminal=True, color_system=None)
    append(logs.worker("worker-a"), allocation(40, 1))
    shown = view.on(screen)
    assert isinstance(shown, view.LiveView)

    with shown:
        shown.show(state, state.update(1.0))

    drawn = output.getvalue()
    assert "one worker alone" in drawn and "164 s to go" in drawn
    assert "worker-a has 40 concurrent" in drawn
    assert "worker-d" in drawn and "to come" in drawn
