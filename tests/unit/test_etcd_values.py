"""etcd: chunks, key ranges, settings, and what gRPC's failures mean."""

from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.core import errors
from leasehold.etcd import codec, failures, port, settings
from leasehold.etcd.wire import rpc_pb2

OPS = st.lists(
    st.one_of(
        st.builds(port.Put, st.text(min_size=1, max_size=5), st.binary(max_size=40)),
        st.builds(port.Delete, st.text(min_size=1, max_size=5)),
    ),
    max_size=30,
)


def size_bytes(op: port.Op) -> int:
    return len(op.key.encode()) + (len(op.value) if isinstance(op, port.Put) else 0)


@given(OPS, st.integers(1, 7), st.integers(1, 60))
def test_chunks_keep_all_operations_in_order_within_both_bounds(
    ops: list[port.Op], ops_max: int, bytes_max: int
) -> None:
    chunks = list(port.chunks(ops, ops_max, bytes_max=bytes_max))
    assert [op for chunk in chunks for op in chunk] == ops
    assert all(1 <= len(chunk) <= ops_max for chunk in chunks)
    assert all(len(chunk) == 1 or sum(map(size_bytes, chunk)) <= bytes_max for chunk in chunks)


def test_chunks_of_nothing_are_none_and_of_no_size_are_refused() -> None:
    assert list(port.chunks([], 5)) == []
    with pytest.raises(errors.InvalidArgument) as refused:
        list(port.chunks([port.Delete("a")], 0))
    assert refused.value.field == "ops_max"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/a", (b"/a", b"/b")),
        ("/a/", (b"/a/", b"/a0")),
        ("a\udcff", (b"a\xff", b"b")),
        ("\udcff\udcff", (b"\xff\xff", b"\0")),
        ("", (b"\0", b"\0")),
    ],
)
def test_a_prefix_is_a_range_of_keys(prefix: str, expected: tuple[bytes, bytes]) -> None:
    assert codec.prefix_range(prefix) == expected


@given(st.text(min_size=1, max_size=4), st.text(max_size=4))
def test_a_range_holds_exactly_the_keys_with_its_prefix(prefix: str, other: str) -> None:
    first, end = codec.prefix_range(prefix)
    assert first <= codec.key_bytes(prefix + other) < end
    key = codec.key_bytes(other)
    assert (first <= key < end) is key.startswith(first)


def test_a_transaction_is_encoded_as_etcd_expects() -> None:
    request = codec.txn_request(
        [port.Compare.value("/epoch", b"1"), port.Compare.missing("/a"), port.Compare.version("/a", 3)],
        [port.Put("/a", b"x", lease_id=7), port.Delete("/b"), port.Delete("/c/", is_prefix=True)],
        [port.Get("/epoch")],
    )
    compare = rpc_pb2.Compare
    op = rpc_pb2.RequestOp
    assert request == rpc_pb2.TxnRequest(
        compare=[
            compare(target=compare.VALUE, key=b"/epoch", value=b"1"),
            compare(target=compare.CREATE, key=b"/a", create_revision=0),
            compare(target=compare.VERSION, key=b"/a", version=3),
        ],
        success=[
            op(request_put=rpc_pb2.PutRequest(key=b"/a", value=b"x", lease=7)),
            op(request_delete_range=rpc_pb2.DeleteRangeRequest(key=b"/b")),
            op(request_delete_range=rpc_pb2.DeleteRangeRequest(key=b"/c/", range_end=b"/c0")),
        ],
        failure=[op(request_range=rpc_pb2.RangeRequest(key=b"/epoch"))],
    )


def test_compares_alone_are_sent_with_a_read_so_that_etcd_answers_no_stale_state() -> None:
    request = codec.txn_request([port.Compare.value("/epoch", b"1")], [], [])
    assert request.success == [rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"/epoch"))]
    answer = rpc_pb2.TxnResponse(succeeded=True)
    answer.responses.add().response_range.SetInParent()
    assert codec.txn_result([], answer) == port.TxnResult(succeeded=True, revision=0)


# -- settings


@pytest.mark.parametrize(
    ("endpoints", "is_tls", "expected"),
    [
        (["127.0.0.1:2379"], False, ("127.0.0.1:2379",)),
        (["http://a:1", "b:2", "http://a:1/"], False, ("a:1", "b:2")),
        (["https://a:1", "[::1]:2379"], True, ("a:1", "[::1]:2379")),
    ],
)
def test_endpoints_are_hosts_and_ports_or_urls(
    endpoints: list[str], is_tls: bool, expected: tuple[str, ...]
) -> None:
    assert settings.targets(endpoints, is_tls=is_tls) == expected


@pytest.mark.parametrize(
    ("endpoints", "is_tls"),
    [
        ([], False),
        (["a"], False),
        (["a:port"], False),
        (["a:99999"], False),
        (["a:1/path"], False),
        (["http://user@a:1"], False),
        (["unix:///run/etcd"], False),
        (["https://a:1"], False),
        (["http://a:1"], True),
    ],
)
def test_other_endpoints_are_refused(endpoints: list[str], is_tls: bool) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        settings.targets(endpoints, is_tls=is_tls)
    assert refused.value.field == "endpoints"


def test_settings_of_zero_are_refused_by_name() -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        settings.Settings(call_timeout_seconds=0)
    assert refused.value.field == "call_timeout_seconds"
    with pytest.raises(errors.InvalidArgument):
        settings.Settings(ping_timeout_seconds=float("nan"))


def test_channel_options_set_both_ping_timeouts() -> None:
    options = dict(settings.Settings().channel_options())
    assert options["grpc.http2.ping_timeout_ms"] == options["grpc.keepalive_timeout_ms"] == 500


def test_tls_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        settings.Tls(ca_file=str(tmp_path / "none.pem")).credentials()
    assert refused.value.field == "ca_file"
    with pytest.raises(errors.InvalidArgument) as refused:
        settings.Tls(cert_file="cert.pem").credentials()
    assert refused.value.field == "key_file"


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(settings.Login("root", "secret"))


# -- failures


def failure(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "retry", "error"),
    [
        (CODE.UNAVAILABLE, "Socket closed", failures.Retry.READS, errors.EtcdUnavailable),
        (CODE.UNAVAILABLE, "etcdserver: leader changed", failures.Retry.READS, errors.EtcdUnavailable),
        (
            CODE.UNAVAILABLE,
            "failed to connect to all addresses; last error: refused",
            failures.Retry.ANY_CALL,
            errors.EtcdUnavailable,
        ),
        (CODE.DEADLINE_EXCEEDED, "Deadline Exceeded", failures.Retry.READS, errors.DeadlineExceeded),
        (CODE.CANCELLED, "", failures.Retry.READS, errors.EtcdUnavailable),
        (CODE.UNKNOWN, "?", failures.Retry.READS, errors.EtcdUnavailable),
        (
            CODE.UNAUTHENTICATED,
            "etcdserver: invalid auth token",
            failures.Retry.AFTER_LOGIN,
            errors.PermissionDenied,
        ),
        (
            CODE.INVALID_ARGUMENT,
            "etcdserver: revision of auth store is old",
            failures.Retry.AFTER_LOGIN,
            errors.PermissionDenied,
        ),
        (
            CODE.INVALID_ARGUMENT,
            "etcdserver: user name is empty",
            failures.Retry.AFTER_LOGIN,
            errors.PermissionDenied,
        ),
        (
            CODE.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID or password",
            failures.Retry.NONE,
            errors.PermissionDenied,
        ),
        (CODE.PERMISSION_DENIED, "etcdserver: permission denied", failures.Retry.NONE, errors.PermissionDenied),
        (CODE.INVALID_ARGUMENT, "etcdserver: too many ops", failures.Retry.NONE, errors.InvalidArgument),
        (CODE.NOT_FOUND, "etcdserver: requested lease not found", failures.Retry.NONE, errors.NotFound),
        (CODE.RESOURCE_EXHAUSTED, "etcdserver: mvcc: no space", failures.Retry.NONE, errors.ResourceExhausted),
        (CODE.UNIMPLEMENTED, "unknown method", failures.Retry.NONE, errors.Unimplemented),
        (CODE.FAILED_PRECONDITION, "etcdserver: other", failures.Retry.NONE, errors.FailedPrecondition),
    ],
)
def test_a_failure_of_a_read_becomes_one_of_our_errors(
    code: grpc.StatusCode, details: str, retry: failures.Retry, error: type[errors.LeaseholdError]
) -> None:
    assert failures.retry(failure(code, details)) is retry
    assert type(failures.translate(failure(code, details), is_write=False)) is error


@pytest.mark.parametrize(
    ("code", "details", "outcome"),
    [
        (CODE.UNAVAILABLE, "Socket closed", "unknown"),
        (CODE.DEADLINE_EXCEEDED, "Deadline Exceeded", "unknown"),
        (CODE.INTERNAL, "", "unknown"),
        (CODE.UNAVAILABLE, "failed to connect to all addresses; ...", "not_applied"),
        (CODE.UNAVAILABLE, "errors resolving etcd.example:2379: [...]", "not_applied"),
    ],
)
def test_an_unanswered_write_tells_its_outcome(code: grpc.StatusCode, details: str, outcome: str) -> None:
    error = failures.translate(failure(code, details), is_write=True)
    assert isinstance(error, errors.EtcdUnavailable)
    assert error.metadata == {"outcome": outcome}


@pytest.mark.parametrize(
    ("details", "cause"),
    [
        ("etcdserver: mvcc: required revision has been compacted", "compacted"),
        ("etcdserver: mvcc: required revision is a future revision", "future_revision"),
    ],
)
def test_a_revision_out_of_reach_tells_its_cause(details: str, cause: str) -> None:
    error = failures.translate(failure(CODE.OUT_OF_RANGE, details), is_write=False)
    assert isinstance(error, errors.FailedPrecondition)
    assert error.metadata == {"cause": cause}
    assert failures.is_compacted(error) is (cause == "compacted")
