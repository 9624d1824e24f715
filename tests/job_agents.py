"""Agents that pretend to run jobs: they keep what a state folder would, and count every start."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import node_agents
from allocator_kit import AllocatorProcess, Fleet, until
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.api.job.v1 import job_service_pb2_grpc as wire_grpc
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as node_wire
from leasehold.core import errors
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import job_codec

GIB = 2**30
Ref = tuple[str, int]

SUCCEEDED = job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_SUCCEEDED, exit_code=0)
FAILED = job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_FAILED, exit_code=3, detail="exit code 3")

#: How an assignment ends, as soon as it starts; None: it runs until a test ends it.
Run = Callable[[attempt_pb2.JobAssignment], job_pb2.JobOutcome | None]


def never_ends(_: attempt_pb2.JobAssignment) -> job_pb2.JobOutcome | None:
    return None


def succeeds(_: attempt_pb2.JobAssignment) -> job_pb2.JobOutcome | None:
    return SUCCEEDED


def registration(
    name: str, *, cpus: int = 8, memory_gib: int = 32, **fields: Any
) -> node_wire.NodeRegistration:
    """A registration of a host that runs jobs of the template `render`."""
    known: dict[str, Any] = {
        "job_resources": node_pb2.NodeResources(cpus=cpus, memory_bytes=memory_gib * GIB),
        "job_templates": ["render"],
    }
    return node_agents.registration(name, **{**known, **fields})


def spec(cpus: int = 1, memory_gib: int = 1, **fields: Any) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(
        **{
            "required_cpus": cpus,
            "required_memory_bytes": memory_gib * GIB,
            "template": "render",
            **fields,
        }
    )


class JobAgent(node_agents.Agent):
    """Its `records` outlive connections, as a state folder does."""

    def __init__(
        self,
        addresses: list[str],
        registered: node_wire.NodeRegistration,
        *,
        run: Run = never_ends,
        obey: node_agents.Obey | None = None,
    ) -> None:
        super().__init__(addresses, registered, obey=obey)
        self.run_job = run
        self.records: dict[Ref, attempt_pb2.AttemptReport] = {}
        self.assignments: dict[Ref, attempt_pb2.JobAssignment] = {}
        self.starts: Counter[Ref] = Counter()
        self.stopped: list[Ref] = []
        self.forgotten: list[Ref] = []
        #: What comes down is passed over while False, as by an agent that is frozen.
        self.is_hearing_jobs = True

    def _first(self) -> dict[str, Any]:
        return {"inventory": attempt_pb2.JobInventory(attempts=list(self.records.values()))}

    def report(self, ref: Ref, phase: "job_pb2.AttemptPhase.ValueType", **fields: Any) -> None:
        """Keep how an attempt stands, and tell it."""
        message = attempt_pb2.AttemptReport(
            attempt=attempt_pb2.AttemptRef(job_id=ref[0], attempt=ref[1]),
            phase=phase,
            start_time=job_codec.encode_time(time.time()),
            **fields,
        )
        self.records[ref] = message
        self.send(attempts=[message])

    def finish(self, ref: Ref, outcome: job_pb2.JobOutcome = SUCCEEDED) -> None:
        """An attempt ends."""
        self.report(
            ref,
            job_pb2.ATTEMPT_PHASE_ENDED,
            outcome=outcome,
            end_time=job_codec.encode_time(time.time()),
        )

    @property
    def running(self) -> list[Ref]:
        return [ref for ref, report in self.records.items() if report.phase != job_pb2.ATTEMPT_PHASE_ENDED]

    def _hear(self, response: node_wire.SyncNodeResponse) -> None:
        super()._hear(response)
        if not self.is_hearing_jobs:
            return
        for assignment in response.assignments:
            self._start(assignment)
        for stop in response.stop:
            self._stop((stop.job_id, stop.attempt))
        for forget in response.forget:
            ref = (forget.job_id, forget.attempt)
            self.forgotten.append(ref)
            self.records.pop(ref, None)

    def _start(self, assignment: attempt_pb2.JobAssignment) -> None:
        ref = (assignment.attempt.job_id, assignment.attempt.attempt)
        if ref in self.records:
            return
        self.assignments[ref] = assignment
        self.starts[ref] += 1
        self.report(ref, job_pb2.ATTEMPT_PHASE_STARTED)
        outcome = self.run_job(assignment)
        if outcome is not None:
            self.finish(ref, outcome)

    def _stop(self, ref: Ref) -> None:
        self.stopped.append(ref)
        known = self.records.get(ref)
        if known is None:
            self.finish(ref, job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_NOT_STARTED, detail="revoked"))
        elif known.phase != job_pb2.ATTEMPT_PHASE_ENDED:
            self.finish(ref, job_pb2.JobOutcome(cause=job_pb2.END_CAUSE_CANCELLED, signal=15))


def obey_logs(text: bytes) -> node_agents.Obey:
    """Answers each read of a log with all of `text`, and its end."""

    def obey(order: order_pb2.Order) -> order_pb2.OrderResult:
        chunk = order_pb2.LogChunk(data=text, cursor="end", is_end=True)
        return order_pb2.OrderResult(order_id=order.order_id, log=chunk)

    return obey


# Calls


async def ask(
    fleet: Fleet, method: str, request: Any, *, at: AllocatorProcess | None = None, seconds: float = 10.0
) -> Any:
    """Call a unary method of JobService. Raises core errors."""
    target = at or await fleet.leader()
    try:
        stub = wire_grpc.JobServiceStub(fleet.channel(target))
        return await getattr(stub, method)(request, timeout=seconds)
    except grpc.RpcError as error:
        raise rpc_errors.from_rpc_error(error) from error


async def submit(fleet: Fleet, asked: job_pb2.JobSpec | None = None, **fields: Any) -> job_pb2.Job:
    at = fields.pop("at", None)
    answer = await ask(fleet, "SubmitJob", wire.SubmitJobRequest(spec=asked or spec(), **fields), at=at)
    return answer.job  # type: ignore[no-any-return]


async def job(fleet: Fleet, job_id: str, *, at: AllocatorProcess | None = None) -> job_pb2.Job:
    answer = await ask(fleet, "GetJob", wire.GetJobRequest(job_id=job_id), at=at)
    return answer.job  # type: ignore[no-any-return]


async def until_state(fleet: Fleet, job_id: str, state: str, *, seconds: float = 60.0) -> job_pb2.Job:
    """The job once it is in a state, as `COMPLETED`; leaders may change meanwhile."""
    wanted = job_pb2.JobState.Value(f"JOB_STATE_{state}")
    last: list[job_pb2.Job] = []

    async def found() -> job_pb2.Job | None:
        try:
            last[:] = [await job(fleet, job_id)]
        except errors.Unavailable:
            return None
        return last[0] if last[0].state == wanted else None

    try:
        reached: job_pb2.Job = await until(found, f"job {job_id} is {state}", seconds=seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}: {last}") from None
    return reached


async def ready(fleet: Fleet, *, seconds: float = 60.0) -> AllocatorProcess:
    """The leader, once it takes jobs."""
    leader = await fleet.ready(seconds=seconds)

    async def takes_jobs() -> bool:
        try:
            await ask(fleet, "ListQueues", wire.ListQueuesRequest(), at=leader)
        except errors.Unavailable:
            return False
        return True

    await until(takes_jobs, "jobs are taken", seconds=seconds)
    return leader


async def until_capacity(fleet: Fleet, name: str, *, seconds: float = 60.0) -> None:
    """Return once a node can be given jobs."""

    async def has() -> bool:
        try:
            answer = await ask(fleet, "GetUtilization", wire.GetUtilizationRequest(node=name))
        except (errors.NotFound, errors.Unavailable):
            return False
        return bool(answer.nodes[0].total_cpus) and not answer.nodes[0].is_closed

    await until(has, f"{name} takes jobs", seconds=seconds)
