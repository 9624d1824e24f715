"""The ASGI application: routes, inside the guard that every request passes."""

import importlib.metadata
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from leasehold.core import errors
from leasehold.gateway import allocators, config, monitoring, openapi, refusals, security
from leasehold.gateway import metrics as gateway_metrics
from leasehold.observe import logs, metrics
from starlette import applications, exceptions, requests, responses, routing, types

Endpoint = Callable[[requests.Request], Awaitable[responses.Response]]

_PATHS: Final = frozenset(operation.path for operation in openapi.OPERATIONS)
_METHODS: Final = frozenset({"GET", "HEAD", "POST"})
_log = logs.get_logger(__name__)


def build(
    leader: allocators.Allocators,
    *,
    allowed_hosts: frozenset[str],
    body_bytes_max: int = 65_536,
    timeout_seconds: float = 30.0,
    registry: metrics.Registry | None = None,
) -> types.ASGIApp:
    """The application, on the allocators' leader. `allowed_hosts` are names without ports, in small letters."""
    registry = registry if registry is not None else metrics.Registry()
    endpoints = _endpoints(leader, registry)
    app = applications.Starlette(
        routes=[
            routing.Route(operation.path, endpoints[operation.path], methods=[operation.method.upper()])
            for operation in openapi.OPERATIONS
        ],
        exception_handlers={
            errors.LeaseholdError: _refused,
            refusals.HttpRefusal: _refused,
            exceptions.HTTPException: _not_routed,
            Exception: _broken,
        },
    )
    app.router.redirect_slashes = False
    return security.Guard(
        app,
        allowed_hosts=allowed_hosts,
        body_bytes_max=body_bytes_max,
        timeout_seconds=timeout_seconds,
        observe=_observer(registry),
    )


def _endpoints(leader: allocators.Allocators, registry: metrics.Registry) -> Mapping[str, Endpoint]:
    routes = monitoring.Monitoring(leader)
    return {
        "/monitoring/status": routes.status,
        "/monitoring/memory": routes.memory,
        "/monitoring/workers": routes.workers,
        "/monitoring/workers/scale": routes.scale,
        "/monitoring/monitoring/start": routes.start,
        "/monitoring/monitoring/stop": routes.stop,
        "/scaling_status": routes.scaling_status,
        "/metrics": gateway_metrics.Metrics(registry, leader).expose,
        "/healthz": _health(time.monotonic()),
        "/openapi.json": _fixed(responses.JSONResponse(openapi.document())),
        "/docs": _fixed(
            responses.HTMLResponse(openapi.page(), headers={"content-security-policy": openapi.PAGE_POLICY})
        ),
    }


def _health(started: float) -> Endpoint:
    version = importlib.metadata.version("leasehold")

    async def health(request: requests.Request) -> responses.Response:
        body: openapi.Health = {
            "status": "ok",
            "version": version,
            "uptime_seconds": round(time.monotonic() - started, 3),
        }
        return responses.JSONResponse(body)

    return health


def _fixed(response: responses.Response) -> Endpoint:
    async def answer(request: requests.Request) -> responses.Response:
        return response

    return answer


async def _refused(request: requests.Request, error: Exception) -> responses.Response:
    assert isinstance(error, errors.LeaseholdError | refusals.HttpRefusal)
    if isinstance(error, errors.LeaseholdError) and refusals.status_of(error) >= 500:
        _log.warning("request_refused", path=request.url.path, reason=error.reason, error=error.message)
    return refusals.answer(error)


async def _broken(request: requests.Request, error: Exception) -> responses.Response:
    """A mistake of ours: the guard logs it, and a stranger hears nothing of the inside."""
    return refusals.answer(errors.LeaseholdError("something went wrong in the gateway; its log has more"))


async def _not_routed(request: requests.Request, error: Exception) -> responses.Response:
    """What Starlette itself refuses: no such path, or not with this verb."""
    assert isinstance(error, exceptions.HTTPException)
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        told = f"{request.url.path} takes {allow}, not {request.method[:20]}"
        refusal = refusals.HttpRefusal(405, "METHOD_NOT_ALLOWED", told, allow=allow)
    else:
        refusal = refusals.HttpRefusal(
            error.status_code, "NO_SUCH_ROUTE", f"there is no route {request.url.path[:100]}; /docs lists them"
        )
    return refusals.answer(refusal)


def _observer(registry: metrics.Registry) -> Callable[[str, str, int, float], None]:
    counted = registry.counter(
        "leasehold_gateway_requests_total", "Requests by route, verb and status", ("route", "method", "status")
    )
    latency = registry.histogram(
        "leasehold_gateway_request_seconds", "How long an answer took, by route", ("route",)
    )

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        # What a stranger sends must not become a label.
        route = path if path in _PATHS else "other"
        counted.labels(route, method if method in _METHODS else "other", str(status)).add()
        latency.labels(route).observe(seconds)

    return observe


def of_settings(settings: config.Settings, leader: allocators.Allocators) -> types.ASGIApp:
    """The application as the settings want it."""
    return build(
        leader,
        allowed_hosts=settings.allowed_hosts,
        body_bytes_max=settings.gateway_body_bytes_max,
        timeout_seconds=settings.gateway_request_timeout_seconds,
    )
