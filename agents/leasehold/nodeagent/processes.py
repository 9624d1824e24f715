"""Worker processes that outlive this agent: start, signal, kill, adopt, and tell when they end.

Each worker has a shim (`shim.py`), which is its parent and notes how it ended. Use from the loop's own thread;
nothing here blocks it for long, and nothing forks.
"""

import sys
from collections.abc import Callable, Sequence

from leasehold.core import errors, processes
from leasehold.core.node import model, worker_records
from leasehold.nodeagent import cgroups as cgroups_module
from leasehold.nodeagent import logs, state, worker_values

#: Worker id, its main process, its shim.
OnStarted = Callable[[str, processes.ProcessKey, processes.ProcessKey | None], None]
#: Worker id, and how it ended as far as kernel and shim tell: CLEAN, CRASHED, OOM_KILLED, NOT_STARTED or
#: UNKNOWN. Whether it was asked to is the pool machine's to know.
OnEnded = Callable[[str, model.WorkerExit], None]


class Processes:
    """The worker processes of one host."""

    def __init__(
        self,
        folder: state.StateFolder,
        cgroups: cgroups_module.Cgroups,
        *,
        node: str,
        on_started: OnStarted,
        on_ended: OnEnded,
        python: str = sys.executable,
    ) -> None:
        self.logs = logs.Logs(folder.logs)

    @property
    def quarantined(self) -> Sequence[worker_values.Quarantined]:
        """Records that `adopt` could not read."""
        return ()

    def start(self, spec: worker_values.StartSpec) -> None:
        """Start a worker. `on_started` follows, or `on_ended` with NOT_STARTED.

        Raises `AlreadyExists` if a worker of this name still lives.
        """
        raise errors.Unimplemented("workers cannot be started yet")

    def signal(
        self,
        worker_id: str,
        name: str,
        scope: model.SignalScope,
        *,
        step: int,
        until_seconds: float,
        is_replaced: bool = False,
    ) -> bool:
        """Carry out a step of the stop contract; False if there is nobody to signal any more.

        `step`, `until_seconds` (of the loop's clock) and `is_replaced` are kept for the next agent.
        """
        raise errors.Unimplemented("workers cannot be signalled yet")

    def kill_all(self, worker_id: str) -> None:
        """SIGKILL every process of the worker, its shim excepted. One that is gone is no error."""
        raise errors.Unimplemented("workers cannot be killed yet")

    def keep_exit(self, worker_id: str, worker_exit: model.WorkerExit) -> None:
        """Keep how it ended, for the next agent. Failures are only logged."""

    def forget(self, worker_id: str) -> None:
        """Remove what is kept of a worker that ended."""

    def adopt(self) -> list[worker_records.AdoptedWorker]:
        """Take over the workers of an earlier agent. Once, before the first `start`.

        A worker that died meanwhile comes with its exit. Its cgroup, or else its session, is emptied.
        """
        return []

    def held_bytes(self, worker_id: str) -> worker_values.Held:
        """What the worker holds. Cheap: meant for each sample."""
        return worker_values.Held(0, None)

    def oom_kills(self, worker_id: str) -> int:
        """Processes of it that the OOM killer ended since this was asked last, itself excepted."""
        return 0

    def activity(self, worker_id: str) -> worker_values.Activity:
        """What the worker tells of itself. Cheap: meant for each sample."""
        return worker_values.UNKNOWN_ACTIVITY

    def status(self, worker_id: str) -> worker_values.ProcessStatus | None:
        """Its processes; None if there is no such worker."""
        return None

    def set_limit(self, worker_id: str, limit_bytes: int) -> bool:
        """Change a worker's limit; False where no cgroup enforces it or the kernel refuses."""
        return False

    def rotate_logs(self) -> None:
        """Rotate logs that are over their size, on a thread. Meant for every few seconds."""

    def close(self) -> None:
        """Stop watching and give descriptors back. The workers go on."""
