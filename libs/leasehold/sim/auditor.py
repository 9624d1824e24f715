"""An independent verdict on what a provider's clients did, from the provider's own log alone.

It shares no code with what it judges: it reads the log (JSON lines, described where the demo's provider writes
it), sorts every change of every sum by time and adds them up, at every position that a window can take. An
amount counted at t is in every window (end - W, end] with t <= end < t + W.

- requests: 1 from arrival until W later
- tokens: the reserved amount from arrival, the actual one from the settlement on, until W after arrival
- concurrency: 1 from admission to settlement or disconnect

A request that the provider rejected counts at its instant only, on top of what was in use: a rejection shows as
use above the limit although nothing was let in.

`python -m leasehold.sim.auditor LOG` prints the verdict as JSON; the exit code is 1 if a claim is broken.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

DIMENSIONS = ("requests", "tokens", "concurrency")
FAULTS_SHOWN_MAX = 5
_NANOS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that must hold, and whether it did."""

    name: str
    is_upheld: bool
    #: The figures behind it, for people.
    detail: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest use of one limit at any window position."""

    limit: float
    highest: float
    #: CLOCK_MONOTONIC nanoseconds of the first instant at which it was reached; None if never in use.
    at_ns: int | None

    @property
    def ratio(self) -> float:
        """Highest use / limit."""
        return self.highest / self.limit


@dataclass(slots=True)
class RequestRecord:
    """What the log tells of one request."""

    request: str
    worker: str
    arrived_ns: int
    arrived_line: int
    reserved_tokens: int
    is_admitted: bool = False
    is_rejected: bool = False
    #: Settled or disconnected.
    ended_ns: int | None = None
    ended_line: int = 0
    #: Actual tokens; None unless it was settled.
    tokens: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether it was answered in full."""
        return self.tokens is not None


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """What one worker did."""

    requests_done: int
    tokens_done: int
    rejected: int
    disconnected: int
    #: Most requests of this worker at one time.
    concurrency_highest: int
    #: Requests done / seconds from its first arrival to its last end; 0 if there is no such span.
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on one log."""

    claims: tuple[Claim, ...]
    peaks: dict[str, Peak]
    window_seconds: float
    requests_done: int
    tokens_done: int
    rejected: int
    disconnected: int
    workers: dict[str, WorkerSummary]
    #: Every request of the log, in the order of arrival.
    records: tuple[RequestRecord, ...]

    @property
    def broken(self) -> tuple[Claim, ...]:
        """The claims that did not hold."""
        return tuple(claim for claim in self.claims if not claim.is_upheld)


@dataclass(slots=True)
class _Log:
    """A log as far as it can be understood; what cannot is a fault."""

    limits: dict[str, float] = field(default_factory=dict)
    window_seconds: float = 0.0
    records: dict[str, RequestRecord] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    last_ns: int = 0
    is_started: bool = False
    is_stopped: bool = False


def audit(path: pathlib.Path) -> Verdict:
    """The verdict on the log at `path`. A log that is not there or not readable is a broken claim."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return _judge(_Log(faults=[f"{path} cannot be read: {error.strerror}"]))
    lines = data.decode(errors="replace").split("\n")
    log = _read(lines[:-1])
    if lines[-1]:
        log.faults.append(f"line {len(lines)}: is cut off")
    return _judge(log)


def audit_lines(lines: Iterable[str]) -> Verdict:
    """As `audit`, from lines without their newlines."""
    return _judge(_read(lines))


def _read(lines: Iterable[str]) -> _Log:
    log = _Log()
    for number, line in enumerate(lines, start=1):
        try:
            _take(log, json.loads(line), number)
        except (KeyError, TypeError, ValueError) as error:
            log.faults.append(f"line {number}: {_told(error)}")
    if not log.is_started:
        log.faults.append("there is no start line")
    if not log.is_stopped:
        log.faults.append("there is no stop line: the provider did not end in order")
    for record in log.records.values():
        if not record.is_admitted and not record.is_rejected:
            log.faults.append(f"{record.request}: was neither admitted nor rejected")
        elif record.is_admitted and record.ended_ns is None:
            log.faults.append(f"{record.request}: was neither settled nor disconnected")
    return log


def _told(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _take(log: _Log, event: dict[str, Any], line: int) -> None:
    """Adds one event to `log`; raises ValueError, KeyError or TypeError if it cannot be so."""
    if not isinstance(event, dict):
        raise ValueError("is not an object")
    kind, at_ns = event["event"], _whole(event["mono_ns"], "mono_ns")
    if at_ns < log.last_ns:
        raise ValueError("time goes back")
    log.last_ns = at_ns
    if kind == "start":
        _take_start(log, event)
        return
    if not log.is_started or log.is_stopped:
        raise ValueError(f"{kind} before start or after stop")
    if kind == "stop":
        log.is_stopped = True
    elif kind == "arrive":
        _take_arrival(log, event, at_ns, line)
    else:
        _take_step(log.records[event["request"]], kind, event, at_ns, line)


def _take_start(log: _Log, event: dict[str, Any]) -> None:
    if log.is_started:
        raise ValueError("start a second time")
    limits = {name: float(event["limits"][name]) for name in DIMENSIONS}
    window_seconds = float(event["limits"]["window_seconds"])
    if not all(math.isfinite(value) and value > 0 for value in (*limits.values(), window_seconds)):
        raise ValueError("a limit is not above 0")
    log.limits, log.window_seconds, log.is_started = limits, window_seconds, True


def _take_arrival(log: _Log, event: dict[str, Any], at_ns: int, line: int) -> None:
    request = str(event["request"])
    if request in log.records:
        raise ValueError(f"{request} arrives a second time")
    reserved = _whole(event["reserved_tokens"], "reserved_tokens")
    log.records[request] = RequestRecord(request, str(event["worker"]), at_ns, line, reserved)


def _take_step(record: RequestRecord, kind: str, event: dict[str, Any], at_ns: int, line: int) -> None:
    is_decided = record.is_admitted or record.is_rejected
    is_running = record.is_admitted and record.ended_ns is None
    if kind == "admit" and not is_decided and at_ns == record.arrived_ns:
        record.is_admitted = True
    elif kind == "reject" and not is_decided:
        record.is_rejected = True
    elif kind == "settle" and is_running:
        record.tokens = _whole(event["tokens"], "tokens")
        record.ended_ns, record.ended_line = at_ns, line
    elif kind == "disconnect" and is_running:
        record.ended_ns, record.ended_line = at_ns, line
    else:
        raise ValueError(f"{kind} of {record.request} is out of order")


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is not a whole number of 0 or more")
    return value


@dataclass(frozen=True, slots=True, order=True)
class _Change:
    """One change of one sum. Sorted by time; at one instant what leaves a window goes first, then by line."""

    at_ns: int
    line: int
    delta: int


_LEAVES_WINDOW = 0


def _request_changes(records: Iterable[RequestRecord], window_ns: int) -> list[_Change]:
    changes = []
    for record in records:
        changes.append(_Change(record.arrived_ns, record.arrived_line, 1))
        changes.append(_leaving(record, 1, window_ns))
    return changes


def _token_changes(records: Iterable[RequestRecord], window_ns: int) -> list[_Change]:
    changes = []
    for record in records:
        counted = record.reserved_tokens
        changes.append(_Change(record.arrived_ns, record.arrived_line, counted))
        is_corrected = record.ended_ns is not None and record.ended_ns < record.arrived_ns + window_ns
        if record.tokens is not None and record.ended_ns is not None and is_corrected:
            changes.append(_Change(record.ended_ns, record.ended_line, record.tokens - counted))
            counted = record.tokens
        changes.append(_leaving(record, counted, window_ns))
    return changes


def _leaving(record: RequestRecord, amount: int, window_ns: int) -> _Change:
    if record.is_rejected:
        return _Change(record.arrived_ns, record.arrived_line, -amount)
    return _Change(record.arrived_ns + window_ns, _LEAVES_WINDOW, -amount)


def _overlap_changes(records: Iterable[RequestRecord]) -> list[_Change]:
    changes = []
    for record in records:
        changes.append(_Change(record.arrived_ns, record.arrived_line, 1))
        if record.is_rejected:
            changes.append(_Change(record.arrived_ns, record.arrived_line, -1))
        elif record.ended_ns is not None:
            changes.append(_Change(record.ended_ns, record.ended_line, -1))
    return changes


def _peak(changes: Iterable[_Change], limit: float) -> Peak:
    total = highest = 0
    at_ns = None
    # A stable sort by place alone: of one line's two changes the increase comes first, as it was made first.
    for change in sorted(changes, key=lambda change: (change.at_ns, change.line)):
        total += change.delta
        if total > highest:
            highest, at_ns = total, change.at_ns
    return Peak(limit, highest, at_ns)


def _judge(log: _Log) -> Verdict:
    records = tuple(log.records.values())
    window_ns = round(log.window_seconds * _NANOS)
    peaks: dict[str, Peak] = {}
    if log.is_started:
        peaks = {
            "requests": _peak(_request_changes(records, window_ns), log.limits["requests"]),
            "tokens": _peak(_token_changes(records, window_ns), log.limits["tokens"]),
            "concurrency": _peak(_overlap_changes(records), log.limits["concurrency"]),
        }
    rejected = sum(record.is_rejected for record in records)
    workers = sorted({record.worker for record in records})
    return Verdict(
        claims=(_log_claim(log), *_limit_claims(peaks, log.window_seconds), _rejects_claim(records, rejected)),
        peaks=peaks,
        window_seconds=log.window_seconds,
        requests_done=sum(record.is_done for record in records),
        tokens_done=sum(record.tokens or 0 for record in records),
        rejected=rejected,
        disconnected=sum(record.ended_ns is not None and not record.is_done for record in records),
        workers={name: _summary([record for record in records if record.worker == name]) for name in workers},
        records=records,
    )


def _log_claim(log: _Log) -> Claim:
    detail = f"{len(log.records)} requests, every one with its end"
    if log.faults:
        more = len(log.faults) - FAULTS_SHOWN_MAX
        detail = "; ".join(log.faults[:FAULTS_SHOWN_MAX]) + (f"; and {more} more" if more > 0 else "")
    return Claim("the provider's log is whole and in order", not log.faults, detail)


def _limit_claims(peaks: dict[str, Peak], window_seconds: float) -> list[Claim]:
    return [
        Claim(
            f"{name} never above the limit"
            + ("" if name == "concurrency" else f" in any window of {window_seconds:g} s"),
            peak.highest <= peak.limit,
            f"highest {peak.highest:g} of {peak.limit:g} ({peak.ratio:.1%})",
        )
        for name, peak in peaks.items()
    ]


def _rejects_claim(records: Sequence[RequestRecord], rejected: int) -> Claim:
    return Claim("no request was answered 429", rejected == 0, f"{rejected} of {len(records)} requests")


def _summary(records: Sequence[RequestRecord]) -> WorkerSummary:
    done = sum(record.is_done for record in records)
    ends = [record.ended_ns for record in records if record.ended_ns is not None]
    span_seconds = (max(ends) - records[0].arrived_ns) / _NANOS if ends else 0.0
    return WorkerSummary(
        requests_done=done,
        tokens_done=sum(record.tokens or 0 for record in records),
        rejected=sum(record.is_rejected for record in records),
        disconnected=len(ends) - done,
        concurrency_highest=int(_peak(_overlap_changes(records), math.inf).highest),
        requests_per_second=done / span_seconds if span_seconds > 0 else 0.0,
    )


def as_fields(verdict: Verdict) -> dict[str, Any]:
    """The verdict for programs, without the single requests."""
    return {
        "claims": [dataclasses.asdict(claim) for claim in verdict.claims],
        "peaks": {name: dataclasses.asdict(peak) for name, peak in verdict.peaks.items()},
        "window_seconds": verdict.window_seconds,
        "requests_done": verdict.requests_done,
        "tokens_done": verdict.tokens_done,
        "rejected": verdict.rejected,
        "disconnected": verdict.disconnected,
        "workers": {name: dataclasses.asdict(summary) for name, summary in verdict.workers.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the verdict on one log; 0 if every claim holds, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m leasehold.sim.auditor", description="Judge a provider's log."
    )
    parser.add_argument("log", type=pathlib.Path)
    verdict = audit(parser.parse_args(arguments).log)
    sys.stdout.write(json.dumps(as_fields(verdict), indent=2) + "\n")
    return 1 if verdict.broken else 0


if __name__ == "__main__":
    sys.exit(main())
