"""`leasehold up` and `leasehold down` as a user runs them: real servers, no terminal, standard input closed."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import cli_scene
import deaf
import psycopg
import pytest
from leasehold.cli import main
from leasehold.devstack import etcd_binary, identity, records

NOBODY = 65534


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for many a start: only the first makes a Postgres cluster."""
    return tmp_path_factory.mktemp("data")


def alive(processes: list[identity.Identity]) -> list[bool]:
    return [identity.is_alive(process) for process in processes]


def budget_names(up: cli_scene.Up) -> list[str]:
    listed = up.run("budget", "list", "-o", "name")
    assert listed.returncode == 0, listed.stderr
    return listed.stdout.split()


def test_it_tells_where_everything_is_and_three_commands_that_work_and_ctrl_c_ends_all(data_dir: Path) -> None:
    with cli_scene.up(data_dir) as up:
        urls = dict(line.split(maxsplit=1) for line in up.told[:4])
        processes = list(up.children.values())
        for command in up.told[-3:]:
            words = shlex.split(command) + (["--count=1"] if "watch" in command else [])
            ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            assert (ran.returncode, ran.stderr) == (0, ""), command
            assert "llm-api" in command or "llm-api" in ran.stdout
        second = cli_scene.leasehold("up", f"--data-dir={data_dir}")

        assert up.stop(signal.SIGINT) == 0

    assert urls["allocator"] == f"grpc://{up.addr}"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", urls["etcd"])
    assert re.fullmatch(r"postgresql://\w+@127\.0\.0\.1:\d+/\w+", urls["Postgres"])
    assert urls["data"] == str(data_dir)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"leasehold: already running, PID {up.process.pid}, on {data_dir}\n"
    assert alive(processes) == [False, False, False]
    assert cli_scene.left_over(data_dir) == []
    assert up.said[-1] == f"stopped; the data stay in {data_dir}\n"
    assert "Traceback" not in "".join(up.said)
    down = cli_scene.leasehold("down", f"--data-dir={data_dir}")
    assert (down.returncode, down.stdout, down.stderr) == (0, "nothing is running\n", "")


def test_down_stops_it_and_the_next_start_finds_the_budgets_again(data_dir: Path) -> None:
    mine = "budgets: [{name: mine, dimensions: {rpm_limit: 5}}]"
    with cli_scene.up(data_dir) as up:
        assert up.run("budget", "apply", "-f", "-", stdin=mine).returncode == 0
        down = cli_scene.leasehold("down", f"--data-dir={data_dir}")
        assert (down.returncode, down.stdout) == (0, f"stopped leasehold up, PID {up.process.pid}\n")
        assert up.process.wait(cli_scene.PATIENCE_SECONDS) == 0
    assert cli_scene.left_over(data_dir) == []

    with cli_scene.up(data_dir) as up:
        assert "mine" in budget_names(up)
        assert up.stop(signal.SIGTERM) == 0
    assert cli_scene.left_over(data_dir) == []


@pytest.mark.parametrize("by", ["down", "up"])
def test_what_a_killed_one_left_is_ended_by_down_and_by_the_next_start(data_dir: Path, by: str) -> None:
    """Its processes are frozen first: they do not see that their owner died, and so they are left for sure."""
    with cli_scene.up(data_dir) as up:
        processes = list(up.children.values())
        for process in processes:
            identity.freeze(process)
        up.process.kill()
        up.process.wait()
        assert alive(processes) == [True, True, True]

        if by == "down":
            down = cli_scene.leasehold("down", f"--data-dir={data_dir}")
            assert down.returncode == 0, down.stderr
            assert down.stdout.startswith("ended what a killed leasehold up had left: allocator-")
        else:
            with cli_scene.up(data_dir) as successor:
                assert budget_names(successor)

    assert alive(processes) == [False, False, False]
    assert cli_scene.left_over(data_dir) == []


@pytest.mark.parametrize("flag", ["--port", "--etcd-port", "--etcd-peer-port", "--postgres-port"])
def test_a_taken_port_is_told_with_its_holder_and_the_flag_and_nothing_starts(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, _ = cli_scene.port_flags()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = main.run(["up", f"--data-dir={tmp_path}", *flags, f"{flag}={port}"])

    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith(f"leasehold: port {port} is taken, held by PID {os.getpid()} (")
    assert err.endswith(f"; choose another with {flag}\n")
    assert err.count("\n") == 1
    assert records.Records(tmp_path).read() == []


@pytest.mark.parametrize(
    ("arguments", "worker_count", "told"),
    [
        (
            ["--port=7478", "--allocators=2"],
            "",
            "--port: an allocator's would be 7479, which is --etcd-port too",
        ),
        (["--budgets=/nonexistent.yaml"], "", "file: /nonexistent.yaml: No such file or directory"),
        (["--budgets=-"], "", "--budgets: a file is followed, which - is not"),
        ([], "many", "WORKER_COUNT: 'many' is not a whole number of 1 to 100000"),
        ([], "²", "WORKER_COUNT: '²' is not a whole number of 1 to 100000"),
        ([], "0", "WORKER_COUNT: '0' is not a whole number of 1 to 100000"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_starts(
    tmp_path: Path,
    arguments: list[str],
    worker_count: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "untouched"
    monkeypatch.setenv("WORKER_COUNT", worker_count)

    code = main.run(["up", f"--data-dir={folder}", *arguments])

    assert (code, *capsys.readouterr()) == (1, "", f"leasehold: {told}\n")
    assert not folder.exists()


def test_there_is_no_default_folder_without_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", without_home)

    assert main.run(["down"]) == 1
    assert capsys.readouterr().err == "leasehold: --data-dir: needed, you have no home folder\n"


def test_a_budgets_file_is_what_is_there_instead_of_the_example(tmp_path: Path) -> None:
    """In a folder of its own: the other tests find the example in theirs, whichever of them is the first."""
    file = tmp_path / "budgets.yaml"
    file.write_text("budgets: [{name: from-file, dimensions: {rpm_limit: 9}}]")

    with cli_scene.up(tmp_path / "data", f"--budgets={file}") as up:
        cli_scene.until(lambda: budget_names(up) == ["from-file"], "the file is applied")


@pytest.mark.parametrize(
    ("number", "prefix"),
    [(signal.SIGINT, ()), (signal.SIGTERM, deaf.PREFIX)],
    ids=["as usual", "signals were ignored and blocked"],
)
def test_a_signal_while_it_starts_ends_all_with_130(
    tmp_path: Path, number: signal.Signals, prefix: Sequence[str]
) -> None:
    flags, _ = cli_scene.port_flags()
    with cli_scene.spawned(tmp_path, *flags, prefix=prefix) as process:
        cli_scene.until(lambda: bool(records.Records(tmp_path).read()), "something is started")
        process.send_signal(number)
        out, err = process.communicate(timeout=cli_scene.PATIENCE_SECONDS)

    assert (process.returncode, out) == (130, "")
    assert "stopping ...\n" in err
    assert err.endswith(f"\nstopped; the data stay in {tmp_path}\n")
    assert cli_scene.left_over(tmp_path) == []


def test_with_three_allocators_commands_and_watches_outlive_the_leader(data_dir: Path) -> None:
    with cli_scene.up(data_dir, replicas=3) as up:
        watch = subprocess.Popen(
            [*cli_scene.LEASEHOLD, "budget", "watch", "llm-api", "-o", "json", "--addr", up.addr],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert watch.stdout is not None
            before = json.loads(watch.stdout.readline())
            leader = up.children[f"allocator-{up.addresses[0].rpartition(':')[2]}"]
            identity.kill(leader)

            assert "llm-api" in budget_names(up)
            after = json.loads(watch.stdout.readline())
            while after["epoch"] == before["epoch"]:
                after = json.loads(watch.stdout.readline())
            assert int(after["epoch"]["revision"]) > int(before["epoch"]["revision"])
        finally:
            watch.terminate()
            watch.communicate(timeout=cli_scene.PATIENCE_SECONDS)
        cli_scene.until(lambda: any("2 of 3 allocators go on" in line for line in up.said), "it is told")
        assert up.process.poll() is None
        assert up.stop(signal.SIGHUP) == 0  # its terminal was closed
    assert cli_scene.left_over(data_dir) == []


@pytest.mark.parametrize("name", ["allocator", "etcd", "postgres"])
def test_a_part_that_ends_by_itself_ends_all_and_is_named(data_dir: Path, name: str) -> None:
    with cli_scene.up(data_dir) as up:
        (victim,) = [process for child, process in up.children.items() if child.startswith(name)]
        identity.kill(victim)
        assert up.process.wait(cli_scene.PATIENCE_SECONDS) == 1

    assert up.said[-1].lower().startswith(f"leasehold: {name}")
    assert "ended by itself" in up.said[-1]
    assert "its log is" in up.said[-1]
    assert cli_scene.left_over(data_dir) == []


def test_servers_of_the_users_own_are_used_and_the_example_is_for_worker_count(
    tmp_path: Path, etcd_server: str, etcd_prefix: str, postgres_dsn: str
) -> None:
    own = {
        "LEASEHOLD_ETCD_ENDPOINTS": etcd_server,
        "LEASEHOLD_ETCD_PREFIX": etcd_prefix,
        "LEASEHOLD_POSTGRES_DSN": postgres_dsn,
        "WORKER_COUNT": "7",
    }
    with cli_scene.up(tmp_path, env=own) as up:
        assert [name.partition("-")[0] for name in up.children] == ["allocator"]
        assert f"http://{etcd_server}" in up.told[1]
        password = psycopg.conninfo.conninfo_to_dict(postgres_dsn)["password"]
        assert str(password) not in "".join([*up.told, *up.said])
        document = json.loads(up.run("budget", "get", "llm-api", "-o", "json").stdout)
    assert document["expected_workers"] == 7
    assert document["limits_in_force"] == {
        "max_concurrent_requests": 40,
        "rpm_limit": 800,
        "tpm_limit": 40000,
        "num_workers": 40,
    }
    with psycopg.connect(postgres_dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def nobody_who_can_run_python() -> tuple[str, ...]:
    """A prefix that makes root the user 65534, with root's way through folders if Python lies under /root."""
    nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    script = "import subprocess, sys, leasehold.cli; subprocess.run([sys.executable, '-V'], check=True)"
    probe = subprocess.run([*nobody, sys.executable, "-c", script], capture_output=True, check=False)
    passing = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    return nobody if probe.returncode == 0 else (*nobody, *passing)


def test_it_runs_for_an_ordinary_user_with_a_folder_in_the_home() -> None:
    """As root: for the user 65534, with a home of its own. As anyone else: for that user."""
    home = Path(tempfile.mkdtemp())  # pytest's folders are closed to other users
    program = etcd_binary.find(announce=lambda _: None, cancel=threading.Event())
    try:
        shutil.copy(program, home / "etcd")
        (home / "etcd").chmod(0o755)
        prefix: tuple[str, ...] = ()
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
            prefix = nobody_who_can_run_python()
        data_dir = home / ".local/state/leasehold/up"
        env = {"HOME": str(home), "XDG_STATE_HOME": "", "ETCD_BIN": str(home / "etcd")}
        with cli_scene.up(data_dir, env=env, prefix=prefix) as up:
            users = {os.stat(f"/proc/{process.pid}").st_uid for process in up.children.values()}
            assert users == {os.geteuid() or NOBODY}
            assert budget_names(up) == ["llm-api"]
            assert up.stop() == 0
        assert cli_scene.left_over(data_dir) == []
    finally:
        shutil.rmtree(home)


def test_an_allocator_alone_tells_its_settings() -> None:
    ran = cli_scene.leasehold("allocator", "--help")

    assert ran.returncode == 0
    assert "--listen" in ran.stdout
    assert sys.executable not in ran.stderr
