"""Amounts are whole numbers of micro-units, so that the conserved stock is conserved exactly.

One unit (a request, a token, a slot) is 1,000,000 micro-units. A limit is at most 1e9 units, so any amount in
micro-units is below 2**50, and the doubles on the wire carry it without loss.
"""

import math

from leasehold.core import errors

MICRO = 1_000_000
UNITS_MAX = 1e9


def to_micros(units: float, *, field: str) -> int:
    """Units as micro-units, rounded to the nearest. `field` names the input in errors.

    Raises `InvalidArgument` if `units` is not a finite number of 0 to 1e9.
    """
    if isinstance(units, bool) or not isinstance(units, int | float):
        raise errors.InvalidArgument(f"{field}: {units!r} is not a number", field=field)
    # A whole number may be beyond any float: it is compared before it is converted.
    if isinstance(units, float) and not math.isfinite(units):
        raise errors.InvalidArgument(f"{field}: {units} is not a finite number", field=field)
    if units < 0:
        raise errors.InvalidArgument(f"{field}: {_shown(units)} is negative", field=field)
    if units > UNITS_MAX:
        raise errors.InvalidArgument(f"{field}: {_shown(units)} is above the maximum of 1e9", field=field)
    return round(units * MICRO)


def _shown(units: float) -> str:
    return f"{units:g}" if abs(units) < 1e300 else "a number of over 300 digits"


def to_units(micros: int) -> float:
    """Micro-units as units."""
    return micros / MICRO


def text(micros: int) -> str:
    """For people: units with at most two decimals, none where they are whole."""
    units = micros / MICRO
    return f"{units:.0f}" if micros % MICRO == 0 else f"{units:.2f}".rstrip("0").rstrip(".")
