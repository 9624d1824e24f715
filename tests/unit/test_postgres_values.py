"""Values of the port, named SQL, and what errors of psycopg become."""

import ast
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from leasehold.core import errors
from leasehold.postgres import failures, memory, migrate, port, queries

PACKAGE = Path(str(resources.files("leasehold.postgres")))
NOON = datetime.fromisoformat("2030-01-02T12:00:00+00:00")


# Ledger entries.


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"time": datetime(2030, 1, 2)}, "time"),  # noqa: DTZ001 - the missing zone is what is refused
        ({"event": "granted"}, "event"),
        ({"event": "X" * 64}, "event"),
        ({"event": "A\0"}, "event"),
        ({"budget": "a/b"}, "budget"),
        ({"holder": "x" * 129}, "holder"),
        ({"incarnation": "short"}, "incarnation"),
        ({"lease_id": -1}, "lease_id"),
        ({"lease_id": 2**64}, "lease_id"),
        ({"amounts": {"rpm_limit": float("nan")}}, "amounts.rpm_limit"),
        ({"amounts": {"rpm_limit": float("inf")}}, "amounts.rpm_limit"),
        ({"amounts": {"a\0": 1.0}}, "amounts"),
    ],
)
def test_an_entry_that_could_not_be_written_cannot_be_made(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        port.LedgerEntry(**{"time": NOON, "event": "GRANTED", **fields})
    assert caught.value.field == field


def test_text_for_people_is_mended_and_cut() -> None:
    assert port.clean_text("plain — ünïcode\n") == "plain — ünïcode\n"
    assert port.clean_text("a\0b\ud800c") == "a\ufffdb?c"
    assert port.clean_text("x" * 1001) == "x" * 999 + "…"
    assert port.clean_text("x" * 1000) == "x" * 1000


# Named SQL.


def test_blocks_are_told_apart_by_name_and_comments_are_left_out() -> None:
    text = "-- first: One.\n-- because: so\nSELECT 1,\n    2;\n\n-- second: Two.\nSELECT 3\n"
    assert queries.parse(text, "f") == {"first": "SELECT 1,\n    2", "second": "SELECT 3"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SELECT 1;", "f:1: SQL before"),
        ("-- a: One.\nSELECT 1;\n\n-- a: Again.\nSELECT 2;", "f:4: a is there twice"),
        ("-- a: One.\n\n-- b: Two.\nSELECT 1;", "a has no SQL"),
    ],
)
def test_a_file_that_is_not_well_formed_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        queries.parse(text, "f")


def test_every_statement_that_code_asks_for_exists_and_every_one_that_exists_is_used() -> None:
    used: set[tuple[str, str]] = set()
    for source in PACKAGE.glob("*.py"):
        tree = ast.parse(source.read_text())
        files: dict[str, str] = {}
        for node in ast.walk(tree):
            match node:
                case ast.Assign(
                    targets=[ast.Name(variable)],
                    value=ast.Call(func=ast.Attribute(attr="load"), args=[ast.Constant(str(file))]),
                ):
                    files[variable] = file
        for node in ast.walk(tree):
            match node:
                case ast.Subscript(value=ast.Name(variable), slice=ast.Constant(str(name))):
                    if variable in files:
                        used.add((files[variable], name))
    shipped = {
        (file.name, name) for file in (PACKAGE / "sql").glob("*.sql") for name in queries.load(file.name)
    }
    assert used == shipped


# Migrations.


def test_migrations_are_numbered_from_one_and_named() -> None:
    migrations = migrate.shipped()
    assert [migration.number for migration in migrations] == list(range(1, len(migrations) + 1))
    assert migrations[0].name == "budgets"


def test_the_checksum_does_not_depend_on_line_ends() -> None:
    unix = migrate.Migration(1, "a", "SELECT 1;\nSELECT 2;\n")
    windows = migrate.Migration(1, "a", "SELECT 1;\r\nSELECT 2;\r\n")
    assert unix.sha256 == windows.sha256 != migrate.Migration(1, "a", "SELECT 1;\n").sha256


# Errors.


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError("server closed the connection unexpectedly\n\tThis probably means"),
        psycopg.InterfaceError("the connection is closed"),
        psycopg_pool.PoolTimeout("couldn't get a connection after 1.00 sec"),
        psycopg_pool.TooManyRequests("the pool has already 1000 requests waiting"),
        psycopg.errors.QueryCanceled("canceling statement due to statement timeout"),
        psycopg.errors.LockNotAvailable("canceling statement due to lock timeout"),
        psycopg.errors.SerializationFailure("could not serialize access"),
        psycopg.errors.DeadlockDetected("deadlock detected"),
        psycopg.errors.AdminShutdown("terminating connection due to administrator command"),
        psycopg.errors.CannotConnectNow("the database system is starting up"),
        psycopg.errors.IdleInTransactionSessionTimeout("terminating connection"),
        psycopg.errors.ReadOnlySqlTransaction("cannot execute UPDATE in a read-only transaction"),
        psycopg.errors.TooManyConnections("sorry, too many clients already"),
        psycopg.errors.DiskFull("could not extend file"),
    ],
)
def test_trouble_that_passes_is_unavailable_with_a_time_to_retry(error: psycopg.Error) -> None:
    with pytest.raises(errors.PostgresUnavailable) as caught, failures.translated():
        raise error
    assert caught.value.retry_after_seconds == 0.5
    assert "\n" not in caught.value.message
    assert str(error).split("\n")[0] in caught.value.message


def test_a_missing_table_says_to_migrate() -> None:
    with pytest.raises(errors.FailedPrecondition, match="migrate"), failures.translated():
        raise psycopg.errors.UndefinedTable('relation "budget" does not exist')


def test_a_constraint_that_holds_is_an_internal_error_not_an_outage() -> None:
    with pytest.raises(errors.LeaseholdError) as caught, failures.translated():
        raise psycopg.errors.CheckViolation("violates check constraint\nDETAIL:  Failing row contains (secret)")
    assert caught.value.reason == "INTERNAL"
    assert "secret" not in caught.value.message


# Switches of the in-memory store.


async def test_the_twin_goes_away_changes_nothing_and_comes_back() -> None:
    facts = memory.MemoryStore()
    await facts.migrate()
    facts.database.go_away()
    with pytest.raises(errors.PostgresUnavailable) as caught:
        await facts.claim_generation(5, accept_foreign=False)
    assert caught.value.retry_after_seconds == 0.5
    facts.database.come_back()
    assert await facts.claim_generation(7, accept_foreign=False) == 1
