"""Memory limits of workers by the kernel: cgroup v2, else v1, else none.

A worker's cgroup holds its processes but not its shim, which must outlive an OOM kill in it.
"""

import enum
from pathlib import Path
from typing import Protocol


class CgroupKind(enum.StrEnum):
    """Which kernel interface enforces limits."""

    V2 = "v2"
    V1 = "v1"
    NONE = "none"


class WorkerCgroup(Protocol):
    """The cgroup of one worker."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def join_file(self) -> Path:
        """A process that writes ``0`` here is in."""
        ...

    def set_limit(self, limit_bytes: int) -> None:
        """Set or change the limit. Raises `FailedPrecondition` if the kernel refuses."""
        ...

    def oom_kills(self) -> int:
        """How many of its processes the OOM killer has ended; 0 if that cannot be read."""
        ...

    def held_bytes(self) -> int | None:
        """What `available` regains when it is gone; None if that cannot be read."""
        ...

    def pids(self) -> list[int]:
        """Its processes now."""
        ...

    def kill(self) -> None:
        """SIGKILL all of its processes. They may take a moment to be gone."""
        ...

    def remove(self) -> bool:
        """Remove it; False if processes are still in it."""
        ...


class Cgroups(Protocol):
    """Where workers' cgroups are made."""

    @property
    def kind(self) -> CgroupKind:
        """What enforces limits here; NONE: the agent must poll."""
        ...

    @property
    def detail(self) -> str:
        """Why it is so, for people: the folder, or what was missing."""
        ...

    def create(self, worker_id: str, limit_bytes: int) -> WorkerCgroup | None:
        """A new cgroup with its limit (0: none), None where there are no cgroups.

        Raises `FailedPrecondition` if the kernel refuses.
        """
        ...

    def open(self, path: Path) -> WorkerCgroup | None:
        """The cgroup that an earlier agent made; None if it is gone."""
        ...


class NoCgroups:
    """No cgroup can be written here: limits are the agent's to watch."""

    kind = CgroupKind.NONE

    def __init__(self, detail: str = "not wanted") -> None:
        self.detail = detail

    def create(self, worker_id: str, limit_bytes: int) -> WorkerCgroup | None:
        """Always None."""
        return None

    def open(self, path: Path) -> WorkerCgroup | None:
        """Always None."""
        return None


def detect(root: Path | None = None) -> Cgroups:
    """What can be used here.

    `root` is a delegated cgroup v2 folder, or a v1 memory folder, for the workers; without one, v1 below this
    process's own memory cgroup. NoCgroups, with the reason, where neither can be written.
    """
    return NoCgroups("looked for nothing")
