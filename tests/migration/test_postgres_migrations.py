"""Migrations lead to schema.sql, apply once however many apply them, and refuse to be rewritten."""

import asyncio
from importlib import resources
from typing import Any

import psycopg
import pytest
from leasehold.core import errors, server_versions
from leasehold.postgres import database, migrate, store
from psycopg import rows

DEADLINE_SECONDS = 20.0

# What makes up a schema, by catalogue, in an order of its own. `regclass` and friends leave out what the search
# path says anyway.
CATALOGUES = {
    "columns": """
        SELECT table_name, column_name, ordinal_position, column_default, is_nullable, data_type,
            numeric_precision, numeric_scale, domain_name, collation_name, is_identity, identity_generation,
            is_generated, generation_expression
        FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 3
    """,
    "tables": """
        SELECT relname, relkind, relpersistence, reloptions
        FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1
    """,
    "constraints": """
        SELECT conrelid::regclass::text AS relation, contypid::regtype::text AS domain, conname,
            pg_get_constraintdef(oid) AS definition
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2, 3
    """,
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2
    """,
    "domains": """
        SELECT domain_name, data_type, numeric_precision, numeric_scale, collation_name, domain_default
        FROM information_schema.domains WHERE domain_schema = 'public' ORDER BY 1
    """,
    "sequences": """
        SELECT sequencename, data_type::text, start_value, min_value, max_value, increment_by, cycle
        FROM pg_sequences WHERE schemaname = 'public' ORDER BY 1
    """,
    "routines": """
        SELECT proname, pg_get_functiondef(oid) AS definition
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1, 2
    """,
    "triggers": """
        SELECT tgrelid::regclass::text AS relation, pg_get_triggerdef(oid) AS definition
        FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2
    """,
    "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public' ORDER BY 1",
    "fence": "SELECT is_only_row, generation, revision, etcd_cluster_id, ledger_batch FROM epoch_fence",
}


def dumped(connection: psycopg.Connection[Any]) -> dict[str, list[dict[str, Any]]]:
    with connection.cursor(row_factory=rows.dict_row) as cursor:
        return {name: cursor.execute(query.encode()).fetchall() for name, query in CATALOGUES.items()}


async def migrated(dsn: str, migrations: tuple[migrate.Migration, ...]) -> int:
    target = database.Database(dsn, deadline_seconds=DEADLINE_SECONDS, connections_max=1)
    await target.open()
    try:
        return await migrate.apply(target, migrations)
    finally:
        await target.close()


async def test_the_migrations_lead_to_the_schema_that_is_written_down(postgres_dsn: str) -> None:
    written = (resources.files("leasehold.postgres") / "schema.sql").read_bytes()
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute(written)
        expected = dumped(connection)
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        await migrated(postgres_dsn, migrate.shipped())
        found = dumped(connection)
    assert found == expected
    assert {row["relname"] for row in found["tables"]} > {"budget", "lease_ledger", "schema_migration"}
    assert len(found["constraints"]) > 20


async def test_migrators_at_once_apply_each_migration_once(postgres_dsn: str) -> None:
    counts = await asyncio.gather(*(migrated(postgres_dsn, migrate.shipped()) for _ in range(4)))
    assert sorted(counts) == [0, 0, 0, len(migrate.shipped())]
    with psycopg.connect(postgres_dsn) as connection:
        applied = connection.execute("SELECT number, name, sha256 FROM schema_migration ORDER BY 1").fetchall()
    assert applied == [(step.number, step.name, step.sha256) for step in migrate.shipped()]


async def test_only_what_is_missing_is_applied_and_in_order(postgres_dsn: str) -> None:
    first = migrate.Migration(1, "one", "CREATE TABLE one (id integer);")
    second = migrate.Migration(2, "two", "ALTER TABLE one ADD two text; CREATE INDEX ON one (two);")
    assert await migrated(postgres_dsn, (first,)) == 1
    assert await migrated(postgres_dsn, (first, second)) == 1
    assert await migrated(postgres_dsn, (first, second)) == 0


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(postgres_dsn: str) -> None:
    await migrated(postgres_dsn, (migrate.Migration(1, "one", "CREATE TABLE one (id integer);"),))
    changed = migrate.Migration(1, "one", "CREATE TABLE one (id bigint);")
    added = migrate.Migration(2, "two", "CREATE TABLE two (id integer);")
    with pytest.raises(errors.FailedPrecondition, match="0001_one was changed"):
        await migrated(postgres_dsn, (changed, added))
    with psycopg.connect(postgres_dsn) as connection:
        assert connection.execute("SELECT to_regclass('two')").fetchone() == (None,)


async def test_a_database_of_a_newer_version_is_refused(postgres_dsn: str) -> None:
    first = migrate.Migration(1, "one", "CREATE TABLE one (id integer);")
    second = migrate.Migration(2, "two", "CREATE TABLE two (id integer);")
    await migrated(postgres_dsn, (first, second))
    with pytest.raises(errors.FailedPrecondition, match="0002_two by a newer Leasehold"):
        await migrated(postgres_dsn, (first,))


async def test_a_server_that_is_too_old_is_refused_and_left_as_it_is(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_versions, "POSTGRES_MAJOR_MIN", 99)
    with pytest.raises(errors.FailedPrecondition, match=r"PostgreSQL \d+ is too old; use 99 or later"):
        await migrated(postgres_dsn, (migrate.Migration(1, "one", "CREATE TABLE one (id integer);"),))
    with psycopg.connect(postgres_dsn) as connection:
        assert connection.execute("SELECT to_regclass('schema_migration')").fetchone() == (None,)


async def test_a_migration_that_fails_leaves_nothing_behind(postgres_dsn: str) -> None:
    first = migrate.Migration(1, "one", "CREATE TABLE one (id integer);")
    broken = migrate.Migration(2, "two", "CREATE TABLE two (id integer); SELECT 1 / 0;")
    with pytest.raises(errors.LeaseholdError, match="division by zero"):
        await migrated(postgres_dsn, (first, broken))
    with psycopg.connect(postgres_dsn) as connection:
        assert connection.execute("SELECT to_regclass('one'), to_regclass('schema_migration')").fetchone() == (
            None,
            None,
        )
    assert await migrated(postgres_dsn, (first,)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO budget VALUES ('a/b', '{\"name\": \"a/b\"}', 1, now())",
        "INSERT INTO budget VALUES ('a', '{\"name\": \"b\"}', 1, now())",
        "INSERT INTO budget VALUES ('a', '{}', 1, now())",
        "INSERT INTO budget VALUES ('a', '[]', 1, now())",
        "INSERT INTO budget VALUES ('a', '{\"name\": \"a\"}', 0, now())",
        "INSERT INTO generation VALUES (0, '0000000000000005', now())",
        "INSERT INTO generation VALUES (1, '5', now())",
        "INSERT INTO epoch_fence VALUES (true, 1, 1, '0000000000000005', 0, now())",
        "INSERT INTO epoch_fence VALUES (false, 1, 1, '0000000000000005', 0, now())",
        "UPDATE epoch_fence SET ledger_batch = -1",
        """INSERT INTO node VALUES ('a/b', 'id-of-node', 1, 'boot', 1, 8, 1, '{}', 'ready', '', now(), now(), 1,
               1, '0000000000000005')""",
        """INSERT INTO node VALUES ('a', 'short', 1, 'boot', 1, 8, 1, '{}', 'ready', '', now(), now(), 1,
               1, '0000000000000005')""",
        """INSERT INTO node VALUES ('a', 'id-of-node', 1, 'boot', 1, 8, 1, '[]', 'ready', '', now(), now(), 1,
               1, '0000000000000005')""",
        """INSERT INTO node VALUES ('a', 'id-of-node', 1, 'boot', 1, 8, 1, '{}', 'well', '', now(), now(), 1,
               1, '0000000000000005')""",
        "INSERT INTO request VALUES ('', 'PutBudget', sha256('x'), '{}', now())",
        "INSERT INTO request VALUES ('r', 'PutBudget', 'x', '{}', now())",
        """INSERT INTO audit_log (time, actor, method, target, cause, generation, revision, etcd_cluster_id)
           VALUES (now(), '', 'PutBudget', 'budget/a', '', 1, 1, '0000000000000005')""",
        """INSERT INTO lease_ledger (time, budget, holder, incarnation, lease_id, event, amounts, cause,
               generation, revision, etcd_cluster_id)
           VALUES (now(), 'a', 'w', '', 18446744073709551616, 'GRANTED', '{}', '', 1, 1, '0000000000000005')""",
    ],
)
async def test_the_schema_itself_refuses_what_makes_no_sense(postgres_dsn: str, statement: str) -> None:
    async with store.PostgresStore(postgres_dsn, deadline_seconds=DEADLINE_SECONDS) as facts:
        await facts.migrate()
    with psycopg.connect(postgres_dsn) as connection, pytest.raises(psycopg.IntegrityError):
        connection.execute(statement.encode())
