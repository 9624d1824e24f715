"""`python -m leasehold.manage workers | worker-status | stop-workers`: this host's workers in three commands.

`workers` runs the agent of this host in the foreground, or, where one runs, starts the pools that were stopped.
`worker-status` prints what the agent knows. `stop-workers` stops every pool; the agent goes on, and `workers`
starts them again. All three speak to the agent's own socket, so that they work while the allocator is away.
Exit codes are those of `leasehold`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from leasehold.cli import connection, output
from leasehold.core import errors
from leasehold.core.node import model

CALL_SECONDS: Final = 5.0
#: As long as a task may take, and its broker a while more.
WAIT_SECONDS: Final = 3660.0
_LOOK_SECONDS: Final = 0.2

_EXIT_FAILED: Final = 1
_EXIT_UNREACHABLE: Final = 3
_EXIT_INTERRUPTED: Final = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m leasehold.manage",
        allow_abbrev=False,
        description="This host's workers. `leasehold agent`, `leasehold node` and `leasehold workers` do more.",
    )
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--config", metavar="FILE", help="the agent's YAML file (LEASEHOLD_AGENT_CONFIG)")
    where.add_argument("--state-dir", metavar="FOLDER", help="the agent's state (LEASEHOLD_STATE_DIR)")
    where.add_argument("--socket", metavar="PATH", help="the agent's socket (LEASEHOLD_SOCKET)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, told: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[where], allow_abbrev=False, help=told)

    add("workers", "run the agent, with its flags, until Ctrl-C; where one runs, start its pools")
    add("worker-status", "print what the agent knows; --json for programs")
    stop = add("stop-workers", "stop the workers of every pool")
    stop.add_argument(
        "--immediate", action="store_true", help="do not wait for running tasks: give them back to their queues"
    )
    stop.add_argument("--wait", action="store_true", help="return when the last one has ended")
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. What becomes the agent does not return."""
    chosen, others = _parser().parse_known_args(arguments)
    if others and chosen.command == "stop-workers":
        _parser().error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if chosen.command == "workers":
            _workers(chosen, others)
        elif chosen.command == "worker-status":
            _become_agent(chosen, ["--status", *others])
        else:
            _stop(chosen)
    except errors.Unavailable as error:
        output.fail(error)
        return _EXIT_UNREACHABLE
    except errors.LeaseholdError as error:
        output.fail(error)
        return _EXIT_FAILED
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    return 0


def _workers(chosen: argparse.Namespace, others: Sequence[str]) -> None:
    from leasehold.api.node.v1 import order_pb2

    order = order_pb2.Order(start_workers=order_pb2.StartWorkersOrder())
    try:
        with _agent(chosen) as agent:
            pools = _execute(agent, order)
    except errors.Unavailable:
        _become_agent(chosen, others)
        return
    if others:
        output.say(f"leasehold: an agent runs already, so {' '.join(others)} was without effect")
    _print(pools)


def _stop(chosen: argparse.Namespace) -> None:
    from leasehold.api.node.v1 import order_pb2

    order = order_pb2.Order(stop_workers=order_pb2.StopWorkersOrder(is_immediate=chosen.immediate))
    with _agent(chosen) as agent:
        pools = _execute(agent, order)
        if chosen.wait:
            pools = _wait(agent, time.monotonic, time.sleep)
    _print(pools)


def _agent(chosen: argparse.Namespace) -> connection.Allocator:
    """Calls to the agent of this host, where it listens by its own configuration."""
    from leasehold.nodeagent import config

    flags = {
        "LEASEHOLD_AGENT_CONFIG": chosen.config,
        "LEASEHOLD_STATE_DIR": chosen.state_dir,
        "LEASEHOLD_SOCKET": chosen.socket,
    }
    socket = config.load(flags).socket
    if not socket.exists():
        raise errors.Unavailable(f"no agent listens at {socket}; --state-dir or --socket tells where")
    return connection.Allocator([f"unix:{socket}"], timeout_seconds=CALL_SECONDS)


def _execute(agent: connection.Allocator, order: Any) -> list[Any]:
    """The pools that the order concerned, after it. Raises what the agent refuses."""
    import uuid

    from leasehold.api.node.v1 import agent_service_pb2 as wire
    from leasehold.rpc import node_documents

    order.order_id = uuid.uuid4().hex
    result = agent.call("ExecuteOrder", wire.ExecuteOrderRequest(order=order)).result
    name = agent.call("GetAgentStatus", wire.GetAgentStatusRequest()).node
    return [node_documents.pool(each, node=name) for each in result.pools]


def _wait(agent: connection.Allocator, clock: Callable[[], float], sleep: Callable[[float], None]) -> list[Any]:
    """The pools, once no worker lives. Raises `DeadlineExceeded`."""
    from leasehold.api.node.v1 import agent_service_pb2 as wire
    from leasehold.rpc import node_documents

    deadline = clock() + WAIT_SECONDS
    while True:
        answer = agent.call("GetAgentStatus", wire.GetAgentStatusRequest())
        pools = [node_documents.pool_with_workers(each, node=answer.node) for each in answer.status.pools]
        alive = [
            worker["name"]
            for pool in pools
            for worker in pool["workers"]
            if worker["state"] is not model.WorkerState.EXITED
        ]
        if not alive:
            return list(pools)
        if clock() > deadline:
            raise errors.DeadlineExceeded(f"not ended within {WAIT_SECONDS:.0f} s: {', '.join(alive)}")
        sleep(_LOOK_SECONDS)


def _print(pools: Sequence[Any]) -> None:
    from leasehold.cli import node_tables

    if pools:
        node_tables.pools(pools)
    else:
        output.say("the agent has no pools; its configuration file declares them")


def _become_agent(chosen: argparse.Namespace, others: Sequence[str]) -> None:
    """Replace this process by the agent's program."""
    flags: list[str] = []
    for name, value in (
        ("--config", chosen.config),
        ("--state-dir", chosen.state_dir),
        ("--socket", chosen.socket),
    ):
        if value is not None:
            flags += [name, value]
    os.execv(sys.executable, [sys.executable, "-m", "leasehold.nodeagent", *flags, *others])  # noqa: S606


if __name__ == "__main__":
    sys.exit(run())
