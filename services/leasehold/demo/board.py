"""The state of the play as its logs tell it so far."""

import collections
import enum
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leasehold.demo import journal, plan, windows

#: Dimension of a budget, and the provider's limit that it stands for.
DIMENSIONS: Mapping[str, windows.Limit] = {
    "max_concurrent_requests": windows.Limit.CONCURRENCY,
    "rpm_limit": windows.Limit.REQUESTS,
    "tpm_limit": windows.Limit.TOKENS,
}
#: A change of a share is told if it is above this part of the whole limit.
TOLD_RATIO = 0.1
MESSAGES_KEPT = 6


class WorkerState(enum.StrEnum):
    """What a worker is doing."""

    ABSENT = "to come"
    STARTING = "starting"
    WORKING = "working"
    PAUSED = "paused"
    KILLED = "killed"
    LEFT = "left"


_STATES = {
    "join": WorkerState.STARTING,
    "connected": WorkerState.WORKING,
    "idle": WorkerState.PAUSED,
    "resume": WorkerState.WORKING,
    "leave": WorkerState.LEFT,
}


@dataclass(slots=True)
class WorkerRow:
    """One worker, as far as its log has been read."""

    name: str
    state: WorkerState = WorkerState.ABSENT
    #: Amounts by the provider's limit.
    share: dict[windows.Limit, float] = field(default_factory=dict)
    active_workers: int = 0
    in_flight: int = 0
    done: int = 0
    throttled: int = 0
    told_share: dict[windows.Limit, float] = field(default_factory=dict)
    told_active_workers: int = 0


class FleetBoard:
    """The workers of one fleet and the use of their provider's limits."""

    def __init__(self, title: str, limits: windows.Limits, logs: "Logs", workers: Sequence[str]) -> None:
        self.title = title
        self.limits = limits
        self.rows = {name: WorkerRow(name) for name in workers}
        self._worker_tails = {name: journal.Tail(logs.worker(name)) for name in workers}
        self._provider_tail = journal.Tail(logs.provider)
        self._requests = windows.SlidingWindow(limits.requests, limits.window_ns)
        self._tokens = windows.SlidingWindow(limits.tokens, limits.window_ns)
        self._charges: dict[str, windows.Charge] = {}
        self.rejected = 0

    @property
    def done(self) -> int:
        """Requests answered so far."""
        return sum(row.done for row in self.rows.values())

    def use(self, now_ns: int) -> windows.Use:
        """Of the provider's limits, now."""
        return windows.Use(self._requests.used(now_ns), self._tokens.used(now_ns), len(self._charges))

    def killed(self, name: str) -> None:
        """A worker that can no longer say so itself."""
        row = self.rows[name]
        row.state, row.in_flight, row.share = WorkerState.KILLED, 0, {}

    def update(self) -> Iterator[str]:
        """Reads what is new; yields a message for each change that a person would want to see."""
        for event in self._provider_tail.new_events():
            self._take_provider_event(event)
        for name, tail in self._worker_tails.items():
            row = self.rows[name]
            for event in tail.new_events():
                if row.state is not WorkerState.KILLED:
                    yield from self._take_worker_event(row, event)

    def _take_provider_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "arrive":
                charge = windows.Charge(event["mono_ns"], event["reserved_tokens"])
                self._charges[event["request"]] = charge
            case "admit":
                charge = self._charges[event["request"]]
                self._requests.add(charge.at_ns, 1)
                self._charges[event["request"]] = self._tokens.add(charge.at_ns, charge.amount)
            case "settle":
                self._tokens.correct(self._charges.pop(event["request"]), event["tokens"])
            case "disconnect":
                del self._charges[event["request"]]
            case "reject":
                del self._charges[event["request"]]
                self.rejected += 1

    def _take_worker_event(self, row: WorkerRow, event: Mapping[str, Any]) -> Iterator[str]:
        kind = event["event"]
        if kind in _STATES:
            row.state = _STATES[kind]
            if kind in ("join", "idle", "resume"):
                yield f"{row.name} {_SAID[kind]}"
        elif kind == "admitted":
            row.in_flight += 1
        elif kind in ("done", "throttled", "failed"):
            row.in_flight = max(0, row.in_flight - 1)
            row.done += kind == "done"
            row.throttled += kind == "throttled"
            if kind != "done":
                yield f"{row.name} request {event['request']} {kind}: {event.get('error', 'answered 429')}"
        elif kind == "allocation":
            yield from self._take_allocation(row, event)

    def _take_allocation(self, row: WorkerRow, event: Mapping[str, Any]) -> Iterator[str]:
        row.share = {limit: event["amounts"].get(name, 0.0) for name, limit in DIMENSIONS.items()}
        row.active_workers = event["active_workers"]
        is_news = row.active_workers != row.told_active_workers or any(
            abs(amount - row.told_share.get(limit, 0.0)) > TOLD_RATIO * getattr(self.limits, limit)
            for limit, amount in row.share.items()
        )
        if is_news:
            row.told_share, row.told_active_workers = dict(row.share), row.active_workers
            yield (
                f"{row.name} has {share_text(row.share)} ({event['active_workers']} of "
                f"{event['total_workers']} workers active)"
            )


_SAID = {"join": "joins", "idle": "pauses", "resume": "comes back"}


def share_text(share: Mapping[windows.Limit, float]) -> str:
    """A share in words."""
    concurrency = share.get(windows.Limit.CONCURRENCY, 0.0)
    requests = share.get(windows.Limit.REQUESTS, 0.0)
    tokens = share.get(windows.Limit.TOKENS, 0.0)
    return f"{concurrency:.0f} concurrent, {requests:.0f} requests, {tokens:,.0f} tokens"


@dataclass(frozen=True, slots=True)
class Logs:
    """Where a fleet's logs are."""

    folder: pathlib.Path
    fleet: str

    @property
    def provider(self) -> pathlib.Path:
        """The provider's log."""
        return self.folder / f"{self.fleet}-provider.jsonl"

    def worker(self, name: str) -> pathlib.Path:
        """One worker's log."""
        return self.folder / f"{self.fleet}-{name}.jsonl"


class Board:
    """Both fleets and the last messages about the leased one."""

    def __init__(self, leased: FleetBoard, static: FleetBoard, script: plan.Script) -> None:
        self.leased = leased
        self.static = static
        self.script = script
        self.elapsed_seconds = 0.0
        self.messages: collections.deque[str] = collections.deque(maxlen=MESSAGES_KEPT)

    def update(self, elapsed_seconds: float) -> list[str]:
        """Reads what is new in all logs; returns the new messages."""
        self.elapsed_seconds = elapsed_seconds
        messages = list(self.leased.update())
        # A fixed share has no news; its failures are in its log and in the verdict.
        collections.deque(self.static.update(), maxlen=0)
        self.messages.extend(messages)
        return messages
