"""What is asked for and not committed yet, in line for the next batch."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from leasehold.core.job import changes, effects, model


@dataclass(slots=True)
class Wait:
    """Callers who wait until a job of theirs has an allocation."""

    tickets: list[int]
    #: Until when, by the monotonic clock.
    until: float
    #: Empty: it is not committed yet.
    job_id: str = ""


@dataclass(slots=True)
class Submission:
    """One request that submits jobs: they are committed together."""

    verdicts: tuple[effects.SubmitVerdict, ...]
    jobs: tuple[model.JobRecord, ...]
    payload_sha256: bytes
    key: changes.RequestKey | None = None
    is_all_or_none: bool = False
    tickets: list[int] = field(default_factory=list)
    #: Of an acquire, whose callers wait on.
    wait: Wait | None = None


@dataclass(slots=True)
class CancelWish:
    """A job is to be cancelled."""

    job_id: str
    actor: str
    tickets: list[int] = field(default_factory=list)
    #: Only since nobody waits for it any more.
    is_for_want_of_waiters: bool = False


@dataclass(slots=True)
class QueueWish:
    """A queue is to be put or deleted."""

    change: changes.PutQueue | changes.DeleteQueue
    tickets: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Flight:
    """A batch on its way, and whose it is."""

    batch: changes.Batch
    submissions: list[Submission]
    cancels: list[CancelWish]
    queues: list[QueueWish]
    planned_at: float


class Outbox:
    """First come, first served in each kind."""

    def __init__(self) -> None:
        self.submissions: deque[Submission] = deque()
        #: In the batch that is on its way.
        self.flying: tuple[Submission, ...] = ()
        self.cancels: dict[str, CancelWish] = {}
        self.queues: deque[QueueWish] = deque()
        #: Queues that are to go, until that is answered.
        self.deleting: set[str] = set()
        #: Jobs whose attempts have ended.
        self.ends: dict[str, None] = {}
        #: Nodes whose row may have to change.
        self.nodes: dict[str, None] = {}
        #: Requests that wait or are on their way.
        self.by_key: dict[changes.RequestKey, Submission] = {}

    def add_submission(self, submission: Submission) -> None:
        """Put it in line."""
        self.submissions.append(submission)
        if submission.key is not None:
            self.by_key[submission.key] = submission

    @property
    def asked_count(self) -> int:
        """Jobs of the submissions in line."""
        return sum(len(each.jobs) for each in self.submissions)

    def take_submissions(self, room: int) -> list[Submission]:
        """Whole requests, as many as there is room for; none under a key that is among them already."""
        taken: list[Submission] = []
        keys: set[changes.RequestKey] = set()
        while self.submissions and len(self.submissions[0].jobs) <= room and len(taken) < changes.CHANGES_MAX:
            key = self.submissions[0].key
            if key is not None:
                if key in keys:
                    break
                keys.add(key)
            submission = self.submissions.popleft()
            room -= len(submission.jobs)
            taken.append(submission)
        return taken

    def take_cancels(self, room: int) -> list[CancelWish]:
        """As many as there is room for."""
        chosen = list(self.cancels)[:room]
        return [self.cancels.pop(job_id) for job_id in chosen]

    def take_queues(self, room: int) -> list[QueueWish]:
        """As many as there is room for."""
        return [self.queues.popleft() for _ in range(min(room, len(self.queues)))]

    def put_back(
        self,
        *,
        submissions: Iterable[Submission],
        cancels: Iterable[CancelWish],
        queues: Iterable[QueueWish],
    ) -> None:
        """What was lost with its batch comes first again."""
        self.submissions.extendleft(reversed(list(submissions)))
        self.queues.extendleft(reversed(list(queues)))
        for wish in cancels:
            later = self.cancels.get(wish.job_id)
            if later is not None:
                wish.tickets += later.tickets
                wish.is_for_want_of_waiters &= later.is_for_want_of_waiters
            self.cancels[wish.job_id] = wish

    def queues_used(self) -> set[str]:
        """Of jobs that are not committed yet."""
        return {job.spec.queue for each in (*self.submissions, *self.flying) for job in each.jobs}
