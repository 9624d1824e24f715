"""Holders that the allocator cannot see die: an agent that can certifies it, and their shares move at once."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import allocator_kit as kit
import node_namespace_child
from allocator_holders import Auditor, DrivenHolder
from allocator_holders import running as holding
from allocator_kit import until
from leasehold.api.common.v1 import process_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import processes
from leasehold.rpc import common_codec
from node_agents import Agent, node_name, registration, running

CALLS = "max_concurrent_requests"
CHILD = Path(node_namespace_child.__file__)
ELSEWHERE = ("a-boot-of-another-host", 4026539999)

MakeFleet = Callable[..., kit.Fleet]


@contextlib.asynccontextmanager
async def namespace(fleet: kit.Fleet, node: str, holder: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent and a holder in a PID namespace of their own; all of it is killed in the end."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = [
        "unshare",
        *as_root,
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        str(CHILD),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, node, holder, *fleet.addresses, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_sigkill_of_a_holder_in_another_pid_namespace_frees_its_calls_at_once_by_its_nodes_agent(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    # Without the certificate its calls would come back after 10 s + 10 s.
    await fleet.put(kit.budget(ttl_seconds=10.0, max_call_seconds=10.0, orphan_seconds=0.0))
    auditor = Auditor({CALLS: 40, "rpm_limit": 800})
    survivor = DrivenHolder([leader.address], "survivor", auditor=auditor)
    async with holding(survivor), namespace(fleet, "inner", "victim") as child:
        assert child.stdout is not None
        assert child.stdin is not None
        said, agent_pid, holder_pid = (await child.stdout.readline()).split()
        assert said == b"holds"
        # These are PIDs of the namespace, where the agent is the first process.
        assert agent_pid == b"1"
        assert int(holder_pid) < 20
        assert survivor.has() == 20

        killed_at = kit.now()
        child.stdin.write(b"kill\n")

        await until(lambda: survivor.has() == 40, "the survivor has all calls", seconds=5, pause=0.001)
        grown_at = next(at for at, grant in survivor.heard if at > killed_at and grant.amounts[CALLS] == 40e6)
        assert grown_at - killed_at < 1.5
    auditor.check()
    kit.tell(f"certified by an agent: calls moved {1000 * (grown_at - killed_at):.0f} ms after SIGKILL")


def _elsewhere(pid: int) -> processes.ProcessKey:
    return processes.ProcessKey(*ELSEWHERE, pid, 1_000 + pid)


def _agent(fleet: kit.Fleet, name: str) -> Agent:
    return Agent(fleet.addresses, registration(name, boot_id=ELSEWHERE[0], pid_namespace=ELSEWHERE[1]))


async def test_a_new_stream_and_a_new_leader_ask_for_every_certificate_again(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(size=2)
    leader = await fleet.start()
    await fleet.put(kit.budget(ttl_seconds=10.0, max_call_seconds=10.0, orphan_seconds=0.0))
    victim = DrivenHolder(fleet.addresses, "victim", process=_elsewhere(100))
    survivor = DrivenHolder(fleet.addresses, "survivor", process=_elsewhere(101))
    agent, foreigner = _agent(fleet, node_name()), Agent(fleet.addresses, registration(node_name()))
    async with holding(victim, survivor), running(agent, foreigner):
        asked = [common_codec.encode_process(_elsewhere(pid)) for pid in (100, 101)]

        def in_order() -> list[process_pb2.ProcessIdentity]:
            return sorted(agent.watched, key=lambda process: process.pid)

        await until(lambda: in_order() == asked, "it is asked for both")

        agent.cut()
        await until(lambda: agent.connections >= 2 and in_order() == asked, "both are asked for again")

        leader.kill()
        await until(lambda: not agent.watched or agent.ends, "the stream breaks")
        await fleet.ready()
        await until(lambda: in_order() == asked, "the new leader asks for both")
        await until(lambda: survivor.has() == 20, "each has half")

        await victim.close()
        said_at = kit.now()
        agent.send(deaths=[wire.DeathCertificate(process=asked[0])])
        await until(lambda: survivor.has() == 40, "the survivor has all calls", seconds=5)
        assert kit.now() - said_at < 1.5
        assert foreigner.watched == []


async def test_an_agent_elsewhere_cannot_free_what_another_host_holds(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    leader = await fleet.start()
    await fleet.put(kit.budget(ttl_seconds=10.0))
    holder = DrivenHolder([leader.address], "holder", process=_elsewhere(100))
    liar = Agent(fleet.addresses, registration(node_name()))
    async with holding(holder), running(liar):
        await until(lambda: holder.has() == 40 and liar.responses, "it has it all")
        liar.send(deaths=[wire.DeathCertificate(process=common_codec.encode_process(_elsewhere(100)))])
        await until(lambda: liar.responses[-1][1].answered_sequence >= 2, "the lie is answered")
        answered_at = kit.now()
        await until(lambda: holder.renewed_since(answered_at), "the holder is renewed")
        assert holder.has() == 40
    assert "certificate_refused" in leader.log()
