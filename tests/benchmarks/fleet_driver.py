"""Thousands of simulated holders in one process: raw messages over a few streams, honest acknowledgements.

A holder here renews on time, tells some cooling units (so that its reports cost what real ones cost), applies a
shrink at once and says so at once, and never says that it holds more than it was granted. It spends nothing.

Driven by lines on standard input, answered by one line of JSON each: ``join``, ``leave COUNT``,
``expect JSON-OF-SHARES``, ``status``. It ends with its input.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import time
from typing import Any

import lines
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.api.budget.v1 import lease_pb2
from leasehold.rpc import channel as channels

#: A stream looks for reports that are due so often; each refresh interval has a whole number of looks.
TICK_SECONDS = 0.25
RATES = ("rpm_limit", "tpm_limit")
COOLING_STEPS = 8
#: Part of a share that cools, as a lightly used holder's does.
COOLING_PART = 0.04
#: Rates are shared to within this part; whole units to within one.
TOLERANCE = 0.01
BATCH_MAX = 500


class Holder:
    """One holder: its next report, and what it was granted."""

    __slots__ = ("amounts", "is_gone", "is_off", "joined_at", "message", "sent_at", "version")

    def __init__(self, budget: str, name: str) -> None:
        self.message = lease_pb2.LeaseReport(
            budget=budget, holder=name, incarnation=f"life-{name}", is_active=True
        )
        holdings = self.message.holdings
        holdings.SetInParent()
        for name in RATES:
            holdings.largest_cost[name] = holdings.admitted_total[name] = 1.0
            holdings.refundable[name] = 0.0
        self.version = 0
        self.amounts: dict[str, float] = {}
        self.sent_at = self.joined_at = 0.0
        self.is_gone = False
        self.is_off = False

    def report(self, now: float) -> lease_pb2.LeaseReport:
        """The next report; the message stays this holder's own."""
        self.message.sequence += 1
        self.message.grant_version = self.version
        self.sent_at = now
        return self.message

    def take(self, grant: Any) -> bool:
        """Apply a grant; whether something was given up, which must be told at once."""
        message = self.message
        if grant.lease_id != message.lease_id:
            message.lease_id, self.version = grant.lease_id, 0
        if grant.version <= self.version:
            return False
        old, new = self.amounts, dict(grant.amounts)
        self.version, self.amounts = grant.version, new
        message.holdings.held.update(new)
        del message.holdings.cooling[:]
        for name in RATES:
            part = new.get(name, 0.0) * COOLING_PART / COOLING_STEPS
            if part:
                message.holdings.cooling.add(
                    dimension=name,
                    amounts=[part] * COOLING_STEPS,
                    remaining_seconds=[float(step + 1) for step in range(COOLING_STEPS)],
                )
        return any(new[name] < old.get(name, 0.0) for name in new)

    def release(self) -> wire.LeaseRelease:
        """Give the lease back, all but what still cools."""
        message = self.message
        release = wire.LeaseRelease(
            budget=message.budget,
            holder=message.holder,
            incarnation=message.incarnation,
            lease_id=message.lease_id,
        )
        release.holdings.CopyFrom(message.holdings)
        for name, amount in self.amounts.items():
            release.holdings.held[name] = amount * COOLING_PART if name in RATES else 0.0
        return release

    def is_at(self, shares: dict[str, float]) -> bool:
        """Whether it has its share in every dimension."""
        amounts = self.amounts
        for name, share in shares.items():
            allowed = share * TOLERANCE if name in RATES else 0.999
            if abs(amounts.get(name, 0.0) - share) > allowed:
                return False
        return True


class Stream:
    """A connection of its own, and its holders."""

    def __init__(self, fleet: "Fleet", address: str, holders: list[Holder], ticks: int) -> None:
        self._fleet = fleet
        self._holders = {holder.message.holder: holder for holder in holders}
        #: Whose turn it is at each tick of a refresh interval.
        self._turns: list[list[Holder]] = [holders[n::ticks] for n in range(ticks)]
        self._tick = 0
        self._due: list[Holder] = []
        self._releases: list[Holder] = []
        self._wake = asyncio.Event()
        self._channel = channels.open_channel(address, has_own_connection=True)

    def join(self) -> None:
        """All ask at once; from then on each renews at its own turn."""
        self._due.extend(self._holders.values())
        self._wake.set()
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._on_tick)

    def leave(self, holder: Holder) -> None:
        """It goes for good."""
        holder.is_gone = True
        self._releases.append(holder)
        self._wake.set()

    def _on_tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._tick = (self._tick + 1) % len(self._turns)
        due = self._turns[self._tick]
        if due:
            self._due.extend(due)
            self._wake.set()
        loop.call_later(TICK_SECONDS, self._on_tick)

    async def run(self) -> None:
        """Hold the stream for the life of the process."""
        call = wire_grpc.BudgetServiceStub(self._channel).HoldLeases()
        await asyncio.gather(self._write(call), self._read(call))

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            now = time.monotonic()
            due, self._due = self._due, []
            releases, self._releases = self._releases, []
            reporting = dict.fromkeys(holder for holder in due if not holder.is_gone)
            reports = [holder.report(now) for holder in reporting]
            for start in range(0, max(len(reports), 1), BATCH_MAX):
                request = wire.HoldLeasesRequest(reports=reports[start : start + BATCH_MAX])
                if not start:
                    request.releases.extend(holder.release() for holder in releases)
                await call.write(request)

    async def _read(self, call: Any) -> None:
        fleet = self._fleet
        while True:
            response = await call.read()
            now = time.monotonic()
            if response.refusals:
                raise RuntimeError(f"refused: {response.refusals[0]}")
            for grant in response.grants:
                holder = self._holders[grant.holder]
                if grant.end:
                    raise RuntimeError(f"{grant.holder} lost its lease: {grant}")
                if grant.answered_sequence == holder.message.sequence:
                    fleet.latencies.append(now - holder.sent_at)
                if holder.take(grant):
                    self._due.append(holder)
                    self._wake.set()
                fleet.look_at(holder, now)


class Fleet:
    """All holders of this process."""

    def __init__(
        self, address: str, budget: str, prefix: str, count: int, streams: int, refresh: float
    ) -> None:
        self.holders = [Holder(budget, f"{prefix}{number:05d}") for number in range(count)]
        ticks = round(refresh / TICK_SECONDS)
        self.streams = [Stream(self, address, self.holders[n::streams], ticks) for n in range(streams)]
        self.latencies: list[float] = []
        self.began_at = 0.0
        self._shares: dict[str, float] = {}
        self._off: set[Holder] = set()
        self._settled_at = 0.0

    def join(self) -> None:
        """Everybody joins now."""
        self.began_at = time.monotonic()
        for stream in self.streams:
            stream.join()

    def leave(self, count: int) -> None:
        """`count` holders go, over all streams."""
        self.began_at = time.monotonic()
        staying = [(number, holder) for number, holder in enumerate(self.holders) if not holder.is_gone]
        for number, holder in staying[:count]:
            self.streams[number % len(self.streams)].leave(holder)
            self._off.discard(holder)

    def expect(self, shares: dict[str, float]) -> None:
        """From now on `shares` are what everybody should have."""
        self._shares = shares
        self._off = {h for h in self.holders if not h.is_gone and not h.is_at(shares)}
        self._settled_at = time.monotonic()

    def look_at(self, holder: Holder, now: float) -> None:
        """What it has may have changed."""
        if not self._shares or holder.is_gone:
            return
        if holder.is_at(self._shares):
            if holder in self._off:
                self._off.remove(holder)
                self._settled_at = now
        else:
            self._off.add(holder)

    def status(self) -> dict[str, Any]:
        """Figures since the last status; instants of CLOCK_MONOTONIC."""
        latencies, self.latencies = self.latencies, []
        off = next(iter(self._off), None)
        return {
            "began_at": self.began_at,
            "settled_at": self._settled_at,
            "off": len(self._off),
            "off_example": off.amounts if off is not None else None,
            "granted": sum(all(h.amounts.values()) for h in self.holders if h.amounts),
            "answers": len(latencies),
            "latencies": latencies,
            "cpu_seconds": time.process_time(),
        }


async def main() -> None:
    """Obey standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("budget")
    parser.add_argument("prefix")
    parser.add_argument("count", type=int)
    parser.add_argument("streams", type=int)
    parser.add_argument("refresh_seconds", type=float)
    chosen = parser.parse_args()
    fleet = Fleet(
        chosen.address, chosen.budget, chosen.prefix, chosen.count, chosen.streams, chosen.refresh_seconds
    )
    running = asyncio.gather(*(stream.run() for stream in fleet.streams))
    gc.freeze()
    lines.out("ready")
    loop = asyncio.get_running_loop()
    while not running.done():
        line = await loop.run_in_executor(None, sys.stdin.readline)
        word, _, rest = line.strip().partition(" ")
        if word == "join":
            fleet.join()
        elif word == "leave":
            fleet.leave(int(rest))
        elif word == "expect":
            fleet.expect(json.loads(rest))
        elif not word:
            break
        lines.out(json.dumps(fleet.status() if word == "status" else {}))
    if running.done():
        running.result()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


if __name__ == "__main__":
    asyncio.run(main())
