"""Who gets units that have come free: those furthest below their target first."""

from collections.abc import Sequence

#: Above twice the length of any amount in micro-units: with so many bits more, ratios that differ stay apart.
_RATIO_BITS = 100


def raise_lowest(pool: int, growers: Sequence[tuple[int, int]], quantum: int) -> list[int]:
    """Divide `pool` among growers given as (bound, target) with bound < target.

    If the pool is short, all are lifted to one common part of their target, whoever is above it already gets
    nothing. Gives what each may add, whole multiples of `quantum` except where a target is none.
    """
    wants = [target - bound for bound, target in growers]
    if sum(wants) <= pool:
        return wants
    order = sorted(range(len(growers)), key=lambda i: ((growers[i][0] << _RATIO_BITS) // growers[i][1], i))
    bounds = targets = count = 0
    for position in order:
        bound, target = growers[position]
        # Stop where the common level, without this one, is below where it stands.
        if count and (pool + bounds) * target <= bound * targets:
            break
        bounds, targets, count = bounds + bound, targets + target, count + 1
    given = [0] * len(growers)
    left = pool
    for position in order[:count]:
        bound, target = growers[position]
        level = (pool + bounds) * target // targets
        part = max(0, min(level, target) - bound) // quantum * quantum
        given[position] = min(part, left)
        left -= given[position]
    for position in order[:count]:
        extra = min(quantum, wants[position] - given[position])
        if extra > left:
            break
        given[position] += extra
        left -= extra
    return given
