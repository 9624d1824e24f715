"""How many workers memory allows: the two formulas.

``managed`` credits back what the workers hold, and charges each the larger of what it holds and its limit::

    free    = available + sum(held)
    charge  = max(held, limit)                       of each worker, until it is reaped
    optimal = clamp(live + floor((free - reserve - sum(charge)) / limit), MIN, MAX)

``literal`` is the older arithmetic, which counts workers' own memory against them::

    optimal = clamp(floor((available - reserve) / limit), MIN, MAX)

In both, below the threshold (of `free`, or of `available`) it is one less, not below MIN. They agree while no
worker runs. Why the first is the default: docs/adr/0009.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from leasehold.core.node import amounts, model, settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A host's memory as workers may have it, in bytes."""

    available: int
    #: What all workers hold.
    held: int
    reserve: int
    #: Of workers that are on their way out: charged until they are reaped.
    leaving: int
    #: What live workers hold above their limits.
    excess: int
    formula: settings.Formula

    @property
    def free(self) -> int:
        """What there would be without any worker."""
        return self.available + self.held

    @property
    def judged(self) -> int:
        """What the threshold is compared with."""
        return self.free if self.formula is settings.Formula.MANAGED else self.available

    @property
    def safe(self) -> int:
        """For live workers at their limits, so that all fit even when each has grown to it."""
        return self.free - self.reserve - self.leaving - self.excess

    @property
    def divisible(self) -> int:
        """What the formula divides by the limit. With `managed` it is `safe`: the sums are the same."""
        return self.safe if self.formula is settings.Formula.MANAGED else self.available - self.reserve

    @property
    def settled(self) -> int:
        """`divisible` once those on their way out have gone: nobody else need stop for what they hold."""
        return self.divisible + (self.leaving if self.formula is settings.Formula.MANAGED else 0)


def room(
    available_bytes: int,
    reserve_bytes: int,
    workers: Iterable[tuple[model.WorkerMemory, int]],
    formula: settings.Formula,
) -> Room:
    """The room of a host whose `workers`, of all pools, each come with their limit in bytes."""
    held = leaving = excess = 0
    for worker, limit_bytes in workers:
        if worker.state not in model.ALIVE_STATES:
            continue  # reaped: what it held is available already
        held += worker.held_bytes
        if worker.state in model.LIVE_STATES:
            excess += max(0, worker.held_bytes - limit_bytes)
        else:
            leaving += max(worker.held_bytes, limit_bytes)
    return Room(
        available=available_bytes,
        held=held,
        reserve=reserve_bytes,
        leaving=leaving,
        excess=excess,
        formula=formula,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What a formula says, and why."""

    optimal: int
    reasons: tuple[str, ...]
    #: MIN is more than memory allows.
    is_overcommitted: bool
    numbers: Mapping[str, float]


def optimal(
    *,
    formula: settings.Formula,
    available_bytes: int,
    reserve_bytes: int,
    limit_bytes: int,
    threshold_bytes: int,
    min_workers: int,
    max_workers: int,
    workers: Sequence[model.WorkerMemory],
) -> Sizing:
    """The optimum for one pool that has a host to itself."""
    alive = [worker for worker in workers if worker.state in model.ALIVE_STATES]
    live = sum(worker.state in model.LIVE_STATES for worker in alive)
    found = room(available_bytes, reserve_bytes, ((worker, limit_bytes) for worker in alive), formula)
    by_memory = found.divisible // limit_bytes
    count = min(max(by_memory, min_workers), max_workers)
    reasons = [explained(found, live, limit_bytes, by_memory)]
    if count != by_memory:
        bound, number = ("MIN", min_workers) if count > by_memory else ("MAX", max_workers)
        reasons.append(f"{bound} {number} is in force")
    if found.judged < threshold_bytes and count > min_workers:
        count -= 1
        reasons.append(f"one less: {below_threshold(found, threshold_bytes)}")
    is_overcommitted = count > max(0, by_memory)
    if is_overcommitted:
        reasons.append(f"overcommitted: memory allows {max(0, by_memory)}, MIN is {min_workers}")
    return Sizing(
        optimal=count,
        reasons=tuple(reasons),
        is_overcommitted=is_overcommitted,
        numbers=numbers(found, limit_bytes=limit_bytes, threshold_bytes=threshold_bytes, live=live),
    )


def explained(found: Room, live: int, limit_bytes: int, by_memory: int, *, others_bytes: int = 0) -> str:
    """The formula with its numbers, for people. `others_bytes`: the limits of other pools' live workers."""
    limit = amounts.text(limit_bytes)
    if found.formula is settings.Formula.LITERAL:
        return (
            f"(available {amounts.text(found.available)} - reserve {amounts.text(found.reserve)}) "
            f"/ {limit} = {by_memory}"
        )
    charge = live * limit_bytes + others_bytes + found.excess + found.leaving
    return (
        f"free {amounts.text(found.free)} (available {amounts.text(found.available)} + held "
        f"{amounts.text(found.held)}) - reserve {amounts.text(found.reserve)} - charge {amounts.text(charge)} "
        f"= {amounts.text(found.free - found.reserve - charge)}, / {limit} beside {live} live = {by_memory}"
    )


def below_threshold(found: Room, threshold_bytes: int) -> str:
    """Why the threshold takes one, for people."""
    name = "free" if found.formula is settings.Formula.MANAGED else "available"
    is_below = found.judged < threshold_bytes
    how = "is below" if is_below else "has not yet cleared by the hysteresis"
    return f"{name} {amounts.text(found.judged)} {how} the threshold of {amounts.text(threshold_bytes)}"


def numbers(found: Room, *, limit_bytes: int, threshold_bytes: int, live: int) -> dict[str, float]:
    """What a decision was made from."""
    return {
        "available_bytes": found.available,
        "held_bytes": found.held,
        "free_bytes": found.free,
        "reserve_bytes": found.reserve,
        "leaving_bytes": found.leaving,
        "excess_bytes": found.excess,
        "divisible_bytes": found.divisible,
        "limit_bytes": limit_bytes,
        "threshold_bytes": threshold_bytes,
        "live": live,
    }
