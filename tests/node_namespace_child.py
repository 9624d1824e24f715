"""An agent and a holder in a PID namespace of their own: run by `unshare --pid --fork --mount-proc`.

`python node_namespace_child.py NODE HOLDER ADDRESS...`: it prints what the holder's process prints, and kills
it with SIGKILL when it is told to by a line on standard input.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import allocator_holder_child
from node_agents import Certifier, running


async def main(node: str, holder: str, addresses: list[str]) -> None:
    agent = Certifier(addresses, node)
    async with running(agent):
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(allocator_holder_child.__file__)), addresses[0], holder,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = await process.stdout.readline()
        print(line.decode().strip(), os.getpid(), process.pid, flush=True)  # noqa: T201
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
