"""The auditor finds each kind of violation in a log, at the exact boundary of the window."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from leasehold.sim import auditor

REQUESTS_CLAIM = "requests never above the limit in any window of 60 s"
SECOND = 1_000_000_000


class Log:
    """Writes a provider's log line by line."""

    def __init__(
        self, *, requests: int = 10, tokens: int = 10_000, concurrency: int = 10, window: float = 60.0
    ):
        limits = {"requests": requests, "tokens": tokens, "concurrency": concurrency, "window_seconds": window}
        self.lines: list[str] = []
        self.add("start", 0, limits=limits)

    def add(self, event: str, at_ns: int, **fields: Any) -> None:
        self.lines.append(json.dumps({"mono_ns": at_ns, "event": event, **fields}))

    def admit(self, request: str, at_ns: int, *, tokens: int = 1, worker: str = "a") -> None:
        self.add("arrive", at_ns, request=request, worker=worker, reserved_tokens=tokens)
        self.add("admit", at_ns, request=request)

    def settle(self, request: str, at_ns: int, *, tokens: int = 1) -> None:
        self.add("settle", at_ns, request=request, tokens=tokens)

    def verdict(self, *, stop_ns: int = 10_000 * SECOND) -> auditor.Verdict:
        self.add("stop", stop_ns)
        return auditor.audit_lines(self.lines)


def broken(verdict: auditor.Verdict) -> list[str]:
    return [claim.name for claim in verdict.broken]


def test_log_within_its_limits_upholds_every_claim_and_is_counted() -> None:
    log = Log(requests=2, tokens=100, concurrency=2)
    log.admit("r1", 0, tokens=60, worker="a")
    log.admit("r2", SECOND, tokens=40, worker="b")
    log.settle("r1", 2 * SECOND, tokens=30)
    log.add("disconnect", 3 * SECOND, request="r2")

    verdict = log.verdict()

    assert verdict.broken == ()
    assert {name: peak.highest for name, peak in verdict.peaks.items()} == {
        "requests": 2,
        "tokens": 100,
        "concurrency": 2,
    }
    assert verdict.peaks["tokens"].at_ns == SECOND
    assert (verdict.requests_done, verdict.tokens_done, verdict.disconnected, verdict.rejected) == (1, 30, 1, 0)
    assert verdict.workers["a"] == auditor.WorkerSummary(1, 30, 0, 0, 1, 0.5)
    assert verdict.workers["b"].disconnected == 1


def test_request_one_nanosecond_inside_the_window_is_found_and_at_its_end_is_not() -> None:
    for gap_ns, highest in [(60 * SECOND - 1, 2), (60 * SECOND, 1)]:
        log = Log(requests=1)
        log.admit("r1", 7)
        log.settle("r1", 8)
        log.admit("r2", 7 + gap_ns)
        log.settle("r2", 8 + gap_ns)

        verdict = log.verdict()

        assert verdict.peaks["requests"].highest == highest
        assert broken(verdict) == (
            ["requests never above the limit in any window of 60 s"] if highest == 2 else []
        )


def test_burst_astride_two_minutes_is_found() -> None:
    log = Log(requests=10)
    for number in range(20):
        at_ns = (55 if number < 10 else 65) * SECOND + number
        log.admit(f"r{number}", at_ns)
        log.settle(f"r{number}", at_ns)

    assert log.verdict().peaks["requests"].highest == 20


def test_reserved_tokens_count_until_they_are_corrected() -> None:
    log = Log(tokens=100)
    log.admit("r1", 0, tokens=80)
    log.admit("r2", SECOND, tokens=30)
    log.settle("r1", 2 * SECOND, tokens=10)
    log.settle("r2", 2 * SECOND, tokens=30)

    verdict = log.verdict()

    assert verdict.peaks["tokens"].highest == 110
    assert broken(verdict) == ["tokens never above the limit in any window of 60 s"]


def test_correction_gives_room_in_the_same_window() -> None:
    log = Log(tokens=100)
    log.admit("r1", 0, tokens=80)
    log.settle("r1", SECOND, tokens=10)
    log.admit("r2", 2 * SECOND, tokens=90)
    log.settle("r2", 3 * SECOND, tokens=90)

    assert log.verdict().peaks["tokens"].highest == 100


def test_correction_upwards_past_the_limit_is_found() -> None:
    log = Log(tokens=100)
    log.admit("r1", 0, tokens=100)
    log.settle("r1", SECOND, tokens=101)

    assert log.verdict().peaks["tokens"].highest == 101


def test_correction_after_the_request_left_the_window_changes_nothing() -> None:
    log = Log(tokens=100, window=1.0)
    log.admit("r1", 0, tokens=100)
    log.admit("r2", SECOND, tokens=100)
    log.settle("r1", SECOND, tokens=5000)
    log.settle("r2", SECOND + 1, tokens=100)

    assert log.verdict().peaks["tokens"].highest == 100


def test_overlap_above_the_concurrency_is_found_and_back_to_back_is_not_one() -> None:
    for second_start_ns, highest in [(SECOND, 1), (SECOND - 1, 2)]:
        log = Log(concurrency=1)
        log.admit("r1", 0)
        if second_start_ns == SECOND:
            log.settle("r1", SECOND)
            log.admit("r2", SECOND)
        else:
            log.admit("r2", second_start_ns)
            log.settle("r1", SECOND)
        log.settle("r2", 2 * SECOND)

        assert log.verdict().peaks["concurrency"].highest == highest


def test_rejection_breaks_its_claim_and_shows_as_use_above_the_limit() -> None:
    log = Log(requests=1)
    log.admit("r1", 0)
    log.add("arrive", 5, request="r2", worker="b", reserved_tokens=1)
    log.add("reject", 5, request="r2", limit="requests", retry_after_seconds=60.0)
    log.settle("r1", 6)
    log.admit("r3", 60 * SECOND)
    log.settle("r3", 60 * SECOND)

    verdict = log.verdict()

    assert broken(verdict) == [
        REQUESTS_CLAIM,
        "no request was answered 429",
    ]
    assert verdict.peaks["requests"] == auditor.Peak(1.0, 2, 5)
    assert verdict.workers["b"].rejected == 1


def settle_twice(log: Log) -> None:
    log.settle("r1", 2)
    log.settle("r1", 3)


def admit_again(log: Log) -> None:
    log.settle("r1", 2)
    log.admit("r1", 3)


def go_back(log: Log) -> None:
    log.settle("r1", 0)


def settle_a_stranger(log: Log) -> None:
    log.settle("r1", 2)
    log.settle("r9", 3)


def start_again(log: Log) -> None:
    log.settle("r1", 2)
    log.lines.append(log.lines[0].replace('"mono_ns": 0', '"mono_ns": 3'))


def garble(log: Log) -> None:
    log.settle("r1", 2)
    log.lines.append("{")


def negative_tokens(log: Log) -> None:
    log.settle("r1", 2, tokens=-1)


def never_end(log: Log) -> None:
    log.admit("r2", 2)
    log.settle("r2", 3)


def never_decide(log: Log) -> None:
    log.settle("r1", 2)
    log.add("arrive", 3, request="r2", worker="a", reserved_tokens=1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (settle_twice, "line 5: settle of r1 is out of order"),
        (admit_again, "line 5: r1 arrives a second time"),
        (go_back, "line 4: time goes back"),
        (settle_a_stranger, "line 5: 'r9' is missing"),
        (start_again, "line 5: start a second time"),
        (garble, "line 5: "),
        (negative_tokens, "line 4: tokens is not a whole number"),
        (never_end, "r1: was neither settled nor disconnected"),
        (never_decide, "r2: was neither admitted nor rejected"),
    ],
)
def test_log_that_contradicts_itself_is_not_believed(damage: Any, told: str) -> None:
    log = Log()
    log.admit("r1", 1)
    damage(log)

    claims = log.verdict().broken

    assert [claim.name for claim in claims] == ["the provider's log is whole and in order"]
    assert told in claims[0].detail


def test_log_without_start_or_stop_is_not_believed() -> None:
    assert "there is no start line" in auditor.audit_lines([]).broken[0].detail
    assert "there is no stop line" in auditor.audit_lines(Log().lines).broken[0].detail


def test_missing_and_cut_off_files_are_broken_claims(tmp_path: pathlib.Path) -> None:
    log = Log()
    log.add("stop", 1)
    path = tmp_path / "provider.jsonl"
    path.write_text("\n".join(log.lines) + '\n{"mono')

    assert "line 3: is cut off" in auditor.audit(path).broken[0].detail
    assert "cannot be read" in auditor.audit(tmp_path / "none").broken[0].detail


def test_command_prints_the_verdict_and_fails_on_a_broken_claim(tmp_path: pathlib.Path, capsys: Any) -> None:
    good, bad = Log(), Log(concurrency=1)
    for log in (good, bad):
        log.admit("r1", 1)
        log.admit("r2", 1)
        log.settle("r1", 2)
        log.settle("r2", 2)
        log.add("stop", 3)
    (tmp_path / "good").write_text("\n".join(good.lines) + "\n")
    (tmp_path / "bad").write_text("\n".join(bad.lines) + "\n")

    assert auditor.main([str(tmp_path / "good")]) == 0
    assert json.loads(capsys.readouterr().out)["requests_done"] == 2
    assert auditor.main([str(tmp_path / "bad")]) == 1
    assert json.loads(capsys.readouterr().out)["peaks"]["concurrency"]["highest"] == 2


def test_auditor_loads_nothing_of_core() -> None:
    code = (
        "import sys, leasehold.sim.auditor; print([m for m in sys.modules if m.startswith('leasehold.core')])"
    )

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
