"""Real servers for tests: an etcd and a PostgreSQL for each pytest process, a database or prefix for each test.

They are started by `leasehold.devstack`. The second way is Docker, through testcontainers: with
``LEASEHOLD_TEST_SERVERS=docker``, or where the embedded ones cannot be had and an engine answers. That way was
written on a machine without an engine and has not been run there.

A test that kills or freezes its server takes `own_etcd` or `own_postgres`, which is nobody else's.
"""

import contextlib
import os
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psycopg
import pytest
from leasehold import devstack
from leasehold.core import errors
from psycopg import sql

_ETCD_IMAGE = "quay.io/coreos/etcd:v3.5.21"
_POSTGRES_IMAGE = "postgres:17"


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint "host:port" of an etcd that the tests of this process share: keep under `etcd_prefix`."""
    folder = tmp_path_factory.mktemp("etcd")
    with contextlib.ExitStack() as stack:
        yield _enter(stack, lambda: _embedded_etcd(folder), _etcd_container)


@pytest.fixture
def etcd_prefix() -> str:
    """A key prefix of the shared etcd that no other test uses; ends with a slash."""
    return f"/test/{uuid.uuid4().hex}/"


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[devstack.EtcdServer]:
    """A started etcd of this test alone, to be killed, frozen, wiped."""
    with devstack.EtcdServer(tmp_path / "own-etcd") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Superuser's DSN (a URL) of a PostgreSQL that the tests of this process share; see `postgres_dsn`."""
    folder = tmp_path_factory.mktemp("postgres")
    with contextlib.ExitStack() as stack:
        yield _enter(stack, lambda: _embedded_postgres(folder), _postgres_container)


@pytest.fixture
def postgres_dsn(postgres_server: str) -> Iterator[str]:
    """DSN (a URL) of an empty database of this test's own, dropped at the end, connections or not."""
    database = f"test_{uuid.uuid4().hex}"
    name = sql.Identifier(database)
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
    try:
        yield urllib.parse.urlsplit(postgres_server)._replace(path=f"/{database}").geturl()
    finally:
        with psycopg.connect(postgres_server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[devstack.PostgresServer]:
    """A started PostgreSQL of this test alone, to be killed or frozen; its `dsn` is an empty database."""
    with devstack.PostgresServer(tmp_path / "own-postgres") as server:
        yield server


def _enter(
    stack: contextlib.ExitStack,
    embedded: Callable[[], AbstractContextManager[str]],
    container: Callable[[], AbstractContextManager[str]],
) -> str:
    if os.environ.get("LEASEHOLD_TEST_SERVERS") == "docker":
        return stack.enter_context(container())
    try:
        return stack.enter_context(embedded())
    except errors.Unavailable:
        if not _does_docker_answer():
            raise
    return stack.enter_context(container())


@contextlib.contextmanager
def _embedded_etcd(folder: Path) -> Iterator[str]:
    with devstack.EtcdServer(folder) as server:
        yield server.endpoint


@contextlib.contextmanager
def _embedded_postgres(folder: Path) -> Iterator[str]:
    with devstack.PostgresServer(folder) as server:
        yield server.admin_dsn


# testcontainers is imported where it is used: importing it looks for an engine and takes a while.


def _does_docker_answer() -> bool:
    import docker  # type: ignore[import-untyped]  # it has no stubs, and this is its only use

    try:
        return bool(docker.from_env(timeout=3).ping())
    except docker.errors.DockerException:
        return False


@contextlib.contextmanager
def _etcd_container() -> Iterator[str]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import HttpWaitStrategy

    # The same flags as devstack's, so that short leases are granted as asked.
    command = (
        "etcd --listen-client-urls=http://0.0.0.0:2379 --advertise-client-urls=http://127.0.0.1:2379 "
        "--heartbeat-interval=20 --election-timeout=200 --max-txn-ops=4096"
    )
    container = DockerContainer(_ETCD_IMAGE).with_command(command).with_exposed_ports(2379)
    with container.waiting_for(HttpWaitStrategy(2379, "/health").for_status_code(200)) as started:
        yield f"{started.get_container_host_ip()}:{started.get_exposed_port(2379)}"


@contextlib.contextmanager
def _postgres_container() -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer

    with PostgresContainer(_POSTGRES_IMAGE, driver=None) as started:
        yield started.get_connection_url()
