"""Methods of any service by their name: each has a request of its own, which tells the service."""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import descriptor, message_factory
from leasehold.core import errors


def unary(name: str, request: Any) -> Callable[[grpc.aio.Channel], Any]:
    """What makes a channel's callable of a unary method, as `leader.LeaderChannel.call` takes it."""
    method = method_of(name, request)
    return lambda channel: channel.unary_unary(_path(method), **_codec(method))


def stream(name: str, request: Any) -> Callable[[grpc.aio.Channel], Any]:
    """The same of a method that answers with a stream."""
    method = method_of(name, request)
    return lambda channel: channel.unary_stream(_path(method), **_codec(method))


def method_of(name: str, request: Any) -> descriptor.MethodDescriptor:
    """The method of that name. Raises `Unimplemented` if no service of the request's file has one for it."""
    message: descriptor.Descriptor = request.DESCRIPTOR
    for service in message.file.services_by_name.values():
        method = service.methods_by_name.get(name)
        if method is not None and method.input_type is message:
            return method
    raise errors.Unimplemented(f"no method {name} takes a {message.full_name}")


def _path(method: descriptor.MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _codec(method: descriptor.MethodDescriptor) -> dict[str, Any]:
    return {
        "request_serializer": message_factory.GetMessageClass(method.input_type).SerializeToString,
        "response_deserializer": message_factory.GetMessageClass(method.output_type).FromString,
    }
