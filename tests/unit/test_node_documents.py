"""Nodes, pools and workers as documents and as people see them: what is not known, how workers ended."""

import json
from typing import Any

import fake_fleet
import pytest
from leasehold.api.node.v1 import node_pb2, pool_pb2, worker_pb2
from leasehold.cli import node_tables
from leasehold.core.node import model
from leasehold.rpc import node_documents, wire_values


def host() -> fake_fleet.FakeHost:
    made = fake_fleet.FakeHost("r620-1")
    made.add_pool("transcription", 2)
    return made


def node(of: fake_fleet.FakeHost, **fields: Any) -> node_documents.Node:
    message = node_pb2.Node(name=of.name, state=node_pb2.NODE_STATE_READY, status=of.status())
    message.MergeFrom(node_pb2.Node(**fields))
    return node_documents.node(message)


def ended(cause: "worker_pb2.ExitCause.ValueType", **fields: Any) -> worker_pb2.WorkerStatus:
    end = worker_pb2.WorkerExit(cause=cause, **fields)
    end.end_time.FromJsonString("2026-01-02T03:04:05Z")
    return worker_pb2.WorkerStatus(
        name="transcription_3@r620-1", pool="transcription", state=worker_pb2.WORKER_STATE_EXITED, exit=end
    )


def test_an_empty_message_is_a_document_of_nulls_and_zeros_without_a_claim() -> None:
    document = node_documents.node(node_pb2.Node(name="n"))

    assert document["state"] is None
    assert (document["status"], document["last_report_age_seconds"], document["register_time"]) == (None,) * 3
    pool = node_documents.pool(pool_pb2.PoolStatus(), node="n")
    assert (pool["mode"], pool["depth"], pool["manual_target"], pool["blocked_reason"]) == (None,) * 4
    worker = node_documents.worker(worker_pb2.WorkerStatus(), node="n")
    assert (worker["state"], worker["pid"], worker["is_busy"], worker["exit"]) == (None,) * 4


def test_a_queue_of_unknown_depth_is_null_and_an_empty_one_is_0() -> None:
    unknown = pool_pb2.PoolStatus(depth=pool_pb2.QueueDepth(error="broker away"))
    empty = pool_pb2.PoolStatus(depth=pool_pb2.QueueDepth(ready=0))

    assert node_documents.pool(unknown, node="n")["depth"] == {
        "ready": None,
        "unacknowledged": None,
        "scheduled": None,
        "is_lower_bound": False,
        "error": "broker away",
    }
    depth = node_documents.pool(empty, node="n")["depth"]
    assert depth is not None
    assert depth["ready"] == 0


def test_values_of_a_newer_version_are_not_known_and_no_unknown_end_is_a_clean_one() -> None:
    message = worker_pb2.WorkerStatus(state=99, memory_source=99)  # type: ignore[arg-type]
    message.exit.cause = 99  # type: ignore[assignment]

    document = node_documents.worker(message, node="n")

    assert (document["state"], document["memory_source"]) == (None, None)
    assert document["exit"] is not None
    assert document["exit"]["cause"] is model.ExitCause.UNKNOWN
    assert document["exit"]["exit_code"] is None


@pytest.mark.parametrize("cause", [each for each in worker_pb2.ExitCause.values() if each])
def test_every_cause_state_mode_and_source_has_its_name(cause: int) -> None:
    document = node_documents.worker(ended(cause), node="n")  # type: ignore[arg-type]

    assert document["exit"] is not None
    wanted = worker_pb2.ExitCause.Name(cause).removeprefix("EXIT_CAUSE_").lower()  # type: ignore[arg-type]
    assert document["exit"]["cause"].value == wanted
    for number in worker_pb2.WorkerState.values()[1:]:
        assert node_documents.worker(worker_pb2.WorkerStatus(state=number), node="n")["state"]
    for mode in pool_pb2.PoolMode.values()[1:]:
        assert node_documents.pool(pool_pb2.PoolStatus(mode=mode), node="n")["mode"]
    for source in worker_pb2.MemorySource.values()[1:]:
        found = node_documents.worker(worker_pb2.WorkerStatus(memory_source=source), node="n")
        assert found["memory_source"]
    for state in node_pb2.NodeState.values()[1:]:
        assert node_documents.node(node_pb2.Node(state=state))["state"]


def test_large_numbers_stay_integers_in_json() -> None:
    document = json.loads(json.dumps(node(host(), incarnation=2**63)))

    assert document["incarnation"] == 2**63
    assert document["status"]["memory"]["total_bytes"] == 64 * 2**30
    assert type(document["status"]["memory"]["total_bytes"]) is int


def test_warnings_are_of_memory_the_agent_its_pools_and_what_blocks_them() -> None:
    tight = fake_fleet.FakeHost("r620-1", available_gb=10.0)
    tight.add_pool("transcription", 1)
    tight.warnings.append("the disk of the state folder is full")
    tight.pools["transcription"].warnings.append("visibility_timeout is 3600")
    tight.pools["transcription"].blocked_reason = "exit code 125"

    assert node_documents.warnings(node(tight)) == [
        "memory 54.0/64.0 GB (84.4%) is above 80%",
        "the disk of the state folder is full",
        "pool transcription: visibility_timeout is 3600",
        "pool transcription: no worker is started: exit code 125",
    ]


def test_memory_above_80_percent_is_not_warned_of_twice() -> None:
    tight = fake_fleet.FakeHost("r620-1", available_gb=10.0)
    tight.warnings.append("memory is 84.4% used, above 80%")

    assert node_documents.warnings(node(tight)) == ["memory is 84.4% used, above 80%"]


def glance(of: fake_fleet.FakeHost, capsys: pytest.CaptureFixture[str]) -> str:
    node_tables.glance([node(of)])
    return capsys.readouterr().out


def test_failures_are_told_one_by_one_with_their_causes(capsys: pytest.CaptureFixture[str]) -> None:
    made = host()
    pool = made.pools["transcription"]
    pool.crashes_total, pool.oom_kills_total = 2, 1
    pool.workers.append(
        ended(worker_pb2.EXIT_CAUSE_OOM_KILLED, signal=9, detail="its cgroup counts 1 OOM kill, limit 4.0 GB")
    )
    pool.workers.append(ended(worker_pb2.EXIT_CAUSE_STOPPED, exit_code=0))
    pool.backoff_remaining.FromSeconds(8)

    text = glance(made, capsys)

    assert "failures  2 crashes, 1 OOM kill since the agent began\n" in text
    assert (
        "          transcription_3@r620-1: oom killed by signal 9 at 03:04:05: its cgroup counts 1 OOM kill, "
        "limit 4.0 GB\n" in text
    )
    assert text.count("transcription_3@r620-1") == 1
    assert "pending   0 starting, 0 stopping; transcription waits 8 s after crashes\n" in text


def test_a_pools_line_says_why_and_an_unknown_queue_is_a_question_mark(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = host()
    pool = made.pools["transcription"]
    pool.depth.ClearField("ready")
    pool.is_overcommitted = True
    pool.summary = "auto 2, running 2"
    pool.blocked_reason = "broker away"

    row = glance(made, capsys).splitlines()[-1]

    assert row.split()[:7] == ["transcription", "auto", "2", "2", "2", "1..6", "?"]
    assert row.endswith(
        "auto 2, running 2; overcommitted: MIN is more than memory allows; no worker is started: broker away"
    )


def test_a_node_that_this_leader_has_not_heard_of_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    silent = node_documents.node(node_pb2.Node(name="r620-9", state=node_pb2.NODE_STATE_LOST))

    node_tables.glance([silent])
    node_tables.nodes([silent])

    out = capsys.readouterr().out
    assert "r620-9: lost; it has not reported to this leader yet\n" in out
    assert out.splitlines()[-1].split() == ["r620-9", "lost", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"is_busy": True, "task_name": "tasks.run", "task_id": "7"}, "tasks.run 7"),
        ({"is_busy": True}, "busy"),
        ({"is_busy": False, "is_adopted": True}, "idle; adopted"),
        ({}, "-"),
        (
            {"stop_step": "TERM", "stop_step_remaining": wire_values.encode_seconds(3600), "is_busy": True},
            "TERM sent, 1 h left; busy",
        ),
    ],
)
def test_what_a_worker_does_is_one_line(fields: dict[str, Any], told: str) -> None:
    assert node_tables.doing(node_documents.worker(worker_pb2.WorkerStatus(**fields), node="n")) == told


def test_a_killed_workers_task_is_in_doubt_until_a_time() -> None:
    message = ended(worker_pb2.EXIT_CAUSE_CRASHED, signal=9)
    message.exit.in_doubt_until.FromJsonString("2026-01-02T04:19:05Z")

    document = node_documents.worker(message, node="n")

    assert node_tables.doing(document) == ("crashed by signal 9 at 03:04:05; its task is in doubt until 04:19")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0, "0 s"), (59.4, "59 s"), (60.0, "1 min"), (7200.0, "2 h"), (200_000.0, "2 d")],
)
def test_durations_are_told_in_their_largest_unit(seconds: float, told: str) -> None:
    assert node_tables.duration(seconds) == told
