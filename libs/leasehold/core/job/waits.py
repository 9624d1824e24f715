"""Callers of an acquire, who wait until their job has an allocation.

A job that nobody waits for any more is cancelled while it is in line. One that has an allocation by then has a
TTL, as every holder; so whoever asks again with the same request id finds it.
"""

import heapq

from leasehold.core import errors
from leasehold.core.job import effects, outbox, reclaim
from leasehold.core.job import mirror as mirrors
from leasehold.core.job.model import JobState

_NEVER = float("inf")


class Waits:
    """Who waits for which job. Effects are appended to `out`."""

    def __init__(
        self,
        mirror: mirrors.Mirror,
        asked: outbox.Outbox,
        reclaimer: reclaim.Reclaim,
        out: list[effects.Effect],
    ) -> None:
        self._mirror = mirror
        self._outbox = asked
        self._reclaim = reclaimer
        self._out = out
        self._waits: dict[str, outbox.Wait] = {}
        self._by_ticket: dict[int, outbox.Wait] = {}
        self._queue: list[tuple[float, str]] = []

    def begin(self, ticket: int, until: float) -> outbox.Wait:
        """A caller waits; its job is not committed yet."""
        found = outbox.Wait([ticket], until)
        self._by_ticket[ticket] = found
        return found

    def join(self, found: outbox.Wait, ticket: int, until: float) -> None:
        """Another call of the same request."""
        found.tickets.append(ticket)
        found.until = max(found.until, until)
        self._by_ticket[ticket] = found

    def job_ids(self) -> list[str]:
        """Committed jobs that are waited for."""
        return list(self._waits)

    def submitted(self, now: float, wait: outbox.Wait, verdict: effects.SubmitVerdict) -> None:
        """What became of the submit, now or when the request was made first."""
        if verdict.error is not None:
            self.refuse(wait, verdict.error)
            return
        wait.job_id = job_id = verdict.job_id
        known = self._waits.get(job_id)
        if known is not None:
            known.until = max(known.until, wait.until)
            known.tickets += wait.tickets
            for ticket in wait.tickets:
                self._by_ticket[ticket] = known
        else:
            known = self._waits[job_id] = wait
        heapq.heappush(self._queue, (known.until, job_id))
        job = self._mirror.jobs.get(job_id)
        if job is None:
            self.gone(job_id)
        elif job.state is JobState.RUNNING:
            self.placed(now, job_id)
        else:
            wish = self._outbox.cancels.get(job_id)
            if wish is not None and wish.is_for_want_of_waiters and wait.tickets:
                del self._outbox.cancels[job_id]

    def placed(self, now: float, job_id: str) -> None:
        """A job has an allocation."""
        wait = self._waits.pop(job_id, None)
        wish = self._outbox.cancels.get(job_id)
        if wish is not None and wish.is_for_want_of_waiters:
            # It came in time after all. If nobody is there to hear of it, it lapses.
            del self._outbox.cancels[job_id]
        if wait is None:
            return
        attempt, row = self._mirror.attempts[job_id], self._mirror.jobs[job_id].allocation
        if attempt.end is not None or row is None:
            self.refuse(wait, _ended(job_id))
            return
        if wait.tickets:
            self._reclaim.holders.renew(now, attempt.ref)
        for ticket in self._take(wait):
            acquired = effects.Acquired(row, self._reclaim.holders.ttl_seconds)
            self._out.append(effects.Answer(ticket, acquired))

    def gone(self, job_id: str) -> None:
        """A job has ended; if it is waited for, it was cancelled in line or long ago."""
        wait = self._waits.pop(job_id, None)
        if wait is not None:
            self.refuse(wait, errors.NotPlaced("no node had room in time; nothing is held"))

    def give_up(self, now: float, ticket: int) -> None:
        """A caller hung up."""
        wait = self._by_ticket.pop(ticket, None)
        if wait is None:
            return
        wait.tickets.remove(ticket)
        if not wait.tickets:
            wait.until = now
            if wait.job_id:
                self._expire(wait.job_id)

    def tick(self, now: float) -> None:
        """Who has waited for long enough."""
        while self._queue and self._queue[0][0] <= now:
            at, job_id = heapq.heappop(self._queue)
            wait = self._waits.get(job_id)
            if wait is None:
                continue
            if wait.until > at and wait.until > now:
                heapq.heappush(self._queue, (wait.until, job_id))
            else:
                self._expire(job_id)

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity: never."""
        return self._queue[0][0] if self._queue else _NEVER

    def _expire(self, job_id: str) -> None:
        job = self._mirror.jobs.get(job_id)
        if job is not None and job.state is JobState.PENDING and job_id not in self._outbox.cancels:
            wish = outbox.CancelWish(job_id, job.principal, is_for_want_of_waiters=True)
            self._outbox.cancels[job_id] = wish

    def _take(self, wait: outbox.Wait) -> list[int]:
        for ticket in wait.tickets:
            self._by_ticket.pop(ticket, None)
        return wait.tickets

    def refuse(self, wait: outbox.Wait, error: errors.LeaseholdError) -> None:
        """Its request is refused."""
        self._out.extend(effects.Answer(ticket, error=error) for ticket in self._take(wait))


def _ended(job_id: str) -> errors.AllocationLapsed:
    return errors.AllocationLapsed(f"the allocation of job {job_id} has ended", metadata={"job_id": job_id})
