"""What a leader tells an agent of attempts, read leniently: one that cannot be understood spoils no other."""

from collections.abc import Iterable

from leasehold.api.job.v1 import attempt_pb2
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.node import job_life
from leasehold.core.placement import model as placement
from leasehold.observe import logs
from leasehold.rpc import job_codec

_log = logs.get_logger(__name__)


def decode_assignment(message: attempt_pb2.JobAssignment) -> job_life.Assignment:
    """What is to be run. Raises `InvalidArgument`."""
    held = placement.Resources(message.cpus, message.memory_bytes)
    if held.cpus < 1 or held.memory_bytes < 1:
        raise errors.InvalidArgument("an assignment without cpus or memory", field="assignments")
    max_run = job_codec.decode_duration(message.max_run) if message.HasField("max_run") else None
    if max_run is not None and not 0.0 < max_run <= model.RUN_SECONDS_MAX:
        raise errors.InvalidArgument(f"max_run: {max_run:g} s is no time to run", field="max_run")
    return job_life.Assignment(
        ref=job_codec.decode_ref(message.attempt, field="attempt"),
        template=message.template,
        parameters=dict(message.parameters),
        held=held,
        max_run_seconds=max_run,
        name=message.name,
    )


def decode_assignments(
    messages: Iterable[attempt_pb2.JobAssignment],
) -> tuple[list[job_life.Assignment], dict[model.AttemptRef, str]]:
    """What is to be run; and what cannot be understood, with the reason, so that the leader is told.

    One that does not even name its attempt is told in the log alone.
    """
    found: list[job_life.Assignment] = []
    refused: dict[model.AttemptRef, str] = {}
    for message in messages:
        try:
            found.append(decode_assignment(message))
        except errors.InvalidArgument as error:
            _log.error("assignment_not_understood", job_id=message.attempt.job_id, message=error.message)
            for ref in decode_refs([message.attempt]):
                refused[ref] = f"this host's agent does not understand the assignment: {error.message}"
    return found, refused


def decode_refs(messages: Iterable[attempt_pb2.AttemptRef]) -> list[model.AttemptRef]:
    """Attempts; what is none is told in the log and left out."""
    found = []
    for message in messages:
        try:
            found.append(job_codec.decode_ref(message))
        except errors.InvalidArgument as error:
            _log.error("attempt_not_understood", message=error.message)
    return found
