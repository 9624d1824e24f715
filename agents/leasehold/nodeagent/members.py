"""Which processes belong to a worker, told from strangers that were given an old PID.

A process belongs to a worker if it has the worker's id in its environment, holds the worker's lock, is a
child of the worker's shim, or is in the session that the worker's main process leads. Programs may overwrite
their environment (setproctitle does) or close descriptors; one of these is enough.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from leasehold.core import errors
from leasehold.runtime import identity as identities
from leasehold.runtime.identity import ProcessIdentity

_TOKEN = b"LEASEHOLD_WORKER_ID="
_SHIM_FILE = b"shim.py"

#: Since Linux 6.9: the signal goes to the group of the process behind the descriptor.
_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2
_KILL_ROUNDS = 20
_KILL_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/PID/stat that is used here."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_time_ticks: int

    @property
    def is_dead(self) -> bool:
        """A zombie is dead."""
        return self.state in "ZX"


def stat_of(pid: int) -> Stat | None:
    """What /proc tells of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return Stat(pid, fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def all_stats() -> list[Stat]:
    """Every process that can be seen."""
    found = (stat_of(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [stat for stat in found if stat is not None]


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it cannot be read."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (part.partition(b"=") for part in data.split(b"\0") if b"=" in part)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def has_token(pid: int, worker_id: str) -> bool:
    """Whether the process has the worker's id in its environment."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"\0" + _TOKEN + worker_id.encode() + b"\0" in b"\0" + data


def is_shim(pid: int) -> bool:
    """Whether the process runs a shim, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == _SHIM_FILE for word in words[1:5])


def holds(pid: int, lock: Path) -> bool:
    """Whether the process holds the worker's lock; one that only reads the file does not."""
    try:
        wanted = lock.stat()
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return "FLOCK" in Path(f"/proc/{pid}/fdinfo/{name}").read_text()
    return False


@dataclass(frozen=True, slots=True)
class Marks:
    """What a worker's processes are known by."""

    worker_id: str
    lock: Path

    def is_on(self, stat: Stat) -> bool:
        """Whether the process certainly belongs to the worker, by all but its descriptors: cheap."""
        return has_token(stat.pid, self.worker_id) or (
            has_token(stat.parent, self.worker_id) and is_shim(stat.parent)
        )

    def is_on_thoroughly(self, stat: Stat) -> bool:
        """Whether the process certainly belongs to the worker."""
        return self.is_on(stat) or holds(stat.pid, self.lock)


def find_all() -> dict[str, list[int]]:
    """PIDs of every process that has a worker's id in its environment, by that id."""
    found: dict[str, list[int]] = {}
    for stat in all_stats():
        if stat.is_dead:
            continue
        worker_id = environment(stat.pid).get("LEASEHOLD_WORKER_ID", "")
        if worker_id:
            found.setdefault(worker_id, []).append(stat.pid)
    return found


def send(process: ProcessIdentity, number: int, *, to_group: bool = False) -> bool:
    """Signal exactly this process, or its process group; False if it is dead.

    Raises `PermissionDenied` if it is another user's, and as `identity.open_pidfd` does.
    """
    descriptor = identities.open_pidfd(process)
    if descriptor is None:
        return False
    try:
        if not to_group:
            signal.pidfd_send_signal(descriptor, number)
            return True
        try:
            signal.pidfd_send_signal(descriptor, number, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError:  # an older kernel
            _send_to_each(process, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise errors.PermissionDenied(f"{process} may not be signalled: it is another user's") from error
    finally:
        os.close(descriptor)
    return True


def _send_to_each(leader: ProcessIdentity, number: int) -> None:
    # The leader is pinned by the caller and leads its group, so no other group can have that number now.
    for stat in all_stats():
        if stat.group == leader.pid and not stat.is_dead:
            _send_checked(stat, number)


def _send_checked(stat: Stat, number: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(stat.pid)
        try:
            now = stat_of(stat.pid)
            if now is not None and now.start_time_ticks == stat.start_time_ticks:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Session:
    """The session that a worker's main process leads, or led.

    A number cannot be another session's while a process of the old one exists. So a process in a session of
    that number is the worker's if the leader is there still, even as a zombie, or if the process is older than
    a moment at which the leader lived. When its death was seen says nothing: an agent may have been frozen.
    """

    leader: ProcessIdentity
    #: The last moment, as start times are told, at which the leader is known to have lived; None: its start.
    alive_at_ticks: int | None = None

    def members(self, stats: Iterable[Stat]) -> list[Stat]:
        """Those of `stats` that certainly are in the session."""
        is_pinned = identities.start_time_ticks(self.leader.pid) == self.leader.start_time_ticks
        before = self.leader.start_time_ticks if self.alive_at_ticks is None else self.alive_at_ticks
        return [
            stat
            for stat in stats
            if stat.session == self.leader.pid and (is_pinned or stat.start_time_ticks < before)
        ]


def kill_all(
    marks: Marks, session: Session | None, spared: Iterable[int], *, is_thorough: bool = False
) -> bool:
    """SIGKILL every process of the worker but `spared`; blocks up to 0.4 s. Whether none is left.

    `is_thorough`: those too that only hold its lock, which costs a look at every descriptor of the host.
    """
    is_on = marks.is_on_thoroughly if is_thorough else marks.is_on
    kept = {os.getpid(), *spared}
    for _ in range(_KILL_ROUNDS):
        stats = [stat for stat in all_stats() if stat.pid not in kept and not stat.is_dead]
        in_session = set() if session is None else {stat.pid for stat in session.members(stats)}
        found = [stat for stat in stats if stat.pid in in_session or is_on(stat)]
        if not found:
            return True
        for stat in found:
            _send_checked(stat, signal.SIGKILL)
        time.sleep(_KILL_PAUSE_SECONDS)
    return False


def shim_arguments(pid: int) -> tuple[str, tuple[str, ...]]:
    """The cgroup and the worker's command that a shim was given; empty if it is gone."""
    try:
        words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return "", ()
    for position, word in enumerate(words[:5]):
        if os.path.basename(word) == "shim.py":
            return words[position + 4] if len(words) > position + 4 else "", tuple(words[position + 5 :])
    return "", ()
