-- lock_migrations: One migrator at a time in this database; held to the end of the transaction. The key is only
-- a number that nothing else is likely to choose.
SELECT pg_advisory_xact_lock(7812453390127);

-- create_schema_migration: The record of what was applied.
CREATE TABLE IF NOT EXISTS schema_migration (
    number integer PRIMARY KEY
        CHECK (number >= 1),
    name text NOT NULL,
    sha256 text NOT NULL,
    applied_time timestamptz NOT NULL
);

-- list_migrations: What was applied, in order.
SELECT number, name, sha256
FROM schema_migration
ORDER BY number;

-- insert_migration: Record one that has just been applied.
INSERT INTO schema_migration (number, name, sha256, applied_time)
VALUES (%(number)s, %(name)s, %(sha256)s, now());
