"""Core errors as gRPC statuses, and back.

One table says which status code a class of `leasehold.core.errors` has on the wire; subclasses inherit it. The
details follow AIP-193: each status carries one ``google.rpc.ErrorInfo`` with the stable reason, a ``RetryInfo``
where a delay helps, and a ``BadRequest`` where a field is at fault. `from_rpc_error` is the exact inverse, so
that a caller catches ``errors.NotLeader`` whichever side of a connection it stands on.
"""

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol, cast

import grpc
from google.protobuf import duration_pb2
from google.protobuf import message as protobuf_message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]
from leasehold.core import errors

DOMAIN: Final = "leasehold"

#: What grpc.aio raises, without a status, at a write to a stream that is over; which one, by how it ended.
STREAM_OVER: Final = (grpc.aio.UsageError, asyncio.InvalidStateError)

CODES: Final[Mapping[type[errors.LeaseholdError], grpc.StatusCode]] = {
    errors.LeaseholdError: grpc.StatusCode.INTERNAL,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StaleEpoch: grpc.StatusCode.ABORTED,
    errors.VersionConflict: grpc.StatusCode.ABORTED,
    # Not ABORTED: that invites a retry, and a superseded holder must not come back by itself.
    errors.Superseded: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NodeSuperseded: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AllocationLapsed: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}

# What a status means that carries no reason of ours: made by gRPC itself, a proxy, or another server.
_WITHOUT_REASON: Final[Mapping[grpc.StatusCode, type[errors.LeaseholdError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgument,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.StaleEpoch,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    # The local caller's own cancellation is asyncio.CancelledError; this one came from a server that stopped.
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
}

# A status travels in HTTP/2 trailers, and peers drop a call whose headers pass 8 to 16 KiB. The message is
# there up to three times: in grpc-message, percent-encoded, and inside the details.
_MESSAGE_BYTES_MAX: Final = 1_000
_METADATA_ENTRIES_MAX: Final = 16
_METADATA_BYTES_MAX: Final = 128
_RETRY_SECONDS_MAX: Final = 86_400.0
_CUT: Final = "…".encode()

_DETAILS_KEY: Final = "grpc-status-details-bin"


def code_of(error: errors.LeaseholdError) -> grpc.StatusCode:
    """The status code of the nearest class in the table."""
    return next(CODES[ancestor] for ancestor in type(error).__mro__ if ancestor in CODES)


def to_proto(error: errors.LeaseholdError) -> status_pb2.Status:
    """The ``google.rpc.Status`` of an error. Message and metadata are cut to what trailers can carry."""
    status = status_pb2.Status(code=code_of(error).value[0], message=_clean(error.message, _MESSAGE_BYTES_MAX))
    metadata = clean_metadata(error.metadata)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    )
    if error.retry_after_seconds is not None and math.isfinite(error.retry_after_seconds):
        seconds = min(max(error.retry_after_seconds, 0.0), _RETRY_SECONDS_MAX)
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clean(error.field, _METADATA_BYTES_MAX), description=status.message, reason=error.reason
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def clean_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """An error's metadata, cut to what trailers can carry."""
    return {
        _clean(key, _METADATA_BYTES_MAX): _clean(value, _METADATA_BYTES_MAX)
        for key, value in list(metadata.items())[:_METADATA_ENTRIES_MAX]
    }


def to_status(error: errors.LeaseholdError) -> grpc.Status:
    """What a servicer hands to ``context.abort_with_status``."""
    status: grpc.Status = rpc_status.to_status(to_proto(error))
    return status


def from_proto(status: status_pb2.Status) -> errors.LeaseholdError:
    """The error that `to_proto` was given; for a foreign status, the nearest class of its code.

    A reason that this version does not know gives the class of the code, with the reason kept in
    ``metadata["unknown_reason"]``.
    """
    info, retry, bad_request = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.BadRequest(),
    )
    for detail in status.details:
        for known in (info, retry, bad_request):
            with contextlib.suppress(
                protobuf_message.DecodeError
            ):  # a damaged detail must not break the client
                detail.Unpack(known)
    kind = _class_of_code(_status_code(status.code))
    metadata: dict[str, str] = {}
    if info.domain == DOMAIN:
        metadata = dict(info.metadata)
        known_kind = _classes_by_reason().get(info.reason)
        if known_kind is None:
            metadata["unknown_reason"] = info.reason
        else:
            kind = known_kind
    delay = retry.retry_delay
    return _build(
        kind,
        status.message,
        field=bad_request.field_violations[0].field if bad_request.field_violations else None,
        retry_after_seconds=delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        metadata=metadata,
    )


def from_reason(
    reason: str, message: str, *, field: str | None = None, metadata: Mapping[str, str] | None = None
) -> errors.LeaseholdError:
    """The error of a refusal inside an answer, which has a reason and no status code.

    A reason that this version does not know gives `FailedPrecondition`, with the reason kept in
    ``metadata["unknown_reason"]``.
    """
    known = dict(metadata or {})
    kind = _classes_by_reason().get(reason)
    if kind is None:
        known["unknown_reason"] = reason
    return _build(
        kind or errors.FailedPrecondition, message, field=field, retry_after_seconds=None, metadata=known
    )


#: What grpc.aio says where an operation of a call failed on this side: no server has said so.
_NOT_CARRIED: Final = "Internal error from Core"


class _StatusOfCall(Protocol):
    """What both ``grpc.aio.AioRpcError`` and the blocking API's errors offer."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> errors.LeaseholdError:
    """The core error that a failed call carries; raise it ``from`` the gRPC error.

    Takes ``grpc.aio.AioRpcError`` and the errors of the blocking API. Details that do not parse, or that a
    proxy has put beside another code, are passed over: the code alone then decides the class.
    """
    call = cast("_StatusOfCall", error)
    code = call.code() or grpc.StatusCode.UNKNOWN
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            status = _parse(value)
            if status is not None and status.code == code.value[0]:
                return from_proto(status)
    if code is grpc.StatusCode.INTERNAL and call.details() == _NOT_CARRIED:
        return errors.Unavailable("gRPC itself could not carry the call", retry_after_seconds=0.1)
    return from_proto(status_pb2.Status(code=code.value[0], message=call.details() or code.name))


def _parse(serialized: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(serialized)
    except protobuf_message.DecodeError:
        return None


def _build(
    kind: type[errors.LeaseholdError],
    message: str,
    *,
    field: str | None,
    retry_after_seconds: float | None,
    metadata: Mapping[str, str],
) -> errors.LeaseholdError:
    # Subclasses have constructors of their own, for those who raise them; here every part is known already.
    error = kind.__new__(kind, message)
    errors.LeaseholdError.__init__(
        error, message or None, field=field, retry_after_seconds=retry_after_seconds, metadata=metadata
    )
    restore = _RESTORE.get(kind)
    if restore is not None:
        restore(error)
    return error


def _restore_not_leader(error: errors.LeaseholdError) -> None:
    error.leader_address = error.metadata.get("leader_address", "")  # type: ignore[attr-defined]


# Attributes of single classes, taken back out of the metadata.
_RESTORE: Final[Mapping[type[errors.LeaseholdError], Callable[[errors.LeaseholdError], None]]] = {
    errors.NotLeader: _restore_not_leader,
}


def _classes_by_reason() -> Mapping[str, type[errors.LeaseholdError]]:
    return {kind.reason: kind for kind in reversed(list(all_classes()))}


def all_classes() -> Iterator[type[errors.LeaseholdError]]:
    """Every class of the tree, a parent before its children."""
    pending: list[type[errors.LeaseholdError]] = [errors.LeaseholdError]
    while pending:
        kind = pending.pop(0)
        yield kind
        pending.extend(kind.__subclasses__())


def _class_of_code(code: grpc.StatusCode) -> type[errors.LeaseholdError]:
    return _WITHOUT_REASON.get(code, errors.LeaseholdError)


@functools.cache
def _status_codes() -> Mapping[int, grpc.StatusCode]:
    return {code.value[0]: code for code in grpc.StatusCode}


def _status_code(number: int) -> grpc.StatusCode:
    return _status_codes().get(number, grpc.StatusCode.UNKNOWN)


def _clean(text: str, bytes_max: int) -> str:
    # Lone surrogates (from undecodable file names) cannot be put in a protobuf string.
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= bytes_max:
        return encoded.decode("utf-8")
    return encoded[: bytes_max - len(_CUT)].decode("utf-8", "ignore") + _CUT.decode("utf-8")
