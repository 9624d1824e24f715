"""A full disk, for real: a small file system in a mount namespace of its own."""

import json
import subprocess
import sys
from pathlib import Path

import disk_full_child
import process_scene
import pytest

_MOUNT = 'mount -t tmpfs -o size=1m,mode=0700 tmpfs "$1" && exec "$2" "$3" "$1" "$4"'


def unshare() -> list[str]:
    """How a mount namespace is made here: as root, or as another user with a user namespace."""
    for flags in ("-m", "-rm"):
        command = ["unshare", flags, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return command[:2]
    return pytest.fail("no mount namespace can be made here: run as root, or allow user namespaces")


def test_a_full_disk_loses_no_exit_and_starts_nothing_it_cannot_record(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    command = [
        *[*unshare(), "sh", "-c", _MOUNT, "sh"],
        *[str(folder), sys.executable, disk_full_child.__file__, str(tmp_path / "go")],
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    finally:
        process_scene.end_everything(tmp_path)
    told = json.loads(done.stdout.splitlines()[-1])

    assert (told["first"]["cause"], told["first"]["exit_code"]) == ("crashed", 9)
    assert (told["second"]["cause"], told["second"]["exit_code"]) == ("crashed", 9)
    assert told["not_started"]["cause"] == "not_started"
    assert "No space left on device" in told["not_started"]["detail"]
    assert "No space left on device" in told["refused"]
    assert told["modes"] == {"pool": "manual"}
    assert told["signalled"] is True
    assert told["quarantined"] == 0
