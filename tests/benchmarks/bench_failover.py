"""The leader of three allocators is killed: how soon after the election its successor renews, and lets grow."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator

import harness
from leasehold import devstack
from leasehold.client import engine as engines
from leasehold.client import grpc_link
from leasehold.client import session as sessions
from leasehold.core.budget import messages
from leasehold.etcd import adapter, observer
from leasehold.etcd import port as etcd_port

BUDGET = "failover"
PREFIX = "/leasehold"
LIMITS = {"max_concurrent_requests": 400.0, "rpm_limit": 12_000.0, "tpm_limit": 1_200_000.0}
HOLDERS = 4
ROUNDS = 6
WAIT_SECONDS = 30.0
TARGET_SECONDS = 1.0


class Probe(engines.Engine):
    """The client's own engine; it remembers when each leader first answered, and first gave units."""

    def __init__(self, name: str) -> None:
        super().__init__(budget=BUDGET, name=name, start=lambda _: None)
        #: Instants by the revision at which a leader was elected.
        self.renewed_at: dict[int, float] = {}
        self.grown_at: dict[int, float] = {}
        self.news = asyncio.Event()

    def granted(self, session: int, grant: messages.Grant) -> None:
        """See `Engine`."""
        at, revision = time.monotonic(), grant.epoch.revision
        before = self.limiter.amounts()
        super().granted(session, grant)
        after = self.limiter.amounts()
        if grant.answered_sequence:
            self.renewed_at.setdefault(revision, at)
        if after and all(after[name] > before.get(name, 0) for name in after):
            self.grown_at.setdefault(revision, at)
        self.news.set()


@contextlib.asynccontextmanager
async def _holder(name: str, addresses: list[str]) -> AsyncIterator[Probe]:
    """A worker on a connection of its own, active all the time."""
    session = sessions.Session(addresses, grpc_link.GrpcLink())
    probe = Probe(name)
    probe.poke = session.poke
    session.add(probe)
    probe.update_activity(is_active=True, current_load=0.0, active_tasks=0)
    try:
        yield probe
    finally:
        await session.remove(probe, timeout_seconds=1.0)
        await session.close(timeout_seconds=1.0)


async def _seen(at: dict[int, float], revision: int, news: asyncio.Event) -> float:
    async with asyncio.timeout(WAIT_SECONDS):
        while revision not in at:
            news.clear()
            await news.wait()
    return at[revision]


class Elections:
    """Who leads, and since when, as a watch on the leader's key tells."""

    def __init__(self, etcd: etcd_port.EtcdPort) -> None:
        self._etcd = etcd
        self._leaders: asyncio.Queue[tuple[observer.Leader, float]] = asyncio.Queue()

    async def watch(self) -> None:
        """Follow the key, for ever."""
        key = observer.leader_key(PREFIX)
        async for event in self._etcd.watch_prefix(key, 1):
            if isinstance(event, etcd_port.KeyPut):
                self._leaders.put_nowait((observer.decode(event.record), time.monotonic()))

    async def next(self) -> tuple[observer.Leader, float]:
        """The next leader, and the instant at which its key was seen."""
        async with asyncio.timeout(WAIT_SECONDS):
            return await self._leaders.get()


def _restart(child: devstack.Child, address: str) -> None:
    child.start()
    child.wait_until(lambda: harness.is_up(address), timeout_seconds=WAIT_SECONDS, cancel=threading.Event())


class Figures:
    """Seconds of each round."""

    def __init__(self) -> None:
        self.election: list[float] = []
        self.first_renewal: list[float] = []
        self.last_renewal: list[float] = []
        self.first_growth: list[float] = []


async def _round(
    number: int, plane: harness.Plane, probes: list[Probe], elections: Elections, leader: str, figures: Figures
) -> str:
    """Kill the leader; the address of the next. A newcomer, who waits since the kill, is the one to grow."""
    child = plane.children[plane.addresses.index(leader)]
    killed_at = time.monotonic()
    await asyncio.to_thread(child.kill)
    async with _holder(f"newcomer-{number}", plane.addresses) as newcomer:
        successor, elected_at = await elections.next()
        revision = successor.revision
        renewed = [await _seen(probe.renewed_at, revision, probe.news) for probe in probes]
        grown_at = await _seen(newcomer.grown_at, revision, newcomer.news)
    figures.election.append(elected_at - killed_at)
    figures.first_renewal.append(min(renewed) - elected_at)
    figures.last_renewal.append(max(renewed) - elected_at)
    figures.first_growth.append(grown_at - elected_at)
    await asyncio.to_thread(_restart, child, leader)
    return successor.address


async def _measure(plane: harness.Plane, rounds: int) -> Figures:
    figures = Figures()
    etcd = await adapter.connect(plane.stack.etcd_endpoints)
    elections = Elections(etcd)
    watching = asyncio.create_task(elections.watch())
    try:
        leader = (await elections.next())[0].address
        async with contextlib.AsyncExitStack() as stack:
            probes = [
                await stack.enter_async_context(_holder(f"holder-{n}", plane.addresses)) for n in range(HOLDERS)
            ]
            for probe in probes:
                while not any(probe.limiter.amounts().values()):
                    await probe.news.wait()
                    probe.news.clear()
            for number in range(rounds):
                leader = await _round(number, plane, probes, elections, leader, figures)
                # Let the newcomer's units come back, and the one that was killed stand for election again.
                await asyncio.sleep(1.0)
    finally:
        watching.cancel()
        await etcd.close()
    return figures


def _judged(name: str, seconds: list[float], **detail: float) -> harness.Result:
    worst = max(seconds)
    told = {"median_s": round(harness.median(seconds), 3), **detail}
    return harness.Result(name, worst, "s", f"<= {TARGET_SECONDS:g}", worst <= TARGET_SECONDS, told)


def run() -> list[harness.Result]:
    """All figures of the failover."""
    rounds = 2 if harness.is_quick() else ROUNDS
    with harness.control_plane(replicas=3) as plane:
        harness.put_budget(plane.addresses, BUDGET, LIMITS)
        figures = asyncio.run(_measure(plane, rounds))
    every = {
        "every_holder_median_s": round(harness.median(figures.last_renewal), 3),
        "every_holder_worst_s": round(max(figures.last_renewal), 3),
    }
    return [
        _judged(f"leader killed: election to first renewal, worst of {rounds}", figures.first_renewal, **every),
        _judged(f"leader killed: election to first growth, worst of {rounds}", figures.first_growth),
        harness.Result(
            "leader killed: etcd's own election, kill to the new leader's key, worst",
            max(figures.election),
            "s",
            detail={"median_s": round(harness.median(figures.election), 3)},
        ),
    ]


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
