"""How much memory workers hold: what `available` regains when they end. Cheap enough for each sample.

By the worker's cgroup where it has one. Else the sum of RssAnon + RssShmem of its processes, which counts pages
that they share more than once; so near the limit the proportional share (Pss_Anon + Pss_Shmem) is read, which
costs tens of milliseconds a worker and is done at most every 30 s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leasehold.nodeagent import members
from leasehold.nodeagent.cgroup_folder import CgroupKind, WorkerCgroup
from leasehold.nodeagent.worker_values import Held, HeldSource

#: From so much of the limit on, the proportional share is worth its cost.
PSS_FRACTION = 0.70
PSS_EVERY_SECONDS = 30.0
#: One scan of /proc serves all workers for so long; a new child is seen that late.
SCAN_EVERY_SECONDS = 10.0

_KIB = 1024
_SOURCES = {CgroupKind.V2: HeldSource.CGROUP_V2, CgroupKind.V1: HeldSource.CGROUP_V1}


class SessionScan:
    """The processes of each session, by one scan of /proc for all workers. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float], *, every_seconds: float = SCAN_EVERY_SECONDS) -> None:
        self._clock = clock
        self._every = every_seconds
        self._scanned_at: float | None = None
        self._sessions: dict[int, list[int]] = {}

    def pids(self, session: int) -> list[int]:
        """Processes of the session; its leader at least."""
        now = self._clock()
        if self._scanned_at is None or now - self._scanned_at >= self._every:
            self._scanned_at = now
            self._sessions = {}
            for stat in members.all_stats():
                if not stat.is_dead:
                    self._sessions.setdefault(stat.session, []).append(stat.pid)
        return self._sessions.get(session) or [session]


@dataclass(slots=True)
class _Share:
    """A proportional share that was read, and the sum that it was read beside."""

    at: float
    pss_bytes: int
    rss_bytes: int


class HeldMeter:
    """What one worker holds."""

    def __init__(
        self, cgroup: WorkerCgroup | None, scan: SessionScan, clock: Callable[[], float], *, limit_bytes: int
    ) -> None:
        self.limit_bytes = limit_bytes
        self._cgroup = cgroup
        self._scan = scan
        self._clock = clock
        self._share: _Share | None = None

    def measure(self, main_pid: int) -> Held:
        """What it holds now. The caller knows that `main_pid` is its main process, which leads its session."""
        if self._cgroup is not None and (held := self._cgroup.held_bytes()) is not None:
            return Held(held, _SOURCES[self._cgroup.kind])
        pids = self._scan.pids(main_pid)
        sums = [found for found in map(rss_bytes, pids) if found is not None]
        if not sums:
            return Held(0, None)
        rss = sum(sums)
        if self.limit_bytes <= 0 or rss < PSS_FRACTION * self.limit_bytes:
            return Held(rss, HeldSource.RSS)
        return self._by_share(pids, rss)

    def _by_share(self, pids: list[int], rss: int) -> Held:
        share, now = self._share, self._clock()
        if share is None or now - share.at >= PSS_EVERY_SECONDS:
            parts = [pss_bytes(pid) for pid in pids]
            known = [part for part in parts if part is not None]
            if not known:
                return Held(rss, HeldSource.RSS)
            share = self._share = _Share(now, sum(known), rss)
        # Since then it can have grown by no more than the sum did, whoever shares the pages.
        return Held(min(rss, share.pss_bytes + max(0, rss - share.rss_bytes)), HeldSource.PSS)


def rss_bytes(pid: int) -> int | None:
    """RssAnon + RssShmem of a process; None if it is gone."""
    return _kib_lines(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:"))


def pss_bytes(pid: int) -> int | None:
    """Pss_Anon + Pss_Shmem of a process (Linux 5.4); None if it is gone, or may not be read."""
    return _kib_lines(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:"))


def _kib_lines(path: str, names: tuple[bytes, ...]) -> int | None:
    try:
        table = Path(path).read_bytes()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in table.splitlines() if line.startswith(names)]
    return sum(found) * _KIB if found else None
