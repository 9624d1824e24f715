"""One worker whose processes this agent looks after."""

from collections.abc import Callable
from dataclasses import dataclass, field

from leasehold.core import processes
from leasehold.nodeagent import activity, cgroup_folder, held, kernel_counts, members
from leasehold.nodeagent.worker_folder import Intent, WorkerFolder
from leasehold.runtime.identity import ProcessIdentity


@dataclass(slots=True, eq=False)
class Tracked:
    """A worker from its start, or its adoption, to its end."""

    intent: Intent
    folder: WorkerFolder
    run: activity.RunFolder
    cgroup: cgroup_folder.WorkerCgroup | None = None
    meter: held.HeldMeter | None = None
    #: None: not told yet.
    process: ProcessIdentity | None = None
    #: None: not spawned yet, or gone.
    shim: ProcessIdentity | None = None
    is_adopted: bool = False
    #: This agent killed it, or will as soon as it is there.
    is_killed: bool = False
    #: Its end was told.
    is_over: bool = False
    #: The last moment at which its main process was seen alive, as start times are told.
    alive_at_ticks: int | None = None
    #: When its main process was seen dead, by the loop's clock.
    died_at: float | None = None
    #: OOM kills in its cgroup, or else on the host; those in its cgroup that were told apart.
    oom_counter: kernel_counts.SettledCounter | None = None
    oom_kills_told: int = 0
    #: What it was signalled or killed for, where that decides what its end means.
    stop_why: str = ""
    cancels: list[Callable[[], None]] = field(default_factory=list)

    @property
    def worker_id(self) -> str:
        """The id of its life."""
        return self.intent.worker_id

    @property
    def marks(self) -> members.Marks:
        """What its processes are known by."""
        return members.Marks(self.worker_id, self.folder.lock)

    @property
    def session(self) -> members.Session | None:
        """The session of its main process."""
        return None if self.process is None else members.Session(self.process, self.alive_at_ticks)

    def note_alive(self) -> None:
        """Note that its main process lives, if it does. Cheap: meant for each sample."""
        if self.process is None:
            return
        now = kernel_counts.ticks_now()  # before the look: it lived then
        stat = members.stat_of(self.process.pid)
        if stat is not None and not stat.is_dead and stat.start_time_ticks == self.process.start_time_ticks:
            self.alive_at_ticks = now

    def cancel(self) -> None:
        """Stop waiting for anything."""
        while self.cancels:
            self.cancels.pop()()


def key(identity: ProcessIdentity) -> processes.ProcessKey:
    """A process as the core names it."""
    return processes.ProcessKey(
        identity.boot_id, identity.pid_namespace, identity.pid, identity.start_time_ticks
    )
