"""Columns of a batch as text that Postgres reads as arrays: `unnest(%(names)s::text[], ...)`.

psycopg adapts a list element by element, in Python: of a batch of a thousand jobs that was half of what the
allocator spent on it. A whole column at once takes a tenth of that. Every parameter is cast in its statement.
"""

from collections.abc import Iterable, Sequence

_NUL = "\0"
_BETWEEN = '","'


def texts(values: Sequence[str]) -> str:
    """Of text, jsonb, uuid and enumerations.

    A NUL, which Postgres's text cannot hold, is left in: psycopg refuses it.
    """
    if not values:
        return "{}"
    joined = _NUL.join(values)
    if joined.count(_NUL) == len(values) - 1:
        return f'{{"{_escaped(joined).replace(_NUL, _BETWEEN)}"}}'
    return f'{{"{_BETWEEN.join(map(_escaped, values))}"}}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def numbers(values: Iterable[float | None]) -> str:
    """Of integers and floats, to the last digit; None: NULL."""
    return f"{{{','.join('NULL' if value is None else repr(value) for value in values)}}}"


def booleans(values: Iterable[bool]) -> str:
    """Of truth values."""
    return f"{{{','.join('t' if value else 'f' for value in values)}}}"


def octets(values: Iterable[bytes]) -> str:
    """Of bytea."""
    return texts([f"\\x{value.hex()}" for value in values])
