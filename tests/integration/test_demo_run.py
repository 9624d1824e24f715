"""`python -m leasehold.demo` as a user runs it: real servers, real workers, no terminal, no standard input."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import deaf
import psutil
import pytest

DEADLINE_SECONDS = 90.0


def command(folder: pathlib.Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "leasehold.demo", "--folder", str(folder), *arguments]


def left_over(folder: pathlib.Path) -> list[list[str]]:
    """Command lines of processes that name the folder."""
    command_lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in command_lines if any(str(folder) in word for word in words)]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_seconds = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline_seconds, f"waited in vain until {what}"
        time.sleep(0.05)


@pytest.mark.alone
def test_short_play_upholds_every_claim_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    ran = subprocess.run(
        command(tmp_path, "--seconds", "83", "--window-seconds", "5"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "BROKEN" not in ran.stdout
    assert "--- one is killed with SIGKILL ---" in ran.stdout
    assert "\x1b" not in ran.stdout
    assert left_over(tmp_path) == []


def is_working(log: pathlib.Path) -> bool:
    return log.exists() and "admitted" in log.read_text()


@pytest.mark.parametrize(
    ("number", "prefix"),
    [(signal.SIGINT, ()), (signal.SIGTERM, deaf.PREFIX)],
    ids=["as usual", "signals were ignored and blocked"],
)
def test_interrupted_play_ends_everything_that_it_started(
    tmp_path: pathlib.Path, number: signal.Signals, prefix: Sequence[str]
) -> None:
    log = tmp_path / "logs" / "leased-worker-a.jsonl"
    demo = subprocess.Popen(
        [*prefix, *command(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: is_working(log) or demo.poll() is not None, "a worker works")
        assert len(left_over(tmp_path)) > 5
        demo.send_signal(number)
        _, told = demo.communicate(timeout=DEADLINE_SECONDS)
    finally:
        demo.kill()
        demo.communicate()

    assert demo.returncode == 130
    assert told == "interrupted; everything that was started has ended\n"
    assert left_over(tmp_path) == []
    provider_log = (log.parent / "leased-provider.jsonl").read_text()
    assert json.loads(provider_log.splitlines()[-1])["event"] == "stop"


def test_jobs_scene_that_is_interrupted_leaves_no_process_and_every_file_of_its_users(
    tmp_path: pathlib.Path,
) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("years of work")
    run = tmp_path / "run"
    stale = run / "stack" / "stale"
    stale.mkdir(parents=True)
    (run / "owner.lock").touch()  # by which a run knows its own
    scene = subprocess.Popen(
        [*deaf.PREFIX, sys.executable, "-m", "leasehold.demo.job_run", "--folder", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: (run / "stack" / "demo-1.log").exists() or scene.poll() is not None, "an agent begins")
        assert len(left_over(tmp_path)) > 3
        scene.send_signal(signal.SIGTERM)
        _, told = scene.communicate(timeout=DEADLINE_SECONDS)
    finally:
        scene.kill()
        scene.communicate()

    assert scene.returncode == 130
    assert told == "interrupted; everything that was started has ended\n"
    assert left_over(tmp_path) == []
    assert mine.read_text() == "years of work"
    assert not stale.exists()


def test_jobs_scene_keeps_off_a_folder_that_no_run_has_made(tmp_path: pathlib.Path) -> None:
    mine = tmp_path / "run" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    ran = subprocess.run(
        [sys.executable, "-m", "leasehold.demo.job_run", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert ran.returncode == 2
    assert f"{mine.parent} has files that no run has made" in ran.stderr
    assert [*mine.parent.iterdir()] == [mine]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trace", "/nonexistent.csv"], "there is no file /nonexistent.csv"),
        (["--seconds", "10"], "seconds: 10 is not in 152 to 3600 (for a window of 20 s)"),
        (["--window-seconds", "nan"], "window_seconds: nan is not in 5 to 3600"),
    ],
)
def test_wrong_argument_is_one_line_and_starts_nothing(
    tmp_path: pathlib.Path, arguments: list[str], told: str
) -> None:
    folder = tmp_path / "untouched"

    ran = subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )

    assert ran.returncode == 2
    assert told in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not folder.exists()


def test_allocator_that_is_not_there_is_told(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys; from leasehold.demo import run, stack; stack.READY_SECONDS = 0.5; "
        "sys.exit(run.main(sys.argv[1:]))"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code, "--folder", str(tmp_path), "--allocator", "127.0.0.1:9"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert ran.returncode == 2
    assert "the allocator does not take the budget" in ran.stderr
