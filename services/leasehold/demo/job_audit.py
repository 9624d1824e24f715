"""Judges a run of jobs from outside: from what the jobs wrote themselves, and from the ledger in Postgres.

Imports nothing of what it judges. Two witnesses are heard:

- the jobs' own journal: each execution appends ``start KEY PID`` before its work and ``end KEY PID`` after it,
  to one file, in one write each; so the order of lines is the order of events;
- the ledger: rows of allocations with the sequence numbers at which they began and ended, and the log of
  totals. Readers of clocks cannot see "at every instant", sequence numbers can.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")


class AllocationRow(NamedTuple):
    """A row of the ledger. `release_seq` 0: it is live."""

    job_id: str
    attempt: int
    node: str
    cpus: int
    memory_bytes: int
    alloc_seq: int
    release_seq: int


class TotalRow(NamedTuple):
    """From this sequence number on a node has these totals."""

    node: str
    seq: int
    cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Execution:
    """What the journal tells of one job."""

    starts: int
    ends: int
    #: Two executions were under way at once.
    is_overlapped: bool


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that was allocated on a node, and the least room that there was: negative where it was over."""

    cpus: int
    memory_bytes: int
    least_cpus_free: int
    least_memory_bytes_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What both witnesses say together."""

    submitted: int
    #: Number of jobs in each state.
    states: Mapping[str, int]
    #: Submitted and in no terminal state, or not known at all.
    lost: tuple[str, ...]
    #: Ended as COMPLETED, and no execution of them ended.
    unproven: tuple[str, ...]
    completed_twice: tuple[str, ...]
    overlapped: tuple[str, ...]
    #: Executed though nobody submitted them.
    unknown: tuple[str, ...]
    interrupted_and_run_again: tuple[str, ...]
    peaks: Mapping[str, Peak]
    #: Nodes whose total was exceeded at some sequence number.
    over: tuple[str, ...]
    #: Rows that are live though their job has ended.
    leaked: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Every job reached one end, none overlapped, nothing was over-allocated, nothing is left."""
        ended = sum(self.states.get(state, 0) for state in TERMINAL)
        return ended == self.submitted and not (
            self.lost
            or self.unproven
            or self.completed_twice
            or self.overlapped
            or self.unknown
            or self.over
            or self.leaked
        )

    def lines(self) -> list[str]:
        """For people."""
        ended = " + ".join(f"{self.states.get(state, 0)} {state.lower()}" for state in TERMINAL)
        rows = [
            f"jobs submitted               {self.submitted} = {ended}",
            f"lost                         {len(self.lost)}{_some(self.lost)}",
            f"completed twice              {len(self.completed_twice)}{_some(self.completed_twice)}",
            f"overlapped                   {len(self.overlapped)}{_some(self.overlapped)}",
            f"interrupted and run again    {len(self.interrupted_and_run_again)}",
            f"nodes over their total       {len(self.over)}{_some(self.over)}",
            f"allocations leaked           {len(self.leaked)}{_some(self.leaked)}",
        ]
        if self.unproven:
            rows.append(f"completed, never executed    {len(self.unproven)}{_some(self.unproven)}")
        if self.unknown:
            rows.append(f"executed, never submitted    {len(self.unknown)}{_some(self.unknown)}")
        for node, peak in sorted(self.peaks.items()):
            total = peak.cpus + peak.least_cpus_free if peak.least_cpus_free >= 0 else "fewer"
            rows.append(f"most allocated on {node:<10} {peak.cpus} of {total} CPUs")
        return rows


def executions(lines: Iterable[str]) -> dict[str, Execution]:
    """What the journal tells of each key. A line that was cut off is passed over: its writer was killed."""
    under_way: dict[str, set[str]] = defaultdict(set)
    starts: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    overlapped = set()
    for line in lines:
        words = line.split()
        if len(words) != 3 or words[0] not in ("start", "end"):
            continue
        event, key, pid = words
        if event == "start":
            starts[key] += 1
            if under_way[key]:
                overlapped.add(key)
            under_way[key].add(pid)
        else:
            ends[key] += 1
            under_way[key].discard(pid)
    return {key: Execution(starts[key], ends[key], key in overlapped) for key in starts.keys() | ends.keys()}


def peaks(rows: Sequence[AllocationRow], totals: Sequence[TotalRow]) -> dict[str, Peak]:
    """The most that was allocated on each node, swept by sequence number; releases of one come first."""
    changes: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    for row in rows:
        changes[row.node].append((row.alloc_seq, 1, row.cpus, row.memory_bytes))
        if row.release_seq:
            changes[row.node].append((row.release_seq, 0, -row.cpus, -row.memory_bytes))
    logged: dict[str, list[TotalRow]] = defaultdict(list)
    for total in sorted(totals, key=lambda each: each.seq):
        logged[total.node].append(total)
    return {node: _peak(sorted(found), logged[node]) for node, found in changes.items()}


def _peak(changes: Sequence[tuple[int, int, int, int]], totals: Sequence[TotalRow]) -> Peak:
    cpus = memory = most_cpus = most_memory = at = 0
    cpus_free: int | None = None
    memory_free: int | None = None
    for number, (seq, _, cpus_change, memory_change) in enumerate(changes):
        cpus, memory = cpus + cpus_change, memory + memory_change
        if number + 1 < len(changes) and changes[number + 1][0] == seq:
            continue  # what is committed together is seen together
        while at + 1 < len(totals) and totals[at + 1].seq <= seq:
            at += 1
        total = totals[at] if totals and totals[at].seq <= seq else TotalRow("", 0, 0, 0)
        most_cpus, most_memory = max(most_cpus, cpus), max(most_memory, memory)
        free = (total.cpus - cpus, total.memory_bytes - memory)
        cpus_free = free[0] if cpus_free is None else min(cpus_free, free[0])
        memory_free = free[1] if memory_free is None else min(memory_free, free[1])
    return Peak(most_cpus, most_memory, cpus_free or 0, memory_free or 0)


def judge(
    *,
    states: Mapping[str, str],
    keys: Mapping[str, str],
    journal: Iterable[str],
    rows: Sequence[AllocationRow],
    totals: Sequence[TotalRow],
) -> Verdict:
    """The verdict on a run.

    `states` of the jobs by id, as Postgres has them; `keys` in the journal of all that were submitted, by id.
    """
    executed = executions(journal)
    found = peaks(rows, totals)
    none = Execution(0, 0, is_overlapped=False)
    of = {job_id: executed.get(key, none) for job_id, key in keys.items()}
    known_keys = set(keys.values())
    return Verdict(
        submitted=len(keys),
        states=Counter(states[job_id] for job_id in keys if job_id in states),
        lost=tuple(key for job_id, key in keys.items() if states.get(job_id) not in TERMINAL),
        unproven=tuple(
            keys[job_id] for job_id, run in of.items() if states.get(job_id) == "COMPLETED" and not run.ends
        ),
        completed_twice=tuple(keys[job_id] for job_id, run in of.items() if run.ends > 1),
        overlapped=tuple(keys[job_id] for job_id, run in of.items() if run.is_overlapped),
        unknown=tuple(key for key in executed if key not in known_keys),
        interrupted_and_run_again=tuple(
            keys[job_id] for job_id, run in of.items() if run.starts > run.ends > 0
        ),
        peaks=found,
        over=tuple(
            node for node, peak in found.items() if peak.least_cpus_free < 0 or peak.least_memory_bytes_free < 0
        ),
        leaked=tuple(
            f"{row.job_id}/{row.attempt}"
            for row in rows
            if not row.release_seq and states.get(row.job_id) != "RUNNING"
        ),
    )


def _some(keys: tuple[str, ...]) -> str:
    return f"  ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""
