"""Addresses that a server listens on: parsed, told apart by reach, and proven free before they are bound."""

import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from typing import Final

from leasehold.core import errors

# sun_path holds 108 bytes with its terminator.
_UNIX_PATH_BYTES_MAX: Final = 107


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a TCP host and port (0: any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_unix(self) -> bool:
        """Whether this is a Unix socket."""
        return bool(self.path)

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can reach it. A name other than localhost counts as reachable."""
        if self.is_unix or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def with_port(self, port: int) -> "Address":
        """The same host on another port."""
        return Address(host=self.host, port=port)

    def __str__(self) -> str:
        """As gRPC takes it, on both ends."""
        if self.is_unix:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, *, setting: str = "listen") -> Address:
    """Read ``host:port``, ``[ipv6]:port``, ``unix:path`` or ``unix:///path``.

    Raises `InvalidArgument` naming `setting`.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or "\0" in path or len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
            raise errors.InvalidArgument(
                f"{setting}: the path of a Unix socket has 1 to {_UNIX_PATH_BYTES_MAX} bytes: {text!r}",
                field=setting,
            )
        return Address(path=path)
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        is_sound = _is_ipv6(host)
    else:
        is_sound = bool(host) and not set(host) & set(":/[] \t\r\n\0")
    if not (colon and is_sound and port_text.isascii() and port_text.isdigit() and int(port_text) <= 65_535):
        raise errors.InvalidArgument(
            f"{setting}: {text!r} is neither host:port, [ipv6]:port nor unix:path", field=setting
        )
    return Address(host=host, port=int(port_text))


def parse_list(text: str, *, setting: str) -> tuple[str, ...]:
    """Each of several addresses with commas between, once. Raises `InvalidArgument` naming `setting`."""
    found = dict.fromkeys(str(parse(part.strip(), setting=setting)) for part in text.split(",") if part.strip())
    if not found:
        raise errors.InvalidArgument(f"{setting}: no address is given", field=setting)
    return tuple(found)


def require_free(address: Address, *, flag: str) -> None:
    """Raise `FailedPrecondition` if the address is in use or cannot be bound: by whom, and what to change.

    gRPC itself does not tell: it takes a live server's Unix socket away, and where ``localhost`` is both
    127.0.0.1 and ::1 it is content with the one that is free.
    """
    if address.is_unix:
        _require_free_path(address, flag)
    else:
        _require_free_port(address, flag)


def _require_free_port(address: Address, flag: str) -> None:
    # gRPC takes localhost for both of these, whatever /etc/hosts says.
    hosts = ("127.0.0.1", "::1") if address.host == "localhost" else (address.host,)
    failures: list[OSError] = []
    places = 0
    for host in hosts:
        try:
            found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise errors.InvalidArgument(f"{flag}: {host!r} does not resolve: {error}", field=flag) from error
        places += len(found)
        attempts = (_try_bind(family, where) for family, *_, where in found)
        failures += [failure for failure in attempts if failure is not None]
    for failure in failures:
        if failure.errno == errno.EADDRINUSE:
            raise taken(address, flag=flag) from failure
    # A name may stand for an address that this host lacks (::1 without IPv6), if another one is there.
    if len(failures) == places:
        raise errors.FailedPrecondition(
            f"cannot listen on {address}: {failures[0].strerror}; choose another address with {flag}",
            metadata={"address": str(address), "flag": flag},
        ) from failures[0]


def _try_bind(family: int, where: object) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections of a former server in TIME_WAIT are no reason to fail.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)  # type: ignore[arg-type]  # getaddrinfo's addresses have several shapes
            probe.listen(1)
    except OSError as error:
        return error
    return None


def taken(address: Address, *, flag: str) -> errors.FailedPrecondition:
    """The error for a port in use: names it, its holder where that can be seen, and the flag to change."""
    name, pid = _holder(address.port)
    by = f" by {name} (PID {pid})" if pid else ""
    return errors.FailedPrecondition(
        f"port {address.port} on {address.host} is taken{by}; stop that, or choose another with {flag}",
        metadata={
            "address": str(address),
            "port": str(address.port),
            "flag": flag,
            **({"holder": name, "pid": str(pid)} if pid else {}),
        },
    )


def _holder(port: int) -> tuple[str, int]:
    import psutil  # only this rare path needs it

    try:
        for connection in psutil.net_connections(kind="tcp"):
            # Processes of other users show no PID unless one is root.
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return psutil.Process(connection.pid).name(), connection.pid
    except (psutil.Error, OSError):
        return "", 0
    return "", 0


def _require_free_path(address: Address, flag: str) -> None:
    metadata = {"address": str(address), "flag": flag}
    try:
        is_socket = stat.S_ISSOCK(os.stat(address.path).st_mode)
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(address.path) or "."):
            return
        raise errors.FailedPrecondition(
            f"cannot listen on {address}: its folder does not exist; make it, or choose another with {flag}",
            metadata=metadata,
        ) from None
    except OSError as error:
        raise errors.FailedPrecondition(
            f"cannot listen on {address}: {error.strerror}; choose another with {flag}", metadata=metadata
        ) from error
    if not is_socket:
        raise errors.FailedPrecondition(
            f"cannot listen on {address}: another kind of file is there; choose another with {flag}",
            metadata=metadata,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            return  # left by a server that was killed; gRPC replaces it
        except OSError as error:
            raise errors.FailedPrecondition(
                f"cannot listen on {address}: {error.strerror}; choose another with {flag}", metadata=metadata
            ) from error
    raise errors.FailedPrecondition(
        f"{address} is taken by a running server; stop that, or choose another with {flag}", metadata=metadata
    )


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
