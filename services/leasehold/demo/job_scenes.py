"""Plays the jobs' scene: submits a batch, kills the leader and an agent in the midst, and waits for the end."""

import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
from leasehold.api.job.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc
from leasehold.core import errors
from leasehold.demo import job_audit, job_plan, job_stack
from leasehold.rpc import errors as rpc_errors

CHUNK = 500
CALL_SECONDS = 10.0
RETRY_SECONDS = 0.2
LOOK_SECONDS = 0.5

_STATES = "SELECT state, count(*) FROM job GROUP BY state"
_STATE_OF_EACH = "SELECT job_id::text, state FROM job"
_ROWS = """
SELECT job_id::text, attempt, node, allocated_cpus, allocated_memory_bytes, alloc_seq, coalesce(release_seq, 0)
FROM resource_allocation
"""
_TOTALS = "SELECT node, flush_seq, gated_cpus, gated_memory_bytes FROM node_capacity_log"


@dataclass
class Seen:
    """What a run has shown."""

    #: Key in the journal of each job, by its id.
    keys: dict[str, str] = field(default_factory=dict)
    submit_seconds: float = 0.0
    #: From the leader's death until its successor said that it leads.
    leaderless_seconds: float = 0.0
    killed_leader: str = ""
    killed_agent: str = ""
    ended_seconds: float = 0.0
    #: Ended when the leader, and the agent, was killed.
    ended_at_leader_kill: int = 0
    ended_at_agent_kill: int = 0


class Player:
    """One run of the scene. `say` shows a line with its instant; `draw` how many jobs are in each state."""

    def __init__(
        self,
        hosts: job_stack.Hosts,
        script: job_plan.Script,
        say: Callable[[float, str], None],
        draw: Callable[[float, dict[str, int]], None],
    ) -> None:
        self.seen = Seen()
        self._hosts = hosts
        self._script = script
        self._say = say
        self._draw = draw
        self._began = time.monotonic()

    def play(self) -> Seen:
        """Run to the end: until every job has ended, or the script's last instant."""
        self._began = time.monotonic()
        self._wait_for_hosts()
        self._submit()
        steps: list[tuple[float, Callable[[int], None]]] = [
            (self._script.kill_leader_at, self._kill_leader),
            (self._script.kill_agent_at, self._kill_agent),
        ]
        agent_back_at = float("inf")
        with psycopg.connect(self._hosts.postgres_dsn, autocommit=True) as connection:
            while True:
                now = self._elapsed()
                counts = {str(state): int(count) for state, count in connection.execute(_STATES)}
                ended = sum(counts.get(state, 0) for state in job_audit.TERMINAL)
                self._draw(now, counts)
                if steps and ended >= steps[0][0] * self._script.jobs:
                    steps.pop(0)[1](ended)
                    if not steps:
                        agent_back_at = self._elapsed() + self._script.agent_back_seconds
                if now >= agent_back_at:
                    agent_back_at = float("inf")
                    self._hosts.start_agent(self.seen.killed_agent)
                    self._say(self._elapsed(), f"a new agent of {self.seen.killed_agent} has begun")
                is_done = not steps and agent_back_at == float("inf") and ended == self._script.jobs
                if is_done or now >= self._script.end_at_seconds:
                    self.seen.ended_seconds = now
                    return self.seen
                time.sleep(LOOK_SECONDS)

    def judge(self) -> job_audit.Verdict:
        """What the journal and Postgres say now."""
        return judge(self._hosts.postgres_dsn, self._hosts.journal, self.seen.keys)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    # What happens

    def _wait_for_hosts(self) -> None:
        wanted = len(job_plan.NODES) * job_plan.NODE_CPUS

        def has_all(service: job_service_pb2_grpc.JobServiceStub) -> bool:
            told = service.GetUtilization(job_service_pb2.GetUtilizationRequest(), timeout=CALL_SECONDS)
            return bool(told.total.total_cpus == wanted)

        deadline = time.monotonic() + job_stack.READY_SECONDS
        while not self._asked(has_all):
            if time.monotonic() > deadline:
                raise errors.Unavailable("the hosts have not registered what they have for jobs")
            time.sleep(RETRY_SECONDS)

    def _submit(self) -> None:
        wanted = job_plan.jobs(self._script)
        request_id = uuid.uuid4().hex
        began = time.monotonic()
        for verdicts in self._asked(lambda service: _submitted(service, request_id, wanted)):
            for job, verdict in verdicts:
                if not verdict.job_id:
                    raise errors.FailedPrecondition(f"{job.key} was refused: {verdict.message}")
                self.seen.keys[verdict.job_id] = job.key
        self.seen.submit_seconds = time.monotonic() - began
        self._say(self._elapsed(), f"{len(wanted)} jobs submitted in {self.seen.submit_seconds:.2f} s")

    def _kill_leader(self, ended: int) -> None:
        self.seen.killed_leader = asked(list(self._hosts.allocators), _ping)[1]
        self.seen.ended_at_leader_kill = ended
        self._hosts.kill_allocator(self.seen.killed_leader)
        began = time.monotonic()
        self._say(self._elapsed(), f"SIGKILL to the leader {self.seen.killed_leader}; {ended} jobs have ended")
        self._asked(_ping)
        self.seen.leaderless_seconds = time.monotonic() - began
        self._say(self._elapsed(), f"the other leads, {self.seen.leaderless_seconds:.1f} s after")

    def _kill_agent(self, ended: int) -> None:
        self.seen.killed_agent = job_plan.NODES[0]
        self.seen.ended_at_agent_kill = ended
        self._hosts.kill_agent(self.seen.killed_agent)
        self._say(self._elapsed(), f"SIGKILL to the agent of {self.seen.killed_agent}; {ended} jobs have ended")

    def _asked(self, ask: Callable[[job_service_pb2_grpc.JobServiceStub], Any]) -> Any:
        """What the leader answers; whoever leads, within the time that a takeover may take."""
        return asked(list(self._hosts.allocators), ask)[0]


def asked(
    addresses: Sequence[str], ask: Callable[[job_service_pb2_grpc.JobServiceStub], Any]
) -> tuple[Any, str]:
    """What the leader answers, and its address. Raises core errors: what it refuses, or that nobody leads."""
    deadline = time.monotonic() + job_stack.READY_SECONDS
    while True:
        for address in addresses:
            with grpc.insecure_channel(address) as channel:
                try:
                    return ask(job_service_pb2_grpc.JobServiceStub(channel)), address
                except grpc.RpcError as error:
                    failure = rpc_errors.from_rpc_error(error)
            if not isinstance(failure, errors.Unavailable | errors.DeadlineExceeded):
                raise failure
        if time.monotonic() > deadline:
            raise failure
        time.sleep(RETRY_SECONDS)


def _ping(service: job_service_pb2_grpc.JobServiceStub) -> None:
    service.ListQueues(job_service_pb2.ListQueuesRequest(), timeout=CALL_SECONDS)


def _submitted(
    service: job_service_pb2_grpc.JobServiceStub, request_id: str, wanted: Sequence[job_plan.Wanted]
) -> list[list[tuple[job_plan.Wanted, job_service_pb2.SubmitVerdict]]]:
    """Submit all; each chunk's jobs with their verdicts. Repeating it submits nothing twice."""
    chunks = [wanted[at : at + CHUNK] for at in range(0, len(wanted), CHUNK)]
    answers = list(service.SubmitJobs(_requests(request_id, chunks), timeout=job_stack.READY_SECONDS))
    return [list(zip(chunks[answer.chunk - 1], answer.verdicts, strict=True)) for answer in answers]


def _requests(
    request_id: str, chunks: Sequence[Sequence[job_plan.Wanted]]
) -> Iterator[job_service_pb2.SubmitJobsRequest]:
    for number, chunk in enumerate(chunks, 1):
        yield job_service_pb2.SubmitJobsRequest(
            request_id=request_id, chunk=number, specs=[_spec(job) for job in chunk]
        )


def _spec(job: job_plan.Wanted) -> job_pb2.JobSpec:
    spec = job_pb2.JobSpec(
        name=job.key,
        priority=job.priority,
        required_cpus=job.cpus,
        required_memory_bytes=job.memory_bytes,
        template=job_plan.TEMPLATE,
        parameters={"key": job.key, "seconds": f"{job.seconds:.2f}", "exit_code": str(job.exit_code)},
    )
    spec.max_run.FromSeconds(job_plan.MAX_RUN_SECONDS)
    return spec


def judge(dsn: str, journal: pathlib.Path, keys: dict[str, str]) -> job_audit.Verdict:
    """What a journal and a database say of the jobs whose `keys` are given."""
    with psycopg.connect(dsn) as connection:
        states = {str(job_id): str(state) for job_id, state in connection.execute(_STATE_OF_EACH)}
        rows = [job_audit.AllocationRow(*row) for row in connection.execute(_ROWS)]
        totals = [job_audit.TotalRow(*row) for row in connection.execute(_TOTALS)]
    with journal.open(encoding="utf-8", errors="replace") as lines:
        return job_audit.judge(states=states, keys=keys, journal=lines, rows=rows, totals=totals)
