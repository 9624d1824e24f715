"""A real PostgreSQL on loopback, as a child process."""

import contextlib
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import psycopg
from leasehold.core import errors
from leasehold.devstack import ports, postgres_binary, process, records, unprivileged
from psycopg import conninfo, sql

READY_TIMEOUT_SECONDS = 60.0  # recovery after a kill replays the log
STOP_GRACE_SECONDS = 10.0
DATABASE = "leasehold"
USER = "leasehold"

_INITDB_TIMEOUT_SECONDS = 120.0
_ORPHANS_TIMEOUT_SECONDS = 5.0  # for backends to notice that the postmaster is dead

# What keeps an acknowledged write through a kill (fsync, synchronous_commit, full_page_writes) stays as it
# comes: on.
_SETTINGS = {
    "listen_addresses": ports.HOST,
    "unix_socket_directories": "",
    "max_connections": "200",  # several allocators with a pool each, and tests beside them
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "cluster_name": "leasehold",
}


def _quiet(_: str) -> None:
    pass


class PostgresServer:
    """One PostgreSQL on 127.0.0.1; a context manager that starts and stops it.

    Data, log and password live in ``data_dir`` and survive a restart. A port that is None is chosen once and
    kept for this object's life. ``settings`` are added to its configuration.

    It listens on TCP only, asks for a password (random, in a file of mode 0600, never on a command line), and
    is not run as root: see `unprivileged`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        book: records.Records | None = None,
        announce: process.Announce = _quiet,
    ) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / "postgres.log"
        self.port = port or ports.free_port()
        self._settings = _SETTINGS | dict(settings or {})
        self._book = book or records.Records(data_dir)
        self._announce = announce
        self._child: process.Child | None = None

    @property
    def dsn(self) -> str:
        """URL of the database ``leasehold``, with the password: hand it on in the environment, not in argv."""
        return self.dsn_of(DATABASE)

    @property
    def admin_dsn(self) -> str:
        """URL of the database ``postgres``, as superuser: to make and drop databases."""
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        """URL of any database of this server. Raises `FailedPrecondition` before the first start."""
        try:
            password = self._password_path.read_text()
        except FileNotFoundError as error:
            raise errors.FailedPrecondition(f"{self.data_dir} was never started") from error
        return f"postgresql://{USER}:{password}@{ports.HOST}:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """PID of the running server (the postmaster); raises `FailedPrecondition` if it does not run."""
        return self._started().pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended; a frozen one runs."""
        return self._child is not None and self._child.is_running

    def start(self, cancel: threading.Event | None = None) -> None:
        """Start it, made anew where ``data_dir`` is empty, and return when it answers queries.

        Raises `Unavailable` with the end of its log if it does not within 60 s, `FailedPrecondition` if it, or
        another PostgreSQL, runs on this folder, `DeadlineExceeded` if ``cancel`` is set meanwhile.
        """
        cancel = cancel or threading.Event()
        try:
            self._launch(cancel)
            self._started().wait_until(
                self._is_ready, timeout_seconds=READY_TIMEOUT_SECONDS, cancel=cancel, port=self.port
            )
            self._create_database()
        except BaseException:
            self.stop()
            raise

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop it; clients are cut off. SIGKILL after ``grace_seconds``. One that does not run is no error."""
        if self._child is not None:
            self._child.stop(grace_seconds)

    def restart(self) -> None:
        """Stop and start, on the same port with the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL of the postmaster and its backends; `start` brings it back through recovery."""
        self._started().kill()

    def freeze(self) -> None:
        """SIGSTOP of the postmaster and its backends: connections stay open, nothing is answered."""
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
    def _cluster_dir(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def _password_path(self) -> Path:
        return self.data_dir / "password"

    def _started(self) -> process.Child:
        if self._child is None:
            raise errors.FailedPrecondition("postgres does not run")
        return self._child

    def _launch(self, cancel: threading.Event) -> None:
        if self._child is not None:
            self._child.check_not_running()
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        programs = postgres_binary.find(_major_of(self._cluster_dir))
        way = unprivileged.choose(programs / "postgres", self.data_dir, cancel)
        if not self._cluster_dir.exists():
            self._initialise(programs, way, cancel)
        _clear_stale_lock(self._cluster_dir)
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        self._child = process.Child(
            "postgres",
            [str(programs / "postgres"), "-D", str(self._cluster_dir), "-p", str(self.port), *settings],
            log_path=self.log_path,
            book=self._book,
            # SIGTERM would wait until every client has gone, which may be never; SIGINT cuts them off in order.
            stop_signal=signal.SIGINT,
            prefix=way.prefix,
            env=_environment(),
            cwd=self.data_dir,
        )
        self._child.start()

    def _initialise(self, programs: Path, way: unprivileged.Way, cancel: threading.Event) -> None:
        """Make the cluster under another name and rename it when it is whole: a start that is interrupted here
        leaves nothing that the next one would take for a cluster.
        """
        began = time.monotonic()
        for old in self.data_dir.glob("new-*"):
            shutil.rmtree(old, ignore_errors=True)
        # A name of its own: where nobody ended it, the initdb of a killed owner may still be at work.
        draft = self.data_dir / f"new-{secrets.token_hex(4)}"
        _write_private(self._password_path, secrets.token_urlsafe(24))
        os.chown(self._password_path, way.owner_uid, -1)
        initdb = process.Child(
            "initdb",
            [
                str(programs / "initdb"),
                f"--pgdata={draft}",
                f"--username={USER}",
                f"--pwfile={self._password_path}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",  # the machine's locales are not known, and the same order everywhere is wanted
            ],
            log_path=self.data_dir / "initdb.log",
            book=self._book,
            stop_signal=signal.SIGKILL,
            prefix=way.prefix,
            env=_environment(),
            cwd=self.data_dir,
        )
        initdb.start()
        initdb.finish(timeout_seconds=_INITDB_TIMEOUT_SECONDS, cancel=cancel)
        draft.rename(self._cluster_dir)
        self._announce(f"made a PostgreSQL cluster in {self.data_dir}, {time.monotonic() - began:.1f} s")

    def _is_ready(self) -> bool:
        try:
            with psycopg.connect(self.admin_dsn, connect_timeout=2) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _create_database(self) -> None:
        try:
            with psycopg.connect(self.admin_dsn, autocommit=True) as connection:
                known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE])
                if known.fetchone() is None:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        except psycopg.Error as error:
            raise errors.PostgresUnavailable(f"cannot make the database {DATABASE}: {error}") from error


def host_and_port(dsn: str) -> str:
    """Where a DSN points, "HOST:PORT", without user and password. Raises `InvalidArgument` if it is no DSN."""
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.Error as error:
        raise errors.InvalidArgument(
            f"not a PostgreSQL DSN: {error}", field="LEASEHOLD_POSTGRES_DSN"
        ) from error
    return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}"


def _major_of(cluster_dir: Path) -> int | None:
    try:
        return int((cluster_dir / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None


def _clear_stale_lock(cluster_dir: Path) -> None:
    """Remove a ``postmaster.pid`` that a killed server left behind.

    The server would refuse to start if the PID in it is some process of the same user by now, and after a
    reboot of a container it often is. Who really uses the cluster has it as its working folder, the backends
    too: those of a killed postmaster end by themselves within moments and are waited for, and anyone left is an
    error.
    """
    lock = cluster_dir / "postmaster.pid"
    postmaster = lock.read_text().partition("\n")[0] if lock.exists() else ""
    deadline = time.monotonic() + _ORPHANS_TIMEOUT_SECONDS
    while users := _processes_in(cluster_dir):
        if postmaster in users or time.monotonic() >= deadline:
            raise errors.FailedPrecondition(
                f"another PostgreSQL runs on {cluster_dir}, PID {', '.join(users)}", metadata={"pid": users[0]}
            )
        time.sleep(0.02)
    lock.unlink(missing_ok=True)


def _processes_in(cluster_dir: Path) -> list[str]:
    """PIDs, in ascending order, of the processes whose working folder this is, so far as may be seen."""
    wanted = os.path.realpath(cluster_dir)
    found = []
    for pid in sorted(psutil.pids()):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == wanted:
                found.append(str(pid))
    return found


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _environment() -> dict[str, str]:
    """The environment of this process without ``PG*``, which the programs would take for settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}
