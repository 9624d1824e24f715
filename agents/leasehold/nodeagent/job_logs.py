"""Removes logs of jobs that have ended a while ago, so that short jobs without number do not fill the disk."""

import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

#: Jobs whose logs are kept at most, the newest.
LOGS_MAX: Final = 10_000

_FILE: Final = re.compile(r"(job-[0-9a-f-]{36}-[0-9]+)\.log(\..+)?")


def remove_old(
    folder: Path, known: Collection[str], keep_seconds: float, *, logs_max: int = LOGS_MAX
) -> list[str]:
    """Remove the logs whose attempts are not `known` and were last written so long ago; their names.

    Blocks on the disk: for a thread. Raises nothing.
    """
    files: dict[str, list[Path]] = {}
    newest: dict[str, float] = {}
    for path in folder.glob("job-*"):
        found = _FILE.fullmatch(path.name)
        if found is None or found[1] in known:
            continue
        try:
            written = path.stat().st_mtime
        except OSError:
            continue
        files.setdefault(found[1], []).append(path)
        newest[found[1]] = max(written, newest.get(found[1], 0.0))
    before = time.time() - keep_seconds
    ranked = sorted(newest, key=lambda name: -newest[name])
    removed = [name for place, name in enumerate(ranked) if place >= logs_max or newest[name] < before]
    for name in removed:
        for path in files[name]:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                break
    return removed
