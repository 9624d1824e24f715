"""The Celery application of the demo's pool: tasks that take memory for some seconds, and tell a ledger.

An agent runs it by its built-in template::

    pools:
      - name: demo
        template: celery
        parameters: {app: leasehold.demo.pool_app, queues: demo, task_time_limit: 15, task_soft_time_limit: 12,
                     soft_shutdown_timeout: 1, visibility_timeout: 20}
        env: {LEASEHOLD_DEMO_LEDGER: /path/of/ledger.sock}

with ``CELERY_BROKER_URL`` in the agent's environment. It is as `leasehold.client.celery.configure` makes it,
but for times: a demo's task takes seconds, not an hour, and that of a worker that was killed must be seen to
run again.
"""

import os
import time
from typing import Any, Final

import celery
from leasehold.client import celery as leasehold_celery
from leasehold.demo import pool_ledger

QUEUE: Final = "demo"
LEDGER_VARIABLE: Final = "LEASEHOLD_DEMO_LEDGER"
TASK_TIME_LIMIT: Final = 15
TASK_SOFT_TIME_LIMIT: Final = 12
SOFT_SHUTDOWN_TIMEOUT: Final = 1
#: Above the longest task. The task of a worker that was killed whole is hidden for so long, and not much
#: longer: the broker is looked through every second.
VISIBILITY_TIMEOUT: Final = 20
#: Each page is written to; a smaller size than the true one only does it more often.
_PAGE_BYTES: Final = 4_096
_MIB: Final = 2**20

app = celery.Celery("leasehold-demo")
leasehold_celery.configure(
    app,
    task_default_queue=QUEUE,
    task_time_limit=TASK_TIME_LIMIT,
    task_soft_time_limit=TASK_SOFT_TIME_LIMIT,
    worker_soft_shutdown_timeout=SOFT_SHUTDOWN_TIMEOUT,
    worker_lost_wait=1.0,
    broker_transport_options={
        "visibility_timeout": VISIBILITY_TIMEOUT,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)


@app.task(bind=True)  # type: ignore[untyped-decorator]  # Celery has no types
def work(self: Any, key: str, memory_mib: int, seconds: float) -> None:
    """Hold so much memory for so long; `key` names the task in the ledger."""
    ledger = os.environ[LEDGER_VARIABLE]
    worker = str(self.request.hostname)
    pool_ledger.write(ledger, "started", key, worker=worker)
    held = bytearray(memory_mib * _MIB)
    for place in range(0, len(held), _PAGE_BYTES):
        held[place] = 1  # memory that nobody has written to is not there
    time.sleep(seconds)
    # The last thing that is done: what is interrupted before this line has not been completed.
    pool_ledger.write(ledger, "completed", key, worker=worker)


def submit(broker_url: str, ledger: str, key: str, *, memory_mib: int, seconds: float) -> None:
    """Promise a task to the ledger, and queue it: for the scene, which is no worker."""
    pool_ledger.write(ledger, "submitted", key)
    with app.connection_for_write(broker_url) as connection:
        work.apply_async((key, memory_mib, seconds), task_id=key, connection=connection)
