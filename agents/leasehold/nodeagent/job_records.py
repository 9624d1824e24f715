"""What is kept of jobs' attempts in the agent's state folder.

::

    STATE/jobs/attempts/UUID/   an attempt that was begun: a worker's folder (`worker_folder`); the UUID follows
                                from job and attempt, so that no attempt can be begun twice
               ends/NAME.json   how an attempt ended, or that it never starts, until the leader has committed it
    STATE/logs/NAME.log         what it wrote; NAME is `job-JOBID-ATTEMPT`
"""

import dataclasses
import uuid
from pathlib import Path
from typing import Any

from leasehold.core import errors
from leasehold.core.job import model
from leasehold.nodeagent import records, state
from leasehold.observe import logs

END = records.Format("job-end", 1)

_SPACE = uuid.UUID("6a1f3f5e-7d1b-4b8e-9a55-0f6f2c1d8e47")
_log = logs.get_logger(__name__)


def worker_id(ref: model.AttemptRef) -> str:
    """The id of the one life that an attempt may have."""
    return str(uuid.uuid5(_SPACE, f"{ref.job_id}/{ref.attempt}"))


class JobFolder(state.StateFolder):
    """The part of an agent's state folder that is of jobs; the folder itself is opened and locked before."""

    def __init__(self, whole: state.StateFolder) -> None:
        super().__init__(whole.path)

    @property
    def workers(self) -> Path:
        """Folder of the attempts' folders."""
        return self.path / "jobs" / "attempts"

    @property
    def ends(self) -> Path:
        """Folder of the ends that nobody took yet."""
        return self.path / "jobs" / "ends"

    def open(self) -> None:
        """Create what is missing. Raises as `records.told` does."""
        with records.told(f"{self.path / 'jobs'} cannot be made"):
            for folder in (self.workers, self.ends):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            records.sync_folder(self.path)
            records.sync_folder(self.path / "jobs")

    def write_end(self, report: model.Report) -> None:
        """Keep an end; it is on disk when this returns. Blocks: for a thread. Raises as `records.told` does."""
        END.write(self._end(report.ref), _encoded(report))

    def read_ends(self) -> list[model.Report]:
        """Every end that is kept. One that cannot be read is set aside, and its attempt judged anew."""
        found = []
        for path in sorted(self.ends.glob("job-*.json")):
            try:
                document = END.read(path)
                if document is not None:
                    found.append(_decoded(document))
            except records.Damaged as damage:
                moved = self.set_aside(path)
                _log.error("job_end_quarantined", path=str(moved), why=str(damage))
        return found

    def remove_end(self, ref: model.AttemptRef) -> None:
        """The leader has it. One that cannot be removed is told again, which changes nothing."""
        try:
            self._end(ref).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("job_end_not_removed", job_id=ref.job_id, attempt=ref.attempt, why=error.strerror)

    def _end(self, ref: model.AttemptRef) -> Path:
        return self.ends / f"{ref.log_name}.json"


def _encoded(report: model.Report) -> dict[str, Any]:
    assert report.outcome is not None
    return {
        "job_id": report.ref.job_id,
        "attempt": report.ref.attempt,
        "outcome": {**dataclasses.asdict(report.outcome), "cause": report.outcome.cause.value},
        "start_time_seconds": report.start_time_seconds,
        "end_time_seconds": report.end_time_seconds,
    }


def _decoded(document: dict[str, Any]) -> model.Report:
    try:
        told = document["outcome"]
        outcome = model.Outcome(
            cause=model.EndCause(told["cause"]),
            exit_code=None if told["exit_code"] is None else int(told["exit_code"]),
            signal=int(told["signal"]),
            detail=str(told["detail"]),
        )
        start, end = document["start_time_seconds"], document["end_time_seconds"]
        return model.Report(
            ref=model.AttemptRef(model.checked_job_id(document["job_id"]), int(document["attempt"])),
            phase=model.AttemptPhase.ENDED,
            outcome=outcome,
            start_time_seconds=None if start is None else float(start),
            end_time_seconds=None if end is None else float(end),
        )
    except (KeyError, TypeError, ValueError, OverflowError, errors.InvalidArgument) as error:
        raise records.Damaged(f"{error!r} in {sorted(document)}") from error
