"""Memory limits of workers by the kernel: cgroup v2, else v1, else none.

A worker's cgroup holds its processes but not its shim, which must outlive an OOM kill in it.
"""

from pathlib import Path

from leasehold.nodeagent import cgroup_v1, cgroup_v2
from leasehold.nodeagent.cgroup_folder import PREFIX, CgroupKind, Cgroups, NoCgroups, WorkerCgroup

__all__ = ["CgroupKind", "Cgroups", "NoCgroups", "WorkerCgroup", "detect", "reopened"]


def detect(root: Path | None = None) -> Cgroups:
    """What can be used here.

    `root` is a delegated cgroup v2 folder, or a v1 memory folder, for the workers; without one, v1 below this
    process's own memory cgroup. `NoCgroups`, with the reason, where neither can be written.
    """
    if root is None:
        return cgroup_v1.below_own()
    if (root / "memory.limit_in_bytes").exists():
        return cgroup_v1.at(root)
    return cgroup_v2.at(root)


def reopened(path: Path, worker_id: str) -> WorkerCgroup | None:
    """The cgroup that an earlier agent made for a worker, wherever that was; None if gone, or another's."""
    if path.name != f"{PREFIX}{worker_id}" or not (path / "cgroup.procs").exists():
        return None
    if (path / "memory.limit_in_bytes").exists():
        return cgroup_v1.V1Cgroup(path)
    return cgroup_v2.V2Cgroup(path)
