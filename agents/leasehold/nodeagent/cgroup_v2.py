"""Workers' cgroups by the unified hierarchy: a folder that was delegated to this user, without processes.

Under systemd that is a unit of its own with ``Delegate=memory``, never the agent's: a unit with processes below
it cannot be started again (EBUSY), and the workers are to survive that.
"""

import os
from collections.abc import Callable
from pathlib import Path

from leasehold.core import errors
from leasehold.nodeagent import cgroup_folder
from leasehold.nodeagent.cgroup_folder import CgroupKind

#: From so much of the limit on, the kernel reclaims and slows down the worker before it kills.
HIGH_FRACTION = 0.95

_CPU_PERIOD_US = 100_000
#: Of one processor: what the kernel gives to each cgroup by default.
_CPU_WEIGHT = 100
_CPU_WEIGHT_MAX = 10_000

#: What of a cgroup's kernel memory is not reclaimed, where the kernel has no sum of it (before 5.18).
_KERNEL_PARTS = ("slab_unreclaimable", "kernel_stack", "pagetables", "sec_pagetables", "percpu")


class V2Cgroup(cgroup_folder.CgroupFolder):
    """One worker's cgroup."""

    @property
    def kind(self) -> CgroupKind:
        """V2."""
        return CgroupKind.V2

    def set_limit(self, limit_bytes: int) -> None:
        """``memory.max``, ``memory.high`` before it, and an OOM killer that takes one process, not all.

        The kernel kills a process of the worker's pool then, and its main process gives the task back.
        """
        if limit_bytes > 0:
            self.write("memory.high", int(limit_bytes * HIGH_FRACTION))
            self.write("memory.max", limit_bytes)
        else:
            self.write("memory.high", "max")
            self.write("memory.max", "max")
        self.write("memory.oom.group", 0)

    def set_cpus(self, cpus: int) -> bool:
        """``cpu.max`` and, for what is beyond all quotas, ``cpu.weight``; False without the cpu controller."""
        if cpus == 0:
            return True
        try:
            self.write("cpu.max", f"{cpus * _CPU_PERIOD_US} {_CPU_PERIOD_US}")
            self.write("cpu.weight", min(_CPU_WEIGHT_MAX, cpus * _CPU_WEIGHT))
        except errors.FailedPrecondition:
            return False
        return True

    def oom_kills(self) -> int:
        """From ``memory.events``."""
        return self.counter("memory.events", "oom_kill") or 0

    def held_bytes(self) -> int | None:
        """anon + shmem + unreclaimable kernel memory; never page cache."""
        told = cgroup_folder.counters(self.read("memory.stat"))
        if "anon" not in told:
            return None
        if "kernel" in told:
            kernel = max(0, told["kernel"] - told.get("slab_reclaimable", 0))
        else:
            kernel = sum(told.get(part, 0) for part in _KERNEL_PARTS)
        return told["anon"] + told.get("shmem", 0) + kernel

    def kill(self) -> None:
        """All at once where the kernel can (5.14), else one by one."""
        try:
            self.write("cgroup.kill", 1)
        except errors.FailedPrecondition:
            super().kill()


class V2Cgroups:
    """Workers' cgroups below one delegated folder."""

    def __init__(self, root: Path, *, make: Callable[[Path], None] = os.mkdir) -> None:
        self._root = root
        self._make = make

    @property
    def kind(self) -> CgroupKind:
        """V2."""
        return CgroupKind.V2

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
        return cgroup_folder.created(path, limit_bytes, V2Cgroup, self._make)


def at(root: Path, *, make: Callable[[Path], None] = os.mkdir) -> cgroup_folder.Cgroups:
    """Workers' cgroups below `root`, where the memory controller can be given to them."""
    controllers = _words(root / "cgroup.controllers")
    if controllers is None:
        return cgroup_folder.NoCgroups(f"{root} is no cgroup")
    if "memory" not in controllers:
        return cgroup_folder.NoCgroups(f"{root} does not have the memory controller delegated to it")
    try:
        _hand_on(root, controllers)
    except errors.FailedPrecondition as error:
        return cgroup_folder.NoCgroups(f"{error.message} (it must be delegated, and hold no process itself)")
    if not os.access(root, os.W_OK):
        return cgroup_folder.NoCgroups(f"{root} cannot be written")
    return V2Cgroups(root, make=make)


def _hand_on(root: Path, controllers: list[str]) -> None:
    """Give memory and, where it can be had, cpu to the cgroups below. Raises `FailedPrecondition`."""
    control = root / "cgroup.subtree_control"
    given = _words(control) or ()
    wanted = [name for name in ("memory", "cpu") if name in controllers and name not in given]
    if not wanted:
        return
    try:
        cgroup_folder.write_file(control, " ".join(f"+{name}" for name in wanted))
    except errors.FailedPrecondition:
        if "memory" in wanted:  # all or nothing: processors may be what was refused
            cgroup_folder.write_file(control, "+memory")


def _words(path: Path) -> list[str] | None:
    try:
        return path.read_text().split()
    except OSError:
        return None
