"""Attempts on the wire: what leader and agents tell each other of them on a node's connection.

Decoding raises `InvalidArgument` naming the field.
"""

from leasehold.api.job.v1 import attempt_pb2
from leasehold.core.job import model
from leasehold.core.placement import model as placement
from leasehold.rpc import job_codec


def encode_assignment(
    ref: model.AttemptRef, spec: model.JobSpec, held: placement.Resources
) -> attempt_pb2.JobAssignment:
    """What an agent is to run."""
    message = attempt_pb2.JobAssignment(
        attempt=job_codec.encode_ref(ref),
        template=spec.template,
        parameters=spec.parameters,
        cpus=held.cpus,
        memory_bytes=held.memory_bytes,
        name=spec.name,
    )
    if spec.max_run_seconds is not None:
        message.max_run.CopyFrom(job_codec.encode_duration(spec.max_run_seconds))
    return message


def decode_report(message: attempt_pb2.AttemptReport) -> model.Report:
    """How an attempt stands on its node; an ENDED one has an outcome. Raises `InvalidArgument`."""
    phase = job_codec.decode_phase(message.phase, field="attempts.phase")
    outcome = None
    if phase is model.AttemptPhase.ENDED:
        outcome = job_codec.decode_outcome(message.outcome, field="attempts.outcome")
    return model.Report(
        ref=job_codec.decode_ref(message.attempt, field="attempts.attempt"),
        phase=phase,
        outcome=outcome,
        start_time_seconds=job_codec.decode_time(message.start_time)
        if message.HasField("start_time")
        else None,
        end_time_seconds=job_codec.decode_time(message.end_time) if message.HasField("end_time") else None,
    )


def encode_report(report: model.Report) -> attempt_pb2.AttemptReport:
    """The message."""
    message = attempt_pb2.AttemptReport(
        attempt=job_codec.encode_ref(report.ref), phase=job_codec.encode_phase(report.phase)
    )
    if report.outcome is not None:
        message.outcome.CopyFrom(job_codec.encode_outcome(report.outcome))
    if report.start_time_seconds is not None:
        message.start_time.CopyFrom(job_codec.encode_time(report.start_time_seconds))
    if report.end_time_seconds is not None:
        message.end_time.CopyFrom(job_codec.encode_time(report.end_time_seconds))
    return message
