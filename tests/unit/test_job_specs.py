"""Jobs in the units of people, and as lines of JSON."""

import json
from typing import Any

import pytest
from leasehold.cli import job_lines
from leasehold.client import job_batches, job_specs
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 2**30),
        ("512MB", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2**31),
        ("1024", 1024),
        ("1 TB", 2**40),
    ],
)
def test_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert job_specs.memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 PB", "1e9", "4GB5", "9" * 50])
def test_what_is_no_amount_of_memory_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        job_specs.memory_bytes(text)
    assert caught.value.field == "memory"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800), ("5", 5)]
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert job_specs.duration_seconds(text) == seconds


def test_a_line_of_json_is_a_job() -> None:
    line = {
        "template": "encode",
        "cpus": 2,
        "memory": "4GB",
        "parameters": {"input": "a.wav", "quality": 3},
        "max_run": "10m",
        "max_attempts": 3,
        "on_lost": "never",
    }

    assert job_lines.job(json.dumps(line)) == model.JobSpec(
        required=placement.Resources(2, 4 * 2**30),
        template="encode",
        parameters={"input": "a.wav", "quality": "3"},
        max_run_seconds=600.0,
        retry=model.RetryPolicy(max_attempts=3),
        on_lost=model.OnLost.NEVER,
    )


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"{", "line"),
        (b"[]", "line"),
        (b"\xff", "line"),
        (b'{"cpus": 1}', "memory"),
        (b'{"memory": "1GB"}', "cpus"),
        (b'{"cpus": 0, "memory": "1GB"}', "required_cpus"),
        (b'{"cpus": 1.5, "memory": "1GB"}', "cpus"),
        (b'{"cpus": true, "memory": "1GB"}', "cpus"),
        (b'{"cpus": 1, "cpus": 2, "memory": "1GB"}', "cpus"),
        (b'{"cpus": 1, "memory": "1GB", "gpus": 1}', "gpus"),
        (b'{"cpus": 1, "memory": "1GB", "parameters": {"a": null}}', "parameters.a"),
        (b'{"cpus": 1, "memory": "1GB", "on_lost": "always"}', "on_lost"),
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number_and_field(line: bytes, field: str) -> None:
    found = list(job_lines.parsed(iter([(1, b"\n"), (2, line)])))

    assert [number for number, _ in found] == [2]
    error: Any = found[0][1]
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == field


def test_chunks_are_bounded_by_number_and_by_bytes() -> None:
    small = job_specs.job_spec("encode", cpus=1, memory="1GB")
    large = job_specs.job_spec(
        "encode", cpus=1, memory="1GB", parameters={f"p{number}": "x" * 4096 for number in range(64)}
    )

    assert [len(chunk) for chunk in job_batches.chunks_of([small] * 2500)] == [1000, 1000, 500]
    chunks = list(job_batches.chunks_of([large] * 30))
    assert [len(chunk) for chunk in chunks] == [11, 11, 8]
    assert all(sum(job.ByteSize() for job in chunk) <= 3 * 2**20 for chunk in chunks)
