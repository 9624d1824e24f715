"""Many agents one after the other, each killed, over workers that end, freeze and lose their shims at random.

What each worker did is in a ledger that it writes itself. A failing run prints its seed.
"""

import asyncio
import random
import signal
import sys
import time
from pathlib import Path

import process_scene
import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause
from leasehold.nodeagent import members
from process_scene import Host, until

#: Notes its start, ends with a code of its own after a while, and notes that first.
WORKER = """
import os, sys, time
ledger = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
seconds, code = float(sys.argv[2]), int(sys.argv[3])
who = os.environ["LEASEHOLD_WORKER_ID"]
os.write(ledger, f"start {who} {os.getpid()}\\n".encode())
time.sleep(seconds)
os.write(ledger, f"end {who} {code}\\n".encode())
os._exit(code)
"""


class Chaos:
    """One run: faults by a seed, and what was told of each worker."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.ledger = folder / "ledger"
        self.chance = random.Random(seed)
        self.names: dict[str, int] = {}
        self.told: dict[str, model.WorkerExit] = {}
        self.lost_shims: set[str] = set()
        self.signalled: set[str] = set()
        self.ending: set[str] = set()
        self.host = Host(folder / "state")

    def note(self) -> None:
        """Take over what the present agent was told; nothing may be told twice, or otherwise."""
        for worker_id, worker_exit in self.host.ended.items():
            if worker_id not in self.told:
                self.told[worker_id] = worker_exit
                self.host.processes.keep_exit(worker_id, worker_exit)

    def start(self) -> None:
        number = self.chance.randint(1, 12)
        code = self.chance.choice([0, 1, 7])
        seconds = self.chance.choice([0.0, 0.02, 0.2, 1000.0])
        command = (sys.executable, "-I", "-S", "-c", WORKER, str(self.ledger), str(seconds), str(code))
        spec = process_scene.start_spec(number, command)
        try:
            self.host.processes.start(spec)
        except errors.AlreadyExists:
            return
        self.names[spec.worker_id] = number

    def living(self) -> list[str]:
        return [worker_id for worker_id in self.host.started if worker_id not in self.host.ended]

    def harm(self) -> None:
        """Something happens to a worker or its shim."""
        if not (living := self.living()):
            return
        worker_id = self.chance.choice(living)
        main, shim = self.host.started[worker_id]
        match self.chance.choice(["stop", "kill", "kill_all", "freeze_shim", "kill_shim", "freeze"]):
            case "stop":
                self.host.signal(worker_id, "TERM")
                self.signalled.add(worker_id)
            case "kill":
                members.send(main, signal.SIGKILL)
                self.signalled.add(worker_id)
            case "kill_all":
                self.host.processes.kill_all(worker_id)
                self.signalled.add(worker_id)
            case "freeze":
                members.send(main, signal.SIGSTOP)
            case "freeze_shim" if shim is not None:
                members.send(shim, signal.SIGSTOP)
            case "kill_shim" if shim is not None:
                members.send(shim, signal.SIGKILL)
                self.lost_shims.add(worker_id)

    def succeed(self) -> None:
        """The agent goes without a word (its descriptors close as the kernel closes them), another comes."""
        before = {worker_id: self.host.started[worker_id] for worker_id in self.living()}
        self.note()
        known = dict(self.host.ended)
        self.host.leave()
        for worker_id, worker_exit in self.host.ended.items():
            self.told.setdefault(worker_id, worker_exit)
        self.host = Host(self.folder / "state")
        adopted = {worker.worker_id: worker for worker in self.host.adopted}
        for worker_id, (main, _) in before.items():
            assert worker_id in adopted, "a running worker was not adopted"
            found = adopted[worker_id]
            if found.exit is None:
                assert found.process is None or process_scene.identity(found.process) == main
                assert found.process is not None, "a worker that had started is told as starting"
        for worker_id, worker in adopted.items():
            if worker.process is not None and worker.exit is None:
                shim = None if worker.shim is None else process_scene.identity(worker.shim)
                self.host.started[worker_id] = (process_scene.identity(worker.process), shim)
            if worker.exit is not None and not worker.is_exit_counted:
                assert worker_id not in known or known[worker_id] == worker.exit
                self.told.setdefault(worker_id, worker.exit)
                self.host.processes.keep_exit(worker_id, worker.exit)
        assert self.host.processes.quarantined == ()

    def is_all_told(self) -> bool:
        """End what runs, late starters too; whether every end was told."""
        for worker_id in set(self.living()) - self.ending:
            self.host.processes.kill_all(worker_id)
            self.ending.add(worker_id)
            self.signalled.add(worker_id)
        self.note()
        return set(self.told) >= set(self.names)

    async def finish(self) -> None:
        """End what still runs, and hear of every end."""
        await until(self.is_all_told, "every end is told", seconds=40.0)
        await until(lambda: process_scene.pids_below(self.folder) == [], "nothing is left")

    def judge(self) -> None:
        """What was told, against the ledger."""
        lines = [line.split() for line in self.ledger.read_text().splitlines()] if self.ledger.exists() else []
        started = [who for what, who, _ in lines if what == "start"]
        ended = {who: int(code) for what, who, code in lines if what == "end"}
        assert len(set(started)) == len(started), "a worker ran twice"
        assert set(started) <= set(self.names)
        for worker_id, worker_exit in self.told.items():
            if worker_exit.cause is ExitCause.UNKNOWN:
                assert worker_id in self.lost_shims, f"{worker_id}: {worker_exit}"
            elif worker_exit.exit_code is not None:
                assert ended[worker_id] == worker_exit.exit_code
            elif worker_exit.cause is ExitCause.NOT_STARTED:
                assert worker_id not in ended
            else:
                assert worker_exit.signal in (signal.SIGTERM, signal.SIGKILL)
                assert worker_id in self.signalled


@pytest.mark.parametrize(
    "seed", [pytest.param(1), *(pytest.param(n, marks=pytest.mark.soak) for n in range(2, 12))]
)
async def test_no_end_is_lost_or_wrong_and_no_worker_runs_twice(tmp_path: Path, seed: int) -> None:
    chaos = Chaos(tmp_path, seed)
    try:
        begun_at = time.monotonic()
        while (passed := time.monotonic() - begun_at) < 4.0 or len(chaos.names) <= 20:
            assert passed < process_scene.DEADLINE_SECONDS, "this host is too slow to start 20 workers"
            act = chaos.chance.choices([chaos.start, chaos.harm, chaos.succeed], [6, 3, 1])[0]
            act()
            await asyncio.sleep(chaos.chance.choice([0.0, 0.0, 0.005, 0.03]))
            chaos.note()
        await chaos.finish()
        chaos.judge()
    finally:
        chaos.host.leave()
        process_scene.end_everything(tmp_path)
