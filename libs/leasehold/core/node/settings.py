"""The settings that size a host's pools: names, defaults, presets, and what is refused.

Their values are texts, wherever they come from (a file, the environment, a flag). GB is 2**30 bytes.
"""

import difflib
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model

GB_MAX: Final = 1_048_576.0
CHECK_SECONDS_MIN: Final = 0.1
CHECK_SECONDS_MAX: Final = 86_400.0


class Formula(enum.StrEnum):
    """How the number of workers follows from memory; see `sizing`."""

    MANAGED = "managed"
    LITERAL = "literal"


DEFAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "MEMORY_THRESHOLD_GB": "8",
        "MAX_WORKERS": "6",
        "MIN_WORKERS": "1",
        "MEMORY_CHECK_INTERVAL": "30",
        "WORKER_MEMORY_LIMIT_GB": "4",
        "ENABLE_AUTO_SCALING": "true",
        "SYSTEM_RESERVE_GB": "4",
        "SIZING_FORMULA": Formula.MANAGED.value,
        "MEMORY_HYSTERESIS_GB": "1",
        "MEMORY_BUDGET_GB": "",
    }
)
NAMES: Final = tuple(DEFAULTS)

PRESETS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "dev": {
            "MEMORY_THRESHOLD_GB": "8",
            "MAX_WORKERS": "4",
            "MIN_WORKERS": "1",
            "MEMORY_CHECK_INTERVAL": "30",
            "WORKER_MEMORY_LIMIT_GB": "4",
        },
        # A Dell R620: 8 CPUs, 64 GB.
        "r620": {
            "MEMORY_THRESHOLD_GB": "12",
            "MAX_WORKERS": "8",
            "MIN_WORKERS": "2",
            "MEMORY_CHECK_INTERVAL": "20",
            "WORKER_MEMORY_LIMIT_GB": "6",
        },
    }
)

_YES: Final = ("true", "yes", "on", "1")
_NO: Final = ("false", "no", "off", "0")
#: As difflib counts: MAX_WORKER is 0.95 from MAX_WORKERS, MAX_CONNECTIONS 0.62.
_NEAR: Final = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What holds for all pools of a host."""

    #: Never given to workers.
    reserve_bytes: int = 4 * model.GIB
    formula: Formula = Formula.MANAGED
    check_interval_seconds: float = 30.0
    #: A deficit up to this is borne; a threshold clears so much higher.
    hysteresis_bytes: int = model.GIB
    #: What this agent may use of the host; None: all of it.
    memory_budget_bytes: int | None = None
    #: Between two starts on the host.
    start_spacing_seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """The host's settings, and what a pool has that says nothing else."""

    host: HostSettings
    values: Mapping[str, str]


def check_near_misses(names: Iterable[str], *, where: str) -> None:
    """Raise `InvalidArgument` for a name that is nearly a setting's: `MAX_WORKER` was meant to do something."""
    for name in names:
        if name in DEFAULTS:
            continue
        meant = difflib.get_close_matches(name.upper(), NAMES, n=1, cutoff=_NEAR)
        if meant:
            raise errors.InvalidArgument(
                f"{name} ({where}) is no setting; {meant[0]} was probably meant", field=name
            )


def parse(values: Mapping[str, str], *, where: Mapping[str, str] | None = None) -> Parsed:
    """Settings from texts by name; what is left out, or empty, has its default.

    `where` tells, for messages, where a value stands. Raises `InvalidArgument` that names the setting.
    """
    check_near_misses(values, where="settings")
    unknown = [name for name in values if name not in DEFAULTS]
    if unknown:
        raise errors.InvalidArgument(f"{unknown[0]}: there is no such setting", field=unknown[0])
    reader = _Reader({**DEFAULTS, **{name: text for name, text in values.items() if text.strip()}}, where or {})
    budget = reader.values["MEMORY_BUDGET_GB"].strip()
    host = HostSettings(
        reserve_bytes=reader.bytes("SYSTEM_RESERVE_GB", may_be_zero=True),
        formula=reader.formula("SIZING_FORMULA"),
        check_interval_seconds=reader.number(
            "MEMORY_CHECK_INTERVAL", least=CHECK_SECONDS_MIN, most=CHECK_SECONDS_MAX
        ),
        hysteresis_bytes=reader.bytes("MEMORY_HYSTERESIS_GB", may_be_zero=True),
        memory_budget_bytes=reader.bytes("MEMORY_BUDGET_GB") if budget else None,
    )
    _pool_values(reader)
    return Parsed(host=host, values=MappingProxyType(reader.values))


def pool_spec(
    *,
    name: str,
    template: str,
    defaults: Parsed,
    parameters: Mapping[str, str] | None = None,
    priority: int = 0,
    own: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    stop: model.StopContract = model.PLAIN_STOP,
    restart: model.RestartPolicy | None = None,
) -> model.PoolSpec:
    """A pool with its `own` settings before the host's. Raises `InvalidArgument` that names the setting."""
    reader = _Reader({**defaults.values, **(own or {})}, where or {})
    min_workers, max_workers, limit_bytes, threshold_bytes, is_auto_scaling = _pool_values(reader)
    return model.PoolSpec(
        name=model.checked_pool_name(name),
        template=template,
        parameters=MappingProxyType(dict(parameters or {})),
        priority=priority,
        min_workers=min_workers,
        max_workers=max_workers,
        worker_limit_bytes=limit_bytes,
        threshold_bytes=threshold_bytes,
        is_auto_scaling=is_auto_scaling,
        stop=stop,
        restart=restart or model.RestartPolicy(),
    )


def _pool_values(reader: "_Reader") -> tuple[int, int, int, int, bool]:
    min_workers = reader.whole("MIN_WORKERS")
    max_workers = reader.whole("MAX_WORKERS")
    if min_workers > max_workers:
        raise reader.wrong("MIN_WORKERS", f"{min_workers} is above MAX_WORKERS, which is {max_workers}")
    return (
        min_workers,
        max_workers,
        reader.bytes("WORKER_MEMORY_LIMIT_GB"),
        reader.bytes("MEMORY_THRESHOLD_GB", may_be_zero=True),
        reader.boolean("ENABLE_AUTO_SCALING"),
    )


class _Reader:
    """Reads texts; each complaint names the setting and where it stands."""

    def __init__(self, values: Mapping[str, str], where: Mapping[str, str]) -> None:
        self.values = dict(values)
        self._where = where

    def wrong(self, name: str, why: str) -> errors.InvalidArgument:
        place = self._where.get(name)
        return errors.InvalidArgument(f"{name}{f' ({place})' if place else ''}: {why}", field=name)

    def number(self, name: str, *, least: float, most: float) -> float:
        text = self.values[name].strip()
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(name, f"{text[:40]!r} is not a number") from None
        if not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(name, f"{text[:40]} is not in {least:g} to {most:g}")
        return value

    def whole(self, name: str) -> int:
        value = self.number(name, least=0, most=model.WORKERS_MAX)
        if value != int(value):
            raise self.wrong(name, f"{value:g} is not a whole number")
        return int(value)

    def bytes(self, name: str, *, may_be_zero: bool = False) -> int:
        value = self.number(name, least=0.0, most=GB_MAX)
        amount = round(value * model.GIB)
        if not amount and not may_be_zero:
            raise self.wrong(name, "must be above 0")
        return amount

    def boolean(self, name: str) -> bool:
        text = self.values[name].strip().lower()
        if text not in (*_YES, *_NO):
            raise self.wrong(name, f"{text[:40]!r} is neither true nor false")
        return text in _YES

    def formula(self, name: str) -> Formula:
        text = self.values[name].strip().lower()
        if text not in list(Formula):
            raise self.wrong(name, f"{text[:40]!r} is none of {', '.join(Formula)}")
        return Formula(text)
