"""What lives in a simulated world: processes that run, freeze, thaw and die."""

from collections.abc import Callable

from leasehold.sim import world_time


class Process:
    """Something that happens only while a process runs: what comes while it is frozen waits."""

    def __init__(self, scheduler: world_time.Scheduler, place: str) -> None:
        self.scheduler = scheduler
        #: Where the network sees it.
        self.place = place
        self.is_alive = True
        self.is_frozen = False
        self._inbox: list[world_time.Action] = []

    def do(self, action: world_time.Action) -> None:
        """Let it handle something now; after the thaw if it is frozen; never if it is dead."""
        if not self.is_alive:
            return
        if self.is_frozen:
            self._inbox.append(action)
        else:
            action()

    def wake_at(self, instant: float, action: world_time.Action) -> None:
        """A timer of its own, in true time."""
        self.scheduler.at(instant, lambda: self.do(action))

    def freeze(self) -> None:
        """SIGSTOP."""
        self.is_frozen = True

    def thaw(self) -> None:
        """SIGCONT: what waited is handled, in its order."""
        if not self.is_frozen or not self.is_alive:
            return
        self.is_frozen = False
        inbox, self._inbox = self._inbox, []
        for action in inbox:
            self.do(action)

    def die(self) -> None:
        """SIGKILL."""
        self.is_alive = self.is_frozen = False
        self._inbox.clear()


class Alarm:
    """One timer that is moved about; only its latest setting goes off."""

    def __init__(self, process: Process, action: Callable[[], None]) -> None:
        self._process = process
        self._action = action
        self._at = float("inf")

    def set(self, instant: float) -> None:
        """Go off at `instant`, in true time; infinity: never."""
        instant = max(instant, self._process.scheduler.now)
        if instant == self._at:
            return
        self._at = instant
        if instant != float("inf"):
            self._process.wake_at(instant, lambda: self._ring(instant))

    def _ring(self, instant: float) -> None:
        if instant == self._at:
            self._at = float("inf")
            self._action()
