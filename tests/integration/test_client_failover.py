"""The client library in worker processes, forked ones among them, while the leader is killed and frozen."""

import asyncio
import bisect
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import allocator_kit as kit
from allocator_kit import until

WINDOW_SECONDS = 2.0
CALLS = 12
REQUESTS = 120
WORKERS = ("w1", "w2", "w3")
#: Each worker, and its child.
EVERYONE = tuple(name for worker in WORKERS for name in (worker, f"{worker}-child"))

MakeFleet = Callable[..., kit.Fleet]


class Journal:
    """What the workers wrote down."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[tuple[float, str, str]]:
        """Seconds, who, what; in order of time."""
        read = self._path.read_text().splitlines() if self._path.exists() else []
        parts = [line.split(maxsplit=2) for line in read]
        return sorted((int(at) / 1e9, who, what) for at, who, what in parts)

    def have_all_begun_since(self, at: float, calls: int) -> bool:
        """Whether everyone began so many calls after an instant."""
        begun: dict[str, int] = defaultdict(int)
        for when, who, what in self.lines():
            begun[who] += what == "begins" and when > at
        return all(begun[who] >= calls for who in EVERYONE)


def highest_in_any_window(begins: Sequence[float]) -> int:
    """Most calls that began within one window, whatever its position."""
    return max(at + 1 - bisect.bisect_right(begins, begins[at] - WINDOW_SECONDS) for at in range(len(begins)))


def highest_at_once(lines: Sequence[tuple[float, str, str]]) -> int:
    """Most calls under way at an instant."""
    running = highest = 0
    for _, _, what in lines:
        running += {"begins": 1, "ends": -1}.get(what, 0)
        highest = max(highest, running)
    return highest


@contextlib.asynccontextmanager
async def working(fleet: kit.Fleet, folder: Path) -> AsyncIterator[Journal]:
    """Workers that spend until the block ends; by then none may have failed."""
    journal, stop = folder / "journal", folder / "stop"
    program = Path(__file__).parents[1] / "client_worker_child.py"
    env = {**os.environ, "LEASEHOLD_ADDR": ",".join(fleet.addresses)}
    workers = [
        await asyncio.create_subprocess_exec(sys.executable, program, name, journal, stop, env=env)
        for name in WORKERS
    ]
    try:
        yield Journal(journal)
    finally:
        stop.touch()
        codes = await asyncio.gather(*(worker.wait() for worker in workers))
    assert codes == [0] * len(workers)


async def test_workers_and_their_children_go_on_through_a_killed_and_a_frozen_leader(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = make_fleet(size=3)
    first = await fleet.start()
    await fleet.put(
        kit.budget(
            dimensions={"max_concurrent_requests": CALLS, "rpm_limit": REQUESTS},
            window_seconds=WINDOW_SECONDS,
            arrival_jitter_seconds=1.0,
            ttl_seconds=4.0,
        )
    )
    async with working(fleet, tmp_path) as journal:
        await until(lambda: journal.have_all_begun_since(0.0, 5), "all six spend")

        killed_at = first.kill()
        second = await fleet.leader(other_than=first)
        await until(lambda: journal.have_all_begun_since(killed_at, 10), "all go on after the SIGKILL")

        frozen_at = second.freeze()
        third = await fleet.leader(other_than=second)
        await until(lambda: journal.have_all_begun_since(frozen_at, 10), "all go on while it is frozen")
        thawed_at = second.thaw()
        await until(lambda: journal.have_all_begun_since(thawed_at, 10), "all go on after the SIGCONT")
        assert await fleet.leader() is third

    lines = journal.lines()
    assert [line for line in lines if line[2].startswith("fails")] == []
    begins = [at for at, _, what in lines if what == "begins"]
    kit.tell(
        f"{len(begins)} calls; {highest_in_any_window(begins)} in a window, {highest_at_once(lines)} at once"
    )
    assert highest_in_any_window(begins) <= REQUESTS
    assert highest_at_once(lines) <= CALLS
