"""What one batch changes in the ledger, and what came of it.

A batch is one transaction, fenced by the epoch, in this order: ends, cancels, queues, capacities, submits,
allocations. A change that finds another state than it expects is told STALE and changes nothing; the others of
its batch are done.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leasehold.core.job import model
from leasehold.core.placement import model as placement

#: Of one batch.
CHANGES_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAttempt:
    """Release the row of an attempt and move its job, both, if the row is live."""

    ref: model.AttemptRef
    outcome: model.Outcome
    #: COMPLETED, FAILED, CANCELLED, or PENDING: it is tried again.
    next_state: model.JobState
    #: The end was the job's own fault.
    is_failure: bool
    #: Wall clock; only with PENDING.
    not_before_seconds: float | None = None
    #: Set for an operator's word: leaves an audit row.
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """PENDING becomes CANCELLED; of RUNNING the wish is kept (verdict APPLIED both times)."""

    job_id: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PutQueue:
    """Create or replace a queue."""

    queue: placement.Queue
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteQueue:
    """Remove a queue; STALE if a job of it is pending or running."""

    name: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCapacity:
    """What a node declares for jobs, and its boot. The gated total is the larger of it and what is in use."""

    node: str
    #: Opaque to the ledger, 1 to 64 characters; see `nodes.boot_key`.
    boot_id: str
    declared: placement.Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A new job, PENDING."""

    job: model.JobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocate:
    """Give a PENDING job an allocation; its attempt becomes `ref.attempt` (one more than before)."""

    ref: model.AttemptRef
    node: str
    #: As the node's row tells it, or the change is STALE.
    boot_id: str
    held: placement.Resources
    queue: str


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A request that may be repeated, for a day."""

    principal: str
    request_id: str
    #: 0: not a batch.
    chunk: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAnswer:
    """Keep the first answer to a request. Only if none is kept, else the whole request's submits are STALE.

    A batch has one under a key, no more.
    Where Postgres refuses some of its submits, those are POISON, the others STALE, and no answer is kept.
    """

    key: RequestKey
    #: 32 bytes.
    payload_sha256: bytes
    #: Plain JSON.
    answer: Mapping[str, Any]
    #: Jobs of the batch's submits that stand or fall with it.
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One transaction's changes; at most `CHANGES_MAX` together, kept answers not counted."""

    #: Random, 1 to 64 characters: tells whether a batch whose answer was lost was committed.
    batch_id: str
    ends: tuple[EndAttempt, ...] = ()
    cancels: tuple[Cancel, ...] = ()
    queues: tuple[PutQueue | DeleteQueue, ...] = ()
    capacities: tuple[SetCapacity, ...] = ()
    submits: tuple[Submit, ...] = ()
    allocations: tuple[Allocate, ...] = ()
    answers: tuple[KeepAnswer, ...] = ()

    def __len__(self) -> int:
        """Number of changes."""
        return (
            len(self.ends)
            + len(self.cancels)
            + len(self.queues)
            + len(self.capacities)
            + len(self.submits)
            + len(self.allocations)
        )


class Verdict(enum.StrEnum):
    """What became of a change."""

    APPLIED = "APPLIED"
    #: It found another state than it expected, and changed nothing.
    STALE = "STALE"
    #: Postgres refused its data, and it alone (it was found by halving the batch).
    POISON = "POISON"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What was committed; tuples are in the order of the batch's."""

    #: Number of the flush; grows with each batch, over all epochs.
    flush_seq: int
    #: Postgres's clock at the flush.
    time_seconds: float
    ends: tuple[Verdict, ...] = ()
    cancels: tuple[Verdict, ...] = ()
    queues: tuple[Verdict, ...] = ()
    capacities: tuple[Verdict, ...] = ()
    submits: tuple[Verdict, ...] = ()
    allocations: tuple[Verdict, ...] = ()
    #: Answers that were kept before under the key of one of the batch's: what they are, and their payload.
    kept_before: Mapping[RequestKey, KeepAnswer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A node's row, as Postgres has it."""

    node: str
    boot_id: str
    declared: placement.Resources
    gated: placement.Resources
    used: placement.Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a new leader needs, as of one instant."""

    flush_seq: int
    queues: tuple[placement.Queue, ...]
    capacities: tuple[Capacity, ...]
    #: PENDING and RUNNING, the latter with their live allocation.
    jobs: tuple[model.JobRecord, ...]
    #: Reclaims by timeout are held back (see the breaker), since an earlier reign.
    is_breaker_open: bool = False
