"""Running a program that refuses to be root, when root starts it.

PostgreSQL refuses the effective user id 0. Three ways are tried, and the first that works here is taken:

1. a user namespace in which root appears as `nobody`: the files stay root's, nothing else changes;
2. becoming `nobody`, where user namespaces are shut (many containers). Program and data must be reachable for
   it;
3. becoming `nobody` with the one capability to pass closed folders (CAP_DAC_OVERRIDE), for a project that lies
   under ``/root``. That is less power than the root it was started with.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from leasehold.core import errors
from leasehold.devstack import process

NOBODY = 65534

_BECOME_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """A command prefix under which a program is not root, and the user id that its files must have outside."""

    prefix: tuple[str, ...]
    owner_uid: int


ROOTS_WAYS: Sequence[Way] = (
    Way(("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"), owner_uid=0),
    Way(_BECOME_NOBODY, owner_uid=NOBODY),
    Way((*_BECOME_NOBODY, "--inh-caps=+dac_override", "--ambient-caps=+dac_override"), owner_uid=NOBODY),
)


def choose(program: Path, data_dir: Path, cancel: threading.Event) -> Way:
    """The first way in which ``program --version`` runs with ``data_dir`` as its folder; gives it that owner.

    An ordinary user needs none. Raises `FailedPrecondition`, telling each failure, if root has no way.
    """
    if os.geteuid() != 0:
        return Way((), os.geteuid())
    failures = []
    for way in ROOTS_WAYS:
        own(data_dir, way.owner_uid)
        probe = ["/bin/sh", "-c", 'cd "$1" && : >.probe && rm .probe && exec "$2" --version']
        try:
            process.run_tool(
                [*probe, "sh", str(data_dir), str(program)],
                prefix=way.prefix,
                timeout_seconds=10,
                cancel=cancel,
            )
        except errors.Unavailable as error:
            failures.append(f"{way.prefix[0]}: {error.message}")
        else:
            return way
    raise errors.FailedPrecondition(
        f"{program.name} refuses to run as root, and no way to run it as another user works here: "
        f"{'; '.join(failures)}. Run as an ordinary user, or point LEASEHOLD_POSTGRES_DSN at a running server"
    )


def own(folder: Path, uid: int) -> None:
    """Give a folder and all in it to user and group ``uid``, unless it is theirs already."""
    if folder.lstat().st_uid == uid:
        return
    for path in (*folder.rglob("*"), folder):  # the folder last: it tells that all is done
        os.chown(path, uid, uid, follow_symlinks=False)
