"""Agents as real processes on folders of their own, and what their workers did: for tests of the node agent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from leasehold.api.node.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    node_pb2,
    order_pb2,
    pool_pb2,
    worker_pb2,
)
from leasehold.rpc import errors as rpc_errors

PATIENCE_SECONDS = 60.0

#: A host of 400 MB with a reserve of 50 MB, for workers of 50 MB: 7 fit.
SETTINGS = {
    "MEMORY_BUDGET_GB": "0.390625",
    "SYSTEM_RESERVE_GB": "0.048828125",
    "MEMORY_HYSTERESIS_GB": "0.01",
    "MEMORY_THRESHOLD_GB": "0.05",
    "WORKER_MEMORY_LIMIT_GB": "0.048828125",
    "MEMORY_CHECK_INTERVAL": "0.5",
}
#: Ignores SIGTERM until its file `go` is there, then ends with its code; SIGINT ends it at once.
STUBBORN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
code = int(sys.argv[2]) if len(sys.argv) > 2 else 0
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
with open(folder / "ledger", "a") as ledger:
    ledger.write(f"begin {os.environ['WORKER_ID']} {os.getpid()}\\n")
while not (told and (folder / "go").exists()):
    time.sleep(0.02)
with open(folder / "ledger", "a") as ledger:
    ledger.write(f"end {os.environ['WORKER_ID']} {os.getpid()}\\n")
sys.exit(code)
"""


def until(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait for a condition that other processes bring about; what it returned."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


class AgentProcess:
    """One host's agent: started, asked, killed; another may follow on the same folder."""

    def __init__(
        self,
        folder: Path,
        yaml: str,
        *,
        settings: Mapping[str, str] = SETTINGS,
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self._prefix = prefix
        self.state = folder / "state"
        self.config = folder / "agent.yaml"
        self.write(yaml)
        self.settings = dict(settings)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "agent.log"

    def write(self, yaml: str) -> None:
        """Replace the configuration."""
        draft = self.folder / "draft.yaml"
        draft.write_text(yaml)
        draft.chmod(0o600)
        draft.replace(self.config)

    def start(self, *flags: str, wait: bool = True, stderr: int | None = None) -> None:
        """Start an agent; with `wait`, until it answers. Its log goes to `stderr`, else to a file."""
        command = [*self._prefix, sys.executable, "-m", "leasehold.nodeagent"]
        command += [f"--config={self.config}", "--node=here"]
        command += [f"--state-dir={self.state}", *(flags or ("--addr=none",))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if stderr is None else stderr,
                cwd=self.folder,
                env={**os.environ, **self.settings},
                start_new_session=True,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until it answers."""
        until(self._answers, "the agent answers")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended: {self.text()[-2000:]}"
        with contextlib.suppress(grpc.RpcError):
            return self.status().pid == self.process.pid
        return False

    @property
    def pid(self) -> int:
        """PID of the agent."""
        assert self.process is not None
        return self.process.pid

    def text(self) -> str:
        """Its log so far, of all agents of the folder."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Signal it."""
        os.kill(self.pid, number)

    def wait_end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        self.wait_end()

    @property
    def socket(self) -> Path:
        """Where it answers."""
        from leasehold.runtime import agent_paths

        return agent_paths.default_socket(self.state)

    @contextlib.contextmanager
    def stub(self) -> Iterator[agent_service_pb2_grpc.AgentServiceStub]:
        """Its service."""
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            yield agent_service_pb2_grpc.AgentServiceStub(channel)

    def status(self) -> agent_service_pb2.GetAgentStatusResponse:
        """Its status."""
        with self.stub() as stub:
            return stub.GetAgentStatus(agent_service_pb2.GetAgentStatusRequest(), timeout=5.0)

    def order(self, order_id: str = "", **kind: Any) -> order_pb2.OrderResult:
        """Give an order, as ``scale={"workers": 3}``; raises the core error that it is refused with."""
        order = json_format.ParseDict(kind, order_pb2.Order())
        order.order_id = order_id
        with self.stub() as stub:
            try:
                return stub.ExecuteOrder(
                    agent_service_pb2.ExecuteOrderRequest(order=order), timeout=10.0
                ).result
            except grpc.RpcError as error:
                raise rpc_errors.from_rpc_error(error) from error

    def pool(self, name: str | None = None) -> pool_pb2.PoolStatus:
        """One pool; the only one."""
        pools = self.status().status.pools
        return next(pool for pool in pools if name in (None, pool.name))

    def node(self) -> node_pb2.NodeStatus:
        """The node's part of the status."""
        return self.status().status

    def running(self, pool: str | None = None) -> dict[str, int]:
        """PIDs of running workers, by name."""
        return {
            worker.name: worker.process.pid
            for worker in self.pool(pool).workers
            if worker.state == worker_pb2.WORKER_STATE_RUNNING
        }

    def wait_running(self, count: int, pool: str | None = None) -> dict[str, int]:
        """Until so many workers run; their PIDs by name."""
        found: dict[str, int] = {}

        def are_there() -> bool:
            found.clear()
            found.update(self.running(pool))
            return len(found) == count

        until(are_there, f"{count} workers run")
        return found

    def worker(self, name: str) -> list[worker_pb2.WorkerStatus]:
        """All lives of a worker's name that are shown."""
        return [worker for worker in self.pool().workers if worker.name == name]

    def left(self) -> list[int]:
        """PIDs of this host's workers, whoever looks after them."""
        mark = f"LEASEHOLD_RUN_DIR={self.state}/".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes() and is_alive(int(folder.name)):
                    found.append(int(folder.name))
        return found

    def close(self) -> None:
        """End the agent and, by identity, every worker that it left."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        done = subprocess.run(
            [sys.executable, "-m", "leasehold.nodeagent", "--end-leftovers", str(self.state)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
