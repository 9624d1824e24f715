"""Budget definitions: values, defaults and what is refused.

Durations are seconds (float). Limits are micro-units (see `quantity`).
"""

import enum
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from leasehold.core import errors
from leasehold.core.budget import quantity


class DimensionKind(enum.StrEnum):
    """How units are used up and come back."""

    RATE = "rate"
    CONCURRENCY = "concurrency"
    SLOTS = "slots"


class Policy(enum.StrEnum):
    """How a budget is divided; see `shares`."""

    ACTIVE_SHARE = "active_share"
    MAX_MIN = "max_min"
    PROPORTIONAL = "proportional"
    STATIC = "static"


class ChargedAt(enum.StrEnum):
    """When units of a rate dimension begin to cool."""

    ARRIVAL = "arrival"
    COMPLETION = "completion"


STANDARD_KINDS: Mapping[str, DimensionKind] = MappingProxyType(
    {
        "max_concurrent_requests": DimensionKind.CONCURRENCY,
        "rpm_limit": DimensionKind.RATE,
        "tpm_limit": DimensionKind.RATE,
        "num_workers": DimensionKind.SLOTS,
    }
)

_BUDGET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")
_DIMENSION_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_INCARNATION = re.compile(r"[A-Za-z0-9._:-]{8,64}")

DIMENSIONS_MAX = 16
HOLDER_CLASSES_MAX = 100
DURATION_SECONDS_MAX = 86_400.0


def _checked_name(name: str, pattern: re.Pattern[str], allowed: str, field_name: str) -> str:
    if not isinstance(name, str) or not pattern.fullmatch(name):
        shown = repr(name if not isinstance(name, str) or len(name) <= 60 else name[:57] + "...")
        raise errors.InvalidArgument(f"{field_name}: {shown} is not a name: {allowed}", field=field_name)
    return name


def checked_budget_name(name: str, *, field_name: str = "name") -> str:
    """`name` if it is a budget's name, else raises `InvalidArgument`."""
    allowed = "1 to 128 of letters, digits, '.', '_', '-', beginning with a letter or digit"
    return _checked_name(name, _BUDGET_NAME, allowed, field_name)


def checked_holder_name(name: str, *, field_name: str = "holder") -> str:
    """`name` if it is a holder's name, else raises `InvalidArgument`."""
    allowed = "1 to 128 of letters, digits, '.', '_', '@', ':', '-', beginning with a letter or digit"
    return _checked_name(name, _HOLDER_NAME, allowed, field_name)


def checked_incarnation(text: str, *, field_name: str = "incarnation") -> str:
    """`text` if it can be an incarnation, else raises `InvalidArgument`."""
    return _checked_name(text, _INCARNATION, "8 to 64 of letters, digits, '.', '_', ':', '-'", field_name)


def _checked_seconds(
    seconds: float, field_name: str, *, least: float, most: float = DURATION_SECONDS_MAX
) -> float:
    if not math.isfinite(seconds) or not least <= seconds <= most:
        raise errors.InvalidArgument(
            f"{field_name}: {seconds:g} s is not in {least:g} to {most:g} s", field=field_name
        )
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One limited quantity."""

    name: str
    kind: DimensionKind
    #: Micro-units in all; for a rate, in any window.
    limit: int
    #: Length of the provider's window, seconds; rate dimensions only.
    window_seconds: float = 60.0

    def __post_init__(self) -> None:
        allowed = "1 to 63 of a-z, 0-9, '_', beginning with a letter"
        _checked_name(self.name, _DIMENSION_NAME, allowed, "dimensions.name")
        where = f"dimensions.{self.name}"
        if not 0 <= self.limit <= quantity.UNITS_MAX * quantity.MICRO:
            raise errors.InvalidArgument(f"{where}.limit is not in 0 to 1e9", field=f"{where}.limit")
        _checked_seconds(self.window_seconds, f"{where}.window_seconds", least=0.1)
        if self.is_rate:
            return
        if self.limit % quantity.MICRO:
            raise errors.InvalidArgument(
                f"{where}.limit: {quantity.text(self.limit)} is not a whole number", field=f"{where}.limit"
            )

    @property
    def is_rate(self) -> bool:
        """Whether used units cool for a window, rather than return when the call ends."""
        return self.kind is DimensionKind.RATE

    @property
    def quantum(self) -> int:
        """Micro-units in which shares are dealt: calls and slots are whole, rates are not."""
        return 1 if self.is_rate else quantity.MICRO


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderClass:
    """Weight, priority and safe capacity of the holders whose name matches `pattern` (shell style)."""

    pattern: str
    weight: float = 1.0
    priority: int = 0
    #: Micro-units by dimension, usable for `safe_ttl_seconds` after expiry while cut off.
    safe_capacity: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.pattern) <= 128:
            raise errors.InvalidArgument(
                "holder_classes.pattern: 1 to 128 characters", field="holder_classes.pattern"
            )
        if not (math.isfinite(self.weight) and 0.001 <= self.weight <= 1e6):
            raise errors.InvalidArgument(
                f"holder_classes.weight: {self.weight:g} is not in 0.001 to 1e6", field="holder_classes.weight"
            )
        if not -1000 <= self.priority <= 1000:
            raise errors.InvalidArgument(
                f"holder_classes.priority: {self.priority} is not in -1000 to 1000",
                field="holder_classes.priority",
            )


DEFAULT_CLASS = HolderClass(pattern="*")


def class_of(classes: Iterable[HolderClass], holder: str) -> HolderClass:
    """The first class whose pattern matches, else weight 1, priority 0, no safe capacity."""
    for holder_class in classes:
        if fnmatch.fnmatchcase(holder, holder_class.pattern):
            return holder_class
    return DEFAULT_CLASS


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpec:
    """A budget as an administrator defines it. Raises `InvalidArgument`, naming the field, if it is wrong."""

    name: str
    dimensions: tuple[Dimension, ...]
    policy: Policy = Policy.ACTIVE_SHARE
    holder_classes: tuple[HolderClass, ...] = ()
    expected_workers: int = 4
    scaling_enabled: bool = True
    activity_timeout_seconds: float = 30.0
    ttl_seconds: float = 10.0
    refresh_seconds: float = 2.0
    window_seconds: float = 60.0
    arrival_jitter_seconds: float = 1.0
    max_call_seconds: float = 600.0
    #: None: as max_call_seconds.
    orphan_seconds: float | None = None
    #: Micro-units; 0: not bounded, and every acquire must tell its tokens.
    max_tokens_per_request: int = 0
    charged_at: ChargedAt = ChargedAt.ARRIVAL
    safe_ttl_seconds: float = 60.0

    def __post_init__(self) -> None:
        checked_budget_name(self.name)
        self._check_dimensions()
        self._check_durations()
        if not 1 <= self.expected_workers <= 100_000:
            raise errors.InvalidArgument(
                f"expected_workers: {self.expected_workers} is not in 1 to 100000", field="expected_workers"
            )
        if len(self.holder_classes) > HOLDER_CLASSES_MAX:
            raise errors.InvalidArgument("holder_classes: at most 100", field="holder_classes")
        for holder_class in self.holder_classes:
            for name in holder_class.safe_capacity:
                self.dimension(name, field_name="holder_classes.safe_capacity")

    def _check_dimensions(self) -> None:
        if not 1 <= len(self.dimensions) <= DIMENSIONS_MAX:
            raise errors.InvalidArgument(
                f"dimensions: {len(self.dimensions)} given, 1 to 16 are allowed", field="dimensions"
            )
        names = [dimension.name for dimension in self.dimensions]
        for name in names:
            if names.count(name) > 1:
                raise errors.InvalidArgument(f"dimensions: {name} is given twice", field="dimensions")
        token_limit = next((d.limit for d in self.dimensions if d.name == "tpm_limit"), None)
        if self.max_tokens_per_request < 0:
            raise errors.InvalidArgument("max_tokens_per_request is negative", field="max_tokens_per_request")
        if token_limit is not None and self.max_tokens_per_request > token_limit:
            raise errors.InvalidArgument(
                "max_tokens_per_request is above tpm_limit", field="max_tokens_per_request"
            )

    def _check_durations(self) -> None:
        _checked_seconds(self.activity_timeout_seconds, "activity_timeout_seconds", least=0.1)
        _checked_seconds(self.ttl_seconds, "ttl_seconds", least=0.5, most=3600.0)
        _checked_seconds(self.refresh_seconds, "refresh_seconds", least=0.05, most=1800.0)
        if self.refresh_seconds > self.ttl_seconds / 2:
            raise errors.InvalidArgument(
                f"refresh_seconds: {self.refresh_seconds:g} s is longer than half of ttl_seconds "
                f"({self.ttl_seconds:g} s): one lost renewal would lose the lease",
                field="refresh_seconds",
            )
        _checked_seconds(self.window_seconds, "window_seconds", least=0.1)
        _checked_seconds(self.arrival_jitter_seconds, "arrival_jitter_seconds", least=0.0)
        _checked_seconds(self.max_call_seconds, "max_call_seconds", least=0.1)
        _checked_seconds(self.orphan_call_seconds, "orphan_seconds", least=0.0)
        _checked_seconds(self.safe_ttl_seconds, "safe_ttl_seconds", least=0.0)

    @property
    def orphan_call_seconds(self) -> float:
        """How long a call of a certified-dead holder still counts at the provider."""
        return self.max_call_seconds if self.orphan_seconds is None else self.orphan_seconds

    def dimension(self, name: str, *, field_name: str) -> Dimension:
        """The dimension of that name; raises `InvalidArgument` naming `field_name` if there is none."""
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        known = ", ".join(dimension.name for dimension in self.dimensions)
        where = f"{field_name}.{name}"
        raise errors.InvalidArgument(
            f"{where}: budget {self.name} has no such dimension (it has {known})", field=where
        )

    def holder_class(self, holder: str) -> HolderClass:
        """See `class_of`."""
        return class_of(self.holder_classes, holder)
