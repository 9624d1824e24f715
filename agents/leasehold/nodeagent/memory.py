"""How much memory the host has left for workers: MemAvailable, cgroups above them, a budget; and the pressure.

Read once a second by every agent, so it is a handful of small files and no more. Which cgroups count is asked
once, at the start: those above the place where the workers live, for a limit on the agent's own group is none
on theirs.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model

#: cgroup v1 writes "no limit" as the largest multiple of a page; nothing real comes near.
_NO_LIMIT_BYTES: Final = 2**60
_STAT_V2: Final = b"inactive_file"
_STAT_V1: Final = b"total_inactive_file"
_RECLAIM_V2: Final = b"pgsteal"
_RECLAIM_HOST: Final = (b"pgsteal_kswapd", b"pgsteal_direct")


@dataclass(frozen=True, slots=True)
class Group:
    """A cgroup that may limit the workers' memory."""

    #: Folder in the file system.
    path: pathlib.Path
    #: As users write it: below the hierarchy's root.
    name: str
    is_v2: bool


@dataclass(frozen=True, slots=True)
class _Room:
    available_bytes: int
    total_bytes: int
    bound_by: str


class MemoryReader:
    """Reads samples of the host's memory. `root` is where /proc is found; a test gives a tree of its own."""

    def __init__(self, groups: Sequence[Group] = (), *, root: pathlib.Path = pathlib.Path("/")) -> None:
        self._root = root
        self._groups = tuple(groups)
        self._reclaimed_before: int | None = None

    def sample(self, *, held_bytes: int = 0, budget_bytes: int | None = None) -> model.MemorySample:
        """The memory now. `held_bytes`: of all workers of this agent, which a budget is less by.

        Raises `Unavailable` if /proc/meminfo cannot be read.
        """
        host = self._meminfo()
        rooms = [_Room(host["MemAvailable"], host["MemTotal"], "MemAvailable")]
        reclaimed = self._reclaimed_on_host()
        for group in self._groups:
            room, pages = _read_group(group)
            reclaimed = reclaimed if pages is None else (reclaimed or 0) + pages
            if room is not None:
                rooms.append(room)
        if budget_bytes is not None:
            rooms.append(_Room(max(0, budget_bytes - held_bytes), budget_bytes, "memory budget"))
        least = min(rooms, key=lambda room: room.available_bytes)
        some, full = self._pressure()
        return model.MemorySample(
            total_bytes=min(room.total_bytes for room in rooms),
            available_bytes=least.available_bytes,
            bound_by=least.bound_by,
            swap_total_bytes=host.get("SwapTotal", 0),
            swap_used_bytes=max(0, host.get("SwapTotal", 0) - host.get("SwapFree", 0)),
            pressure_some_percent=some,
            pressure_full_percent=full,
            reclaimed_pages=self._since_last(reclaimed),
        )

    def _meminfo(self) -> dict[str, int]:
        data = read_small(self._root / "proc/meminfo")
        found: dict[str, int] = {}
        for line in (data or b"").splitlines():
            name, _, rest = line.partition(b":")
            if name in (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree"):
                found[name.decode()] = int(rest.split()[0]) * 1024
        if "MemTotal" not in found or "MemAvailable" not in found:
            raise errors.Unavailable(f"{self._root / 'proc/meminfo'} tells no MemAvailable")
        return found

    def _pressure(self) -> tuple[float | None, float | None]:
        data = read_small(self._root / "proc/pressure/memory")
        if data is None:
            return None, None
        found: dict[bytes, float] = {}
        for line in data.splitlines():
            words = line.split()
            if len(words) > 1 and words[1].startswith(b"avg10="):
                found[words[0]] = float(words[1][6:])
        return found.get(b"some"), found.get(b"full")

    def _reclaimed_on_host(self) -> int | None:
        data = read_small(self._root / "proc/vmstat", bytes_max=65_536)
        if data is None:
            return None
        values = [_field(data, name) for name in _RECLAIM_HOST]
        return sum(value for value in values if value is not None)

    def _since_last(self, reclaimed: int | None) -> int | None:
        before, self._reclaimed_before = self._reclaimed_before, reclaimed
        if before is None or reclaimed is None:
            return None
        # A group that went away took its count with it.
        return max(0, reclaimed - before)


def _read_group(group: Group) -> tuple[_Room | None, int | None]:
    """What a group has left, None if it has no limit; and the pages that were reclaimed in it, if it tells."""
    limit_name, usage_name = (
        ("memory.max", "memory.current") if group.is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limit = _number(group.path / limit_name)
    if limit is None or limit >= _NO_LIMIT_BYTES:
        return None, None
    usage = _number(group.path / usage_name)
    stat = read_small(group.path / "memory.stat", bytes_max=65_536)
    if usage is None or stat is None:
        return None, None
    inactive = _field(stat, _STAT_V2 if group.is_v2 else _STAT_V1) or 0
    available = max(0, limit - max(0, usage - inactive))
    room = _Room(available, limit, f"cgroup {group.name}")
    return room, _field(stat, _RECLAIM_V2) if group.is_v2 else None


def _field(data: bytes, name: bytes) -> int | None:
    """The number behind a name, in lines of `name number`."""
    place = 0 if data.startswith(name + b" ") else data.find(b"\n" + name + b" ") + 1
    if place == 0 and not data.startswith(name + b" "):
        return None
    end = data.find(b"\n", place)
    return int(data[place + len(name) + 1 : end if end >= 0 else len(data)])


def _number(path: pathlib.Path) -> int | None:
    """The number in a file; None for `max`, or if it cannot be read."""
    data = read_small(path)
    try:
        return int(data) if data is not None else None
    except ValueError:
        return None


def read_small(path: pathlib.Path, *, bytes_max: int = 8_192) -> bytes | None:
    """The beginning of a file of the kernel, in one read; None if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, bytes_max)
    except OSError:
        return None
    finally:
        os.close(descriptor)


# Which groups


def groups_above(folder: pathlib.Path, mount: pathlib.Path, *, is_v2: bool) -> tuple[Group, ...]:
    """The group at `folder` and all above it, up to the root of its hierarchy at `mount`, the nearest first."""
    found = []
    for path in (folder, *folder.parents):
        if path == mount or not path.is_relative_to(mount):
            break
        found.append(Group(path, f"/{path.relative_to(mount)}", is_v2))
    # The root of the file system has no limit, but in a container it stands for the container's own group.
    found.append(Group(mount, "/", is_v2))
    return tuple(found)


def own_groups(root: pathlib.Path = pathlib.Path("/")) -> tuple[Group, ...]:
    """The groups above this process that can limit memory: of the unified hierarchy, and of v1's memory."""
    mounts = _mounts(root)
    found: list[Group] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount, is_v2 = mounts.get("v2"), True
        elif "memory" in controllers.split(","):
            mount, is_v2 = mounts.get("v1"), False
        else:
            continue
        if mount is None:
            continue
        shown, folder = mount
        # A container's own group may be mounted as the root: then the path says more than can be seen.
        below = path[len(shown) :] if shown != "/" and path.startswith(shown) else path
        place = folder / below.lstrip("/")
        found.extend(groups_above(place if place.is_dir() else folder, folder, is_v2=is_v2))
    return tuple(found)


def groups_of(folder: pathlib.Path, root: pathlib.Path = pathlib.Path("/")) -> tuple[Group, ...]:
    """The groups at and above `folder`, where the workers' groups are made."""
    for kind, (_, mount) in _mounts(root).items():
        if folder.is_relative_to(mount):
            return groups_above(folder, mount, is_v2=kind == "v2")
    return ()


def _mounts(root: pathlib.Path) -> dict[str, tuple[str, pathlib.Path]]:
    """Where the hierarchies are mounted: kind to (path within the hierarchy, folder)."""
    found: dict[str, tuple[str, pathlib.Path]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        place = (fields[3], root / fields[4].lstrip("/"))
        if tail[0] == "cgroup2":
            found.setdefault("v2", place)
        elif tail[0] == "cgroup" and "memory" in tail[2].split(","):
            found.setdefault("v1", place)
    return found


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


# The agent itself


def own_rss_bytes() -> int:
    """Resident memory of this process."""
    data = read_small(pathlib.Path("/proc/self/statm"))
    return int(data.split()[1]) * os.sysconf("SC_PAGE_SIZE") if data else 0


def pss_bytes(pid: int) -> int:
    """A process's proportional share of resident memory; 0 if that cannot be read."""
    data = read_small(pathlib.Path(f"/proc/{pid}/smaps_rollup")) or b""
    place = data.find(b"\nPss:")
    return int(data[place + 5 :].split(maxsplit=1)[0]) * 1024 if place >= 0 else 0


def protect(report: Callable[[str], None]) -> None:
    """Have the kernel's OOM killer take others first. Not permitted: `report` is told."""
    try:
        pathlib.Path("/proc/self/oom_score_adj").write_text("-900")
    except OSError as error:
        report(f"oom_score_adj stays as it is: {error.strerror}")
