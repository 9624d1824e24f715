"""`leasehold up` with its example agent: the job that it tells to try runs, and the audit is clean."""

import json
import shlex
import subprocess
from pathlib import Path

import cli_scene


def test_the_job_that_up_tells_to_try_runs(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with cli_scene.up(data_dir, has_parts=True) as up:
        assert up.process.stdout is not None
        told = up.process.stdout.readline()
        words = [word.replace("seconds=5", "seconds=0") for word in shlex.split(told)]
        assert words[1:4] == ["job", "submit", "pause"]

        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=cli_scene.PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        listed = json.loads(up.run("job", "list", "-o", "json").stdout)
        assert [(job["spec"]["template"], job["state"]) for job in listed] == [("pause", "completed")]
        assert up.run("doctor").returncode == 0
    assert cli_scene.left_over(data_dir) == []
