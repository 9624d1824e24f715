"""Between rows of jobs and allocations and the core's values."""

import json
from collections.abc import Mapping
from typing import Any

from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.placement import model as placement
from leasehold.postgres import database

# Made once: `json.dumps` makes one for each document if anything is not its default.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def spec_document(spec: model.JobSpec) -> dict[str, Any]:
    """What has no column of its own; plain JSON, defaults left out."""
    document: dict[str, Any] = {
        "node_selector": dict(spec.node_selector),
        "template": spec.template,
        "parameters": dict(spec.parameters),
        "max_run_seconds": spec.max_run_seconds,
        "wait_for_capacity": spec.wait_for_capacity,
    }
    kept = {name: value for name, value in document.items() if value}
    if spec.retry != model.RetryPolicy():
        kept["retry"] = {
            "max_attempts": spec.retry.max_attempts,
            "initial_backoff_seconds": spec.retry.initial_backoff_seconds,
            "max_backoff_seconds": spec.retry.max_backoff_seconds,
        }
    if spec.on_lost is not model.OnLost.AFTER_PROOF:
        kept["on_lost"] = spec.on_lost.value
    if spec.spreading is not placement.Spreading.PACK:
        kept["spreading"] = spec.spreading.value
    return kept


def outcome_document(outcome: model.Outcome) -> dict[str, Any]:
    """Plain JSON."""
    return {
        "cause": outcome.cause.value,
        "exit_code": outcome.exit_code,
        "signal": outcome.signal,
        "detail": outcome.detail.replace("\0", "\ufffd"),
    }


def encoded(document: Mapping[str, Any]) -> str:
    """JSON that Postgres can store: without a NUL, which its text cannot hold."""
    return _ENCODER.encode(document)


def job(row: database.Row) -> model.JobRecord:
    """A job, with its row in the ledger if it has one.

    Raises `LeaseholdError` if it cannot be read by this version of Leasehold.
    """
    try:
        required = placement.Resources(row["required_cpus"], row["required_memory_bytes"])
        return model.JobRecord(
            job_id=row["job_id"],
            spec=_spec(row["name"], row["queue"], row["priority"], required, row["spec"]),
            state=model.JobState(row["state"]),
            attempt=row["attempt"],
            failures=row["failures"],
            principal=row["principal"],
            submit_time_seconds=row["submit_time"],
            start_time_seconds=row["start_time"],
            end_time_seconds=row["end_time"],
            not_before_seconds=row["not_before_time"],
            is_cancel_requested=row["is_cancel_requested"],
            outcome=None if row["outcome"] is None else _outcome(row["outcome"]),
            allocation=None if row["row_attempt"] is None else allocation(row),
        )
    except _WRONG as error:
        raise _unreadable(row["job_id"], error) from error


#: What the core's values raise of what they are not to hold.
_WRONG = (errors.InvalidArgument, KeyError, TypeError, ValueError)


def _unreadable(job_id: str, error: Exception) -> errors.LeaseholdError:
    return errors.LeaseholdError(
        f"job {job_id} in Postgres cannot be read by this version of Leasehold: {error}",
        metadata={"job_id": job_id},
    )


class LiveJobs:
    """Decodes jobs by the hundred thousand: what many have in common is made, and kept, once."""

    def __init__(self) -> None:
        self._specs: dict[tuple[Any, ...], model.JobSpec] = {}
        self._principals: dict[str, str] = {}
        self._queues: dict[str, str] = {}

    def job(self, row: tuple[Any, ...]) -> model.JobRecord:
        """A row of `pending_jobs` or `running_jobs`, whose columns it unpacks. Raises as `job` does."""
        # By position, for a row by names costs as much again as what is made of it.
        job_id, state, attempt, failures, principal, submit_time, start_time, not_before_time = row[:8]
        is_cancel_requested, outcome = row[8:10]
        try:
            return model.JobRecord(
                job_id=job_id,
                spec=self._spec(row[10:16]),
                state=model.JobState(state),
                attempt=attempt,
                failures=failures,
                principal=self._principals.setdefault(principal, principal),
                submit_time_seconds=submit_time,
                start_time_seconds=start_time,
                not_before_seconds=not_before_time,
                is_cancel_requested=is_cancel_requested,
                outcome=None if outcome is None else _outcome(outcome),
                allocation=None if len(row) == 16 else _live_allocation(job_id, row[16:]),
            )
        except _WRONG as error:
            raise _unreadable(job_id, error) from error

    def _spec(self, columns: tuple[Any, ...]) -> model.JobSpec:
        spec = self._specs.get(columns)
        if spec is None:
            text, name, queue, priority, cpus, memory_bytes = columns
            document, _ = _JSON.raw_decode(text)
            queue = self._queues.setdefault(queue, queue)
            spec = _spec(name, queue, priority, placement.Resources(cpus, memory_bytes), document)
            if len(self._specs) < _SPECS_KEPT:
                self._specs[columns] = spec
        return spec


def _live_allocation(job_id: str, columns: tuple[Any, ...]) -> model.AllocationRecord | None:
    attempt, node, boot_id, queue, cpus, memory_bytes, alloc_seq, allocated_time = columns
    if attempt is None:
        return None
    return model.AllocationRecord(
        ref=model.AttemptRef(job_id, attempt),
        node=node,
        boot_id=boot_id,
        held=placement.Resources(cpus, memory_bytes),
        queue=queue,
        alloc_seq=alloc_seq,
        allocate_time_seconds=allocated_time,
    )


#: Where no two are alike more would only cost.
_SPECS_KEPT = 4096
#: Of Postgres's own text, which has nothing around it.
_JSON = json.JSONDecoder()


def _spec(
    name: str, queue: str, priority: int, required: placement.Resources, document: Mapping[str, Any]
) -> model.JobSpec:
    kept: dict[str, Any] = dict(document)
    if "retry" in kept:
        kept["retry"] = model.RetryPolicy(**kept["retry"])
    if "on_lost" in kept:
        kept["on_lost"] = model.OnLost(kept["on_lost"])
    if "spreading" in kept:
        kept["spreading"] = placement.Spreading(kept["spreading"])
    return model.JobSpec(name=name, queue=queue, priority=priority, required=required, **kept)


def _outcome(document: Mapping[str, Any]) -> model.Outcome:
    return model.Outcome(
        cause=model.EndCause(document["cause"]),
        exit_code=document.get("exit_code"),
        signal=document.get("signal", 0),
        detail=document.get("detail", ""),
    )


def allocation(row: database.Row) -> model.AllocationRecord:
    """A row of the ledger."""
    return model.AllocationRecord(
        ref=model.AttemptRef(row["job_id"], row["row_attempt"]),
        node=row["node"],
        boot_id=row["boot_id"],
        held=placement.Resources(row["allocated_cpus"], row["allocated_memory_bytes"]),
        queue=row["row_queue"],
        alloc_seq=row["alloc_seq"],
        release_seq=row["release_seq"] or 0,
        allocate_time_seconds=row["allocated_time"],
        release_time_seconds=row["released_time"],
    )


def queue(row: database.Row) -> placement.Queue:
    """A queue."""
    return placement.Queue(
        name=row["name"],
        nominal_cpus=row["nominal_cpus"],
        nominal_memory_bytes=row["nominal_memory_bytes"],
    )


def capacity(row: database.Row) -> changes.Capacity:
    """What a node has."""
    return changes.Capacity(
        node=row["node"],
        boot_id=row["boot_id"],
        declared=placement.Resources(row["declared_cpus"], row["declared_memory_bytes"]),
        gated=placement.Resources(row["gated_cpus"], row["gated_memory_bytes"]),
        used=placement.Resources(row["used_cpus"], row["used_memory_bytes"]),
    )


def request_key(row: database.Row) -> changes.RequestKey:
    """Under what an answer is kept."""
    return changes.RequestKey(row["principal"], row["request_id"], row["chunk"])


def kept_answer(row: database.Row) -> changes.KeepAnswer:
    """A first answer that was kept."""
    return changes.KeepAnswer(
        key=request_key(row),
        payload_sha256=bytes(row["payload_sha256"]),
        answer=row["answer"],
        job_ids=(),
    )
