"""SQL kept in named files: `sql/*.sql`, read once.

A file is a row of blocks. A block begins, after a blank line or at the top, with ``-- its_name: description``,
goes on with comments and SQL, and ends before the next one. Parameters are psycopg's ``%(name)s``.
"""

import re
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

_HEADER = re.compile(r"-- (?P<name>[a-z][a-z0-9_]*): \S")


def load(file_name: str) -> Mapping[str, bytes]:
    """The statements of `sql/<file_name>` by name; bytes, as psycopg takes text from literals only."""
    text = (resources.files("leasehold.postgres") / "sql" / file_name).read_text(encoding="utf-8")
    return MappingProxyType({name: sql.encode() for name, sql in parse(text, file_name).items()})


def parse(text: str, file_name: str) -> dict[str, str]:
    """The blocks of `text` by name, comments left out. Raises `ValueError` if the file is not well formed."""
    statements: dict[str, list[str]] = {}
    name = None
    is_after_blank = True
    for number, line in enumerate(text.splitlines(), start=1):
        header = _HEADER.match(line) if is_after_blank else None
        is_after_blank = not line.strip()
        if header:
            name = header["name"]
            if name in statements:
                raise ValueError(f"{file_name}:{number}: {name} is there twice")
            statements[name] = []
        elif is_after_blank or line.lstrip().startswith("--"):
            continue
        elif name is None:
            raise ValueError(f"{file_name}:{number}: SQL before the first `-- name: description`")
        else:
            statements[name].append(line)
    for name, lines in statements.items():
        if not lines:
            raise ValueError(f"{file_name}: {name} has no SQL")
    return {name: "\n".join(lines).rstrip().removesuffix(";") for name, lines in statements.items()}
