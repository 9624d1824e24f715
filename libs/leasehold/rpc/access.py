"""Which methods each role may call, and the guard that keeps a server's calls to that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import grpc
from leasehold.core import access, errors
from leasehold.core.access import Role
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_API: Final = "/leasehold.api"
_ANYBODY: Final = frozenset(Role)
_READING: Final = frozenset({Role.READER})
_WORKING: Final = frozenset({Role.WORKER})
_HOSTING: Final = frozenset({Role.AGENT})
_OPERATING: Final = frozenset({Role.OPERATOR})
_ADMINISTRATION: Final = frozenset({Role.ADMIN})

#: By service: who may call what.
_GROUPS: Final[Mapping[str, Mapping[frozenset[Role], str]]] = {
    f"{_API}.budget.v1.BudgetService": {
        _READING: "GetBudget ListBudgets GetBudgetStatus WatchBudget ExplainLease ListLedgerEntries PlanShares",
        _WORKING: "HoldLeases AcquireLease RenewLease ReleaseLease",
        _ADMINISTRATION: "PutBudget DeleteBudget",
    },
    f"{_API}.node.v1.NodeService": {
        _READING: "ListNodes GetNode WatchNodes FollowWorkerLog",
        _HOSTING: "SyncNode ReportNode",
        _OPERATING: "DeleteNode OrderNode",
    },
    f"{_API}.job.v1.JobService": {
        _READING: (
            "GetJob ListJobs WatchJob ExplainJob FollowJobLog GetUtilization AuditAllocations ListQueues"
        ),
        _WORKING: "SubmitJob SubmitJobs CancelJob AcquireAllocation RenewAllocation ReleaseAllocation",
        _OPERATING: "ForceReleaseAllocation AcknowledgeSilence",
        _ADMINISTRATION: "PutQueue DeleteQueue",
    },
    f"{_API}.common.v1.MetricsService": {_READING: "ExposeMetrics"},
    "/grpc.health.v1.Health": {_ANYBODY: "Check Watch List"},
}

#: Methods by their full names, each with the roles that may call it. What is not here is for admins only.
METHODS: Final[Mapping[str, frozenset[Role]]] = {
    f"{service}/{name}": roles
    for service, groups in _GROUPS.items()
    for roles, names in groups.items()
    for name in names.split()
}


def names_of(context: _Context) -> tuple[str, ...]:
    """The names in the caller's certificate: its subject alternative names, then its common name."""
    certificate = context.auth_context()
    return tuple(
        name.decode("utf-8", "replace")
        for kind in ("x509_subject_alternative_name", "x509_common_name")
        for name in certificate.get(kind, ())
    )


class Guard:
    """Keeps calls to the roles of their certificates. `roles` may be replaced at any time, for later calls."""

    def __init__(self, roles: access.Roles) -> None:
        self.roles = roles

    def check(self, method: str, context: _Context) -> None:
        """Raise `PermissionDenied` unless the caller may call a method (``/package.Service/Method``)."""
        names = names_of(context)
        needed = METHODS.get(method, _ADMINISTRATION)
        if not self.roles.allows(names, needed):
            _log.warning("call_refused", method=method, certificate=names, peer=context.peer())
            wanted = " or ".join(role.value for role in Role if role in needed)
            raise errors.PermissionDenied(
                f"a certificate of {_told(names)} may not call {method.rpartition('/')[2]}: "
                f"that is for the role {wanted}"
            )

    def check_node(self, node: str, context: _Context) -> None:
        """Raise `PermissionDenied` unless the caller's certificate stands for a node."""
        names = names_of(context)
        if not self.roles.is_node(names, node):
            _log.warning("node_refused", node=node, certificate=names, peer=context.peer())
            raise errors.PermissionDenied(
                f"a certificate of {_told(names)} does not stand for node {node}", field="registration.name"
            )


def _told(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no name"
