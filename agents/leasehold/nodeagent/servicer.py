"""AgentService: the status and the orders of this host, for its own users."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc, node_pb2, order_pb2
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import orders, status
from leasehold.rpc import wire_values

#: A watch is told at most so often.
WATCH_SECONDS: Final = 0.2
_FOLLOW_BYTES: Final = 256 * 1024

SERVICE: Final = wire.DESCRIPTOR.services_by_name["AgentService"]

#: Begins to end the agent; how long that may take, in seconds.
ShutDown = Callable[[wire.ShutDownMode.ValueType], float]
Context = grpc.aio.ServicerContext[Any, Any]


class AgentServicer(agent_service_pb2_grpc.AgentServiceServicer):
    """See ``agent_service.proto``."""

    def __init__(
        self,
        host: agents.Agent,
        executor: orders.Orders,
        link_status: Callable[[], node_pb2.LinkStatus],
        shut_down: ShutDown,
        draining: asyncio.Event,
    ) -> None:
        self._host = host
        self._orders = executor
        self._link_status = link_status
        self._shut_down = shut_down
        self._draining = draining
        self._watches: set[asyncio.Event] = set()

    def changed(self) -> None:
        """Tell all watches."""
        for event in self._watches:
            event.set()

    async def GetAgentStatus(
        self, request: wire.GetAgentStatusRequest, context: Context
    ) -> wire.GetAgentStatusResponse:
        """The status now."""
        return wire.GetAgentStatusResponse(
            node=self._host.config.node,
            pid=os.getpid(),
            status=status.node_status(self._host),
            link=self._link_status(),
        )

    async def WatchAgentStatus(
        self, request: wire.WatchAgentStatusRequest, context: Context
    ) -> AsyncIterator[wire.WatchAgentStatusResponse]:
        """The status now, and after each change."""
        event = asyncio.Event()
        self._watches.add(event)
        try:
            while not self._draining.is_set():
                event.clear()
                yield wire.WatchAgentStatusResponse(
                    node=self._host.config.node,
                    status=status.node_status(self._host),
                    link=self._link_status(),
                )
                await asyncio.sleep(WATCH_SECONDS)
                await _either(event, self._draining)
        finally:
            self._watches.discard(event)

    async def ExecuteOrder(
        self, request: wire.ExecuteOrderRequest, context: Context
    ) -> wire.ExecuteOrderResponse:
        """Apply an order; a refusal is the status of the call."""
        return wire.ExecuteOrderResponse(result=await self._orders.execute(request.order))

    async def FollowLog(
        self, request: wire.FollowLogRequest, context: Context
    ) -> AsyncIterator[wire.FollowLogResponse]:
        """A worker's log as it grows, until it has ended."""
        order = order_pb2.ReadLogOrder(
            worker=request.worker, tail_lines=request.tail_lines, bytes_max=_FOLLOW_BYTES
        )
        while not self._draining.is_set():
            chunk = await self._orders.read_log(order)
            if chunk.data or chunk.is_end or chunk.lost_bytes:
                yield wire.FollowLogResponse(chunk=chunk)
            if chunk.is_end:
                return
            order.cursor = chunk.cursor
            order.tail_lines = 0
            # Short waits while a drain may come, so that it need not wait for a quiet log.
            order.wait.CopyFrom(wire_values.encode_seconds(1.0))

    async def ShutDownAgent(
        self, request: wire.ShutDownAgentRequest, context: Context
    ) -> wire.ShutDownAgentResponse:
        """Begin to end."""
        return wire.ShutDownAgentResponse(deadline=wire_values.encode_seconds(self._shut_down(request.mode)))


async def _either(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
