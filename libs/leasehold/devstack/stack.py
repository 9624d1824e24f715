"""etcd and PostgreSQL together, for one data folder with one owner."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from leasehold.core import errors
from leasehold.devstack import etcd, owner, parallel, ports, postgres, process, records

ETCD_ENDPOINTS_VARIABLE = "LEASEHOLD_ETCD_ENDPOINTS"
POSTGRES_DSN_VARIABLE = "LEASEHOLD_POSTGRES_DSN"
_ACCEPT_UNFIT_ETCD_VARIABLE = "LEASEHOLD_ACCEPT_UNFIT_ETCD"

STOP_GRACE_SECONDS = 10.0
LEFTOVER_GRACE_SECONDS = 5.0


class Stack:
    """An etcd and a PostgreSQL in one data folder; a context manager.

    A port that is None is a free one; a given one that is taken is an error which names the flag
    ``--etcd-port``, ``--etcd-peer-port`` or ``--postgres-port``. Where ``LEASEHOLD_ETCD_ENDPOINTS``
    ("host:port,host:port") or ``LEASEHOLD_POSTGRES_DSN`` is set, that part is not started and the user's own is
    used.

    Data survive; start a stack on the same folder again to find them. ``announce`` gets a line for each thing
    that a waiting person wants to know; it may be called from another thread.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        announce: process.Announce,
        etcd_port: int | None = None,
        etcd_peer_port: int | None = None,
        postgres_port: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.book = records.Records(self.data_dir)
        self.etcd: etcd.EtcdServer | None = None
        self.postgres: postgres.PostgresServer | None = None
        self._announce = announce
        self._environ = environ
        self._flags = {
            "--etcd-port": etcd_port,
            "--etcd-peer-port": etcd_peer_port,
            "--postgres-port": postgres_port,
        }
        self._owner = owner.Owner(self.data_dir)
        self._others: list[process.Child] = []

    @property
    def etcd_endpoints(self) -> list[str]:
        """Where etcd's clients connect: ["127.0.0.1:PORT"], or the user's own. Known once `start` has begun."""
        if given := self._environ.get(ETCD_ENDPOINTS_VARIABLE):
            return [endpoint.strip() for endpoint in given.split(",") if endpoint.strip()]
        if self.etcd is None:
            raise errors.FailedPrecondition("the stack was not started")
        return [self.etcd.endpoint]

    @property
    def postgres_dsn(self) -> str:
        """URL of the database, password included: hand it on in the environment, not in argv."""
        if given := self._environ.get(POSTGRES_DSN_VARIABLE):
            return given
        if self.postgres is None:
            raise errors.FailedPrecondition("the stack was not started")
        return self.postgres.dsn

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables by which an allocator finds both. The password is among them."""
        variables = {
            ETCD_ENDPOINTS_VARIABLE: ",".join(self.etcd_endpoints),
            POSTGRES_DSN_VARIABLE: self.postgres_dsn,
        }
        if self.etcd is not None and self.etcd.is_unfit:
            # It was warned about when it was taken.
            variables[_ACCEPT_UNFIT_ETCD_VARIABLE] = "true"
        return variables

    def start(self) -> None:
        """Take the folder, end what an earlier owner left, start both and return when both answer.

        Raises `FailedPrecondition` if the folder has an owner ("already running, PID n") or a port is taken,
        `Unavailable` if a server is not to be had or does not come up. Whatever is raised, Ctrl-C included,
        nothing is left running.
        """
        began = time.monotonic()
        self._owner.acquire()
        try:
            self.book.end_all(LEFTOVER_GRACE_SECONDS, self._announce)
            starts = [*self._prepare_etcd(), *self._prepare_postgres()]
            parallel.run_cancellable(starts)
        except OSError as error:
            self.stop()
            raise errors.FailedPrecondition(f"cannot use the data folder {self.data_dir}: {error}") from error
        except BaseException:
            self.stop()
            raise
        self._announce(f"the stack is ready, {time.monotonic() - began:.1f} s")

    def spawn(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> process.Child:
        """Start one more process that belongs to this stack, an allocator for instance.

        It is recorded, logs to ``NAME.log`` in the data folder, and `stop` ends it (SIGTERM) before the
        servers. Returns at once: readiness is the caller's question (`process.Child.wait_until`).
        """
        child = process.Child(name, command, log_path=self.data_dir / f"{name}.log", book=self.book, env=env)
        self._others.append(child)
        child.start()
        return child

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop everything that was started, and give the folder up. Again is no error.

        The processes of `spawn` first, the last one first, then both servers together. Each gets
        ``grace_seconds`` before SIGKILL.
        """
        servers = [server for server in (self.etcd, self.postgres) if server is not None]
        with contextlib.ExitStack() as steps:  # from the last to the first, and each whatever another raises
            steps.callback(self._owner.release)
            steps.callback(self._others.clear)
            steps.callback(parallel.run, [functools.partial(server.stop, grace_seconds) for server in servers])
            for child in self._others:
                steps.callback(child.stop, grace_seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _prepare_etcd(self) -> list[Callable[[threading.Event], None]]:
        if self._environ.get(ETCD_ENDPOINTS_VARIABLE):
            self._announce(f"using your etcd, {', '.join(self.etcd_endpoints)}")
            return []
        self.etcd = etcd.EtcdServer(
            self.data_dir / "etcd",
            client_port=self._port("--etcd-port"),
            peer_port=self._port("--etcd-peer-port"),
            book=self.book,
            announce=self._announce,
        )
        return [functools.partial(_start, "etcd", self.etcd, self.etcd.client_port, self._announce)]

    def _prepare_postgres(self) -> list[Callable[[threading.Event], None]]:
        if given := self._environ.get(POSTGRES_DSN_VARIABLE):
            self._announce(f"using your PostgreSQL, {postgres.host_and_port(given)}")
            return []
        self.postgres = postgres.PostgresServer(
            self.data_dir / "postgres",
            port=self._port("--postgres-port"),
            book=self.book,
            announce=self._announce,
        )
        return [functools.partial(_start, "PostgreSQL", self.postgres, self.postgres.port, self._announce)]

    def _port(self, flag: str) -> int | None:
        port = self._flags[flag]
        if port is not None:
            ports.check_free(port, flag)
            same = [other for other, its_port in self._flags.items() if its_port == port and other != flag]
            if same:
                raise errors.InvalidArgument(f"{flag} and {same[0]} are both {port}", field=flag)
        return port


def end_leftovers(
    data_dir: Path, *, announce: process.Announce, grace_seconds: float = LEFTOVER_GRACE_SECONDS
) -> list[records.Record]:
    """End what a killed owner of this folder left running, by identity; returns what was alive.

    Raises `FailedPrecondition` "already running, PID n" while the folder has a living owner (see `owner.stop`),
    `PermissionDenied` if a process is another user's. A folder that does not exist has nothing to end.
    """
    if not data_dir.exists():
        return []
    with owner.Owner(data_dir):
        return records.Records(data_dir).end_all(grace_seconds, announce)


def _start(
    name: str,
    server: etcd.EtcdServer | postgres.PostgresServer,
    port: int,
    announce: process.Announce,
    cancel: threading.Event,
) -> None:
    began = time.monotonic()
    server.start(cancel)
    announce(f"{name} answers on {ports.HOST}:{port}, PID {server.pid}, {time.monotonic() - began:.1f} s")
