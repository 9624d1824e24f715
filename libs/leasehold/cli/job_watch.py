"""Waiting for a job, and telling what happens to it: its place in line, what blocks it, start and end."""

import time
from collections.abc import Callable
from typing import Any

from leasehold.cli import job_tables, node_tables, output
from leasehold.core import errors
from leasehold.rpc import job_documents

EXIT_DONE, EXIT_FAILED, EXIT_NOT_PLACED = 0, 1, 2

#: Between two looks at a job in line; the first ones are closer.
LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.1, 2.0
#: Of the log, told where a job fails.
TAIL_LINES = 20

Tell = Callable[[str], None]


def exit_code(job: job_documents.Document) -> int:
    """0: completed; 2: it ended without a node; 1: it failed, or was cancelled while it ran."""
    if job["state"] == "completed":
        return EXIT_DONE
    return EXIT_NOT_PLACED if not job["attempt"] else EXIT_FAILED


class Watch:
    """One job, told with `tell` as it goes on. `place_seconds`: it is cancelled if it has no node by then."""

    def __init__(
        self,
        allocator: Any,
        job_id: str,
        *,
        tell: Tell,
        place_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        self._allocator = allocator
        self._job_id = job_id
        self._tell = tell
        self._begun = time.monotonic()
        self._place_seconds = place_seconds
        self._timeout_seconds = timeout_seconds
        self._told = ""

    def run(self) -> job_documents.Document:
        """The job once it has ended.

        Raises `NotPlaced` where it was cancelled for want of a node, `DeadlineExceeded` after the timeout.
        """
        job = self._pending(self._get())
        while not job_tables.is_terminal(job):
            self._say(self._running(job))
            job = self._pending(self._follow())
        self._end(job)
        return job

    def _get(self) -> job_documents.Document:
        from leasehold.api.job.v1 import job_service_pb2 as wire

        return job_documents.job(self._allocator.call("GetJob", wire.GetJobRequest(job_id=self._job_id)).job)

    def _pending(self, job: job_documents.Document) -> job_documents.Document:
        """The job once it is in line no more."""
        pause = LOOK_SECONDS_MIN
        while job["state"] == "pending":
            self._say(self._why(job))
            waited = time.monotonic() - self._begun
            if self._place_seconds is not None and waited >= self._place_seconds and not job["attempt"]:
                job = self._give_up()
                continue
            self._check_time("is still in line")
            bound = LOOK_SECONDS_MAX if self._place_seconds is None else self._place_seconds - waited
            time.sleep(max(min(pause, bound), LOOK_SECONDS_MIN))
            pause = min(pause * 1.5, LOOK_SECONDS_MAX)
            job = self._get()
        return job

    def _why(self, job: job_documents.Document) -> str:
        from leasehold.api.job.v1 import job_service_pb2 as wire

        try:
            answer = self._allocator.call("ExplainJob", wire.ExplainJobRequest(job_id=self._job_id))
        except errors.FailedPrecondition:  # it has just left the line
            return self._told
        text = job_tables.summary(job_documents.explanation(answer.explanation))
        if job["outcome"] is not None:
            text += f"; attempt {job['attempt']} ended: {job_tables.ending(job['outcome'])}"
        return text

    def _give_up(self) -> job_documents.Document:
        from leasehold.api.job.v1 import job_service_pb2 as wire

        answer = self._allocator.call("CancelJob", wire.CancelJobRequest(job_id=self._job_id))
        job = job_documents.job(answer.job)
        if job["state"] == "cancelled":
            raise errors.NotPlaced(
                f"job {self._job_id} had no node within {self._place_seconds:g} s, and is cancelled: "
                f"{self._told}"
            )
        return job  # it was placed in the last moment; it ends by its stop contract

    def _running(self, job: job_documents.Document) -> str:
        allocation = job["allocation"]
        if allocation is None:
            return str(job["state"])
        has = f"{allocation['cpus']} CPUs, {job_tables.memory(allocation['memory_bytes'])}"
        attempt = "" if job["attempt"] == 1 else f", attempt {job['attempt']}"
        extra = "; its node is silent" if allocation["phase"] == "unknown" else ""
        extra += "; cancel requested" if job["is_cancel_requested"] else ""
        return f"running on {allocation['node']} ({has}{attempt}){extra}"

    def _follow(self) -> job_documents.Document:
        """The job once it runs no more; until its timeout by looking, without one by a stream."""
        from leasehold.api.job.v1 import job_service_pb2 as wire

        if self._timeout_seconds is not None:
            return self._look()
        messages = self._allocator.follow("WatchJob", wire.WatchJobRequest(job_id=self._job_id))
        try:
            for message in messages:
                job = job_documents.job(message.job)
                if job["state"] != "running":
                    return job
                self._say(self._running(job))
        finally:
            messages.close()
        return self._get()

    def _look(self) -> job_documents.Document:
        pause = LOOK_SECONDS_MIN
        while (job := self._get())["state"] == "running":
            self._say(self._running(job))
            self._check_time("is still running")
            time.sleep(pause)
            pause = min(pause * 1.5, LOOK_SECONDS_MAX)
        return job

    def _check_time(self, how: str) -> None:
        waited = time.monotonic() - self._begun
        if self._timeout_seconds is not None and waited >= self._timeout_seconds:
            raise errors.DeadlineExceeded(f"job {self._job_id} {how} after {self._timeout_seconds:g} s")

    def _say(self, text: str) -> None:
        if text and text != self._told:
            self._told = text
            self._tell(f"{self._job_id} {text}")

    def _end(self, job: job_documents.Document) -> None:
        how = job["state"]
        if job["outcome"] is not None and how != "completed":
            how += f": {job_tables.ending(job['outcome'])}"
        self._say(f"{how} after {node_tables.duration(time.monotonic() - self._begun)}")
        # What its host refused has not run, and wrote nothing.
        is_refused = job["outcome"] is not None and job["outcome"]["cause"] == "refused"
        if job["state"] == "failed" and job["spec"]["template"] and not is_refused:
            self._tail()

    def _tail(self) -> None:
        """The end of its log, on standard error; why there is none, where there is none."""
        try:
            for data in log(self._allocator, self._job_id, lines=TAIL_LINES, is_following=False):
                for line in data.decode("utf-8", "replace").splitlines():
                    output.say(f"  | {output.printable(line)}")
        except errors.LeaseholdError as error:
            output.say(f"  (its log cannot be read: {error.message})")


def log(allocator: Any, job_id: str, *, lines: int, is_following: bool, attempt: int = 0) -> Any:
    """Pieces of a job's log; after a cut it goes on where it was."""
    from leasehold.api.job.v1 import job_service_pb2 as wire

    request = wire.FollowJobLogRequest(
        job_id=job_id, attempt=attempt, tail_lines=lines, is_following=is_following
    )
    messages = allocator.follow("FollowJobLog", lambda: request, is_endless=False)
    try:
        for message in messages:
            request.cursor = message.cursor
            if message.lost_bytes:
                output.say(f"leasehold: {message.lost_bytes} bytes were lost by a rotation")
            if message.data:
                yield message.data
    finally:
        messages.close()
