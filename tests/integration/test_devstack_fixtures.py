"""The server fixtures give real, separate, empty places."""

import psycopg
from leasehold.devstack import etcd


def test_shared_etcd_is_healthy(etcd_server: str) -> None:
    assert etcd.is_healthy(int(etcd_server.rpartition(":")[2]))


def test_each_test_gets_an_empty_database_that_keeps_writes_through_a_crash(postgres_dsn: str) -> None:
    with psycopg.connect(postgres_dsn) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        settings = connection.execute(
            "SELECT name, setting FROM pg_settings "
            "WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')"
        ).fetchall()
        connection.execute("CREATE TABLE left_behind ()")

    assert tables == (0,)
    assert dict(settings) == {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


def test_databases_of_two_tests_do_not_meet(postgres_dsn: str) -> None:
    with psycopg.connect(postgres_dsn) as connection:
        assert connection.execute("SELECT to_regclass('left_behind')").fetchone() == (None,)
