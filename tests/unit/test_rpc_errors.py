"""The table of statuses: complete, and the same error on both ends."""

import math
from collections import Counter

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from leasehold.core import errors
from leasehold.rpc import errors as rpc_errors

ALL_CLASSES = list(rpc_errors.all_classes())


def example(kind: type[errors.LeaseholdError]) -> errors.LeaseholdError:
    if kind is errors.NotLeader:
        return errors.NotLeader("10.0.0.7:7400")
    if issubclass(kind, errors.InvalidArgument):
        return kind("is wrong", field="spec.rpm_limit", metadata={"given": "-1"})
    return kind("did not work", retry_after_seconds=1.25, metadata={"budget": "openai"})


@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_wire_with_class_message_field_retry_and_metadata(
    kind: type[errors.LeaseholdError],
) -> None:
    error = example(kind)
    received = rpc_errors.from_proto(rpc_errors.to_proto(error))
    assert type(received) is kind
    assert vars(received) == vars(error)
    assert str(received) == str(error)


@pytest.mark.parametrize("kind", [each for each in ALL_CLASSES if each is not errors.LeaseholdError])
def test_every_error_has_a_code_of_its_own_kind(kind: type[errors.LeaseholdError]) -> None:
    assert rpc_errors.code_of(example(kind)) not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.OK)


def test_reasons_are_unique() -> None:
    repeated = [reason for reason, times in Counter(kind.reason for kind in ALL_CLASSES).items() if times > 1]
    assert repeated == []


def test_the_table_of_the_architecture_holds() -> None:
    code = rpc_errors.code_of
    assert code(errors.NotLeader()) is grpc.StatusCode.UNAVAILABLE
    assert code(errors.EtcdUnavailable()) is grpc.StatusCode.UNAVAILABLE
    assert code(errors.StaleEpoch()) is grpc.StatusCode.ABORTED
    assert code(errors.VersionConflict()) is grpc.StatusCode.ABORTED
    assert code(errors.ResourceExhausted()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code(errors.CostAboveLimit("x", field="tokens")) is grpc.StatusCode.INVALID_ARGUMENT
    assert code(errors.Superseded()) is grpc.StatusCode.FAILED_PRECONDITION
    assert code(errors.NodeSuperseded()) is grpc.StatusCode.FAILED_PRECONDITION
    assert code(errors.NodeUnreachable()) is grpc.StatusCode.UNAVAILABLE
    assert code(errors.LeaseholdError("x")) is grpc.StatusCode.INTERNAL


def test_details_follow_the_error_model_of_google_apis() -> None:
    status = rpc_errors.to_proto(errors.CostAboveLimit("40 of 20", field="tokens", metadata={"limit": "20"}))
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert status.message == "40 of 20"
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("COST_ABOVE_LIMIT", "leasehold", {"limit": "20"})
    assert status.details[1].Unpack(bad_request)
    assert [(each.field, each.description) for each in bad_request.field_violations] == [("tokens", "40 of 20")]


@pytest.mark.parametrize(
    ("given_seconds", "told_seconds"),
    [(0.0, 0.0), (0.1, 0.1), (-3.0, 0.0), (1e12, 86_400.0), (math.inf, None), (math.nan, None), (None, None)],
)
def test_a_retry_delay_is_told_within_reason(given_seconds: float | None, told_seconds: float | None) -> None:
    error = errors.ResourceExhausted("full", retry_after_seconds=given_seconds)
    assert rpc_errors.from_proto(rpc_errors.to_proto(error)).retry_after_seconds == told_seconds


def test_what_is_too_long_for_trailers_is_cut_and_not_refused() -> None:
    error = errors.NotFound("ü" * 100_000, metadata={f"key{n}": "v" * 5_000 for n in range(500)})
    status = rpc_errors.to_proto(error)
    assert status.ByteSize() < 6_000
    assert status.message == "ü" * 498 + "…"


def test_text_that_is_no_unicode_is_told_with_marks() -> None:
    received = rpc_errors.from_proto(
        rpc_errors.to_proto(errors.NotFound("no \udcff", metadata={"name": "\udcff"}))
    )
    assert received.message == "no ?"
    assert received.metadata == {"name": "?"}


def test_a_reason_of_a_newer_server_gives_the_class_of_its_code() -> None:
    status = rpc_errors.to_proto(errors.FailedPrecondition("no"))
    info = error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="leasehold", metadata={"a": "b"})
    status.details[0].Pack(info)
    received = rpc_errors.from_proto(status)
    assert type(received) is errors.FailedPrecondition
    assert received.metadata == {"a": "b", "unknown_reason": "FROM_THE_FUTURE"}


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="busy")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_LEADER", domain="example.org"))
    received = rpc_errors.from_proto(status)
    assert type(received) is errors.Unavailable
    assert received.metadata == {}


def failed_call(
    code: grpc.StatusCode, details: str | None = None, trailers: tuple[tuple[str, bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_any_status_without_details_becomes_a_core_error_that_keeps_the_message(code: grpc.StatusCode) -> None:
    received = rpc_errors.from_rpc_error(failed_call(code, "connection refused"))
    assert isinstance(received, errors.LeaseholdError)
    assert received.message == "connection refused"


def test_statuses_of_grpc_itself_have_their_class() -> None:
    def kind(code: grpc.StatusCode) -> type:
        return type(rpc_errors.from_rpc_error(failed_call(code)))

    assert kind(grpc.StatusCode.UNAVAILABLE) is errors.Unavailable
    assert kind(grpc.StatusCode.CANCELLED) is errors.Unavailable
    assert kind(grpc.StatusCode.DEADLINE_EXCEEDED) is errors.DeadlineExceeded
    assert kind(grpc.StatusCode.UNAUTHENTICATED) is errors.PermissionDenied
    assert kind(grpc.StatusCode.UNIMPLEMENTED) is errors.Unimplemented
    assert kind(grpc.StatusCode.UNKNOWN) is errors.LeaseholdError


def test_details_in_the_trailers_are_found() -> None:
    status = rpc_errors.to_proto(errors.NotLeader("b:1"))
    call = failed_call(
        grpc.StatusCode.UNAVAILABLE,
        "x",
        (("other", b"1"), ("grpc-status-details-bin", status.SerializeToString())),
    )
    received = rpc_errors.from_rpc_error(call)
    assert isinstance(received, errors.NotLeader)
    assert received.leader_address == "b:1"
    assert received.retry_after_seconds == 0.1


def test_details_that_do_not_parse_or_that_contradict_the_code_are_passed_over() -> None:
    contradiction = rpc_errors.to_proto(errors.NotFound("x")).SerializeToString()
    for serialized in (b"\xff\xff\xff", contradiction):
        call = failed_call(grpc.StatusCode.UNAVAILABLE, "away", (("grpc-status-details-bin", serialized),))
        received = rpc_errors.from_rpc_error(call)
        assert type(received) is errors.Unavailable
        assert received.message == "away"


def test_a_detail_that_is_damaged_inside_is_passed_over() -> None:
    status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="gone")
    status.details.append(
        any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")
    )
    received = rpc_errors.from_proto(status)
    assert type(received) is errors.NotFound
    assert received.message == "gone"


def test_a_call_that_grpc_itself_could_not_carry_may_be_tried_again() -> None:
    nothing = grpc.aio.Metadata()
    failure = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")

    assert type(rpc_errors.from_rpc_error(failure)) is errors.Unavailable
