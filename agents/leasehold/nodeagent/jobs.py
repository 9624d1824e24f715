"""The driver of jobs: one host's machine of attempts, and the processes that they are.

Attempts run as workers do, each under a shim of its own, and outlive the agent. Here is no rule about them but
that of carrying out what the machine (`core/node/job_machine.py`) decides.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Final

from leasehold.core import errors, processes
from leasehold.core.job import model
from leasehold.core.job.model import EndCause
from leasehold.core.node import job_effects, job_life, job_machine, worker_records
from leasehold.core.node import model as node_model
from leasehold.core.placement import model as placement
from leasehold.nodeagent import cgroups as cgroups_module
from leasehold.nodeagent import config as configs
from leasehold.nodeagent import job_logs, job_records, job_templates, state, worker_values
from leasehold.nodeagent import processes as process_sets
from leasehold.observe import logs
from leasehold.runtime import identity

_CLEAR_SECONDS: Final = 0.02
_CLEAR_SECONDS_MAX: Final = 1.0
_KEEP_SECONDS: Final = 5.0
_LOGS_SECONDS: Final = 300.0

_log = logs.get_logger(__name__)


class Jobs:
    """The jobs of one host. Use from the loop's own thread. `changed`: something may have changed."""

    def __init__(
        self,
        config: configs.Config,
        folder: state.StateFolder,
        cgroups: cgroups_module.Cgroups,
        *,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.machine = job_machine.JobMachine()
        self.held: dict[model.AttemptRef, worker_values.Held] = {}
        #: Why an end is not on disk; empty: all are.
        self.problem = ""
        self._clock = clock
        self._changed = changed
        self._folder = job_records.JobFolder(folder)
        self._folder.open()
        self._loop = asyncio.get_running_loop()
        self._executor = futures.ThreadPoolExecutor(1, "leasehold-jobs")
        self.processes = process_sets.Processes(
            self._folder, cgroups, node=config.node, on_started=self._started, on_ended=self._ended
        )
        self._refs: dict[str, model.AttemptRef] = {}
        self._commands: dict[model.AttemptRef, job_templates.Command] = {}
        self._is_settling = self._is_closed = False
        self._next_logs_at = clock() + _LOGS_SECONDS

    # Life

    def adopt(self) -> int:
        """Take over the attempts of an earlier agent, and the ends that were not taken; how many run."""
        for report in self._folder.read_ends():
            self.machine.restore_end(report)
        for record in self.processes.adopt():
            ref = model.AttemptRef.of_log_name(record.name)
            if ref is None or job_records.worker_id(ref) != record.worker_id:
                _log.error("job_not_adopted", name=record.name, worker_id=record.worker_id)
                continue
            self._refs[record.worker_id] = ref
            if self.machine.get(ref) is not None:
                self._leave_ended(record)
            else:
                self._take_over(ref, record)
        self.settle()
        return self.machine.alive_count

    def close(self) -> None:
        """Let go of everything. Jobs go on. An end that is being written is finished."""
        self._is_closed = True
        self.processes.close()
        self._executor.shutdown(wait=True)

    def tick(self) -> None:
        """Do what is due."""
        self.machine.tick(self._clock(), time.time())
        self.settle()

    def sample(self) -> int:
        """Measure what each job holds; the sum, in bytes."""
        now = self._clock()
        self.held = {}
        for life in list(self.machine.lives()):
            if not life.is_alive:
                continue
            worker_id = job_records.worker_id(life.ref)
            self.held[life.ref] = measured = self.processes.held_bytes(worker_id)
            is_enforced = self.processes.is_limit_enforced(worker_id)
            self.processes.oom_kills(
                worker_id
            )  # watched, so that the end's cause is known without a cgroup too
            self.machine.held(now, life.ref, measured.bytes, is_enforced=is_enforced)
        self.settle()
        return sum(held.bytes for held in self.held.values())

    def keep_house(self) -> None:
        """Rotate logs, and remove old ones."""
        self.processes.rotate_logs()
        now = self._clock()
        if now >= self._next_logs_at:
            self._next_logs_at = now + _LOGS_SECONDS
            known = {life.ref.log_name for life in self.machine.lives()}
            keep_seconds = self.config.jobs.log_keep_seconds
            self._executor.submit(job_logs.remove_old, self._folder.logs, known, keep_seconds)

    # From the leader

    def assign(self, assignments: Iterable[job_life.Assignment]) -> None:
        """Start attempts that are not known yet; what cannot be run here is told as not started."""
        for assignment in assignments:
            if self.machine.get(assignment.ref) is not None:
                continue
            try:
                command = job_templates.command(assignment, self.config.job_templates)
                stop = command.stop
            except errors.NotFound as error:
                # Another host may have it, and so may this one's next configuration.
                self.machine.refuse(time.time(), assignment.ref, error.message)
                continue
            except errors.LeaseholdError as error:
                self.machine.refuse(time.time(), assignment.ref, error.message, EndCause.REFUSED)
                continue
            if self.machine.assign(assignment, stop):
                self._commands[assignment.ref] = command
        self.settle()

    def refuse(self, refusals: Mapping[model.AttemptRef, str]) -> None:
        """Attempts that cannot be run here, and why: they never start."""
        for ref, why in refusals.items():
            self.machine.refuse(time.time(), ref, why)
        self.settle()

    def stop(self, refs: Iterable[model.AttemptRef]) -> None:
        """Have attempts end; those that were not heard of never start."""
        for ref in refs:
            self.machine.stop(self._clock(), time.time(), ref)
        self.settle()

    def forget(self, refs: Iterable[model.AttemptRef]) -> None:
        """The leader has committed these ends."""
        for ref in refs:
            self.machine.forget(ref)
        self.settle()

    # When the agent ends with all that it runs

    def stop_all(self, why: str) -> None:
        """End every attempt by its stop contract; that is not their fault, and they are told so."""
        now, wall = self._clock(), time.time()
        for life in list(self.machine.lives()):
            if life.is_alive:
                self.machine.stop(now, wall, life.ref, EndCause.NODE_LOST, why)
        self.settle()

    def kill_all(self) -> None:
        """Kill every process of every attempt."""
        self.machine.kill_all(self._clock(), EndCause.NODE_LOST, "the agent was told to end at once")
        self.settle()

    def problems(self, sample: node_model.MemorySample | None) -> list[str]:
        """What people should look at."""
        found = [f"the end of a job is not on disk: {self.problem}"] if self.problem else []
        settings, known = self.config.jobs, self.config.job_templates
        if known and not settings.is_running_jobs:
            found.append(
                "there are job templates, but no `jobs` that says what jobs may have: they get nothing"
            )
        if sample is not None and settings.total.memory_bytes > sample.total_bytes:
            found.append(
                f"jobs may have {settings.total.memory_bytes / node_model.GIB:.1f} GB together, "
                f"and this host has {sample.total_bytes / node_model.GIB:.1f}"
            )
        return found

    def is_alive(self, name: str) -> bool:
        """Whether an attempt of this name runs, or may."""
        ref = model.AttemptRef.of_log_name(name)
        life = None if ref is None else self.machine.get(ref)
        return life is not None and life.is_alive

    # Events

    def _started(
        self, worker_id: str, process: processes.ProcessKey, shim: processes.ProcessKey | None
    ) -> None:
        self.machine.started(self._clock(), time.time(), self._refs[worker_id], process.pid)
        self.settle()

    def _ended(self, worker_id: str, worker_exit: node_model.WorkerExit) -> None:
        intent = self.processes.intent(worker_id)
        is_rebooted = intent is not None and intent.boot_id != identity.boot_id()
        self.machine.ended(time.time(), self._refs[worker_id], worker_exit, is_rebooted=is_rebooted)
        self.settle()

    def settle(self) -> None:
        """Execute effects until there are none."""
        if self._is_settling or self._is_closed:
            return
        self._is_settling = True
        try:
            while effects := self.machine.take_effects():
                for effect in effects:
                    self._carry_out(effect)
        finally:
            self._is_settling = False
        self._changed()

    def _carry_out(self, effect: job_effects.Effect) -> None:
        if isinstance(effect, job_effects.Start):
            self._start(effect.assignment)
        elif isinstance(effect, job_effects.SendSignal):
            self.processes.signal(
                job_records.worker_id(effect.ref),
                effect.signal,
                effect.scope,
                step=effect.step,
                until_seconds=effect.until_seconds,
                contract=effect.contract,
                why=effect.why.value,
            )
        elif isinstance(effect, job_effects.Kill):
            self.processes.kill_all(job_records.worker_id(effect.ref), why=effect.why.value)
        elif isinstance(effect, job_effects.Clear):
            self._clear(effect.ref, self.processes.clearing(job_records.worker_id(effect.ref)), _CLEAR_SECONDS)
        elif isinstance(effect, job_effects.KeepEnd):
            self._keep_end(effect.report)
        elif isinstance(effect, job_effects.Forget):
            self._executor.submit(self._folder.remove_end, effect.ref)
        else:
            _log.info(effect.event, **effect.fields)

    def _start(self, assignment: job_life.Assignment) -> None:
        ref = assignment.ref
        worker_id = job_records.worker_id(ref)
        self._refs[worker_id] = ref
        try:
            spec = job_templates.start_spec(
                assignment,
                self._commands.pop(ref),
                worker_id=worker_id,
                node=self.config.node,
                log_path=self.processes.logs.path(ref.log_name),
                base=self.config.environment,
            )
            self.processes.start(spec)
        except errors.LeaseholdError as error:
            self.machine.start_failed(time.time(), ref, error.message)

    def _clear(self, ref: model.AttemptRef, clear: Callable[[], bool], pause: float) -> None:
        """Ask again and again, on the thread, whether nothing of it is left."""
        if self._is_closed:
            return
        if pause >= _CLEAR_SECONDS_MAX:
            _log.warning("job_left_processes", job_id=ref.job_id, attempt=ref.attempt)

        def asked(done: "asyncio.Future[bool]") -> None:
            if self._is_closed or done.cancelled():
                return
            if done.exception() is None and done.result():
                self.machine.cleared(time.time(), ref)
                self.settle()
                return
            longer = min(pause * 1.5, _CLEAR_SECONDS_MAX)
            self._loop.call_later(pause, self._clear, ref, clear, longer)

        self._loop.run_in_executor(self._executor, clear).add_done_callback(asked)

    def _keep_end(self, report: model.Report) -> None:
        if self._is_closed:
            return

        def kept(done: "asyncio.Future[None]") -> None:
            if self._is_closed or done.cancelled():
                return
            error = done.exception()
            if error is not None:
                self.problem = f"{report.ref.log_name}: {error}"
                _log.error("job_end_not_kept", job_id=report.ref.job_id, why=str(error))
                self._loop.call_later(_KEEP_SECONDS, self._keep_end, report)
                return
            self.problem = ""
            # Its end is kept apart now; what it was run with is not needed any more.
            worker_id = job_records.worker_id(report.ref)
            self.processes.forget(worker_id)
            self._refs.pop(worker_id, None)
            self.machine.end_kept(self._clock(), report.ref)
            self.settle()

        self._loop.run_in_executor(self._executor, self._folder.write_end, report).add_done_callback(kept)

    # Adoption

    def _leave_ended(self, record: worker_records.AdoptedWorker) -> None:
        """Its end was kept before: what is left of it goes, and it changes no end."""
        if record.exit is None:
            _log.error("job_runs_after_its_end", name=record.name)
            self.processes.kill_all(record.worker_id)
        else:
            self.processes.forget(record.worker_id)

    def _take_over(self, ref: model.AttemptRef, record: worker_records.AdoptedWorker) -> None:
        now, wall = self._clock(), time.time()
        intent = self.processes.intent(record.worker_id)
        life = job_life.AttemptLife(
            ref,
            held=placement.Resources(0 if intent is None else intent.cpus, record.limit_bytes),
            max_run_seconds=None if intent is None else intent.max_run_seconds,
            stop=record.stop,
        )
        if record.process is not None:
            life.started_at = now - record.uptime_seconds
            life.start_time_seconds = wall - record.uptime_seconds
        elif record.exit is not None and record.exit.cause is not node_model.ExitCause.NOT_STARTED:
            life.start_time_seconds = self._begun(record.worker_id)
        self.machine.adopt(now, wall, life, record.stopping)
        _log.info("job_adopted", job_id=ref.job_id, attempt=ref.attempt, is_over=record.exit is not None)
        if record.exit is not None:
            self._ended(record.worker_id, record.exit)

    def _begun(self, worker_id: str) -> float | None:
        """When an attempt that has ended was begun: its lock is made then, and never written again."""
        try:
            return (self._folder.workers / worker_id / "lock").stat().st_mtime
        except OSError:
            return None
