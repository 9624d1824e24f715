"""Worker processes of a benchmark, and what they say, gathered in one place."""

import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness

WAIT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """One line of one worker; `at` is an instant of CLOCK_MONOTONIC."""

    worker: str
    event: str
    at: float
    fields: dict[str, Any]


class Workers:
    """The living workers by name; their last known shares by (worker, budget)."""

    def __init__(self, addresses: Sequence[str], standing: str) -> None:
        self._addresses = ",".join(addresses)
        self._standing = standing
        self._processes: dict[str, tuple[subprocess.Popen[str], contextlib.ExitStack]] = {}
        self._graves: list[contextlib.ExitStack] = []
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        #: For whoever wonders why a wait was in vain.
        self._last: dict[tuple[str, str], Heard] = {}

    @contextlib.contextmanager
    def staff(self) -> Iterator["Workers"]:
        """Whoever is hired within is gone after it."""
        try:
            yield self
        finally:
            for name in list(self._processes):
                self.end(name)
            for stack in self._graves:
                stack.close()

    def hire(self, name: str) -> None:
        """Start a worker; returns when it is connected."""
        stack = contextlib.ExitStack()
        program = harness.child_program("holder_program", self._addresses, name, self._standing)
        process, _ = stack.enter_context(program)
        self._processes[name] = (process, stack)
        threading.Thread(target=self._listen, args=(name, process), daemon=True).start()

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            while True:
                fields = harness.heard(process)
                self._heard.put(Heard(name, fields.pop("event"), fields.pop("at"), fields))

    def tell(self, name: str, line: str) -> None:
        """Give a worker an order."""
        harness.tell(self._processes[name][0], line)

    def kill(self, name: str) -> float:
        """SIGKILL a worker; the instant before."""
        process, stack = self._processes.pop(name)
        at = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        # Reaping comes later: the allocator must not need it.
        self._graves.append(stack)
        return at

    def end(self, name: str) -> None:
        """End a worker in good order."""
        _, stack = self._processes.pop(name)
        stack.close()

    def until(self, is_enough: Callable[[Heard], bool]) -> None:
        """Hand on what is heard until `is_enough` says so. Raises `TimeoutError`."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                heard = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"the workers last said {list(self._last.values())}") from None
            self._last[heard.worker, heard.event] = heard
            if is_enough(heard):
                return

    def when_shares(
        self, budget: str, is_right: Callable[[str, dict[str, float]], bool], among: set[str]
    ) -> float:
        """The instant from which each worker of `among` had last been told a share that is right."""
        since: dict[str, float] = {}

        def look(heard: Heard) -> bool:
            if heard.event == "share" and heard.fields["budget"] == budget and heard.worker in among:
                amounts = heard.fields["amounts"]
                if amounts and is_right(heard.worker, amounts):
                    since.setdefault(heard.worker, heard.at)
                else:
                    since.pop(heard.worker, None)
            return since.keys() == among

        self.until(look)
        return max(since.values())
