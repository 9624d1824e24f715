"""SIGINT, SIGTERM and SIGHUP as an exception: for a command that starts processes, and must end them.

What was inherited does not matter: a shell starts `command &` with SIGINT ignored, and a parent may have had
signals blocked. Services use `signals` instead.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: To leave the finalizer that has lost the exception.
AGAIN_SECONDS = 0.05


class Stopped(KeyboardInterrupt):
    """A signal asks to stop. A KeyboardInterrupt, since event loops and pools let that one through."""


class Interrupts:
    """Turns the first signal into `Stopped`, raised wherever the main thread is; later ones are ignored.

    A context manager, for the main thread; `on_first` is called before the exception. Under nohup a lost
    terminal is no reason to stop: SIGHUP stays ignored where it was.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        #: For loops on which the exception may have been lost.
        self.is_stopping = threading.Event()
        self._on_first = on_first
        self._after = contextlib.ExitStack()
        self._numbers: list[signal.Signals] = []
        self._hook_before = sys.unraisablehook

    def __enter__(self) -> Self:
        is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._numbers = [number for number in SIGNALS if not (is_nohup and number is signal.SIGHUP)]
        for number in self._numbers:
            self._after.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
        self._hook_before = sys.unraisablehook
        self._after.callback(setattr, sys, "unraisablehook", self._hook_before)
        sys.unraisablehook = self._lost
        self._arm()
        unblock(self._numbers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._after.close()

    def ignore_more(self) -> None:
        """A signal must not interrupt the stopping, which takes a few seconds at most."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _arm(self) -> None:
        for number in self._numbers:
            signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.ignore_more()
        if not self.is_stopping.is_set():
            self.is_stopping.set()
            self._on_first()
        raise Stopped

    def _lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """A finalizer or a library's callback was interrupted and passes no exception on: raise it again."""
        if lost.exc_type is not Stopped:
            self._hook_before(lost)
            return
        self._arm()
        # To the thread itself, or what it waits in goes on.
        again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM))
        again.daemon = True
        self._after.callback(again.cancel)
        again.start()


def unblock(numbers: Iterable[signal.Signals]) -> None:
    """Let this thread have these signals, whoever blocked them before it was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
