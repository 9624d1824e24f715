"""Roles of certificates: what each may do, for which nodes one stands, and what a wrong file is told."""

from pathlib import Path
from typing import Any

import pytest
from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.api.common.v1 import metrics_service_pb2
from leasehold.api.job.v1 import job_service_pb2
from leasehold.api.node.v1 import node_service_pb2
from leasehold.core import access, errors
from leasehold.core.access import Role
from leasehold.rpc import access as rpc_access
from leasehold.runtime import roles_yaml

ROLES = access.decode(
    {
        "roles": [
            {"certificate": "ops-*", "role": "admin"},
            {"certificate": "gateway", "role": "operator"},
            {"certificate": "worker-*", "role": "worker"},
            {"certificate": "*.hosts.internal", "role": "agent"},
            {"certificate": "rack-7", "role": ["agent", "reader"], "nodes": ["r620-7?"]},
            {"certificate": "grafana", "role": "reader"},
        ]
    }
)


def may(name: str, method: str) -> bool:
    (found,) = [full for full in rpc_access.METHODS if full.endswith(f"/{method}")]
    return ROLES.allows([name], rpc_access.METHODS[found])


@pytest.mark.parametrize(
    ("name", "may_call", "may_not_call"),
    [
        ("ops-alice", "PutBudget OrderNode SyncNode HoldLeases PutQueue GetJob", ""),
        (
            "gateway",
            "OrderNode GetBudgetStatus ForceReleaseAllocation SubmitJob",
            "PutBudget SyncNode DeleteQueue",
        ),
        (
            "worker-3",
            "HoldLeases SubmitJobs RenewAllocation GetJob",
            "PutBudget OrderNode SyncNode AcknowledgeSilence",
        ),
        ("a.hosts.internal", "SyncNode ReportNode Check", "GetNode HoldLeases OrderNode SubmitJob"),
        ("rack-7", "SyncNode ListNodes", "HoldLeases OrderNode"),
        ("grafana", "ExposeMetrics ListJobs WatchBudget", "SubmitJob AcquireLease SyncNode"),
        ("stranger", "", "Check GetBudget ExposeMetrics SyncNode PutBudget"),
        ("Worker-3", "", "HoldLeases"),
    ],
)
def test_a_certificate_may_do_what_its_roles_may(name: str, may_call: str, may_not_call: str) -> None:
    assert [method for method in may_call.split() if not may(name, method)] == []
    assert [method for method in may_not_call.split() if may(name, method)] == []


def test_a_certificate_has_the_roles_of_all_its_names() -> None:
    names = ("spiffe://prod/worker", "worker-1", "a.hosts.internal")
    assert ROLES.allows(names, frozenset({Role.WORKER}))
    assert ROLES.allows(names, frozenset({Role.AGENT}))
    assert not ROLES.allows((), frozenset(Role))


def test_an_agent_stands_for_its_own_name_or_for_those_that_its_rule_tells() -> None:
    assert ROLES.is_node(["r620-1.hosts.internal"], "r620-1.hosts.internal")
    assert ROLES.is_node(["r620-1.hosts.internal"], "r620-1")
    assert not ROLES.is_node(["r620-1.hosts.internal"], "r620-2")
    assert not ROLES.is_node(["r620-1.hosts.internal"], "")
    assert ROLES.is_node(["rack-7"], "r620-71")
    assert not ROLES.is_node(["rack-7"], "r620-7")
    assert not ROLES.is_node(["rack-7"], "rack-7")
    assert ROLES.is_node(["ops-alice"], "ops-alice")
    assert not ROLES.is_node(["worker-1"], "worker-1")


def test_every_method_of_the_api_has_its_roles() -> None:
    files = (budget_service_pb2, node_service_pb2, job_service_pb2, metrics_service_pb2)
    offered = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    told = {method for method in rpc_access.METHODS if method.startswith("/leasehold.")}
    assert told == offered


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (None, "roles"),
        ([], "roles"),
        ({"roles": []}, "roles"),
        ({"roles": [{}], "more": 1}, "roles"),
        ({"roles": ["admin"]}, "roles[0]"),
        ({"roles": [{"certificate": "a"}]}, "roles[0].role"),
        ({"roles": [{"certificate": "a", "role": "root"}]}, "roles[0].role"),
        ({"roles": [{"certificate": "a", "role": []}]}, "roles[0].role"),
        ({"roles": [{"certificate": "a", "role": [["admin"]]}]}, "roles[0].role"),
        ({"roles": [{"role": "admin"}]}, "roles[0].certificate"),
        ({"roles": [{"certificate": "", "role": "admin"}]}, "roles[0].certificate"),
        ({"roles": [{"certificate": "a" * 256, "role": "admin"}]}, "roles[0].certificate"),
        ({"roles": [{"certificate": "a", "role": "admin", "rol": 1}]}, "roles[0].rol"),
        ({"roles": [{"certificate": "a", "role": "agent", "nodes": "b"}]}, "roles[0].nodes"),
        ({"roles": [{"certificate": "a", "role": "agent", "nodes": [1]}]}, "roles[0].nodes[0]"),
        ({"roles": [{"certificate": "a", "role": "reader", "nodes": ["b"]}]}, "roles[0].nodes"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(document: Any, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        access.decode(document)
    assert refusal.value.field == field
    assert refusal.value.message.startswith(field)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text("roles: [{certificate: ops, role: admin}]")
    path.chmod(0o644)
    assert roles_yaml.read(path).allows(["ops"], frozenset({Role.ADMIN}))
    path.chmod(0o664)
    with pytest.raises(errors.InvalidArgument, match="written by others"):
        roles_yaml.read(path)
    with pytest.raises(errors.InvalidArgument, match="No such file"):
        roles_yaml.read(tmp_path / "none.yaml")
