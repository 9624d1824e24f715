"""cgroup v2 on a pretended tree (a folder whose files the kernel would make), and where v1 is looked for."""

import os
import subprocess
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import cgroup_v1, cgroup_v2, cgroups

WORKER = "6f1d9c1e-0000-4000-8000-000000000001"

MEMORY_STAT = """\
anon 1000000
file 99000000
kernel 300000
kernel_stack 50000
pagetables 40000
percpu 1000
shmem 200000
slab_reclaimable 120000
slab_unreclaimable 80000
"""


def fill(folder: Path) -> None:
    """The files of a cgroup, as a kernel of today makes them."""
    (folder / "cgroup.procs").write_text("")
    (folder / "cgroup.kill").write_text("")
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.high").write_text("max\n")
    (folder / "memory.oom.group").write_text("1\n")
    (folder / "memory.stat").write_text(MEMORY_STAT)
    (folder / "memory.events").write_text("low 0\nhigh 3\nmax 2\noom 1\noom_kill 4\noom_group_kill 0\n")


def make(path: Path) -> None:
    os.mkdir(path)
    fill(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A delegated folder."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("\n")
    return tmp_path


def created(root: Path, limit_bytes: int = model.GIB) -> cgroups.WorkerCgroup:
    cgroup = cgroup_v2.at(root, make=make).create(WORKER, limit_bytes)
    assert cgroup is not None
    return cgroup


def test_the_memory_controller_is_handed_on_to_the_workers(root: Path) -> None:
    found = cgroup_v2.at(root, make=make)

    assert (found.kind, found.detail) == (cgroups.CgroupKind.V2, str(root))
    assert (root / "cgroup.subtree_control").read_text() == "+memory +cpu"


def test_processors_are_granted_by_quota_and_weight_where_the_controller_is_there(root: Path) -> None:
    cgroup = created(root)
    assert not cgroup.set_cpus(3)

    for name in ("cpu.max", "cpu.weight"):
        (cgroup.path / name).write_text("")
    assert cgroup.set_cpus(3)

    assert (cgroup.path / "cpu.max").read_text() == "300000 100000"
    assert (cgroup.path / "cpu.weight").read_text() == "300"
    assert cgroup.set_cpus(0)
    assert (cgroup.path / "cpu.max").read_text() == "300000 100000"


def test_a_worker_has_its_limit_a_brake_before_it_and_an_oom_killer_that_takes_one_process(root: Path) -> None:
    cgroup = created(root, 1000 * model.MIB)

    assert cgroup.path == root / f"worker-{WORKER}"
    assert (cgroup.path / "memory.max").read_text() == f"{1000 * model.MIB}"
    assert (cgroup.path / "memory.high").read_text() == f"{950 * model.MIB}"
    assert (cgroup.path / "memory.oom.group").read_text().startswith("0")


def test_a_limit_can_be_changed_and_taken_away(root: Path) -> None:
    cgroup = created(root)
    cgroup.set_limit(2 * model.GIB)
    assert (cgroup.path / "memory.max").read_text() == f"{2 * model.GIB}"
    (cgroup.path / "memory.max").write_text("")
    cgroup.set_limit(0)

    assert (cgroup.path / "memory.max").read_text() == "max"


def test_held_memory_is_what_is_given_back_and_never_page_cache(root: Path) -> None:
    cgroup = created(root)
    assert cgroup.held_bytes() == 1_000_000 + 200_000 + (300_000 - 120_000)

    without_sum = "".join(line for line in MEMORY_STAT.splitlines(True) if not line.startswith("kernel "))
    (cgroup.path / "memory.stat").write_text(without_sum)
    assert cgroup.held_bytes() == 1_000_000 + 200_000 + 80_000 + 50_000 + 40_000 + 1_000

    (cgroup.path / "memory.stat").unlink()
    assert cgroup.held_bytes() is None


def test_oom_kills_are_read_from_its_events(root: Path) -> None:
    cgroup = created(root)
    assert cgroup.oom_kills() == 4
    (cgroup.path / "memory.events").unlink()

    assert cgroup.oom_kills() == 0


def test_all_are_killed_at_once_where_the_kernel_can(root: Path) -> None:
    cgroup = created(root)
    cgroup.kill()

    assert (cgroup.path / "cgroup.kill").read_text() == "1"


def test_an_older_kernel_kills_one_by_one(root: Path) -> None:
    cgroup = created(root)
    (cgroup.path / "cgroup.kill").unlink()
    child = subprocess.Popen(["sleep", "1000"])
    (cgroup.path / "cgroup.procs").write_text(f"{child.pid}\n")
    cgroup.kill()

    assert child.wait(10) == -9


def test_one_that_an_earlier_agent_made_is_found_by_its_path(root: Path) -> None:
    path = created(root).path
    assert isinstance(cgroups.reopened(path, WORKER), cgroup_v2.V2Cgroup)
    assert cgroups.reopened(root / f"worker-{WORKER}x", WORKER) is None

    (path / "memory.limit_in_bytes").write_text("1")
    assert isinstance(cgroups.reopened(path, WORKER), cgroup_v1.V1Cgroup)


def test_a_folder_that_is_no_workers_is_never_taken_for_one(root: Path) -> None:
    fill(root)

    assert cgroups.reopened(root, WORKER) is None


def test_where_the_kernel_refuses_the_limit_no_cgroup_stays(root: Path) -> None:
    def make_without_limit(path: Path) -> None:
        os.mkdir(path)

    with pytest.raises(errors.FailedPrecondition, match=r"memory\.high cannot be set"):
        cgroup_v2.at(root, make=make_without_limit).create(WORKER, model.GIB)

    assert list(root.glob("worker-*")) == []


def test_it_is_made_where_it_was_said_to_be(root: Path) -> None:
    found = cgroup_v2.at(root, make=make)

    assert found.path(WORKER) == created(root).path
    assert cgroup_v1.V1Cgroups(root).path(WORKER) == root / f"worker-{WORKER}"
    assert cgroups.NoCgroups().path(WORKER) is None


@pytest.mark.parametrize(
    ("controllers", "told"),
    [(None, "is no cgroup"), ("cpu pids\n", "does not have the memory controller delegated")],
)
def test_why_there_are_no_cgroups_is_told(tmp_path: Path, controllers: str | None, told: str) -> None:
    if controllers is not None:
        (tmp_path / "cgroup.controllers").write_text(controllers)
    found = cgroups.detect(tmp_path)

    assert found.kind is cgroups.CgroupKind.NONE
    assert told in found.detail
    assert found.create(WORKER, model.GIB) is None


def test_a_folder_that_holds_processes_itself_is_told(root: Path) -> None:
    (root / "cgroup.subtree_control").unlink()

    assert "must be delegated, and hold no process itself" in cgroup_v2.at(root).detail


MOUNTS = """\
30 24 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct
31 24 0:27 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 24 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("membership", "expected"),
    [
        ("4:memory:/docker/abc\n0::/\n", "/sys/fs/cgroup/memory"),
        ("4:memory:/docker/abc/agent\n", "/sys/fs/cgroup/memory/agent"),
        ("4:memory:/docker/abcdef\n", None),
        ("4:cpu,cpuacct:/\n0::/user.slice\n", None),
    ],
)
def test_the_own_v1_cgroup_is_found_as_the_container_sees_it(membership: str, expected: str | None) -> None:
    assert cgroup_v1.own_folder(membership, MOUNTS) == (None if expected is None else Path(expected))


def test_v1_holds_rss_and_shmem_of_the_groups_below_it_too(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text(
        "cache 9\nrss 5\nshmem 1\ntotal_cache 900\ntotal_rss 700\ntotal_shmem 30\n"
    )
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    cgroup = cgroup_v1.V1Cgroup(tmp_path)

    assert (cgroup.held_bytes(), cgroup.oom_kills()) == (730, 2)
