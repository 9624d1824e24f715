"""What happens around each call on a server: errors become statuses, calls are counted, a cause is set.

The work is done once per call, never per message: a streaming handler is run as it is, inside one ``try``.
Metrics have the names that go-grpc-prometheus made customary, so that ready-made dashboards show them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc
from leasehold.core import errors
from leasehold.observe import causes, logs, metrics
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import refusals

_log = logs.get_logger(__name__)

# In quotes, and with lazy annotations: the stubs' generics are plain classes at run time.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

#: Takes a method's full name and the context of the call.
Guard: TypeAlias = Callable[[str, _Context], None]

_NAMES_BY_NUMBER: Final = {code.value[0]: code.name for code in grpc.StatusCode}


class _CallMetrics:
    def __init__(self, registry: metrics.Registry) -> None:
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self.started = registry.counter("grpc_server_started_total", "Calls begun.", labels)
        self.handled = registry.counter("grpc_server_handled_total", "Calls ended.", (*labels, "grpc_code"))
        self.seconds = registry.histogram(
            "grpc_server_handling_seconds", "Time from begin to end of calls that have one answer.", labels
        )


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Goes outermost. Handlers must be ``async``: coroutines, or asynchronous generators for streams.

    `guard` raises if the caller of a method may not call it.
    """

    def __init__(
        self,
        registry: metrics.Registry,
        clock: Callable[[], float] = time.perf_counter,
        guard: Guard | None = None,
    ) -> None:
        self._metrics = _CallMetrics(registry)
        self._clock = clock
        self._guard = guard
        # By method: the handler that was registered, and the same one wrapped.
        self._wrapped: dict[str, tuple[_Handler, _Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of one call; gRPC awaits this in the task that then runs the handler."""
        _adopt_cause(handler_call_details)
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except errors.LeaseholdError as error:
            # An inner interceptor has refused the call.
            return _Call(self._metrics, self._clock, method, "unary").refusal(error)
        if handler is None:
            return None
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        make, behaviour, kind = _parts(handler)
        call = _Call(self._metrics, self._clock, method, kind, self._guard)
        run = call.streaming(behaviour) if handler.response_streaming else call.unary(behaviour)
        made: _Handler = make(run, handler.request_deserializer, handler.response_serializer)
        return made


class _Call:
    """Wraps the behaviour of one method."""

    def __init__(
        self,
        counted: _CallMetrics,
        clock: Callable[[], float],
        method: str,
        kind: str,
        guard: Guard | None = None,
    ) -> None:
        service, _, name = method.removeprefix("/").rpartition("/")
        labels = (kind, service, name)
        self._method = method
        self._guard = guard
        self._is_fed = kind in ("bidi_stream", "client_stream")
        self._now = clock
        self._started = counted.started.labels(*labels)
        self._seconds = counted.seconds
        self._handled = counted.handled
        self._labels = labels

    def unary(self, behaviour: Any) -> Callable[[Any, _Context], Awaitable[Any]]:
        """The handler of a method with one answer."""
        seconds = self._seconds.labels(*self._labels)

        async def run(request: Any, context: _Context) -> Any:
            began = self._now()
            self._started.add()
            try:
                await self._check(request, context)
                answer = await behaviour(request, context)
            except BaseException as error:
                await self._fail(error, context)
                raise
            finally:
                seconds.observe(self._now() - began)
            self._count(_code_name(context.code()))
            return answer

        return run

    def streaming(self, behaviour: Any) -> Callable[[Any, _Context], Awaitable[None]]:
        """The handler of a method with a stream of answers.

        A generator is drained here, as gRPC itself would do; a second generator around it would cost a hop for
        each message.
        """
        is_generator = inspect.isasyncgenfunction(behaviour)

        async def run(request: Any, context: _Context) -> None:
            self._started.add()
            try:
                await self._check(request, context)
                # Said by itself, not with the first message: where a handler gives that write up, and fails,
                # gRPC would say it once more with the status, fail at that, and leave the call open for ever.
                await context.send_initial_metadata(())
                if is_generator:
                    # Closed at once on cancellation: its `finally` must not wait for the garbage collector.
                    async with contextlib.aclosing(behaviour(request, context)) as answers:
                        async for answer in answers:
                            await context.write(answer)
                else:
                    await behaviour(request, context)
            except BaseException as error:
                await self._fail(error, context)
                raise
            self._count(_code_name(context.code()))

        return run

    def refusal(self, refused: errors.LeaseholdError) -> _Handler:
        """A handler that refuses a call of any kind, without waiting for its first message."""

        async def run(_: Any, context: _Context) -> None:
            self._started.add()
            await self._fail(refused, context)

        made: _Handler = grpc.stream_stream_rpc_method_handler(run)
        return made

    async def _check(self, request: Any, context: _Context) -> None:
        if self._guard is None:
            return
        try:
            self._guard(self._method, context)
        except errors.LeaseholdError:
            if self._is_fed:
                await refusals.hear_out(request)
            raise

    async def _fail(self, error: BaseException, context: _Context) -> None:
        """Count the failure and end the call with its status; returns if gRPC is to see the error itself."""
        if isinstance(error, grpc.aio.AbortError):
            self._count(_code_name(context.code()))
        elif isinstance(error, asyncio.CancelledError):
            self._count(grpc.StatusCode.CANCELLED.name)
        elif isinstance(error, Exception):
            told = error if isinstance(error, errors.LeaseholdError) else self._opaque(error)
            self._count(rpc_errors.code_of(told).name)
            await context.abort_with_status(rpc_errors.to_status(told))

    def _count(self, code_name: str) -> None:
        self._handled.labels(*self._labels, code_name).add()

    def _opaque(self, error: Exception) -> errors.LeaseholdError:
        # The client gets an id to quote; what went wrong, with its traceback and its values, stays here.
        error_id = secrets.token_hex(4)
        _log.error("rpc_failed", method=self._method, error_id=error_id, exc_info=error)
        return errors.LeaseholdError(
            f"internal error {error_id}; the server's log tells more", metadata={"error_id": error_id}
        )


def _parts(handler: _Handler) -> tuple[Any, Any, str]:
    """How to make a handler of the same kind, what it runs, and what dashboards call the kind."""
    if handler.request_streaming and handler.response_streaming:
        made = grpc.stream_stream_rpc_method_handler, handler.stream_stream, "bidi_stream"
    elif handler.request_streaming:
        made = grpc.stream_unary_rpc_method_handler, handler.stream_unary, "client_stream"
    elif handler.response_streaming:
        made = grpc.unary_stream_rpc_method_handler, handler.unary_stream, "server_stream"
    else:
        made = grpc.unary_unary_rpc_method_handler, handler.unary_unary, "unary"
    return made


def _adopt_cause(details: grpc.HandlerCallDetails) -> None:
    for key, value in details.invocation_metadata:
        if key == causes.METADATA_KEY and isinstance(value, str) and causes.is_valid(value):
            causes.adopt(value)
            return
    causes.adopt(causes.new("rpc"))


def _code_name(code: grpc.StatusCode | int | None) -> str:
    # Not set: OK. gRPC keeps what a handler gave: the enumeration, or its number.
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _NAMES_BY_NUMBER.get(code or 0, "UNKNOWN")
