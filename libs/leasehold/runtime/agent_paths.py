"""Where the agent of this host keeps its state, and where it listens: the same for it and for who asks it."""

import os
import pathlib
from collections.abc import Mapping
from typing import Final

from leasehold.core import errors

STATE_DIR_VARIABLE: Final = "LEASEHOLD_STATE_DIR"
SOCKET_VARIABLE: Final = "LEASEHOLD_SOCKET"
SOCKET_NAME: Final = "agent.sock"

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
    """The agent's socket: as given, else of ``LEASEHOLD_SOCKET``, else ``agent.sock`` in the state folder."""
    chosen = given or environment.get(SOCKET_VARIABLE, "").strip()
    if chosen:
        return pathlib.Path(chosen.removeprefix("unix:")).absolute()
    return state_dir(given_state_dir, environment) / SOCKET_NAME
