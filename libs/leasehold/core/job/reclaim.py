"""What is given up for silence: external holders that did not renew, and attempts that their shims have ended.

Nothing is, within a leader's first TTL or while the breaker is open. An attempt of a silent node is only given
up if its job takes a repetition into account (`on_lost` after_fence) and its shim must have ended it by then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from leasehold.core import errors
from leasehold.core.job import attempts, breaker, effects, holders, model
from leasehold.core.job import execution as executions
from leasehold.core.job import mirror as mirrors
from leasehold.core.job.model import EndCause

#: A tick that comes later than this was held up with everything else here: silence then proves nothing.
HELD_UP_SECONDS = 5.0
#: While the breaker is open, whether holders are well again is looked at so often.
LOOK_SECONDS = 1.0

_NEVER = float("inf")


@dataclass(slots=True, kw_only=True)
class _Acknowledgement:
    """An operator's word, until it and what follows from it are committed."""

    ticket: int
    saved: effects.SaveBreaker
    given_up: Sequence[model.AttemptRef]
    is_saved: bool = False


class Reclaim:
    """Leases of holders, fences of attempts on silent nodes, and the breaker."""

    def __init__(
        self,
        mirror: mirrors.Mirror,
        execution: executions.Execution,
        out: list[effects.Effect],
        *,
        ttl_seconds: float,
        overrun_seconds: float,
        fence_grace_seconds: float,
    ) -> None:
        self.holders = holders.Holders(ttl_seconds=ttl_seconds, overrun_seconds=overrun_seconds)
        self.breaker = breaker.Breaker(ttl_seconds)
        self._mirror = mirror
        self._execution = execution
        self._out = out
        self._fence_grace_seconds = fence_grace_seconds
        self._from = _NEVER
        self._looked_at = -_NEVER
        #: Of attempts whose node is silent.
        self._fences: dict[model.AttemptRef, float] = {}
        self._acknowledged: list[_Acknowledgement] = []

    def restore(self, now: float, *, is_breaker_open: bool) -> None:
        """A reign begins."""
        self._from = now + self.holders.ttl_seconds
        self.breaker.restore(now, is_open=is_breaker_open)

    def loaded(self, now: float) -> None:
        """The mirror was read anew: who is not known yet has a whole TTL, who is gone has none."""
        live = {attempt.ref: attempt for attempt in self._mirror.attempts.values()}
        for ref in [*self.holders]:
            if ref not in live:
                self.holders.remove(ref)
        for ref, attempt in live.items():
            if attempt.is_external and attempt.end is None and ref not in self.holders:
                self.holders.renew(now, ref)
        self._fences = {ref: at for ref, at in self._fences.items() if ref in live}

    def ended(self, ref: model.AttemptRef) -> None:
        """It is over."""
        self.holders.remove(ref)
        self._fences.pop(ref, None)

    def connection_changed(self, name: str) -> None:
        """A node fell silent, or is heard again."""
        node = self._mirror.nodes[name]
        for job_id in node.jobs:
            attempt = self._mirror.attempts[job_id]
            self._fences.pop(attempt.ref, None)
            if not node.is_connected and attempt.end is None:
                at = attempt.fenced_at(self._fence_grace_seconds, holders.DRIFT)
                if at != _NEVER:
                    self._fences[attempt.ref] = at

    def renew(self, now: float, ref: model.AttemptRef) -> None:
        """A holder lives. Raises `AllocationLapsed`, `FailedPrecondition`."""
        attempt = self._mirror.live(ref)
        if attempt is not None and not attempt.is_external:
            raise errors.FailedPrecondition(
                f"job {ref.job_id} runs on a node, whose agent answers for it", field="job_id"
            )
        if self.holders.is_overdue(now, ref):
            self.run(now)
        if attempt is None or attempt.end is not None:
            raise errors.AllocationLapsed(
                f"attempt {ref.attempt} of job {ref.job_id} has no allocation any more; its work must stop",
                metadata={"job_id": ref.job_id, "attempt": str(ref.attempt)},
            )
        self.holders.renew(now, ref)

    def tick(self, now: float, due: float) -> None:
        """Time has passed; `due` is when this was to be called."""
        if now - due > HELD_UP_SECONDS:
            self.holders.give_time(now)
        self.run(now)

    def run(self, now: float) -> None:
        """Give up what is due."""
        self._looked_at = now
        overdue = self.holders.overdue(now)
        if self.breaker.judge(now, holders=len(self.holders), overdue=len(overdue)):
            self._save_breaker()
        if self.breaker.is_open or now < self._from:
            return
        self.breaker.lapsed(now, len(overdue))
        self._give_up(now, overdue)

    def _give_up(self, now: float, overdue: Sequence[model.AttemptRef]) -> list[model.AttemptRef]:
        """Conclude these holders' attempts, and those whose fences are past; which they are."""
        given_up = []
        for ref in overdue:
            self.holders.remove(ref)
            attempt = self._mirror.live(ref)
            if attempt is not None:
                self._lapse(attempt)
                given_up.append(ref)
        for ref, at in list(self._fences.items()):
            attempt = self._mirror.live(ref)
            if at <= now and attempt is not None:
                del self._fences[ref]
                self._fence(attempt)
                given_up.append(ref)
        return given_up

    def _lapse(self, attempt: attempts.Attempt) -> None:
        detail = f"its holder has not renewed for its TTL of {self.holders.ttl_seconds:g} s and more"
        outcome = model.Outcome(cause=EndCause.LAPSED, detail=detail)
        self._execution.conclude(attempt, outcome, is_by_timeout=True)

    def _fence(self, attempt: attempts.Attempt) -> None:
        detail = f"node {attempt.node} is silent, and its shim has ended it by now"
        outcome = model.Outcome(cause=EndCause.NODE_LOST, detail=detail)
        self._execution.conclude(attempt, outcome, is_by_timeout=True)

    def acknowledge(self, now: float, ticket: int, *, cause: str, actor: str) -> None:
        """An operator says that those who are silent are dead. Answered with `effects.Acknowledged`.

        Raises `FailedPrecondition` within this leader's first TTL: by then nobody can be known to be silent.
        """
        if not self.breaker.is_open:
            self._out.append(effects.Answer(ticket, effects.Acknowledged(was_held_back=False, given_up=0)))
            return
        if now < self._from:
            raise errors.FailedPrecondition(
                "this leader has just begun and gives everybody a TTL", retry_after_seconds=self._from - now
            )
        self.breaker.acknowledge(cause)
        saved = self._save_breaker(actor)
        # Without a word to the breaker: it would count them as lapsed, and trip again.
        given_up = self._give_up(now, self.holders.overdue(now))
        self._acknowledged.append(_Acknowledgement(ticket=ticket, saved=saved, given_up=given_up))

    def _save_breaker(self, actor: str = "") -> effects.SaveBreaker:
        saved = effects.SaveBreaker(self.breaker.is_open, self.breaker.cause, actor)
        self._out.append(saved)
        return saved

    def breaker_saved(self, saved: effects.SaveBreaker) -> None:
        """This is kept."""
        for each in self._acknowledged:
            each.is_saved |= each.saved is saved
        self.answer_acknowledged()

    def answer_acknowledged(self) -> None:
        """Answer the operators whose word, and every release that follows from it, is committed."""
        waiting = []
        for each in self._acknowledged:
            if each.is_saved and all(self._mirror.live(ref) is None for ref in each.given_up):
                value = effects.Acknowledged(was_held_back=True, given_up=len(each.given_up))
                self._out.append(effects.Answer(each.ticket, value))
            else:
                waiting.append(each)
        self._acknowledged = waiting

    def next_deadline(self, now: float) -> float:
        """When `tick` has something to do; infinity: never."""
        times = [self.holders.next_deadline(now), min(self._fences.values(), default=_NEVER)]
        if self.breaker.is_open:
            # Fences and those overdue wait for it.
            times = [times[0], min(self.breaker.closes_at(), self._looked_at + LOOK_SECONDS)]
        return max(min(times), self._from) if now < self._from else min(times)
