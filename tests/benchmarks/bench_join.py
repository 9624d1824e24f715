"""A worker joins three others, and one of four is killed: how soon everybody knows the new shares."""

import asyncio
import sys
import time
from typing import Any

import harness
import workers
from leasehold.etcd import adapter

WARM = "warm"
CALM = "calm"
BUSY = "busy"
STAYING = ("a", "b", "c")
JOINER = "d"
LIMITS = {"max_concurrent_requests": 4_000.0, "rpm_limit": 1_200_000.0, "tpm_limit": 120_000_000.0}
MORTAL = "mortal"
#: What a killed worker may have spent since its last report cools for a window. Short windows let many deaths
#: fit into a minute, frequent reports keep that part small.
MORTAL_SETTINGS: dict[str, Any] = {
    "window_seconds": 1.0,
    "arrival_jitter_seconds": 0.1,
    "orphan_seconds": 0.0,
    "refresh_seconds": 0.2,
}
BUSY_LIMITS = {"max_concurrent_requests": 400.0, "rpm_limit": 600.0, "tpm_limit": 1_000_000.0}
BUSY_SETTINGS: dict[str, Any] = {"window_seconds": 5.0, "arrival_jitter_seconds": 0.25}
BUSY_WARM_SECONDS = 8.0
PUT_BYTES = 200
TARGET_MS = 50.0


def _is_share_of(parts: int, limits: dict[str, float]) -> Any:
    def is_right(_: str, amounts: dict[str, float]) -> bool:
        return all(abs(amounts[name] - limit / parts) <= 0.01 * limit / parts for name, limit in limits.items())

    return is_right


def _is_grown(_: str, amounts: dict[str, float]) -> bool:
    """A third, but for what the killed one may have spent of its quarter since its last report.

    Pacing bounds that to 0.1 + 1.25 * 0.2 = 0.35 of the quarter; a third would be 1.33 quarters.
    """
    return all(amounts[name] >= 1.2 * limit / 4 for name, limit in LIMITS.items())


class EtcdClock:
    """Times single puts in the same run."""

    def __init__(self, endpoints: list[str]) -> None:
        self.seconds: list[float] = []
        self._runner = asyncio.Runner()
        self._etcd = self._runner.run(adapter.connect(endpoints))

    def put(self) -> None:
        """One put."""
        began = time.monotonic()
        self._runner.run(self._etcd.put("/bench/put", b"x" * PUT_BYTES))
        self.seconds.append(time.monotonic() - began)

    def close(self) -> None:
        """Leave etcd."""
        self._runner.run(self._etcd.close())
        self._runner.close()


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(harness.percentile(seconds, 0.5) * 1e3, 1),
        "p99_ms": round(harness.percentile(seconds, 0.99) * 1e3, 1),
        "max_ms": round(max(seconds) * 1e3, 1),
    }


def _joins(staff: workers.Workers, clock: EtcdClock, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to everybody's knowledge, and to the joiner's first unit."""
    known: list[float] = []
    spendable: list[float] = []
    everybody = {*STAYING, JOINER}
    for _ in range(rounds):
        clock.put()
        told: list[workers.Heard] = []
        since: dict[str, float] = {}
        is_right = _is_share_of(4, LIMITS)
        staff.tell(JOINER, f"join {CALM}")

        def look(heard: workers.Heard, told: Any = told, since: Any = since, is_right: Any = is_right) -> bool:
            if heard.event == "joined":
                told.append(heard)
            elif heard.event == "share" and heard.fields["budget"] == CALM:
                if heard.fields["amounts"] and is_right(heard.worker, heard.fields["amounts"]):
                    since.setdefault(heard.worker, heard.at)
                else:
                    since.pop(heard.worker, None)
            return bool(told) and since.keys() == everybody

        staff.until(look)
        began = told[0].fields["began"]
        known.append(max(since.values()) - began)
        spendable.append(told[0].at - began)
        staff.tell(JOINER, f"leave {CALM}")
        staff.when_shares(CALM, _is_share_of(3, LIMITS), set(STAYING))
    return known, spendable


def _deaths(staff: workers.Workers, clock: EtcdClock, rounds: int) -> list[float]:
    """Seconds from SIGKILL to everybody's knowledge."""
    seconds: list[float] = []
    for number in range(rounds):
        victim = f"victim-{number}"
        staff.hire(victim)
        staff.tell(victim, f"join {MORTAL}")
        staff.when_shares(MORTAL, _is_share_of(4, LIMITS), {*STAYING, victim})
        clock.put()
        killed_at = staff.kill(victim)
        seconds.append(staff.when_shares(MORTAL, _is_grown, set(STAYING)) - killed_at)
    return seconds


def _busy_joins(staff: workers.Workers, rounds: int) -> list[float]:
    """Seconds from the join to the first unit while three others spend all there is."""
    for name in STAYING:
        staff.tell(name, f"work {BUSY} 2")
    time.sleep(BUSY_WARM_SECONDS)
    seconds: list[float] = []
    for _ in range(rounds):
        staff.tell(JOINER, f"join {BUSY}")
        heard: list[workers.Heard] = []

        def look(line: workers.Heard, heard: Any = heard) -> bool:
            if line.event == "joined" and line.worker == JOINER:
                heard.append(line)
            return bool(heard)

        staff.until(look)
        seconds.append(heard[0].at - heard[0].fields["began"])
        staff.tell(JOINER, f"leave {BUSY}")
        time.sleep(0.5)
    return seconds


def _judged(name: str, seconds: list[float], **detail: Any) -> harness.Result:
    told = _milliseconds(seconds)
    value = told["p99_ms"]
    return harness.Result(name, value, "ms", f"<= {TARGET_MS:g}", value <= TARGET_MS, {**told, **detail})


def _measure(staff: workers.Workers, clock: EtcdClock, *, joins: int, deaths: int) -> list[harness.Result]:
    for name in (*STAYING, JOINER):
        staff.hire(name)
    for budget in (CALM, MORTAL):
        for name in STAYING:
            staff.tell(name, f"join {budget}")
        staff.when_shares(budget, _is_share_of(3, LIMITS), set(STAYING))
    known, spendable = _joins(staff, clock, joins)
    death = _deaths(staff, clock, deaths)
    busy = _busy_joins(staff, 3 if harness.is_quick() else 15)
    etcd = {f"etcd_put_{key}": value for key, value in _milliseconds(clock.seconds).items()}
    first, first_busy = _milliseconds(spendable), _milliseconds(busy)
    return [
        _judged(f"join of one of four: shares known everywhere, p99 of {joins}", known, **etcd),
        harness.Result("join of one of four: first spendable unit, p99", first["p99_ms"], "ms", detail=first),
        harness.Result(
            "join while three others spend all: first spendable unit, p99",
            first_busy["p99_ms"],
            "ms",
            detail=first_busy,
        ),
        _judged(f"certified death of one of four: shares known everywhere, p99 of {deaths}", death, **etcd),
    ]


def run() -> list[harness.Result]:
    """Joins and deaths."""
    with harness.control_plane() as plane:
        harness.put_budget(plane.addresses, WARM, {"max_concurrent_requests": 1_000.0}, orphan_seconds=0.0)
        harness.put_budget(plane.addresses, CALM, LIMITS)
        harness.put_budget(plane.addresses, MORTAL, LIMITS, **MORTAL_SETTINGS)
        harness.put_budget(plane.addresses, BUSY, BUSY_LIMITS, **BUSY_SETTINGS)
        clock = EtcdClock(plane.stack.etcd_endpoints)
        try:
            with workers.Workers(plane.addresses, WARM).staff() as staff:
                if harness.is_quick():
                    return _measure(staff, clock, joins=10, deaths=3)
                return _measure(staff, clock, joins=100, deaths=40)
        finally:
            clock.close()


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
