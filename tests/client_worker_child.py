"""A worker as users write them: it spends its budget as fast as it may, and so does a child that it forks.

`python client_worker_child.py NAME JOURNAL STOP`: until the file STOP is there, each call is written to the
journal, a line at its beginning and one at its end, on the clock that all processes of a host share.
"""

import os
import sys
import time
from pathlib import Path

from leasehold import client

#: What a call does at the provider.
CALL_SECONDS = 0.005


def note(journal: int, what: str) -> None:
    """One line, written at once."""
    os.write(journal, f"{time.clock_gettime_ns(time.CLOCK_BOOTTIME)} {what}\n".encode())


def spend(budget: client.Budget, who: str, journal: int, stop: Path) -> None:
    """Call and call again; an error that reaches the user is written down, too."""
    while not stop.exists():
        try:
            with budget.acquire(requests=1, timeout_seconds=30):
                note(journal, f"{who} begins")
                time.sleep(CALL_SECONDS)
                note(journal, f"{who} ends")
        except client.errors.LeaseholdError as error:
            note(journal, f"{who} fails {error.reason}")
            return


def main() -> int:
    """Exit code: 0 if the child's was."""
    name, journal_path, stop = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with client.connect_blocking(worker_id=name) as leasehold:
        budget = leasehold.budget("llm")
        with budget.acquire(requests=1, timeout_seconds=30):
            pass  # the lease is live when the child is born
        child = os.fork()
        spend(budget, name if child else f"{name}-child", journal, stop)
        if child == 0:
            leasehold.close()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
