"""The attempts of jobs on one host, over time: which are started, stopped, killed and told.

Pure: the driver feeds assignments, processes' beginnings and ends, and the time; then takes effects and carries
them out. The promises: an attempt is started at most once, whoever asks how often; one that is to be stopped
before it was heard of never starts; an end is told only once it is on disk and no process is left, and it is
kept until the leader says that it is committed.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable

from leasehold.core.job import model
from leasehold.core.job.model import AttemptPhase, EndCause
from leasehold.core.node import job_effects, job_life, stopping, worker_records
from leasehold.core.node import model as node_model
from leasehold.core.node.job_life import AttemptLife

#: Ends that nobody took are told again so often, also on a stream that stands.
TELL_AGAIN_SECONDS = 30.0
#: One sample may be of a moment that is over.
OVER_COUNT = 2
_FORGOTTEN_MAX = 10_000


class JobMachine:
    """Every method takes the agent's monotonic time, in seconds; `wall` is the wall clock, for people."""

    def __init__(self) -> None:
        self._lives: dict[model.AttemptRef, AttemptLife] = {}
        #: An order to run them that comes late must not run them again.
        self._forgotten: OrderedDict[model.AttemptRef, None] = OrderedDict()
        self._effects: list[job_effects.Effect] = []
        #: What the leader was not told yet, in order.
        self._changed: dict[model.AttemptRef, None] = {}
        self._tell_again_at: dict[model.AttemptRef, float] = {}

    # From the leader

    def assign(self, assignment: job_life.Assignment, stop: node_model.StopContract) -> bool:
        """Start an attempt; False if it is known already, and so is passed over."""
        ref = assignment.ref
        if ref in self._lives or ref in self._forgotten:
            return False
        self._lives[ref] = AttemptLife(
            ref,
            held=assignment.held,
            max_run_seconds=assignment.max_run_seconds,
            template=assignment.template,
            stop=stop,
        )
        self._effects.append(job_effects.Start(assignment))
        return True

    def refuse(
        self, wall: float, ref: model.AttemptRef, detail: str, cause: EndCause = EndCause.NOT_STARTED
    ) -> None:
        """An attempt that cannot be run here never is. One that is known already is left as it is.

        `cause` is NOT_STARTED where another host may run it, or this one later; else REFUSED.
        """
        if ref in self._lives or ref in self._forgotten:
            return
        self._lives[ref] = AttemptLife(ref, is_alive=False)
        self._note("job_refused", ref, why=detail)
        self._end(ref, wall, model.Outcome(cause=cause, detail=detail))

    def stop(
        self,
        now: float,
        wall: float,
        ref: model.AttemptRef,
        cause: EndCause = EndCause.CANCELLED,
        why: str = "",
    ) -> None:
        """Have an attempt end by its stop contract; one that was not heard of yet never starts. Idempotent."""
        life = self._lives.get(ref)
        if life is None:
            self.refuse(wall, ref, "it was to be stopped before it was started")
        elif life.is_alive and life.asked_for is None:
            life.asked_for, life.why = cause, why
            self._step(now, wall, life)

    def forget(self, ref: model.AttemptRef) -> None:
        """The leader has committed its end. One that has not ended is left as it is."""
        life = self._lives.get(ref)
        if life is None or life.phase is not AttemptPhase.ENDED:
            return
        del self._lives[ref]
        self._changed.pop(ref, None)
        self._tell_again_at.pop(ref, None)
        self._forgotten[ref] = None
        while len(self._forgotten) > _FORGOTTEN_MAX:
            self._forgotten.popitem(last=False)
        self._effects.append(job_effects.Forget(ref))

    def kill_all(self, now: float, cause: EndCause, why: str) -> None:
        """Kill every attempt that runs."""
        for life in self._lives.values():
            if life.is_alive and life.outcome is None:
                self._kill(now, life, cause, why)

    # From disk, before anything else

    def restore_end(self, report: model.Report) -> None:
        """An end that an earlier agent kept."""
        life = AttemptLife(report.ref, phase=AttemptPhase.ENDED, is_alive=False, outcome=report.outcome)
        life.start_time_seconds, life.end_time_seconds = report.start_time_seconds, report.end_time_seconds
        self._lives[report.ref] = life

    def adopt(
        self, now: float, wall: float, life: AttemptLife, stop: worker_records.StopProgress | None = None
    ) -> None:
        """An attempt that an earlier agent began; `started` or `ended` may follow at once.

        Raises nothing for one that is known: its end is, and then it is ended.
        """
        if life.ref in self._lives:
            return
        self._lives[life.ref] = life
        if life.started_at is not None:
            life.phase = AttemptPhase.STARTED
        if stop is None:
            return
        cause = EndCause(stop.why) if stop.why in set(EndCause) else EndCause.CANCELLED
        life.phase, life.signalled_seconds = AttemptPhase.STOPPING, 0.0
        if stop.step >= len(stop.contract.steps) and cause is not EndCause.CANCELLED:
            life.killed_for, life.kill_again_at = cause, now
            return
        life.asked_for = cause
        life.ladder = stopping.Ladder(stop.contract, stop.step, now + stop.remaining_seconds)
        if not stop.is_sent:
            self._send(now, wall, life)

    # From its processes

    def started(self, now: float, wall: float, ref: model.AttemptRef, pid: int) -> None:
        """Its program runs."""
        life = self._lives.get(ref)
        if life is None or not life.is_alive:
            return
        if life.started_at is None:
            life.started_at, life.start_time_seconds = now, wall
        life.phase = AttemptPhase.STARTED if life.ladder is None else AttemptPhase.STOPPING
        self._note("job_started", ref, pid=pid)
        self._tell(ref)
        if life.asked_for is not None and life.ladder is None:
            self._step(now, wall, life)

    def start_failed(self, wall: float, ref: model.AttemptRef, detail: str) -> None:
        """It could not be started, and no process of it was made."""
        life = self._lives.get(ref)
        if life is not None and life.is_alive:
            self._end(ref, wall, model.Outcome(cause=EndCause.NOT_STARTED, detail=detail))

    def ended(
        self,
        wall: float,
        ref: model.AttemptRef,
        told: node_model.WorkerExit,
        *,
        is_rebooted: bool = False,
    ) -> None:
        """Its main process ended, or never was. The end is told once nothing of it is left."""
        life = self._lives.get(ref)
        if life is None or not life.is_alive or life.outcome is not None:
            return
        life.outcome = life.judged(told, is_rebooted=is_rebooted)
        life.end_time_seconds = told.end_time_seconds or wall
        life.ladder = life.kill_again_at = None
        self._effects.append(job_effects.Clear(ref))

    def cleared(self, wall: float, ref: model.AttemptRef) -> None:
        """No process of an attempt that ended is left."""
        life = self._lives.get(ref)
        if life is not None and life.is_alive and life.outcome is not None:
            self._end(ref, life.end_time_seconds or wall, life.outcome)

    def end_kept(self, now: float, ref: model.AttemptRef) -> None:
        """Its end is on disk: from now on it is told."""
        life = self._lives.get(ref)
        if life is not None and life.outcome is not None and not life.is_alive:
            life.phase = AttemptPhase.ENDED
            self._tell(ref)
            self._tell_again_at[ref] = now + TELL_AGAIN_SECONDS

    def held(self, now: float, ref: model.AttemptRef, held_bytes: int, *, is_enforced: bool) -> None:
        """What it holds. Where no cgroup does it, the agent ends what holds more than it was given."""
        life = self._lives.get(ref)
        if life is None or not life.is_alive:
            return
        life.memory_held_bytes = held_bytes
        is_over = not is_enforced and 0 < life.held.memory_bytes < held_bytes
        life.over_count = life.over_count + 1 if is_over else 0
        if life.over_count >= OVER_COUNT and life.killed_for is None and life.outcome is None:
            mib = node_model.MIB
            why = f"out of memory: it held {held_bytes // mib} MiB of {life.held.memory_bytes // mib}"
            self._kill(now, life, EndCause.OOM_KILLED, why)

    # Time

    def tick(self, now: float, wall: float) -> None:
        """Do what is due."""
        for life in list(self._lives.values()):
            if not life.is_alive or life.outcome is not None:
                continue
            ladder = life.ladder
            if ladder is not None and ladder.until is not None and now >= ladder.until:
                self._step(now, wall, life)
            fence_at = life.fence_at
            if fence_at is not None and now >= fence_at and life.killed_for is None:
                why = f"it ran for longer than {life.max_run_seconds:g} s, and its shim did not end it"
                self._kill(now, life, EndCause.TIMED_OUT, why)
            elif life.kill_again_at is not None and now >= life.kill_again_at:
                self._kill(now, life, life.killed_for or EndCause.FAILED, life.why)
        for ref, at in self._tell_again_at.items():
            if now >= at:
                self._tell(ref)
                self._tell_again_at[ref] = now + TELL_AGAIN_SECONDS

    def next_deadline(self) -> float:
        """When `tick` has something to do."""
        times = list(self._tell_again_at.values())
        for life in self._lives.values():
            if not life.is_alive or life.outcome is not None:
                continue
            until = None if life.ladder is None else life.ladder.until
            fence_at = life.fence_at if life.killed_for is None else None
            times += [at for at in (until, fence_at, life.kill_again_at) if at is not None]
        return min(times, default=math.inf)

    # Out

    def take_effects(self) -> list[job_effects.Effect]:
        """What is to be done, in order; each is given once."""
        taken, self._effects = self._effects, []
        return taken

    def inventory(self) -> list[model.Report]:
        """Every attempt that is known: first thing on a stream. What changed so far is told by it."""
        self._changed.clear()
        return [life.report for life in self._lives.values()]

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell the leader."""
        return bool(self._changed)

    def take_changed(self, most: int) -> list[model.Report]:
        """Attempts that changed since they were told, the oldest change first."""
        taken = list(self._changed)[:most]
        for ref in taken:
            del self._changed[ref]
        return [self._lives[ref].report for ref in taken]

    def get(self, ref: model.AttemptRef) -> AttemptLife | None:
        """One attempt; None if it is not known, or was forgotten."""
        return self._lives.get(ref)

    def lives(self) -> Iterable[AttemptLife]:
        """Every attempt that is known."""
        return self._lives.values()

    @property
    def alive_count(self) -> int:
        """Attempts of which a process runs, or may."""
        return sum(life.is_alive for life in self._lives.values())

    @property
    def promised_bytes(self) -> int:
        """Memory that jobs were given and do not hold yet."""
        return sum(life.promised_bytes for life in self._lives.values())

    # Inside

    def _step(self, now: float, wall: float, life: AttemptLife) -> None:
        """Begin the stop contract, or go on to its next step; of one that has not started, wait for that."""
        if life.started_at is None:
            return
        if life.ladder is None:
            life.ladder = stopping.Ladder(life.stop, 0)
            if life.phase is not AttemptPhase.STOPPING:
                life.phase = AttemptPhase.STOPPING
                self._tell(life.ref)
        elif not life.ladder.is_at_kill:
            life.ladder.step += 1
        self._send(now, wall, life)

    def _send(self, now: float, wall: float, life: AttemptLife) -> None:
        ladder = life.ladder
        assert ladder is not None
        why = life.asked_for or EndCause.CANCELLED
        if life.signalled_seconds is None:
            life.signalled_seconds = wall
        ladder.begin(now)
        if ladder.is_at_kill:
            self._note("job_killed", life.ref, why=why.value)
            self._effects.append(job_effects.Kill(life.ref, why))
            return
        step = ladder.contract.steps[ladder.step]
        self._note("job_stopping", life.ref, signal=step.signal, wait_seconds=step.wait_seconds, why=why.value)
        assert ladder.until is not None
        self._effects.append(
            job_effects.SendSignal(
                life.ref, step.signal, step.scope, ladder.step, ladder.until, ladder.contract, why
            )
        )

    def _kill(self, now: float, life: AttemptLife, cause: EndCause, why: str) -> None:
        life.killed_for, life.why = cause, why
        life.kill_again_at = now + stopping.KILL_AGAIN_SECONDS
        self._note("job_killed", life.ref, why=why or cause.value)
        self._effects.append(job_effects.Kill(life.ref, cause))

    def _end(self, ref: model.AttemptRef, end_time_seconds: float, outcome: model.Outcome) -> None:
        life = self._lives[ref]
        life.is_alive, life.outcome, life.end_time_seconds = False, outcome, end_time_seconds
        life.memory_held_bytes = 0
        self._note("job_ended", ref, cause=outcome.cause.value, detail=outcome.detail)
        report = model.Report(
            ref=ref,
            phase=AttemptPhase.ENDED,
            outcome=outcome,
            start_time_seconds=life.start_time_seconds,
            end_time_seconds=end_time_seconds,
        )
        self._effects.append(job_effects.KeepEnd(report))

    def _tell(self, ref: model.AttemptRef) -> None:
        self._changed[ref] = None

    def _note(self, event: str, ref: model.AttemptRef, **fields: str | int | float) -> None:
        self._effects.append(job_effects.Note(event, {"job_id": ref.job_id, "attempt": ref.attempt, **fields}))
