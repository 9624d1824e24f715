"""One worker process with the product's client, driven by lines on standard input.

``join BUDGET``: come anew, acquire one unit, and tell every change of the allocation; ``leave BUDGET``: give
the lease back; ``work BUDGET THREADS``: spend all that can be had, until the end of the process; ``spend BUDGET
THREADS PATH``: likewise, and write the instant of each admission to a file. What happens is told as lines of
JSON with the instant (CLOCK_MONOTONIC). It ends with its input.
"""

import argparse
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lines
from leasehold import client
from leasehold.client import budgets, clients

_print_lock = threading.Lock()


def _tell(event: str, at: float, **fields: Any) -> None:
    line = json.dumps({"event": event, "at": at, **fields})
    with _print_lock:
        lines.out(line)


class Worker:
    """A worker's budgets. The first one, never left, keeps the connection up, as a busy process has it."""

    def __init__(self, addresses: str, name: str, standing: str) -> None:
        self._addresses = addresses
        self._name = name
        self._joined: dict[str, clients.Client] = {}
        self._standing = client.connect_blocking(addresses, worker_id=name)
        self._standing.budget(standing).wait_for_allocation(timeout_seconds=30.0)

    def join(self, name: str) -> budgets.Budget:
        """Join a budget and take one unit of it."""
        began = time.monotonic()
        connection = client.connect_blocking(self._addresses, worker_id=self._name)
        self._joined[name] = connection
        budget = connection.budget(name)

        def told(allocation: client.Allocation) -> None:
            _tell("share", time.monotonic(), budget=name, amounts=dict(allocation.amounts))

        budget.set_allocation_callback(told)
        with budget.acquire(tokens=1, timeout_seconds=30.0):
            spendable = time.monotonic()
        # Active for as long as it is here: an idle worker's share would go to the others.
        budget.update_activity(is_active=True)
        _tell("joined", spendable, budget=name, began=began)
        return budget

    def leave(self, name: str) -> None:
        """Give the lease back."""
        self._joined.pop(name).close()
        _tell("left", time.monotonic(), budget=name)

    def work(self, name: str, threads: int) -> None:
        """Spend all there is."""
        self._spend(self.join(name), threads, lambda: None)

    def spend(self, name: str, threads: int, path: str) -> None:
        """Spend all there is; each instant is in the file before the next, whatever kills this process."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note() -> None:
            os.write(descriptor, struct.pack("d", time.monotonic()))

        self._spend(client.connect_blocking(self._addresses, worker_id=self._name).budget(name), threads, note)

    @staticmethod
    def _spend(budget: budgets.Budget, threads: int, note: Callable[[], None]) -> None:
        def spend() -> None:
            while True:
                with budget.acquire(tokens=1):
                    note()

        for _ in range(threads):
            threading.Thread(target=spend, daemon=True).start()


def main() -> None:
    """Obey standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses")
    parser.add_argument("name")
    parser.add_argument("standing", help="the budget that is never left")
    chosen = parser.parse_args()
    worker = Worker(chosen.addresses, chosen.name, chosen.standing)
    lines.out("ready")
    for line in sys.stdin:
        word, name, *rest = line.split()
        if word == "join":
            worker.join(name)
        elif word == "leave":
            worker.leave(name)
        elif word == "work":
            worker.work(name, int(rest[0]))
        elif word == "spend":
            worker.spend(name, int(rest[0]), rest[1])


if __name__ == "__main__":
    main()
