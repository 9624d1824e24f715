"""A holder as a process of its own, to be killed: `python allocator_holder_child.py ADDRESS NAME [anonymous]`.

It prints a line when it holds something, and spends until it is killed.
"""

import asyncio
import sys

from allocator_holders import DrivenHolder, running
from allocator_kit import until
from leasehold.core import processes
from leasehold.runtime import identity


async def main(address: str, name: str, *, is_anonymous: bool) -> None:
    me = identity.current()
    process = processes.ProcessKey(me.boot_id, me.pid_namespace, me.pid, me.start_time_ticks)
    holder = DrivenHolder([address], name, process=None if is_anonymous else process)
    async with running(holder):
        holder.spend(calls=50)
        await until(lambda: holder.has() == 20, "it has its share")
        print("holds", flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], is_anonymous=sys.argv[3:] == ["anonymous"]))
