"""Sees workers end: by pidfds, at once, whoever their parent is; and finds out how.

The shim of a worker writes how it ended and then ends itself. So when the main process is dead, its exit is
looked for until it is there or the shim is gone too; a shim that is frozen is thawed, and one that does not
answer is killed in the end. Only where nobody wrote it, the exit is UNKNOWN.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent import futures

from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import exits, members, records
from leasehold.nodeagent.tracked import Tracked
from leasehold.nodeagent.worker_folder import ExitRecord
from leasehold.observe import logs
from leasehold.runtime import process_watch
from leasehold.runtime.identity import ProcessIdentity

_log = logs.get_logger(__name__)

#: From the death of a worker to the kill of a shim that does not tell how it ended.
SHIM_DEADLINE_SECONDS = 5.0
_LOOK_FIRST_SECONDS = 0.002
_LOOK_LAST_SECONDS = 0.1
#: How long the cgroup of a worker that ended is tried to be emptied, and how often.
_SWEEP_SECONDS = 10.0
_SWEEP_EVERY_SECONDS = 0.05

OnTold = Callable[[Tracked, model.WorkerExit], None]


class Watching:
    """Watches the processes of workers. `on_ended` is called once a worker, on the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        executor: futures.Executor,
        *,
        on_ended: OnTold,
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._on_ended = on_ended
        self._watch = process_watch.ProcessWatch(loop)
        self._timers: set[asyncio.TimerHandle] = set()

    def watch(self, worker: Tracked) -> None:
        """Watch what is known of a worker's processes; again when more is."""
        worker.cancel()
        if worker.process is not None:
            self._watch_one(worker, worker.process, self._main_died)
        if worker.shim is not None:
            self._watch_one(worker, worker.shim, self._shim_died)

    def close(self) -> None:
        """Watch nothing any more."""
        self._watch.close()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def finish(self, worker: Tracked, worker_exit: model.WorkerExit) -> None:
        """Tell how a worker ended, and end what is left of it."""
        if worker.is_over:
            return
        worker.is_over = True
        worker.cancel()
        self._on_ended(worker, worker_exit)
        self.sweep(worker)

    def sweep(self, worker: Tracked) -> None:
        """End what a worker that is over left behind, which its shim does first, and remove its cgroup."""
        self._sweep(worker, self._loop.time() + _SWEEP_SECONDS)

    def later(self, delay_seconds: float, call: Callable[[], None]) -> None:
        """Call on the loop after a while, unless it was closed."""

        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = self._loop.call_later(delay_seconds, run)
        self._timers.add(timer)

    def _watch_one(self, worker: Tracked, process: ProcessIdentity, on_exit: Callable[[Tracked], None]) -> None:
        worker.cancels.append(self._watch.watch(process, lambda _: on_exit(worker)))

    def _main_died(self, worker: Tracked) -> None:
        if worker.died_at is None:
            worker.died_at = self._loop.time()
        assert worker.process is not None
        reap(worker.process.pid)
        self._look(worker, _LOOK_FIRST_SECONDS)

    def _shim_died(self, worker: Tracked) -> None:
        assert worker.shim is not None
        reap(worker.shim.pid)
        worker.shim = None
        if worker.died_at is None:
            worker_exit = self._noted(worker)
            if worker_exit is None:
                name, pid = worker.intent.name, worker.process.pid if worker.process is not None else 0
                _log.warning("shim_died", worker=name, pid=pid, told="how the worker ends will not be known")
            return
        self._look(worker, _LOOK_FIRST_SECONDS)

    def _look(self, worker: Tracked, wait_seconds: float) -> None:
        """Look for the exit of a worker whose main process is dead; look again later."""
        if worker.is_over:
            return
        # In this order: a shim that is gone by now has written before.
        is_shim_gone = worker.shim is None
        noted = self._noted(worker)
        if noted is not None:
            self.finish(worker, exits.judged(noted, self._around(worker)))
            return
        if is_shim_gone:
            count = self._untold_oom_kills(worker)
            self.finish(worker, exits.unknown(_why_unknown(count), time.time(), oom_kills=count))
            return
        assert worker.shim is not None and worker.died_at is not None
        self._urge(worker.shim, self._loop.time() - worker.died_at > SHIM_DEADLINE_SECONDS)
        self.later(wait_seconds, lambda: self._look(worker, min(2 * wait_seconds, _LOOK_LAST_SECONDS)))

    def _urge(self, shim: ProcessIdentity, is_late: bool) -> None:
        """Thaw a shim that is frozen while it has something to do; kill it when its time is over."""
        stat = members.stat_of(shim.pid)
        with contextlib.suppress(errors.LeaseholdError):
            if is_late:
                members.send(shim, signal.SIGKILL)
            elif stat is not None and stat.state in "Tt":
                members.send(shim, signal.SIGCONT)

    def _noted(self, worker: Tracked) -> ExitRecord | None:
        try:
            return worker.folder.read_exit()
        except records.Damaged as damage:
            _log.error("exit_record_damaged", worker=worker.intent.name, why=str(damage))
            return None

    def _around(self, worker: Tracked) -> exits.Circumstances:
        counter = worker.oom_counter
        settled = None if counter is None else counter.settled(self._loop.time())
        return exits.Circumstances(
            limit_bytes=worker.intent.limit_bytes,
            oom_kills_told=worker.oom_kills_told,
            host_oom_kills_seen=settled if worker.cgroup is None else None,
            is_killed_by_agent=worker.is_killed,
        )

    def _untold_oom_kills(self, worker: Tracked) -> int:
        return 0 if worker.cgroup is None else max(0, worker.cgroup.oom_kills() - worker.oom_kills_told)

    def _sweep(self, worker: Tracked, until: float) -> None:
        is_late = self._loop.time() >= until
        if worker.shim is not None:
            self._urge(worker.shim, is_late)
        if worker.shim is None or is_late or not lives(worker.shim):
            if worker.shim is not None:
                reap(worker.shim.pid)
            if worker.shim is None or is_late:
                self._executor.submit(members.kill_all, worker.marks, worker.session, ())
            self._empty(worker, until)
            return
        self.later(_SWEEP_EVERY_SECONDS, lambda: self._sweep(worker, until))

    def _empty(self, worker: Tracked, until: float) -> None:
        if worker.cgroup is None:
            return
        worker.cgroup.kill()
        if worker.cgroup.remove():
            return
        if self._loop.time() >= until:
            pids = worker.cgroup.pids()
            _log.warning("worker_left_processes", worker=worker.intent.name, pids=pids)
            return
        self.later(_SWEEP_EVERY_SECONDS, lambda: self._empty(worker, until))


def reap(pid: int) -> None:
    """Take the status of a process, if it is this one's child and has ended; no zombie stays."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _why_unknown(oom_kills: int) -> str:
    told = "its shim ended before it, so nobody saw how it ended"
    return f"{told}; the OOM killer ended {oom_kills} of its processes" if oom_kills else told


def lives(process: ProcessIdentity) -> bool:
    """Whether exactly this process runs; a zombie does not."""
    stat = members.stat_of(process.pid)
    return stat is not None and not stat.is_dead and stat.start_time_ticks == process.start_time_ticks
