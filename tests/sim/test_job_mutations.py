"""Each rule of jobs that the leader's machine keeps is broken once, on purpose, and long walks must go red.

`RULES` lists them; the same walks are green with the rules in force (`test_job_machine_stateful.py`). What
Postgres and agents keep by themselves (the fence of batches, the counter's check, one start an attempt) is
broken by real ones in the integration tests.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import job_walks
import pytest
from leasehold.core import errors
from leasehold.core.job import (
    attempts,
    changes,
    commits,
    effects,
    execution,
    holders,
    machine,
    mirror,
    model,
    nodes,
    reclaim,
    requests,
)
from leasehold.core.job import outbox as outboxes
from leasehold.core.placement import model as placement
from leasehold.core.placement import scheduler

Break = Callable[[pytest.MonkeyPatch], None]

WALKS = 120


@dataclasses.dataclass(frozen=True)
class Rule:
    name: str
    breaks: Break
    #: What must happen more, or less, often than usually for the rule to matter soon.
    weights: dict[str, int] = dataclasses.field(default_factory=dict)


# Who holds what, and when it is free again


def _silence_releases(patch: pytest.MonkeyPatch) -> None:
    def silent(self: execution.Execution, node: nodes.NodeLife) -> None:
        for attempt in self._on(node):
            self.conclude(attempt, model.Outcome(cause=model.EndCause.NODE_LOST))

    patch.setattr(execution.Execution, "_silent", silent)


def _absence_releases(patch: pytest.MonkeyPatch) -> None:
    def absent(self: execution.Execution, node: nodes.NodeLife, attempt: attempts.Attempt) -> None:
        self.conclude(attempt, model.Outcome(cause=model.EndCause.NOT_STARTED))

    patch.setattr(execution.Execution, "_absent", absent)


def _any_folder_is_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(execution.Execution, "_is_of_another_folder", lambda *_: False)


def _a_new_agent_is_a_new_boot(patch: pytest.MonkeyPatch) -> None:
    def is_orphan(self: execution.Execution, node: nodes.NodeLife, attempt: attempts.Attempt) -> bool:
        return node.facts is not None and attempt.boot_key != nodes.boot_key(node.facts) and attempt.end is None

    patch.setattr(execution.Execution, "_is_orphan", is_orphan)


def _a_new_boot_proves_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(execution.Execution, "_is_orphan", lambda *_: False)


def _fences_have_no_grace(patch: pytest.MonkeyPatch) -> None:
    plain = attempts.Attempt.fenced_at
    patch.setattr(attempts.Attempt, "fenced_at", lambda self, grace, drift: plain(self, 0.0 * grace, drift))


def _all_are_fenced(patch: pytest.MonkeyPatch) -> None:
    """As if every job allowed a second run beside the first, and had a longest run of no length."""
    patch.setattr(attempts.Attempt, "fenced_at", lambda self, grace, drift: 0.0 if self.spec.template else 1e9)


def _holders_have_no_time_to_stop(patch: pytest.MonkeyPatch) -> None:
    plain = holders.Holders.__init__

    def init(self: holders.Holders, *, ttl_seconds: float, overrun_seconds: float) -> None:
        plain(self, ttl_seconds=ttl_seconds, overrun_seconds=0.0 * overrun_seconds)

    patch.setattr(holders.Holders, "__init__", init)


def _late_renewals_are_taken(patch: pytest.MonkeyPatch) -> None:
    def renew(self: reclaim.Reclaim, now: float, ref: model.AttemptRef) -> None:
        if self._mirror.live(ref) is None:
            raise errors.AllocationLapsed("it is over")
        self.holders.renew(now, ref)

    patch.setattr(reclaim.Reclaim, "renew", renew)


def _a_new_leader_gives_no_time(patch: pytest.MonkeyPatch) -> None:
    plain = reclaim.Reclaim.loaded

    def loaded(self: reclaim.Reclaim, now: float) -> None:
        plain(self, now - self.holders.ttl_seconds - 31.0)

    patch.setattr(reclaim.Reclaim, "loaded", loaded)
    patch.setattr(reclaim.Reclaim, "restore", lambda self, now, **_: setattr(self, "_from", now))


def _any_attempts_word_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mirror.Mirror, "live", lambda self, ref: self.attempts.get(ref.job_id))


# States


def _attempts_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits._plan

    def plan(self: commits.Commits, now: float, room: int, cancelled: set[str]) -> list[changes.Allocate]:
        return [
            dataclasses.replace(each, ref=model.AttemptRef(each.ref.job_id, 1))
            for each in plain(self, now, room, cancelled)
        ]

    patch.setattr(commits.Commits, "_plan", plan)


def _a_wish_to_cancel_outweighs_the_end(patch: pytest.MonkeyPatch) -> None:
    plain = attempts.judge

    def judge(job: model.JobRecord, outcome: model.Outcome) -> attempts.Judgement:
        if job.is_cancel_requested:
            return attempts.Judgement(model.JobState.CANCELLED, is_failure=False)
        return plain(job, outcome)

    patch.setattr(attempts, "judge", judge)


def _never_is_after_proof(patch: pytest.MonkeyPatch) -> None:
    plain = attempts._judge_lost

    def judge(job: model.JobRecord, outcome: model.Outcome) -> attempts.Judgement:
        spec = dataclasses.replace(job.spec, on_lost=model.OnLost.AFTER_PROOF)
        return plain(dataclasses.replace(job, spec=spec), outcome)

    patch.setattr(attempts, "_judge_lost", judge)


def _ends_are_forgotten_when_they_are_heard(patch: pytest.MonkeyPatch) -> None:
    plain = execution.Execution.reported

    def reported(self: execution.Execution, now: float, name: str, report: model.Report) -> None:
        plain(self, now, name, report)
        if report.outcome is not None:
            self._out.append(effects.Forget(name, report.ref))

    patch.setattr(execution.Execution, "reported", reported)


def _cancelled_jobs_are_placed(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits._plan

    def plan(self: commits.Commits, now: float, room: int, cancelled: set[str]) -> list[changes.Allocate]:
        return plain(self, now, room, set())

    patch.setattr(commits.Commits, "_plan", plan)


# Commits


def _told_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits.take

    def take(self: commits.Commits, now: float, wall: float) -> changes.Batch | None:
        batch = plain(self, now, wall)
        for each in batch.allocations if batch is not None else ():
            spec = self._mirror.jobs[each.ref.job_id].spec
            if spec.template:
                self._out.append(effects.Assign(each.node, each.ref, spec, each.held))
        return batch

    patch.setattr(commits.Commits, "take", take)


def _answered_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    plain = machine.JobMachine.submit

    def submit(self: machine.JobMachine, *arguments: Any, **named: Any) -> int:
        ticket = plain(self, *arguments, **named)
        for asked in self.outbox.submissions:
            if ticket in asked.tickets:
                asked.tickets.remove(ticket)
                self._effects.append(effects.Answer(ticket, asked.verdicts))
        return ticket

    patch.setattr(machine.JobMachine, "submit", submit)


def _what_was_lost_is_not_looked_up(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits.reloaded

    def reloaded(self: commits.Commits, *arguments: Any, was_committed: bool) -> None:
        plain(self, *arguments, was_committed=was_committed and False)

    patch.setattr(commits.Commits, "reloaded", reloaded)


def _a_lost_batch_counts_as_committed(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits.reloaded

    def reloaded(self: commits.Commits, *arguments: Any, was_committed: bool) -> None:
        plain(self, *arguments, was_committed=was_committed or True)

    patch.setattr(commits.Commits, "reloaded", reloaded)


def _kept_answers_are_not_replayed(patch: pytest.MonkeyPatch) -> None:
    def answer(
        self: commits.Commits, now: float, asked: outboxes.Submission, key: changes.RequestKey, kept: object
    ) -> None:
        self._answer_submission(now, asked, {})

    patch.setattr(commits.Commits, "_answer_kept", answer)


def _payloads_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    plain = commits.Commits._answer_kept

    def answer(
        self: commits.Commits,
        now: float,
        asked: outboxes.Submission,
        key: changes.RequestKey,
        kept: changes.KeepAnswer,
    ) -> None:
        asked.payload_sha256 = kept.payload_sha256
        plain(self, now, asked, key, kept)

    patch.setattr(commits.Commits, "_answer_kept", answer)


# What there is


def _capacity_counts_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    def placed(self: nodes.NodeLife) -> placement.Node:
        found = plain(self)
        if self.facts is None:
            return found
        return dataclasses.replace(
            found, total=self.facts.declared, openness=self.facts.openness, templates=self.facts.templates
        )

    plain = nodes.NodeLife.placed
    patch.setattr(nodes.NodeLife, "placed", placed)


def _what_has_ended_is_free_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    plain = execution.Execution.conclude

    def conclude(
        self: execution.Execution, attempt: attempts.Attempt, outcome: model.Outcome, **named: Any
    ) -> None:
        if attempt.end is None:
            node = self._mirror.nodes[attempt.node]
            node.used = node.used.minus(attempt.held)
            self._mirror.put_node(node.name)
            node.used = node.used.plus(attempt.held)
        plain(self, attempt, outcome, **named)

    patch.setattr(execution.Execution, "conclude", conclude)


def _running_jobs_take_no_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler.Scheduler, "started", lambda self, running: None)
    patch.setattr(scheduler.Scheduler, "ended", lambda self, job_id: None)


def _quotas_are_planned_with_while_they_change(patch: pytest.MonkeyPatch) -> None:
    class Unseen(list[outboxes.QueueWish]):
        def __bool__(self) -> bool:
            return False

    plain = outboxes.Outbox.take_queues
    patch.setattr(outboxes.Outbox, "take_queues", lambda self, room: Unseen(plain(self, room)))


def _queues_with_jobs_are_deleted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests, "check_deletable", lambda mirror, asked, name: None)


def _batches_have_no_bound(patch: pytest.MonkeyPatch) -> None:
    def take(self: outboxes.Outbox, room: int) -> Sequence[outboxes.Submission]:
        taken = list(self.submissions) * 2
        self.submissions.clear()
        return taken

    patch.setattr(outboxes.Outbox, "take_submissions", take)


#: Much runs, nobody hears of an end, and folders are lost.
_LOST_FOLDERS = {
    "the_state_folder_is_lost": 3, "cancel": 15, "connect": 15, "end": 0, "stop": 1, "disconnect": 0,
    "reboot": 0, "start": 25, "time_passes": 2, "all_goes_well": 10, "acquire": 2,
}  # fmt: skip
#: What runs is heard to have started, and its node falls silent.
_SILENCE = {
    "disconnect": 10, "connect": 6, "end": 1, "start": 25, "the_leader_hears": 30, "time_passes": 10,
    "acquire": 2, "cancel": 1, "another_leader": 0, "reboot": 0,
}  # fmt: skip
_HOLDERS = {"acquire": 20, "another_leader": 5, "release": 0, "flush_at_once": 20, "time_passes": 8}

RULES = [
    Rule("silence releases nothing", _silence_releases),
    Rule("absence from an inventory releases nothing", _absence_releases, _LOST_FOLDERS),
    Rule("an agent with another state folder is not believed", _any_folder_is_believed, _LOST_FOLDERS),
    Rule("a new agent is no new boot", _a_new_agent_is_a_new_boot, _LOST_FOLDERS),
    Rule("a new boot proves the end of what ran before", _a_new_boot_proves_nothing),
    Rule("a fence waits for the kill grace", _fences_have_no_grace, _SILENCE),
    Rule("only after_fence jobs are fenced", _all_are_fenced),
    Rule(
        "holders have time to stop",
        _holders_have_no_time_to_stop,
        {"acquire": 20, "renew": 2, "release": 0, "flush_at_once": 30, "time_passes": 20},
    ),
    Rule("late renewals are refused", _late_renewals_are_taken, _HOLDERS),
    Rule("a new leader starts every TTL again", _a_new_leader_gives_no_time, _HOLDERS),
    Rule(
        "only the live attempt's word counts",
        _any_attempts_word_counts,
        {"the_agent_tells_again": 20, "all_goes_well": 10, "acquire": 1, "reboot": 0, "time_passes": 10},
    ),
    Rule("each retry is another attempt", _attempts_are_not_counted),
    Rule("an exit before the signal keeps its result", _a_wish_to_cancel_outweighs_the_end),
    Rule("what must never repeat is not repeated", _never_is_after_proof),
    Rule("exit records stay until the commit", _ends_are_forgotten_when_they_are_heard),
    Rule("what is being cancelled is not placed", _cancelled_jobs_are_placed),
    Rule("nothing is dispatched before its commit", _told_before_the_commit),
    Rule("nothing is answered before its commit", _answered_before_the_commit),
    Rule("a lost batch is looked up", _what_was_lost_is_not_looked_up),
    Rule("a lost batch may not be committed", _a_lost_batch_counts_as_committed),
    Rule("a repeat is told the first answer", _kept_answers_are_not_replayed),
    Rule("a key with another payload is refused", _payloads_are_not_compared),
    Rule("capacity counts once it is committed", _capacity_counts_before_its_commit),
    Rule("room is free once its release is committed", _what_has_ended_is_free_before_its_commit),
    Rule("what runs takes room", _running_jobs_take_no_room),
    Rule(
        "a quota that changes is not planned with",
        _quotas_are_planned_with_while_they_change,
        {"put_queue": 12},
    ),
    Rule("a queue with jobs stays", _queues_with_jobs_are_deleted),
    Rule("a job is in one batch", _batches_have_no_bound),
]


def _first_violation(rule: Rule) -> str | None:
    for seed in range(WALKS):
        try:
            job_walks.walk(seed, **rule.weights)
        except Exception as error:  # a machine that breaks down is noticed too
            return f"seed {seed}: {error!r}"
    return None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name.replace(" ", "-"))
def test_breaking_the_rule_is_noticed(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    rule.breaks(monkeypatch)
    seen = _first_violation(rule)
    assert seen is not None, f"nobody noticed that this rule was broken: {rule.name}"
