"""Orders on their way to agents: sent once, sent again on a new connection, answered once for all who asked."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from leasehold.allocator import node_sessions
from leasehold.api.node.v1 import order_pb2
from leasehold.core import errors

#: Orders to one node that are not answered.
PENDING_MAX = 1_000

SessionOf = Callable[[str], node_sessions.NodeSession | None]


@dataclass(slots=True)
class _Pending:
    order: order_pb2.Order
    answer: asyncio.Future[order_pb2.OrderResult]
    waiting: int = 0


class OrderRouter:
    """Hands orders to agents. `session_of` gives a node's connection."""

    def __init__(self, session_of: SessionOf) -> None:
        self._session_of = session_of
        self._pending: dict[str, dict[str, _Pending]] = {}
        self._closed: errors.LeaseholdError | None = None

    async def ask(self, node: str, order: order_pb2.Order, timeout_seconds: float) -> order_pb2.OrderResult:
        """The agent's answer; `order` may have no id, and is given one that is its own.

        Raises `NodeUnreachable`, `DeadlineExceeded`, `InvalidArgument` for an id that is under way with another
        order, `ResourceExhausted`.
        """
        if self._closed is not None:
            raise self._closed
        session = self._session_of(node)
        if session is None:
            raise _unreachable(node, "has no connection to the allocator")
        pending = self._taken(node, order, session)
        pending.waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                # Shared by all who asked for it: none of them may cancel it.
                return await asyncio.shield(pending.answer)
        except TimeoutError:
            if self._session_of(node) is None:
                raise _unreachable(node, "lost its connection before it answered") from None
            raise errors.DeadlineExceeded(
                f"node {node} has not answered within {timeout_seconds:g} s; it may yet do what was ordered, "
                "and asking again with the same order_id is safe",
                metadata={"node": node, "order_id": pending.order.order_id},
            ) from None
        finally:
            pending.waiting -= 1
            if not pending.waiting:
                self._forget(node, pending)

    def _taken(self, node: str, order: order_pb2.Order, session: node_sessions.NodeSession) -> _Pending:
        here = self._pending.setdefault(node, {})
        known = here.get(order.order_id) if order.order_id else None
        if known is not None:
            if known.order != order:
                raise errors.InvalidArgument(
                    f"order_id: {order.order_id} is under way to {node} with another order",
                    field="order.order_id",
                )
            return known
        if len(here) >= PENDING_MAX:
            raise errors.ResourceExhausted(
                f"{PENDING_MAX} orders to node {node} are not answered", retry_after_seconds=1.0
            )
        sent = order_pb2.Order()
        sent.CopyFrom(order)
        sent.order_id = order.order_id or f"allocator-{secrets.token_hex(8)}"
        answer: asyncio.Future[order_pb2.OrderResult] = asyncio.get_running_loop().create_future()
        pending = here[sent.order_id] = _Pending(sent, answer)
        session.order(sent)
        return pending

    def _forget(self, node: str, pending: _Pending) -> None:
        here = self._pending.get(node, {})
        if here.get(pending.order.order_id) is pending:
            del here[pending.order.order_id]
            if not here:
                del self._pending[node]
        if pending.answer.done() and not pending.answer.cancelled():
            # Where nobody waited to the end nobody else asks for it.
            pending.answer.exception()

    def connected(self, node: str, session: node_sessions.NodeSession) -> None:
        """An agent has a new connection: what it has not answered is told again. Ids make that safe."""
        for pending in self._pending.get(node, {}).values():
            session.order(pending.order)

    def answered(self, node: str, result: order_pb2.OrderResult) -> None:
        """An agent has answered; an answer that nobody waits for is passed over."""
        pending = self._pending.get(node, {}).get(result.order_id)
        if pending is not None and not pending.answer.done():
            pending.answer.set_result(result)

    def close(self, why: errors.LeaseholdError) -> None:
        """The reign is over: everyone who waits is told `why`."""
        self._closed = why
        for here in self._pending.values():
            for pending in here.values():
                if not pending.answer.done():
                    pending.answer.set_exception(why)


def _unreachable(node: str, how: str) -> errors.NodeUnreachable:
    return errors.NodeUnreachable(f"node {node} {how}", retry_after_seconds=1.0, metadata={"node": node})
