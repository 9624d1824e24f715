"""Request traces: reading, cutting, scaling, and one of the project's own making.

The format is that of the public Azure LLM inference traces: a header `TIMESTAMP,ContextTokens,GeneratedTokens`
and one line per request in the order of arrival, such as `2023-11-16 18:15:46.6805900,374,44`. A timestamp may
have up to nine fractional digits and an offset from UTC; the last line may lack its newline.

`python -m leasehold.sim.traces --rows 600 --seed 11 --output FILE` writes the trace that the demo ships.
"""

import argparse
import datetime
import itertools
import math
import pathlib
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from leasehold.core import errors

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
TOKENS_MAX = 10_000_000

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?")
_NANOS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    #: Seconds after the first request of the trace (or after the start of the window cut from it).
    offset_seconds: float
    #: Tokens of the prompt, 0 to `TOKENS_MAX`.
    context_tokens: int
    #: Tokens of the answer, 0 to `TOKENS_MAX`.
    generated_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.context_tokens + self.generated_tokens


def read(path: pathlib.Path) -> Iterator[Request]:
    """The requests of the file at `path`, one at a time, so that a long trace needs no memory.

    Raises `NotFound` if there is no such file, and `InvalidArgument`, naming the file and the line, if a line
    is not of the format, times go backwards, or there is no request at all.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=None) as lines:
            yield from parse(lines, source=str(path))
    except FileNotFoundError as error:
        raise errors.NotFound(f"trace: there is no file {path}", field="trace") from error
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{path}: is not UTF-8 text: {error.reason}", field="trace") from error
    except OSError as error:
        raise errors.InvalidArgument(f"{path}: cannot be read: {error.strerror}", field="trace") from error


def parse(lines: Iterable[str], *, source: str) -> Iterator[Request]:
    """As `read`, from lines; `source` names them in errors."""
    numbered = enumerate(lines, start=1)
    header = next(numbered, (1, ""))[1].strip()
    if header != HEADER:
        raise _refused(source, 1, f"the header is {header[:80]!r}, not {HEADER!r}")
    first_ns: int | None = None
    previous_ns = 0
    for number, line in numbered:
        text = line.strip()
        if not text:
            continue
        at_ns, context_tokens, generated_tokens = _parse_line(text, source, number)
        if first_ns is None:
            first_ns = previous_ns = at_ns
        if at_ns < previous_ns:
            raise _refused(source, number, "TIMESTAMP: is before that of the line above")
        previous_ns = at_ns
        yield Request((at_ns - first_ns) / _NANOS, context_tokens, generated_tokens)
    if first_ns is None:
        raise errors.InvalidArgument(f"{source}: holds no request", field="trace")


def _parse_line(text: str, source: str, number: int) -> tuple[int, int, int]:
    cells = text.split(",")
    if len(cells) != 3:
        raise _refused(source, number, f"{len(cells)} columns, not 3")
    try:
        at_ns = _parse_timestamp(cells[0].strip())
    except ValueError:
        raise _refused(source, number, f"TIMESTAMP: {cells[0][:60]!r} is not a time") from None
    return (
        at_ns,
        _parse_tokens(cells[1], "ContextTokens", source, number),
        _parse_tokens(cells[2], "GeneratedTokens", source, number),
    )


def _parse_timestamp(text: str) -> int:
    """Nanoseconds since 1970; a time without an offset is taken as UTC."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError(text)
    date, clock, fraction, offset = match.groups()
    whole = datetime.datetime.fromisoformat(f"{date}T{clock}{offset or '+00:00'}")
    return int(whole.timestamp()) * _NANOS + int((fraction or "").ljust(9, "0"))


def _parse_tokens(cell: str, column: str, source: str, number: int) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit()):
        raise _refused(source, number, f"{column}: {text[:60]!r} is not a whole number of tokens")
    tokens = int(text) if len(text) <= 20 else TOKENS_MAX + 1
    if tokens > TOKENS_MAX:
        raise _refused(source, number, f"{column}: {text[:60]} is above {TOKENS_MAX}")
    return tokens


def _refused(source: str, line_number: int, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"{source}, line {line_number}: {why}", field="trace")


def window(requests: Iterable[Request], *, start_seconds: float, seconds: float) -> Iterator[Request]:
    """Those that arrive in [start, start + seconds), with offsets from `start_seconds`.

    Raises `InvalidArgument` unless `start_seconds` >= 0 and `seconds` > 0.
    """
    if not start_seconds >= 0:
        raise errors.InvalidArgument(f"start_seconds: {start_seconds} is negative", field="start_seconds")
    if not seconds > 0:
        raise errors.InvalidArgument(f"seconds: {seconds} is not above 0", field="seconds")
    end_seconds = start_seconds + seconds
    for request in requests:
        if request.offset_seconds >= end_seconds:
            return
        if request.offset_seconds >= start_seconds:
            yield Request(
                request.offset_seconds - start_seconds, request.context_tokens, request.generated_tokens
            )


def faster(requests: Iterable[Request], *, factor: float) -> Iterator[Request]:
    """The same requests with the time between them divided by `factor`, a finite number above 0."""
    if not (math.isfinite(factor) and factor > 0):
        raise errors.InvalidArgument(f"factor: {factor} is not a finite number above 0", field="factor")
    for request in requests:
        yield Request(request.offset_seconds / factor, request.context_tokens, request.generated_tokens)


def part(requests: Iterable[Request], *, index: int, count: int) -> Iterator[Request]:
    """The requests number `index`, `index + count`, …: one of `count` even parts, offsets as they were."""
    if not 0 <= index < count:
        raise errors.InvalidArgument(f"index: {index} is not in 0 to {count - 1}", field="index")
    return itertools.islice(requests, index, None, count)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of traffic: medians and spreads (sigma of the logarithm) of its lengths."""

    context_median: float
    context_sigma: float
    generated_median: float
    generated_sigma: float


# One kind spends mostly requests, one tokens, one concurrency, and each has its hours: so a budget with three
# limits meets each of them. Together they have about the means and percentiles of the public conversation
# trace (context 1155 / 1020 / 4142, generated 211 / 129 / 601 for mean, median and p99).
_KINDS = (
    _Kind(620.0, 0.60, 85.0, 0.45),  # short chat
    _Kind(1900.0, 0.42, 120.0, 0.50),  # questions about a document
    _Kind(480.0, 0.65, 390.0, 0.28),  # long answers
)
_CONTEXT_TOKENS_MAX = 8192
_GENERATED_TOKENS_MAX = 1000
_REQUESTS_PER_SECOND = 5.53
#: How strongly the kinds take turns; 0: an even mix all the time.
_TURN_STRENGTH = 1.6
#: Sigma of the logarithm of the arrival rate, drawn anew each second.
_BURST_SIGMA = 0.45


def generate(*, rows: int, seed: int) -> list[Request]:
    """A trace of `rows` requests; the same `rows` and `seed` give the same trace.

    Lengths are log-normal around the medians of three kinds of traffic that take turns once over the trace;
    arrivals are Poisson with a rate that is log-normal from second to second (mean 5.53 a second).
    Raises `InvalidArgument` unless `rows` is 1 or more.
    """
    if rows < 1:
        raise errors.InvalidArgument(f"rows: {rows} is below 1", field="rows")
    # Not for secrets: a seeded generator is what makes the trace reproducible.
    draw = random.Random(seed)  # noqa: S311
    requests = []
    at_seconds = 0.0
    for row, gap in zip(range(rows), _gaps_seconds(draw), strict=False):
        kind = draw.choices(_KINDS, _turn_weights(row / rows))[0]
        requests.append(
            Request(
                round(at_seconds, 7),
                _length(draw, kind.context_median, kind.context_sigma, _CONTEXT_TOKENS_MAX),
                _length(draw, kind.generated_median, kind.generated_sigma, _GENERATED_TOKENS_MAX),
            )
        )
        at_seconds += gap
    return requests


def _gaps_seconds(draw: random.Random) -> Iterator[float]:
    """Endless gaps between arrivals."""
    second = -1
    at_seconds = 0.0
    rate = _REQUESTS_PER_SECOND
    while True:
        if int(at_seconds) != second:
            second = int(at_seconds)
            # The mean of a log-normal is exp(mu + sigma^2 / 2); this keeps it at the rate wanted.
            rate = _REQUESTS_PER_SECOND * draw.lognormvariate(-(_BURST_SIGMA**2) / 2, _BURST_SIGMA)
        gap = draw.expovariate(rate)
        at_seconds += gap
        yield gap


def _turn_weights(progress: float) -> Sequence[float]:
    """Weights of the kinds at `progress` (0 to 1) through the trace: each leads for a third of it."""
    return [
        math.exp(_TURN_STRENGTH * math.cos(2 * math.pi * (progress - (turn + 0.5) / len(_KINDS))))
        for turn in range(len(_KINDS))
    ]


def _length(draw: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(draw.lognormvariate(math.log(median), sigma))))


def write(requests: Iterable[Request], stream: TextIO, *, start: str = "2024-01-01 00:00:00") -> None:
    """Writes `requests` in the format of this module, the first `offset_seconds` 0 at `start` (UTC)."""
    start_ns = _parse_timestamp(start)
    stream.write(f"{HEADER}\n")
    for request in requests:
        # The format has steps of 100 ns.
        at_ns = start_ns + round(request.offset_seconds * 10_000_000) * 100
        whole = datetime.datetime.fromtimestamp(at_ns // _NANOS, tz=datetime.UTC)
        stamp = f"{whole:%Y-%m-%d %H:%M:%S}.{at_ns % _NANOS // 100:07d}"
        stream.write(f"{stamp},{request.context_tokens},{request.generated_tokens}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a generated trace; the exit code is 0, or 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m leasehold.sim.traces", description="Generate a trace.")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", type=pathlib.Path, help="file to write; default standard output")
    options = parser.parse_args(arguments)
    try:
        requests = generate(rows=options.rows, seed=options.seed)
    except errors.InvalidArgument as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    if options.output is None:
        write(requests, sys.stdout)
    else:
        with options.output.open("w", encoding="utf-8", newline="\n") as stream:
            write(requests, stream)
    return 0


if __name__ == "__main__":
    sys.exit(main())
