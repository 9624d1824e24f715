"""Tells at once when processes die, by pidfds on the event loop: no polling, no parenthood needed."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from leasehold.observe import logs
from leasehold.runtime import identity as identities
from leasehold.runtime.identity import ProcessIdentity

_log = logs.get_logger(__name__)

OnExit = Callable[[ProcessIdentity], None]


@dataclass(slots=True)
class _Watched:
    descriptor: int
    callbacks: dict[int, OnExit] = field(default_factory=dict)


class ProcessWatch:
    """Calls back on the loop when a process dies. One descriptor a process, however many watch it.

    A callback is a death certificate: it comes only for a process whose boot, PID namespace and start time were
    compared (`identity.open_pidfd`). Use from the loop's own thread; `close` gives the descriptors back.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._watched: dict[ProcessIdentity, _Watched] = {}
        self._last_key = 0

    def watch(self, process: ProcessIdentity, on_exit: OnExit) -> Callable[[], None]:
        """Call `on_exit` once when `process` is dead; soon, if it already is. Returns a function that cancels.

        Raises as `identity.open_pidfd` does where nothing can be certified; nothing is watched then.
        """
        watched = self._watched.get(process)
        if watched is None:
            descriptor = identities.open_pidfd(process)
            if descriptor is None:
                return self._loop.call_soon(self._call, process, on_exit).cancel
            watched = self._watched[process] = _Watched(descriptor)
            self._loop.add_reader(descriptor, self._died, process)
        self._last_key += 1
        key = self._last_key
        watched.callbacks[key] = on_exit
        return lambda: self._cancel(process, watched, key)

    def __len__(self) -> int:
        """How many processes are watched: descriptors in use."""
        return len(self._watched)

    def close(self) -> None:
        """Stop watching everything, without callbacks."""
        for process in list(self._watched):
            self._forget(process).callbacks.clear()

    def _died(self, process: ProcessIdentity) -> None:
        callbacks = self._forget(process).callbacks
        # Taken one by one: a callback may cancel one that has not been called yet.
        while callbacks:
            self._call(process, callbacks.pop(next(iter(callbacks))))

    def _cancel(self, process: ProcessIdentity, watched: _Watched, key: int) -> None:
        watched.callbacks.pop(key, None)
        if not watched.callbacks and self._watched.get(process) is watched:
            self._forget(process)

    def _forget(self, process: ProcessIdentity) -> _Watched:
        watched = self._watched.pop(process)
        self._loop.remove_reader(watched.descriptor)
        os.close(watched.descriptor)
        return watched

    def _call(self, process: ProcessIdentity, on_exit: OnExit) -> None:
        try:
            on_exit(process)
        except Exception:  # noqa: BLE001  the others that watch this process must hear of it too
            _log.exception("exit_callback_failed", pid=process.pid)
