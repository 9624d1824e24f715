"""Finds the workers of an earlier agent: what its records say, checked against the processes that there are.

A record that cannot be read is moved aside and told; it costs the rest nothing. Its worker, if it runs, is
found by the id in its environment and taken over with what that tells; where even that is not possible it is
told, with its PIDs, for a person to see to. No process is ever taken for a worker by its PID alone.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from leasehold.core import errors
from leasehold.core.node import model, worker_records
from leasehold.core.node.model import ExitCause
from leasehold.nodeagent import exits, members, records, state, worker_values
from leasehold.nodeagent.worker_folder import Intent, ShimRecord, WorkerFolder
from leasehold.observe import logs
from leasehold.runtime import identity as identities
from leasehold.runtime.identity import ProcessIdentity

_log = logs.get_logger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A worker that an earlier agent started."""

    folder: WorkerFolder
    intent: Intent
    #: None: it has ended, or its shim has not told yet.
    process: ProcessIdentity | None = None
    shim: ProcessIdentity | None = None
    #: None: it lives, or starts.
    exit: model.WorkerExit | None = None
    is_exit_counted: bool = False
    #: OOM kills in its cgroup that an earlier agent has told.
    oom_kills_told: int = 0
    stopping: worker_records.StopProgress | None = None


@dataclasses.dataclass(slots=True)
class Survey:
    """What was found."""

    found: list[Found] = dataclasses.field(default_factory=list)
    quarantined: list[worker_values.Quarantined] = dataclasses.field(default_factory=list)
    #: PIDs of every process with a worker's id in its environment, by that id.
    processes: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)


class Surveyor:
    """Looks through a state folder once."""

    def __init__(self, folder: state.StateFolder) -> None:
        self._state = folder
        self._survey = Survey(processes=members.find_all())
        self._boot_id = identities.boot_id()

    def survey(self) -> Survey:
        """Everything that is there, the oldest start first. Never raises for what one worker's files hold."""
        seen = set()
        for path in sorted(self._state.workers.iterdir()):
            folder = WorkerFolder(path)
            if not folder.is_named_by_uuid or not path.is_dir():
                moved = self._state.set_aside(path)
                self._tell(moved, path.name, "no worker's folder", "nothing is known of it")
                continue
            seen.add(folder.worker_id)
            self._add(folder)
        for worker_id, pids in sorted(self._survey.processes.items()):
            folder = WorkerFolder(self._state.workers / worker_id)
            run = members.environment(pids[0]).get("LEASEHOLD_RUN_DIR", "")
            if worker_id not in seen and folder.is_named_by_uuid and Path(run) == folder.run:
                self._tell(folder.path, worker_id, "its folder is gone", f"its processes are {pids}")
                self._add(folder)
        self._survey.found.sort(key=lambda found: (found.intent.pool, found.intent.start_number))
        return self._survey

    def _add(self, folder: WorkerFolder) -> None:
        try:
            found = self._examine(folder)
        except (OSError, errors.LeaseholdError) as error:
            self._tell(folder.path, folder.worker_id, str(error), "it was left as it is")
            return
        if found is not None:
            self._survey.found.append(found)

    def _examine(self, folder: WorkerFolder) -> Found | None:
        damages: list[str] = []
        intent = self._read(folder, "intent.json", folder.read_intent, damages)
        if intent is not None and intent.worker_id != folder.worker_id:
            self._set_aside(folder, "intent.json", f"it is of worker {intent.worker_id}", damages)
            intent = None
        told = self._read(folder, "shim.json", folder.read_shim, damages)
        ended = self._read(folder, "ended.json", folder.read_ended, damages)
        noted = self._read(folder, "exit", folder.read_exit, damages)
        if intent is None:
            intent = self._rebuilt(folder, told)
            if intent is None:
                self._give_up(folder, damages)
                return None
        found = Found(folder=folder, intent=intent)
        if ended is not None:
            return dataclasses.replace(found, exit=ended, is_exit_counted=True, shim=self._shim(folder))
        stopping = self._read(folder, "stop.json", folder.read_stop, damages)
        kills_told = self._read(folder, "oom-kills.json", folder.read_oom_kills_told, damages) or 0
        found = dataclasses.replace(found, stopping=stopping, oom_kills_told=kills_told)
        if noted is None:
            found = self._living(found, told)
            if found.exit is None:
                return found
            # Its shim, which is gone by now, may have written since.
            noted = self._read(folder, "exit", folder.read_exit, damages)
        if noted is None:
            return found
        around = exits.Circumstances(
            limit_bytes=intent.limit_bytes,
            oom_kills_told=kills_told,
            is_killed_by_agent=stopping is not None and stopping.step >= len(stopping.contract.steps),
        )
        return dataclasses.replace(found, exit=exits.judged(noted, around), shim=self._shim(folder))

    def _living(self, found: Found, told: ShimRecord | None) -> Found:
        """A worker whose end nobody has noted."""
        folder = found.folder
        shim = self._shim(folder)
        process = None
        if told is not None and not identities.is_local(told.process) and folder.is_locked():
            raise errors.FailedPrecondition(f"{told.process} cannot be seen from here, and its lock is held")
        if told is not None:
            process = self._own(folder, told.process)
            if (
                process is None
                and shim is not None
                and identities.is_local(told.process)
                and self._is_dead(told.process)
            ):
                # It died just now, or its shim is frozen: how it ended is still to be told.
                return dataclasses.replace(found, process=told.process, shim=shim)
        if process is None:
            process = self._main_by_token(folder)
        if process is not None:
            return dataclasses.replace(found, process=process, shim=shim)
        if shim is not None or (found.intent.boot_id == self._boot_id and folder.is_locked()):
            if told is None:
                return dataclasses.replace(found, shim=shim)
            pids = self._survey.processes.get(folder.worker_id, [])
            self._tell(
                folder.path, folder.worker_id, "its main process is not there", f"others hold its lock: {pids}"
            )
        if found.intent.boot_id != self._boot_id:
            return dataclasses.replace(found, exit=exits.unknown("the host was started anew", time.time()))
        if told is None:
            detail = "the agent ended before it was started"
            worker_exit = model.WorkerExit(
                cause=ExitCause.NOT_STARTED, detail=detail, end_time_seconds=time.time()
            )
            return dataclasses.replace(found, exit=worker_exit)
        detail = "it and its shim ended while no agent ran, so nobody saw how"
        return dataclasses.replace(found, exit=exits.unknown(detail, time.time()))

    def _own(self, folder: WorkerFolder, process: ProcessIdentity) -> ProcessIdentity | None:
        """The recorded process if it lives and certainly is the worker's."""
        if not identities.is_local(process) or self._is_dead(process):
            return None
        stat = members.stat_of(process.pid)
        if stat is None or stat.start_time_ticks != process.start_time_ticks:
            return None
        if members.Marks(folder.worker_id, folder.lock).is_on_thoroughly(stat):
            return process
        self._tell(folder.path, folder.worker_id, f"its record names {process}", "a stranger; it is left alone")
        return None

    def _is_dead(self, process: ProcessIdentity) -> bool:
        stat = members.stat_of(process.pid)
        return stat is None or stat.is_dead or stat.start_time_ticks != process.start_time_ticks

    def _shim(self, folder: WorkerFolder) -> ProcessIdentity | None:
        """The worker's shim, if it lives. Its environment is never overwritten, so that is all it needs."""
        stats = [members.stat_of(pid) for pid in self._survey.processes.get(folder.worker_id, [])]
        shims = [stat for stat in stats if stat is not None and not stat.is_dead and members.is_shim(stat.pid)]
        # The worker's own process looks like its parent until it executes its program.
        first = [stat for stat in shims if stat.parent not in {other.pid for other in shims}]
        if not first:
            return None
        stat = first[0]
        return ProcessIdentity(self._boot_id, identities.pid_namespace(), stat.pid, stat.start_time_ticks)

    def _main_by_token(self, folder: WorkerFolder) -> ProcessIdentity | None:
        """The leader of a session that has the worker's id in its environment and is not the shim."""
        stats = [members.stat_of(pid) for pid in self._survey.processes.get(folder.worker_id, [])]
        leaders = [
            stat
            for stat in stats
            if stat is not None
            and not stat.is_dead
            and stat.session == stat.pid
            and not members.is_shim(stat.pid)
        ]
        if not leaders:
            return None
        first = min(leaders, key=lambda stat: stat.start_time_ticks)
        return ProcessIdentity(self._boot_id, identities.pid_namespace(), first.pid, first.start_time_ticks)

    def _rebuilt(self, folder: WorkerFolder, told: ShimRecord | None) -> Intent | None:
        """What was to be started, from the environment and the command line of the processes that run."""
        name, pool, cgroup = "", "", ""
        argv: tuple[str, ...] = ()
        if told is not None:
            name, pool = told.name, told.pool
        for pid in self._survey.processes.get(folder.worker_id, []):
            environment = members.environment(pid)
            name = name or environment.get("LEASEHOLD_WORKER_NAME", "")
            pool = pool or environment.get("LEASEHOLD_POOL", "")
            if members.is_shim(pid):
                cgroup, argv = members.shim_arguments(pid)
        try:
            model.checked_worker_name(name)
            model.checked_pool_name(pool)
        except errors.InvalidArgument:
            return None
        intent = Intent(
            worker_id=folder.worker_id,
            name=name,
            pool=pool,
            number=int(name.partition("@")[0].replace("-", "_").rpartition("_")[2]),
            start_number=0,
            argv=argv,
            limit_bytes=0,
            boot_id=self._boot_id,
            cgroup=Path(cgroup) if cgroup else None,
            stop=model.PLAIN_STOP,
            log=worker_values.LogSettings(),
        )
        try:
            folder.rewrite_intent(intent)
        except errors.LeaseholdError as error:
            _log.warning("intent_not_rewritten", worker=name, why=error.message)
        return intent

    def _give_up(self, folder: WorkerFolder, damages: list[str]) -> None:
        pids = self._survey.processes.get(folder.worker_id, [])
        is_there = bool(pids) or folder.is_locked()
        if is_there:
            outcome = f"its processes run on and are not managed: {pids or 'their PIDs are not known'}"
        else:
            outcome = "no process of it runs"
        why = "; ".join(damages) or "there is no intent in it"
        path = folder.path if is_there else self._state.set_aside(folder.path)
        self._tell(path, folder.worker_id, why, outcome)

    def _read(
        self, folder: WorkerFolder, name: str, read: Callable[[], T | None], damages: list[str]
    ) -> T | None:
        try:
            return read()
        except records.Damaged as damage:
            self._set_aside(folder, name, str(damage), damages)
            return None

    def _set_aside(self, folder: WorkerFolder, name: str, why: str, damages: list[str]) -> None:
        damages.append(why)
        moved = self._state.set_aside(folder.path / name)
        self._tell(moved, folder.worker_id, why, "it was moved aside")

    def _tell(self, path: Path, worker_id: str, why: str, outcome: str) -> None:
        self._survey.quarantined.append(
            worker_values.Quarantined(path=path, worker_id=worker_id, why=why, outcome=outcome)
        )
        _log.error("worker_record_unusual", path=str(path), worker_id=worker_id, why=why, outcome=outcome)
