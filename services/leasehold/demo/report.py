"""The end of the demo: a table of both fleets, and the claims that must hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from leasehold.demo import evidence, plan, scenes, windows
from leasehold.sim import auditor
from rich import box, table

#: New shares must be known within this of a join, a pause, a return or a certified death.
KNOWN_SECONDS_MAX = 2.0

KINDS = {
    "join": "a join",
    "idle": "an activity timeout",
    "return": "a return from idle",
    "death": "a death",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run has shown."""

    wanted: plan.Plan
    played: scenes.Played
    leased: auditor.Verdict
    static: auditor.Verdict
    story: evidence.Story


def claims(outcome: Outcome) -> list[auditor.Claim]:
    """Every claim about the run: the auditor's on the leased fleet, those on shares, and the comparison."""
    failures = outcome.story.failures()
    found = [
        *outcome.leased.claims,
        *_share_claims(outcome),
        *_timing_claims(outcome.story.timings()),
        auditor.Claim("no call failed", not failures, "; ".join(failures[:5]) or "none did"),
        auditor.Claim(
            "leasing did more than the static split",
            outcome.leased.requests_done > outcome.static.requests_done,
            f"{outcome.leased.requests_done} against {outcome.static.requests_done} requests",
        ),
    ]
    # A comparison with a split that itself broke the limits would be worth nothing.
    found += [
        auditor.Claim(f"static split: {claim.name}", claim.is_upheld, claim.detail)
        for claim in outcome.static.claims
    ]
    return found


def _share_claims(outcome: Outcome) -> Iterator[auditor.Claim]:
    script, begin_ns = outcome.wanted.script, outcome.played.begin_ns
    others = tuple(name for name in plan.WORKERS if name != plan.IDLE_WORKER)
    survivors = tuple(name for name in plan.WORKERS if name != plan.KILLED_WORKER)
    cases: list[tuple[str, float, tuple[str, ...], tuple[str, ...]]] = [
        ("one worker alone has all of it", script.starts_seconds[plan.WORKERS[1]], plan.WORKERS[:1], ()),
        ("each of four has a quarter", script.idle_from_seconds, plan.WORKERS, ()),
        (
            "the idle one has nothing, the others a third",
            script.idle_until_seconds,
            others,
            (plan.IDLE_WORKER,),
        ),
        ("after the kill each survivor has a third", script.end_seconds, survivors, ()),
    ]
    for name, at_seconds, active, idle in cases:
        shares = outcome.story.shares_at(begin_ns + round(at_seconds * windows.NANOS_PER_SECOND))
        wrong = evidence.wrong_shares(shares, outcome.wanted.limits, active=active, idle=idle)
        yield auditor.Claim(name, not wrong, "; ".join(wrong) or f"within {evidence.SHARE_TOLERANCE:.0%}")


def _timing_claims(timings: list[evidence.Timing]) -> Iterator[auditor.Claim]:
    for timing in timings:
        known, first = timing.known_seconds, timing.first_unit_seconds
        yield auditor.Claim(
            f"{timing.change.name}: shares known within {KNOWN_SECONDS_MAX:g} s, and then of use",
            known is not None and known <= KNOWN_SECONDS_MAX and first is not None,
            f"known {_seconds_text(known)}, first unit {_seconds_text(first)}",
        )


def results(outcome: Outcome) -> table.Table:
    """The comparison."""
    limits = outcome.wanted.limits
    drawn = table.Table(box=box.SIMPLE_HEAD, title="the same trace, the same limits, at the same time")
    drawn.add_column("")
    drawn.add_column("leased", justify="right")
    drawn.add_column("static split, 1/4 each", justify="right")
    both = (outcome.leased, outcome.static)
    drawn.add_row("requests done", *(f"{verdict.requests_done:,}" for verdict in both))
    for scene in outcome.wanted.script.scenes:
        counts = (f"{_done_in(verdict, scene, outcome.played):,}" for verdict in both)
        drawn.add_row(f"  {scene.name}", *counts)
    drawn.add_row("tokens done", *(f"{verdict.tokens_done:,}" for verdict in both))
    drawn.add_row("answered 429", *(str(verdict.rejected) for verdict in both))
    for name in auditor.DIMENSIONS:
        per = "at a time" if name == "concurrency" else f"in any {limits.window_seconds:g} s"
        drawn.add_row(f"highest {name} {per}", *(_peak_text(verdict.peaks, name) for verdict in both))
    timings = outcome.story.timings()
    for kind, words in KINDS.items():
        of_kind = [timing for timing in timings if timing.change.kind == kind]
        drawn.add_row(f"from {words} to new shares", _worst(t.known_seconds for t in of_kind), "never")
        drawn.add_row("  to the first spendable unit", _worst(t.first_unit_seconds for t in of_kind), "-")
    return drawn


def _done_in(verdict: auditor.Verdict, scene: plan.Scene, played: scenes.Played) -> int:
    begin_ns = played.begin_ns + round(scene.start_seconds * windows.NANOS_PER_SECOND)
    end_ns = played.begin_ns + round(scene.end_seconds * windows.NANOS_PER_SECOND)
    is_last = scene.name is plan.SceneName.KILLED
    return sum(
        record.is_done
        and record.ended_ns is not None
        and begin_ns <= record.ended_ns
        and (is_last or record.ended_ns < end_ns)
        for record in verdict.records
    )


def _peak_text(peaks: Mapping[str, auditor.Peak], name: str) -> str:
    peak = peaks.get(name)
    return "-" if peak is None else f"{peak.highest:,.0f} of {peak.limit:,.0f} ({peak.ratio:.1%})"


def _worst(seconds: Iterator[float | None]) -> str:
    """The longest; "never" if one never came."""
    values = list(seconds)
    if not values or None in values:
        return "never"
    return _seconds_text(max(value for value in values if value is not None))


def _seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def verdict_lines(found: list[auditor.Claim]) -> list[str]:
    """A line for each claim."""
    return [f"{'ok    ' if claim.is_upheld else 'BROKEN'}  {claim.name}: {claim.detail}" for claim in found]
