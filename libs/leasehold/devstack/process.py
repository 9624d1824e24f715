"""Child processes that leave nothing behind: recorded before they run, in their own session, ended in order."""

import contextlib
import functools
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import BinaryIO

from leasehold.core import errors
from leasehold.devstack import identity, ports, records

Announce = Callable[[str], None]

# A child waits here until it is on the record. If its owner is killed before that, the pipe on its standard
# input closes, `read` fails and nothing was started; there is no instant at which a server runs unrecorded.
_GATE = 'read -r go && exec "$@" </dev/null'

_POLL_SECONDS = 0.02
_LOG_BYTES_MAX = 16 * 2**20


class Child:
    """One child process: start, stop, and what tests do to it.

    Its output goes to ``log_path``. It has a session of its own, so a terminal's Ctrl-C reaches only the owner,
    which then stops its children in order. ``stop_signal`` asks it to end; SIGKILL is for a tool whose work may
    be thrown away, and ends its descendants too. ``prefix`` is put before ``command`` and must end in exec (it
    drops privileges, for instance). ``env`` is the whole environment; None is the owner's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        book: records.Records,
        stop_signal: signal.Signals = signal.SIGTERM,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = tuple(command)
        self._prefix = tuple(prefix)
        self._book = book
        self._stop_signal = stop_signal
        self._env = env
        self._cwd = cwd
        self._popen: subprocess.Popen[bytes] | None = None
        self._identity: identity.Identity | None = None

    @property
    def pid(self) -> int:
        """PID of the running process; raises `FailedPrecondition` if there is none."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended; a frozen one runs."""
        return self.exit_code is None and self._popen is not None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last run, negative for a signal; None while it runs or before the first start."""
        return None if self._popen is None else self._popen.poll()

    def check_not_running(self) -> None:
        """Raises `FailedPrecondition` if it runs."""
        if self.is_running:
            raise errors.FailedPrecondition(f"{self.name} runs already, PID {self.pid}")

    def start(self) -> None:
        """Start it; raises `FailedPrecondition` if it runs already."""
        self.check_not_running()
        if self._identity is not None:  # it ended by itself, or by a stranger's hand
            self._book.remove(self._identity)
        # A tool that the kernel kills would leave its own children, of which there is no record. It goes on
        # instead, to its end or to that of `Records.end_all`.
        is_tool = self._stop_signal is signal.SIGKILL
        death = () if is_tool else _dies_with_owner(self._stop_signal)
        command = [*self._prefix, *death, *self._command]
        with _open_log(self.log_path) as log:
            popen = spawn(
                ["/bin/sh", "-c", _GATE, self.name, *command],
                stdin=subprocess.PIPE,
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
            )
        started = identity.of(popen.pid)
        assert popen.stdin is not None and started is not None  # not reaped yet, so /proc shows it
        try:
            self._book.add(records.Record(self.name, started, self._command, self._stop_signal))
        except BaseException:
            popen.stdin.close()  # the gate stays shut
            popen.wait()
            raise
        self._popen, self._identity = popen, started
        with contextlib.suppress(BrokenPipeError), popen.stdin:
            popen.stdin.write(b"go\n")

    def wait_until(
        self,
        is_ready: Callable[[], bool],
        *,
        timeout_seconds: float,
        cancel: threading.Event,
        port: int | None = None,
    ) -> None:
        """Ask ``is_ready`` until it says yes, of this process where ``port`` tells on which it is to listen.

        Raises `Unavailable`, with the end of the log, if the process ends or ``timeout_seconds`` pass first,
        and `DeadlineExceeded` if ``cancel`` is set meanwhile.
        """
        deadline = time.monotonic() + timeout_seconds
        while not (is_ready() and (port is None or self._may_listen(port))):
            if not self.is_running:
                raise self._not_ready(f"ended with code {self.exit_code} while it started")
            if time.monotonic() >= deadline:
                raise self._not_ready(f"does not answer after {timeout_seconds:g} s")
            check_cancelled(cancel, self.name)
            cancel.wait(_POLL_SECONDS)

    def finish(self, *, timeout_seconds: float, cancel: threading.Event) -> None:
        """Wait until it ends by itself, for a tool. It has ended when this returns or raises.

        Raises `Unavailable`, with the end of the log, if it fails or takes longer than ``timeout_seconds``, and
        `DeadlineExceeded` if ``cancel`` is set meanwhile.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            while self.is_running:
                if time.monotonic() >= deadline:
                    raise self._not_ready(f"took longer than {timeout_seconds:g} s")
                check_cancelled(cancel, self.name)
                cancel.wait(_POLL_SECONDS)
        finally:
            self.stop(grace_seconds=0)
        if self.exit_code != 0:
            raise self._not_ready(f"ended with code {self.exit_code}")

    def stop(self, grace_seconds: float) -> None:
        """Ask it to end; after ``grace_seconds`` kill it. No descendant stays. Not running is no error."""
        if self._popen is None or self._identity is None:
            return
        identity.end(self._identity, self._stop_signal, grace_seconds)
        self._reap()

    def kill(self) -> None:
        """SIGKILL it and its descendants, at once, and wait until they are gone."""
        identity.kill(self._running())
        self._reap()

    def freeze(self) -> None:
        """SIGSTOP it and its descendants: it keeps its connections and answers nothing."""
        identity.freeze(self._running())

    def thaw(self) -> None:
        """SIGCONT after `freeze`."""
        identity.thaw(self._running())

    def _may_listen(self, port: int) -> bool:
        # A stranger that took the port after it was found free answers too, until this process fails to bind.
        return self._identity is not None and self.is_running and ports.may_listen(self._identity.pid, port)

    def _not_ready(self, what: str) -> errors.Unavailable:
        return errors.Unavailable(f"{self.name} {what}; the end of {self.log_path}:\n{tail(self.log_path)}")

    def _running(self) -> identity.Identity:
        if self._identity is None or not self.is_running:
            raise errors.FailedPrecondition(f"{self.name} does not run")
        return self._identity

    def _reap(self) -> None:
        assert self._popen is not None and self._identity is not None
        self._popen.wait()
        self._book.remove(self._identity)


def run_tool(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    cancel: threading.Event,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end and return its output (both streams, one text); ``prefix`` as for `Child`.

    Raises `Unavailable`, with that output, if it cannot be run, fails, or takes longer than
    ``timeout_seconds``, and `DeadlineExceeded` if ``cancel`` is set. In each case it and its children have
    ended on return.
    """
    name = Path(command[0]).name
    try:
        popen = spawn(
            [*prefix, *_dies_with_owner(signal.SIGTERM), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
        )
    except OSError as error:
        raise errors.Unavailable(f"cannot run {name}: {error}") from error
    deadline = time.monotonic() + timeout_seconds
    try:
        while True:
            try:
                output = popen.communicate(timeout=0.1)[0].decode(errors="replace")
                break
            except subprocess.TimeoutExpired:
                check_cancelled(cancel, name)
                if time.monotonic() >= deadline:
                    raise errors.Unavailable(f"{name} took longer than {timeout_seconds:g} s") from None
    finally:
        _end_tool(popen)
    if popen.returncode != 0:
        raise errors.Unavailable(f"{name} ended with code {popen.returncode}: {output.strip()[-2000:]}")
    return output


def check_cancelled(cancel: threading.Event, what: str) -> None:
    """Raise `DeadlineExceeded` if ``cancel`` is set."""
    if cancel.is_set():
        raise errors.DeadlineExceeded(f"the start of {what} was given up")


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log file, for an error message; a missing file gives an empty text."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


class _Spawner:
    """The thread from which every child is started; it lives as long as this process.

    PR_SET_PDEATHSIG, which ends a child when its owner is killed, fires when the *thread* that forked it ends.
    A caller's thread may be a short-lived one of a pool, and would take the servers with it.
    """

    def __init__(self) -> None:
        self.owner_pid = os.getpid()  # threads do not survive a fork
        self._calls: queue.SimpleQueue[
            tuple[futures.Future[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]
        ]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._run, name="devstack-spawner", daemon=True).start()

    def call(self, function: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Run ``function`` on the thread, return its result or raise its error."""
        future: futures.Future[subprocess.Popen[bytes]] = futures.Future()
        self._calls.put((future, function))
        return future.result()

    def _run(self) -> None:
        while True:
            future, function = self._calls.get()
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is raised again in the calling thread
                future.set_exception(error)


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def spawn(
    command: Sequence[str],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None,
    cwd: Path | None,
) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` in a session of its own, forked from a thread that lasts as long as this process."""
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner.owner_pid != os.getpid():
            _spawner = _Spawner()
        spawner = _spawner
    return spawner.call(
        lambda: subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, start_new_session=True
        )
    )


@functools.cache
def _setpriv() -> str | None:
    path = shutil.which("setpriv")
    if path is None:
        return None
    probe = subprocess.run([path, "--pdeathsig", "TERM", "true"], capture_output=True, check=False)
    return path if probe.returncode == 0 else None


def _dies_with_owner(stop_signal: signal.Signals) -> tuple[str, ...]:
    """A prefix that has the kernel send ``stop_signal`` when the owner ends without a word.

    It comes last before the program, since a change of user clears the setting. Where util-linux's setpriv is
    missing (or is busybox's) the record alone must do. Either way it is only quicker, not surer: a child that
    is frozen, or that is still at the gate, does not see the signal in time.
    """
    setpriv = _setpriv()
    return () if setpriv is None else (setpriv, "--pdeathsig", stop_signal.name.removeprefix("SIG"), "--")


def _end_tool(popen: subprocess.Popen[bytes]) -> None:
    # Not SIGTERM: it would end a wrapper and leave what it runs. Half-made results are nobody's to see anyway.
    if popen.poll() is None and (started := identity.of(popen.pid)) is not None:
        identity.kill(started)
    popen.wait()
    if popen.stdout is not None:
        popen.stdout.close()


def _open_log(path: Path) -> BinaryIO:
    """Open a log for appending; one of more than 16 MiB is first put aside as ``NAME.1``."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")
