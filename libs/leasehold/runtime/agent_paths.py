"""Where the agent of this host keeps its state, and where it listens: the same for it and for who asks it."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Final

from leasehold.core import errors

STATE_DIR_VARIABLE: Final = "LEASEHOLD_STATE_DIR"
SOCKET_VARIABLE: Final = "LEASEHOLD_SOCKET"
SOCKET_NAME: Final = "agent.sock"

# sun_path holds 108 bytes with its terminator.
_PATH_BYTES_MAX: Final = 107
_OF_ROOT: Final = pathlib.Path("/var/lib/leasehold/agent")


def state_dir(given: str | None = None, environment: Mapping[str, str] = os.environ) -> pathlib.Path:
    """The state folder: as given, else of ``LEASEHOLD_STATE_DIR``, else root's or the user's own.

    Raises `InvalidArgument` where nothing tells one.
    """
    chosen = given or environment.get(STATE_DIR_VARIABLE, "").strip()
    if chosen:
        return pathlib.Path(chosen).absolute()
    if os.geteuid() == 0:
        return _OF_ROOT
    state = environment.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # as the XDG specification has it
        home = environment.get("HOME", "")
        if not os.path.isabs(home):
            raise errors.InvalidArgument("--state-dir: needed, you have no home folder", field="--state-dir")
        state = os.path.join(home, ".local", "state")
    return pathlib.Path(state) / "leasehold" / "agent"


def socket_path(
    given: str | None = None,
    given_state_dir: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> pathlib.Path:
    """The agent's socket: as given, else of ``LEASEHOLD_SOCKET``, else that of the state folder."""
    chosen = given or environment.get(SOCKET_VARIABLE, "").strip()
    if chosen:
        return pathlib.Path(chosen.removeprefix("unix:")).absolute()
    return default_socket(state_dir(given_state_dir, environment))


def default_socket(folder: pathlib.Path) -> pathlib.Path:
    """``agent.sock`` in the state folder; where that path is too long for a socket, a short one of its own."""
    inside = folder / SOCKET_NAME
    if len(os.fsencode(inside)) <= _PATH_BYTES_MAX:
        return inside
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir(), f"leasehold-{os.geteuid()}-{digest}", SOCKET_NAME)
