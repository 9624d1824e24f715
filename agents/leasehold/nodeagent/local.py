"""Calls to the agent of this host, by its socket: for `--status` and `--stop`."""

import pathlib
import time
from typing import Final

import grpc
from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc, node_pb2, pool_pb2, worker_pb2
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import options

CALL_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05
_GIB: Final = model.GIB


def _stub(channel: grpc.Channel) -> agent_service_pb2_grpc.AgentServiceStub:
    return agent_service_pb2_grpc.AgentServiceStub(channel)


def _channel(socket: pathlib.Path) -> grpc.Channel:
    if not socket.exists():
        raise errors.Unavailable(f"no agent listens at {socket}; --socket or --state-dir tells where")
    return grpc.insecure_channel(f"unix:{socket}", options=options.channel_options())


def status(socket: pathlib.Path) -> wire.GetAgentStatusResponse:
    """The agent's status. Raises `Unavailable` if there is none."""
    with _channel(socket) as channel:
        try:
            return _stub(channel).GetAgentStatus(wire.GetAgentStatusRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _told(error, socket) from error


def stop(socket: pathlib.Path, mode: wire.ShutDownMode.ValueType) -> float:
    """Tell the agent to end, and wait for that; seconds that it took.

    Raises `Unavailable` if there is none, `DeadlineExceeded` if it takes longer than it said.
    """
    began = time.monotonic()
    pid = status(socket).pid
    with _channel(socket) as channel:
        try:
            answer = _stub(channel).ShutDownAgent(wire.ShutDownAgentRequest(mode=mode), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _told(error, socket) from error
    deadline = time.monotonic() + answer.deadline.seconds + CALL_SECONDS
    while pathlib.Path(f"/proc/{pid}").exists() and not _is_zombie(pid):
        if time.monotonic() > deadline:
            raise errors.DeadlineExceeded(f"the agent, PID {pid}, has not ended yet; its log tells why")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - began


def _is_zombie(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


def _told(error: grpc.RpcError, socket: pathlib.Path) -> errors.LeaseholdError:
    found = rpc_errors.from_rpc_error(error)
    if type(found) is errors.Unavailable:
        return errors.Unavailable(f"no agent answers at {socket}: {found.message}")
    return found


def lines(answer: wire.GetAgentStatusResponse) -> list[str]:
    """The status for people."""
    memory, link = answer.status.memory, answer.link
    used = memory.total_bytes - memory.available_bytes
    load = " ".join(f"{each:.2f}" for each in answer.status.load_average)
    found = [
        f"node       {answer.node}, agent PID {answer.pid}, up {answer.status.agent_uptime.seconds} s"
        f"{', draining' if answer.status.is_draining else ''}",
        f"memory     {used / _GIB:.1f}/{memory.total_bytes / _GIB:.1f} GB ({memory.used_ratio:.1%}), "
        f"available {memory.available_bytes / _GIB:.1f} GB by {memory.bound_by}",
        f"load       {load}, {answer.status.load_per_core:.2f} per core",
        f"allocator  {_link(link)}",
        f"agent      {answer.status.agent_rss_bytes / 2**20:.0f} MB, "
        f"shims {answer.status.shims_pss_bytes / 2**20:.0f} MB",
    ]
    found += [f"warning    {warning}" for warning in answer.status.warnings]
    for pool in answer.status.pools:
        found += _pool(pool)
    return found


def _link(link: node_pb2.LinkStatus) -> str:
    if link.is_connected:
        return f"connected to {link.allocator_address}"
    if link.HasField("last_answer_age"):
        return f"cut off for {link.last_answer_age.seconds} s; works on by its last orders"
    return "not reached yet; works alone"


def _pool(pool: pool_pb2.PoolStatus) -> list[str]:
    mode = pool_pb2.PoolMode.Name(pool.mode).removeprefix("POOL_MODE_").lower()
    alive = pool.starting + pool.running + pool.stopping
    found = [f"pool       {pool.name}: {alive} of {pool.desired} workers, optimal {pool.optimal}, {mode}"]
    if pool.summary:
        found.append(f"           {pool.summary}")
    if pool.blocked_reason:
        found.append(f"           not started: {pool.blocked_reason}")
    found += [f"           warning: {warning}" for warning in pool.warnings]
    found += [f"  {_worker(worker)}" for worker in pool.workers]
    return found


def _worker(worker: worker_pb2.WorkerStatus) -> str:
    state = worker_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
    if worker.HasField("exit"):
        cause = worker_pb2.ExitCause.Name(worker.exit.cause).removeprefix("EXIT_CAUSE_").lower()
        return f"{worker.name}  {state}, {cause}: {worker.exit.detail}"
    busy = f", task {worker.task_id or '?'}" if worker.is_busy else ""
    step = f", {worker.stop_step} sent" if worker.stop_step else ""
    held = worker.held_bytes / 2**20
    return f"{worker.name}  {state}, PID {worker.process.pid}, {held:.0f} MB{busy}{step}"
