"""Handing an order to a node, and what it answers."""

import uuid
from typing import Any

from leasehold.core import errors
from leasehold.rpc import node_codec, wire_values


def give(
    allocator: Any, node: str, order: Any, *, timeout_seconds: float, order_id: str | None = None
) -> tuple[str, Any]:
    """The node that took the order (empty: the only one), and its result.

    `order_id` is a new one unless given; empty: the answer is not kept. `timeout_seconds` is for the node's
    answer; a leader is looked for as long again. Raises what the node refuses, and `Unavailable` if it does not
    answer.
    """
    from leasehold.api.node.v1 import node_service_pb2 as wire

    order.order_id = uuid.uuid4().hex if order_id is None else order_id
    request = wire.OrderNodeRequest(
        node=node, order=order, timeout=wire_values.encode_seconds(min(timeout_seconds, 30.0))
    )
    answers = allocator.call("OrderNode", request, timeout_seconds=2 * timeout_seconds).answers
    if len(answers) != 1:
        raise errors.Unavailable(f"{node or 'the node'} did not answer within {timeout_seconds:g} s")
    result = answers[0].result
    if result.HasField("error"):
        raise node_codec.decode_error(result.error)
    return answers[0].node, result
