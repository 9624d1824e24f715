"""Jobs on the wire: what is right comes back as it was, what a stranger gets wrong is named."""

from typing import Any

import pytest
from google.protobuf import duration_pb2
from leasehold.api.job.v1 import attempt_pb2, job_pb2
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement
from leasehold.rpc import job_codec

JOB_ID = "0198c1de-7c1a-7b4e-9f0e-5b8c0a1d2e3f"
GIB = 2**30


def message(**fields: Any) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(**{"required_cpus": 2, "required_memory_bytes": GIB, **fields})


FULL = model.JobSpec(
    required=placement.Resources(4, 8 * GIB),
    name="Render frame 7 of 9 – ü",
    queue="nightly",
    priority=-7,
    node_selector={"rack": "b4", "empty": ""},
    template="render",
    parameters={"input_file": "a b.exr", "empty": ""},
    max_run_seconds=14 * 86_400.5,
    retry=model.RetryPolicy(max_attempts=3, initial_backoff_seconds=0.1, max_backoff_seconds=86_400.0),
    on_lost=model.OnLost.AFTER_FENCE,
    spreading=placement.Spreading.SPREAD,
    wait_for_capacity=True,
)


@pytest.mark.parametrize("spec", [FULL, model.JobSpec(required=placement.Resources(1, 1))])
def test_a_spec_comes_back_as_it_was_given(spec: model.JobSpec) -> None:
    assert job_codec.decode_spec(job_codec.encode_spec(spec)) == spec


def test_what_is_left_out_of_a_spec_has_its_default() -> None:
    spec = job_codec.decode_spec(message(retry=job_pb2.RetryPolicy()))
    assert spec == model.JobSpec(required=placement.Resources(2, GIB))
    assert (spec.queue, spec.on_lost, spec.spreading) == (
        "default",
        model.OnLost.AFTER_PROOF,
        placement.Spreading.PACK,
    )
    assert spec.max_run_seconds is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"required_cpus": 0}, "required_cpus"),
        ({"required_cpus": 100_001}, "required_cpus"),
        ({"required_memory_bytes": 0}, "required_memory_bytes"),
        ({"required_memory_bytes": -1}, "required_memory_bytes"),
        ({"name": "n" * 129}, "name"),
        ({"name": "bell\a"}, "name"),
        ({"queue": "Nightly"}, "queue"),
        ({"priority": 1001}, "priority"),
        ({"priority": -(2**31)}, "priority"),
        ({"node_selector": {f"k{n}": "" for n in range(33)}}, "node_selector"),
        ({"node_selector": {"rack": "v" * 64}}, "node_selector.rack"),
        ({"template": "../sh"}, "template"),
        ({"parameters": {"A": "b"}}, "parameters"),
        ({"parameters": {"a": "\0"}}, "parameters.a"),
        ({"max_run": duration_pb2.Duration()}, "max_run"),
        ({"max_run": duration_pb2.Duration(seconds=-1)}, "max_run"),
        ({"max_run": duration_pb2.Duration(seconds=400 * 86_400)}, "max_run"),
        ({"retry": {"max_attempts": 101}}, "retry.max_attempts"),
        ({"retry": {"initial_backoff": duration_pb2.Duration(seconds=-1)}}, "retry.initial_backoff"),
        ({"on_lost": 9}, "on_lost"),
        ({"on_lost": job_pb2.ON_LOST_AFTER_FENCE, "template": "render"}, "on_lost"),
        ({"spreading": 9}, "spreading"),
    ],
)
def test_what_is_wrong_with_a_spec_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        job_codec.decode_spec(message(**fields))
    assert caught.value.field == named
    assert len(caught.value.message) < 300


def allocation(**fields: Any) -> model.AllocationRecord:
    known: dict[str, Any] = {
        "ref": model.AttemptRef(JOB_ID, 2),
        "node": "r620-1",
        "boot_id": "",
        "held": placement.Resources(4, 8 * GIB),
        "queue": "nightly",
        "release_seq": 1,
        "allocate_time_seconds": 1_800_000_000.123456,
        "release_time_seconds": 1_800_000_060.5,
    }
    return model.AllocationRecord(**{**known, **fields})


def job(**fields: Any) -> model.JobRecord:
    known: dict[str, Any] = {
        "job_id": JOB_ID,
        "spec": FULL,
        "state": model.JobState.FAILED,
        "attempt": 2,
        "principal": "alice",
        "submit_time_seconds": 1_799_999_999.999999,
        "start_time_seconds": 1_800_000_001.0,
        "end_time_seconds": 1_800_000_060.5,
        "outcome": model.Outcome(cause=model.EndCause.FAILED, exit_code=0, signal=0, detail="no"),
        "allocation": allocation(),
    }
    return model.JobRecord(**{**known, **fields})


@pytest.mark.parametrize(
    "record",
    [
        job(),
        job(outcome=model.Outcome(cause=model.EndCause.OOM_KILLED, signal=9)),
        job(
            state=model.JobState.RUNNING,
            end_time_seconds=None,
            outcome=None,
            is_cancel_requested=True,
            allocation=allocation(release_seq=0, release_time_seconds=None),
        ),
        job(state=model.JobState.PENDING, end_time_seconds=None, not_before_seconds=1_800_000_100.25),
        model.JobRecord(job_id=JOB_ID, spec=FULL, state=model.JobState.PENDING, submit_time_seconds=1.0),
    ],
)
def test_a_job_comes_back_as_it_was_given(record: model.JobRecord) -> None:
    assert job_codec.decode_job(job_codec.encode_job(record)) == record


def test_the_phase_of_an_attempt_is_told_while_it_is_live() -> None:
    live = job(state=model.JobState.RUNNING, allocation=allocation(release_seq=0, release_time_seconds=None))
    told = job_codec.encode_job(live, model.AttemptPhase.UNKNOWN)
    assert told.allocation.phase == job_pb2.ATTEMPT_PHASE_UNKNOWN
    assert not told.allocation.is_released

    over = job_codec.encode_job(job(), model.AttemptPhase.STARTED)
    assert over.allocation.phase == job_pb2.ATTEMPT_PHASE_ENDED
    assert over.allocation.is_released


@pytest.mark.parametrize("cause", list(model.EndCause))
@pytest.mark.parametrize("exit_code", [None, 0, -1, 255])
def test_every_outcome_comes_back(cause: model.EndCause, exit_code: int | None) -> None:
    outcome = model.Outcome(cause=cause, exit_code=exit_code, signal=15, detail="ended")
    assert job_codec.decode_outcome(job_codec.encode_outcome(outcome)) == outcome


@pytest.mark.parametrize("phase", list(model.AttemptPhase))
def test_every_phase_comes_back(phase: model.AttemptPhase) -> None:
    assert job_codec.decode_phase(job_codec.encode_phase(phase)) is phase


@pytest.mark.parametrize("state", list(model.JobState))
def test_every_state_comes_back(state: model.JobState) -> None:
    assert job_codec.decode_states([job_codec.encode_state(state)]) == {state}


@pytest.mark.parametrize(
    ("ref", "named"),
    [
        (attempt_pb2.AttemptRef(job_id="7", attempt=1), "job_id"),
        (attempt_pb2.AttemptRef(job_id=JOB_ID.upper(), attempt=1), "job_id"),
        (attempt_pb2.AttemptRef(job_id=JOB_ID), "attempt"),
        (attempt_pb2.AttemptRef(job_id=JOB_ID, attempt=2**32 - 1), "attempt"),
    ],
)
def test_what_is_no_attempt_is_named(ref: attempt_pb2.AttemptRef, named: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        job_codec.decode_ref(ref)
    assert caught.value.field == named


def test_numbers_of_a_newer_version_are_refused_by_name() -> None:
    for decode in (
        lambda: job_codec.decode_states([99]),
        lambda: job_codec.decode_phase(0),
        lambda: job_codec.decode_outcome(job_pb2.JobOutcome(cause=99)),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.InvalidArgument):
            decode()


@pytest.mark.parametrize(
    "queue",
    [
        placement.Queue(name="nightly"),
        placement.Queue(name="nightly", nominal_cpus=0, nominal_memory_bytes=0),
        placement.Queue(name="nightly", nominal_cpus=64),
    ],
)
def test_a_queue_comes_back_and_no_limit_is_not_nothing(queue: placement.Queue) -> None:
    assert job_codec.decode_queue(job_codec.encode_queue(queue)) == queue


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "queue.name"),
        ({"name": "q", "nominal_memory_bytes": -1}, "queue.nominal_memory_bytes"),
        ({"name": "q", "nominal_cpus": 2**31}, "queue.nominal_cpus"),
    ],
)
def test_what_is_wrong_with_a_queue_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        job_codec.decode_queue(job_pb2.Queue(**fields))
    assert caught.value.field == named


@pytest.mark.parametrize("request_id", ["", "r" * 65, "ü", "tab\t"])
def test_a_request_id_that_is_needed_is_checked(request_id: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        job_codec.checked_request_id(request_id, is_needed=True)
    assert caught.value.field == "request_id"
    assert job_codec.checked_request_id("") == ""


def test_an_explanation_comes_back_by_the_wall_clock() -> None:
    explanation = placement.Explanation(
        summary="7 nodes: 4 lack 4 CPUs, 3 draining",
        blocked=(
            placement.NodesBlocked(nodes=4, reason=placement.BlockReason.LACKS_CPUS, detail="4 lack 4 CPUs"),
            placement.NodesBlocked(nodes=3, reason=placement.BlockReason.DRAINING, detail="3 draining"),
        ),
        held_back=placement.HeldBack.QUEUE_QUOTA,
        held_back_detail="queue nightly has 4 of 4 CPUs",
        place_in_line=3,
        line_length=9,
        starts_by=100.0,
        node="r620-1",
    )
    told = job_codec.encode_explanation(
        explanation, model.JobState.PENDING, wall_offset_seconds=1_800_000_000.0
    )
    assert told.state == job_pb2.JOB_STATE_PENDING
    back = job_codec.decode_explanation(told)
    assert back.starts_by == 1_800_000_100.0
    assert (back.summary, back.blocked, back.held_back) == (
        explanation.summary,
        explanation.blocked,
        explanation.held_back,
    )


def test_an_estimate_that_nobody_can_make_is_not_set() -> None:
    told = job_codec.encode_explanation(
        placement.Explanation(summary="no node", blocked=()), model.JobState.PENDING, wall_offset_seconds=1.0
    )
    assert not told.HasField("estimated_start_time")
    assert job_codec.decode_explanation(told).starts_by is None
