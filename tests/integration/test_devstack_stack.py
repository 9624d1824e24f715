"""The stack on one data folder: kept data, one owner, nothing left running whatever happens to the owner."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from leasehold import devstack
from leasehold.core import errors
from leasehold.devstack import etcd, etcd_binary, identity, ports, records

NOBODY = 65534
PATIENCE_SECONDS = 30.0

# Owns a stack until it is told to end; says one JSON line when all is up. Extra processes: argv[2:].
OWNER = """
import json, os, pathlib, signal, sys
from leasehold import devstack

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
announce = lambda line: print(line, file=sys.stderr, flush=True)
try:
    with devstack.Stack(pathlib.Path(sys.argv[1]), announce=announce) as stack:
        others = [stack.spawn(name, ["sleep", "1000"]).pid for name in sys.argv[2:]]
        pids = [stack.etcd.pid, stack.postgres.pid, *others]
        print(json.dumps({"pids": pids, "uid": os.geteuid()}), flush=True)
        while True:
            signal.pause()
except KeyboardInterrupt:
    sys.exit(130)
"""

StartOwner = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_owner() -> Iterator[StartOwner]:
    """Start a process that owns a stack; it is ended after the test."""
    owners: list[subprocess.Popen[str]] = []

    def start(
        data_dir: Path, *names: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        owner = subprocess.Popen(
            [*prefix, sys.executable, "-c", OWNER, str(data_dir), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        owners.append(owner)
        return owner

    yield start
    for owner in owners:
        owner.terminate()
        owner.communicate(timeout=PATIENCE_SECONDS)


def started(owner: "subprocess.Popen[str]") -> list[identity.Identity]:
    """Wait until all is up; the processes that the owner started: etcd, PostgreSQL, others."""
    assert owner.stdout is not None
    assert owner.stderr is not None
    line = owner.stdout.readline()
    assert line, owner.stderr.read()
    return [present(pid) for pid in json.loads(line)["pids"]]


def present(pid: int) -> identity.Identity:
    found = identity.of(pid)
    assert found is not None
    return found


def alive(processes: list[identity.Identity]) -> list[bool]:
    return [identity.is_alive(process) for process in processes]


def nobody_who_can_run_python() -> tuple[str, ...]:
    """A prefix that makes root the user 65534, with root's way through folders if Python lies under /root."""
    nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # Twice: setpriv still finds its program with root's rights, and only what that starts does not.
    script = "import subprocess, sys, leasehold.devstack; subprocess.run([sys.executable, '-V'], check=True)"
    probe = subprocess.run([*nobody, sys.executable, "-c", script], capture_output=True, check=False)
    passing = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    return nobody if probe.returncode == 0 else (*nobody, *passing)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def quiet_stack(data_dir: Path) -> devstack.Stack:
    return devstack.Stack(data_dir, announce=lambda _: None, environ={})


def insert(stack: devstack.Stack, text: str) -> None:
    with psycopg.connect(stack.postgres_dsn) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (text text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [text])


def kept(stack: devstack.Stack) -> list[str]:
    with psycopg.connect(stack.postgres_dsn) as connection:
        return [row[0] for row in connection.execute("SELECT text FROM kept ORDER BY text")]


def test_data_are_kept_from_one_start_to_the_next_and_stop_can_be_said_twice(tmp_path: Path) -> None:
    said: list[str] = []
    with devstack.Stack(tmp_path, announce=said.append, environ={}) as stack:
        insert(stack, "first")
        processes = [record.identity for record in stack.book.read()]
        stack.stop()

        assert alive(processes) == [False, False]
        assert records.Records(tmp_path).read() == []
    with quiet_stack(tmp_path) as stack:
        insert(stack, "second")
        assert kept(stack) == ["first", "second"]
    assert [line for line in said if line.startswith("etcd answers on 127.0.0.1:")]
    assert [line for line in said if line.startswith("PostgreSQL answers on 127.0.0.1:")]
    assert said[-1].startswith("the stack is ready")


def test_given_ports_are_used_and_a_taken_one_is_told_before_anything_starts(tmp_path: Path) -> None:
    etcd_port, postgres_port = ports.free_port(), ports.free_port()
    stack = devstack.Stack(
        tmp_path, announce=lambda _: None, etcd_port=etcd_port, postgres_port=postgres_port, environ={}
    )
    with stack:
        assert stack.etcd_endpoints == [f"127.0.0.1:{etcd_port}"]
        assert psycopg.conninfo.conninfo_to_dict(stack.postgres_dsn)["port"] == str(postgres_port)

    with socket.create_server(("127.0.0.1", postgres_port)):
        with pytest.raises(errors.FailedPrecondition) as refusal:
            stack.start()
        assert records.Records(tmp_path).read() == []
    assert f"port {postgres_port} is taken, held by PID {os.getpid()} (" in refusal.value.message
    assert "--postgres-port" in refusal.value.message
    with stack:  # the refusal gave the folder up
        assert etcd.is_healthy(etcd_port)


def test_one_port_for_two_servers_is_refused_by_the_names_of_the_flags(tmp_path: Path) -> None:
    port = ports.free_port()
    stack = devstack.Stack(tmp_path, announce=lambda _: None, etcd_port=port, postgres_port=port, environ={})

    with pytest.raises(errors.InvalidArgument, match="--etcd-port and --postgres-port are both"):
        stack.start()


def test_the_users_own_servers_are_used_and_their_secrets_not_shown(tmp_path: Path) -> None:
    said: list[str] = []
    given = {
        "LEASEHOLD_ETCD_ENDPOINTS": "etcd-1:2379, etcd-2:2379",
        "LEASEHOLD_POSTGRES_DSN": "postgresql://leasehold:secret@db:6432/leasehold",
    }
    with devstack.Stack(tmp_path, announce=said.append, environ=given) as stack:
        assert stack.etcd_endpoints == ["etcd-1:2379", "etcd-2:2379"]
        assert stack.postgres_dsn == given["LEASEHOLD_POSTGRES_DSN"]
        assert stack.book.read() == []
    assert said[:2] == ["using your etcd, etcd-1:2379, etcd-2:2379", "using your PostgreSQL, db:6432"]


def test_the_users_own_etcd_leaves_postgres_to_us(tmp_path: Path) -> None:
    given = {"LEASEHOLD_ETCD_ENDPOINTS": "etcd-1:2379"}
    with devstack.Stack(tmp_path, announce=lambda _: None, environ=given) as stack:
        assert stack.etcd is None
        assert [record.name for record in stack.book.read()] == ["postgres"]
        insert(stack, "here")


def test_a_failing_server_is_told_and_the_other_is_stopped(tmp_path: Path) -> None:
    with quiet_stack(tmp_path):
        pass
    data = next((tmp_path / "etcd").rglob("member"))
    shutil.rmtree(data)
    data.write_text("not a folder")
    stack = quiet_stack(tmp_path)

    with pytest.raises(errors.Unavailable, match=r"(?s)etcd ended with code .*not a directory"):
        stack.start()
    assert stack.postgres is not None
    assert not stack.postgres.is_running
    assert devstack.find_owner(tmp_path) is None


def test_a_second_owner_is_refused_with_the_pid_of_the_first(tmp_path: Path, start_owner: StartOwner) -> None:
    owner = start_owner(tmp_path)
    processes = started(owner)

    with pytest.raises(errors.FailedPrecondition, match=f"already running, PID {owner.pid}") as refusal:
        quiet_stack(tmp_path).start()
    with pytest.raises(errors.FailedPrecondition, match=f"already running, PID {owner.pid}"):
        devstack.end_leftovers(tmp_path, announce=lambda _: None)
    assert refusal.value.metadata["pid"] == str(owner.pid)
    assert alive(processes) == [True, True]


def test_the_owner_can_be_told_to_stop_and_stops_all(tmp_path: Path, start_owner: StartOwner) -> None:
    owner = start_owner(tmp_path, "allocator")
    processes = started(owner)

    assert devstack.stop_owner(tmp_path, grace_seconds=PATIENCE_SECONDS) == owner.pid
    assert alive(processes) == [False, False, False]
    assert owner.wait(timeout=PATIENCE_SECONDS) == 130
    assert records.Records(tmp_path).read() == []


def test_a_killed_owner_leaves_nothing_and_the_next_start_finds_the_data(
    tmp_path: Path, start_owner: StartOwner
) -> None:
    with quiet_stack(tmp_path) as stack:
        insert(stack, "before the kill")
    owner = start_owner(tmp_path, "allocator")
    processes = started(owner)
    owner.kill()
    owner.wait()

    with quiet_stack(tmp_path) as stack:
        assert alive(processes) == [False, False, False]
        assert kept(stack) == ["before the kill"]


def test_what_a_killed_owner_left_frozen_is_ended_and_nothing_else(
    tmp_path: Path, start_owner: StartOwner
) -> None:
    """Frozen processes do not see the signal that their owner's death sends them: they are left for sure."""
    owner = start_owner(tmp_path, "allocator")
    processes = started(owner)
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        try:
            for process in processes:
                identity.freeze(process)
            owner.kill()
            owner.wait()
            assert alive(processes) == [True, True, True]

            ended = devstack.end_leftovers(tmp_path, announce=lambda _: None)

            assert alive(processes) == [False, False, False]
            assert bystander.poll() is None
            assert {record.identity for record in ended} == set(processes)
            assert ended[0].name == "allocator"  # what uses the servers goes before them
            assert devstack.end_leftovers(tmp_path, announce=lambda _: None) == []
        finally:
            bystander.kill()
    with quiet_stack(tmp_path) as stack:
        insert(stack, "works again")


def test_an_owner_killed_while_the_cluster_is_made_leaves_no_half_of_it(
    tmp_path: Path, start_owner: StartOwner
) -> None:
    owner = start_owner(tmp_path)
    book = records.Records(tmp_path)
    wait_until(lambda: "initdb" in [record.name for record in book.read()])
    (initdb,) = [record.identity for record in book.read() if record.name == "initdb"]
    wait_until(lambda: identity.descendants(initdb) != [])
    identity.freeze(initdb)  # so that it cannot be done before its owner is
    family = [initdb, *identity.descendants(initdb)]
    owner.kill()
    owner.wait()
    assert identity.is_alive(initdb)

    devstack.end_leftovers(tmp_path, announce=lambda _: None)

    assert not any(alive(family))
    assert book.read() == []
    with quiet_stack(tmp_path) as stack:
        insert(stack, "made anew")
    assert list((tmp_path / "postgres").glob("new-*")) == []


def test_an_interrupt_while_starting_leaves_nothing(tmp_path: Path, start_owner: StartOwner) -> None:
    """The fetch of etcd hangs (a stand-in for apt that does) while PostgreSQL comes up; then Ctrl-C."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(
        f"#!/bin/sh\necho $$ >{tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/fetching; sleep 1000\n"
    )
    (tools / "apt-get").chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "LEASEHOLD_CACHE_DIR": str(tmp_path / "cache")}
    owner = start_owner(tmp_path / "data", env=env)
    wait_until((tmp_path / "fetching").exists)
    wait_until(lambda: bool(records.Records(tmp_path / "data").read()))
    running = psutil.Process(owner.pid).children(recursive=True)
    processes = [found for found in (identity.of(process.pid) for process in running) if found]

    owner.send_signal(signal.SIGINT)

    assert owner.wait(timeout=PATIENCE_SECONDS) == 130
    assert int((tmp_path / "fetching").read_text()) in [process.pid for process in processes]
    assert not any(alive(processes))
    assert records.Records(tmp_path / "data").read() == []
    assert sorted(path.name for path in (tmp_path / "cache/etcd").iterdir()) == ["lock"]


def test_a_process_of_the_stack_is_stopped_before_the_servers(tmp_path: Path) -> None:
    with quiet_stack(tmp_path) as stack:
        assert stack.etcd is not None
        assert stack.postgres is not None
        script = (
            f"trap 'kill -0 {stack.etcd.pid} {stack.postgres.pid} && echo both run; exit 5' TERM; "
            "echo up; while :; do sleep 0.05; done"
        )
        child = stack.spawn("allocator", ["sh", "-c", script])
        wait_until(lambda: child.log_path.read_text() == "up\n")
    assert child.exit_code == 5
    assert child.log_path.read_text() == "up\nboth run\n"


def test_the_stack_runs_for_an_ordinary_user(tmp_path: Path, start_owner: StartOwner) -> None:
    """As root: for the user 65534, with a home and a cache of its own. As anyone else: for that user."""
    home = Path(tempfile.mkdtemp())  # pytest's folders are closed to other users
    etcd_program = etcd_binary.find(announce=lambda _: None, cancel=threading.Event())
    try:
        (home / "etcd").write_bytes(etcd_program.read_bytes())
        (home / "etcd").chmod(0o755)
        prefix: tuple[str, ...] = ()
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
            prefix = nobody_who_can_run_python()
        env = {"HOME": str(home), "ETCD_BIN": str(home / "etcd")}
        owner = start_owner(home / "data", prefix=prefix, env=env)
        processes = started(owner)

        assert {os.stat(f"/proc/{process.pid}").st_uid for process in processes} == {os.geteuid() or NOBODY}
        owner.send_signal(signal.SIGINT)
        assert owner.wait(timeout=PATIENCE_SECONDS) == 130
        assert alive(processes) == [False, False]
    finally:
        shutil.rmtree(home)
