"""A real etcd, or a cluster of them, on loopback, as child processes."""

import contextlib
import functools
import http.client
import json
import os
import platform
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from leasehold.core import errors
from leasehold.devstack import etcd_binary, ports, process, records

READY_TIMEOUT_SECONDS = 30.0
STOP_GRACE_SECONDS = 10.0
_MINORITY_GRACE_SECONDS = 0.5

# With the defaults (100 ms, 1000 ms) a lease of 1 s is granted as 2 s: etcd's floor is 1.5 election timeouts,
# rounded up. On loopback 20 ms beats are kept even by a busy machine.
_HEARTBEAT_MS = 20
_ELECTION_MS = 200
# Lease records are rewritten all the time; every revision is kept until it is compacted. A minute of history is
# plenty for a watcher to resume.
_COMPACTION_RETENTION = "1m"
# The database may grow to this (it is also etcd's own default); then writes are refused. A minute of 5,000
# writes of 1 kB a second is 0.3 GB.
_QUOTA_BYTES = 2 * 2**30
# Renewals are written in batches; etcd's default of 128 operations would cut them up.
_TXN_OPS_MAX = 4096
_REQUEST_BYTES_MAX = 4 * 2**20
# Entries kept in memory between snapshots; 3.4's default of 100,000 costs memory and a slow restart.
_SNAPSHOT_COUNT = 10_000


def _quiet(_: str) -> None:
    pass


class EtcdServer:
    """One etcd on 127.0.0.1; a context manager that starts and stops it.

    Data and log live in ``data_dir`` and survive a restart. Ports that are None are chosen once and kept for
    this object's life, so that a client finds the server again. ``binary`` None: looked for
    (`etcd_binary.find`), fetched if need be. ``peers`` and ``token`` are for members of a cluster
    (`EtcdCluster`).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        client_port: int | None = None,
        peer_port: int | None = None,
        name: str = "etcd",
        binary: Path | None = None,
        book: records.Records | None = None,
        announce: process.Announce = _quiet,
        peers: Callable[[], str] | None = None,
        token: Callable[[], str] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / f"{name}.log"
        self.client_port = client_port or ports.free_port()
        self.peer_port = peer_port or ports.free_port()
        self.name = name
        self._binary = binary
        self._book = book or records.Records(data_dir)
        self._announce = announce
        self._peers = peers or (lambda: self.as_peer)
        # The cluster's id is made from its peers and this token. A new one for each new data folder makes a
        # wiped etcd a different cluster, which it is. With data at hand etcd ignores it.
        self._token = token or (lambda: secrets.token_hex(8))
        self._is_alone = peers is None
        self._child: process.Child | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect: "127.0.0.1:PORT"."""
        return f"{ports.HOST}:{self.client_port}"

    @property
    def as_peer(self) -> str:
        """The member, as ``--initial-cluster`` wants it."""
        return f"{self.name}=http://{ports.HOST}:{self.peer_port}"

    @property
    def pid(self) -> int:
        """PID of the running server; raises `FailedPrecondition` if it does not run."""
        return self._started().pid

    @property
    def is_unfit(self) -> bool:
        """Whether nothing better was to be had than a version that is known to lose data; once started."""
        return self._binary is not None and etcd_binary.objection_to(self._binary) is not None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended; a frozen one runs."""
        return self._child is not None and self._child.is_running

    def start(self, cancel: threading.Event | None = None) -> None:
        """Start it and return when it answers.

        Raises `Unavailable` with the end of its log if it does not within 30 s or no etcd can be had,
        `FailedPrecondition` if it runs already, `DeadlineExceeded` if ``cancel`` is set meanwhile.
        """
        cancel = cancel or threading.Event()
        try:
            self.launch(cancel)
            self.wait_until_ready(cancel)
        except BaseException:
            self.stop()
            raise

    def launch(self, cancel: threading.Event) -> None:
        """The first half of `start`: the process runs. A member of a cluster answers only with its quorum."""
        self._binary = self._binary or etcd_binary.find(announce=self._announce, cancel=cancel)
        if self._child is None:
            self._child = process.Child(
                self.name,
                self._command(self._binary),
                log_path=self.log_path,
                book=self._book,
                env=_environment(),
            )
        self._clear_unfinished()
        self._child.start()

    def wait_until_ready(self, cancel: threading.Event) -> None:
        """The second half of `start`: it answers a linearizable read, so it has a leader."""
        is_ready = functools.partial(is_healthy, self.client_port)
        self._started().wait_until(
            is_ready, timeout_seconds=READY_TIMEOUT_SECONDS, cancel=cancel, port=self.client_port
        )
        _touch_durably(self._finished_mark)

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop it; SIGKILL after ``grace_seconds``. One that does not run is no error."""
        if self._child is not None:
            self._child.stop(grace_seconds)

    def restart(self) -> None:
        """Stop and start, on the same ports with the same data."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Stop it and throw its data away; the next start makes a new cluster with another id."""
        self.stop()
        self._throw_away()
        self._child = None

    def kill(self) -> None:
        """SIGKILL; its data stays, `start` brings it back."""
        self._started().kill()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._started().freeze()

    def thaw(self) -> None:
        """SIGCONT after `freeze`."""
        self._started().thaw()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _state_dir(self) -> Path:
        return self.data_dir / f"{self.name}.data"

    @property
    def _finished_mark(self) -> Path:
        return self._state_dir / "was-ready"

    def _clear_unfinished(self) -> None:
        """Throw away the data of a first start that did not get to its end.

        An etcd that is killed between making its log and writing itself down as a member never elects a leader
        again. Nobody was told its address then, so there is nothing in it; the mark, made before `start`
        returns, tells. A member of a cluster is left alone: it may have a vote in what others know.
        """
        if self._is_alone and not self._finished_mark.exists():
            self._throw_away()
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _throw_away(self) -> None:
        self._finished_mark.unlink(missing_ok=True)  # first: half of the data with the mark would look whole
        shutil.rmtree(self._state_dir, ignore_errors=True)

    def _started(self) -> process.Child:
        if self._child is None:
            raise errors.FailedPrecondition(f"{self.name} does not run")
        return self._child

    def _command(self, binary: Path) -> list[str]:
        client_url = f"http://{self.endpoint}"
        peer_url = f"http://{ports.HOST}:{self.peer_port}"
        flags: dict[str, str | int | Path] = {
            "name": self.name,
            "data-dir": self._state_dir / "etcd",
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-peer-urls": peer_url,
            "initial-advertise-peer-urls": peer_url,
            "initial-cluster": self._peers(),
            "initial-cluster-token": self._token(),
            "initial-cluster-state": "new",
            "heartbeat-interval": _HEARTBEAT_MS,
            "election-timeout": _ELECTION_MS,
            "auto-compaction-mode": "periodic",
            "auto-compaction-retention": _COMPACTION_RETENTION,
            "quota-backend-bytes": _QUOTA_BYTES,
            "max-txn-ops": _TXN_OPS_MAX,
            "max-request-bytes": _REQUEST_BYTES_MAX,
            "snapshot-count": _SNAPSHOT_COUNT,
            "logger": "zap",
            "log-outputs": "stderr",
            "log-level": "warn",
        }
        return [str(binary), *(f"--{name}={value}" for name, value in flags.items())]


class EtcdCluster:
    """Several etcd members on 127.0.0.1, one quorum; a context manager.

    `members` are single `EtcdServer` objects, to be killed, frozen and started again one by one.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        size: int = 3,
        binary: Path | None = None,
        announce: process.Announce = _quiet,
    ) -> None:
        token = secrets.token_hex(8)
        self._book = records.Records(data_dir)
        self._announce = announce
        self._binary = binary
        self.members = [
            EtcdServer(
                data_dir,
                name=f"etcd{number}",
                binary=binary,
                book=self._book,
                announce=announce,
                peers=self._initial_cluster,
                token=lambda: token,
            )
            for number in range(size)
        ]

    @property
    def endpoints(self) -> list[str]:
        """Where clients connect: "127.0.0.1:PORT" of each member."""
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        """Start all members that do not run and return when each answers. Raises as `EtcdServer.start` does."""
        cancel = threading.Event()
        starting = [member for member in self.members if not member.is_running]
        try:
            for member in starting:
                member.launch(cancel)
            for member in starting:
                member.wait_until_ready(cancel)
        except BaseException:
            self.stop()
            raise

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop all members; ``grace_seconds`` are for each."""
        # One after the other: a leader hands over before it goes, and if those that it would hand over to are
        # told to stop at the same time, it waits for them for 5 s. What is left when the quorum has gone may
        # wait for them just so; it can commit nothing any more, and is killed soon.
        quorum = len(self.members) // 2 + 1
        running = [member for member in self.members if member.is_running]
        for left, member in zip(range(len(running), 0, -1), running, strict=True):
            member.stop(grace_seconds if left >= quorum else min(grace_seconds, _MINORITY_GRACE_SECONDS))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _initial_cluster(self) -> str:
        return ",".join(member.as_peer for member in self.members)


def is_healthy(client_port: int) -> bool:
    """Whether the etcd on this port of 127.0.0.1 has just completed a linearizable read."""
    connection = http.client.HTTPConnection(ports.HOST, client_port, timeout=2)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return False
    return isinstance(answer, dict) and answer.get("health") == "true"


def _touch_durably(path: Path) -> None:
    """Make an empty file that is still there after a power cut."""
    if path.exists():
        return
    path.touch()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _environment() -> dict[str, str]:
    environment = etcd_binary.clean_environment()
    if (machine := platform.machine()) in ("aarch64", "arm64"):
        environment["ETCD_UNSUPPORTED_ARCH"] = "arm64"  # 3.4 refuses to start on it otherwise
    elif machine != "x86_64":
        environment["ETCD_UNSUPPORTED_ARCH"] = machine
    return environment
