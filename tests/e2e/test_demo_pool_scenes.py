"""The workers' scenes as a user runs them. Takes two minutes: run by `make soak`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
def test_the_scenes_keep_every_claim_and_leave_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leasehold.demo.pool_run", "--folder", str(tmp_path / "scenes")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "BROKEN" not in done.stdout
    here = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _read(path)]
    assert here == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
