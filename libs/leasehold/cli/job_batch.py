"""`leasehold job batch`: many jobs, one a line of JSON."""

import contextlib
import pathlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from leasehold.cli import options, output
from leasehold.core import errors

PROGRESS_SECONDS = 1.0


def batch(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - for standard input")] = "-",
    all_or_none: Annotated[
        bool, typer.Option("--all-or-none", help="Submit nothing unless every line is right; at most 1000 jobs")
    ] = False,
    request_id: Annotated[
        str, typer.Option("--request-id", metavar="ID", help="A repeat within a day submits nothing twice")
    ] = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = output.Format.TABLE,
) -> None:
    """Submit many jobs, one a line of JSON, and do not wait for them.

    A line is an object such as {"template": "encode", "cpus": 2, "memory": "4GB", "parameters": {"input": "a"},
    "max_run": "10m"}; further keys: name, queue, priority, node_selector, max_attempts, initial_backoff,
    max_backoff, on_lost, spreading, wait_for_capacity. A line that is wrong is told with its number; the others
    go through, or none with --all-or-none. Exit 1 if any was refused.
    """
    from leasehold.cli import job_lines

    telling = _Telling(form)
    with contextlib.ExitStack() as stack:
        lines = job_lines.parsed(_lines(file, stack))
        if all_or_none:
            lines = iter(_all_right(lines, telling))
        _submit(lines, telling, addr, timeout, request_id=request_id, is_all_or_none=all_or_none)
    telling.end()
    if telling.refused:
        raise typer.Exit(1)


def _lines(file: str, stack: contextlib.ExitStack) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, read as they are needed. Raises `InvalidArgument`, naming ``file``."""
    source: Iterable[bytes]
    try:
        if file != "-":
            source = stack.enter_context(pathlib.Path(file).open("rb"))  # noqa: SIM115  the stack closes it
        elif sys.stdin is None:
            raise errors.InvalidArgument("file: standard input is closed", field="file")
        else:
            source = sys.stdin.buffer
        yield from enumerate(source, 1)
    except OSError as error:
        raise errors.InvalidArgument(f"file: {file}: {error.strerror}", field="file") from error
    except ValueError as error:
        raise errors.InvalidArgument(f"file: {file!r}: {error}", field="file") from error


def _all_right(lines: Iterator[tuple[int, Any]], telling: "_Telling") -> list[tuple[int, Any]]:
    """Every line, if all are right and fit one commit; else none, and those that are wrong are told."""
    from leasehold.client import job_batches

    found = list(lines)
    wrong = [(number, each) for number, each in found if isinstance(each, errors.LeaseholdError)]
    if wrong:
        for number, error in wrong:
            telling.refuse(number, error)
        output.say(f"leasehold: nothing is submitted: {len(wrong)} of {len(found)} lines are wrong")
        return []
    if sum(1 for _ in job_batches.chunks_of(each for _, each in found)) > 1:
        raise errors.InvalidArgument(
            f"--all-or-none: is one commit of at most {job_batches.CHUNK_JOBS_MAX} jobs and 3 MiB; there are "
            f"{len(found)} jobs",
            field="--all-or-none",
        )
    return found


def _submit(
    lines: Iterator[tuple[int, Any]],
    telling: "_Telling",
    addr: str | None,
    timeout: float,
    *,
    request_id: str,
    is_all_or_none: bool,
) -> None:
    from leasehold import client
    from leasehold.rpc import tls

    numbers: deque[int] = deque()

    def right() -> Iterator[Any]:
        for number, each in lines:
            if isinstance(each, errors.LeaseholdError):
                telling.refuse(number, each)
            else:
                numbers.append(number)
                yield each

    with client.connect_blocking(addr, tls_files=tls.client_files(), timeout_seconds=timeout) as leasehold:
        verdicts = leasehold.jobs.submit_many(
            right(), request_id=request_id or None, is_all_or_none=is_all_or_none
        )
        for verdict in verdicts:
            number = numbers.popleft()
            if verdict.error is not None:
                telling.refuse(number, verdict.error)
            else:
                telling.submit(number, verdict.job_id)


class _Telling:
    """What is told while lines go through: refusals and progress on standard error, jobs on standard output."""

    def __init__(self, form: output.Format) -> None:
        self._form = form
        self._next = time.monotonic() + PROGRESS_SECONDS
        self.submitted = 0
        self.refused = 0

    def submit(self, number: int, job_id: str) -> None:
        """A line is a job now."""
        self.submitted += 1
        if self._form is output.Format.NAME:
            output.lines([job_id])
        elif self._form is not output.Format.TABLE:
            output.stream_item({"line": number, "job_id": job_id, "error": None}, self._form)
        self._progress()

    def refuse(self, number: int, error: errors.LeaseholdError) -> None:
        """A line was not taken."""
        self.refused += 1
        where = f"{error.field}: " if error.field and error.field not in error.message else ""
        output.say(output.printable(f"leasehold: line {number}: {where}{error.message}"))
        if self._form not in (output.Format.TABLE, output.Format.NAME):
            told = {"reason": error.reason, "message": error.message, "field": error.field}
            output.stream_item({"line": number, "job_id": None, "error": told}, self._form)
        self._progress()

    def end(self) -> None:
        """All lines have gone through."""
        text = f"{self.submitted} submitted, {self.refused} refused"
        if self._form is output.Format.TABLE:
            output.lines([text])
        else:
            output.say(text)

    def _progress(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            output.say(f"{self.submitted} submitted, {self.refused} refused so far")
