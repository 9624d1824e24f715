"""Dividing a host's memory between its pools.

In this order: each pool's MIN, by priority (MIN beats memory); then what persons have ordered; then by strict
priority what each can use; among pools of one priority in proportion to backlog × cost, a worker at a time; at
last, again by priority, what is left over, for memory that lies idle helps nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leasehold.core.node import model


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one pool may have."""

    pool: str
    priority: int
    limit_bytes: int
    min_workers: int
    max_workers: int
    #: Work that is there, a worker each; None: not known, which counts as an equal of the others.
    backlog: int | None = None
    #: A person has ordered `max_workers`: sizing of other pools leaves it alone.
    is_manual: bool = False


@dataclass(frozen=True, slots=True)
class Division:
    """Workers by pool, and the pools whose MIN memory does not cover."""

    workers: Mapping[str, int]
    overcommitted: frozenset[str]
    #: Left after all of it; below 0 where the MINs are more than there is.
    left_bytes: int


def claim(spec: model.PoolSpec, depth: model.Depth | None) -> Claim:
    """The claim of a pool that sizes itself."""
    return Claim(
        pool=spec.name,
        priority=spec.priority,
        limit_bytes=spec.worker_limit_bytes,
        min_workers=spec.min_workers,
        max_workers=spec.max_workers,
        backlog=depth.backlog if depth is not None else None,
    )


def divide(claims: Sequence[Claim], room_bytes: int) -> Division:
    """Divide `room_bytes`; deterministic, pools of one rank by name."""
    ranked = sorted(claims, key=lambda each: (-each.priority, each.pool))
    workers = {each.pool: each.min_workers for each in ranked}
    left = room_bytes
    overcommitted = set()
    for each in ranked:
        left -= each.min_workers * each.limit_bytes
        if left < 0 and each.min_workers:
            overcommitted.add(each.pool)
    ordered = sorted(ranked, key=lambda each: not each.is_manual)
    for is_second_round in (False, True):
        for group in _groups(ordered):
            left = _fill(group, workers, left, is_second_round=is_second_round)
    return Division(workers, frozenset(overcommitted), left)


def _groups(ranked: Sequence[Claim]) -> list[list[Claim]]:
    groups: list[list[Claim]] = []
    for each in ranked:
        last = groups[-1][0] if groups else None
        if last is not None and (last.is_manual, last.priority) == (each.is_manual, each.priority):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _fill(group: Sequence[Claim], workers: dict[str, int], left: int, *, is_second_round: bool) -> int:
    """Give to the pools of one priority while anything fits; returns what is left."""
    weights = _weights(group)
    while True:
        open_claims = [
            each
            for each in group
            if each.limit_bytes <= left and workers[each.pool] < _most(each, is_second_round=is_second_round)
        ]
        if not open_claims:
            return left
        # Highest averages: the pool that would still have the most weight for each byte that it is given.
        chosen = max(
            open_claims,
            key=lambda each: weights[each.pool] / ((workers[each.pool] + 1) * each.limit_bytes),
        )
        workers[chosen.pool] += 1
        left -= chosen.limit_bytes


def _most(each: Claim, *, is_second_round: bool) -> int:
    if is_second_round or each.backlog is None:
        return each.max_workers
    return min(each.max_workers, max(each.min_workers, each.backlog))


def _weights(group: Sequence[Claim]) -> dict[str, float]:
    """Backlog × cost; a pool whose depth is not known weighs as much as the others do on average."""
    known = [each.backlog * each.limit_bytes for each in group if each.backlog is not None]
    average = sum(known) / len(known) if known else 1.0
    return {
        # Never nothing: of what nobody needs each has an equal part.
        each.pool: max(each.backlog * each.limit_bytes if each.backlog is not None else average, 1.0)
        for each in group
    }
