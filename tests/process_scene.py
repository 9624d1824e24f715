"""Real workers under real shims, for tests: an agent's part that handles them, in this process or in a child.

`Host` is that part in this process. Run as a program, this file is the same in a process that can be killed: it
starts one worker for each command line it is given, tells events as lines of JSON and goes on until it dies.
Nothing that was started outlives a test: `end_everything` finds it by the folder in its environment.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from leasehold.core import processes as core_processes
from leasehold.core.node import model, worker_records
from leasehold.nodeagent import cgroup_v1, cgroups, members, processes, state, worker_values
from leasehold.runtime.identity import ProcessIdentity

NODE = "test-host"
DEADLINE_SECONDS = 60.0


def python(code: str) -> tuple[str, ...]:
    """A worker that is a few lines of Python, and starts quickly."""
    return (sys.executable, "-I", "-S", "-c", code)


SLEEP = ("sleep", "1000")
#: Says when it is ready; does not end at TERM.
STUBBORN = python(
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(1000)"
)


def start_spec(number: int, argv: tuple[str, ...], **changes: Any) -> worker_values.StartSpec:
    """The worker ``pool_NUMBER``."""
    plain = worker_values.StartSpec(
        worker_id=str(uuid.uuid4()),
        name=model.worker_name("pool", number, NODE),
        pool="pool",
        number=number,
        start_number=number,
        argv=argv,
        env={"PATH": os.environ["PATH"]},
    )
    return dataclasses.replace(plain, **changes)


def identity(key: core_processes.ProcessKey | None) -> ProcessIdentity:
    assert key is not None
    return ProcessIdentity(key.boot_id, key.pid_namespace, key.pid, key.start_time_ticks)


def is_alive(process: ProcessIdentity) -> bool:
    stat = members.stat_of(process.pid)
    return stat is not None and not stat.is_dead and stat.start_time_ticks == process.start_time_ticks


def proc_text(process: ProcessIdentity, name: str) -> str:
    return Path(f"/proc/{process.pid}/{name}").read_text()


async def until(condition: Callable[[], Any], what: str, *, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)
    return value


class Host:
    """The agent's part that handles worker processes; `successor` is the one after a restart."""

    def __init__(self, path: Path, *, made_in: cgroups.Cgroups | None = None) -> None:
        self.path = path
        self.cgroups = made_in or cgroups.NoCgroups()
        self.folder = state.StateFolder(path)
        self.folder.open()
        self.started: dict[str, tuple[ProcessIdentity, ProcessIdentity | None]] = {}
        self.ended: dict[str, model.WorkerExit] = {}
        self.ended_at: dict[str, float] = {}
        self.processes = processes.Processes(
            self.folder, self.cgroups, node=NODE, on_started=self._on_started, on_ended=self._on_ended
        )
        self.adopted: list[worker_records.AdoptedWorker] = self.processes.adopt()

    def _on_started(
        self, worker_id: str, process: core_processes.ProcessKey, shim: core_processes.ProcessKey | None
    ) -> None:
        assert worker_id not in self.started, "started twice"
        self.started[worker_id] = (identity(process), None if shim is None else identity(shim))

    def _on_ended(self, worker_id: str, worker_exit: model.WorkerExit) -> None:
        assert worker_id not in self.ended, "ended twice"
        self.ended[worker_id] = worker_exit
        self.ended_at[worker_id] = time.monotonic()

    async def start(self, number: int, argv: tuple[str, ...], **changes: Any) -> str:
        """Start a worker and wait until it runs; its id."""
        spec = start_spec(number, argv, **changes)
        self.processes.start(spec)
        await until(lambda: spec.worker_id in self.started, f"{spec.name} starts: {self.ended}")
        return spec.worker_id

    async def run(self, number: int, argv: tuple[str, ...], **changes: Any) -> model.WorkerExit:
        """Start a worker and wait until it has ended, or could not be started."""
        spec = start_spec(number, argv, **changes)
        self.processes.start(spec)
        return await self.end_of(spec.worker_id)

    async def end_of(self, worker_id: str, *, seconds: float = DEADLINE_SECONDS) -> model.WorkerExit:
        await until(lambda: worker_id in self.ended, "the worker's end is told", seconds=seconds)
        return self.ended[worker_id]

    def main(self, worker_id: str) -> ProcessIdentity:
        return self.started[worker_id][0]

    def shim(self, worker_id: str) -> ProcessIdentity:
        shim = self.started[worker_id][1]
        assert shim is not None
        return shim

    def worker_folder(self, worker_id: str) -> Path:
        return self.folder.workers / worker_id

    def log(self, number: int) -> str:
        path = self.processes.logs.path(model.worker_name("pool", number, NODE))
        return path.read_text() if path.exists() else ""

    def signal(self, worker_id: str, name: str, scope: model.SignalScope = model.SignalScope.MAIN) -> bool:
        until_seconds = asyncio.get_running_loop().time() + 30.0
        return self.processes.signal(
            worker_id, name, scope, step=0, until_seconds=until_seconds, contract=model.PLAIN_STOP
        )

    def leave(self) -> None:
        """End as an agent does that leaves its workers to the next."""
        self.processes.close()
        self.folder.close()

    def successor(self) -> "Host":
        """The next agent on the same folder."""
        self.leave()
        return Host(self.path, made_in=self.cgroups)


def own_cgroups() -> cgroups.Cgroups:
    """Cgroups below this process's own, apart from those of tests that run beside."""
    found = cgroups.detect()
    if found.kind is not cgroups.CgroupKind.V1:
        return found
    return cgroup_v1.V1Cgroups(Path(found.detail).with_name(f"leasehold-test-{uuid.uuid4()}"))


def pids_below(path: Path) -> list[int]:
    """Living processes, shims included, whose run folder is below `path`."""
    found = []
    for stat in members.all_stats():
        run = "" if stat.is_dead else members.environment(stat.pid).get("LEASEHOLD_RUN_DIR", "")
        if run.startswith(f"{path}/"):
            found.append(stat.pid)
    return found


def end_everything(path: Path, made_in: cgroups.Cgroups | None = None) -> None:
    """Kill what was started below `path`, by its environment, and remove its cgroups."""
    deadline = time.monotonic() + 10.0
    while pids := pids_below(path):
        assert time.monotonic() < deadline, f"still there: {pids}"
        for pid in pids:
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(pid)
                try:
                    run = members.environment(pid).get("LEASEHOLD_RUN_DIR", "")
                    if run.startswith(f"{path}/"):
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                finally:
                    os.close(descriptor)
        time.sleep(0.01)
    if made_in is not None and made_in.kind is not cgroups.CgroupKind.NONE:
        root = Path(made_in.detail)
        while root.exists():
            for folder in (*root.glob("worker-*"), root):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            assert time.monotonic() < deadline, f"{root} is not empty"
            time.sleep(0.01)


class ChildAgent:
    """A `Host` in a process of its own, that can be killed."""

    def __init__(self, path: Path, *commands: tuple[str, ...]) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, __file__, str(path), json.dumps(commands)], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._popen.pid
        #: Worker ids, in the order of the commands, with their main processes and shims.
        self.workers: list[tuple[str, ProcessIdentity, ProcessIdentity]] = []
        assert self._popen.stdout is not None
        for _ in commands:
            told = json.loads(self._popen.stdout.readline())
            main, shim = ProcessIdentity(**told["main"]), ProcessIdentity(**told["shim"])
            self.workers.append((told["worker_id"], main, shim))

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


@contextlib.contextmanager
def child_agent(path: Path, *commands: tuple[str, ...]) -> Iterator[ChildAgent]:
    """A child agent whose workers run; it is killed at the end, if it was not before."""
    agent = ChildAgent(path, *commands)
    try:
        yield agent
    finally:
        agent.kill()


async def _serve(path: Path, commands: list[list[str]]) -> None:
    host = Host(path)
    for number, command in enumerate(commands, start=1):
        worker_id = await host.start(number, tuple(command))
        told = {
            "worker_id": worker_id,
            "main": dataclasses.asdict(host.main(worker_id)),
            "shim": dataclasses.asdict(host.shim(worker_id)),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), json.loads(sys.argv[2])))
