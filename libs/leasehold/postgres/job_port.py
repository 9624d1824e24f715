"""The ledger of jobs and allocations in Postgres, as a port.

`job_store.PostgresJobStore` and `job_memory.MemoryJobStore` implement it. Any method may raise
`PostgresUnavailable`; after a `flush` that did, the batch may or may not have been committed:
`was_flushed` tells.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.postgres import port

#: Jobs that ended, released rows, kept answers and audit go after so long.
RETENTION_SECONDS = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs; empty: all."""

    states: frozenset[model.JobState] = frozenset()
    queue: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the ledger that ought not to be."""

    rule: str
    #: What it is about: a node, a job.
    subject: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerAudit:
    """What an audit found, all in one snapshot."""

    findings: tuple[Finding, ...]
    rules: tuple[str, ...]
    flush_seq: int
    live_allocations: int
    nodes: int


class JobStore(Protocol):
    """Methods may be called concurrently from one event loop, `flush` one at a time."""

    async def take_over(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """End what earlier epochs' sessions are doing, fence them off, and read what there is.

        In this order; so no earlier leader's batch is committed after what is read. Raises `StaleEpoch`.
        """

    async def flush(self, epoch: epochs.Epoch, batch: changes.Batch) -> changes.BatchResult:
        """Commit a batch. Raises `StaleEpoch`, after which this leader must not go on.

        A batch of data that Postgres refuses is halved until only the poison fails. A kept answer and the
        submits that it tells of fail together; which of them are the poison is told apart.
        """

    async def was_flushed(self, epoch: epochs.Epoch, batch_id: str) -> bool:
        """Whether the last batch that was committed is this one; ends the session of one that is under way."""

    async def reload(self, epoch: epochs.Epoch) -> changes.Snapshot:
        """As `take_over`, without a change: in one REPEATABLE READ transaction. Raises `StaleEpoch`."""

    async def set_breaker(self, epoch: epochs.Epoch, *, is_open: bool, cause: str, actor: str = "") -> None:
        """Keep, over failovers, whether reclaims by timeout are held back; leaves an audit row.

        With an `actor` it is an operator's word. Raises `StaleEpoch`.
        """

    async def kept_answers(
        self, keys: Collection[changes.RequestKey]
    ) -> Mapping[changes.RequestKey, changes.KeepAnswer]:
        """First answers that are kept under these keys."""

    async def get_job(self, job_id: str) -> model.JobRecord:
        """A job, whatever its state. Raises `NotFound`."""

    async def get_allocation(self, ref: model.AttemptRef) -> model.AllocationRecord:
        """The allocation that an attempt has, or had. Raises `NotFound`."""

    async def list_jobs(
        self, chosen: JobFilter, *, page_size: int, before: tuple[float, str] | None
    ) -> port.Page[model.JobRecord]:
        """Newest first, beginning before (submit time, job id)."""

    async def audit(self) -> LedgerAudit:
        """Compare rows, counters, totals and states in one REPEATABLE READ READ ONLY snapshot."""

    async def release_ended(self, epoch: epochs.Epoch) -> int:
        """Release the live allocations of jobs that have ended, or that are gone; how many there were.

        0 unless somebody has written rows by hand: an end and its release are one transaction. Called every
        few seconds, so it reads live rows by an index only. Raises `StaleEpoch`.
        """

    async def keep_house(
        self, epoch: epochs.Epoch, *, retention_seconds: float = RETENTION_SECONDS
    ) -> Sequence[str]:
        """Make partitions for days to come, drop those past retention, delete old jobs.

        Returns, for people, what could not be done.
        """

    async def close(self) -> None:
        """Close the connections. Calling it again does nothing."""


def no_such_attempt(ref: model.AttemptRef) -> errors.NotFound:
    """The refusal for an attempt that never was, or is past its retention."""
    return errors.NotFound(f"job {ref.job_id} has no attempt {ref.attempt}", field="attempt")
