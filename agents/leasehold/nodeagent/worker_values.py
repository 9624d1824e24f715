"""Values that the parts of the agent which handle worker processes pass to each other and to the driver."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from leasehold.core import processes
from leasehold.core.node import model


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How a worker's log is kept."""

    #: Of the file that is written; a longer one is rotated.
    max_bytes: int = 50 * 2**20
    #: Rotated files that are kept, at least 1.
    keep: int = 5
    #: The worker opens its log anew when it was renamed (as logging's WatchedFileHandler does). Else it is
    #: copied and cut, which may lose what is written in between; how much is told to who reads on.
    is_reopened: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """A worker to start."""

    #: Random UUID of this life, in its usual form with dashes.
    worker_id: str
    name: str
    pool: str
    number: int
    start_number: int
    #: Program and arguments; no shell. A program without a slash is looked up in `env`'s PATH.
    argv: tuple[str, ...]
    #: The whole environment; LEASEHOLD_* and WORKER_ID are added. Secrets are well here: it is never written.
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    cwd: Path = Path("/")
    #: 0: none.
    limit_bytes: int = 0
    stop: model.StopContract = model.PLAIN_STOP
    log: LogSettings = LogSettings()
    #: Processors that its cgroup grants it, where it can; 0: as many as there are.
    cpus: int = 0
    #: Its shim ends it after so long, with so much time to do so by itself. None: without end.
    max_run_seconds: float | None = None
    kill_grace_seconds: float = 10.0


class HeldSource(enum.StrEnum):
    """How held bytes were measured; best first."""

    CGROUP_V2 = "cgroup_v2"
    CGROUP_V1 = "cgroup_v1"
    PSS = "pss"
    RSS = "rss"


@dataclass(frozen=True, slots=True)
class Held:
    """What `available` would regain if a worker ended. `source` is None where nothing could be read."""

    bytes: int
    source: HeldSource | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What a worker tells of itself in its run folder."""

    #: None: it does not tell.
    is_busy: bool | None
    task_id: str = ""
    task_name: str = ""
    #: Whether it takes work; None: it does not tell.
    is_ready: bool | None = None


UNKNOWN_ACTIVITY = Activity(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """A worker's processes as status shows them."""

    process: processes.ProcessKey | None
    #: None: gone.
    shim: processes.ProcessKey | None
    limit_bytes: int
    #: Whether the kernel enforces the limit.
    is_limit_enforced: bool
    is_adopted: bool
    log_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A record that could not be read; it was moved aside and the rest went on."""

    #: Where it is now.
    path: Path
    worker_id: str
    why: str
    #: What became of its worker, for people.
    outcome: str
