"""The port's value types as etcd's messages, and back.

Keys are text: UTF-8 on the wire. A foreign key that is not UTF-8 comes through as surrogates and goes back as
it was, so that one odd key cannot break a listing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leasehold.core import errors
from leasehold.etcd import port
from leasehold.etcd.wire import kv_pb2, rpc_pb2

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_ESCAPE = "surrogateescape"


def key_bytes(key: str) -> bytes:
    """A key on the wire."""
    return key.encode("utf-8", _ESCAPE)


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """First key and end (exclusive) of all keys with the prefix; of all keys, if it is empty."""
    first = key_bytes(prefix)
    stem = first.rstrip(b"\xff")
    if not stem:
        return first or b"\0", b"\0"
    return first, stem[:-1] + bytes((stem[-1] + 1,))


def record(kv: kv_pb2.KeyValue) -> port.KeyValue:
    """A record as the port shows it."""
    return port.KeyValue(
        kv.key.decode("utf-8", _ESCAPE), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease
    )


def event(wire: kv_pb2.Event) -> port.KeyPut | port.KeyDeleted:
    """A change as the port shows it."""
    if wire.type == kv_pb2.Event.DELETE:
        return port.KeyDeleted(wire.kv.key.decode("utf-8", _ESCAPE), wire.kv.mod_revision)
    return port.KeyPut(record(wire.kv))


def txn_request(
    compares: Sequence[port.Compare], then: Sequence[port.Op], otherwise: Sequence[port.Op]
) -> rpc_pb2.TxnRequest:
    """A transaction on the wire.

    One without operations gets a read: etcd answers compares alone from the member's own state, however old
    that is, but with any read or write beside them only after agreement with the leader.
    """
    request = rpc_pb2.TxnRequest()
    for compare in compares:
        _fill_compare(compare, request.compare.add())
    _fill_ops(then, request.success)
    _fill_ops(otherwise, request.failure)
    if compares and not then and not otherwise:
        request.success.add().request_range.key = request.compare[0].key
    return request


def txn_result(ops: Sequence[port.Op], response: rpc_pb2.TxnResponse) -> port.TxnResult:
    """What a transaction did, ``ops`` being the list that ran.

    Puts answer nothing of interest, so a list of puts alone, the hot path, does not look at its answers.
    """
    found: list[port.KeyValue | None] = []
    deleted = 0
    if not all(isinstance(op, port.Put) for op in ops):
        for op, answer in zip(ops, response.responses, strict=True):
            if isinstance(op, port.Get):
                kvs = answer.response_range.kvs
                found.append(record(kvs[0]) if kvs else None)
            elif isinstance(op, port.Delete):
                deleted += answer.response_delete_range.deleted
    return port.TxnResult(response.succeeded, response.header.revision, tuple(found), deleted)


def _fill_compare(compare: port.Compare, wire: rpc_pb2.Compare) -> None:
    wire.key = key_bytes(compare.key)
    match compare:
        case port.Compare(target=port.CompareTarget.VALUE, expected=bytes(value)):
            wire.target, wire.value = rpc_pb2.Compare.VALUE, value
        case port.Compare(target=port.CompareTarget.CREATE_REVISION, expected=int(revision)):
            wire.target, wire.create_revision = rpc_pb2.Compare.CREATE, revision
        case port.Compare(target=port.CompareTarget.MOD_REVISION, expected=int(revision)):
            wire.target, wire.mod_revision = rpc_pb2.Compare.MOD, revision
        case port.Compare(target=port.CompareTarget.VERSION, expected=int(version)):
            wire.target, wire.version = rpc_pb2.Compare.VERSION, version
        case _:
            raise errors.InvalidArgument(f"a value is bytes, all else a number: {compare}", field="compares")


def _fill_ops(ops: Sequence[port.Op], wire: "RepeatedCompositeFieldContainer[rpc_pb2.RequestOp]") -> None:
    """Fills in place: building each message and copying it in takes three times as long."""
    add = wire.add
    for op in ops:
        if isinstance(op, port.Put):
            put = add().request_put
            put.key = op.key.encode("utf-8", _ESCAPE)
            put.value = op.value
            if op.lease_id:
                put.lease = op.lease_id
        elif isinstance(op, port.Delete):
            delete = add().request_delete_range
            if op.is_prefix:
                delete.key, delete.range_end = prefix_range(op.key)
            else:
                delete.key = key_bytes(op.key)
        else:
            add().request_range.key = key_bytes(op.key)
