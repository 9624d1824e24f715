"""Columns of a batch, as PostgreSQL reads them."""

import math

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leasehold.postgres import columns

#: What Postgres's text may hold: no NUL, no lone surrogate.
TEXTS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=20)


def read(dsn: str, kind: str, column: str) -> list[object]:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(f"SELECT %s::{kind}[]".encode(), [column]).fetchone()
    assert row is not None
    found: list[object] = row[0]
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=TEXTS)
def test_any_text_comes_back_as_it_was(postgres_dsn: str, values: list[str]) -> None:
    assert read(postgres_dsn, "text", columns.texts(values)) == values


@pytest.mark.parametrize(
    "values",
    [[], [""], ["", ""], ["NULL", "null"], ['"', "\\", '\\"', ","], ["{}", "{", "a b", " "], ["\n\t\r", "ü→"]],
)
def test_what_means_something_in_an_array_is_text_in_it(postgres_dsn: str, values: list[str]) -> None:
    assert read(postgres_dsn, "text", columns.texts(values)) == values


@pytest.mark.parametrize("values", [["\0"], ["a\0b", "c"], ["a", "b\0"]])
def test_a_nul_is_refused_and_parts_no_value_in_two(postgres_dsn: str, values: list[str]) -> None:
    with pytest.raises(psycopg.DataError, match="NUL"):
        read(postgres_dsn, "text", columns.texts(values))


def test_numbers_truth_values_and_octets_come_back_to_the_last_digit(postgres_dsn: str) -> None:
    floats = [1.9e9 + 1 / 3, -0.1, 5e-324, math.inf]
    assert read(postgres_dsn, "float8", columns.numbers(floats)) == floats
    assert read(postgres_dsn, "float8", columns.numbers([None, 0.0])) == [None, 0.0]
    assert read(postgres_dsn, "bigint", columns.numbers([2**63 - 1, -(2**63), 0])) == [2**63 - 1, -(2**63), 0]
    assert read(postgres_dsn, "boolean", columns.booleans([True, False])) == [True, False]
    assert read(postgres_dsn, "bytea", columns.octets([b"", bytes(range(256))])) == [b"", bytes(range(256))]


def test_a_number_that_is_too_large_is_refused_as_data(postgres_dsn: str) -> None:
    with pytest.raises(psycopg.DataError) as caught:
        read(postgres_dsn, "integer", columns.numbers([2**31]))
    assert caught.value.sqlstate is not None and caught.value.sqlstate.startswith("22")
