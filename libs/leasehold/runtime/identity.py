"""Who a process is, beyond its PID, and a handle on it that cannot be confused with another.

A PID alone is worth nothing: it is reused, and means another process in another container or on another host.
Boot id, PID namespace and start time together name one process for ever. `open_pidfd` gives a descriptor on
exactly that process, which becomes readable when it is dead; that, or its proven absence, is a death
certificate. What cannot be *proven* here raises: nothing in this module guesses that a process is dead.
"""

import contextlib
import errno
import functools
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leasehold.core import errors

_START_TIME_FIELD = 22


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, for ever: no other process on any host has had, or will have, the same four values.

    ``start_time_ticks`` is field 22 of ``/proc/PID/stat``: clock ticks from boot to the start of the process.
    ``pid`` is the PID as seen inside ``pid_namespace``, the inode of ``/proc/PID/ns/pid``.
    """

    boot_id: str
    pid_namespace: int
    pid: int
    start_time_ticks: int

    def __post_init__(self) -> None:
        if self.pid <= 0:
            raise errors.InvalidArgument(f"a PID is positive, not {self.pid}", field="process.pid")

    def __str__(self) -> str:
        where = f"boot {self.boot_id[:8]}, namespace {self.pid_namespace}"
        return f"PID {self.pid} ({where}, started at tick {self.start_time_ticks})"


def boot_id() -> str:
    """Id of this boot of the host, read anew: the same in every container on it."""
    with _told_as_core_errors("the boot id cannot be read"):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """Inode of the PID namespace of this process."""
    with _told_as_core_errors("the PID namespace cannot be read"):
        return os.stat("/proc/self/ns/pid").st_ino


def start_time_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if /proc does not show such a process."""
    with _told_as_core_errors(f"the start of process {pid} cannot be read"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
    # The second field, the command in parentheses, may itself hold spaces and parentheses.
    fields_from_third = stat.rpartition(")")[2].split()
    return int(fields_from_third[_START_TIME_FIELD - 3])


def identify(pid: int) -> ProcessIdentity:
    """The identity of a living process of this PID namespace.

    Raises `NotFound` if /proc shows no such process. The caller must know by other means that `pid` is the
    process it means (its own child, or itself).
    """
    ticks = start_time_ticks(pid)
    if ticks is None:
        raise errors.NotFound(f"there is no process {pid}")
    return ProcessIdentity(boot_id(), pid_namespace(), pid, ticks)


def current() -> ProcessIdentity:
    """The identity of this process. Not cached: a forked child is another process."""
    return identify(os.getpid())


def is_local(identity: ProcessIdentity) -> bool:
    """Whether the process lives, or lived, on this boot of this host and in this PID namespace."""
    return identity.boot_id == boot_id() and identity.pid_namespace == pid_namespace()


def open_pidfd(identity: ProcessIdentity) -> int | None:
    """A descriptor on exactly this process, readable from its death on; None if it is certainly dead.

    The start time is compared *after* opening: from then on the descriptor names one process whatever happens
    to the PID, so a PID that was reused before is told apart and one that is reused later does no harm. The
    caller closes the descriptor.

    Raises `FailedPrecondition` if nothing can be said from here (another host, boot or container, or a /proc
    that hides the process), `Unimplemented` without pidfds (Linux before 5.3, or a seccomp filter),
    `ResourceExhausted` out of descriptors.
    """
    if not is_local(identity):
        raise errors.FailedPrecondition(f"{identity} is on another boot or in another PID namespace")
    _require_own_proc()
    with _told_as_core_errors(f"{identity} cannot be opened"):
        try:
            descriptor = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return None
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(os.close, descriptor)
        ticks = start_time_ticks(identity.pid)
        if ticks == identity.start_time_ticks:
            on_failure.pop_all()
            return descriptor
        if ticks is None and not is_dead(descriptor):
            # hidepid hides living processes of other users; their absence from /proc proves nothing.
            raise errors.FailedPrecondition(f"/proc does not show {identity}; its start cannot be checked")
        # Either another process has the PID now, or whichever had it a moment ago is dead too.
        return None


def is_dead(descriptor: int) -> bool:
    """Whether the process behind a pidfd is dead (reaped or not)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


@functools.cache
def _require_own_proc() -> None:
    # A /proc mounted from another PID namespace numbers processes differently.
    if os.readlink("/proc/self") != str(os.getpid()):
        raise errors.FailedPrecondition("/proc belongs to another PID namespace; mount it anew in this one")


@contextlib.contextmanager
def _told_as_core_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = f"{what}: {error.strerror}"
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise errors.ResourceExhausted(told) from error
        if error.errno in (errno.ENOSYS, errno.EPERM):
            raise errors.Unimplemented(told) from error
        raise errors.FailedPrecondition(told) from error
