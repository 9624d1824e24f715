"""Words to systemd (sd_notify): ready, stopping, alive. Nothing at all where it did not ask."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

from leasehold.observe import logs

_ADDRESS: Final = "NOTIFY_SOCKET"
_WATCHDOG: Final = "WATCHDOG_USEC"
_WATCHDOG_PID: Final = "WATCHDOG_PID"
#: Not for workers: they are none of systemd's units.
VARIABLES: Final = (
    _ADDRESS,
    _WATCHDOG,
    _WATCHDOG_PID,
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "INVOCATION_ID",
)

_log = logs.get_logger(__name__)


class ServiceManager:
    """The service manager that started this process, if there is one."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get(_ADDRESS, "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = _watchdog_seconds(environment)

    def ready(self, status: str) -> None:
        """The agent serves."""
        self._tell(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """The configuration is read anew; `ready` follows."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """The agent is about to end."""
        self._tell(f"STOPPING=1\nSTATUS={status}")

    def alive(self) -> None:
        """For the watchdog."""
        if self.watchdog_seconds is not None:
            self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                # It must never hold the agent up: a word that does not go through is lost.
                notify.setblocking(False)
                notify.sendto(text.encode(), self._address)
        except OSError as error:
            _log.debug("service_manager_unreached", error=str(error))


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How often the manager wants to hear; None: not at all. A word at half of it is on time."""
    pid = environment.get(_WATCHDOG_PID, "")
    text = environment.get(_WATCHDOG, "")
    if not text.isascii() or not text.isdigit() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
