"""TCP ports of the loopback address: is one free, who has it, give me one."""

import contextlib
import random
import socket
import threading
from pathlib import Path

import psutil
from leasehold.core import errors

HOST = "127.0.0.1"
_FIRST_PORT = 15000  # below are the well-known ports and the fixed defaults of common servers
_TRIES = 200
_USUAL_FIRST_EPHEMERAL_PORT = 32768

_handed_out: set[int] = set()
_handed_out_lock = threading.Lock()
_random = random.SystemRandom()


def check_free(port: int, flag: str) -> None:
    """Return if ``port`` can be bound on 127.0.0.1.

    Else raises `FailedPrecondition` naming the port, who holds it (where that may be seen) and ``flag``, the
    option that chooses another; its ``field`` is the flag and its metadata has ``port`` and, if known, ``pid``.
    Raises `InvalidArgument` for a number that is no port.
    """
    if not 1 <= port <= 65535:
        raise errors.InvalidArgument(f"{flag}: {port} is not a port (1 to 65535)", field=flag)
    try:
        _bind(port).close()
    except PermissionError as error:
        raise errors.PermissionDenied(
            f"port {port} needs privileges on this machine; choose another with {flag}", field=flag
        ) from error
    except OSError as error:
        holder = find_holder(port)
        if holder is None:
            who, metadata = "a process that this user may not see", {"port": str(port)}
        else:
            who, metadata = f"PID {holder[0]} ({holder[1]})", {"port": str(port), "pid": str(holder[0])}
        raise errors.FailedPrecondition(
            f"port {port} is taken, held by {who}; choose another with {flag}", field=flag, metadata=metadata
        ) from error


def find_holder(port: int) -> tuple[int, str] | None:
    """PID and command line of the process that listens on ``port``, else of one connected on it.

    None where that may not be seen: an ordinary user sees only its own processes.
    """
    holders: list[tuple[bool, int]] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            holders += [
                (connection.status != psutil.CONN_LISTEN, process.pid)
                for connection in process.net_connections(kind="tcp")
                if connection.laddr and connection.laddr.port == port
            ]
    for _, pid in sorted(holders):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            return pid, " ".join(process.cmdline()) or process.name()
    return None


def may_listen(pid: int, port: int) -> bool:
    """Whether it is the process ``pid`` that listens on ``port``; yes where it may not be seen who does."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return True
    return find_holder(port) is None


def free_port() -> int:
    """A port of 127.0.0.1 that is free now and is given to no other caller in this process.

    It lies below the kernel's range of ephemeral ports where there is room. A port inside that range may be
    taken by an outgoing connection while its server is down; a client that keeps dialling the dead server can
    even connect to itself there, and the server can then not come back.
    """
    low, high = _FIRST_PORT, _first_ephemeral_port() - 1
    with _handed_out_lock:
        for _ in range(_TRIES if high > low else 0):
            port = _random.randint(low, high)
            if port in _handed_out:
                continue
            with contextlib.suppress(OSError):
                _bind(port).close()
                _handed_out.add(port)
                return port
    with _bind(0) as probe:
        return int(probe.getsockname()[1])


def _bind(port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As the servers do: connections in TIME_WAIT hinder nobody, a listener still does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
    except OSError:
        probe.close()
        raise
    return probe


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # some sandboxes do not show it
        return _USUAL_FIRST_EPHEMERAL_PORT
