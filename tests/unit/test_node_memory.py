from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import memory

GIB = model.GIB


def kib(count_bytes: int) -> int:
    return count_bytes // 1024


def host(root: Path, *, total: int = 64 * GIB, available: int = 32 * GIB, swap_free: int = 1 * GIB) -> None:
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {kib(total)} kB\nMemFree:        1 kB\nMemAvailable:   {kib(available)} kB\n"
        f"SwapTotal:      {kib(2 * GIB)} kB\nSwapFree:       {kib(swap_free)} kB\nHugePages_Total:       0\n"
    )


def v2_group(path: Path, *, limit: str, current: int = 0, inactive: int = 0, stolen: int = 0) -> memory.Group:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(
        f"anon 1\nfile 2\ninactive_anon 3\ninactive_file {inactive}\npgsteal_kswapd 7\npgsteal {stolen}\n"
    )
    return memory.Group(path, f"/{path.name}", True)


def v1_group(path: Path, *, limit: int, usage: int = 0, inactive: int = 0) -> memory.Group:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (path / "memory.stat").write_text(
        f"cache 1\ninactive_file 5\ntotal_rss 9\ntotal_inactive_file {inactive}\n"
    )
    return memory.Group(path, f"/{path.name}", False)


def test_without_limits_the_hosts_own_figure_counts(tmp_path: Path) -> None:
    host(tmp_path)

    sample = memory.MemoryReader(root=tmp_path).sample()

    assert (sample.total_bytes, sample.available_bytes, sample.bound_by) == (64 * GIB, 32 * GIB, "MemAvailable")
    assert (sample.swap_total_bytes, sample.swap_used_bytes) == (2 * GIB, 1 * GIB)
    assert sample.pressure_some_percent is None
    assert sample.reclaimed_pages is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_nearest_limit_above_the_workers_counts_less_its_reclaimable_cache(
    tmp_path: Path, version: int
) -> None:
    host(tmp_path)
    if version == 2:
        groups = [
            v2_group(tmp_path / "inner", limit="max", current=9 * GIB),
            v2_group(tmp_path / "slice", limit=str(16 * GIB), current=10 * GIB, inactive=3 * GIB),
            v2_group(tmp_path / "outer", limit=str(40 * GIB), current=12 * GIB),
        ]
    else:
        groups = [
            v1_group(tmp_path / "inner", limit=2**63 - 4096, usage=9 * GIB),
            v1_group(tmp_path / "slice", limit=16 * GIB, usage=10 * GIB, inactive=3 * GIB),
            v1_group(tmp_path / "outer", limit=40 * GIB, usage=12 * GIB),
        ]

    sample = memory.MemoryReader(groups, root=tmp_path).sample()

    assert (sample.available_bytes, sample.bound_by) == (9 * GIB, "cgroup /slice")
    assert sample.total_bytes == 16 * GIB


def test_a_group_over_its_limit_leaves_nothing_not_less(tmp_path: Path) -> None:
    host(tmp_path)
    group = v2_group(tmp_path / "g", limit=str(1 * GIB), current=2 * GIB)

    assert memory.MemoryReader([group], root=tmp_path).sample().available_bytes == 0


def test_a_group_that_is_gone_limits_nothing(tmp_path: Path) -> None:
    host(tmp_path)
    group = memory.Group(tmp_path / "gone", "/gone", True)

    assert memory.MemoryReader([group], root=tmp_path).sample().available_bytes == 32 * GIB


def test_a_budget_is_less_what_the_workers_hold_and_never_more_than_the_host_has(tmp_path: Path) -> None:
    host(tmp_path, available=1 * GIB)
    reader = memory.MemoryReader(root=tmp_path)

    tight = reader.sample(held_bytes=300 * 2**20, budget_bytes=512 * 2**20)
    over = reader.sample(held_bytes=600 * 2**20, budget_bytes=512 * 2**20)
    wide = reader.sample(held_bytes=0, budget_bytes=8 * GIB)

    assert (tight.available_bytes, tight.bound_by) == (212 * 2**20, "memory budget")
    assert tight.total_bytes == 512 * 2**20
    assert over.available_bytes == 0
    assert (wide.available_bytes, wide.bound_by) == (1 * GIB, "MemAvailable")


def test_pressure_is_that_of_the_last_ten_seconds(tmp_path: Path) -> None:
    host(tmp_path)
    (tmp_path / "proc/pressure/memory").write_text(
        "some avg10=12.50 avg60=1.00 avg300=0.10 total=99\nfull avg10=3.25 avg60=0.00 avg300=0.00 total=1\n"
    )

    sample = memory.MemoryReader(root=tmp_path).sample()

    assert (sample.pressure_some_percent, sample.pressure_full_percent) == (12.5, 3.25)


def test_reclaim_is_counted_from_one_sample_to_the_next_on_the_host_and_in_limited_groups(
    tmp_path: Path,
) -> None:
    host(tmp_path)
    vmstat = tmp_path / "proc/vmstat"
    vmstat.write_text("pgfault 1\npgsteal_kswapd 100\npgsteal_direct 10\npgsteal_khugepaged 5\n")
    group = v2_group(tmp_path / "g", limit=str(1 * GIB), stolen=1000)
    reader = memory.MemoryReader([group], root=tmp_path)

    first = reader.sample()
    vmstat.write_text("pgfault 1\npgsteal_kswapd 130\npgsteal_direct 15\npgsteal_khugepaged 5\n")
    v2_group(tmp_path / "g", limit=str(1 * GIB), stolen=1200)
    second = reader.sample()
    third = reader.sample()

    assert (first.reclaimed_pages, second.reclaimed_pages, third.reclaimed_pages) == (None, 235, 0)


def test_a_host_without_the_figure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="tells no MemAvailable"):
        memory.MemoryReader(root=tmp_path).sample()


def mounted(root: Path, *mounts: str, cgroup: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    (root / "proc/self/cgroup").write_text(cgroup)


def test_the_groups_above_a_process_are_found_in_both_hierarchies(tmp_path: Path) -> None:
    mounted(
        tmp_path,
        "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        "32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        cgroup="5:cpu:/x\n4:memory:/jobs/agent\n0::/system.slice/a.service\n",
    )
    for folder in ("memory/jobs/agent", "unified/system.slice/a.service"):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True)

    groups = memory.own_groups(tmp_path)

    assert [(group.name, group.is_v2) for group in groups] == [
        ("/jobs/agent", False),
        ("/jobs", False),
        ("/", False),
        ("/system.slice/a.service", True),
        ("/system.slice", True),
        ("/", True),
    ]


def test_in_a_container_whose_group_is_mounted_as_the_root_that_one_counts(tmp_path: Path) -> None:
    mounted(
        tmp_path,
        "30 24 0:26 /docker/c0ffee /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        cgroup="0::/docker/c0ffee\n",
    )
    root = tmp_path / "sys/fs/cgroup"
    root.mkdir(parents=True)

    assert memory.own_groups(tmp_path) == (memory.Group(root, "/", True),)


def test_workers_with_a_place_of_their_own_are_limited_there(tmp_path: Path) -> None:
    mounted(tmp_path, "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", cgroup="0::/agent\n")
    workers = tmp_path / "sys/fs/cgroup/system.slice/leasehold-workers.service"
    workers.mkdir(parents=True)

    names = [group.name for group in memory.groups_of(workers, tmp_path)]

    assert names == ["/system.slice/leasehold-workers.service", "/system.slice", "/"]
    assert memory.groups_of(tmp_path / "elsewhere", tmp_path) == ()


def test_this_host_can_be_read() -> None:
    sample = memory.MemoryReader(memory.own_groups()).sample()

    assert 0 < sample.available_bytes <= sample.total_bytes
    assert memory.own_rss_bytes() > 2**20
