"""Nodes and orders between proto and core: for the allocator's servicer, the agent and their callers.

Decoding checks everything that a stranger could have got wrong and raises `InvalidArgument` naming the field.
"""

from collections.abc import Mapping
from typing import Final

from google.protobuf import timestamp_pb2
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.node import registry_model
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import wire_values

ORDER_ID_LENGTH_MAX: Final = 64

_STATES: Final[Mapping[registry_model.NodeState, "node_pb2.NodeState.ValueType"]] = {
    registry_model.NodeState.READY: node_pb2.NODE_STATE_READY,
    registry_model.NodeState.DRAINING: node_pb2.NODE_STATE_DRAINING,
    registry_model.NodeState.LOST: node_pb2.NODE_STATE_LOST,
    registry_model.NodeState.GONE: node_pb2.NODE_STATE_GONE,
}

#: Orders that change nothing: they are not audited, and an agent need not keep their answers.
READING_ORDERS: Final = frozenset({"read_log", "explain"})

# Registration


def decode_registration(message: wire.NodeRegistration) -> registry_model.Registration:
    """The registration. Raises `InvalidArgument`."""
    return registry_model.Registration(
        name=message.name,
        node_id=message.node_id,
        incarnation=message.incarnation,
        boot_id=message.boot_id,
        pid_namespace=message.pid_namespace,
        cpus=message.resources.cpus,
        memory_bytes=message.resources.memory_bytes,
        labels=dict(message.labels),
        job_cpus=message.job_resources.cpus,
        job_memory_bytes=message.job_resources.memory_bytes,
        job_templates=frozenset(message.job_templates),
    )


def encode_resources(registration: registry_model.Registration) -> node_pb2.NodeResources:
    """The resources that a registration tells."""
    return node_pb2.NodeResources(cpus=registration.cpus, memory_bytes=registration.memory_bytes)


def encode_state(state: registry_model.NodeState) -> "node_pb2.NodeState.ValueType":
    """The number of a state."""
    return _STATES[state]


def encode_terms(terms: registry_model.Terms) -> wire.NodeTerms:
    """The message."""
    return wire.NodeTerms(
        ttl=wire_values.encode_seconds(terms.ttl_seconds),
        report_interval=wire_values.encode_seconds(terms.report_interval_seconds),
    )


def decode_terms(message: wire.NodeTerms) -> registry_model.Terms:
    """The terms. Raises `InvalidArgument`."""
    return registry_model.Terms(
        ttl_seconds=wire_values.decode_seconds(message.ttl, "terms.ttl"),
        report_interval_seconds=wire_values.decode_seconds(message.report_interval, "terms.report_interval"),
    )


def encode_record(record: registry_model.NodeRecord) -> node_pb2.Node:
    """A node as far as its record tells."""
    registration = record.registration
    registered = timestamp_pb2.Timestamp()
    registered.FromMicroseconds(round(record.register_time_seconds * 1e6))
    return node_pb2.Node(
        name=registration.name,
        node_id=registration.node_id,
        incarnation=registration.incarnation,
        boot_id=registration.boot_id,
        state=encode_state(record.state),
        resources=encode_resources(registration),
        labels=registration.labels,
        register_time=registered,
    )


# Orders


def order_kind(order: order_pb2.Order) -> str:
    """Which order it is, as `scale`. Raises `InvalidArgument` for none."""
    kind = order.WhichOneof("order")
    if kind is None:
        raise errors.InvalidArgument("order: says nothing; one of its kinds must be set", field="order")
    return kind


def checked_order_id(order_id: str) -> str:
    """`order_id` if it is empty or 1 to 64 printable ASCII characters, else raises `InvalidArgument`."""
    if len(order_id) > ORDER_ID_LENGTH_MAX or not (order_id.isascii() and (order_id.isprintable())):
        raise errors.InvalidArgument(
            f"order_id: at most {ORDER_ID_LENGTH_MAX} printable ASCII characters", field="order.order_id"
        )
    return order_id


def encode_error(error: errors.LeaseholdError) -> order_pb2.OrderError:
    """A refusal inside an answer."""
    status = rpc_errors.to_proto(error)
    return order_pb2.OrderError(
        reason=error.reason,
        # As a status would carry it: cut to what is sensible, and free of what UTF-8 cannot hold.
        message=status.message,
        field=error.field or "",
        metadata=rpc_errors.clean_metadata(error.metadata),
    )


def decode_error(message: order_pb2.OrderError) -> errors.LeaseholdError:
    """The refusal that `encode_error` was given; a reason that is not known gives `FailedPrecondition`."""
    return rpc_errors.from_reason(
        message.reason, message.message, field=message.field or None, metadata=message.metadata
    )
