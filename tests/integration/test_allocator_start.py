"""How an allocator starts, and what it refuses to start with: in one line, and before any server is asked."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import allocator_kit as kit
import grpc
import pytest
import tls_kit
from allocator_kit import until
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors
from leasehold.etcd.wire import rpc_pb2, rpc_pb2_grpc

MakeFleet = Callable[..., kit.Fleet]

#: Nothing listens there: whoever asks it first would wait for a minute.
NOWHERE = {"LEASEHOLD_ETCD_ENDPOINTS": "127.0.0.1:9", "LEASEHOLD_POSTGRES_DSN": "postgresql://127.0.0.1:9/none"}


def start(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one to its end, which must come at once."""
    return subprocess.run(
        [sys.executable, "-m", "leasehold.allocator", *flags],
        env={**os.environ, **NOWHERE, **env},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )


def test_an_open_address_without_tls_is_refused_at_once_in_one_line() -> None:
    ended = start("--listen", "0.0.0.0:7400")
    assert ended.returncode == 1
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("leasehold allocator: refusing to listen on 0.0.0.0:7400")
    assert "--tls-ca-file" in lines[0]


def test_a_misspelt_key_in_the_file_of_budgets_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "budgets.yaml"
    path.write_text("budgets:\n  - name: a\n    dimensions: {rpm_limit: 80}\n    polcy: max_min\n")
    ended = start("--budgets-file", str(path))
    assert ended.returncode == 1
    assert "budgets[0].polcy" in ended.stderr and "policy" in ended.stderr


def test_a_port_that_is_taken_is_told_with_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = start("--listen", f"127.0.0.1:{port}")
    assert ended.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in ended.stderr and "--listen" in ended.stderr


class _OldEtcd(rpc_pb2_grpc.MaintenanceServicer):
    """A member that tells a version which loses acknowledged writes; it serves nothing else."""

    def Status(self, request: rpc_pb2.StatusRequest, context: grpc.ServicerContext) -> rpc_pb2.StatusResponse:
        header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=1)
        return rpc_pb2.StatusResponse(header=header, version="3.5.2", leader=1)


@pytest.fixture
def old_etcd() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    rpc_pb2_grpc.add_MaintenanceServicer_to_server(_OldEtcd(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_an_etcd_that_loses_writes_is_refused_unless_the_risk_is_taken(old_etcd: str) -> None:
    ended = start("--listen=127.0.0.1:0", LEASEHOLD_ETCD_ENDPOINTS=old_etcd)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("leasehold allocator: etcd 3.5.2 can lose acknowledged writes")
        and "--accept-unfit-etcd" in last
    )

    ended = start("--listen=127.0.0.1:0", "--accept-unfit-etcd", LEASEHOLD_ETCD_ENDPOINTS=old_etcd)
    assert "etcd_unfit" in ended.stderr
    assert "can lose" not in ended.stderr.strip().splitlines()[-1]


async def test_started_before_its_etcd_it_says_that_it_cannot_serve_yet_and_serves_when_etcd_is_there(
    make_fleet: MakeFleet, own_etcd: devstack.EtcdServer
) -> None:
    own_etcd.stop()
    fleet = make_fleet(etcd=own_etcd.endpoint)
    member = fleet.members[0]
    member.start()
    stub = health_pb2_grpc.HealthStub(fleet.channel(member))
    service = health_pb2.HealthCheckRequest(service="leasehold.api.budget.v1.BudgetService")

    async def is_refused() -> bool:
        with pytest.raises(errors.Unavailable) as caught:
            await fleet.call("ListBudgets", wire.ListBudgetsRequest(), at=member)
        return isinstance(caught.value, errors.NotLeader) and caught.value.leader_address == ""

    await until(is_refused, "it answers that nobody leads")
    assert (await stub.Check(service)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    own_etcd.start()
    await fleet.ready()
    assert (await stub.Check(service)).status == health_pb2.HealthCheckResponse.SERVING
    assert await member.terminate() == 0


async def test_a_signal_ends_one_that_still_waits_for_etcd(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(etcd="127.0.0.1:9")
    member = fleet.members[0]
    member.start()
    await until(lambda: "waiting_for_etcd" in member.log(), "it waits")
    assert await member.terminate() == 0
    assert "Traceback" not in member.log()


async def test_a_restarted_allocator_serves_what_was_defined_and_leased_before(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    stored = await fleet.put(kit.budget(ttl_seconds=6.0))
    request = wire.AcquireLeaseRequest(budget="llm", holder="script", request_id="request-1")
    lease = (await fleet.call("AcquireLease", request)).grant
    leader.kill()
    leader.start()
    await fleet.ready()
    again = (await fleet.call("AcquireLease", request)).grant
    assert again.lease_id == lease.lease_id and again.amounts == lease.amounts
    assert (await fleet.call("GetBudget", wire.GetBudgetRequest(name="llm"))).budget == stored


def test_an_open_address_without_roles_is_refused_and_roles_without_tls_too(tmp_path: Path) -> None:
    own = tls_kit.make_authority(tmp_path, "authority").issue("allocator")
    files = [f"--tls-certificate-file={own.certificate_file}", f"--tls-key-file={own.key_file}"]
    files.append(f"--tls-ca-file={own.ca_file}")
    roles = tmp_path / "roles.yaml"
    roles.write_text("roles: [{certificate: ops, rol: admin}]")
    for flags, told in (
        (["--listen=0.0.0.0:7400", "--advertise=a:7400", *files], "without roles: tell by --roles-file"),
        ([f"--roles-file={roles}"], "--roles-file is of no use without mutual TLS"),
        ([f"--roles-file={roles}", *files], "roles[0].rol: unknown; known are certificate, role and nodes"),
    ):
        ended = start(*flags)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
        assert told in ended.stderr
