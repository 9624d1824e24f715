"""Errors, metrics and causes of calls, over real connections."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2
from leasehold.core import errors
from leasehold.observe import causes, logs, metrics
from leasehold.rpc import channel
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc.interceptors import CallInterceptor

Behaviour = Callable[[Any, Any], Any]
Text = wrappers_pb2.StringValue

_MAKERS: dict[str, Any] = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "client_stream": grpc.stream_unary_rpc_method_handler,
    "server_stream": grpc.unary_stream_rpc_method_handler,
    "bidi_stream": grpc.stream_stream_rpc_method_handler,
}


class Calls:
    """A server whose methods are the functions that a test gives, and a client to it."""

    def __init__(self, *inner: grpc.aio.ServerInterceptor) -> None:
        self.registry = metrics.Registry()
        self._server = grpc.aio.server(interceptors=[CallInterceptor(self.registry), *inner])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.client = channel.open_channel(f"127.0.0.1:{port}", has_own_connection=True)

    async def start(self, **behaviours: tuple[str, Behaviour]) -> None:
        handlers = {
            name: _MAKERS[kind](behaviour, Text.FromString, Text.SerializeToString)
            for name, (kind, behaviour) in behaviours.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Calls", handlers),))
        await self._server.start()

    async def unary(self, name: str, **given: Any) -> Any:
        call: Any = self.client.unary_unary(
            f"/test.Calls/{name}",
            request_serializer=Text.SerializeToString,
            response_deserializer=Text.FromString,
        )
        return await call(Text(value="hello"), timeout=10, **given)

    def stream(self, name: str, **given: Any) -> Any:
        call: Any = self.client.stream_stream(
            f"/test.Calls/{name}",
            request_serializer=Text.SerializeToString,
            response_deserializer=Text.FromString,
        )
        return call(timeout=10, **given)

    def handled(self) -> dict[tuple[str, str], int]:
        """Calls ended, by method and code."""
        counted = {}
        for line in self.registry.expose().splitlines():
            if line.startswith("grpc_server_handled_total{"):
                labels = dict(
                    each.split("=") for each in line[line.index("{") + 1 : line.index("}")].split(",")
                )
                key = (labels["grpc_method"].strip('"'), labels["grpc_code"].strip('"'))
                counted[key] = int(line.rpartition(" ")[2])
        return counted

    async def close(self) -> None:
        await self.client.close()
        await self._server.stop(None)


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    made = Calls()
    yield made
    await made.close()


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.reset()


def example(kind: type[errors.LeaseholdError]) -> errors.LeaseholdError:
    if kind is errors.NotLeader:
        return errors.NotLeader("[::1]:7400")
    if issubclass(kind, errors.InvalidArgument):
        return kind("wie schön\nno %0A", field="spec.limits[0]", metadata={"given": "ü"})
    return kind("wie schön\nno %0A", retry_after_seconds=2.5, metadata={"budget": "openai"})


async def test_every_error_reaches_the_client_as_it_was_raised(calls: Calls) -> None:
    classes = {kind.__name__: kind for kind in rpc_errors.all_classes()}

    async def fail(request: Any, context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        raise example(classes[metadata["kind"]])

    async def fail_in_stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        yield Text(value="first")
        raise example(classes[dict(context.invocation_metadata())["kind"]])

    await calls.start(Fail=("unary", fail), FailInStream=("bidi_stream", fail_in_stream))
    for name, kind in classes.items():
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await calls.unary("Fail", metadata=(("kind", name),))
        received = rpc_errors.from_rpc_error(refusal.value)
        assert type(received) is kind
        assert vars(received) == vars(example(kind))

        stream = calls.stream("FailInStream", metadata=(("kind", name),))
        assert (await stream.read()).value == "first"
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stream.read()
        received = rpc_errors.from_rpc_error(refusal.value)
        assert type(received) is kind
        assert vars(received) == vars(example(kind))


async def test_the_longest_error_still_reaches_a_client_with_default_limits(calls: Calls) -> None:
    async def fail(request: Any, context: Any) -> Any:
        raise errors.InvalidArgument(
            "ü" * 50_000, field="f" * 5_000, metadata={f"{n}": "ü" * 9_000 for n in range(99)}
        )

    await calls.start(Fail=("unary", fail))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await calls.unary("Fail")
    assert type(rpc_errors.from_rpc_error(refusal.value)) is errors.InvalidArgument


async def test_an_unforeseen_error_is_told_as_an_id_only_and_logged_whole(
    calls: Calls, log: Callable[[], list[dict[str, Any]]]
) -> None:
    async def fail(request: Any, context: Any) -> Any:
        raise KeyError("canary of an inner value")

    await calls.start(Fail=("unary", fail))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await calls.unary("Fail", metadata=((causes.METADATA_KEY, "cli-7"),))
    assert refusal.value.code() is grpc.StatusCode.INTERNAL
    assert "canary" not in f"{refusal.value!r}{refusal.value.trailing_metadata()!r}"
    error_id = rpc_errors.from_rpc_error(refusal.value).metadata["error_id"]
    assert error_id in str(refusal.value.details())
    (line,) = [each for each in log() if each["event"] == "rpc_failed"]
    assert (line["error_id"], line["method"], line["cause"]) == (error_id, "/test.Calls/Fail", "cli-7")
    assert "KeyError: 'canary of an inner value'" in line["exception"]


async def test_all_four_kinds_of_calls_are_counted_by_method_and_code(calls: Calls) -> None:
    async def one(request: Any, context: Any) -> Any:
        return request

    async def join(requests: Any, context: Any) -> Any:
        return Text(value="".join([each.value async for each in requests]))

    async def repeat(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(3):
            yield request

    async def write(requests: Any, context: Any) -> None:
        await context.write(Text(value="by hand"))
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by hand too")

    await calls.start(
        One=("unary", one),
        Join=("client_stream", join),
        Repeat=("server_stream", repeat),
        Write=("bidi_stream", write),
    )
    assert (await calls.unary("One")).value == "hello"
    stream = calls.stream("Join")
    await stream.write(Text(value="a"))
    await stream.write(Text(value="b"))
    await stream.done_writing()
    assert (await stream.read()).value == "ab"
    assert await stream.code() is grpc.StatusCode.OK
    stream = calls.stream("Repeat")
    await stream.write(Text(value="x"))
    await stream.done_writing()
    assert [each.value async for each in stream] == ["x", "x", "x"]
    stream = calls.stream("Write")
    assert (await stream.read()).value == "by hand"
    assert await stream.code() is grpc.StatusCode.OUT_OF_RANGE
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await calls.unary("Missing")
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED

    assert calls.handled() == {
        ("One", "OK"): 1,
        ("Join", "OK"): 1,
        ("Repeat", "OK"): 1,
        ("Write", "OUT_OF_RANGE"): 1,
    }
    exposed = calls.registry.expose()
    assert (
        'grpc_server_started_total{grpc_type="bidi_stream",grpc_service="test.Calls",grpc_method="Write"} 1'
        in exposed
    )
    assert (
        'grpc_server_handling_seconds_count{grpc_type="unary",grpc_service="test.Calls",grpc_method="One"} 1'
        in exposed
    )
    assert 'handling_seconds_count{grpc_type="server_stream"' not in exposed  # streams last for hours


async def test_a_code_that_the_handler_set_is_the_one_that_is_counted(calls: Calls) -> None:
    async def by_name(request: Any, context: Any) -> Any:
        context.set_code(grpc.StatusCode.DATA_LOSS)
        return request

    await calls.start(ByName=("unary", by_name))
    with pytest.raises(grpc.aio.AioRpcError):
        await calls.unary("ByName")
    assert calls.handled() == {("ByName", "DATA_LOSS"): 1}


async def test_a_client_that_goes_away_closes_the_generator_at_once(calls: Calls) -> None:
    steps: asyncio.Queue[str] = asyncio.Queue()

    async def watch(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield Text(value="still here")
                await asyncio.sleep(0.01)
        finally:
            steps.put_nowait("closed")

    await calls.start(Watch=("bidi_stream", watch))
    stream = calls.stream("Watch")
    await stream.read()
    stream.cancel()
    assert await asyncio.wait_for(steps.get(), 5) == "closed"
    async with asyncio.timeout(5):
        while calls.handled() != {("Watch", "CANCELLED"): 1}:  # noqa: ASYNC110  a counter has no event
            await asyncio.sleep(0)


async def test_each_call_has_a_cause_of_its_own_or_the_one_that_the_client_sent(calls: Calls) -> None:
    async def tell(request: Any, context: Any) -> Any:
        return Text(value=causes.current() or "")

    await calls.start(Tell=("unary", tell))
    first, second = (await calls.unary("Tell")).value, (await calls.unary("Tell")).value
    assert first.startswith("rpc-")
    assert second.startswith("rpc-")
    assert first != second
    sent = await calls.unary("Tell", metadata=((causes.METADATA_KEY, "cli-42"),))
    assert sent.value == "cli-42"
    forged = await calls.unary("Tell", metadata=((causes.METADATA_KEY, "x" * 65),))
    assert forged.value.startswith("rpc-")
    assert causes.current() is None


class Refusing(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        raise errors.PermissionDenied("the role agent may not do this", metadata={"role": "agent"})


async def test_an_inner_interceptor_refuses_calls_of_any_kind_with_a_core_error() -> None:
    async def one(request: Any, context: Any) -> Any:
        raise AssertionError("must not run")

    calls = Calls(Refusing())
    await calls.start(One=("unary", one), Many=("bidi_stream", one))
    try:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await calls.unary("One")
        received = rpc_errors.from_rpc_error(refusal.value)
        assert isinstance(received, errors.PermissionDenied)
        assert received.metadata == {"role": "agent"}
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await calls.stream("Many").read()  # nothing was sent
        assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert calls.handled() == {("One", "PERMISSION_DENIED"): 1, ("Many", "PERMISSION_DENIED"): 1}
    finally:
        await calls.close()
