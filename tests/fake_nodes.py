"""A NodeService in this process: it hears what an agent says, gives orders, and goes away when told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from leasehold.api.job.v1 import attempt_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc, order_pb2
from leasehold.core import epoch as epochs
from leasehold.core import processes
from leasehold.rpc import common_codec, options, wire_values


class FakeNodes:
    """One allocator, as an agent sees it: it serves SyncNode alone."""

    def __init__(self, epoch: epochs.Epoch, *, report_seconds: float = 0.2) -> None:
        self.epoch = epoch
        self.report_seconds = report_seconds
        self.heard: list[wire.SyncNodeRequest] = []
        self.streams = 0
        #: Sent with the next answers.
        self.orders: list[order_pb2.Order] = []
        self.assignments: list[attempt_pb2.JobAssignment] = []
        self.stops: list[attempt_pb2.AttemptRef] = []
        self.forgets: list[attempt_pb2.AttemptRef] = []
        self.watch: list[processes.ProcessKey] = []
        #: Answers are kept back: what was said is not taken.
        self.is_silent = False
        self.address = ""
        self._server: grpc.aio.Server | None = None
        self._wake = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        """Listen; `address` tells where."""
        self._server = grpc.aio.server(options=options.server_options())
        service = type("Service", (node_service_pb2_grpc.NodeServiceServicer,), {"SyncNode": self._sync})
        service.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # the others refuse by themselves
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(service(), self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """Go away, streams and all."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def order(self, order: order_pb2.Order) -> None:
        """Give an order with the next answer."""
        self.orders.append(order)

    def results(self) -> dict[str, order_pb2.OrderResult]:
        """Answers to orders that were heard, by id."""
        return {result.order_id: result for message in self.heard for result in message.results}

    def attempts(self) -> list[attempt_pb2.AttemptReport]:
        """Reports of attempts that were heard, in order."""
        return [report for message in self.heard for report in (*message.inventory.attempts, *message.attempts)]

    def deaths(self) -> list[processes.ProcessKey]:
        """Death certificates that were heard."""
        return [
            common_codec.decode_process(death.process) for message in self.heard for death in message.deaths
        ]

    async def _sync(
        self, requests: AsyncIterator[wire.SyncNodeRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[wire.SyncNodeResponse]:
        """See ``node_service.proto``."""
        self.streams += 1
        watch = list(self.watch)
        async for request in requests:
            self.heard.append(request)
            if self.is_silent:
                continue
            orders, self.orders = self.orders, []
            assignments, self.assignments = self.assignments, []
            stops, self.stops = self.stops, []
            forgets, self.forgets = self.forgets, []
            yield wire.SyncNodeResponse(
                epoch=common_codec.encode_epoch(self.epoch),
                answered_sequence=request.sequence,
                terms=wire.NodeTerms(
                    ttl=wire_values.encode_seconds(4.0),
                    report_interval=wire_values.encode_seconds(self.report_seconds),
                ),
                orders=orders,
                assignments=assignments,
                stop=stops,
                forget=forgets,
                watch=[common_codec.encode_process(process) for process in watch],
            )
            watch = [process for process in self.watch if process not in watch] if watch != self.watch else []
