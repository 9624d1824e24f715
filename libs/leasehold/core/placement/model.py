"""What placement knows of nodes, queues and waiting jobs, and what it answers. Values only.

CPUs are whole processors (int), memory is bytes (int), durations are seconds (float), instants are the caller's
monotonic clock.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Resources(NamedTuple):
    """CPUs and memory, of a node or of a job."""

    cpus: int
    memory_bytes: int

    def plus(self, other: "Resources") -> "Resources":
        """Both together."""
        return Resources(self.cpus + other.cpus, self.memory_bytes + other.memory_bytes)

    def minus(self, other: "Resources") -> "Resources":
        """What is left; a part may be negative."""
        return Resources(self.cpus - other.cpus, self.memory_bytes - other.memory_bytes)

    def holds(self, other: "Resources") -> bool:
        """Whether `other` fits in."""
        return other.cpus <= self.cpus and other.memory_bytes <= self.memory_bytes


class Spreading(enum.StrEnum):
    """Which of the nodes that fit is taken."""

    PACK = "pack"
    SPREAD = "spread"


class Openness(enum.StrEnum):
    """Whether a node takes new jobs."""

    OPEN = "open"
    DRAINING = "draining"
    #: Lost, gone, not heard of by this leader, or shrunk below what it has given out.
    NOT_READY = "not_ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as placement sees it."""

    name: str
    #: What its host declares for jobs.
    total: Resources
    #: Committed allocations together. Above `total` in a part after the total has shrunk.
    used: Resources
    openness: Openness
    labels: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    templates: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides where a job fits; equal for many jobs."""

    required: Resources
    selector: tuple[tuple[str, str], ...] = ()
    #: Empty: it runs elsewhere, and any node will do.
    template: str = ""
    spreading: Spreading = Spreading.PACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job in line."""

    job_id: str
    shape: Shape
    queue: str
    priority: int
    #: Wall clock of its submit; with the priority it gives its place: submit time - priority * ageing.
    submit_time_seconds: float
    #: Longest that it may run; None: no end is known.
    max_run_seconds: float | None
    #: Not before then (backoff of a retry).
    not_before: float = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A job that has an allocation."""

    job_id: str
    node: str
    queue: str
    held: Resources
    #: When it has ended at the latest; None: nobody can tell.
    ends_by: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A queue and its quota; None: no limit."""

    name: str
    nominal_cpus: int | None = None
    nominal_memory_bytes: int | None = None


class Placement(NamedTuple):
    """This job goes to this node."""

    job_id: str
    node: str


class BlockReason(enum.StrEnum):
    """Why a node does not take a job; the first that holds, in this order."""

    NOT_READY = "NOT_READY"
    DRAINING = "DRAINING"
    WRONG_LABEL = "WRONG_LABEL"
    NO_TEMPLATE = "NO_TEMPLATE"
    #: Not even empty.
    TOO_SMALL = "TOO_SMALL"
    LACKS_CPUS = "LACKS_CPUS"
    LACKS_MEMORY = "LACKS_MEMORY"
    #: It has room, which is kept for a job that is first in line.
    RESERVED = "RESERVED"


class HeldBack(enum.StrEnum):
    """Why a job does not start although a node has room."""

    QUEUE_QUOTA = "QUEUE_QUOTA"
    BEHIND_RESERVATION = "BEHIND_RESERVATION"
    BACKOFF = "BACKOFF"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesBlocked:
    """So many nodes, for one reason."""

    nodes: int
    reason: BlockReason
    #: For people, as ``4 lack 4 CPUs``.
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a job waits, or what would become of one."""

    #: One sentence, as ``7 nodes: 4 lack 4 CPUs, 2 draining, 1 wrong label``.
    summary: str
    blocked: tuple[NodesBlocked, ...]
    held_back: HeldBack | None = None
    held_back_detail: str = ""
    #: From 1; 0: not in line.
    place_in_line: int = 0
    line_length: int = 0
    #: At the latest, absent node loss and changes of totals; None: nobody can tell.
    starts_by: float | None = None
    #: Where it would start now; empty: nowhere.
    node: str = ""
