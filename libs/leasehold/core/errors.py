"""The one error tree.

Every error that leaves a module of Leasehold is one of these. ``reason`` is stable: programs match on it, so
once set it stays. ``rpc/errors.py`` maps each class to one gRPC status.

::

    LeaseholdError
     +-- InvalidArgument        the caller's input is wrong; `field` names where
     +-- NotFound               no such thing
     +-- AlreadyExists
     +-- FailedPrecondition     the state does not allow it
     |    +-- RefusedTogether    all of a request was to be taken, or none
     |    +-- ForeignEtcdCluster
     +-- StaleEpoch             another leader has taken over
     +-- VersionConflict        the version that was to be replaced was overtaken
     +-- Superseded             a newer incarnation of the holder has joined
     +-- NodeSuperseded         a newer agent of the node has registered
 +-- AllocationLapsed       the allocation was given up: its work must stop
     +-- ResourceExhausted      over a budget or a bound; `retry_after_seconds` tells when
 |    +-- NotPlaced          no node had room in time
     +-- Unavailable            a part is away; trying again may help
     |    +-- NotLeader         `leader_address` tells who is
     |    +-- EtcdUnavailable
     |    +-- PostgresUnavailable
     |    +-- NodeUnreachable    the node's agent is not connected
     +-- DeadlineExceeded
     +-- PermissionDenied
     +-- Unimplemented
"""

from collections.abc import Mapping
from typing import ClassVar


class LeaseholdError(Exception):
    """Something went wrong in Leasehold."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str | None = None,
        *,
        field: str | None = None,
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip().split("\n")[0]
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata or {})
        super().__init__(self.message)


class InvalidArgument(LeaseholdError):
    """The request is malformed; nothing was changed."""

    reason = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, field=field, metadata=metadata)


class CostAboveLimit(InvalidArgument):
    """One request costs more than the whole limit: it can never be admitted."""

    reason = "COST_ABOVE_LIMIT"


class NotFound(LeaseholdError):
    """There is no such thing."""

    reason = "NOT_FOUND"


class AlreadyExists(LeaseholdError):
    """There is one of that name already."""

    reason = "ALREADY_EXISTS"


class RequestIdReused(AlreadyExists):
    """This request id was used for another request."""

    reason = "REQUEST_ID_REUSED"


class FailedPrecondition(LeaseholdError):
    """The present state does not allow this."""

    reason = "FAILED_PRECONDITION"


class RefusedTogether(FailedPrecondition):
    """Another part of the same request was refused, and all of it was to be taken or none."""

    reason = "ALL_OR_NONE"


class ForeignEtcdCluster(FailedPrecondition):
    """This etcd is not the one whose epochs Postgres knows."""

    reason = "FOREIGN_ETCD_CLUSTER"


class StaleEpoch(LeaseholdError):
    """A newer leader has taken over."""

    reason = "STALE_EPOCH"


class VersionConflict(LeaseholdError):
    """The version that was to be replaced is not the present one.

    No kind of `StaleEpoch`, because the leader still leads: the caller reads again and decides again.
    """

    reason = "VERSION_CONFLICT"


class Superseded(LeaseholdError):
    """A newer incarnation of this holder has joined; this one must not go on."""

    reason = "HOLDER_SUPERSEDED"


class NodeSuperseded(LeaseholdError):
    """A newer agent of this node has registered; this one must not go on."""

    reason = "NODE_SUPERSEDED"


class AllocationLapsed(LeaseholdError):
    """The allocation was given up; whatever runs under it must stop."""

    reason = "ALLOCATION_LAPSED"


class ResourceExhausted(LeaseholdError):
    """Over a budget or a bound."""

    reason = "RESOURCE_EXHAUSTED"


class NotPlaced(ResourceExhausted):
    """No node had room in time; nothing is held."""

    reason = "NOT_PLACED"


class Unavailable(LeaseholdError):
    """A part is away; trying again may help."""

    reason = "UNAVAILABLE"


class NotLeader(Unavailable):
    """This allocator is not the leader."""

    reason = "NOT_LEADER"

    def __init__(self, leader_address: str = "") -> None:
        self.leader_address = leader_address
        where = f"the leader is at {leader_address}" if leader_address else "there is no leader now"
        super().__init__(
            f"this allocator is not the leader; {where}",
            retry_after_seconds=0.1,
            metadata={"leader_address": leader_address},
        )


class EtcdUnavailable(Unavailable):
    """etcd does not answer."""

    reason = "ETCD_UNAVAILABLE"


class PostgresUnavailable(Unavailable):
    """Postgres does not answer."""

    reason = "POSTGRES_UNAVAILABLE"


class NodeUnreachable(Unavailable):
    """The agent of this node is not connected."""

    reason = "NODE_UNREACHABLE"


class DeadlineExceeded(LeaseholdError):
    """The deadline passed before it was done."""

    reason = "DEADLINE_EXCEEDED"


class PermissionDenied(LeaseholdError):
    """The caller may not do this."""

    reason = "PERMISSION_DENIED"


class Unimplemented(LeaseholdError):
    """This is not offered here."""

    reason = "UNIMPLEMENTED"
