"""Evidence and claims: timings from logs, and each broken promise named."""

import copy
import io
import json
from typing import Any

import pytest
from leasehold.demo import evidence, plan, report, scenes, windows
from leasehold.sim import auditor, traces
from rich import console

SECOND = windows.NANOS_PER_SECOND
MILLI = 1_000_000
WANTED = plan.make(traces.generate(rows=600, seed=11), seconds=160.0, window_seconds=20.0)
SCRIPT = WANTED.script
BEGIN_NS = 1000 * SECOND
Events = dict[str, list[dict[str, Any]]]


def at_ns(seconds: float) -> int:
    return BEGIN_NS + round(seconds * SECOND)


KILL_NS, END_NS = at_ns(SCRIPT.kill_seconds), at_ns(SCRIPT.end_seconds)


def allocation(instant_ns: int, active: int, *, part: float | None = None) -> dict[str, Any]:
    """A share of 1 / active of everything, or `part` of everything."""
    limits, part = WANTED.limits, 1 / active if part is None else part
    amounts = {
        "max_concurrent_requests": limits.concurrency * part,
        "rpm_limit": limits.requests * part,
        "tpm_limit": limits.tokens * part,
    }
    return {"mono_ns": instant_ns, "event": "allocation", "amounts": amounts, "active_workers": active}


def event(instant_ns: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"mono_ns": instant_ns, "event": kind, "request": 1, **fields}


def good_events() -> Events:
    """A run in which everything is known 10 ms after it happened and felt 100 ms after."""
    events: Events = {name: [] for name in plan.WORKERS}
    for count, (name, start_seconds) in enumerate(SCRIPT.starts_seconds.items(), start=1):
        joined_ns = at_ns(start_seconds)
        events[name].append(event(joined_ns, "join"))
        for member in plan.WORKERS[:count]:
            events[member].append(allocation(joined_ns + 10 * MILLI, count))
        events[name].append(event(joined_ns + 100 * MILLI, "admitted"))
    paused_ns, resumed_ns = at_ns(SCRIPT.idle_from_seconds), at_ns(SCRIPT.idle_until_seconds)
    timed_out_ns = paused_ns + SECOND + round(WANTED.activity_timeout_seconds * SECOND)
    idle = events[plan.IDLE_WORKER]
    idle += [event(paused_ns, "idle"), event(paused_ns + SECOND, "admitted")]
    idle += [event(paused_ns + 2 * SECOND, "done"), allocation(timed_out_ns + 5 * MILLI, 3, part=0.0)]
    idle += [event(resumed_ns, "resume"), event(resumed_ns + 100 * MILLI, "admitted")]
    for name in plan.WORKERS:
        if name != plan.IDLE_WORKER:
            events[name] += [allocation(timed_out_ns + 10 * MILLI, 3)]
            events[name] += [event(timed_out_ns + 100 * MILLI, "admitted")]
        events[name].append(allocation(resumed_ns + 10 * MILLI, 4))
        if name != plan.KILLED_WORKER:
            events[name] += [allocation(KILL_NS + 10 * MILLI, 3), event(KILL_NS + 100 * MILLI, "admitted")]
    for of_worker in events.values():
        of_worker.sort(key=lambda event: event["mono_ns"])
    return events


def verdict(done: int, *, rejected: bool = False) -> auditor.Verdict:
    limits = {"requests": 264, "tokens": 10_000, "concurrency": 40, "window_seconds": 20.0}
    lines: list[dict[str, Any]] = [{"mono_ns": BEGIN_NS, "event": "start", "limits": limits}]
    for number in range(done):
        fields = {"mono_ns": BEGIN_NS + number, "request": f"r{number}"}
        lines.append({**fields, "event": "arrive", "worker": "worker-a", "reserved_tokens": 1})
        lines += [{**fields, "event": "admit"}, {**fields, "event": "settle", "tokens": 1}]
    if rejected:
        fields = {"mono_ns": BEGIN_NS + done, "request": "r"}
        lines.append({**fields, "event": "arrive", "worker": "worker-a", "reserved_tokens": 1})
        lines.append({**fields, "event": "reject"})
    lines.append({"mono_ns": END_NS, "event": "stop"})
    return auditor.audit_lines(json.dumps(line) for line in lines)


def outcome(events: Events, **changed: Any) -> report.Outcome:
    fields: dict[str, Any] = {
        "wanted": WANTED,
        "played": scenes.Played(BEGIN_NS, KILL_NS, END_NS),
        "leased": verdict(5),
        "static": verdict(3),
        "story": evidence.Story(events, WANTED, kill_ns=KILL_NS, end_ns=END_NS),
    }
    return report.Outcome(**(fields | changed))


def broken(found: report.Outcome) -> list[str]:
    return [claim.name for claim in report.claims(found) if not claim.is_upheld]


def without(events: Events, name: str, kind: str, from_ns: int, until_ns: int) -> Events:
    changed = copy.deepcopy(events)
    changed[name] = [e for e in events[name] if not (e["event"] == kind and from_ns <= e["mono_ns"] < until_ns)]
    return changed


def test_good_run_upholds_every_claim() -> None:
    assert broken(outcome(good_events())) == []


def test_timings_are_from_the_change_to_the_last_witness_and_to_the_first_admission() -> None:
    timings = outcome(good_events()).story.timings()

    assert [timing.change.kind for timing in timings] == ["join"] * 4 + ["idle", "return", "death"]
    assert [timing.known_seconds for timing in timings] == [pytest.approx(0.010)] * 7
    assert [timing.first_unit_seconds for timing in timings] == [pytest.approx(0.100)] * 7


def test_idle_counts_from_the_end_of_a_call_that_outlasts_the_timeout() -> None:
    events = good_events()
    ended_ns = at_ns(SCRIPT.idle_from_seconds) + 12 * SECOND
    events[plan.IDLE_WORKER].append(event(ended_ns, "done"))

    idle = next(t for t in outcome(events).story.timings() if t.change.kind == "idle")

    assert idle.change.at_ns == ended_ns


def test_worker_that_never_hears_of_a_join_is_found() -> None:
    joined_ns = at_ns(SCRIPT.starts_seconds["worker-b"])
    events = without(good_events(), "worker-a", "allocation", joined_ns, joined_ns + SECOND)

    assert broken(outcome(events)) == ["worker-b joins: shares known within 2 s, and then of use"]


def test_late_news_of_a_death_are_found() -> None:
    events = good_events()
    for name in ("worker-a", "worker-b", "worker-c"):
        for entry in events[name]:
            if entry["mono_ns"] >= KILL_NS:
                entry["mono_ns"] += 5 * SECOND

    assert broken(outcome(events)) == ["worker-d is killed: shares known within 2 s, and then of use"]


def test_joiner_that_never_gets_a_unit_is_found() -> None:
    events = without(good_events(), "worker-d", "admitted", 0, END_NS)

    assert broken(outcome(events)) == ["worker-d joins: shares known within 2 s, and then of use"]


def test_idle_worker_that_keeps_its_share_is_found() -> None:
    idle_ns = at_ns(SCRIPT.idle_from_seconds)
    events = without(good_events(), plan.IDLE_WORKER, "allocation", idle_ns, at_ns(SCRIPT.idle_until_seconds))

    assert broken(outcome(events)) == ["the idle one has nothing, the others a third"]


def test_share_that_does_not_settle_is_found_and_told() -> None:
    events = good_events()
    events["worker-b"].append(allocation(END_NS - SECOND, 3, part=0.25))

    claims = [claim for claim in report.claims(outcome(events)) if not claim.is_upheld]

    assert [claim.name for claim in claims] == ["after the kill each survivor has a third"]
    assert claims[0].detail.startswith("worker-b has 66 requests, not 88; worker-b has ")


def test_worker_that_never_started_breaks_its_claims_and_nothing_raises() -> None:
    events = good_events()
    events["worker-d"] = []

    names = broken(outcome(events))

    assert "each of four has a quarter" in names


def test_failed_call_is_found_unless_the_play_was_over() -> None:
    events = good_events()
    events["worker-a"].append(event(END_NS + 1, "failed", error="broken off"))
    assert broken(outcome(events)) == []

    events["worker-a"].append(event(END_NS - 1, "failed", error="refused"))
    assert broken(outcome(events)) == ["no call failed"]


def test_429s_and_a_static_split_that_did_as_much_are_found() -> None:
    events = good_events()

    assert broken(outcome(events, leased=verdict(5, rejected=True))) == ["no request was answered 429"]
    assert broken(outcome(events, static=verdict(5))) == ["leasing did more than the static split"]
    assert broken(outcome(events, static=verdict(3, rejected=True))) == [
        "static split: no request was answered 429"
    ]


def test_table_shows_counts_peaks_and_times() -> None:
    output = io.StringIO()

    console.Console(file=output, width=100).print(report.results(outcome(good_events())))

    lines = {tuple(line.split()) for line in output.getvalue().splitlines()}
    assert ("requests", "done", "5", "3") in lines
    assert ("answered", "429", "0", "0") in lines
    assert any(line[:2] == ("highest", "requests") and "(1.9%)" in line for line in lines)
    assert ("from", "a", "death", "to", "new", "shares", "10", "ms", "never") in lines
    assert ("to", "the", "first", "spendable", "unit", "100", "ms", "-") in lines
