"""grpc.health.v1 with watches that end when the server drains.

The servicer that ships with gRPC keeps every ``Watch`` open until it is cancelled, so that one load balancer
that watches makes each drain last its whole grace period.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from leasehold.core import errors
from leasehold.rpc import errors as rpc_errors

SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OVERALL: Final = ""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped base
    """The health of the whole server (the empty name) and of each of its services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._is_serving = {OVERALL: True, **dict.fromkeys(services, True)}
        self._is_draining = False
        self._changed = asyncio.Event()

    def set_serving(self, service: str, is_serving: bool) -> None:
        """Tell that a service can, or cannot, be used now. Has no effect once the server drains."""
        if not self._is_draining:
            self._is_serving[service] = is_serving
            self._wake()

    def drain(self) -> None:
        """Turn everything NOT_SERVING for good; each watch is told so and ends."""
        self._is_draining = True
        self._is_serving = dict.fromkeys(self._is_serving, False)
        self._wake()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The present status; NOT_FOUND for a service that is not here."""
        if request.service not in self._is_serving:
            await context.abort_with_status(
                rpc_errors.to_status(errors.NotFound(f"there is no service {request.service!r} here"))
            )
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The present status of every service."""
        return health_pb2.HealthListResponse(
            statuses={
                service: health_pb2.HealthCheckResponse(status=self._status(service))
                for service in self._is_serving
            }
        )

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The present status and each change, until the server drains."""
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if self._is_draining:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        is_serving = self._is_serving.get(service)
        status: int = _UNKNOWN if is_serving is None else _SERVING if is_serving else _NOT_SERVING
        return status

    def _wake(self) -> None:
        # A new event for each change: none is missed by a watch that is still writing.
        self._changed.set()
        self._changed = asyncio.Event()
