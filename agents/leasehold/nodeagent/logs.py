"""Workers' logs: files that the workers write themselves, rotated here, read with cursors that survive it.

A pipe to the agent would freeze its workers when the agent stalls. So a worker's standard output and error are
one file, opened for appending by its shim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leasehold.core import errors
from leasehold.nodeagent import worker_values

TAIL_LINES_DEFAULT = 100
TAIL_LINES_MAX = 10_000
BYTES_DEFAULT = 64 * 2**10
BYTES_MAX = 2**20
WAIT_SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a log, as `LogChunk` of the wire has it."""

    data: bytes
    #: Where to go on.
    cursor: str
    #: Lost by rotations between the cursor that was given and this chunk.
    lost_bytes: int = 0
    #: The worker has ended and everything was read.
    is_end: bool = False


class Logs:
    """The logs of one host: ``FOLDER/NAME.log`` and its rotated files ``NAME.log.000001`` and on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where the worker `name` writes. Raises `InvalidArgument` if that is no worker's name."""
        raise errors.Unimplemented("logs cannot be read yet")

    def rotate(self, name: str, settings: worker_values.LogSettings) -> bool:
        """Rotate a log that is over its size; whether it was. Blocks while it copies."""
        raise errors.Unimplemented("logs cannot be read yet")

    async def read(
        self,
        name: str,
        *,
        cursor: str = "",
        tail_lines: int = 0,
        wait_seconds: float = 0.0,
        bytes_max: int = 0,
        is_ended: Callable[[], bool] = lambda: False,
    ) -> Chunk:
        """Read on from `cursor`; without one, the last `tail_lines` lines (0: 100).

        Waits up to `wait_seconds` (at most 20) for something new. `bytes_max` 0 is 64 KiB, at most 1 MiB.
        Raises `InvalidArgument` for a cursor of another log or amounts out of range, `NotFound` if there is no
        such log.
        """
        raise errors.Unimplemented("logs cannot be read yet")
