"""What the tests' RQ workers run; the ledger, a list in the broker's last database, is written only here."""

import os

import redis
from leasehold import client


def _ledger() -> "redis.Redis":
    # A gate may stay closed for longer than the client would wait for an answer by itself.
    return redis.Redis.from_url(os.environ["TASKS_LEDGER"], decode_responses=True, socket_timeout=None)


@client.allocated(cpus=4, memory="1GiB", wait_seconds=60)
def work(key: str) -> str:
    """Run until the test opens the gate of this key; the node that it had."""
    allocation = client.current_allocation()
    with _ledger() as ledger:
        ledger.rpush("ledger", f"started {key} {allocation.node}")
        if ledger.blpop([f"gate:{key}"], timeout=60) is None:
            raise TimeoutError(key)
        ledger.rpush("ledger", f"completed {key} {allocation.node}")
    return allocation.node


@client.allocated(cpus=4, memory="1GiB", wait_seconds=0.2)
def impatient(key: str) -> str:
    """Run only where there is room at once."""
    with _ledger() as ledger:
        ledger.rpush("ledger", f"started {key}")
    return key
