"""Jobs of one reign: who waits, who has what, what became of it.

Events go in by the methods, with the time; effects come out of `take_effects`, batches of `take_batch`. The
shell

1. calls `restore` first, with what Postgres knows, then `node_seen` for every node;
2. after every event executes `take_effects`, in order, before it gives the next event;
3. commits each batch that `take_batch` gives, then calls `batch_done`; of one whose fate it does not know it
   calls `batch_lost`, reads the ledger anew, calls `prepare` and `reloaded`. The same on the effect `Reload`;
4. calls `tick` at `next_deadline` at the latest.

Everything is answered and dispatched from what is committed: a request changes nothing here before its batch is
done. `now` is the leader's monotonic clock, `wall` the wall clock, both in seconds.
"""

import itertools
from collections.abc import Callable, Sequence

from leasehold.core import errors
from leasehold.core.job import (
    changes,
    commits,
    effects,
    execution,
    holders,
    loading,
    mirror,
    model,
    outbox,
    reclaim,
    requests,
    views,
    waits,
)
from leasehold.core.job.model import AttemptPhase, EndCause, JobState
from leasehold.core.job.nodes import NOTHING
from leasehold.core.placement import model as placement

#: From the end of `max_run` until the leader takes it that a silent node has ended an attempt: more than the
#: node's own kill grace and margin (`model`), as its clock starts late and its host may be slow.
FENCE_GRACE_SECONDS = 90.0

_NEVER = float("inf")


class JobMachine:
    """One a reign. `new_id` gives a new UUID each time. Requests are answered by ticket (`effects.Answer`)."""

    def __init__(
        self,
        *,
        new_id: Callable[[], str],
        ageing_seconds: float = 60.0,
        ttl_seconds: float = holders.TTL_SECONDS,
        overrun_seconds: float = holders.OVERRUN_SECONDS,
        fence_grace_seconds: float = FENCE_GRACE_SECONDS,
    ) -> None:
        self._new_id = new_id
        self._tickets = itertools.count(1)
        self._effects: list[effects.Effect] = []
        self._now = 0.0
        self.mirror = mirror.Mirror(ageing_seconds=ageing_seconds)
        self.outbox = outbox.Outbox()
        self._execution = execution.Execution(self.mirror, self.outbox, self._effects)
        self.reclaim = reclaim.Reclaim(
            self.mirror,
            self._execution,
            self._effects,
            ttl_seconds=ttl_seconds,
            overrun_seconds=overrun_seconds,
            fence_grace_seconds=fence_grace_seconds,
        )
        self._waits = waits.Waits(self.mirror, self.outbox, self.reclaim, self._effects)
        self._commits = commits.Commits(
            self.mirror, self.outbox, self._execution, self.reclaim, self._waits, self._effects, new_id
        )

    def restore(self, now: float, wall: float, snapshot: changes.Snapshot) -> None:
        """Begin with what is committed.

        Nobody else has this machine yet, so another thread may do it. What runs is UNKNOWN until its node's
        agent tells of it. Every external holder has a whole TTL, and within the first one nothing is given up
        for silence.
        """
        self._now = now
        self.reclaim.restore(now, is_breaker_open=snapshot.is_breaker_open)
        self.mirror.begin_from(self.mirror.prepare(now, wall, snapshot))
        self.reclaim.loaded(now)
        for attempt in self.mirror.attempts.values():
            if attempt.is_external:
                attempt.phase = AttemptPhase.STARTED

    # Requests

    def submit(
        self,
        now: float,
        wall: float,
        specs: Sequence[model.JobSpec],
        *,
        principal: str,
        key: changes.RequestKey | None,
        payload_sha256: bytes,
        is_all_or_none: bool,
    ) -> int:
        """Submit 1 to 1,000 jobs in one commit. The answer: a tuple of `SubmitVerdict`.

        With a key, the first answer under it is told again, refusals included. Raises `InvalidArgument`,
        `RequestIdReused`; so may the answer.
        """
        self._now = now
        if not 1 <= len(specs) <= changes.CHANGES_MAX:
            raise errors.InvalidArgument(f"specs: 1 to {changes.CHANGES_MAX}, not {len(specs)}", field="specs")
        twin = requests.waiting_twin(self.outbox, key, payload_sha256)
        if twin is not None and twin.wait is None:
            ticket = self._ticket(twin.tickets)
        else:
            made = self._submission(wall, specs, principal, key, payload_sha256, is_all_or_none)
            ticket = self._ticket(made.tickets)
            if made.jobs or key is not None:
                self.outbox.add_submission(made)
            else:
                self._effects.append(effects.Answer(ticket, made.verdicts))
        return ticket

    def _submission(
        self,
        wall: float,
        specs: Sequence[model.JobSpec],
        principal: str,
        key: changes.RequestKey | None,
        payload_sha256: bytes,
        is_all_or_none: bool,
    ) -> outbox.Submission:
        return requests.submission(
            self.mirror,
            self.outbox,
            specs,
            wall=wall,
            principal=principal,
            job_ids=[self._new_id() for _ in specs],
            key=key,
            payload_sha256=payload_sha256,
            is_all_or_none=is_all_or_none,
        )

    def rehearse(self, now: float, wall: float, spec: model.JobSpec) -> placement.Explanation:
        """What would become of a job. Raises what its submit would be answered with."""
        self._now = now
        error = requests.refusal(self.mirror, self.outbox, spec)
        if error is not None:
            raise error
        job = model.JobRecord(
            job_id=self._new_id(), spec=spec, state=JobState.PENDING, submit_time_seconds=wall
        )
        return self.mirror.scheduler.rehearse(loading.waiting(job, now, wall), now)

    def cancel(self, now: float, job_id: str, actor: str) -> int:
        """Cancel a job in line, or have one that runs end. The answer: None.

        One that is not pending or running is left as it is, and answered at once.
        """
        self._now = now
        if job_id not in self.mirror.jobs:
            return self._at_once()
        wish = self.outbox.cancels.setdefault(job_id, outbox.CancelWish(job_id, actor))
        wish.actor, wish.is_for_want_of_waiters = actor, False
        return self._ticket(wish.tickets)

    def acquire(
        self,
        now: float,
        wall: float,
        spec: model.JobSpec,
        *,
        principal: str,
        key: changes.RequestKey,
        payload_sha256: bytes,
        wait_seconds: float,
    ) -> int:
        """An allocation for a workload that runs elsewhere. The answer: `Acquired`, or `NotPlaced` as error.

        The same request again finds the same allocation. Raises `InvalidArgument`, `RequestIdReused`; so may
        the answer.
        """
        self._now = now
        if spec.template:
            raise errors.InvalidArgument("template: what runs elsewhere has none", field="template")
        twin = requests.waiting_twin(self.outbox, key, payload_sha256)
        ticket = next(self._tickets)
        until = now + wait_seconds
        if twin is not None and twin.wait is not None:
            self._waits.join(twin.wait, ticket, until)
            return ticket
        made = self._submission(wall, (spec,), principal, key, payload_sha256, is_all_or_none=False)
        made.wait = self._waits.begin(ticket, until)
        self.outbox.add_submission(made)
        return ticket

    def renew(self, now: float, ref: model.AttemptRef) -> effects.Renewed:
        """An external holder lives. Raises `AllocationLapsed`: its work must stop; `FailedPrecondition`."""
        self._now = now
        self.reclaim.renew(now, ref)
        is_cancelled = self.mirror.jobs[ref.job_id].is_cancel_requested
        return effects.Renewed(self.reclaim.holders.ttl_seconds, is_cancelled)

    def release(self, now: float, ref: model.AttemptRef, *, is_failed: bool, detail: str) -> int:
        """An external holder gives its allocation back. The answer: the job's record; None if it was before.

        Raises `FailedPrecondition` if it runs on a node.
        """
        self._now = now
        attempt = self.mirror.live(ref)
        if attempt is None:
            return self._at_once()
        if not attempt.is_external:
            raise errors.FailedPrecondition(
                f"job {ref.job_id} runs on a node, whose agent tells its end; cancel it instead", field="job_id"
            )
        cause = EndCause.FAILED if is_failed else EndCause.SUCCEEDED
        self._execution.conclude(attempt, model.Outcome(cause=cause, detail=detail))
        self.reclaim.ended(ref)
        return self._ticket(attempt.tickets)

    def force_release(self, now: float, ref: model.AttemptRef, *, cause: str, actor: str) -> int:
        """An operator says that nothing of an attempt runs any more. The answer: as of `release`."""
        self._now = now
        attempt = self.mirror.live(ref)
        if attempt is None:
            return self._at_once()
        outcome = model.Outcome(cause=EndCause.FORCED, detail=cause)
        self._execution.conclude(attempt, outcome, actor=actor)
        self.reclaim.ended(ref)
        return self._ticket(attempt.tickets)

    def put_queue(self, now: float, queue: placement.Queue, actor: str) -> int:
        """Create or replace a queue. The answer: None. Raises `InvalidArgument`."""
        self._now = now
        model.checked_queue_name(queue.name, field_name="queue.name")
        wish = outbox.QueueWish(changes.PutQueue(queue=queue, actor=actor))
        self.outbox.queues.append(wish)
        return self._ticket(wish.tickets)

    def delete_queue(self, now: float, name: str, actor: str) -> int:
        """Remove a queue that has no jobs. The answer: None. Raises `NotFound`, `FailedPrecondition`."""
        self._now = now
        requests.check_deletable(self.mirror, self.outbox, name)
        wish = outbox.QueueWish(changes.DeleteQueue(name=name, actor=actor))
        self.outbox.deleting.add(name)
        self.outbox.queues.append(wish)
        return self._ticket(wish.tickets)

    def give_up(self, now: float, ticket: int) -> None:
        """A caller hung up: an acquire is cancelled if nobody else waits; all else takes its course."""
        self._now = now
        self._waits.give_up(now, ticket)

    def acknowledge_silence(self, now: float, *, cause: str, actor: str) -> int:
        """An operator says that those who are silent are dead: give up what is held back. See `breaker`.

        The answer: `Acknowledged`. Raises `FailedPrecondition` within this leader's first TTL.
        """
        self._now = now
        ticket = next(self._tickets)
        self.reclaim.acknowledge(now, ticket, cause=cause, actor=actor)
        return ticket

    def _ticket(self, tickets: list[int]) -> int:
        ticket = next(self._tickets)
        tickets.append(ticket)
        return ticket

    def _at_once(self) -> int:
        ticket = next(self._tickets)
        self._effects.append(effects.Answer(ticket))
        return ticket

    # Nodes

    def node_seen(self, now: float, facts: effects.NodeFacts) -> None:
        """A node is so now: it registered, its connection or its state changed."""
        self._now = now
        if self._execution.node_seen(now, facts):
            self.reclaim.connection_changed(facts.name)

    def node_forgotten(self, name: str) -> None:
        """An operator has deleted a node. What it may still run stays counted until it is released by force."""
        self._execution.node_forgotten(name)

    def inventory(self, now: float, node: str, reports: Sequence[model.Report]) -> None:
        """All that a node's agent knows, first thing on a connection."""
        self._now = now
        self._execution.inventory(now, node, reports)

    def attempt_reported(self, now: float, node: str, report: model.Report) -> None:
        """An attempt is so now, by its node's agent's word."""
        self._now = now
        self._execution.reported(now, node, report)

    # Time

    def next_deadline(self) -> float:
        """When `tick` is due at the latest; infinity: not at all."""
        return min(
            self._waits.next_deadline(),
            self._execution.next_deadline(),
            self.reclaim.next_deadline(self._now),
            self._commits.next_deadline(self._now),
        )

    def tick(self, now: float, wall: float) -> None:
        """Time has passed."""
        due = self.next_deadline()
        self._now = now
        self._waits.tick(now)
        self._execution.tick(now)
        self.reclaim.tick(now, due)

    def breaker_saved(self, now: float, saved: effects.SaveBreaker) -> None:
        """What this effect asked for is durable."""
        self._now = now
        self.reclaim.breaker_saved(saved)

    # Batches

    def take_batch(self, now: float, wall: float) -> changes.Batch | None:
        """The next batch, allocations planned; None: one is in flight, or there is nothing to do."""
        self._now = now
        return self._commits.take(now, wall)

    def batch_done(self, now: float, wall: float, result: changes.BatchResult) -> None:
        """The batch in flight is committed, with this result."""
        self._now = now
        self._commits.done(now, wall, result)

    def batch_lost(self, now: float) -> None:
        """Nobody knows whether the batch in flight is committed. No other is given until `reloaded`."""
        self._now = now
        self._commits.lost()

    def prepare(self, now: float, wall: float, snapshot: changes.Snapshot) -> loading.Loaded:
        """Read, for `reloaded`, what is committed: nearly all of the work of it, a second for 100,000 jobs.

        Changes nothing, and reads nothing but what batches change, of which none is under way; so another
        thread may do it while events go on.
        """
        loaded = self.mirror.prepare(now, wall, snapshot)
        loaded.compare(self.mirror.jobs)
        return loaded

    def reloaded(self, now: float, loaded: loading.Loaded, was_committed: bool = False) -> None:
        """What is committed, read anew; `was_committed`: the batch that was in flight is."""
        self._now = now
        self._commits.reloaded(now, loaded, was_committed=was_committed)

    def take_effects(self) -> list[effects.Effect]:
        """What is to be done, in order; each is given out once."""
        taken = list(self._effects)
        self._effects.clear()
        return taken

    # Reading

    def job(self, job_id: str) -> model.JobRecord | None:
        """A job that is pending or running, as committed; None: it is neither."""
        return self.mirror.jobs.get(job_id)

    def phase(self, ref: model.AttemptRef) -> AttemptPhase | None:
        """How far an attempt is; None: it has no allocation any more."""
        attempt = self.mirror.live(ref)
        return None if attempt is None else attempt.phase

    @property
    def asked_count(self) -> int:
        """Jobs that are submitted, and wait for the next batch."""
        return self.outbox.asked_count

    @property
    def pending_count(self) -> int:
        """Jobs in line."""
        return self.mirror.pending.total()

    @property
    def running_count(self) -> int:
        """Jobs that have an allocation."""
        return len(self.mirror.attempts)

    @property
    def unknown_count(self) -> int:
        """Attempts whose nodes are silent."""
        return sum(attempt.phase is AttemptPhase.UNKNOWN for attempt in self.mirror.attempts.values())

    def explain(self, job_id: str, now: float) -> placement.Explanation:
        """What keeps a pending job. Raises `NotFound`."""
        return self.mirror.scheduler.explain(job_id, now)

    def utilization(self) -> views.Utilization:
        """What is allocated of each node, and of all."""
        nodes = []
        for name in sorted(self.mirror.nodes):
            node = self.mirror.nodes[name]
            if node.boot_key and (node.declared != NOTHING or node.used != NOTHING):
                placed = node.placed()
                nodes.append(
                    views.NodeUtilization(
                        name=name,
                        used=node.used,
                        total=node.gated,
                        running_jobs=len(node.jobs),
                        is_closed=placed.openness is not placement.Openness.OPEN,
                    )
                )
        used, total = NOTHING, NOTHING
        for each in nodes:
            used, total = used.plus(each.used), total.plus(each.total)
        return views.Utilization(
            nodes=tuple(nodes),
            total=views.NodeUtilization(
                name="",
                used=used,
                total=total,
                running_jobs=sum(each.running_jobs for each in nodes),
                is_closed=False,
            ),
            held_back_cause=self.reclaim.breaker.held_back_cause,
        )

    def queue_usage(self) -> tuple[views.QueueUsage, ...]:
        """Every queue, by name, and what its jobs have."""
        return tuple(
            views.QueueUsage(
                queue=queue,
                used=self.mirror.scheduler.usage(queue.name),
                pending_jobs=self.mirror.pending[queue.name],
                running_jobs=self.mirror.running[queue.name],
            )
            for queue in self.mirror.scheduler.queues()
        )
