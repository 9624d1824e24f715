"""Workers' cgroups by the first interface's memory controller: below this process's own, or a given one."""

import os
from pathlib import Path

from leasehold.nodeagent import cgroup_folder
from leasehold.nodeagent.cgroup_folder import CgroupKind

_FOLDER = "leasehold-workers"
_UNLIMITED = -1


class V1Cgroup(cgroup_folder.CgroupFolder):
    """One worker's cgroup."""

    @property
    def kind(self) -> CgroupKind:
        """V1."""
        return CgroupKind.V1

    def set_limit(self, limit_bytes: int) -> None:
        """``memory.limit_in_bytes``."""
        self.write("memory.limit_in_bytes", limit_bytes if limit_bytes > 0 else _UNLIMITED)

    def set_cpus(self, cpus: int) -> bool:
        """False: processors are another hierarchy's."""
        return cpus == 0

    def oom_kills(self) -> int:
        """From ``memory.oom_control``."""
        return self.counter("memory.oom_control", "oom_kill") or 0

    def held_bytes(self) -> int | None:
        """rss + shmem, of cgroups below it too; never page cache."""
        told = cgroup_folder.counters(self.read("memory.stat"))
        if "total_rss" not in told:
            return None
        return told["total_rss"] + told.get("total_shmem", 0)


class V1Cgroups:
    """Workers' cgroups below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def kind(self) -> CgroupKind:
        """V1."""
        return CgroupKind.V1

    @property
    def detail(self) -> str:
        """The folder."""
        return str(self._root)

    def path(self, worker_id: str) -> Path | None:
        """Where a worker's cgroup will be."""
        return cgroup_folder.folder_of(self._root, worker_id)

    def create(self, worker_id: str, limit_bytes: int) -> cgroup_folder.WorkerCgroup | None:
        """A new cgroup with its limit. Raises `FailedPrecondition` if the kernel refuses."""
        path = cgroup_folder.folder_of(self._root, worker_id)
        return cgroup_folder.created(path, limit_bytes, V1Cgroup, _make)


def _make(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.mkdir()


def at(root: Path) -> cgroup_folder.Cgroups:
    """Workers' cgroups below `root`, if it can be written."""
    if not os.access(root, os.W_OK):
        return cgroup_folder.NoCgroups(f"{root} cannot be written")
    probe = root / f"{_FOLDER}-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return cgroup_folder.NoCgroups(f"{root} cannot be written: {error.strerror}")
    return V1Cgroups(root / _FOLDER)


def below_own() -> cgroup_folder.Cgroups:
    """Workers' cgroups below this process's own memory cgroup."""
    own = own_folder(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    if own is None:
        return cgroup_folder.NoCgroups("no cgroup folder was given, and there is no v1 memory controller here")
    return at(own)


def own_folder(membership: str, mounts: str) -> Path | None:
    """This process's v1 memory cgroup, from /proc/self/cgroup and /proc/self/mountinfo; None: none."""
    path = None
    for line in membership.splitlines():
        _, controllers, found = line.split(":", 2)
        if "memory" in controllers.split(","):
            path = found
    if path is None:
        return None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        root, mount_point = before.split()[3:5]
        if kind != "cgroup" or "memory" not in options.split()[-1].split(","):
            continue
        # A container sees a part of the hierarchy: what is below the mount's root.
        if path == root or path.startswith(root.rstrip("/") + "/"):
            return Path(mount_point) / path.removeprefix(root).lstrip("/")
    return None
