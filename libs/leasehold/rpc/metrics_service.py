"""What a process counts of itself, over gRPC: for a gateway that hands it to Prometheus."""

from collections.abc import Callable
from typing import Any, Final

import grpc
from leasehold.api.common.v1 import metrics_service_pb2 as wire
from leasehold.api.common.v1 import metrics_service_pb2_grpc
from leasehold.observe import metrics
from leasehold.rpc import server as servers

_SERVICE: Final = wire.DESCRIPTOR.services_by_name["MetricsService"]
_TEXT_BYTES_MAX: Final = 2**20


class MetricsServicer(metrics_service_pb2_grpc.MetricsServiceServicer):
    """MetricsService of a registry, and of what `collect` puts into another at each exposition."""

    def __init__(
        self, registry: metrics.Registry, collect: Callable[[metrics.Registry], None] | None = None
    ) -> None:
        self._registry = registry
        self._collect = collect

    async def ExposeMetrics(
        self, request: wire.ExposeMetricsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.ExposeMetricsResponse:
        """Everything of the registry; whole lines only, where it would pass the bound."""
        text = ""
        if self._collect is not None:
            # Made anew: series of what is gone must not stay.
            collected = metrics.Registry()
            self._collect(collected)
            text = collected.expose()
        text += self._registry.expose()
        if len(text.encode()) > _TEXT_BYTES_MAX:
            text = text.encode()[:_TEXT_BYTES_MAX].decode("utf-8", "ignore").rpartition("\n")[0] + "\n"
        return wire.ExposeMetricsResponse(text=text)


def add(
    server: servers.Server,
    registry: metrics.Registry,
    collect: Callable[[metrics.Registry], None] | None = None,
) -> None:
    """Offer it on a server, before that starts."""
    servicer = MetricsServicer(registry, collect)
    server.add(metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server, servicer, _SERVICE)
