"""A reign over jobs in scenes that tests set by hand: what is asked, what agents say, what is committed."""

import itertools
from typing import Any

import job_world
import pytest
from leasehold.core.job import changes, effects, invariants, machine, model
from leasehold.core.job.model import AttemptPhase, AttemptRef, EndCause, JobState
from leasehold.core.placement import model as placement

KEY = changes.RequestKey("someone", "r1")
#: A holder counts 30 s; the leader waits for so long.
WAIT_SECONDS = 30.0 * 1.001 + 30.0


class Reign:
    """A machine with a ledger that commits at once, and one node, `a`, of 4 CPUs."""

    def __init__(self, ledger: job_world.Ledger | None = None, *, numbers: int = 0) -> None:
        self.now = 1_000.0
        self.ledger = ledger or job_world.Ledger()
        self.ids = itertools.count(numbers + 1)
        self.done: list[effects.Effect] = []
        self.answers: dict[int, effects.Answer] = {}
        self.machine = machine.JobMachine(new_id=lambda: f"00000000-0000-0000-0000-{next(self.ids):012d}")
        self.machine.restore(self.now, self.now, self.ledger.snapshot())

    def connect(
        self, name: str = "a", *reports: model.Report, boot: int = 1, cpus: int = 4, **facts: Any
    ) -> None:
        seen: dict[str, Any] = {
            "name": name,
            "boot_id": f"boot-{boot}",
            "node_id": f"folder-of-{name}",
            "declared": placement.Resources(cpus, 100),
            "templates": frozenset({"work"}),
            **facts,
        }
        self.facts = effects.NodeFacts(**seen)
        self.machine.node_seen(self.now, self.facts)
        if self.facts.is_connected:
            self.machine.inventory(self.now, name, reports)
        self.flush()

    def reload(self, was_committed: bool = False) -> None:
        """Read the ledger anew."""
        loaded = self.machine.prepare(self.now, self.now, self.ledger.snapshot())
        self.machine.reloaded(self.now, loaded, was_committed)

    def flush(self) -> list[effects.Effect]:
        """Commit all that there is; what was to be done."""
        while True:
            self._take()
            batch = self.machine.take_batch(self.now, self.now)
            if batch is None:
                self._take()
                done, self.done = self.done, []
                return done
            self.machine.batch_done(self.now, self.now, self.ledger.commit(batch, self.now))
            invariants.check(self.machine)

    def _take(self) -> None:
        for effect in self.machine.take_effects():
            if isinstance(effect, effects.Answer):
                assert effect.ticket not in self.answers
                self.answers[effect.ticket] = effect
            self.done.append(effect)

    def submit(
        self, *specs: model.JobSpec, key: changes.RequestKey | None = None, sha: bytes = b"1", **how: Any
    ) -> int:
        how = {"is_all_or_none": False, **how}
        return self.machine.submit(
            self.now, self.now, specs, principal="someone", key=key, payload_sha256=sha, **how
        )

    def acquire(self, *, request: str = "r1", cpus: int = 1, wait: float = 5.0) -> int:
        return self.machine.acquire(
            self.now,
            self.now,
            model.JobSpec(required=placement.Resources(cpus, 1)),
            principal="someone",
            key=changes.RequestKey("someone", request),
            payload_sha256=b"1",
            wait_seconds=wait,
        )

    def holder(self, request: str = "r1") -> AttemptRef:
        ticket = self.acquire(request=request)
        self.flush()
        ref: AttemptRef = self.answers[ticket].value.allocation.ref
        return ref

    def run(self, **spec: Any) -> AttemptRef:
        """A job that its agent has started."""
        self.submit(job(**spec))
        self.flush()
        ref = list(self.machine.mirror.attempts.values())[-1].ref
        self.tell(ref, AttemptPhase.STARTED)
        return ref

    def tell(self, ref: AttemptRef, phase: AttemptPhase, cause: EndCause | None = None) -> None:
        outcome = None if cause is None else model.Outcome(cause=cause)
        self.machine.attempt_reported(self.now, "a", model.Report(ref=ref, phase=phase, outcome=outcome))

    def end(self, ref: AttemptRef, cause: EndCause) -> JobState:
        self.tell(ref, AttemptPhase.ENDED, cause)
        self.flush()
        return self.state(ref)

    def state(self, ref: AttemptRef) -> JobState:
        return self.ledger.jobs[ref.job_id].state

    def until(self, at: float) -> list[effects.Effect]:
        """Let time pass, ticking whenever that is due."""
        while (due := max(self.now, self.machine.next_deadline())) <= at and due > self.now:
            self.now = due
            self.machine.tick(due, due)
            self._take()
        self.now = at
        self.machine.tick(at, at)
        return self.flush()


def job(cpus: int = 1, **spec: Any) -> model.JobSpec:
    return model.JobSpec(**{"required": placement.Resources(cpus, 1), "template": "work", **spec})


def of(kind: type, done: list[effects.Effect]) -> list[Any]:
    return [effect for effect in done if isinstance(effect, kind)]


@pytest.fixture
def reign() -> Reign:
    made = Reign()
    made.connect()
    return made
