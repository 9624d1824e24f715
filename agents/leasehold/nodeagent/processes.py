"""Worker processes that outlive this agent: start, signal, kill, adopt, and tell when they end.

Each worker has a shim (`shim.py`), which is its parent and notes how it ended. Use from the loop's own thread;
nothing here blocks it for long, and nothing forks.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal as signals
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures

from leasehold.core import errors, processes
from leasehold.core.node import model, worker_records
from leasehold.core.node.model import ExitCause
from leasehold.nodeagent import (
    activity,
    adoption,
    cgroups,
    exits,
    held,
    kernel_counts,
    logs,
    members,
    records,
    spawning,
    state,
    watching,
    worker_values,
)
from leasehold.nodeagent.tracked import Tracked, key
from leasehold.nodeagent.worker_folder import Intent, WorkerFolder
from leasehold.observe import logs as observe_logs
from leasehold.runtime import identity as identities

_log = observe_logs.get_logger(__name__)

#: How often a worker that an earlier agent had just spawned is asked whether it has started.
_STARTING_EVERY_SECONDS = 0.05
_THREADS = 2
_LOG_THREADS = 1
_HOST_COUNT_SECONDS = 0.2

#: Worker id, its main process, its shim (None: gone already).
OnStarted = Callable[[str, processes.ProcessKey, processes.ProcessKey | None], None]
#: Worker id, and how it ended as far as kernel and shim tell: CLEAN, CRASHED, OOM_KILLED, NOT_STARTED or
#: UNKNOWN. Whether it was asked to is the pool machine's to know.
OnEnded = Callable[[str, model.WorkerExit], None]


class Processes:
    """The worker processes of one host. Make it on the loop that it is to use.

    `python` runs the shims. The callbacks come on the loop, for each worker at most one `on_started`, and then
    one `on_ended`.
    """

    def __init__(
        self,
        folder: state.StateFolder,
        made_in: cgroups.Cgroups,
        *,
        node: str,
        on_started: OnStarted,
        on_ended: OnEnded,
        python: str = sys.executable,
    ) -> None:
        self.logs = logs.Logs(folder.logs)
        self._folder = folder
        self._cgroups = made_in
        self._node = node
        self._on_started = on_started
        self._on_ended = on_ended
        self._python = python
        self._loop = asyncio.get_running_loop()
        self._executor = futures.ThreadPoolExecutor(_THREADS, "leasehold-workers")
        # Of its own: a copy takes as long as the disk does, and nobody's start is to wait for it.
        self._rotator = futures.ThreadPoolExecutor(_LOG_THREADS, "leasehold-logs")
        self._rotations: set[str] = set()
        self._watching = watching.Watching(self._loop, self._executor, on_ended=self._ended)
        self._scan = held.SessionScan(self._loop.time)
        self._workers: dict[str, Tracked] = {}
        self._quarantined: list[worker_values.Quarantined] = []
        self._readers: dict[int, Tracked] = {}
        self._is_closed = False
        #: When the host's OOM kills were read last, and what they were.
        self._host_oom_kills = (float("-inf"), 0)

    @property
    def quarantined(self) -> Sequence[worker_values.Quarantined]:
        """Records that `adopt` could not use, and what became of their workers."""
        return tuple(self._quarantined)

    def start(self, spec: worker_values.StartSpec) -> None:
        """Start a worker. `on_started` follows, or `on_ended` with NOT_STARTED.

        Raises `AlreadyExists` if a worker of this name or id still lives, `InvalidArgument` for a name or a
        command that is none.
        """
        model.checked_worker_name(spec.name, field_name="name")
        spawning.check(spec)
        folder = WorkerFolder(self._folder.workers / spec.worker_id)
        if not folder.is_named_by_uuid:
            raise errors.InvalidArgument(f"{spec.worker_id!r} is no UUID", field="worker_id")
        for other in self._workers.values():
            if other.worker_id == spec.worker_id or (other.intent.name == spec.name and not other.is_over):
                raise errors.AlreadyExists(f"{spec.name} still lives", metadata={"worker_id": other.worker_id})
        worker = Tracked(spawning.planned(spec), folder, activity.RunFolder(folder.run))
        self._workers[spec.worker_id] = worker
        spawn = self._loop.run_in_executor(
            self._executor,
            lambda: spawning.spawn(
                spec,
                folder,
                self.logs.path(spec.name),
                node=self._node,
                cgroups=self._cgroups,
                python=self._python,
            ),
        )
        spawn.add_done_callback(lambda done: self._spawned(worker, done))

    def signal(
        self,
        worker_id: str,
        name: str,
        scope: model.SignalScope,
        *,
        step: int,
        until_seconds: float,
        contract: model.StopContract,
        is_replaced: bool = False,
        why: str = "",
    ) -> bool:
        """Carry out a step of the stop contract; False if there is nobody to signal any more.

        `step` of `contract`, `until_seconds` (of the loop's clock), `is_replaced` and `why` are kept for the
        next one.
        Raises `InvalidArgument` if there is no such signal.
        """
        number = _signal_number(name)
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None or worker.is_over:
            return False
        worker.stop_why = why or worker.stop_why
        remaining = until_seconds - self._loop.time()
        # Before, for a signal that nobody knows of makes an ordered end a crash; after, for one that was only
        # meant to be sent ends nobody.
        self._note_stop(worker, contract, step, remaining, is_replaced, is_sent=False)
        is_there = self._send(worker.process, number, to_group=scope is model.SignalScope.GROUP)
        self._note_stop(worker, contract, step, remaining, is_replaced)
        return is_there

    def kill_all(self, worker_id: str, *, why: str = "") -> None:
        """SIGKILL every process of the worker, its shim excepted. One that is gone is no error.

        Of one that has not started yet the shim is killed, so that it never does.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.is_over:
            return
        worker.is_killed = True
        worker.stop_why = why or worker.stop_why
        target = worker.process or worker.shim
        if target is None:
            return  # it is being spawned, and killed as soon as that is done
        contract = worker.intent.stop
        self._note_stop(worker, contract, len(contract.steps), 0.0, is_replaced=False)
        self._send(target, signals.SIGKILL)
        if worker.cgroup is not None:
            worker.cgroup.kill()
        spared = () if worker.shim is None else (worker.shim.pid,)
        self._executor.submit(members.kill_all, worker.marks, worker.session, spared)

    def intent(self, worker_id: str) -> Intent | None:
        """What was to be started; None if there is no such worker."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.intent

    def clearing(self, worker_id: str) -> Callable[[], bool]:
        """Ends what a worker that is over left: for a thread, again and again until it returns True."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return lambda: True
        shim, cgroup, marks, session = worker.shim, worker.cgroup, worker.marks, worker.session
        folder = worker.folder

        def clear() -> bool:
            if shim is not None and watching.lives(shim):
                return False  # it does that itself, and may be killed only when its time is over
            if cgroup is not None and cgroup.pids():
                cgroup.kill()
                return False
            if not members.kill_all(marks, session, (), is_thorough=folder.is_locked()):
                return False
            return not folder.is_locked()  # by one that cannot be seen from here, it may still be

        return clear

    def keep_exit(self, worker_id: str, worker_exit: model.WorkerExit) -> None:
        """Keep how it ended, for the next agent. Failures are only logged."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        try:
            worker.folder.write_ended(worker_exit)
        except errors.LeaseholdError as error:
            _log.warning("exit_not_kept", worker=worker.intent.name, why=error.message)

    def forget(self, worker_id: str) -> None:
        """Remove what is kept of a worker that ended; its log stays. One that lives is left as it is.

        While its cgroup cannot be removed, its records stay too: the next agent tries it again by them.
        """
        worker = self._workers.get(worker_id)
        if worker is not None and worker.is_over:
            del self._workers[worker_id]
            if worker.cgroup is None or worker.cgroup.remove():
                self._executor.submit(worker.folder.remove)

    def adopt(self) -> list[worker_records.AdoptedWorker]:
        """Take over the workers of an earlier agent, the oldest of each pool first.

        Once, before the first `start`. A worker that died meanwhile comes with its exit, and what it left is
        ended. One that its shim is just starting has no process yet; `on_started` or `on_ended` follows.
        """
        survey = adoption.Surveyor(self._folder).survey()
        self._quarantined.extend(survey.quarantined)
        return [self._take_over(found) for found in survey.found]

    def held_bytes(self, worker_id: str) -> worker_values.Held:
        """What the worker holds. Cheap: meant for each sample."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None or worker.meter is None or worker.is_over:
            return worker_values.Held(0, None)
        worker.note_alive()
        return worker.meter.measure(worker.process.pid)

    def oom_kills(self, worker_id: str) -> int:
        """Processes of it that the OOM killer ended since this was asked last; it runs on itself.

        Meant for each sample. A kill is told two seconds after it, when it is clear that it was not the main
        process's.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.oom_counter is None or worker.is_over or worker.died_at is not None:
            return 0
        now = self._loop.time()
        worker.oom_counter.observe(now, self._oom_count(worker))
        if worker.cgroup is None:
            return 0
        count = worker.oom_counter.settled(now) - worker.oom_kills_told
        if count > 0:
            worker.oom_kills_told += count
            try:
                worker.folder.write_oom_kills_told(worker.oom_kills_told)
            except errors.LeaseholdError as error:
                _log.warning("oom_kills_not_noted", worker=worker.intent.name, why=error.message)
        return count

    def activity(self, worker_id: str) -> worker_values.Activity:
        """What the worker tells of itself. Cheap: meant for each sample."""
        worker = self._workers.get(worker_id)
        return worker_values.UNKNOWN_ACTIVITY if worker is None or worker.is_over else worker.run.activity()

    def status(self, worker_id: str) -> worker_values.ProcessStatus | None:
        """Its processes; None if there is no such worker."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return None
        return worker_values.ProcessStatus(
            process=None if worker.process is None else key(worker.process),
            shim=None if worker.shim is None or worker.is_over else key(worker.shim),
            limit_bytes=worker.intent.limit_bytes,
            is_limit_enforced=self.is_limit_enforced(worker_id),
            is_adopted=worker.is_adopted,
            log_path=self.logs.path(worker.intent.name),
        )

    def is_limit_enforced(self, worker_id: str) -> bool:
        """Whether the kernel ends what goes beyond the worker's limit; else that is the agent's."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.cgroup is not None and worker.intent.limit_bytes > 0

    def set_limit(self, worker_id: str, limit_bytes: int) -> bool:
        """Change a worker's limit (0: none); False where no cgroup enforces it or the kernel refuses."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.is_over:
            return False
        if worker.cgroup is not None:
            try:
                worker.cgroup.set_limit(limit_bytes)
            except errors.FailedPrecondition as error:
                _log.warning("limit_not_set", worker=worker.intent.name, why=error.message)
                return False
        worker.intent = dataclasses.replace(worker.intent, limit_bytes=limit_bytes)
        if worker.meter is not None:
            worker.meter.limit_bytes = limit_bytes
        with contextlib.suppress(errors.LeaseholdError):
            worker.folder.rewrite_intent(worker.intent)
        return worker.cgroup is not None

    def rotate_logs(self) -> None:
        """Rotate logs that are over their size, on a thread. Meant for every few seconds."""
        for worker in self._workers.values():
            name = worker.intent.name
            if not worker.is_over and name not in self._rotations:
                self._rotations.add(name)
                self._rotator.submit(self._rotate_log, name, worker.intent.log)

    def close(self) -> None:
        """Stop watching and give descriptors back. The workers go on. A start that has begun is finished."""
        self._is_closed = True
        self._watching.close()
        for descriptor in list(self._readers):
            self._close_reader(descriptor)
        self._executor.shutdown(wait=True)
        self._rotator.shutdown(wait=True, cancel_futures=True)

    # Inside

    def _rotate_log(self, name: str, settings: worker_values.LogSettings) -> None:
        try:
            self.logs.rotate(name, settings)
        finally:
            self._rotations.discard(name)

    def _spawned(self, worker: Tracked, done: "asyncio.Future[spawning.Spawned]") -> None:
        try:
            spawned = done.result()
        except Exception as error:  # noqa: BLE001  whatever it is, the machine must hear that it did not start
            if not self._is_closed:
                self._not_started(worker, str(error))
            return
        if self._is_closed:
            os.close(spawned.ready)
            return
        worker.intent, worker.shim, worker.cgroup = spawned.intent, spawned.shim, spawned.cgroup
        self._readers[spawned.ready] = worker
        self._loop.add_reader(spawned.ready, self._readable, spawned.ready)
        self._watching.watch(worker)
        if worker.is_killed:
            self.kill_all(worker.worker_id)

    def _readable(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 64)
        self._told(self._close_reader(descriptor))

    def _close_reader(self, descriptor: int) -> Tracked:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        return self._readers.pop(descriptor)

    def _told(self, worker: Tracked) -> None:
        """The shim has told, or is gone: whether the worker runs is in its records."""
        if worker.is_over:
            return
        record = noted = None
        with contextlib.suppress(records.Damaged):
            noted = worker.folder.read_exit()
            record = worker.folder.read_shim()
        if noted is not None and noted.failed_stage:
            self._watching.finish(worker, exits.judged(noted, exits.Circumstances()))
        elif record is None:
            self._not_started(worker, "its shim ended before it could start it")
        else:
            worker.process = record.process
            self._equip(worker)
            shim = None if worker.shim is None else key(worker.shim)
            self._on_started(worker.worker_id, key(record.process), shim)
            self._watching.watch(worker)
            if worker.is_killed:
                self.kill_all(worker.worker_id)

    def _equip(self, worker: Tracked) -> None:
        worker.meter = held.HeldMeter(
            worker.cgroup, self._scan, self._loop.time, limit_bytes=worker.intent.limit_bytes
        )
        count = self._oom_count(worker) if worker.cgroup is None else worker.oom_kills_told
        worker.oom_counter = kernel_counts.SettledCounter(count)

    def _not_started(self, worker: Tracked, detail: str) -> None:
        worker_exit = model.WorkerExit(cause=ExitCause.NOT_STARTED, detail=detail, end_time_seconds=time.time())
        self._watching.finish(worker, worker_exit)

    def _take_over(self, found: adoption.Found) -> worker_records.AdoptedWorker:
        intent, folder = found.intent, found.folder
        worker = Tracked(intent, folder, activity.RunFolder(folder.run), is_adopted=True)
        worker.process, worker.shim = found.process, found.shim
        worker.oom_kills_told = found.oom_kills_told
        worker.stop_why = "" if found.stopping is None else found.stopping.why
        worker.cgroup = None if intent.cgroup is None else cgroups.reopened(intent.cgroup, intent.worker_id)
        self._workers[intent.worker_id] = worker
        if found.exit is not None:
            worker.is_over = True
            # Of one that was counted, too: its agent may have gone before nothing was left of it.
            self._watching.sweep(worker)
        elif found.process is not None:
            self._equip(worker)
            self._watching.watch(worker)
        else:
            self._watching.watch(worker)
            self._watching.later(0.0, lambda: self._await_start(worker))
        uptime = 0.0 if found.process is None else kernel_counts.uptime_seconds(found.process.start_time_ticks)
        return worker_records.AdoptedWorker(
            worker_id=intent.worker_id,
            name=intent.name,
            pool=intent.pool,
            number=intent.number,
            start_number=intent.start_number,
            process=None if found.process is None else key(found.process),
            shim=None if found.shim is None else key(found.shim),
            uptime_seconds=uptime,
            limit_bytes=intent.limit_bytes,
            stop=intent.stop,
            stopping=found.stopping,
            exit=found.exit,
            is_exit_counted=found.is_exit_counted,
        )

    def _await_start(self, worker: Tracked) -> None:
        """An earlier agent's shim was starting it: its pipe went with that agent, so its records are read."""
        if worker.is_over or worker.process is not None:
            return
        is_locked = worker.folder.is_locked()
        is_told = False
        with contextlib.suppress(records.Damaged):
            is_told = worker.folder.read_shim() is not None or worker.folder.read_exit() is not None
        if is_told or not is_locked:
            self._told(worker)
        else:
            self._watching.later(_STARTING_EVERY_SECONDS, lambda: self._await_start(worker))

    def _note_stop(
        self,
        worker: Tracked,
        contract: model.StopContract,
        step: int,
        remaining: float,
        is_replaced: bool,
        *,
        is_sent: bool = True,
    ) -> None:
        try:
            worker.folder.write_stop(
                contract=contract,
                step=step,
                remaining_seconds=remaining,
                is_replaced=is_replaced,
                is_sent=is_sent,
                why=worker.stop_why,
            )
        except errors.LeaseholdError as error:
            _log.warning("stop_not_noted", worker=worker.intent.name, why=error.message)

    def _send(self, process: identities.ProcessIdentity, number: int, *, to_group: bool = False) -> bool:
        """Whether there was somebody to signal. One that may not be signalled is told in the log."""
        try:
            return members.send(process, number, to_group=to_group)
        except errors.LeaseholdError as error:
            _log.error("signal_failed", pid=process.pid, why=error.message)
            return True

    def _oom_count(self, worker: Tracked) -> int:
        """OOM kills so far: in the worker's cgroup, or else on the host, read once for all workers."""
        if worker.cgroup is not None:
            return worker.cgroup.oom_kills()
        read_at, count = self._host_oom_kills
        if self._loop.time() - read_at >= _HOST_COUNT_SECONDS:
            count = kernel_counts.host_oom_kills() or 0
            self._host_oom_kills = (self._loop.time(), count)
        return count

    def _ended(self, worker: Tracked, worker_exit: model.WorkerExit) -> None:
        self._on_ended(worker.worker_id, worker_exit)


def _signal_number(name: str) -> signals.Signals:
    try:
        return signals.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise errors.InvalidArgument(f"{name!r} is no signal", field="signal") from None
