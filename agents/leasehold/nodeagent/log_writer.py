"""Log lines leave the agent by a thread: a reader that stalls must not stall the agent.

A pipe that nobody empties takes 64 KiB and then blocks whoever writes; the agent would sample no more, and its
watchdog would end it. So lines wait in a bounded queue, and what does not fit is counted and told.
"""

import collections
import threading
from typing import Final, TextIO

LINES_MAX: Final = 10_000


class LogWriter:
    """Stands in for a text stream: `write` never blocks."""

    def __init__(self, stream: TextIO, *, lines_max: int = LINES_MAX) -> None:
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque()
        self._lines_max = lines_max
        self._lost = 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Take a text; it is written soon."""
        with self._changed:
            if len(self._lines) >= self._lines_max:
                self._lost += 1
            else:
                self._lines.append(text)
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread does."""

    def isatty(self) -> bool:
        """Whether people read along."""
        return self._stream.isatty()

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Write what waits, as far as that can be done in the time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._is_closing:
                    self._changed.wait()
                if not self._lines:
                    return
                text = "".join(self._lines)
                self._lines.clear()
                lost, self._lost = self._lost, 0
            if lost:
                text += f"{lost} lines of the log were lost: they could not be written in time\n"
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                continue  # a full disk, or a reader that is gone: the agent works on
