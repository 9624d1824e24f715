"""Who is served now, where the least that is useful does not fit for everyone at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from leasehold.core.budget.share_claims import Claim, Kind


@dataclass(frozen=True, slots=True)
class Turn:
    """The claims of one priority band, told apart. Members are ranks."""

    served: list[Kind]
    #: Their need fits, but not beside those that are served: they come later.
    waiting: list[int]
    #: What higher bands leave is less than their need: no turn of this band helps them.
    blocked: list[int]


def take_turn(kinds: Sequence[Kind], available: Sequence[int], claims: Sequence[Claim]) -> Turn:
    """Serve as many claims as the needs allow: those served longest ago first, then by name.

    A need that does not fit beside those before it is passed over, and smaller ones behind it may still be
    served. That starves nobody: who is passed over keeps its place, moves up as the served go to the back, and
    at the front always fits. With N claims of which K fit together, each is served within ceil(N/K) turns.
    """
    sums = [sum(kind.needs[dimension] * kind.count for kind in kinds) for dimension in range(len(available))]
    if all(need <= amount for need, amount in zip(sums, available, strict=True)):
        return Turn(list(kinds), [], [])
    queue = sorted(
        (claims[member].last_served, member, index)
        for index, kind in enumerate(kinds)
        for member in kind.members
    )
    left = list(available)
    served: list[list[int]] = [[] for _ in kinds]
    waiting: list[int] = []
    blocked: list[int] = []
    for _, member, index in queue:
        needs = kinds[index].needs
        if all(need <= amount for need, amount in zip(needs, left, strict=True)):
            left = [amount - need for need, amount in zip(needs, left, strict=True)]
            served[index].append(member)
        elif all(need <= amount for need, amount in zip(needs, available, strict=True)):
            waiting.append(member)
        else:
            blocked.append(member)
    parts = [kind.part(members) for kind, members in zip(kinds, served, strict=True) if members]
    return Turn(parts, waiting, blocked)
