"""Puts a worker's intent on disk and spawns its shim. Blocks on the disk: for a thread. Never forks."""

import contextlib
import dataclasses
import fcntl
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from leasehold.core import errors
from leasehold.nodeagent import cgroup_folder, records, shim, worker_values
from leasehold.nodeagent.worker_folder import Intent, WorkerFolder
from leasehold.runtime import identity as identities
from leasehold.runtime.identity import ProcessIdentity

_SHIM_PATH = Path(shim.__file__)
#: Above those that the shim's descriptors are given.
_DESCRIPTORS_FROM = 10
#: Blocked from the shim's first instruction until it ignores them.
_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclasses.dataclass(frozen=True, slots=True)
class Spawned:
    """A shim that runs."""

    shim: ProcessIdentity
    #: Readable, or at its end, once it is known whether the worker runs. The caller closes it.
    ready: int
    intent: Intent
    cgroup: cgroup_folder.WorkerCgroup | None


def planned(spec: worker_values.StartSpec) -> Intent:
    """The intent of a worker without a cgroup."""
    return Intent(
        worker_id=spec.worker_id,
        name=spec.name,
        pool=spec.pool,
        number=spec.number,
        start_number=spec.start_number,
        argv=spec.argv,
        limit_bytes=spec.limit_bytes,
        boot_id=identities.boot_id(),
        cgroup=None,
        stop=spec.stop,
        log=spec.log,
        cpus=spec.cpus,
        max_run_seconds=spec.max_run_seconds,
    )


def worker_environment(spec: worker_values.StartSpec, node: str, run: Path) -> dict[str, str]:
    """The worker's environment: the one that is given, and who it is."""
    # An agent may run within a job itself: that one's limit is not its workers'.
    limits = dict.fromkeys(("LEASEHOLD_MAX_RUN_SECONDS", "LEASEHOLD_KILL_GRACE_SECONDS"), "")
    if spec.max_run_seconds is not None:
        limits = {
            "LEASEHOLD_MAX_RUN_SECONDS": repr(spec.max_run_seconds),
            "LEASEHOLD_KILL_GRACE_SECONDS": repr(spec.kill_grace_seconds),
        }
    return {
        **{name: value for name, value in spec.env.items() if name not in limits},
        **{name: value for name, value in limits.items() if value},
        "LEASEHOLD_WORKER_ID": spec.worker_id,
        "LEASEHOLD_WORKER_NAME": spec.name,
        "LEASEHOLD_POOL": spec.pool,
        "LEASEHOLD_NODE": node,
        "LEASEHOLD_RUN_DIR": str(run),
        "WORKER_ID": spec.name,
    }


def spawn(
    spec: worker_values.StartSpec,
    folder: WorkerFolder,
    log_path: Path,
    *,
    node: str,
    cgroups: cgroup_folder.Cgroups,
    python: str,
) -> Spawned:
    """Write the intent, make the cgroup, spawn the shim, in that order.

    So whatever of them stays if this process dies in between, the next agent knows of it by the intent; and no
    agent removes a cgroup that it has no intent of: others of this host may be making theirs beside it.

    Raises `ResourceExhausted` on a full disk or out of processes, `FailedPrecondition` where a folder, the
    cgroup or the shim's program refuses. Nothing stays then.
    """
    with contextlib.ExitStack() as on_failure:
        intent = dataclasses.replace(planned(spec), cgroup=cgroups.path(spec.worker_id))
        lock = folder.create(intent)
        on_failure.callback(folder.remove)
        try:
            cgroup = cgroups.create(spec.worker_id, spec.limit_bytes)
            if cgroup is not None:
                on_failure.callback(cgroup.remove)
                cgroup.set_cpus(spec.cpus)
            with records.told(f"the shim of {spec.name} cannot be started"):
                pid, ready = _spawn_shim(
                    [
                        python,
                        "-I",
                        "-S",
                        str(_SHIM_PATH),
                        str(folder.path),
                        str(log_path),
                        str(spec.cwd),
                        "" if cgroup is None else str(cgroup.path),
                        *spec.argv,
                    ],
                    worker_environment(spec, node, folder.run),
                    lock,
                )
        finally:
            os.close(lock)
        on_failure.pop_all()
    # It is this process's child and not reaped, so the PID is certainly its own.
    return Spawned(identities.identify(pid), ready, intent, cgroup)


def _spawn_shim(argv: list[str], environment: Mapping[str, str], lock: int) -> tuple[int, int]:
    """The shim's PID, and the pipe's end to read."""
    ready, ready_in = os.pipe()
    high: list[int] = []
    try:
        for descriptor in (lock, ready_in):
            high.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _DESCRIPTORS_FROM))  # noqa: PERF401
        pid = os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, high[0], shim.LOCK),
                (os.POSIX_SPAWN_DUP2, high[1], shim.READY),
            ],
            setsid=True,
            setsigmask=_BLOCKED,
        )
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(ready_in)
        for descriptor in high:
            os.close(descriptor)
    os.set_blocking(ready, False)
    return pid, ready


def check(spec: worker_values.StartSpec) -> None:
    """Raises `InvalidArgument` for what no kernel would execute."""
    if not spec.argv or not spec.argv[0]:
        raise errors.InvalidArgument(f"{spec.name}: the command is empty", field="argv")
    words = [*spec.argv, *spec.env, *spec.env.values()]
    if any("\0" in word for word in words) or any("=" in name or not name for name in spec.env):
        raise errors.InvalidArgument(f"{spec.name}: a NUL in a word, or a name that is none", field="argv")
