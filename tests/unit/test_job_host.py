"""What a host declares for jobs, and what is kept of them: read strictly, bounded."""

import os
import uuid
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.node import job_life
from leasehold.core.placement import model as placement
from leasehold.nodeagent import config, job_logs, job_records, job_templates, state

REF = model.AttemptRef(str(uuid.UUID(int=9)), 3)
TEMPLATES = """
job_templates:
  encode:
    parameters:
      input_file: {pattern: '/data/[a-z]+'}
      options: {pattern: '-[a-z]+', default: '', is_list: true}
    argv: [ffmpeg, -threads, '{cpus}', '{options}', '{input_file}']
    cwd: /data
    env: {OF: '{job_id}/{attempt}'}
"""


def loaded(folder: Path, yaml: str) -> config.Config:
    path = folder / "agent.yaml"
    path.write_text(yaml)
    path.chmod(0o600)
    return config.load({"LEASEHOLD_AGENT_CONFIG": str(path), "LEASEHOLD_NODE": "here"}, {"HOME": "/h"}, folder)


def test_a_host_that_declares_nothing_gives_nothing(tmp_path: Path) -> None:
    found = loaded(tmp_path, TEMPLATES)

    assert (found.jobs.total, found.jobs.is_running_jobs) == (placement.Resources(0, 0), False)
    assert list(found.job_templates) == ["encode"]


def test_totals_are_read(tmp_path: Path) -> None:
    found = loaded(tmp_path, "jobs: {cpus: 8, memory_gb: 1.5}")

    assert found.jobs.total == placement.Resources(8, 3 * 2**29)
    assert found.jobs.is_running_jobs


@pytest.mark.parametrize(
    ("yaml", "field"),
    [
        ("jobs: {memory_gb: 1}", "jobs.cpus"),
        ("jobs: {cpus: 0, memory_gb: 1}", "jobs.cpus"),
        ("jobs: {cpus: 1.5, memory_gb: 1}", "jobs.cpus"),
        ("jobs: {cpus: 1}", "jobs.memory_gb"),
        ("jobs: {cpus: 1, memory_gb: -1}", "jobs.memory_gb"),
        ("jobs: {cpu: 1, cpus: 1, memory_gb: 1}", "jobs.cpu"),
        ("job_templates: {a: {argv: [x], depth: {kind: redis}}}", "job_templates.a.depth"),
        ("job_templates: {a: {argv: ['{worker}']}}", "job_templates.a.argv[0]"),
        (
            "job_templates: {a: {argv: [x], parameters: {cpus: {pattern: x}}}}",
            "job_templates.a.parameters.cpus",
        ),
        ("job_templates: {a: {}}", "job_templates.a.argv"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, yaml: str, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        loaded(tmp_path, yaml)

    assert refused.value.field == field


def assignment(**changes: str) -> job_life.Assignment:
    return job_life.Assignment(
        ref=REF, template="encode", parameters=changes, held=placement.Resources(2, 2**30), max_run_seconds=9.0
    )


def test_an_attempt_is_started_with_what_its_template_and_its_assignment_say(tmp_path: Path) -> None:
    known = loaded(tmp_path, TEMPLATES).job_templates
    given = assignment(input_file="/data/film", options="-a -b")

    spec = job_templates.start_spec(
        given,
        job_templates.command(given, known),
        worker_id=job_records.worker_id(REF),
        node="here",
        log_path=tmp_path / "log",
        base={"PATH": "/bin", "LEASEHOLD_STATE_DIR": "/s"},
    )

    assert spec.argv == ("ffmpeg", "-threads", "2", "-a", "-b", "/data/film")
    assert dict(spec.env) == {
        "PATH": "/bin",
        "OF": f"{REF.job_id}/3",
        "LEASEHOLD_JOB_ID": REF.job_id,
        "LEASEHOLD_JOB_ATTEMPT": "3",
        "LEASEHOLD_JOB_CPUS": "2",
        "LEASEHOLD_JOB_MEMORY_BYTES": str(2**30),
    }
    assert (spec.name, spec.cwd, spec.limit_bytes, spec.cpus) == (
        REF.log_name,
        Path("/data"),
        2**30,
        2,
    )
    assert (spec.max_run_seconds, spec.kill_grace_seconds) == (9.0, model.KILL_GRACE_SECONDS)


@pytest.mark.parametrize(
    "given", [{}, {"input_file": "/etc/passwd"}, {"input_file": "/data/a", "other": "x"}, {"options": "a"}]
)
def test_parameters_are_checked(tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidArgument):
        job_templates.command(assignment(**given), loaded(tmp_path, TEMPLATES).job_templates)


def test_a_template_that_a_host_has_not_is_told_apart_from_wrong_parameters(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="no job template 'encode'; it has none"):
        job_templates.command(assignment(input_file="/data/a"), {})


def folder(tmp_path: Path) -> job_records.JobFolder:
    whole = state.StateFolder(tmp_path / "state")
    whole.open()
    found = job_records.JobFolder(whole)
    found.open()
    whole.close()
    return found


def test_an_end_is_read_as_it_was_written_until_it_is_removed(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    report = model.Report(
        ref=REF,
        phase=model.AttemptPhase.ENDED,
        outcome=model.Outcome(cause=model.EndCause.FAILED, exit_code=None, signal=9, detail='a "line"'),
        start_time_seconds=None,
        end_time_seconds=12.5,
    )
    kept.write_end(report)
    assert kept.read_ends() == [report]

    kept.remove_end(REF)
    kept.remove_end(REF)

    assert kept.read_ends() == []


def test_an_end_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    (kept.ends / f"{REF.log_name}.json").write_text('{"version": 1, "job_id": 4}')

    assert kept.read_ends() == []
    assert len(list(kept.quarantine.iterdir())) == 1
    assert list(kept.ends.iterdir()) == []


def test_each_attempt_has_one_life(tmp_path: Path) -> None:
    other = model.AttemptRef(REF.job_id, 4)

    assert job_records.worker_id(REF) == job_records.worker_id(model.AttemptRef(*REF))
    assert job_records.worker_id(REF) != job_records.worker_id(other)


def write(path: Path, age_seconds: float) -> None:
    path.write_text("x")
    now = path.stat().st_mtime
    os.utime(path, (now, now - age_seconds))


def test_logs_are_removed_after_a_while_and_only_those_of_jobs_that_are_over(tmp_path: Path) -> None:
    names = [model.AttemptRef(REF.job_id, attempt).log_name for attempt in range(1, 6)]
    ages = [5000.0, 5000.0, 100.0, 90.0, 80.0]
    for name, age in zip(names, ages, strict=True):
        write(tmp_path / f"{name}.log", age)
    write(tmp_path / f"{names[0]}.log.json", 6000.0)
    write(tmp_path / f"{names[0]}.log.000001", 7000.0)
    write(tmp_path / "pool_1@here.log", 9000.0)

    removed = job_logs.remove_old(tmp_path, {names[1]}, 1000.0, logs_max=2)

    assert removed == [names[2], names[0]]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{names[1]}.log", f"{names[3]}.log", f"{names[4]}.log", "pool_1@here.log"}
