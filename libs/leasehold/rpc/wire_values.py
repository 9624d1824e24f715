"""Amounts and durations on the wire, for the codecs.

The wire carries units as doubles and durations as ``google.protobuf.Duration``; core has whole micro-units and
float seconds. These functions run several times in each renewal, so they are written for speed: one comparison
decides, and only a wrong value pays for finding out what is wrong with it.
"""

import functools
import math
from collections.abc import Mapping

from google.protobuf import duration_pb2
from leasehold.core import errors
from leasehold.core.budget import model, quantity

#: Counters since the beginning of an incarnation outgrow a limit; above this they are nonsense.
TOTAL_UNITS_MAX = 1e15
#: A cooling time is at most a window and its jitter, each at most a day.
DURATION_SECONDS_MAX = 2 * model.DURATION_SECONDS_MAX

_NANOS = 1_000_000_000


def decode_amounts(
    units_by_name: Mapping[str, float], field: str, units_max: float = quantity.UNITS_MAX
) -> dict[str, int]:
    """Units by dimension as micro-units. Raises `InvalidArgument` naming `field` and the dimension."""
    count = len(units_by_name)
    if not count:
        return {}
    if count > model.DIMENSIONS_MAX:
        raise errors.InvalidArgument(
            f"{field}: {count} dimensions given, at most {model.DIMENSIONS_MAX} are allowed",
            field=field,
        )
    amounts = {}
    # Not items(): a protobuf map has that from collections.abc, in Python, at a third of the speed.
    for name in units_by_name:
        units = units_by_name[name]
        # A NaN compares false and is refused with the rest.
        if not 0.0 <= units <= units_max:
            raise _wrong_units(units, f"{field}.{name[:63]}", units_max)
        amounts[name] = int(units * 1e6 + 0.5)
    return amounts


def decode_units(units: float, field: str) -> int:
    """Units as micro-units. Raises `InvalidArgument` if not a finite number of 0 to 1e9."""
    if not 0.0 <= units <= quantity.UNITS_MAX:
        raise _wrong_units(units, field, quantity.UNITS_MAX)
    return int(units * quantity.MICRO + 0.5)


def _wrong_units(units: float, field: str, units_max: float) -> errors.InvalidArgument:
    if not math.isfinite(units):
        wrong = f"{units} is not a finite number"
    elif units < 0:
        wrong = f"{units:g} is negative"
    else:
        wrong = f"{units:g} is above the maximum of {units_max:g}"
    return errors.InvalidArgument(f"{field}: {wrong}", field=field)


def encode_amounts(amounts: Mapping[str, int]) -> dict[str, float]:
    """Micro-units by dimension as units."""
    return {name: micros / quantity.MICRO for name, micros in amounts.items()}


def decode_seconds(duration: duration_pb2.Duration, field: str) -> float:
    """A duration of 0 to two days as seconds. Raises `InvalidArgument` outside."""
    # One division of whole nanoseconds: a decimal such as 0.1 comes back as the float it was.
    seconds = (duration.seconds * _NANOS + duration.nanos) / _NANOS
    if not 0.0 <= seconds <= DURATION_SECONDS_MAX:
        raise errors.InvalidArgument(
            f"{field}: {seconds:g} s is not in 0 to {DURATION_SECONDS_MAX:g} s", field=field
        )
    return seconds


def encode_seconds(seconds: float) -> duration_pb2.Duration:
    """Seconds, not negative and finite, as a new duration."""
    whole, nanos = divmod(round(seconds * _NANOS), _NANOS)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


@functools.lru_cache(maxsize=1024)
def shared_duration(seconds: float) -> duration_pb2.Duration:
    """As `encode_seconds`, for the few values that recur (a budget's TTL). The caller must not change it."""
    return encode_seconds(seconds)
