"""What the agent tells people to look at."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from leasehold.api.node.v1 import node_pb2, pool_pb2, worker_pb2
from leasehold.core.node import model
from leasehold.nodeagent import local, messages, status

GIB = model.GIB


@dataclass
class Host:
    """As much of an agent as is asked."""

    sample: model.MemorySample | None
    told: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return self.told


def sample(available_gb: float, total_gb: float = 64.0, bound_by: str = "MemAvailable") -> model.MemorySample:
    return model.MemorySample(
        total_bytes=round(total_gb * GIB), available_bytes=round(available_gb * GIB), bound_by=bound_by
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (sample(32.0), []),
        (sample(13.0), []),
        (sample(12.0), ["memory 81% used: 12.0 of 64.0 GB available (MemAvailable)"]),
        (
            sample(0.5, 4.0, "cgroup /jobs"),
            ["memory 88% used: 0.5 of 4.0 GB available (cgroup /jobs)"],
        ),
        (None, ["the host's memory cannot be read"]),
    ],
)
def test_memory_above_four_fifths_is_a_warning(found: model.MemorySample | None, told: list[str]) -> None:
    host = cast("Any", Host(found, ["the disk is full"]))

    assert status.warnings(host) == [*told, "the disk is full"]


def test_a_depth_that_is_not_known_is_not_zero() -> None:
    unknown = status.depth_status(model.Depth(error="no broker"))
    known = status.depth_status(model.Depth(ready=0, scheduled=2, is_lower_bound=True))

    assert [unknown.HasField(name) for name in ("ready", "unacknowledged", "scheduled")] == [False] * 3
    assert (known.ready, known.HasField("ready"), known.scheduled, known.is_lower_bound) == (0, True, 2, True)


def test_an_exit_that_nobody_knows_has_no_code() -> None:
    unknown = status.exit_status(model.WorkerExit(cause=model.ExitCause.UNKNOWN, detail="its shim died too"))
    clean = status.exit_status(
        model.WorkerExit(
            cause=model.ExitCause.CLEAN, exit_code=0, end_time_seconds=100.5, in_doubt_until_seconds=200.0
        )
    )

    assert unknown.cause == worker_pb2.EXIT_CAUSE_UNKNOWN
    assert [unknown.HasField(name) for name in ("exit_code", "end_time", "in_doubt_until")] == [False] * 3
    assert (clean.exit_code, clean.HasField("exit_code")) == (0, True)
    assert (clean.end_time.ToMilliseconds(), clean.in_doubt_until.ToMilliseconds()) == (100_500, 200_000)


def test_the_line_about_scaling_is_as_it_was() -> None:
    assert messages.scaling_line(3, 5) == "scaling: 3 -> 5 workers"


def test_people_read_how_the_agent_stands() -> None:
    from leasehold.api.node.v1 import agent_service_pb2

    answer = agent_service_pb2.GetAgentStatusResponse(
        node="r620-1",
        pid=7,
        status=node_pb2.NodeStatus(
            memory=node_pb2.MemoryStatus(
                total_bytes=64 * GIB, available_bytes=16 * GIB, bound_by="MemAvailable", used_ratio=0.75
            ),
            load_average=[4.0, 2.0, 1.0],
            load_per_core=0.5,
            warnings=["look here"],
            pools=[
                pool_pb2.PoolStatus(
                    name="asr",
                    running=1,
                    desired=2,
                    optimal=3,
                    mode=pool_pb2.POOL_MODE_MANUAL,
                    blocked_reason="why",
                )
            ],
        ),
    )

    told = local.lines(answer)

    assert "memory     48.0/64.0 GB (75.0%), available 16.0 GB by MemAvailable" in told
    assert "load       4.00 2.00 1.00, 0.50 per core" in told
    assert "allocator  not reached yet; works alone" in told
    assert "warning    look here" in told
    assert "pool       asr: 1 of 2 workers, optimal 3, manual" in told
    assert "           not started: why" in told
