"""What every server and channel of Leasehold sets in gRPC's C core, in one place.

Two of them are not what gRPC's documentation suggests. ``ping_timeout_ms``: a keepalive whose acknowledgement
stays away closes the connection only after *this* time, 60 s by default, whatever ``keepalive_timeout_ms``
says; with 500 ms a frozen peer is told within keepalive + 0.5 s. ``so_reuseport``: on by default, so that a
second server on the same port binds silently and takes half of the connections.
"""

from dataclasses import dataclass
from typing import Final

from leasehold.core import errors

Options = list[tuple[str, str | int]]

_MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Transport:
    """Limits and timeouts of one end of a connection; the defaults fit both. Sizes hold per message or call.

    ``keepalive_seconds``: quiet time after which the peer is pinged (data that arrives is a sign of life too,
    so a busy connection costs nothing). ``ping_timeout_seconds``: time that the peer has to answer. Together
    they bound how long a frozen peer goes unnoticed. ``concurrent_streams_max`` holds per connection, more
    wait; ``concurrent_calls_max`` holds per server, more are refused at once with RESOURCE_EXHAUSTED, so it
    has to leave room for one stream of each holder.
    """

    keepalive_seconds: float = 1.0
    ping_timeout_seconds: float = 0.5
    message_bytes_max: int = 4 * _MEBIBYTE
    metadata_bytes_max: int = 16 * 1024
    concurrent_streams_max: int = 1_024
    concurrent_calls_max: int = 32_768
    handshake_timeout_seconds: float = 5.0
    connect_timeout_seconds: float = 2.0
    reconnect_initial_seconds: float = 0.1
    reconnect_max_seconds: float = 1.5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise errors.InvalidArgument(f"{name} must be above zero", field=name)


DEFAULT: Final = Transport()


def server_options(transport: Transport = DEFAULT) -> Options:
    """Channel arguments of a server."""
    return [
        *_common(transport),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", transport.concurrent_streams_max),
        ("grpc.server_handshake_timeout_ms", _milliseconds(transport.handshake_timeout_seconds)),
        # Clients may ping as often as our own channels do, idle ones too; faster ones are still sent away.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(transport.keepalive_seconds / 2)),
    ]


def channel_options(transport: Transport = DEFAULT, *, has_own_connection: bool = False) -> Options:
    """Channel arguments of a client.

    ``has_own_connection``: gRPC otherwise shares one connection among all channels of a process that
    have the same target and options.
    """
    return [
        *_common(transport),
        ("grpc.initial_reconnect_backoff_ms", _milliseconds(transport.reconnect_initial_seconds)),
        ("grpc.max_reconnect_backoff_ms", _milliseconds(transport.reconnect_max_seconds)),
        # In spite of its name the time that one attempt to connect may take: 20 s by default.
        ("grpc.min_reconnect_backoff_ms", _milliseconds(transport.connect_timeout_seconds)),
        ("grpc.use_local_subchannel_pool", int(has_own_connection)),
        # A control plane is reached directly; a proxy set for web downloads would swallow even loopback calls.
        ("grpc.enable_http_proxy", 0),
        # Service configs would come from DNS TXT records: slow to look up, and another's word on our retries.
        ("grpc.service_config_disable_resolution", 1),
    ]


def _common(transport: Transport) -> Options:
    return [
        ("grpc.keepalive_time_ms", _milliseconds(transport.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(transport.ping_timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(transport.ping_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", transport.message_bytes_max),
        ("grpc.max_send_message_length", transport.message_bytes_max),
        # Between a soft and a hard limit gRPC refuses at random; one figure makes it predictable.
        ("grpc.max_metadata_size", transport.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", transport.metadata_bytes_max),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
