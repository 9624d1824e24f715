"""A leader's flusher as a process of its own: takes the ledger over and moves jobs until another does.

``python job_flusher_child.py DSN REVISION loop|freeze``. It prints a line for each thing that a test waits for:
``took``, ``inside`` (frozen in the midst of a batch), and at the end the name of the error that ended it.
"""

import asyncio
import os
import random
import signal
import sys
import uuid

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.job import changes, model
from leasehold.core.placement import model as placement
from leasehold.postgres import job_flush, job_store

NODES = ("n1", "n2", "n3")
SUCCEEDED = model.Outcome(cause=model.EndCause.SUCCEEDED, exit_code=0)


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def next_batch(chance: random.Random, jobs: list[model.JobRecord]) -> changes.Batch:
    """Ends of some that run, allocations of some that wait, wherever they would go: Postgres is the gate."""
    running = [job for job in jobs if job.state is model.JobState.RUNNING and job.allocation is not None]
    waiting = [job for job in jobs if job.state is model.JobState.PENDING]
    ends = tuple(
        changes.EndAttempt(
            ref=job.allocation.ref,
            outcome=SUCCEEDED,
            next_state=chance.choice([model.JobState.COMPLETED, model.JobState.PENDING]),
            is_failure=False,
        )
        for job in chance.sample(running, min(len(running), 3))
        if job.allocation is not None
    )
    given = tuple(
        changes.Allocate(
            ref=model.AttemptRef(job.job_id, job.attempt + 1),
            node=chance.choice(NODES),
            boot_id="boot-1",
            held=job.spec.required,
            queue="default",
        )
        for job in chance.sample(waiting, min(len(waiting), 6))
    )
    new = tuple(
        changes.Submit(
            job=model.JobRecord(
                job_id=str(uuid.uuid4()),
                spec=model.JobSpec(required=placement.Resources(chance.randint(1, 3), 2**20)),
                state=model.JobState.PENDING,
                submit_time_seconds=1.9e9,
            )
        )
        for _ in range(4)
    )
    return changes.Batch(batch_id=uuid.uuid4().hex, ends=ends, allocations=given, submits=new)


async def loop(ledger: job_store.PostgresJobStore, epoch: epochs.Epoch) -> None:
    chance = random.Random(epoch.revision)
    while True:
        snapshot = await ledger.reload(epoch)
        await ledger.flush(epoch, next_batch(chance, list(snapshot.jobs)))


async def freeze(ledger: job_store.PostgresJobStore, epoch: epochs.Epoch) -> None:
    """Stop this process with the fence taken and a job submitted, and not committed."""
    real = job_flush.flush

    async def flush(*arguments: object) -> object:
        result = await real(*arguments)  # type: ignore[arg-type]
        say("inside")
        os.kill(os.getpid(), signal.SIGSTOP)
        return result

    job_flush.flush = flush  # type: ignore[assignment]
    await ledger.flush(epoch, next_batch(random.Random(0), []))
    say("committed")


async def main() -> None:
    dsn, revision, how = sys.argv[1:]
    epoch = epochs.Epoch(1, int(revision), 7)
    async with job_store.PostgresJobStore(dsn) as ledger:
        await ledger.take_over(epoch)
        say("took")
        try:
            await (loop if how == "loop" else freeze)(ledger, epoch)
        except errors.LeaseholdError as error:
            say(type(error).__name__)


if __name__ == "__main__":
    asyncio.run(main())
