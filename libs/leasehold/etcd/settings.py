"""How to reach an etcd cluster, and how patient to be with it."""

import pathlib
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from leasehold.core import errors
from leasehold.etcd import port

ChannelOptions = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds and timings. The defaults suit a cluster within one data centre.

    - ``call_timeout_seconds``: of one call, all its tries together.
    - ``keepalive_seconds``: an open call or watch pings a silent connection this often. etcd ends connections
      that ping more often than its ``--grpc-keepalive-min-time`` (5 s unless its operator chose another).
    - ``ping_timeout_seconds``: a connection whose ping is unanswered for so long is given up. So an idle watch
      notices a frozen server within the sum of the two.
    - ``txn_ops_max``: the cluster's ``--max-txn-ops``.
    - ``page_records``: the records asked for at a time when listing.
    - ``message_bytes_max``: the largest answer accepted; a page above it is asked for again in smaller parts.
    """

    call_timeout_seconds: float = 3.0
    keepalive_seconds: float = 6.0
    ping_timeout_seconds: float = 0.5
    txn_ops_max: int = port.TXN_OPS_MAX_DEFAULT
    page_records: int = 1000
    message_bytes_max: int = 16 << 20

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise errors.InvalidArgument(f"{name} is above 0", field=name)

    def channel_options(self) -> ChannelOptions:
        """The same in gRPC's terms."""
        return (
            ("grpc.keepalive_time_ms", round(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.ping_timeout_seconds * 1000)),
            # Without it a frozen peer is given up only after a minute, whatever the keepalive timeout says.
            ("grpc.http2.ping_timeout_ms", round(self.ping_timeout_seconds * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1000),  # also bounds one attempt to connect
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_receive_message_length", self.message_bytes_max),
            ("grpc.enable_http_proxy", 0),  # a proxy set for the web is not meant for etcd
        )


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM, read when connecting. Without ``ca_file`` the system's authorities are trusted."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files; `InvalidArgument` names the one that cannot be."""
        if (self.cert_file is None) != (self.key_file is None):
            raise errors.InvalidArgument("a client certificate and its key go together", field="key_file")
        return grpc.ssl_channel_credentials(
            root_certificates=_contents("ca_file", self.ca_file),
            private_key=_contents("key_file", self.key_file),
            certificate_chain=_contents("cert_file", self.cert_file),
        )


@dataclass(frozen=True, slots=True)
class Login:
    """A user of etcd's own authentication. Without TLS the password crosses the network in the clear."""

    user: str
    password: str = field(repr=False)


def targets(endpoints: Sequence[str], *, is_tls: bool) -> tuple[str, ...]:
    """Targets for gRPC of ``host:port`` or ``http(s)://host:port``; `InvalidArgument` on anything else.

    A scheme that contradicts ``is_tls`` is refused: silently talking in the clear to an ``https`` endpoint, or
    the reverse, is never meant.
    """
    if not endpoints:
        raise errors.InvalidArgument("at least one endpoint is needed", field="endpoints")
    return tuple(dict.fromkeys(_target(endpoint, is_tls) for endpoint in endpoints))


def _target(endpoint: str, is_tls: bool) -> str:
    url = urllib.parse.urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    try:
        has_address = bool(url.hostname and url.port)
    except ValueError:
        has_address = False
    if not has_address or url.path.strip("/") or url.query or url.username is not None:
        raise errors.InvalidArgument(
            f"an endpoint is host:port or http(s)://host:port, not {endpoint!r}", field="endpoints"
        )
    if url.scheme not in ("", "https" if is_tls else "http"):
        raise errors.InvalidArgument(
            f"{endpoint!r} contradicts TLS being {'on' if is_tls else 'off'}", field="endpoints"
        )
    return url.netloc


def _contents(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise errors.InvalidArgument(f"{name}: {error.strerror}: {path}", field=name) from error
