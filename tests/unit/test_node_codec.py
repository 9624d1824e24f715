"""Nodes and orders on the wire: what a stranger gets wrong is named, what is right comes back as it was."""

from typing import Any

import pytest
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import order_pb2
from leasehold.core import errors
from leasehold.core.node import registry_model
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import node_codec


def message(**fields: Any) -> wire.NodeRegistration:
    known: dict[str, Any] = {
        "name": "r620-1",
        "node_id": "7d3e9a10c4",
        "incarnation": 3,
        "boot_id": "5f2c2f0e-8f6e-4d0b-9a43-1a2b3c4d5e6f",
        "pid_namespace": 4026531836,
        "resources": {"cpus": 8, "memory_bytes": 64 * 2**30},
        "labels": {"rack": "b4", "empty": ""},
        "job_resources": {"cpus": 4, "memory_bytes": 16 * 2**30},
        "job_templates": ["render", "transcode"],
    }
    return wire.NodeRegistration(**{**known, **fields})


def test_a_registration_is_read_as_it_was_told() -> None:
    given = message()
    read = node_codec.decode_registration(given)
    for name in ("name", "node_id", "incarnation", "boot_id", "pid_namespace"):
        assert getattr(read, name) == getattr(given, name)
    assert (read.cpus, read.memory_bytes) == (given.resources.cpus, given.resources.memory_bytes)
    assert read.labels == dict(given.labels)
    assert (read.job_cpus, read.job_memory_bytes) == (
        given.job_resources.cpus,
        given.job_resources.memory_bytes,
    )
    assert read.job_templates == set(given.job_templates)
    assert node_codec.encode_resources(read) == given.resources


def test_a_host_without_jobs_declares_nothing_for_them() -> None:
    decoded = node_codec.decode_registration(message(job_resources=None, job_templates=[]))
    assert (decoded.job_cpus, decoded.job_memory_bytes, decoded.job_templates) == (0, 0, frozenset())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "../etc"}, "registration.name"),
        ({"name": ""}, "registration.name"),
        ({"name": "n" * 300}, "registration.name"),
        ({"name": "R620"}, "registration.name"),
        ({"node_id": "short"}, "registration.node_id"),
        ({"node_id": "x" * 65}, "registration.node_id"),
        ({"node_id": "with a space"}, "registration.node_id"),
        ({"boot_id": ""}, "registration.boot_id"),
        ({"boot_id": "b" * 65}, "registration.boot_id"),
        ({"incarnation": 2**63}, "registration.incarnation"),
        ({"resources": {"memory_bytes": -1}}, "registration.resources.memory_bytes"),
        ({"resources": {"cpus": 200_000}}, "registration.resources.cpus"),
        ({"labels": {f"key{n}": "v" for n in range(33)}}, "registration.labels"),
        ({"labels": {"k" * 64: "v"}}, "registration.labels"),
        ({"labels": {"k": "v" * 64}}, "registration.labels"),
        ({"labels": {"": "v"}}, "registration.labels"),
        ({"labels": {"k\n": "v"}}, "registration.labels"),
        ({"job_resources": {"cpus": 200_000}}, "registration.job_resources.cpus"),
        ({"job_resources": {"memory_bytes": -1}}, "registration.job_resources.memory_bytes"),
        ({"job_templates": [f"t{n}" for n in range(65)]}, "registration.job_templates"),
        ({"job_templates": ["../sh"]}, "registration.job_templates"),
    ],
)
def test_what_is_wrong_with_a_registration_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        node_codec.decode_registration(message(**fields))
    assert caught.value.field == named
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("kind", list(rpc_errors.all_classes()), ids=lambda kind: kind.__name__)
def test_every_refusal_survives_an_answer(kind: type[errors.LeaseholdError]) -> None:
    if kind is errors.NotLeader:
        error: errors.LeaseholdError = errors.NotLeader("10.0.0.7:7400")
    elif issubclass(kind, errors.InvalidArgument):
        error = kind("9 is over MAX_WORKERS 8", field="workers", metadata={"max": "8"})
    else:
        error = kind("beyond memory now", metadata={"free_bytes": "1"})
    received = node_codec.decode_error(node_codec.encode_error(error))
    assert type(received) is kind
    assert (received.message, received.field, received.metadata) == (error.message, error.field, error.metadata)


def test_a_refusal_of_a_newer_version_is_one_of_the_state() -> None:
    received = node_codec.decode_error(order_pb2.OrderError(reason="TOO_HOT", message="92 degrees"))
    assert isinstance(received, errors.FailedPrecondition)
    assert received.metadata["unknown_reason"] == "TOO_HOT"


def test_an_order_that_says_nothing_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        node_codec.order_kind(order_pb2.Order(order_id="o-1"))
    assert caught.value.field == "order"
    scale = order_pb2.Order(scale=order_pb2.ScaleOrder(workers=4))
    assert node_codec.order_kind(scale) == "scale"


@pytest.mark.parametrize("order_id", ["o" * 65, "tab\t", "ü"])
def test_an_order_id_is_short_and_plain(order_id: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        node_codec.checked_order_id(order_id)


@pytest.mark.parametrize("nodes", [0, 1, 100, 500])
def test_few_nodes_report_each_second_and_a_dead_one_is_lost_within_five(nodes: int) -> None:
    terms = registry_model.Pace().terms(nodes)
    assert terms.report_interval_seconds == 1.0
    assert terms.ttl_seconds == 4.0


@pytest.mark.parametrize("nodes", [501, 1_000, 1_001, 9_999])
def test_many_nodes_together_report_at_most_500_times_a_second(nodes: int) -> None:
    terms = registry_model.Pace().terms(nodes)
    assert nodes / terms.report_interval_seconds <= 500.0
    assert terms.ttl_seconds == 4 * terms.report_interval_seconds
    assert node_codec.decode_terms(node_codec.encode_terms(terms)) == terms
