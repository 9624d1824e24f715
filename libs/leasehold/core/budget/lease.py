"""The allocator's book of one lease: what its holder may own, and what is stranded when it goes.

Amounts are tuples of micro-units in the order of the budget's dimensions.
"""

import enum
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from leasehold.core import processes
from leasehold.core.budget import messages, model, stock

Vector = tuple[int, ...]

#: The allocator waits so much longer than the holder, against a clock that runs slow at the holder.
TTL_FACTOR = 1.001

STORY_MAX = 50


class LeaseState(enum.StrEnum):
    """Where a lease stands.

    LIVE    -> SUSPECT  its connection broke (or the leader changed): counted in full, not grown
    SUSPECT -> LIVE     it reported again
    LIVE, SUSPECT -> GHOST     a newer incarnation of its name joined: counted until it expires
    any     -> stranded units  released, expired, or certified dead; the lease is gone
    """

    LIVE = "live"
    SUSPECT = "suspect"
    GHOST = "ghost"


@dataclass(slots=True, eq=False)
class Lease:
    """One outstanding lease."""

    holder: str
    incarnation: str
    lease_id: int
    expires_at: float
    last_report_at: float
    caps: Vector
    #: What counts against the limit: the most the holder can have.
    bound: Vector
    #: `bound` as it stands in the book's sums; `Book.count` brings it up to date.
    counted: Vector = ()
    state: LeaseState = LeaseState.LIVE
    session: int | None = None
    #: The connection of its last report, even if that has broken since.
    last_session: int | None = None
    #: A report has named this lease: the holder has applied a grant of it.
    is_confirmed: bool = False
    #: It is known when the last report was made; else only when it arrived.
    is_age_known: bool = False
    #: Before it has acknowledged this version it may be paced in a way that is not known: as the leader before,
    #: or an earlier definition, had told it.
    unpaced_version: int = 0
    #: Longest TTL that an answer in force may have promised, seconds.
    ttl_seconds: float = 0.0
    #: What the answer to the last report promises: the budget's TTL when that arrived, which may change before.
    answer_ttl_seconds: float = 0.0
    #: Most that the holder may go on using after expiry, for the budget's safe TTL.
    safe: Vector = ()
    #: It reports holdings. A unary holder that does not is counted in full until it expires.
    is_tracked: bool = True
    #: Nothing but an amount from etcd is known of it: no report since this leader took over.
    is_recovered: bool = False
    version: int = 1
    #: (version, caps) of grants that are not acknowledged; caps in force are the last.
    unacknowledged: list[tuple[int, Vector]] = field(default_factory=list)
    #: (version, share that it is paced by while it owns less) of the last acknowledged grant and of later ones
    paces: list[tuple[int, Vector]] = field(default_factory=list)
    held: Vector = ()
    #: As told in the last report, which arrived at `cooling_since`.
    cooling: tuple[messages.Cooling, ...] = ()
    cooling_since: float = 0.0
    refundable: Vector = ()
    #: So long after the last report what cools may be spent anew without an answer; 0: to the end of the lease.
    respend_seconds: float = 0.0
    #: Per dimension; None: not bounded.
    largest_cost: tuple[int | None, ...] = ()
    overdraft: Vector = ()
    sequence: int = 0
    target: Vector = ()
    is_active: bool = False
    current_load: float = 0.0
    active_tasks: int = 0
    demand: dict[str, int] = field(default_factory=dict)
    waiting_cost: dict[str, int] = field(default_factory=dict)
    process: processes.ProcessKey | None = None
    #: Version of the terms that were sent on the present connection; 0: none.
    terms_version: int = 0
    #: When its first report arrived; not known of a lease of the leader before.
    joined_at: float = float("-inf")
    last_served: int = 0
    served_since: float | None = None
    #: (instant, words, or the caps that were granted), the newest last.
    story: deque[tuple[float, str | Vector]] = field(default_factory=lambda: deque(maxlen=STORY_MAX))

    def set_caps(self, caps: Vector) -> None:
        """Grant `caps` in a new version; the bound covers old and new until it is acknowledged."""
        self.version += 1
        self.caps = caps
        self.unacknowledged.append((self.version, caps))
        self.bound = tuple(map(max, self.bound, caps))

    def tell_pace(self, pace: Vector) -> None:
        """The next grant tells `pace`, in a version of its own if it is another than before."""
        if self.paces and self.paces[-1][1] == pace:
            return
        if self.paces:
            self.version += 1
        self.paces.append((self.version, pace))

    def acknowledge(self, version: int, held: Vector) -> Vector:
        """The holder has applied `version` and holds at most `held`; gives the new bound."""
        while len(self.paces) > 1 and self.paces[1][0] <= version:
            del self.paces[0]
        if self.unacknowledged:
            self.unacknowledged = [entry for entry in self.unacknowledged if entry[0] > version]
        bound = tuple(map(max, held, self.caps))
        for _, caps in self.unacknowledged:
            bound = tuple(map(max, bound, caps))
        self.held = held
        self.bound = bound
        return bound

    def cooling_after(self, dimension: str, instant: float) -> list[tuple[float, int]]:
        """(instant of return, micro-units) of what is known to cool beyond `instant`."""
        return [
            part for part in cooling_parts(self.cooling, self.cooling_since, dimension) if part[0] > instant
        ]

    def is_whole_truth(self, report: messages.Report, session: int | None) -> bool:
        """Whether no grant of this lease can still be applied by the holder after it made `report`.

        It can not on a later connection (the holder had left the earlier one), nor once the holder has lost the
        lease that it had. A repeated join, or a report that was held up on its way, proves neither.
        """
        if session is not None and session != self.last_session:
            return True
        return report.lease_id == 0 and self.is_confirmed

    def paced_shares(self, index: int) -> list[int]:
        """The shares of a dimension that the holder may have paced by since its last report, in order."""
        cap = self.caps[index]
        if self.unacknowledged and self.held:
            # A shrink that is not acknowledged may not have reached the holder.
            cap = min(self.held[index], self.bound[index])
        pace = self.paces[0][1][index] if self.paces else 0
        # A grant's pace is taken before its amounts.
        steps = [(version, 0, paced[index]) for version, paced in self.paces[1:]]
        steps += [(version, 1, caps[index]) for version, caps in self.unacknowledged]
        shares = [max(cap, pace)]
        for _, is_cap, share in sorted(steps):
            cap, pace = (share, pace) if is_cap else (cap, share)
            shares.append(max(cap, pace))
        return shares


def is_of_later_process(report: messages.Report, held: Lease) -> bool:
    """Whether the holder that comes back began, on the same host, after the one that took its place meanwhile.

    That one had been superseded before, and nobody knew any more: the later process of a name has it.
    """
    newcomer, present = report.process, held.process
    if newcomer is None or present is None or newcomer.boot_id != present.boot_id:
        return False
    return newcomer.start_time_ticks > present.start_time_ticks


def is_of_earlier_process(report: messages.Report, held: Lease, made_at: float) -> bool:
    """Whether a join was made by a process that began before the one that is connected under its name.

    It was held up on its way, or its sender uses a name that is taken: the later process is not to stop for it.
    Processes of two hosts are told apart by when the joins were made: this one before the other had arrived.
    """
    if held.state is not LeaseState.LIVE:
        return False
    newcomer, present = report.process, held.process
    if newcomer is None or present is None or newcomer.boot_id != present.boot_id:
        return made_at < held.joined_at
    return newcomer.start_time_ticks < present.start_time_ticks


def cooling_parts(cooling: Sequence[messages.Cooling], since: float, dimension: str) -> list[tuple[float, int]]:
    """(instant of return, micro-units) of one dimension, as a report that arrived at `since` tells it."""
    return [
        (since + seconds, amount)
        for told in cooling
        if told.dimension == dimension
        for seconds, amount in zip(told.remaining_seconds, told.amounts, strict=True)
    ]


@dataclass(slots=True)
class Stranded:
    """Units of a lease that is gone: they count until `until`."""

    holder: str
    incarnation: str
    index: int
    amount: int
    until: float
    #: Cooling from known use, or quarantined because the use is not known.
    is_quarantine: bool
    #: When this was written, the holder may have had its lease for so long yet: a new leader waits that too.
    ttl_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StrandRules:
    """The durations of a budget that decide when units of a lost lease return."""

    dimensions: tuple[model.Dimension, ...]
    jitter_seconds: float
    max_call_seconds: float
    orphan_seconds: float
    safe_ttl_seconds: float
    charged_at: model.ChargedAt

    @classmethod
    def of(cls, spec: model.BudgetSpec) -> "StrandRules":
        """The rules of a budget."""
        return cls(
            dimensions=spec.dimensions,
            jitter_seconds=spec.arrival_jitter_seconds,
            # The holder ends its calls by its own clock; a window's jitter allows for that already.
            max_call_seconds=spec.max_call_seconds * TTL_FACTOR,
            orphan_seconds=spec.orphan_call_seconds * TTL_FACTOR,
            safe_ttl_seconds=spec.safe_ttl_seconds * TTL_FACTOR,
            charged_at=spec.charged_at,
        )

    def lost_seconds(self, index: int, *, is_certified: bool = False) -> float:
        """How long units of unknown use count after the last instant at which they can have been used."""
        dimension = self.dimensions[index]
        call_seconds = self.orphan_seconds
        if not is_certified:
            # Whether it is dead is not known: the provider may count by either.
            call_seconds = max(call_seconds, self.max_call_seconds)
        if not dimension.is_rate:
            return call_seconds
        cool = dimension.window_seconds + self.jitter_seconds
        return cool if self.charged_at is model.ChargedAt.ARRIVAL else cool + call_seconds


def strand_released(
    lease: Lease, rules: StrandRules, now: float, cooling: Sequence[messages.Cooling], held: Vector
) -> list[Stranded]:
    """What a graceful release leaves: known cooling, and calls still in flight."""
    stranded: list[Stranded] = []
    for index, amount in enumerate(held):
        rest = amount
        for at, part in cooling_parts(cooling, now, rules.dimensions[index].name):
            stranded.append(Stranded(lease.holder, lease.incarnation, index, part, at, False))
            rest -= part
        if rest > 0:
            until = now + rules.lost_seconds(index)
            stranded.append(Stranded(lease.holder, lease.incarnation, index, rest, until, False))
    return stranded


def strand_unknown(
    lease: Lease, rules: StrandRules, end: float, *, is_certified: bool = False
) -> list[Stranded]:
    """Everything the lease may have, as if it had all been used at `end` (safe capacity: when that ends)."""
    stranded: list[Stranded] = []
    for index, amount in enumerate(lease.bound):
        lost_at = end + rules.lost_seconds(index, is_certified=is_certified)
        safe = 0 if is_certified or not lease.safe else min(amount, lease.safe[index])
        stranded.append(
            Stranded(lease.holder, lease.incarnation, index, safe, lost_at + rules.safe_ttl_seconds, True)
        )
        stranded.append(Stranded(lease.holder, lease.incarnation, index, amount - safe, lost_at, True))
    return [part for part in stranded if part.amount > 0]


def strand_lost(lease: Lease, rules: StrandRules, end: float, *, is_certified: bool) -> list[Stranded]:
    """What a lease leaves that ends at `end` by expiry, or by a certified death.

    Calls count until `end` + max_call (orphan_seconds if certified). Of a rate, what is known to cool returns
    when cool; what may be spent between the last report and `end` (at most the pace allows, and no more than
    was free, has cooled since, or was refundable) is quarantined for window + jitter; the rest returns then.
    Without a certificate the holder may go on with its safe capacity: that is quarantined from when this ends.
    """
    if not lease.is_tracked or lease.is_recovered or rules.charged_at is model.ChargedAt.COMPLETION:
        return strand_unknown(lease, rules, end, is_certified=is_certified)
    stranded: list[Stranded] = []

    def strand(index: int, amount: int, until: float, *, is_quarantine: bool = True) -> None:
        if amount > 0:
            stranded.append(Stranded(lease.holder, lease.incarnation, index, amount, until, is_quarantine))

    for index, dimension in enumerate(rules.dimensions):
        amount = lease.bound[index]
        lost_at = end + rules.lost_seconds(index, is_certified=is_certified)
        safe = 0 if is_certified or not lease.safe else min(amount, lease.safe[index])
        strand(index, safe, lost_at + rules.safe_ttl_seconds)
        if not dimension.is_rate:
            strand(index, amount - safe, lost_at)
            continue
        unknown = min(amount - safe, _unknown_spend(lease, dimension, index, end, is_certified=is_certified))
        strand(index, unknown, lost_at)
        left = amount - safe - unknown
        # Also those that cool before an `end` that is yet to come: until then they count.
        for at, part in sorted(lease.cooling_after(dimension.name, end), reverse=True):
            taken = min(part, left)
            strand(index, taken, at, is_quarantine=False)
            left -= taken
        # Of an `end` that is yet to come: until then the holder has it all.
        strand(index, left, end, is_quarantine=False)
    return stranded


def _unknown_spend(
    lease: Lease, dimension: model.Dimension, index: int, end: float, *, is_certified: bool
) -> int:
    amount = lease.bound[index]
    if is_certified and not lease.is_age_known:
        # The last report may have been long on its way: what cooled meanwhile can have been spent anew.
        return amount
    # From when the report was made, not from when it arrived: what had cooled by `end` may be spent anew, but
    # nothing that the holder has promised not to without an answer.
    told = sorted(cooling_parts(lease.cooling, lease.last_report_at, dimension.name))
    respend_until = lease.last_report_at + lease.respend_seconds if lease.respend_seconds else float("inf")
    cooling = [(at, part) for at, part in told if at > min(end, respend_until)]
    if cooling and cooling[0][0] <= respend_until:
        # Steps are merged to their latest instant: of the first one, all but a little may be free already.
        del cooling[0]
    known_cooling = sum(part for _, part in cooling)
    refundable = min(lease.refundable[index] if lease.refundable else 0, known_cooling)
    spendable = min(amount, max(0, amount - known_cooling) + refundable)
    largest = lease.largest_cost[index] if lease.largest_cost else None
    is_pace_unknown = any(version <= lease.unpaced_version for version, _ in lease.unacknowledged)
    if largest is None or is_pace_unknown:
        return spendable
    # Up to expiry the holder spent for a TTL at most, however long its last report was on its way.
    elapsed = end - lease.last_report_at
    if not is_certified:
        elapsed = max(elapsed, lease.ttl_seconds)
    shares = lease.paced_shares(index)
    # Each growth gives credit at once.
    growth = sum(max(0, new - old) for old, new in itertools.pairwise(shares))
    paced = stock.pace_bound(max(shares), elapsed, dimension.window_seconds)
    paced += int(growth * stock.PACE_BURST) + refundable + largest
    return min(spendable, paced)
