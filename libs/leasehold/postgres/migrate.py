"""Numbered migrations, applied in order in one transaction under an advisory lock.

A migration that has been applied never changes: its checksum is kept, and another one is refused.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from leasehold.core import errors, server_versions
from leasehold.postgres import database, queries

# Building an index over a long ledger takes its time.
DEADLINE_SECONDS = 600.0

_SQL = queries.load("migrate.sql")
_SESSION_SQL = queries.load("session.sql")
_FILE_NAME = re.compile(r"(?P<number>\d{4})_(?P<name>[a-z0-9_]+)\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema."""

    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """Checksum of the text, whatever line ends the checkout has."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()


def shipped() -> tuple[Migration, ...]:
    """The migrations of this version of Leasehold, in order, numbered from 1 without a gap."""
    migrations = []
    for file in (resources.files("leasehold.postgres") / "migrations").iterdir():
        match = _FILE_NAME.fullmatch(file.name)
        if match:
            migrations.append(Migration(int(match["number"]), match["name"], file.read_text(encoding="utf-8")))
    migrations.sort(key=lambda migration: migration.number)
    if [migration.number for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise errors.LeaseholdError("the migrations that were shipped are not numbered 1, 2, 3 and so on")
    return tuple(migrations)


async def apply(target: database.Database, migrations: Sequence[Migration]) -> int:
    """Apply those that are missing, all or none; how many. Raises `FailedPrecondition` as `Store.migrate`."""
    async with target.transaction(deadline_seconds=DEADLINE_SECONDS) as cursor:
        timeout = {"statement_timeout": str(round(DEADLINE_SECONDS * 1000))}
        if objection := server_versions.objection_to_postgres(cursor.connection.info.server_version):
            raise errors.FailedPrecondition(objection)
        await cursor.execute(_SESSION_SQL["allow_long_statements"], timeout)
        await cursor.execute(_SQL["lock_migrations"])
        await cursor.execute(_SQL["create_schema_migration"])
        await cursor.execute(_SQL["list_migrations"])
        applied = {row["number"]: row for row in await cursor.fetchall()}
        _refuse_newer_schema(applied, migrations)
        missing = [migration for migration in migrations if migration.number not in applied]
        for migration in migrations:
            if migration not in missing and applied[migration.number]["sha256"] != migration.sha256:
                raise errors.FailedPrecondition(
                    f"migration {migration.number:04}_{migration.name} was changed after it was applied "
                    "to this database; put it back and add a new one"
                )
        for migration in missing:
            await cursor.execute(migration.sql.encode())
            await cursor.execute(
                _SQL["insert_migration"],
                {"number": migration.number, "name": migration.name, "sha256": migration.sha256},
            )
    return len(missing)


def _refuse_newer_schema(applied: dict[int, database.Row], migrations: Sequence[Migration]) -> None:
    newest = max(applied, default=0)
    if newest > len(migrations):
        raise errors.FailedPrecondition(
            f"this database was migrated to {newest:04}_{applied[newest]['name']} by a newer Leasehold, "
            f"this one knows {len(migrations)} migrations"
        )
