"""Judges a ledger of tasks: was each completed exactly once? Imports nothing of what it judges.

Every event names its task by `key` and its writer by `pid`, as the kernel told it:

- `submitted`: somebody was promised that it runs once;
- `started`, by each process that began it;
- `completed`, by the process that did its work.

A task that was interrupted and run again has more starts than completions: that is what must happen to the task
of a worker that is killed, and it is told apart. Completed twice, or never, is what must not.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a ledger says. Keys are in the order of their first event."""

    submitted: int
    completed_once: int
    #: Submitted, and not completed.
    lost: tuple[str, ...]
    completed_twice: tuple[str, ...]
    #: Begun or completed, though nobody submitted them.
    unknown: tuple[str, ...]
    #: Begun more often than completed, and completed.
    interrupted_and_run_again: tuple[str, ...]
    #: Events that were written by one of the processes that must not write any.
    forged: int

    @property
    def is_good(self) -> bool:
        """Every task that was submitted was completed exactly once, and the ledger is to be trusted."""
        return self.completed_once == self.submitted and not (
            self.lost or self.completed_twice or self.unknown or self.forged
        )

    def lines(self) -> list[str]:
        """For people."""
        rows = [
            f"tasks submitted              {self.submitted}",
            f"completed exactly once       {self.completed_once}",
            f"lost                         {len(self.lost)}{_some(self.lost)}",
            f"completed twice              {len(self.completed_twice)}{_some(self.completed_twice)}",
            f"interrupted and run again    {len(self.interrupted_and_run_again)}",
        ]
        if self.unknown:
            rows.append(f"never submitted              {len(self.unknown)}{_some(self.unknown)}")
        if self.forged:
            rows.append(f"written by the agent         {self.forged}")
        return rows


def judge(events: Iterable[Mapping[str, Any]], *, forbidden_pids: Collection[int] = ()) -> Verdict:
    """The verdict on a ledger that is complete. Nothing that `forbidden_pids` (the agents) wrote may be in
    it.
    """
    counts: dict[str, Counter[str]] = {}
    forged = 0
    for event in events:
        if event["event"] not in ("submitted", "started", "completed"):
            continue
        forged += event["pid"] in forbidden_pids
        counts.setdefault(str(event["key"]), Counter())[str(event["event"])] += 1
    submitted = {key: count for key, count in counts.items() if count["submitted"]}
    return Verdict(
        submitted=len(submitted),
        completed_once=sum(count["completed"] == 1 for count in submitted.values()),
        lost=tuple(key for key, count in submitted.items() if not count["completed"]),
        completed_twice=tuple(key for key, count in counts.items() if count["completed"] > 1),
        unknown=tuple(key for key in counts if key not in submitted),
        interrupted_and_run_again=tuple(
            key for key, count in counts.items() if count["started"] > count["completed"] > 0
        ),
        forged=forged,
    )


def _some(keys: tuple[str, ...]) -> str:
    return f"  ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""
