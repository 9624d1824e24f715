"""The application of the tests' Celery workers; what its tasks do stands in a ledger that only they write.

``TASKS_LEDGER`` is the ledger's address, ``TASKS_SETTINGS`` a JSON object of settings that stand as given.
"""

import json
import os
import signal
import time
from typing import Any

import celery
import redis
from leasehold.client import celery as leasehold_celery

app = celery.Celery("celery_tasks", broker=os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:1/0"))
leasehold_celery.configure(
    app,
    redeliveries_max=2,
    redelivery_url=os.environ.get("TASKS_REDELIVERY_URL"),
    **json.loads(os.environ.get("TASKS_SETTINGS", "{}")),
)


def _ledger() -> "redis.Redis":
    # A gate may stay closed for longer than the client would wait for an answer by itself.
    return redis.Redis.from_url(os.environ["TASKS_LEDGER"], decode_responses=True, socket_timeout=None)


@app.task(bind=True)  # type: ignore[untyped-decorator]  # Celery has no types
def work(self: Any, key: str) -> str:
    """Run until the test opens the gate of this key."""
    with _ledger() as ledger:
        ledger.rpush("ledger", f"started {key} {os.getpid()}")
        if ledger.blpop(f"gate:{key}", timeout=60) is None:
            raise TimeoutError(key)
        ledger.rpush("ledger", f"completed {key} {os.getpid()}")
    return key


@app.task  # type: ignore[untyped-decorator]
def poison(key: str) -> None:
    """Kill the process that runs this, as the kernel does for want of memory."""
    with _ledger() as ledger:
        ledger.rpush("ledger", f"started {key} {os.getpid()}")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task  # type: ignore[untyped-decorator]
def gorge(key: str, mebibytes: int) -> None:
    """Take so much memory."""
    with _ledger() as ledger:
        ledger.rpush("ledger", f"started {key} {os.getpid()}")
        held = bytearray(b"1") * (mebibytes * 2**20)
        ledger.rpush("ledger", f"completed {key} {len(held)}")


@app.task  # type: ignore[untyped-decorator]
@leasehold_celery.budgeted(
    os.environ.get("TASKS_BUDGET", "llm-api"),
    tokens=lambda key, tokens, used: tokens,
    wait_seconds=float(os.environ.get("TASKS_WAIT_SECONDS", "20")),
    retry_seconds=0.5,
    give_up_seconds=float(os.environ.get("TASKS_GIVE_UP_SECONDS", "60")),
)
def ask(key: str, tokens: int, used: int) -> int:
    """Spend `used` of the `tokens` that were admitted; the ledger has begin and end."""
    with _ledger() as ledger:
        ledger.rpush("calls", json.dumps({"key": key, "event": "begin", "at": time.monotonic(), "used": used}))
        time.sleep(0.05)
        leasehold_celery.current_permit().settle(tokens=used)
        ledger.rpush("calls", json.dumps({"key": key, "event": "end", "at": time.monotonic(), "used": used}))
    return used
