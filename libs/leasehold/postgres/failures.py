"""Errors of psycopg and of its pool, told once as our own: the one place that knows both."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from leasehold.core import errors

RETRY_AFTER_SECONDS = 0.5

# Classes and codes of SQLSTATE after which the same transaction may succeed: connection exception, transaction
# rollback (serialization, deadlock), insufficient resources, operator intervention (shutdown, statement
# timeout), system error; a standby (25006), a transaction that idled (25P03), a lock not had in time (55P03).
_PASSING_CLASSES = frozenset({"08", "40", "53", "57", "58"})
_PASSING_CODES = frozenset({"25006", "25P03", "55P03"})
# Undefined table, column, function, schema, object.
_NO_SCHEMA_CODES = frozenset({"42P01", "42703", "42883", "3F000", "42704"})


@contextmanager
def translated() -> Iterator[None]:
    """Raise what psycopg raises inside as `PostgresUnavailable`, `FailedPrecondition` or `LeaseholdError`."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error


def translate(error: psycopg.Error) -> errors.LeaseholdError:
    """The error of ours that stands for `error`."""
    code = error.sqlstate or ""
    story = first_line(error)
    if code[:2] in _PASSING_CLASSES or code in _PASSING_CODES:
        return unavailable(story)
    if code in _NO_SCHEMA_CODES:
        return errors.FailedPrecondition(
            f"the database has not the schema of this version of Leasehold; migrate it first ({story})"
        )
    # Without a code it did not come from the server: no connection, a broken one, a closed pool.
    if not code and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return unavailable(story)
    return errors.LeaseholdError(f"Postgres refused a statement: {story}", metadata={"sqlstate": code})


def unavailable(story: str) -> errors.PostgresUnavailable:
    """Postgres does not answer, for the reason that `story` tells."""
    return errors.PostgresUnavailable(
        f"Postgres does not answer: {story}", retry_after_seconds=RETRY_AFTER_SECONDS
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text: the rest is context that may repeat what a row held."""
    return str(error).strip().split("\n")[0] or type(error).__name__
