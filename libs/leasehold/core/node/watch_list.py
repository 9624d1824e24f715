"""Processes whose deaths agents are to certify, by the place where they can be seen."""

from leasehold.core import processes
from leasehold.core.node import registry_model

#: More are not asked for: their deaths show as the expiry of their leases.
WATCHED_MAX = 100_000

#: Boot id and PID namespace: agent and process must share both.
Place = tuple[str, int]


def place_of(process: processes.ProcessKey) -> Place:
    """Where a process can be seen."""
    return (process.boot_id, process.pid_namespace)


def place_of_agent(registration: registry_model.Registration) -> Place:
    """Where an agent sees processes."""
    return (registration.boot_id, registration.pid_namespace)


class WatchList:
    """What is watched, and which sessions are at each place."""

    def __init__(self) -> None:
        self._processes: dict[Place, dict[processes.ProcessKey, None]] = {}
        self._sessions: dict[Place, dict[int, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, process: processes.ProcessKey) -> bool:
        return process in self._processes.get(place_of(process), ())

    def add(self, process: processes.ProcessKey) -> tuple[int, ...]:
        """Watch a process; the sessions to be asked now."""
        if process in self or self._count >= WATCHED_MAX:
            return ()
        place = place_of(process)
        self._processes.setdefault(place, {})[process] = None
        self._count += 1
        return tuple(self._sessions.get(place, ()))

    def remove(self, process: processes.ProcessKey) -> tuple[int, ...]:
        """Watch it no more; the sessions that were asked."""
        place = place_of(process)
        if process not in self:
            return ()
        here = self._processes[place]
        del here[process]
        self._count -= 1
        if not here:
            del self._processes[place]
        return tuple(self._sessions.get(place, ()))

    def opened(self, session: int, place: Place) -> tuple[processes.ProcessKey, ...]:
        """An agent has connected; all that it is to be asked."""
        self._sessions.setdefault(place, {})[session] = None
        return tuple(self._processes.get(place, ()))

    def closed(self, session: int, place: Place) -> None:
        """Its connection is gone."""
        here = self._sessions.get(place)
        if here is not None:
            here.pop(session, None)
            if not here:
                del self._sessions[place]

    def all(self) -> tuple[processes.ProcessKey, ...]:
        """Every process that is watched."""
        return tuple(process for here in self._processes.values() for process in here)

    def sessions_at(self, place: Place) -> tuple[int, ...]:
        """Sessions of agents at a place."""
        return tuple(self._sessions.get(place, ()))
