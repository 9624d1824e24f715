"""What goes into and comes out of the machine of jobs, beside changes and records.

The shell executes effects in order. Each tells of what is committed: an answer to a caller comes after its
commit, and so does what a node is told to start or to forget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from leasehold.core import errors
from leasehold.core.job import model
from leasehold.core.placement import model as placement

_NOTHING: Mapping[str, str] = MappingProxyType({})

# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node is now."""

    name: str
    boot_id: str
    #: Of its agent's state folder: another one knows nothing of what was started before.
    node_id: str
    declared: placement.Resources
    labels: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    templates: frozenset[str] = frozenset()
    openness: placement.Openness = placement.Openness.OPEN
    #: Its agent has a connection.
    is_connected: bool = True


# Values of answers


@dataclass(frozen=True, slots=True)
class SubmitVerdict:
    """What became of one job of a submit. A submit's answer is a tuple of them, in the order of specs."""

    #: Empty: refused.
    job_id: str
    error: errors.LeaseholdError | None = None


@dataclass(frozen=True, slots=True)
class Acquired:
    """The answer to an acquire."""

    allocation: model.AllocationRecord
    #: From the send of the call on.
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class Renewed:
    """The answer to a renewal."""

    ttl_seconds: float
    #: The job was cancelled: end the work and release.
    is_cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The answer to an operator's word that a silence is real."""

    #: False: no reclaims were held back, and the word changed nothing.
    was_held_back: bool
    #: Allocations that were given up on it; their releases are committed.
    given_up: int


# Effects


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request; a ticket is answered once. `value` counts where there is no `error`."""

    ticket: int
    value: Any = None
    error: errors.LeaseholdError | None = None


@dataclass(frozen=True, slots=True)
class Assign:
    """Have a node's agent run an attempt. One that the agent knows already is passed over by it."""

    node: str
    ref: model.AttemptRef
    spec: model.JobSpec
    held: placement.Resources


@dataclass(frozen=True, slots=True)
class Stop:
    """Have an attempt ended by its stop contract; one that has not started never does."""

    node: str
    ref: model.AttemptRef


@dataclass(frozen=True, slots=True)
class Forget:
    """The end of an attempt is committed: its agent may forget it."""

    node: str
    ref: model.AttemptRef


@dataclass(frozen=True, slots=True)
class Changed:
    """What can be read of a job is another than before."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    event: str
    fields: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class SaveBreaker:
    """Keep, over failovers, whether reclaims by timeout are held back. Before the next batch.

    The shell tells the machine by `breaker_saved` once it is kept.
    """

    is_open: bool
    cause: str
    #: Who acknowledged; empty: nobody, it closed or tripped by itself.
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Reload:
    """The ledger holds other than what was committed here: read it anew, then call `reloaded`.

    Until then `take_batch` gives nothing. Only rows that somebody wrote by hand lead to this.
    """

    cause: str


Effect = Answer | Assign | Stop | Forget | Changed | Note | SaveBreaker | Reload
