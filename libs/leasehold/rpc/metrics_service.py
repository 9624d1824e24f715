"""What a process counts of itself, over gRPC: for a gateway that hands it to Prometheus."""

from typing import Any, Final

import grpc
from leasehold.api.common.v1 import metrics_service_pb2 as wire
from leasehold.api.common.v1 import metrics_service_pb2_grpc
from leasehold.observe import metrics
from leasehold.rpc import server as servers

_SERVICE: Final = wire.DESCRIPTOR.services_by_name["MetricsService"]
_TEXT_BYTES_MAX: Final = 2**20


class MetricsServicer(metrics_service_pb2_grpc.MetricsServiceServicer):
    """MetricsService of a registry."""

    def __init__(self, registry: metrics.Registry) -> None:
        self._registry = registry

    async def ExposeMetrics(
        self, request: wire.ExposeMetricsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.ExposeMetricsResponse:
        """Everything of the registry; whole lines only, where it would pass the bound."""
        text = self._registry.expose()
        if len(text.encode()) > _TEXT_BYTES_MAX:
            text = text.encode()[:_TEXT_BYTES_MAX].decode("utf-8", "ignore").rpartition("\n")[0] + "\n"
        return wire.ExposeMetricsResponse(text=text)


def add(server: servers.Server, registry: metrics.Registry) -> None:
    """Offer it on a server, before that starts."""
    server.add(
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server, MetricsServicer(registry), _SERVICE
    )
