"""`leasehold` as a user runs it: commands in processes of their own, and `leasehold up` on free ports."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from leasehold.devstack import identity, ports, records

LEASEHOLD = (sys.executable, "-m", "leasehold.cli")
PATIENCE_SECONDS = 60.0
#: `up` says so many lines when all is there.
LINES_TOLD = 8


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that other processes bring about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def leasehold(
    *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, without a terminal, and without standard input unless it is given."""
    return subprocess.run(
        [*LEASEHOLD, *arguments],
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=PATIENCE_SECONDS,
        check=False,
        start_new_session=True,
    )


@contextlib.contextmanager
def follow(worker: str, addr: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`leasehold workers logs -f` of a worker, from its last line; it is killed in the end."""
    command = [*LEASEHOLD, "workers", "logs", "-f", "-n", "1", worker, "--addr", addr]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        # Whoever reads from it waits for its end at most so long.
        patience = threading.Timer(PATIENCE_SECONDS, process.kill)
        patience.start()
        try:
            yield process
        finally:
            patience.cancel()
            process.kill()


@dataclass
class Up:
    """A running `leasehold up`."""

    process: "subprocess.Popen[str]"
    data_dir: Path
    addresses: list[str]
    #: Its lines on standard output.
    told: list[str]
    #: Its lines on standard error until now.
    said: list[str]

    @property
    def addr(self) -> str:
        """For --addr."""
        return ",".join(self.addresses)

    @property
    def children(self) -> dict[str, identity.Identity]:
        """What it has started, by name."""
        return {record.name: record.identity for record in records.Records(self.data_dir).read()}

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command against it."""
        return leasehold(*arguments, "--addr", self.addr, stdin=stdin)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signal it and wait; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)


def port_flags(replicas: int = 1, *, has_parts: bool = False) -> tuple[list[str], list[str]]:
    """Flags with free ports, and the allocators' addresses. `has_parts`: with a gateway and an agent."""
    first = ports.free_port()
    while not all(_is_free(first + number) for number in range(1, replicas)):
        first = ports.free_port()
    flags = [f"--port={first}", f"--allocators={replicas}"]
    flags += [f"--{name}-port={ports.free_port()}" for name in ("etcd", "etcd-peer", "postgres", "http")]
    flags += [] if has_parts else ["--no-agent", "--no-gateway"]
    return flags, [f"127.0.0.1:{first + number}" for number in range(replicas)]


def _is_free(port: int) -> bool:
    with contextlib.suppress(Exception):
        ports.check_free(port, "--port")
        return True
    return False


@contextlib.contextmanager
def spawned(
    data_dir: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator["subprocess.Popen[str]"]:
    """`leasehold up` without a terminal, its standard input closed; it has ended at the end of the block."""
    command = [
        *prefix,
        "sh",
        "-c",
        'exec "$@" <&-',
        "sh",
        *LEASEHOLD,
        "up",
        f"--data-dir={data_dir}",
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def up(
    data_dir: Path,
    *arguments: str,
    replicas: int = 1,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    has_parts: bool = False,
) -> Iterator[Up]:
    """`leasehold up` on free ports, once it has told where everything is; stopped at the end of the block."""
    flags, addresses = port_flags(replicas, has_parts=has_parts)
    lines = LINES_TOLD + 4 if has_parts else LINES_TOLD
    with spawned(data_dir, *flags, *arguments, env=env, prefix=prefix) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(process.stderr,))
        reader.start()
        try:
            told = [process.stdout.readline().rstrip("\n") for _ in range(lines)]
            assert all(told), f"up ended before it was up: {said}"
            yield Up(process, data_dir, addresses, told, said)
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            reader.join(PATIENCE_SECONDS)


def left_over(data_dir: Path) -> list[str]:
    """Names and command lines of processes that `up` has recorded for the folder, or that name it."""
    recorded = [
        record.name for record in records.Records(data_dir).read() if identity.is_alive(record.identity)
    ]
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return recorded + [line for line in lines if str(data_dir) in line]
