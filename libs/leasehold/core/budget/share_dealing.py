"""Dealing whole quanta: the one place where a fraction becomes a number.

Each party first gets its exact share rounded down. What is left over goes one quantum each to the largest
remainders. Among equal remainders it goes round: with g parties and m quanta, rotation r serves the m parties
from r*m on, so any ceil(g/m) rotations in a row serve everyone and any g serve all equally often.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Parties with the same exact share, `numerator` / (the common denominator) quanta each."""

    members: Sequence[int]
    numerator: int


def deal(total: int, parts: Sequence[Part], denominator: int, rotation: int, column: list[int]) -> None:
    """Deal `total` quanta into `column`, by member. The exact shares must add up to `total`."""
    by_remainder: dict[int, list[Part]] = {}
    left = total
    for part in parts:
        whole, remainder = divmod(part.numerator, denominator)
        for member in part.members:
            column[member] = whole
        left -= whole * len(part.members)
        if remainder:
            by_remainder.setdefault(remainder, []).append(part)
    for remainder in sorted(by_remainder, reverse=True):
        if not left:
            return
        tied = [member for part in by_remainder[remainder] for member in part.members]
        if left < len(tied):
            tied.sort()
            start = rotation * left % len(tied)
            tied = [tied[(start + step) % len(tied)] for step in range(left)]
        for member in tied:
            column[member] += 1
        left -= len(tied)


def deal_seats(total: int, seats: int, rotation: int, members: int) -> list[int]:
    """`total` quanta dealt evenly to `seats` (at least `members`), of which the first `members` are taken."""
    whole, left = divmod(total, seats)
    start = rotation * left % seats
    return [whole + ((seat - start) % seats < left) for seat in range(members)]
