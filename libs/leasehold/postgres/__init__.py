"""Durable facts in Postgres: port, store, migrations, ledger writer and in-memory twin."""
