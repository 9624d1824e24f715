"""Client channels, set up so that a dead, frozen or cut-off server is noticed in about two seconds."""

import grpc
from leasehold.rpc import addresses, options, tls


def open_channel(
    address: str,
    *,
    tls_files: tls.TlsFiles | None = None,
    transport: options.Transport = options.DEFAULT,
    has_own_connection: bool = False,
) -> grpc.aio.Channel:
    """A channel to one server at ``host:port``, ``[ipv6]:port`` or ``unix:path``; close it after use.

    It connects at the first call, and again by itself. TLS is used if files are given, on TCP only: what
    protects a Unix socket is its mode. ``has_own_connection`` keeps it from sharing the connection of another
    channel to the same server. Raises `InvalidArgument` on a malformed address or bad TLS files.
    """
    target = addresses.parse(address, setting="address")
    arguments = options.channel_options(transport, has_own_connection=has_own_connection)
    if tls_files is None or target.is_unix:
        return grpc.aio.insecure_channel(str(target), options=arguments)
    return grpc.aio.secure_channel(str(target), tls.channel_credentials(tls_files), options=arguments)
