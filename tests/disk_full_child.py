"""Run in a mount namespace of its own: fills the file system of its folder, and tells what became of workers.

``python disk_full_child.py FOLDER GO``: GO is a file elsewhere, at whose sight the workers end with code 9.
"""

import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import process_scene
from leasehold.core import errors
from process_scene import Host


def fill(folder: Path) -> int:
    """Write until there is no room; how many bytes that was."""
    written = 0
    descriptor = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (4096, 1):
            try:
                while written < 64 * 2**20:
                    written += os.write(descriptor, b"x" * size)
            except OSError:
                continue
    finally:
        os.close(descriptor)
    return written


async def tell(folder: Path, go: Path) -> dict[str, Any]:
    host = Host(folder / "state")
    waits = ("sh", "-c", f'while [ ! -e "{go}" ]; do sleep 0.01; done; exit 9')
    told_now = await host.start(1, waits)
    told_later = await host.start(2, waits)
    host.folder.write("modes", {"pool": "manual"})
    host.signal(told_later, "CONT")
    fill(folder)
    try:
        host.folder.write("modes", {"pool": "auto"})
        refused = ""
    except errors.ResourceExhausted as error:
        refused = error.message
    not_started = await host.run(3, ("true",))
    # Its stop is carried out though it cannot be noted.
    signalled = host.signal(told_later, "CONT")
    await asyncio.to_thread(go.touch)
    first = await host.end_of(told_now)
    host.processes.keep_exit(told_now, first)
    host.leave()
    await process_scene.until(lambda: process_scene.pids_below(folder) == [], "both shims have ended")
    successor = Host(folder / "state")
    adopted = {worker.worker_id: worker.exit for worker in successor.adopted}
    modes = successor.folder.read("modes")
    successor.leave()
    second = adopted[told_later]
    assert second is not None
    return {
        "first": dataclasses.asdict(first),
        "second": dataclasses.asdict(second),
        "not_started": dataclasses.asdict(not_started),
        "refused": refused,
        "modes": modes,
        "signalled": signalled,
        "quarantined": len(successor.processes.quarantined),
    }


if __name__ == "__main__":
    result = asyncio.run(tell(Path(sys.argv[1]), Path(sys.argv[2])))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
