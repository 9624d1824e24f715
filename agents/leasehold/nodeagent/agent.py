"""The driver: one host's governor, pool machines and processes, on one event loop.

It obeys the contract of the machines: each event is fed with the time; the effects that it brought are executed
in order before the next event; what came of them is fed back. Decisions are made in the core: here is no rule
about memory or workers but that of carrying them out.
"""

import asyncio
import contextlib
import dataclasses
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Final

from leasehold.core import errors, processes
from leasehold.core.node import (
    governor,
    governor_effects,
    model,
    saved_modes,
    start_gate,
    worker_effects,
    worker_machine,
)
from leasehold.core.node import worker_records as records
from leasehold.nodeagent import cgroups as cgroups_module
from leasehold.nodeagent import config as configs
from leasehold.nodeagent import jobs as job_drivers
from leasehold.nodeagent import memory, messages, pools, state, worker_values
from leasehold.nodeagent import processes as process_sets
from leasehold.observe import logs
from leasehold.runtime import identity

SAMPLE_SECONDS: Final = 1.0
#: How often what could not be written is written again, and logs are looked at.
HOUSEKEEPING_SECONDS: Final = 5.0
SHIMS_SECONDS: Final = 30.0

_MODES: Final = "modes"
#: Effects bring effects; more rounds than this are a mistake of a machine.
_ROUNDS_MAX: Final = 1_000

_log = logs.get_logger(__name__)


class Agent:
    """The workers of one host. Use from the loop's own thread.

    `changed` is called after each event that may have changed what status shows; it must return at once.
    """

    def __init__(
        self,
        config: configs.Config,
        folder: state.StateFolder,
        cgroups: cgroups_module.Cgroups,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.config = config
        self.folder = folder
        self.cgroups = cgroups
        self.clock = clock
        self.pools: dict[str, pools.Pool] = {}
        self.sample: model.MemorySample | None = None
        #: What each worker holds, and how that was measured.
        self.held: dict[str, worker_values.Held] = {}
        self.started_at = clock()
        #: Workers are on their way out and none is started: the agent is about to end.
        self.is_ending = False
        self.is_drained = False
        #: Grows when a worker or a decision changed: what an allocator is told at once.
        self.revision = 0
        #: More for status to warn of; each gives a text, empty: nothing.
        self.problem_sources: list[Callable[[], str]] = []
        self.changed: Callable[[], None] = lambda: None
        self.processes = process_sets.Processes(
            folder, cgroups, node=config.node, on_started=self._started, on_ended=self._ended
        )
        self.jobs = job_drivers.Jobs(config, folder, cgroups, clock=clock, changed=lambda: self._jobs_changed())
        #: Jobs do not outlive this agent when it ends its workers at once.
        self.ends_jobs = False
        self._chance = chance
        self._gate = start_gate.StartGate(config.host.start_spacing_seconds)
        self.governor = self._new_governor()
        self._memory = memory.MemoryReader(_groups(config, cgroups))
        self._sample_seconds = SAMPLE_SECONDS
        self._next_sample_at = -math.inf
        self._next_check_at = -math.inf
        self._next_housekeeping_at = -math.inf
        self._modes: saved_modes.SavedModes | None = None
        self.modes_problem = ""
        self._next_shims_at = -math.inf
        self._shims_pss = 0
        self._wake = asyncio.Event()
        self._ended_event = asyncio.Event()
        self._is_settling = False

    # Life

    def adopt(self) -> list[records.AdoptedWorker]:
        """Make the pools, and take over the workers of an earlier agent. The first `tick` decides."""
        now = self.clock()
        for declared in self.config.pools:
            self.pools[declared.spec.name] = self._new_pool(declared.spec, declared)
        adopted = self.processes.adopt()
        for record in adopted:
            pool = self.pools.get(record.pool)
            if pool is None:
                pool = self.pools[record.pool] = self._new_pool(_left_over(record), None)
            try:
                pool.machine.adopt(now, record)
            except errors.LeaseholdError as error:
                _log.error("worker_not_adopted", worker=record.name, message=error.message)
        self._let_go_of_orphans(now)
        if self.governor.is_draining:
            self._begin_drain(now)
        self.jobs.adopt()
        self.settle(now)
        return adopted

    async def run(self) -> None:
        """Sample and decide until cancelled."""
        while True:
            self.tick()
            delay = max(0.0, self.next_deadline() - self.clock())
            self._wake.clear()
            try:
                async with asyncio.timeout(min(delay, 60.0)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def close(self) -> None:
        """Let go of everything. Workers go on."""
        for pool in self.pools.values():
            pool.close()
        self.processes.close()
        self.jobs.close()

    def tick(self) -> None:
        """Do what is due."""
        now = self.clock()
        if now >= self._next_sample_at:
            self.take_sample(now)
        self.governor.tick(now)
        for pool in self.pools.values():
            pool.machine.tick(now)
        if now >= self.jobs.machine.next_deadline():
            self.jobs.tick()
        if now >= self._next_housekeeping_at:
            self._next_housekeeping_at = now + HOUSEKEEPING_SECONDS
            self._keep_house()
        self.settle(now)

    def next_deadline(self) -> float:
        """When `tick` is due."""
        times = [self._next_sample_at, self._next_housekeeping_at, self.governor.next_deadline()]
        times.append(self.jobs.machine.next_deadline())
        times += [pool.machine.next_deadline() for pool in self.pools.values()]
        return min(times)

    def wake(self) -> None:
        """Something is due sooner than it was planned."""
        self._wake.set()

    # Events

    def take_sample(self, now: float) -> None:
        """Read the memory of the host and of each worker, and feed the governor."""
        self._next_sample_at = now + self._sample_seconds
        workers: dict[str, list[model.WorkerMemory]] = {}
        held: dict[str, worker_values.Held] = {}
        for pool in self.pools.values():
            workers[pool.name] = self._look_at(now, pool, held)
        self.held = held
        total = sum(each.bytes for each in held.values()) + self.jobs.sample()
        try:
            self.sample = self._memory.sample(
                held_bytes=total, budget_bytes=self.config.host.memory_budget_bytes
            )
        except errors.Unavailable as error:
            _log.error("memory_unread", message=error.message)
            return
        promised = dataclasses.replace(self.sample, promised_bytes=self.jobs.machine.promised_bytes)
        self.governor.sample(
            now, promised, {name: found for name, found in workers.items() if not self._is_orphan(name)}
        )
        self.settle(now)
        if now >= self._next_check_at:
            self._next_check_at = now + self.config.host.check_interval_seconds
            _log.info(messages.memory_line(self))
        self.changed()

    def _look_at(
        self, now: float, pool: pools.Pool, held: dict[str, worker_values.Held]
    ) -> list[model.WorkerMemory]:
        found = []
        for view in pool.machine.workers(now):
            if view.state not in model.ALIVE_STATES:
                continue
            measured = self.processes.held_bytes(view.worker_id)
            held[view.worker_id] = measured
            told = self.processes.activity(view.worker_id)
            pool.machine.activity(now, view.worker_id, told.is_busy, told.task_id, told.task_name)
            kills = self.processes.oom_kills(view.worker_id)
            if kills:
                pool.machine.oom_killed(now, view.worker_id, kills)
            found.append(
                model.WorkerMemory(
                    name=view.name,
                    state=view.state,
                    held_bytes=measured.bytes,
                    is_busy=told.is_busy,
                    start_number=view.start_number,
                    is_limit_enforced=self.processes.is_limit_enforced(view.worker_id),
                )
            )
        return found

    def told_depths(self, depths: Mapping[str, model.Depth]) -> None:
        """What waits in the pools' queues."""
        for name, depth in depths.items():
            if name in self.pools:
                self.pools[name].depth = depth
        now = self.clock()
        self.governor.depths(now, depths)
        self.settle(now)

    def _started(
        self, worker_id: str, process: processes.ProcessKey, shim: processes.ProcessKey | None
    ) -> None:
        now = self.clock()
        for pool in self.pools.values():
            pool.machine.started(now, worker_id, process, shim)
        self.settle(now)

    def _ended(self, worker_id: str, worker_exit: model.WorkerExit) -> None:
        now = self.clock()
        for pool in self.pools.values():
            pool.machine.ended(now, worker_id, worker_exit)
        self.held.pop(worker_id, None)
        # Memory came free: what it is now decides, not what it was.
        self._next_sample_at = min(self._next_sample_at, now)
        self.settle(now)
        self._ended_event.set()

    def _jobs_changed(self) -> None:
        self._wake.set()
        self._ended_event.set()
        self.changed()

    # Effects

    def settle(self, now: float) -> None:
        """Execute effects until there are none, and plan the next tick."""
        if self._is_settling:
            return  # called from within an effect: the round under way takes what it brought
        self._is_settling = True
        try:
            for _ in range(_ROUNDS_MAX):
                effects = self.governor.take_effects()
                for effect in effects:
                    self._govern(now, effect)
                count = len(effects)
                for pool in list(self.pools.values()):
                    taken = pool.machine.take_effects()
                    for each in taken:
                        self._carry_out(now, pool, each)
                    count += len(taken)
                if not count:
                    break
                self.revision += 1
            else:
                raise errors.LeaseholdError("machines bring effects without end")
        finally:
            self._is_settling = False
        self._wake.set()
        self.changed()

    def _govern(self, now: float, effect: governor_effects.Effect) -> None:
        if isinstance(effect, governor_effects.Resize):
            pool = self.pools.get(effect.pool)
            if pool is not None and not self.is_ending:
                before = pool.machine.desired
                pool.machine.resize(now, effect.desired, effect.is_urgent)
                if before != effect.desired:
                    had = before if before is not None else pool.machine.count(*model.ALIVE_STATES)
                    _log.info(
                        messages.scaling_line(had, effect.desired), **messages.decision_fields(effect.decision)
                    )
        elif isinstance(effect, governor_effects.Replace):
            self._on_worker(effect.worker, lambda machine: machine.replace(now, effect.worker, effect.reason))
        elif isinstance(effect, governor_effects.KillWorker):
            self._on_worker(effect.worker, lambda machine: machine.kill(now, effect.worker, effect.reason))
        elif isinstance(effect, governor_effects.SaveModes):
            self._modes = effect.modes
            self._save_modes()
        else:
            self._sample_seconds = effect.interval_seconds
            self._next_sample_at = min(self._next_sample_at, now + effect.interval_seconds)

    def _on_worker(self, name: str, act: Callable[[worker_machine.PoolMachine], None]) -> None:
        pool = self.pools.get(name.rpartition("@")[0].rpartition("_")[0])
        if pool is None:
            return
        with contextlib.suppress(errors.NotFound):  # it ended by itself in the meantime
            act(pool.machine)

    def _carry_out(self, now: float, pool: pools.Pool, effect: worker_effects.Effect) -> None:
        if isinstance(effect, worker_effects.Start):
            self._start(now, pool, effect)
        elif isinstance(effect, worker_effects.SendSignal):
            self.processes.signal(
                effect.worker_id,
                effect.signal,
                effect.scope,
                step=effect.step,
                until_seconds=effect.until_seconds,
                contract=effect.contract,
                is_replaced=effect.is_replaced,
            )
        elif isinstance(effect, worker_effects.KillAll):
            self.processes.kill_all(effect.worker_id)
        elif isinstance(effect, worker_effects.KeepExit):
            self.processes.keep_exit(effect.worker_id, effect.exit)
        elif isinstance(effect, worker_effects.Forget):
            self.processes.forget(effect.worker_id)
        else:
            messages.tell_note(effect)

    def _start(self, now: float, pool: pools.Pool, effect: worker_effects.Start) -> None:
        try:
            log_path = self.processes.logs.path(effect.name)
            self.processes.start(pool.start_spec(effect, log_path, self.config.environment))
        except errors.LeaseholdError as error:
            pool.machine.start_failed(now, effect.worker_id, error.message)

    # What a person wants

    def stop_all(self, *, is_immediate: bool, why: str, pool: str | None = None) -> None:
        """Stop all workers, or those of a pool, by their contracts."""
        now = self.clock()
        for each in self._chosen(pool):
            each.machine.stop_all(now, is_immediate=is_immediate, why=why)
        if self.ends_jobs and is_immediate and pool is None:
            self.jobs.stop_all(why)
        self.settle(now)

    def kill_all(self, why: str) -> None:
        """Kill every process of every worker."""
        _log.warning("workers_killed", why=why, workers=self.alive_count())
        for each in self.pools.values():
            for view in each.machine.workers(self.clock()):
                if view.state in model.ALIVE_STATES:
                    self.processes.kill_all(view.worker_id)
        if self.ends_jobs:
            self.jobs.kill_all()

    def end_starts(self) -> None:
        """No worker is started any more: the agent is about to end."""
        self.is_ending = True

    def set_draining(self, is_draining: bool) -> None:
        """Stop every worker by its contract and start none, or take work up again."""
        now = self.clock()
        self.is_drained = is_draining
        self.governor.set_draining(now, is_draining)
        if is_draining:
            self._begin_drain(now)
        self.settle(now)

    def _begin_drain(self, now: float) -> None:
        self.is_drained = True
        for pool in self.pools.values():
            pool.machine.stop_all(now, why="the node drains")

    @property
    def is_draining(self) -> bool:
        """Whether no worker is started, and those that run are on their way out."""
        return self.is_drained or self.is_ending

    def problems(self) -> list[str]:
        """What people should look at, memory apart."""
        found = [f"modes are not on disk: {self.modes_problem}"] if self.modes_problem else []
        found += [text for source in self.problem_sources if (text := source())]
        found += [
            f"a record that could not be read was moved to {each.path}: {each.why}; {each.outcome}"
            for each in (*self.processes.quarantined, *self.jobs.processes.quarantined)
        ]
        found += self.jobs.problems(self.sample)
        return found

    def shims_pss_bytes(self) -> int:
        """Proportional memory of the workers' shims, measured at most twice a minute."""
        now = self.clock()
        if now >= self._next_shims_at:
            self._next_shims_at = now + SHIMS_SECONDS
            keys = [view.shim for pool in self.pools.values() for view in pool.machine.workers(now)]
            self._shims_pss = sum(memory.pss_bytes(key.pid) for key in keys if key is not None)
        return self._shims_pss

    def alive_count(self) -> int:
        """Workers whose processes live, or may."""
        return sum(pool.machine.count(*model.ALIVE_STATES) for pool in self.pools.values())

    def unended_count(self) -> int:
        """What this agent has to see off before it ends: its workers, and its jobs where they go with it."""
        return self.alive_count() + (self.jobs.machine.alive_count if self.ends_jobs else 0)

    async def wait_ended(self, deadline: float) -> bool:
        """Wait until nothing is left to be seen off; False if `deadline` came first."""
        while self.unended_count():
            left = deadline - self.clock()
            if left <= 0:
                return False
            self._ended_event.clear()
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await self._ended_event.wait()
            except TimeoutError:
                pass
        return True

    def _chosen(self, pool: str | None) -> list[pools.Pool]:
        return list(self.pools.values()) if not pool else [self.pools[pool]]

    # Configuration

    def reconfigure(self, config: configs.Config) -> None:
        """Take over another configuration: pools, templates and settings. Workers that run go on."""
        now = self.clock()
        self.config = self.jobs.config = config
        self._gate.spacing_seconds = config.host.start_spacing_seconds
        declared = {pool.spec.name: pool for pool in config.pools}
        for name, pool in declared.items():
            known = self.pools.get(name)
            if known is None:
                self.pools[name] = self._new_pool(pool.spec, pool)
            else:
                known.machine.reconfigure(now, pool.spec)
                known.redeclare(pool)
                known.next_check_at, known.is_checked = now, False
        for name, left in self.pools.items():
            if name not in declared:
                left.redeclare(None)
        self.governor.reconfigure(now, config.host, tuple(pool.spec for pool in config.pools))
        self._let_go_of_orphans(now)
        self.settle(now)
        self.wake()

    def _new_pool(self, spec: model.PoolSpec, declared: configs.Pool | None) -> pools.Pool:
        machine = worker_machine.PoolMachine(
            spec, self.config.node, new_id=lambda: str(uuid.uuid4()), chance=self._chance, gate=self._gate
        )
        return pools.Pool(machine, declared, self.config.node)

    def _new_governor(self) -> governor.Governor:
        record = self.folder.read(_MODES)
        saved = None
        if record is not None:
            try:
                saved = saved_modes.SavedModes.decode(record.get("modes"))
            except errors.LeaseholdError as error:
                _log.error(
                    "modes_unreadable", message=error.message, instead="every pool is in its default mode"
                )
        specs = tuple(pool.spec for pool in self.config.pools)
        return governor.Governor(
            self.config.host, specs, now=self.clock(), saved=saved, boot_id=identity.boot_id()
        )

    def _is_orphan(self, name: str) -> bool:
        return self.pools[name].declared is None

    def _let_go_of_orphans(self, now: float) -> None:
        """Workers of a pool that is not declared any more are stopped by the contract that they began with."""
        for pool in self.pools.values():
            if pool.declared is None and pool.machine.desired != 0:
                pool.machine.stop_all(now, why="its pool is not declared any more")

    # Keeping

    def _save_modes(self) -> None:
        if self._modes is None:
            return
        try:
            self.folder.write(_MODES, {"modes": self._modes.encode()})
        except errors.LeaseholdError as error:
            if not self.modes_problem:
                _log.error("modes_not_written", message=error.message)
            self.modes_problem = error.message
        else:
            self.modes_problem = ""

    def _keep_house(self) -> None:
        if self.modes_problem:
            self._save_modes()
        self.processes.rotate_logs()
        self.jobs.keep_house()
        for name in [name for name in self.pools if self._is_orphan(name)]:
            if not self.pools[name].machine.workers(self.clock()):
                del self.pools[name]


def _left_over(record: records.AdoptedWorker) -> model.PoolSpec:
    """A pool for a worker whose own is not declared any more."""
    return model.PoolSpec(
        name=record.pool,
        template="",
        min_workers=0,
        max_workers=0,
        worker_limit_bytes=record.limit_bytes,
        threshold_bytes=0,
        stop=record.stop,
    )


def _groups(config: configs.Config, cgroups: cgroups_module.Cgroups) -> tuple[memory.Group, ...]:
    """Cgroups whose limits are the workers' too."""
    if config.workers_cgroup is not None and cgroups.kind is not cgroups_module.CgroupKind.NONE:
        found = memory.groups_of(config.workers_cgroup)
        if found:
            return found
    return memory.own_groups()
