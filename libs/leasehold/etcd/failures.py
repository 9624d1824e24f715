"""What a failed call to etcd means: our error, and whether another try is allowed.

etcd tells most causes by a gRPC code, some only by its text; the texts below are the same in 3.4 and 3.5.
"""

import enum

import grpc
import grpc.aio
from leasehold.core import errors

_TOKEN_INVALID = (
    "etcdserver: invalid auth token",
    "etcdserver: revision of auth store is old",
    "etcdserver: user name is empty",  # no token: authentication was enabled after connecting
)
_DENIED = ("etcdserver: authentication failed", "etcdserver: permission denied")
# gRPC's texts where a call found no connection, so that no server has seen it.
_NEVER_SENT = ("failed to connect to all addresses", "errors resolving")
_CAUSES = {
    "required revision has been compacted": "compacted",
    "required revision is a future revision": "future_revision",
}


class Retry(enum.Enum):
    """Which calls may be tried again after a failure."""

    NONE = "none"  # the answer is final
    AFTER_LOGIN = "after_login"  # any call: it was refused for its token
    ANY_CALL = "any_call"  # any call: it never reached a server
    READS = "reads"  # only what changes nothing: its outcome is unknown


_UNANSWERED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def retry(failure: grpc.aio.AioRpcError) -> Retry:
    """Whether and what may be tried again."""
    details = failure.details() or ""
    if failure.code() in _UNANSWERED:
        return Retry.ANY_CALL if details.startswith(_NEVER_SENT) else Retry.READS
    if details.startswith(_TOKEN_INVALID):
        return Retry.AFTER_LOGIN
    return Retry.NONE


def is_too_large(failure: errors.LeaseholdError) -> bool:
    """Whether an answer was refused by this side for its size."""
    return isinstance(failure, errors.ResourceExhausted) and "larger than max" in failure.message


def is_compacted(failure: errors.LeaseholdError) -> bool:
    """Whether the revision asked for is gone."""
    return failure.metadata.get("cause") == "compacted"


def translate(failure: grpc.aio.AioRpcError, *, is_write: bool) -> errors.LeaseholdError:
    """Our error for gRPC's; the port's docstring says what each promises."""
    code, details = failure.code(), failure.details() or "no details"
    if code in _UNANSWERED:
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not is_write:
            return errors.DeadlineExceeded(f"etcd did not answer in time: {details}")
        is_unknown = is_write and not details.startswith(_NEVER_SENT)
        outcome = "unknown" if is_unknown else "not_applied"
        return errors.EtcdUnavailable(
            f"etcd does not answer: {details}", retry_after_seconds=0.1, metadata={"outcome": outcome}
        )
    return _refusal(code, details)


def _refusal(code: grpc.StatusCode, details: str) -> errors.LeaseholdError:
    if code is grpc.StatusCode.NOT_FOUND:
        return errors.NotFound(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.ResourceExhausted(details, retry_after_seconds=0.1)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Unimplemented(details)
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return errors.PermissionDenied(details)
    if details.startswith(_TOKEN_INVALID + _DENIED):
        return errors.PermissionDenied(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return errors.InvalidArgument(details, field="request")
    cause = next((cause for text, cause in _CAUSES.items() if text in details), None)
    return errors.FailedPrecondition(details, metadata={"cause": cause} if cause else None)
