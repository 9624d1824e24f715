"""The demo's pool without its agent: a real worker, a real broker, the ledger's process, and the verdict."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from allocator_kit import until
from celery_scene import CeleryScene
from fixtures_broker import BrokerServer
from leasehold.demo import children, journal, pool_app, pool_audit, pool_ledger


class Ledger:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "ledger.jsonl"
        self.socket = str(folder / "ledger.sock")

    def events(self) -> list[tuple[str, str]]:
        return [(each["event"], each["key"]) for each in journal.read(self.log)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path)
    with children.Children(tmp_path) as processes:
        processes.start_module(
            "ledger", "leasehold.demo.pool_ledger", ["serve", "--socket", made.socket, "--log", str(made.log)]
        )
        yield made


async def _serving(ledger: Ledger) -> Ledger:
    await until(lambda: Path(ledger.socket).exists(), "the ledger serves")
    return ledger


async def test_tasks_take_memory_and_complete_once_though_a_pool_process_is_killed(
    broker: BrokerServer, ledger: Ledger, tmp_path: Path
) -> None:
    await _serving(ledger)
    scene = CeleryScene(broker, tmp_path, app="leasehold.demo.pool_app", queue=pool_app.QUEUE)
    for number in range(3):
        pool_app.submit(broker.url, ledger.socket, f"t{number}", memory_mib=30, seconds=0.5)
    try:
        worker = await scene.start(**{pool_app.LEDGER_VARIABLE: ledger.socket})
        await until(lambda: ("started", "t0") in ledger.events(), f"a task runs\n{worker.log()}")
        (child,) = worker.children
        await until(lambda: _anonymous_mib(child) > 50, "it takes its memory")
        os.kill(child, signal.SIGKILL)

        await until(
            lambda: pool_audit.judge(journal.read(ledger.log)).is_good,
            f"all is done\n{worker.log()}",
            seconds=30,
        )
    finally:
        scene.end()

    verdict = pool_audit.judge(journal.read(ledger.log), forbidden_pids=[worker.main])
    assert (verdict.submitted, verdict.completed_once, verdict.forged) == (3, 3, 0)
    assert verdict.interrupted_and_run_again == ("t0",)
    completed = [each for each in journal.read(ledger.log) if each["event"] == "completed"]
    assert {each["worker"] for each in completed} == {worker.name}
    assert all(each["pid"] != child for each in completed)


async def test_the_ledger_takes_only_what_it_understands_and_names_the_writer_itself(ledger: Ledger) -> None:
    await _serving(ledger)
    lines = [
        b'{"event": "completed", "key": "a", "pid": 1}\n',
        b'{"event": "invented", "key": "a"}\n',
        b"[]\n",
        b"nonsense\n",
        b'{"event": "submitted", "key": "a"}\n',
    ]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(ledger.socket)
        answers = connection.makefile("rb")
        for line in lines:
            connection.sendall(line)
        told = [answers.readline() for _ in lines]
        # A line that its writer did not end is not written.
        connection.sendall(b'{"event": "completed", "key": "a"}')

    assert told == [b"refused\n"] * 4 + [b"ok\n"]
    pool_ledger.write(ledger.socket, "started", "a", worker="w")
    events = journal.read(ledger.log)
    assert [(each["event"], each["pid"]) for each in events] == [
        ("submitted", os.getpid()),
        ("started", os.getpid()),
    ]


def test_the_lint_finds_nothing_in_the_demos_application(broker: BrokerServer) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "leasehold.client.celery_lint", "leasehold.demo.pool_app"],
        env={**os.environ, "CELERY_BROKER_URL": broker.url},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_a_ledger_that_is_not_there_is_an_error_for_the_task(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        pool_ledger.write(str(tmp_path / "none.sock"), "completed", "a")


@pytest.mark.parametrize(("completed", "exit_code"), [(1, 0), (2, 1)])
def test_the_verdict_is_a_command_too(tmp_path: Path, completed: int, exit_code: int) -> None:
    log = tmp_path / "ledger.jsonl"
    with journal.Journal(log) as writer:
        for event in ("submitted", "started", *("completed",) * completed):
            writer.write(event, key="a", pid=7)
    finished = subprocess.run(
        [sys.executable, "-m", "leasehold.demo.pool_ledger", "audit", str(log), "--agent-pid", "1"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.returncode == exit_code, finished.stderr
    assert f"completed twice              {completed - 1}" in finished.stdout


def _anonymous_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
