"""Which process: a PID that cannot be mistaken for the next process that is given the same number.

Linux gives PIDs anew, so a number read from a file may by now belong to a stranger. The triple (boot id, PID,
start time in clock ticks since boot) names one process for ever, and a pidfd pins it between the check and the
signal: whatever happens in between, the signal reaches that process or nobody.
"""

import contextlib
import dataclasses
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from leasehold.core import errors

# Fields of /proc/PID/stat, counted from 1 (proc(5)).
_STATE_FIELD = 3
_START_TIME_FIELD = 22

_FREEZE_TIMEOUT_SECONDS = 1.0  # for a running process to notice that it is stopped
_KILL_TIMEOUT_SECONDS = 5.0  # for the kernel to take down a process after SIGKILL


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """One process of this machine, past or present.

    ``start_time_ticks`` is field 22 of /proc/PID/stat: clock ticks (mostly 10 ms) from boot to the start of the
    process. It survives exec, so it may be noted before the process becomes what it is meant to be.
    """

    boot_id: str
    pid: int
    start_time_ticks: int


def boot_id() -> str:
    """The kernel's name for this boot: start times of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def of(pid: int) -> Identity | None:
    """The identity of the process that has this PID now; None if there is none."""
    stat = _stat(pid)
    return None if stat is None else Identity(boot_id(), pid, int(stat[_START_TIME_FIELD - _STATE_FIELD]))


@contextlib.contextmanager
def pinned(identity: Identity) -> Iterator[int | None]:
    """A pidfd of exactly this process, closed at the end; None if it is gone or the PID is another's by now."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # First pin, then look. If the PID was reused before the pin, the start time differs; if it is reused
        # after it, the pidfd stays with the dead process and a signal through it fails.
        yield pidfd if of(identity.pid) == identity and not _has_ended(pidfd, 0.0) else None
    finally:
        os.close(pidfd)


def is_alive(identity: Identity) -> bool:
    """Whether this very process still runs. A zombie does not."""
    with pinned(identity) as pidfd:
        return pidfd is not None


def send(identity: Identity, signal_number: signal.Signals) -> bool:
    """Signal this very process; False if it is gone. Raises `PermissionDenied` if it is another user's."""
    with pinned(identity) as pidfd:
        return pidfd is not None and _send(pidfd, identity, signal_number)


def wait(identity: Identity, timeout_seconds: float) -> bool:
    """Wait until this very process has ended; False if it still runs after ``timeout_seconds``."""
    with pinned(identity) as pidfd:
        return pidfd is None or _has_ended(pidfd, timeout_seconds)


def descendants(identity: Identity) -> list[Identity]:
    """Children, their children and so on, as they are at this instant."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(identity.pid).children(recursive=True)
        return [found for found in (of(child.pid) for child in children) if found is not None]
    return []


def freeze(identity: Identity) -> None:
    """SIGSTOP a process and its descendants, and return when they stand still.

    The root goes first, so that it starts no more of them.
    """
    _stop_still(identity)
    for child in descendants(identity):
        _stop_still(child)


def thaw(identity: Identity) -> None:
    """SIGCONT a process and its descendants; the root last, so that it finds them running."""
    for child in descendants(identity):
        send(child, signal.SIGCONT)
    send(identity, signal.SIGCONT)


def kill(identity: Identity) -> None:
    """SIGKILL a process and its descendants and wait until they are gone (at most 5 s each).

    The root is stopped before the others are looked for, so that it starts no more, and goes first, so that it
    cannot answer the death of a child. Raises `FailedPrecondition` if one does not go, `PermissionDenied` if it
    is another user's.
    """
    send(identity, signal.SIGSTOP)
    _kill_all([identity, *descendants(identity)])


def end(identity: Identity, stop_signal: signal.Signals, grace_seconds: float) -> bool:
    """Stop a process, frozen or not: ``stop_signal``, and after ``grace_seconds`` as `kill` does.

    Descendants that it leaves behind are killed. With SIGKILL it is `kill` at once. Returns False if it was
    gone already. Raises as `kill` does.
    """
    if not is_alive(identity):
        return False
    if stop_signal is not signal.SIGKILL:
        family = descendants(identity)
        send(identity, stop_signal)
        thaw(identity)
        if wait(identity, grace_seconds):
            _kill_all(family)
            return True
    kill(identity)
    return True


def _kill_all(processes: Sequence[Identity]) -> None:
    for process in processes:
        send(process, signal.SIGKILL)
    for process in processes:
        if not wait(process, _KILL_TIMEOUT_SECONDS):
            raise errors.FailedPrecondition(
                f"process {process.pid} does not end after SIGKILL (it may hang in the kernel)",
                metadata={"pid": str(process.pid)},
            )


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Before them is the program's name in parentheses, which may hold spaces and parentheses itself.
    return stat.rpartition(")")[2].split()


def _stop_still(identity: Identity) -> None:
    send(identity, signal.SIGSTOP)
    deadline = time.monotonic() + _FREEZE_TIMEOUT_SECONDS
    while (stat := _stat(identity.pid)) is not None and stat[0] in "RSD" and time.monotonic() < deadline:
        time.sleep(0.001)


def _send(pidfd: int, identity: Identity, signal_number: signal.Signals) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, signal_number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise errors.PermissionDenied(
            f"may not send {signal_number.name} to process {identity.pid}: it belongs to another user",
            metadata={"pid": str(identity.pid)},
        ) from error
    return True


def _has_ended(pidfd: int, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)  # readable once the process has ended, be it reaped or not
    return bool(poll.poll(timeout_seconds * 1000))
