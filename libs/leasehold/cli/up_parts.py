"""What `leasehold up` starts beside the allocators: the gateway, and an agent whose workers end with it."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import grpc
from leasehold import devstack
from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc as wire_grpc
from leasehold.cli import output
from leasehold.core import errors
from leasehold.devstack import ports as devports
from leasehold.runtime import agent_paths

READY_SECONDS = 30.0
READY_CALL_SECONDS = 1.0
#: The agent's: its workers give their tasks back meanwhile.
AGENT_STOP_SECONDS = 45.0
LEFTOVERS_SECONDS = 90.0

EXAMPLE_AGENT = "example-agent.yaml"


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be started: the port of the gateway and the agent's file; None: none of it."""

    http_port: int | None = None
    agent_config: pathlib.Path | None = None


def agent_config(given: str | None) -> pathlib.Path:
    """The agent's configuration: the given file, else the example.

    Raises `InvalidArgument` for one that is wrong, or whose file others can write.
    """
    from leasehold.nodeagent import config

    path = _example() if given is None else pathlib.Path(given).absolute()
    config.load({"LEASEHOLD_AGENT_CONFIG": str(path), "LEASEHOLD_STATE_DIR": os.devnull})
    return path


def is_example(config: pathlib.Path) -> bool:
    """Whether an agent's configuration is the example, which has a template for jobs."""
    return config == _example()


def _example() -> pathlib.Path:
    from leasehold import nodeagent

    return pathlib.Path(nodeagent.__file__).with_name(EXAMPLE_AGENT)


def state_dir(data_dir: pathlib.Path) -> pathlib.Path:
    """The agent's state folder."""
    return data_dir / "agent"


def start_gateway(stack: devstack.Stack, port: int, addresses: Sequence[str]) -> devstack.Child:
    """Serve HTTP on 127.0.0.1; returns when it does."""
    command = [sys.executable, "-m", "leasehold.gateway", "--listen", f"{devports.HOST}:{port}"]
    child = stack.spawn("gateway", command, env={**os.environ, "LEASEHOLD_ADDR": ",".join(addresses)})
    child.wait_until(
        functools.partial(_listens, port), timeout_seconds=READY_SECONDS, cancel=threading.Event(), port=port
    )
    return child


def spawn_agent(
    stack: devstack.Stack,
    config: pathlib.Path,
    addresses: Sequence[str],
    *,
    adopts: bool = False,
    env: Mapping[str, str] | None = None,
) -> devstack.Child:
    """Start an agent whose workers end with it.

    What a killed one has left is ended first, or (`adopts`) is there for it to adopt. `env` is added to this
    process's own.
    """
    folder = state_dir(stack.data_dir)
    if not adopts:
        end_leftovers(stack.data_dir)
    command = [sys.executable, "-m", "leasehold.nodeagent", "--ephemeral", f"--config={config}"]
    command += [f"--state-dir={folder}", f"--addr={','.join(addresses)}"]
    inherited = {name: text for name, text in os.environ.items() if name != agent_paths.SOCKET_VARIABLE}
    return stack.spawn("agent", command, env={**inherited, **(env or {})})


def wait_for_agent(child: devstack.Child, data_dir: pathlib.Path) -> None:
    """Wait until it answers. Raises `Unavailable` with the end of its log if it does not."""
    is_ready = functools.partial(_answers, agent_socket(data_dir))
    child.wait_until(is_ready, timeout_seconds=READY_SECONDS, cancel=threading.Event())


def agent_socket(data_dir: pathlib.Path) -> pathlib.Path:
    """Where the agent answers."""
    return agent_paths.default_socket(state_dir(data_dir))


def end_leftovers(data_dir: pathlib.Path) -> bool:
    """End the workers that a killed agent left, by identity; whether there were any.

    Raises `Unavailable` if some do not end.
    """
    folder = state_dir(data_dir)
    workers = folder / "workers"
    if not workers.is_dir() or not any(workers.iterdir()):
        return False
    command = [sys.executable, "-m", "leasehold.nodeagent", "--end-leftovers", str(folder)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LEFTOVERS_SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise errors.Unavailable(f"workers of {folder} did not end in {LEFTOVERS_SECONDS:g} s") from None
    if done.returncode != 0:
        raise errors.Unavailable(done.stderr.strip() or f"workers of {folder} could not be ended")
    if not done.stdout.startswith("ended"):
        return False
    output.say(done.stdout.strip())
    return True


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((devports.HOST, port), READY_CALL_SECONDS):
        return True
    return False


def _answers(path: pathlib.Path) -> bool:
    if not path.exists():
        return False
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            wire_grpc.AgentServiceStub(channel).GetAgentStatus(
                wire.GetAgentStatusRequest(), timeout=READY_CALL_SECONDS
            )
        except grpc.RpcError:
            return False
    return True
