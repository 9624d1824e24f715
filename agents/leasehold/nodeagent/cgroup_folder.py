"""What the two kernel interfaces for cgroups share, and what the agent asks of them."""

import contextlib
import enum
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from leasehold.core import errors

#: Folders of workers' cgroups are called this and the worker's id.
PREFIX = "worker-"
_KILL_ROUNDS = 5


class CgroupKind(enum.StrEnum):
    """Which kernel interface enforces limits."""

    V2 = "v2"
    V1 = "v1"
    NONE = "none"


class WorkerCgroup(Protocol):
    """The cgroup of one worker."""

    @property
    def kind(self) -> CgroupKind:
        """Which kernel interface it is."""
        ...

    @property
    def path(self) -> Path:
        """Its folder. A process that writes ``0`` to ``cgroup.procs`` in it is in."""
        ...

    def set_limit(self, limit_bytes: int) -> None:
        """Set or change the limit; 0: none. Raises `FailedPrecondition` if the kernel refuses."""
        ...

    def set_cpus(self, cpus: int) -> bool:
        """Grant so many processors and no more; 0: all. False where it cannot be enforced here."""
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

    def path(self, worker_id: str) -> Path | None:
        """Where a worker's cgroup will be; None where there are no cgroups."""
        ...

    def create(self, worker_id: str, limit_bytes: int) -> WorkerCgroup | None:
        """A new cgroup with its limit (0: none), None where there are no cgroups.

        Raises `FailedPrecondition` if the kernel refuses.
        """
        ...


class NoCgroups:
    """No cgroup can be written here: limits are the agent's to watch."""

    def __init__(self, detail: str = "not wanted") -> None:
        self._detail = detail

    @property
    def kind(self) -> CgroupKind:
        """NONE."""
        return CgroupKind.NONE

    @property
    def detail(self) -> str:
        """What was missing."""
        return self._detail

    def path(self, worker_id: str) -> Path | None:
        """Always None."""
        return None

    def create(self, worker_id: str, limit_bytes: int) -> WorkerCgroup | None:
        """Always None."""
        return None


class CgroupFolder:
    """What the two interfaces share: a folder with ``cgroup.procs``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._path

    def pids(self) -> list[int]:
        """Its processes now."""
        return [int(line) for line in self.read("cgroup.procs").split()]

    def kill(self) -> None:
        """SIGKILL each process in it, again while new ones appear."""
        for _ in range(_KILL_ROUNDS):
            pids = self.pids()
            for pid in pids:
                self._kill_one(pid)
            if not pids:
                return

    def remove(self) -> bool:
        """Remove it; False if processes are still in it."""
        try:
            self._path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def read(self, name: str) -> str:
        """The text of one of its files; empty if it cannot be read."""
        try:
            return (self._path / name).read_text()
        except OSError:
            return ""

    def write(self, name: str, value: int | str) -> None:
        """Write to one of its files. Raises `FailedPrecondition` if the kernel refuses."""
        write_file(self._path / name, value)

    def counter(self, file_name: str, name: str) -> int | None:
        """The number beside `name` in a file of names and numbers."""
        return counters(self.read(file_name)).get(name)

    def _kill_one(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                # Read again, now that the descriptor pins it: the PID may be another's by now.
                if pid in self.pids():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def counters(table: str) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in table.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def write_file(path: Path, value: int | str) -> None:
    """Write to a file of a cgroup, which must be there. Raises `FailedPrecondition` if the kernel refuses."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise errors.FailedPrecondition(f"{path} cannot be set to {value}: {error.strerror}") from error


def folder_of(root: Path, worker_id: str) -> Path:
    """Where a worker's cgroup is, below `root`."""
    return root / f"{PREFIX}{worker_id}"


def created(
    path: Path,
    limit_bytes: int,
    wrap: Callable[[Path], WorkerCgroup],
    make: Callable[[Path], None],
) -> WorkerCgroup:
    """A new cgroup at `path`, with its limit; nothing stays where that fails."""
    try:
        make(path)
    except OSError as error:
        raise errors.FailedPrecondition(f"{path} cannot be made: {error.strerror}") from error
    cgroup = wrap(path)
    try:
        cgroup.set_limit(limit_bytes)
    except errors.FailedPrecondition:
        cgroup.remove()
        raise
    return cgroup
