"""What stands under the jobs' scene: etcd, Postgres, two allocators, and four agents on this one machine."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import grpc
from leasehold import devstack
from leasehold.api.node.v1 import agent_service_pb2, agent_service_pb2_grpc
from leasehold.core import errors
from leasehold.demo import job_plan, stack
from leasehold.devstack import owner
from leasehold.runtime import agent_paths

#: In the folder that is given: everything that a run makes.
RUN = "run"
STACK = "stack"
READY_SECONDS = 30.0
CALL_SECONDS = 1.0
LEFTOVERS_SECONDS = 60.0


class Hosts:
    """The agents, each with a state folder of its own, and the allocators that they follow."""

    def __init__(self, parts: devstack.Stack, folder: pathlib.Path, states: pathlib.Path) -> None:
        self.journal = folder / "journal"
        self.postgres_dsn = parts.postgres_dsn
        self.allocators: dict[str, devstack.Child] = {}
        self._parts = parts
        self._folder = folder
        self._states = states
        self._agents: dict[str, devstack.Child] = {}

    def start(self, announce: Callable[[str], None]) -> None:
        """Two allocators, then the agents."""
        self.journal.unlink(missing_ok=True)
        self.journal.touch()
        (self._folder / "job.sh").write_text(job_plan.PROGRAM, encoding="utf-8")
        for number in (1, 2):
            child, address = stack.spawn_allocator(self._parts, f"allocator-{number}")
            self.allocators[address] = child
        for address, child in self.allocators.items():
            stack.wait_for_allocator(child, address, announce)
        for node in job_plan.NODES:
            self.start_agent(node)

    def start_agent(self, node: str) -> None:
        """Start a host's agent, which adopts what a former one has left; returns when it answers."""
        config = self._folder / f"{node}.yaml"
        config.write_text(job_plan.agent_yaml(node, self._folder), encoding="utf-8")
        config.chmod(0o600)
        state = self._states / node
        command = [sys.executable, "-m", "leasehold.nodeagent", f"--config={config}", f"--state-dir={state}"]
        command.append(f"--addr={','.join(self.allocators)}")
        inherited = {name: text for name, text in os.environ.items() if name != agent_paths.SOCKET_VARIABLE}
        child = self._parts.spawn(node, command, env=inherited)
        socket = agent_paths.default_socket(state)
        child.wait_until(lambda: _answers(socket), timeout_seconds=READY_SECONDS, cancel=threading.Event())
        self._agents[node] = child

    def kill_agent(self, node: str) -> None:
        """SIGKILL to a host's agent alone."""
        os.kill(self._agents.pop(node).pid, signal.SIGKILL)

    def kill_allocator(self, address: str) -> None:
        """SIGKILL to an allocator."""
        os.kill(self.allocators.pop(address).pid, signal.SIGKILL)

    def end_leftovers(self) -> None:
        """End whatever still runs of the jobs, by identity. Raises `Unavailable` if something does not end."""
        for state in self._states.iterdir():
            done = subprocess.run(
                [sys.executable, "-m", "leasehold.nodeagent", "--end-leftovers", str(state)],
                capture_output=True,
                text=True,
                timeout=LEFTOVERS_SECONDS,
                check=False,
            )
            if done.returncode != 0:
                raise errors.Unavailable(done.stderr.strip() or f"what {state} has left does not end")


@contextlib.contextmanager
def hosts(folder: pathlib.Path, announce: Callable[[str], None]) -> Iterator[Hosts]:
    """The hosts with everything under them, for as long as the block lasts; no process outlives it.

    Each run begins with an empty database: what is judged is this run's alone. Raises `Unavailable` if a part
    does not come up, `FailedPrecondition` if the folder is another run's, or not a scene's.
    """
    with (
        _emptied(folder / RUN, announce) as own,
        # A path of a Unix socket has at most 107 bytes.
        tempfile.TemporaryDirectory(prefix="leasehold-") as states,
        contextlib.ExitStack() as after,
        devstack.Stack(own / STACK, announce=announce) as parts,
    ):
        found = Hosts(parts, own, pathlib.Path(states))
        # Called once the agents have ended.
        after.callback(found.end_leftovers)
        found.start(announce)
        yield found


@contextlib.contextmanager
def _emptied(own: pathlib.Path, announce: Callable[[str], None]) -> Iterator[pathlib.Path]:
    """A folder of one run at a time, without what earlier ones have left. Nothing else is cleared, ever."""
    lock = own / owner.FILE_NAME
    if own.exists() and not lock.exists() and any(own.iterdir()):
        raise errors.FailedPrecondition(f"--folder: {own} has files that no run has made; choose another")
    with devstack.Owner(own):
        # First: what a killed run has left is on record there.
        devstack.end_leftovers(own / STACK, announce=announce)
        for path in own.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != lock:
                path.unlink()
        yield own.absolute()


def _answers(socket: pathlib.Path) -> bool:
    if not socket.exists():
        return False
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            agent_service_pb2_grpc.AgentServiceStub(channel).GetAgentStatus(
                agent_service_pb2.GetAgentStatusRequest(), timeout=CALL_SECONDS
            )
        except grpc.RpcError:
            return False
    return True
