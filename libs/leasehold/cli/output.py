"""What commands print: data on standard output, words on standard error, colour only on a terminal."""

import enum
import json
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
import yaml


class Format(enum.StrEnum):
    """How data is printed: tables are for people, the others for programs."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


def console() -> rich.console.Console:
    """Standard output for people; plain and unwrapped where it is no terminal."""
    if sys.stdout.isatty():
        return rich.console.Console(highlight=False)
    return rich.console.Console(highlight=False, width=200, color_system=None)


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr)


def data(value: Any, wanted: Format) -> None:
    """Print a document as JSON or YAML."""
    if wanted is Format.YAML:
        sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    else:
        json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
    sys.stdout.flush()


def line(value: Any) -> None:
    """Print a document as one line of JSON, for streams of them."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows under headings; the columns named in `right` are aligned to it."""
    grid = rich.table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(rich.markup.escape(cell) for cell in row))
    console().print(grid)


def number(amount: float | None) -> str:
    """An amount of units for people: no decimals where it is whole, at most two elsewhere."""
    if amount is None:
        return "-"
    if amount == int(amount):
        return str(int(amount))
    return f"{amount:.2f}".rstrip("0").rstrip(".")
