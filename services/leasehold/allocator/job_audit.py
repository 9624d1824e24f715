"""The ledger's word against itself and against that of the agents.

What Postgres says is compared in one snapshot there, so a difference is one for certain. What agents say is of
another instant: it counts for certain only where it has not changed for two of their reports; what changed
since may be on its way, and of a node that is silent nobody can tell.
"""

from collections.abc import Iterator, Mapping

from leasehold.allocator import job_dispatch, jobs
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.core.job import machine, model

DEFINITE = "DEFINITE"
IN_FLIGHT = "IN_FLIGHT"
UNKNOWN = "UNKNOWN"

#: Of the agents' word, beside those of the ledger.
RULES = ("RUNS_UNALLOCATED", "UNKNOWN_TO_AGENT", "NODE_SILENT")

_RUNNING = frozenset({model.AttemptPhase.STARTED, model.AttemptPhase.STOPPING})


def findings(
    known: machine.JobMachine,
    word: Mapping[str, job_dispatch.NodeWord],
    *,
    now: float,
    settled_seconds: float,
) -> Iterator[wire.AuditFinding]:
    """Where ledger and agents differ. What has stood for `settled_seconds` counts as settled."""

    def verdict(since: float) -> str:
        return DEFINITE if now - since >= settled_seconds else IN_FLIGHT

    for node, said in sorted(word.items()):
        for ref, spoken in sorted(said.attempts.items()):
            if spoken.phase is not model.AttemptPhase.ENDED and known.phase(ref) is None:
                detail = f"node {node} says that it is {spoken.phase.value}, and it has no allocation"
                yield _finding(verdict(spoken.since), "RUNS_UNALLOCATED", ref, detail)
    for attempt in known.mirror.attempts.values():
        if attempt.is_external:
            continue
        if attempt.phase is model.AttemptPhase.UNKNOWN:
            detail = f"node {attempt.node} is silent: it may run, and its allocation counts"
            yield _finding(UNKNOWN, "NODE_SILENT", attempt.ref, detail)
        elif attempt.phase in _RUNNING and attempt.node in word:
            # Its agent has said so once; now its state folder does not have it.
            said = word[attempt.node]
            if attempt.ref not in said.attempts:
                detail = f"it is {attempt.phase.value}, and node {attempt.node} does not know it"
                yield _finding(verdict(said.since), "UNKNOWN_TO_AGENT", attempt.ref, detail)


def _finding(verdict: str, rule: str, ref: model.AttemptRef, detail: str) -> wire.AuditFinding:
    return wire.AuditFinding(
        verdict=verdict, rule=rule, subject=f"job {ref.job_id} attempt {ref.attempt}", detail=detail
    )


async def audit(known: jobs.Jobs) -> wire.AuditAllocationsResponse:
    """Compare. Raises `PostgresUnavailable`."""
    found = await known.store.audit()
    told = [
        wire.AuditFinding(verdict=DEFINITE, rule=finding.rule, subject=finding.subject, detail=finding.detail)
        for finding in found.findings
    ]
    told.extend(
        findings(
            known.require_machine(),
            known.agents_word(),
            now=known.now(),
            settled_seconds=known.settled_seconds(),
        )
    )
    return wire.AuditAllocationsResponse(
        findings=told,
        rules=[*found.rules, *RULES],
        flush_sequence=found.flush_seq,
        live_allocations=found.live_allocations,
        nodes=found.nodes,
    )
