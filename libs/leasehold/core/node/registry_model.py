"""What the registry knows of nodes: values, states and the legal moves between them.

Durations are seconds (float), instants are the caller's monotonic clock, memory is bytes (int).
"""

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from leasehold.core import errors
from leasehold.core.node import model

NODES_MAX = 10_000
LABELS_MAX = 32
LABEL_LENGTH_MAX = 63
#: Incarnations, namespaces and bytes are kept in Postgres's bigint.
NUMBER_MAX = 2**63 - 1
CPUS_MAX = 100_000
JOB_MEMORY_BYTES_MAX = 2**62
JOB_TEMPLATES_MAX = 64

_NODE_ID = re.compile(r"[!-~]{8,64}")
_BOOT_ID = re.compile(r"[!-~]{1,64}")


class NodeState(enum.StrEnum):
    """Where a node is in its life; what each means is told in ``node.proto``."""

    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    GONE = "gone"


#: States in which a node's agent is there, for all that is known.
ALIVE_STATES = frozenset({NodeState.READY, NodeState.DRAINING})

#: Every legal move, with its reason.
NODE_EDGES: Mapping[tuple[NodeState, NodeState], str] = MappingProxyType(
    {
        (NodeState.READY, NodeState.DRAINING): "its agent drains",
        (NodeState.DRAINING, NodeState.READY): "its agent takes work up again",
        (NodeState.READY, NodeState.LOST): "no report within its TTL",
        (NodeState.DRAINING, NodeState.LOST): "no report within its TTL",
        (NodeState.READY, NodeState.GONE): "its agent said that it ends",
        (NodeState.DRAINING, NodeState.GONE): "its agent said that it ends",
        (NodeState.LOST, NodeState.GONE): "its agent said that it ends",
        (NodeState.LOST, NodeState.READY): "its agent reports again",
        (NodeState.LOST, NodeState.DRAINING): "its agent reports again, and drains",
        (NodeState.GONE, NodeState.READY): "an agent has registered",
        (NodeState.GONE, NodeState.DRAINING): "an agent has registered, and drains",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What an agent says of itself when it connects. Raises `InvalidArgument`, naming the field."""

    name: str
    #: Random id that the host keeps: tells two hosts of one name apart.
    node_id: str
    #: Grows with each start of the agent.
    incarnation: int
    boot_id: str
    #: Of the agent: it can certify deaths of processes of this boot and PID namespace.
    pid_namespace: int
    cpus: int = 0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    #: What jobs may have of it together; 0: nothing. Not compared: it is kept with the jobs, not with the node.
    job_cpus: int = field(default=0, compare=False)
    job_memory_bytes: int = field(default=0, compare=False)
    #: Names of the job templates that the host declares.
    job_templates: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        model.checked_node_name(self.name, field_name="registration.name")
        if not _NODE_ID.fullmatch(self.node_id):
            raise _wrong("node_id", "8 to 64 printable ASCII characters without a space")
        if not _BOOT_ID.fullmatch(self.boot_id):
            raise _wrong("boot_id", "1 to 64 printable ASCII characters without a space")
        bounds = {
            "incarnation": (self.incarnation, NUMBER_MAX),
            "pid_namespace": (self.pid_namespace, NUMBER_MAX),
            "resources.cpus": (self.cpus, CPUS_MAX),
            "resources.memory_bytes": (self.memory_bytes, NUMBER_MAX),
            "job_resources.cpus": (self.job_cpus, CPUS_MAX),
            "job_resources.memory_bytes": (self.job_memory_bytes, JOB_MEMORY_BYTES_MAX),
        }
        for name, (number, most) in bounds.items():
            if not 0 <= number <= most:
                raise _wrong(name, f"0 to {most}, not {number}")
        _check_labels(self.labels)
        if len(self.job_templates) > JOB_TEMPLATES_MAX:
            raise _wrong("job_templates", f"at most {JOB_TEMPLATES_MAX}, not {len(self.job_templates)}")
        for template in self.job_templates:
            model.checked_pool_name(template, field_name="registration.job_templates")


def _wrong(name: str, allowed: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"registration.{name}: {allowed}", field=f"registration.{name}")


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > LABELS_MAX:
        raise _wrong("labels", f"at most {LABELS_MAX}, not {len(labels)}")
    for key, value in labels.items():
        if not 1 <= len(key) <= LABEL_LENGTH_MAX or not key.isprintable():
            raise _wrong("labels", f"a key has 1 to {LABEL_LENGTH_MAX} printable characters, not {key[:70]!r}")
        if len(value) > LABEL_LENGTH_MAX or not value.isprintable():
            raise _wrong("labels", f"the value of {key!r} has over {LABEL_LENGTH_MAX} characters, or odd ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """What is durable of a node."""

    registration: Registration
    state: NodeState = NodeState.READY
    #: Why it is in this state, for people.
    cause: str = ""
    #: Wall clock of this incarnation's first registration, for people; decides nothing.
    register_time_seconds: float = 0.0

    @property
    def name(self) -> str:
        """The node's name."""
        return self.registration.name


@dataclass(frozen=True, slots=True)
class Terms:
    """How often a node reports, and how long it may be silent."""

    ttl_seconds: float
    report_interval_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How terms follow from the number of nodes: reports stay bounded, and a dead host of few is seen soon."""

    #: Of all nodes together.
    reports_per_second_max: float = 500.0
    interval_seconds_min: float = 1.0
    #: Of intervals, so that terms do not change with every node that comes.
    interval_step_seconds: float = 0.25
    #: Reports that may fail before a node is lost.
    ttl_intervals: float = 4.0

    def terms(self, nodes: int) -> Terms:
        """The terms of `nodes` nodes."""
        steps = math.ceil(nodes / self.reports_per_second_max / self.interval_step_seconds)
        interval = max(self.interval_seconds_min, steps * self.interval_step_seconds)
        return Terms(interval * self.ttl_intervals, interval)
