"""What holders and the allocator tell each other, free of any wire format.

Amounts are micro-units by dimension name, durations relative seconds. The wire form, in
`proto/leasehold/api/budget/v1/lease.proto`, says what absence means.

Nobody changes a message that was made. Those of a renewal are not frozen nevertheless: setting a field of a
frozen dataclass takes three times as long, and these have many.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core import epoch as epochs
from leasehold.core import processes
from leasehold.core.budget import model

Amounts = Mapping[str, int]


class LeaseEnd(enum.StrEnum):
    """Why a lease is no longer its holder's."""

    RELEASED = "released"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    BUDGET_DELETED = "budget_deleted"


@dataclass(slots=True)
class Cooling:
    """`amounts[i]` of `dimension` come back `remaining_seconds[i]` after the report was made."""

    dimension: str
    amounts: tuple[int, ...]
    remaining_seconds: tuple[float, ...]


@dataclass(slots=True, kw_only=True)
class Holdings:
    """What a holder physically has; every amount is an upper bound."""

    held: Amounts
    cooling: tuple[Cooling, ...] = ()
    refundable: Amounts = field(default_factory=dict)
    #: Largest cost that may be admitted on pacing credit; a dimension left out is not bounded.
    largest_cost: Amounts = field(default_factory=dict)
    admitted_total: Amounts = field(default_factory=dict)
    overdraft_total: Amounts = field(default_factory=dict)
    #: What cools longer than this is not spent anew before an answer to this report, or to a later one; no step
    #: of `cooling` spans it. 0: nothing is promised.
    respend_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Throttle:
    """A provider's 429; `dimension` is empty where the provider did not say which limit."""

    dimension: str = ""
    retry_after_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Report:
    """A holder's statement about one lease, and its request for renewal."""

    budget: str
    holder: str
    incarnation: str
    sequence: int
    lease_id: int = 0
    #: This incarnation had a lease before and lost it; it must not supersede a newer one.
    is_rejoin: bool = False
    grant_version: int = 0
    is_active: bool = False
    current_load: float = 0.0
    active_tasks: int = 0
    demand: Amounts = field(default_factory=dict)
    waiting_cost: Amounts = field(default_factory=dict)
    #: None: the holder does not track its use.
    holdings: Holdings | None = None
    throttles: tuple[Throttle, ...] = ()
    process: processes.ProcessKey | None = None
    #: The holder's CLOCK_BOOTTIME at which the report was made; 0 where it is not told.
    boottime_nanos: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A holder gives its lease back."""

    budget: str
    holder: str
    incarnation: str
    lease_id: int
    holdings: Holdings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a holder must know of its budget to admit locally."""

    dimensions: tuple[model.Dimension, ...]
    arrival_jitter_seconds: float
    max_call_seconds: float
    activity_timeout_seconds: float
    safe_ttl_seconds: float
    max_tokens_per_request: int
    charged_at: model.ChargedAt
    safe_capacity: Amounts = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Grant:
    """The allocator's word about one lease: an answer (`answered_sequence` > 0) or a push (0)."""

    budget: str
    holder: str
    incarnation: str
    lease_id: int
    epoch: epochs.Epoch
    version: int
    answered_sequence: int = 0
    ttl_seconds: float = 0.0
    refresh_seconds: float = 0.0
    amounts: Amounts = field(default_factory=dict)
    terms: Terms | None = None
    end: LeaseEnd | None = None
    total_workers: int = 0
    active_workers: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A report that was refused; the lease it names, if any, is as it was."""

    budget: str
    holder: str
    incarnation: str
    sequence: int
    reason: str
    message: str
    field: str = ""
