"""What commands print: data on standard output, words on standard error, colour only on a terminal."""

import enum
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
from leasehold.core import errors

#: Between the columns of a table.
GAP = "  "
#: A last column is not wrapped into less than this.
WRAPPED_WIDTH_MIN = 24

_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


class Format(enum.StrEnum):
    """How data is printed: tables are for people, the others for programs."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


def write(text: str) -> None:
    """Write to standard output, at once.

    A reader that has gone (``| head``) ends the command without complaint. Raises `FailedPrecondition` if the
    output cannot be written (disk full).
    """
    _write(text, None)


def write_bytes(content: bytes) -> None:
    """As `write`, of bytes that are whatever they are."""
    _write("", content)


def _write(text: str, content: bytes | None) -> None:
    if sys.stdout is None:  # it was closed before the start: `>&-`
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
        if content:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
    except OSError as error:
        # What is still buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit from None
        raise errors.FailedPrecondition(f"cannot write to standard output: {error.strerror}") from error


def say(text: str) -> None:
    """A line for people, on standard error; nothing where that is closed or its reader has gone."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def fail(error: errors.LeaseholdError, hint: str = "") -> None:
    """Say what went wrong, and in which field if the message does not tell."""
    where = f"{error.field}: " if error.field and error.field not in error.message else ""
    say(f"leasehold: {where}{error.message}{hint}")


def lines(items: Sequence[str]) -> None:
    """Write each on a line of its own."""
    write("".join(f"{item}\n" for item in items))


def data(value: Any, wanted: Format) -> None:
    """Write a document as JSON or YAML."""
    if wanted is Format.YAML:
        write(_yaml(value))
    else:
        write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def stream_item(value: Any, wanted: Format) -> None:
    """Write one of a stream of documents: a line of JSON, or a YAML document of its own."""
    if wanted is Format.YAML:
        write(f"---\n{_yaml(value)}")
    else:
        write(json.dumps(value, ensure_ascii=False) + "\n")


def _yaml(value: Any) -> str:
    import yaml  # commands for people do without

    class Dumper(yaml.SafeDumper):
        """Writes an enum's text as the text that it is."""

    Dumper.add_multi_representer(enum.StrEnum, lambda dumper, text: dumper.represent_str(text.value))
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def is_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout is not None and sys.stdout.isatty()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Write rows under headings; on a terminal the last column is wrapped into its width."""
    if not is_terminal():
        write(grid(columns, rows, right=right) + "\n")
        return
    text = grid(columns, rows, right=right, width=shutil.get_terminal_size().columns)
    heading, rest = text.split("\n", 1) if rows else (text, "")
    if os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR"):
        heading = f"{_BOLD}{heading}{_PLAIN}"
    write(f"{heading}\n{rest}\n" if rest else f"{heading}\n")


def grid(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """Rows under headings, as text without a newline at its end.

    The columns named in `right` are aligned to it. With a `width`, in characters, the last column is wrapped
    where it would go beyond; nothing is ever cut off.
    """
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    if width is not None:
        before = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(width - before, WRAPPED_WIDTH_MIN))
    is_right = [column in right for column in columns]
    return "\n".join(_row(row, widths, is_right) for row in cells)


def _row(cells: Sequence[str], widths: Sequence[int], is_right: Sequence[bool]) -> str:
    *fixed, last = cells
    start = "".join(
        (cell.rjust(width) if right else cell.ljust(width)) + GAP
        for cell, width, right in zip(fixed, widths, is_right, strict=False)
    )
    parts = textwrap.wrap(last, widths[-1], break_on_hyphens=False) or [""]
    parts = [part.rjust(widths[-1]) if is_right[-1] else part for part in parts]
    return f"\n{' ' * len(start)}".join((start + parts[0], *parts[1:])).rstrip()


def printable(cell: str) -> str:
    """The text without what would drive the reader's terminal, or break the row."""
    return cell if cell.isprintable() else cell.encode("unicode_escape").decode("ascii")


def number(amount: float | None) -> str:
    """An amount of units for people: no decimals where it is whole, at most two elsewhere; - for None."""
    if amount is None:
        return "-"
    if amount == int(amount):
        return str(int(amount))
    return f"{amount:.2f}".rstrip("0").rstrip(".")


def seconds(duration: float) -> str:
    """A duration for people, such as `2 s` or `0.5 s`."""
    return f"{duration:g} s"
