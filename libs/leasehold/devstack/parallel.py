"""Doing a few blocking things at the same time, with one outcome."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures


def run(calls: Sequence[Callable[[], None]]) -> None:
    """Run all to their end; then raise the first error, if any."""
    if calls:
        with futures.ThreadPoolExecutor(len(calls)) as pool:
            running = [pool.submit(call) for call in calls]
        for future in running:
            future.result()


def run_cancellable(calls: Sequence[Callable[[threading.Event], None]]) -> None:
    """Run all; at the first error, or Ctrl-C in this thread, set the event that each was given.

    Returns or raises when all have ended: the error that came first, not those that the cancelling made.
    """
    if not calls:
        return
    cancel = threading.Event()
    with futures.ThreadPoolExecutor(len(calls)) as pool:
        try:
            for future in futures.as_completed([pool.submit(call, cancel) for call in calls]):
                future.result()
        except BaseException:
            cancel.set()
            raise
