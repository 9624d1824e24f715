"""What the leased fleet's own logs show: who was told which share, and how soon. Pure: events in, facts out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leasehold.demo import board, plan, windows

#: Above the old share by so much: units of the one that left have arrived.
GROWN_RATIO = 1.02
#: A share may differ from limit / N by so much of it, and integer dimensions by one unit.
SHARE_TOLERANCE = 0.05

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of who is active."""

    #: Such as "worker-b joins".
    name: str
    kind: str
    at_ns: int
    #: Active workers from then on.
    active_workers: int
    #: Those who must hear of it.
    witnesses: tuple[str, ...]
    #: Who gains by it: the one that came, or those who stay.
    gainers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """How soon a change was known and felt; None if it never was."""

    change: Change
    #: Until the last witness had been told a share for the new number of active workers.
    known_seconds: float | None
    #: Until the first request was admitted within what the change brought.
    first_unit_seconds: float | None


class Story:
    """The leased fleet's logs, and the instant of the kill."""

    def __init__(
        self, events: Mapping[str, Sequence[Event]], wanted: plan.Plan, *, kill_ns: int, end_ns: int
    ) -> None:
        self._events = events
        self._plan = wanted
        self._kill_ns = kill_ns
        self._end_ns = end_ns

    def changes(self) -> list[Change]:
        """All changes of who is active, in order. A worker whose log lacks its part has none."""
        joins = [
            Change(
                name=f"{name} joins",
                kind="join",
                at_ns=event["mono_ns"],
                active_workers=count,
                witnesses=plan.WORKERS[:count],
                gainers=(name,),
            )
            for count, name in enumerate(plan.WORKERS, start=1)
            for event in self._of(name, "join")
        ]
        return [*joins, *self._pause(), self._death()]

    def _pause(self) -> list[Change]:
        name = plan.IDLE_WORKER
        paused = [event["mono_ns"] for event in self._of(name, "idle")]
        resumed = [event["mono_ns"] for event in self._of(name, "resume")]
        if not paused or not resumed:
            return []
        others = _without(plan.WORKERS, name)
        return [
            Change(
                name=f"{name} is idle past its timeout",
                kind="idle",
                at_ns=self._idle_ns(name, resumed[0]),
                active_workers=len(others),
                witnesses=others,
                gainers=others,
            ),
            Change(
                name=f"{name} comes back",
                kind="return",
                at_ns=resumed[0],
                active_workers=len(plan.WORKERS),
                witnesses=plan.WORKERS,
                gainers=(name,),
            ),
        ]

    def _idle_ns(self, name: str, before_ns: int) -> int:
        """When the activity timeout was over: after the last admission, or after the last call if it ran on."""
        timeout_ns = int(self._plan.activity_timeout_seconds * windows.NANOS_PER_SECOND)
        instants = [0]
        for event in self._events[name]:
            if event["mono_ns"] >= before_ns:
                continue
            if event["event"] == "admitted":
                instants.append(event["mono_ns"] + timeout_ns)
            elif event["event"] in ("done", "failed", "throttled"):
                instants.append(event["mono_ns"])
        return max(instants)

    def _death(self) -> Change:
        survivors = _without(plan.WORKERS, plan.KILLED_WORKER)
        return Change(
            name=f"{plan.KILLED_WORKER} is killed",
            kind="death",
            at_ns=self._kill_ns,
            active_workers=len(survivors),
            witnesses=survivors,
            gainers=survivors,
        )

    def timings(self) -> list[Timing]:
        """How soon each change was known and felt."""
        changes = self.changes()
        ends_ns = [change.at_ns for change in changes[1:]] + [self._end_ns]
        return [
            Timing(change, self._known_seconds(change, end_ns), self._first_unit_seconds(change))
            for change, end_ns in zip(changes, ends_ns, strict=True)
        ]

    def _known_seconds(self, change: Change, end_ns: int) -> float | None:
        told_ns: list[int] = []
        for name in change.witnesses:
            told = [
                event["mono_ns"]
                for event in self._of(name, "allocation", change.at_ns, end_ns)
                if event["active_workers"] == change.active_workers
            ]
            if not told:
                return None
            told_ns.append(told[0])
        return (max(told_ns) - change.at_ns) / windows.NANOS_PER_SECOND

    def _first_unit_seconds(self, change: Change) -> float | None:
        firsts: list[int] = []
        for name in change.gainers:
            since_ns = change.at_ns
            if change.kind in ("idle", "death"):
                grown_ns = self._grown_ns(name, change)
                if grown_ns is None:
                    continue
                since_ns = grown_ns
            firsts += [event["mono_ns"] for event in self._of(name, "admitted", since_ns)][:1]
        return (min(firsts) - change.at_ns) / windows.NANOS_PER_SECOND if firsts else None

    def _grown_ns(self, name: str, change: Change) -> int | None:
        """When `name` first had more than its part of what one more active worker leaves."""
        old_count = change.active_workers + 1
        for event in self._of(name, "allocation", change.at_ns):
            for dimension, limit in board.DIMENSIONS.items():
                old = getattr(self._plan.limits, limit) / old_count
                if event["amounts"].get(dimension, 0.0) > old * GROWN_RATIO:
                    at_ns: int = event["mono_ns"]
                    return at_ns
        return None

    def shares_at(self, at_ns: int) -> dict[str, dict[windows.Limit, float]]:
        """The last share that each worker had been told by then; one that was told none has no entry."""
        shares = {}
        for name in plan.WORKERS:
            for event in self._of(name, "allocation", 0, at_ns):
                shares[name] = {
                    limit: event["amounts"].get(dimension, 0.0) for dimension, limit in board.DIMENSIONS.items()
                }
        return shares

    def failures(self) -> list[str]:
        """Requests that were neither answered nor broken off by the end of their worker."""
        return [
            f"{name} request {event['request']}: {event['error']}"
            for name in plan.WORKERS
            for event in self._of(name, "failed", 0, self._end_ns)
        ]

    def _of(self, name: str, kind: str, from_ns: int = 0, until_ns: int | None = None) -> list[Event]:
        until_ns = self._end_ns if until_ns is None else until_ns
        return [
            event
            for event in self._events.get(name, ())
            if event["event"] == kind and from_ns <= event["mono_ns"] < until_ns
        ]


def _without(names: Iterable[str], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def wrong_shares(
    shares: Mapping[str, Mapping[windows.Limit, float]],
    limits: windows.Limits,
    *,
    active: Sequence[str],
    idle: Sequence[str] = (),
) -> list[str]:
    """The shares that are not limit / N for each of the N `active` workers, and nothing for the `idle` ones."""
    wrong = []
    for name in (*active, *idle):
        for limit in windows.Limit:
            due = getattr(limits, limit) / len(active) if name in active else 0.0
            has = shares.get(name, {}).get(limit, 0.0)
            slack = due * SHARE_TOLERANCE + (1.0 if limit is windows.Limit.CONCURRENCY else 0.0)
            if abs(has - due) > slack:
                wrong.append(f"{name} has {has:,.0f} {limit}, not {due:,.0f}")
    return wrong
