"""Options of the golden-text scenarios."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the scenarios come to into their files, to be read in the diff, instead of comparing",
    )
