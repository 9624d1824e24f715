"""Roles by real certificates: what a reader, an agent and an admin may do, and a file of roles that changes."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import allocator_kit as kit
import grpc
import pytest
from allocator_kit import until
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as node_wire
from leasehold.api.node.v1 import node_service_pb2_grpc as node_grpc
from leasehold.core import errors
from leasehold.rpc import channel, methods
from leasehold.rpc import errors as rpc_errors
from tls_kit import Authority, make_authority

MakeFleet = Callable[..., kit.Fleet]

ROLES = """
roles:
  - {certificate: ops, role: admin}
  - {certificate: r620-1.hosts, role: agent}
  - {certificate: grafana, role: reader}
"""


class Guarded:
    """An allocator with mutual TLS and roles, and calls to it as the holder of a certificate."""

    def __init__(self, fleet: kit.Fleet, authority: Authority, roles: Path) -> None:
        self.member = fleet.members[0]
        self.roles = roles
        self._authority = authority

    @contextlib.asynccontextmanager
    async def channel(self, name: str) -> AsyncIterator[grpc.aio.Channel]:
        files = self._authority.issue(name)
        async with channel.open_channel(self.member.address, tls_files=files, has_own_connection=True) as made:
            yield made

    async def call(self, name: str, method: str, request: Any) -> Any:
        async with self.channel(name) as made:
            try:
                return await methods.unary(method, request)(made)(request, timeout=10)
            except grpc.RpcError as error:
                raise rpc_errors.from_rpc_error(error) from error


@pytest.fixture
async def guarded(make_fleet: MakeFleet, tmp_path: Path) -> Guarded:
    authority = make_authority(tmp_path, "authority")
    own = authority.issue("allocator")
    roles = tmp_path / "roles.yaml"
    roles.write_text(ROLES)
    roles.chmod(0o600)
    fleet = make_fleet(
        LEASEHOLD_TLS_CERTIFICATE_FILE=str(own.certificate_file),
        LEASEHOLD_TLS_KEY_FILE=str(own.key_file),
        LEASEHOLD_TLS_CA_FILE=str(own.ca_file),
        LEASEHOLD_ROLES_FILE=str(roles),
    )
    fleet.members[0].start()
    made = Guarded(fleet, authority, roles)

    async def leads() -> bool:
        with contextlib.suppress(errors.Unavailable):
            # Only once it has read Postgres it takes a change.
            await made.call("ops", "PutBudget", wire.PutBudgetRequest(budget=kit.budget("llm")))
            return True
        return False

    await until(leads, "it leads")
    return made


def registration(name: str) -> node_wire.NodeRegistration:
    return node_wire.NodeRegistration(
        name=name,
        node_id=f"id-of-{name}",
        incarnation=1,
        boot_id=f"boot-of-{name}",
        pid_namespace=1,
        resources=node_pb2.NodeResources(cpus=4, memory_bytes=2**33),
    )


async def test_each_certificate_may_do_what_its_role_may(guarded: Guarded) -> None:
    put = wire.PutBudgetRequest(budget=kit.budget("llm"))
    with pytest.raises(
        errors.PermissionDenied, match=r"of .*grafana may not call PutBudget: .* the role admin"
    ):
        await guarded.call("grafana", "PutBudget", put)
    await guarded.call("ops", "PutBudget", put)
    listed = await guarded.call("grafana", "ListBudgets", wire.ListBudgetsRequest())
    assert [budget.name for budget in listed.budgets] == ["llm"]
    for stranger in ("stranger", "r620-1.hosts"):
        with pytest.raises(errors.PermissionDenied):
            await guarded.call(stranger, "ListBudgets", wire.ListBudgetsRequest())


async def test_an_agent_registers_under_the_name_of_its_certificate_only(guarded: Guarded) -> None:
    async def answer(certificate: str, name: str) -> node_wire.SyncNodeResponse:
        async with guarded.channel(certificate) as made:
            stream = node_grpc.NodeServiceStub(made).SyncNode()
            try:
                await stream.write(
                    node_wire.SyncNodeRequest(
                        sequence=1, registration=registration(name), status=node_pb2.NodeStatus()
                    )
                )
                response = await stream.read()
                assert isinstance(response, node_wire.SyncNodeResponse)
                return response
            except grpc.RpcError as error:
                raise rpc_errors.from_rpc_error(error) from error
            finally:
                stream.cancel()

    assert (await answer("r620-1.hosts", "r620-1")).HasField("terms")
    with pytest.raises(errors.PermissionDenied, match="does not stand for node r620-2"):
        await answer("r620-1.hosts", "r620-2")
    with pytest.raises(errors.PermissionDenied, match="may not call SyncNode: that is for the role agent"):
        await answer("grafana", "grafana")
    once = node_wire.ReportNodeRequest(registration=registration("r620-3"))
    with pytest.raises(errors.PermissionDenied, match="does not stand for node r620-3"):
        await guarded.call("r620-1.hosts", "ReportNode", once)
    nodes = await guarded.call("ops", "ListNodes", node_wire.ListNodesRequest())
    assert [node.name for node in nodes.nodes] == ["r620-1"]


async def test_a_file_that_changes_is_followed_and_a_wrong_one_is_not(guarded: Guarded) -> None:
    async def may_read() -> bool:
        try:
            await guarded.call("newcomer", "ListBudgets", wire.ListBudgetsRequest())
        except errors.PermissionDenied:
            return False
        return True

    assert not await may_read()
    guarded.roles.write_text(ROLES + "  - {certificate: newcomer, role: reader}\n")
    await until(may_read, "the new rule is in force")
    guarded.roles.write_text("roles: [{certificate: newcomer, role: king}]\n")
    await until(lambda: "roles_file_refused" in guarded.member.log(), "the wrong file is told")
    assert "roles[0].role: 'king' is none of" in guarded.member.log()
    assert await may_read()
