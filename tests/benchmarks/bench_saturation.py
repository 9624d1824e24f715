"""How much of a limit is used when everybody wants more, and that no window ever holds more than the limit.

In virtual time: the production core (holders, limiters, allocator) in the deterministic world, four workers and
the standard window. In real time: worker processes with the product's client, a real allocator, a short window.
Either way a window audit that shares nothing with the core judges from the instants of the arrivals alone.
"""

import dataclasses
import itertools
import pathlib
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import workers
from leasehold.core.budget import model, quantity
from leasehold.sim import world, world_scenarios
from leasehold.sim.actors_holder import Load

WINDOW_SECONDS = 60.0
RPM = 800
WARM_SECONDS = 122.0
#: Simulated minutes that are judged.
MINUTES = 20
CRASH_EVERY_SECONDS = 60.0
STEADY_TARGET = 0.97
CRASH_TARGET = 0.95

REAL = "real"
REAL_WINDOW_SECONDS = 10.0
REAL_LIMIT = 3_000
REAL_WARM_SECONDS = 14.0
REAL_STEADY_SECONDS = 30.0
REAL_CRASH_SECONDS = 20.0
STANDING = "standing"


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """What arrived at the provider."""

    #: Mean over the judged time of what a window held, as a part of the limit.
    mean: float
    #: Most that any window held, requests.
    highest: int


def audit(arrivals: Sequence[float], window: float, limit: int, begin: float, end: float) -> Use:
    """Judge by instants alone. An arrival counts from its instant on, for `window` seconds.

    The mean is over all windows that end within `begin` to `end`; the highest is of all there are.
    """
    ordered = sorted(arrivals)
    highest = first = 0
    covered = 0.0
    for number, arrival in enumerate(ordered):
        while ordered[first] <= arrival - window:
            first += 1
        highest = max(highest, number - first + 1)
        covered += max(0.0, min(arrival + window, end) - max(arrival, begin))
    return Use(covered / (end - begin) / limit, highest)


# In virtual time


def _scenario(*, certifies: bool) -> world_scenarios.Scenario:
    spec = model.BudgetSpec(
        name="llm",
        dimensions=(
            world_scenarios.dimension("max_concurrent_requests", 40),
            world_scenarios.dimension("rpm_limit", RPM, WINDOW_SECONDS),
            world_scenarios.dimension("tpm_limit", 40_000, WINDOW_SECONDS),
        ),
        max_call_seconds=5.0,
    )
    load = Load(
        users=10,
        call_seconds_min=0.1,
        call_seconds_max=1.0,
        below_probability=0.0,
        impatience=0.0,
        tokens_min=10,
        tokens_max=40,
    )
    end = float("inf")
    return world_scenarios.Scenario(
        name="saturation",
        spec=spec,
        replicas=1,
        seconds=end,
        faults_until=end,
        load=load,
        certifies=certifies,
        certifies_all=certifies,
    )


def _simulated(*, crashes: bool, certifies: bool, minutes: int) -> Use:
    """One run; raises `budget_auditor.Violation` if the world's own auditor counts too many."""
    run = world.World(_scenario(certifies=certifies), seed=1)
    # The books are judged at every step elsewhere (tests/sim); here it would take most of the time.
    run.check = lambda replica: None  # type: ignore[method-assign]
    run.check_etcd = lambda: None  # type: ignore[method-assign]
    arrivals: list[float] = []
    admitted: Callable[..., Any] = run.auditor.admitted

    def noted(now: float, incarnation: str, amounts: Any, arrives_at: float) -> Any:
        arrivals.extend([arrives_at] * (amounts["rpm_limit"] // quantity.MICRO))
        return admitted(now, incarnation, amounts, arrives_at)

    run.auditor.admitted = noted  # type: ignore[method-assign]
    end = WARM_SECONDS + minutes * 60.0
    names = itertools.cycle(sorted(f"w{number}" for number in range(4)))
    crash_at = WARM_SECONDS + 7.0
    while crashes and crash_at < end:
        run.run(until=crash_at)
        run.crash_holder(next(names), restart_after=1.0)
        crash_at += CRASH_EVERY_SECONDS
    run.run(until=end)
    return audit(arrivals, WINDOW_SECONDS, RPM, WARM_SECONDS, end)


def _virtual(minutes: int) -> list[harness.Result]:
    kinds = [
        ("steady", STEADY_TARGET, {"crashes": False, "certifies": False}),
        ("a crash and join a minute, certified", CRASH_TARGET, {"crashes": True, "certifies": True}),
        ("a crash and join a minute, TTL 10 s", CRASH_TARGET, {"crashes": True, "certifies": False}),
    ]
    results: list[harness.Result] = []
    highest = 0
    for name, target, settings in kinds:
        use = _simulated(minutes=minutes, **settings)
        highest = max(highest, use.highest)
        results.append(
            harness.Result(
                f"saturated use, {name}, {minutes} simulated minutes",
                use.mean,
                "of limit",
                f">= {target:g}",
                use.mean >= target,
                {"highest_window": use.highest, "limit": RPM},
            )
        )
    return [*results, _over(f"saturated, {minutes} simulated minutes each", highest, RPM)]


def _over(name: str, highest: int, limit: int) -> harness.Result:
    over = max(0, highest - limit)
    told = {"highest_window": highest, "limit": limit}
    return harness.Result(f"{name}: requests over the limit", over, "requests", "0", over == 0, told)


# In real time


def _read(folder: pathlib.Path) -> list[float]:
    """Instants that the workers wrote; one that was cut off by a kill is left out."""
    instants: list[float] = []
    for path in folder.iterdir():
        data = path.read_bytes()
        instants += [at for (at,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]
    return instants


def _real(folder: pathlib.Path, *, steady: float, crashed: float) -> list[harness.Result]:
    with harness.control_plane() as plane:
        harness.put_budget(plane.addresses, STANDING, {"max_concurrent_requests": 1_000.0})
        limits = {"max_concurrent_requests": 400.0, "rpm_limit": float(REAL_LIMIT), "tpm_limit": 1e8}
        harness.put_budget(
            plane.addresses,
            REAL,
            limits,
            window_seconds=REAL_WINDOW_SECONDS,
            arrival_jitter_seconds=0.1,
            max_call_seconds=5.0,
        )
        with workers.Workers(plane.addresses, STANDING).staff() as staff:
            for number in range(4):
                staff.hire(f"worker-{number}")
            began = time.monotonic()
            for number in range(4):
                staff.tell(f"worker-{number}", f"spend {REAL} 3 {folder / str(number)}")
            time.sleep(REAL_WARM_SECONDS + steady)
            crash_at = staff.kill("worker-0")
            staff.hire("worker-4")
            staff.tell("worker-4", f"spend {REAL} 3 {folder / '4'}")
            time.sleep(crashed)
            end = time.monotonic()
    arrivals = _read(folder)
    first = audit(arrivals, REAL_WINDOW_SECONDS, REAL_LIMIT, began + REAL_WARM_SECONDS, crash_at)
    second = audit(arrivals, REAL_WINDOW_SECONDS, REAL_LIMIT, crash_at, end)
    return [
        harness.Result(
            f"saturated use, steady, {steady:g} s of four real workers",
            first.mean,
            "of limit",
            f">= {STEADY_TARGET:g}",
            first.mean >= STEADY_TARGET,
            {"window_seconds": REAL_WINDOW_SECONDS, "requests": len(arrivals)},
        ),
        harness.Result(
            f"saturated use, a certified crash and a join within {crashed:g} s, real workers",
            second.mean,
            "of limit",
        ),
        _over("saturated, real workers", max(first.highest, second.highest), REAL_LIMIT),
    ]


def run() -> list[harness.Result]:
    """Virtual time, then real time."""
    is_quick = harness.is_quick()
    results = _virtual(3 if is_quick else MINUTES)
    with tempfile.TemporaryDirectory(prefix="leasehold-bench-") as folder:
        steady, crashed = (5.0, 5.0) if is_quick else (REAL_STEADY_SECONDS, REAL_CRASH_SECONDS)
        return results + _real(pathlib.Path(folder), steady=steady, crashed=crashed)


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
