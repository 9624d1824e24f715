"""Child processes that end with their parent, and the ending of them by their own handles.

A child is given the read end of a pipe whose write end only the parent holds (`--lifeline-fd`). Whatever ends
the parent, SIGKILL included, closes the pipe, and the child stops.
"""

import asyncio
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from leasehold.core import errors

STOP_SECONDS = 5.0


def stop_event(lifeline_fd: int | None) -> asyncio.Event:
    """For a child: an event that is set on SIGTERM, on SIGINT, or when the lifeline's other end is closed."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline_fd is not None:

        def on_end() -> None:
            loop.remove_reader(lifeline_fd)
            stop.set()

        loop.add_reader(lifeline_fd, on_end)
    return stop


async def run_until_stopped(work: Coroutine[Any, Any, None], lifeline_fd: int | None) -> None:
    """For a child: runs `work` until it is done, or cancels it when the child is to stop."""
    stopping = asyncio.create_task(stop_event(lifeline_fd).wait())
    working = asyncio.create_task(work)
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


class Children:
    """Starts child processes and, at the end of the `with` block, ends those that still run.

    Each child leads a session of its own, so that Ctrl-C in a terminal reaches the parent alone, which then
    ends the children in order.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifeline_read_fd, self._lifeline_write_fd = os.pipe()

    def start_module(
        self, name: str, module: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts `python -m module arguments --lifeline-fd N`; its output goes to `NAME.out` in the folder."""
        argv = [sys.executable, "-m", module, *arguments, "--lifeline-fd", str(self._lifeline_read_fd)]
        return self.start(name, argv, environment=environment, pass_fds=(self._lifeline_read_fd,))

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Starts `argv`, with `environment` added to this process's; names are unique."""
        assert name not in self._processes, f"{name} has been started"
        with self.output_path(name).open("ab") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                pass_fds=pass_fds,
            )
        self._processes[name] = process
        return process

    def output_path(self, name: str) -> pathlib.Path:
        """Where the standard output and error of a child go."""
        return self._folder / f"{name}.out"

    def check_running(self) -> None:
        """Raises `Unavailable`, with the end of its output, if a child has ended that nobody asked to end."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                output = self.output_path(name).read_text(errors="replace").strip()
                raise errors.Unavailable(f"{name} ended by itself with code {code}: {output[-2000:]}")

    def kill(self, name: str) -> int:
        """Sends SIGKILL and waits for the end; returns the instant before, CLOCK_MONOTONIC nanoseconds."""
        at_ns = time.monotonic_ns()
        self._processes[name].kill()
        self._processes.pop(name).wait()
        return at_ns

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Ends the named children (default all) together: SIGTERM, and SIGKILL to what outlives 5 s."""
        chosen = list(self._processes) if names is None else names
        for name in chosen:
            # Popen sends nothing to a child that has ended and been reaped.
            self._processes[name].terminate()
        deadline_seconds = time.monotonic() + STOP_SECONDS
        for name in chosen:
            try:
                self._processes[name].wait(max(0.0, deadline_seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._processes[name].kill()
                self._processes[name].wait()
            del self._processes[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            # Only if `stop` was interrupted is anyone left.
            for process in self._processes.values():
                process.kill()
                process.wait()
            os.close(self._lifeline_read_fd)
            os.close(self._lifeline_write_fd)
