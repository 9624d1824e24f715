"""Attempts on a host, decided: started once, stopped by contract, judged truly, told until they are taken."""

import uuid

import pytest
from leasehold.core.job import model
from leasehold.core.job.model import AttemptPhase, EndCause
from leasehold.core.node import job_effects, job_life, job_machine, stopping, worker_records
from leasehold.core.node import model as node_model
from leasehold.core.node.model import ExitCause
from leasehold.core.placement import model as placement

REF = model.AttemptRef(str(uuid.UUID(int=7)), 1)
STOP = node_model.StopContract(
    steps=(
        node_model.StopStep(signal="TERM", wait_seconds=5.0),
        node_model.StopStep(signal="QUIT", wait_seconds=2.0),
    )
)
WALL = 1_000.0


def assignment(**changes: object) -> job_life.Assignment:
    values: dict[str, object] = {"ref": REF, "template": "t", "held": placement.Resources(2, 1000)}
    return job_life.Assignment(**{**values, **changes})  # type: ignore[arg-type]


def exited(cause: ExitCause, **changes: object) -> node_model.WorkerExit:
    return node_model.WorkerExit(cause=cause, end_time_seconds=WALL + 50.0, **changes)  # type: ignore[arg-type]


CLEAN = exited(ExitCause.CLEAN, exit_code=0, detail="exit code 0")


class Driven:
    """A machine, and what it wanted."""

    def __init__(self) -> None:
        self.machine = job_machine.JobMachine()

    def kinds(self) -> list[type]:
        return [type(each) for each in self.effects()]

    def effects(self) -> list[job_effects.Effect]:
        return [each for each in self.machine.take_effects() if not isinstance(each, job_effects.Note)]

    def run(self, **changes: object) -> None:
        assert self.machine.assign(assignment(**changes), STOP)
        self.machine.started(0.0, WALL, REF, 99)
        self.effects()

    def finish(self, told: node_model.WorkerExit, *, is_rebooted: bool = False) -> model.Outcome:
        self.machine.ended(WALL + 50.0, REF, told, is_rebooted=is_rebooted)
        self.machine.cleared(WALL + 50.0, REF)
        self.machine.end_kept(50.0, REF)
        self.effects()
        (report,) = self.machine.inventory()
        assert report.phase is AttemptPhase.ENDED and report.outcome is not None
        return report.outcome


@pytest.fixture
def driven() -> Driven:
    return Driven()


def test_an_attempt_is_started_once_also_when_it_is_over_and_forgotten(driven: Driven) -> None:
    assert driven.machine.assign(assignment(), STOP)
    assert driven.kinds() == [job_effects.Start]
    assert not driven.machine.assign(assignment(), STOP)
    driven.finish(CLEAN)
    assert not driven.machine.assign(assignment(), STOP)
    driven.machine.forget(REF)
    assert driven.kinds() == [job_effects.Forget]

    assert not driven.machine.assign(assignment(), STOP)
    assert driven.effects() == [] and driven.machine.inventory() == []


def test_an_end_is_told_only_once_nothing_is_left_of_it_and_it_is_on_disk(driven: Driven) -> None:
    driven.run()
    driven.machine.inventory()
    driven.machine.ended(WALL + 1, REF, CLEAN)
    assert driven.kinds() == [job_effects.Clear]
    assert driven.machine.alive_count == 1 and not driven.machine.has_news
    driven.machine.forget(REF)
    driven.machine.cleared(WALL + 2, REF)
    assert driven.kinds() == [job_effects.KeepEnd]
    assert not driven.machine.has_news
    assert [each.phase for each in driven.machine.inventory()] == [AttemptPhase.STARTED]

    driven.machine.end_kept(3.0, REF)

    (report,) = driven.machine.take_changed(10)
    assert (report.phase, report.outcome) == (
        AttemptPhase.ENDED,
        model.Outcome(cause=EndCause.SUCCEEDED, exit_code=0, detail="exit code 0"),
    )
    driven.machine.tick(3.0 + job_machine.TELL_AGAIN_SECONDS, WALL)
    assert driven.machine.take_changed(10) == [report]


def test_a_stop_of_what_was_never_heard_of_leaves_a_stone(driven: Driven) -> None:
    driven.machine.stop(0.0, WALL, REF)
    (keep,) = driven.effects()
    assert isinstance(keep, job_effects.KeepEnd)
    assert keep.report.outcome is not None and keep.report.outcome.cause is EndCause.NOT_STARTED

    assert not driven.machine.assign(assignment(), STOP)
    assert driven.effects() == []


def test_a_stop_goes_step_by_step_and_is_begun_once(driven: Driven) -> None:
    driven.run()
    driven.machine.stop(10.0, WALL + 10, REF)
    driven.machine.stop(11.0, WALL + 11, REF)
    (term,) = driven.effects()
    assert isinstance(term, job_effects.SendSignal)
    assert (term.signal, term.step, term.until_seconds) == ("TERM", 0, 15.0)
    driven.machine.tick(14.9, WALL)
    assert driven.effects() == []
    driven.machine.tick(driven.machine.next_deadline(), WALL)
    (quit_,) = driven.effects()
    assert isinstance(quit_, job_effects.SendSignal) and quit_.signal == "QUIT"
    driven.machine.tick(17.0, WALL)
    assert driven.effects() == [job_effects.Kill(REF, EndCause.CANCELLED)]
    driven.machine.tick(17.0 + stopping.KILL_AGAIN_SECONDS, WALL)
    assert driven.kinds() == [job_effects.Kill]

    assert driven.finish(exited(ExitCause.CRASHED, signal=9)).cause is EndCause.CANCELLED


def test_a_stop_before_the_start_waits_for_it(driven: Driven) -> None:
    driven.machine.assign(assignment(), STOP)
    driven.machine.stop(1.0, WALL, REF)
    assert driven.kinds() == [job_effects.Start]
    driven.machine.started(2.0, WALL, REF, 99)

    assert driven.kinds() == [job_effects.SendSignal]
    assert driven.finish(exited(ExitCause.CRASHED, signal=15)).cause is EndCause.CANCELLED


def test_an_exit_before_the_signal_keeps_its_result(driven: Driven) -> None:
    driven.run()
    driven.machine.stop(60.0, WALL + 60, REF)

    assert driven.finish(CLEAN).cause is EndCause.SUCCEEDED


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (CLEAN, EndCause.SUCCEEDED),
        (exited(ExitCause.CRASHED, exit_code=3), EndCause.FAILED),
        (exited(ExitCause.CRASHED, signal=9), EndCause.FAILED),
        (exited(ExitCause.UNKNOWN), EndCause.FAILED),
        (exited(ExitCause.OOM_KILLED, signal=9), EndCause.OOM_KILLED),
        (exited(ExitCause.CRASHED, exit_code=137, oom_kills=1), EndCause.OOM_KILLED),
        (exited(ExitCause.CLEAN, exit_code=0, oom_kills=1), EndCause.SUCCEEDED),
        (exited(ExitCause.NOT_STARTED), EndCause.NOT_STARTED),
        (exited(ExitCause.CLEAN, exit_code=0, is_timed_out=True), EndCause.TIMED_OUT),
        (exited(ExitCause.CRASHED, signal=15, is_timed_out=True), EndCause.TIMED_OUT),
    ],
)
def test_what_ends_by_itself_is_told_as_it_was(
    driven: Driven, told: node_model.WorkerExit, cause: EndCause
) -> None:
    driven.run()

    assert driven.finish(told).cause is cause


def test_a_reboot_is_not_the_jobs_fault_but_what_was_noted_before_it_counts(driven: Driven) -> None:
    driven.run()
    assert driven.finish(exited(ExitCause.UNKNOWN), is_rebooted=True).cause is EndCause.NODE_LOST

    other = Driven()
    other.run()
    assert other.finish(CLEAN, is_rebooted=True).cause is EndCause.SUCCEEDED


def test_what_holds_more_than_it_was_given_is_killed_where_no_cgroup_does_it(driven: Driven) -> None:
    driven.run()
    driven.machine.held(1.0, REF, 1001, is_enforced=True)
    driven.machine.held(2.0, REF, 1001, is_enforced=False)
    driven.machine.held(3.0, REF, 999, is_enforced=False)
    driven.machine.held(4.0, REF, 1001, is_enforced=False)
    assert driven.effects() == []
    driven.machine.held(5.0, REF, 1001, is_enforced=False)
    assert driven.effects() == [job_effects.Kill(REF, EndCause.OOM_KILLED)]

    outcome = driven.finish(exited(ExitCause.CRASHED, signal=9, detail="ended by SIGKILL"))
    assert outcome.cause is EndCause.OOM_KILLED
    assert outcome.detail.startswith("out of memory")


def test_memory_is_promised_until_it_is_held_or_the_attempt_is_over(driven: Driven) -> None:
    driven.machine.assign(assignment(), STOP)
    assert driven.machine.promised_bytes == 1000
    driven.machine.held(1.0, REF, 300, is_enforced=True)
    assert driven.machine.promised_bytes == 700
    driven.machine.held(2.0, REF, 1300, is_enforced=True)
    assert driven.machine.promised_bytes == 0
    driven.machine.held(3.0, REF, 0, is_enforced=True)

    driven.finish(CLEAN)

    assert driven.machine.promised_bytes == 0


def test_the_agent_ends_what_its_shim_should_have_ended(driven: Driven) -> None:
    driven.run(max_run_seconds=100.0)
    due = 100.0 + model.KILL_GRACE_SECONDS + model.FENCE_MARGIN_SECONDS
    assert driven.machine.next_deadline() == due
    driven.machine.tick(due, WALL)
    assert driven.effects() == [job_effects.Kill(REF, EndCause.TIMED_OUT)]

    assert driven.finish(exited(ExitCause.UNKNOWN)).cause is EndCause.TIMED_OUT


def test_the_next_agent_goes_on_with_a_stop_where_the_last_one_was(driven: Driven) -> None:
    life = job_life.AttemptLife(REF, started_at=-50.0, stop=STOP)
    progress = worker_records.StopProgress(contract=STOP, step=0, remaining_seconds=3.0, why="CANCELLED")
    driven.machine.adopt(0.0, WALL, life, progress)
    assert driven.effects() == []
    assert [each.phase for each in driven.machine.inventory()] == [AttemptPhase.STOPPING]
    driven.machine.stop(1.0, WALL, REF)
    assert driven.effects() == []
    driven.machine.tick(3.0, WALL)

    (quit_,) = driven.effects()
    assert isinstance(quit_, job_effects.SendSignal) and quit_.signal == "QUIT"
    assert driven.finish(exited(ExitCause.CRASHED, signal=3)).cause is EndCause.CANCELLED


def test_the_next_agent_knows_what_a_kill_was_for(driven: Driven) -> None:
    life = job_life.AttemptLife(REF, started_at=-50.0, stop=STOP)
    progress = worker_records.StopProgress(contract=STOP, step=2, remaining_seconds=0.0, why="OOM_KILLED")
    driven.machine.adopt(0.0, WALL, life, progress)
    driven.machine.tick(0.0, WALL)
    assert driven.effects() == [job_effects.Kill(REF, EndCause.OOM_KILLED)]

    assert driven.finish(exited(ExitCause.CRASHED, signal=9)).cause is EndCause.OOM_KILLED


def test_an_end_that_was_kept_is_not_overwritten_by_what_is_found_of_it(driven: Driven) -> None:
    kept = model.Report(
        ref=REF, phase=AttemptPhase.ENDED, outcome=model.Outcome(cause=EndCause.FAILED, exit_code=4)
    )
    driven.machine.restore_end(kept)
    driven.machine.adopt(0.0, WALL, job_life.AttemptLife(REF, stop=STOP))
    driven.machine.ended(WALL, REF, CLEAN)
    driven.machine.stop(0.0, WALL, REF)

    assert driven.effects() == []
    assert driven.machine.inventory() == [kept]


def test_names_lead_back_to_their_attempts() -> None:
    assert model.AttemptRef.of_log_name(REF.log_name) == REF
    assert node_model.checked_worker_name(REF.log_name) == REF.log_name
    assert model.AttemptRef.of_log_name("pool_1@here") is None
