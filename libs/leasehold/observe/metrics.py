"""Counters, gauges and histograms, told in Prometheus' text format.

Why not prometheus-client: it adds 60 ms and 6 MiB to each process, and processes that run on every host (the
client library in a worker, the node agent) must stay light; what is used of it fits on this page. Series are
made once with `labels` and kept by the caller, so that a hot path pays a lock and an addition.
"""

import bisect
import itertools
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from leasehold.core import errors

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Label values that come from users must not be able to fill the memory; what is more goes into one series.
_SERIES_MAX: Final = 2_000
_OVERFLOW: Final = "_other"

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

_Lines = Iterator[tuple[str, str, float]]  # suffix of the name, labels, value


class CounterSeries:
    """A number that only grows."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Grow by `amount`, at least 0."""
        if amount < 0:
            raise errors.InvalidArgument(f"a counter cannot fall by {-amount}", field="amount")
        # += is three bytecodes: without the lock threads lose increments.
        with self._lock:
            self._value += amount

    @property
    def value(self) -> float:
        """The present sum."""
        return self._value

    def lines(self, labels: str) -> _Lines:
        """What Prometheus is told."""
        yield "", labels, self._value


class GaugeSeries:
    """A number that goes up and down, set by hand."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0.0

    def set(self, value: float) -> None:
        """Set the value."""
        self._value = value

    def add(self, amount: float = 1.0) -> None:
        """Move by `amount`, which may be negative."""
        with self._lock:
            self._value += amount

    @property
    def value(self) -> float:
        """The present value."""
        return self._value

    def lines(self, labels: str) -> _Lines:
        """What Prometheus is told."""
        yield "", labels, self.value


class HistogramSeries:
    """How often values fell into each bucket, with their sum."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._lock = threading.Lock()
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count one value, once or more often."""
        place = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += times
            self._sum += value * times

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self._counts)

    def lines(self, labels: str) -> _Lines:
        """What Prometheus is told: cumulative buckets, sum and count, all of one instant."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        running = 0
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            running += count
            yield "_bucket", ",".join(filter(None, (labels, f'le="{_number(bound)}"'))), running
        yield "_sum", labels, total
        yield "_count", labels, running


class _Series(Protocol):
    def lines(self, labels: str) -> _Lines: ...


Series = TypeVar("Series", bound=_Series)


class Metric(Generic[Series]):
    """One metric: a series for each combination of label values, so many at most; the rest share ``_other``."""

    def __init__(
        self,
        kind: str,
        name: str,
        description: str,
        label_names: Sequence[str],
        make: Callable[[], Series],
        *,
        series_max: int = _SERIES_MAX,
    ) -> None:
        for text in (name, *label_names):
            if not _NAME.fullmatch(text):
                raise errors.InvalidArgument(f"not a name for a metric or label: {text!r}", field="name")
        self.kind = kind
        self.name = name
        self.description = description
        self.label_names = tuple(label_names)
        self._make = make
        self._series_max = series_max
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        """The series of these label values, in the order of the names; made at its first use."""
        series = self._series.get(values)
        if series is not None:
            return series
        if len(values) != len(self.label_names):
            raise errors.InvalidArgument(f"{self.name} has the labels {self.label_names}", field="labels")
        with self._lock:
            if values not in self._series and values and len(self._series) >= self._series_max:
                values = (_OVERFLOW,) * len(values)
            return self._series.setdefault(values, self._make())

    def expose(self) -> Iterator[str]:
        """Lines of Prometheus' text format."""
        yield f"# HELP {self.name} {_escape(self.description, quotes=False)}"
        yield f"# TYPE {self.name} {self.kind}"
        with self._lock:
            all_series = list(self._series.items())
        for values, series in all_series:
            pairs = zip(self.label_names, values, strict=True)
            labels = ",".join(f'{name}="{_escape(value)}"' for name, value in pairs)
            for suffix, line_labels, number in series.lines(labels):
                braces = f"{{{line_labels}}}" if line_labels else ""
                yield f"{self.name}{suffix}{braces} {_number(number)}"


class Registry:
    """All metrics of a process. Asking again for a name gives the same metric; another kind is refused.

    A metric has at most `series_max` series; what is more shares one.
    """

    def __init__(self, *, series_max: int = _SERIES_MAX) -> None:
        self._series_max = series_max
        self._lock = threading.Lock()
        self._metrics: dict[str, Metric[Any]] = {}

    def counter(self, name: str, description: str, label_names: Sequence[str] = ()) -> Metric[CounterSeries]:
        """A metric that only grows; its name ends in ``_total``."""
        return self._add(
            Metric("counter", name, description, label_names, CounterSeries, series_max=self._series_max)
        )

    def gauge(self, name: str, description: str, label_names: Sequence[str] = ()) -> Metric[GaugeSeries]:
        """A metric that goes up and down."""
        return self._add(
            Metric("gauge", name, description, label_names, GaugeSeries, series_max=self._series_max)
        )

    def histogram(
        self,
        name: str,
        description: str,
        label_names: Sequence[str] = (),
        *,
        bounds: Sequence[float] = LATENCY_SECONDS,
    ) -> Metric[HistogramSeries]:
        """A distribution, counted in buckets with these upper bounds, rising; infinity is added."""
        bounds = tuple(bounds)
        if not bounds or any(not low < high for low, high in itertools.pairwise((*bounds, math.inf))):
            raise errors.InvalidArgument(f"the bounds of {name} do not rise", field="bounds")
        return self._add(
            Metric(
                "histogram",
                name,
                description,
                label_names,
                lambda: HistogramSeries(bounds),
                series_max=self._series_max,
            )
        )

    def expose(self) -> str:
        """Everything, in Prometheus' text format (`CONTENT_TYPE`), by name."""
        with self._lock:
            known = sorted(self._metrics.items())
        return "".join(f"{line}\n" for _, metric in known for line in metric.expose())

    def _add(self, metric: Metric[Series]) -> Metric[Series]:
        with self._lock:
            known = self._metrics.setdefault(metric.name, metric)
        if (known.kind, known.label_names) != (metric.kind, metric.label_names):
            raise errors.InvalidArgument(
                f"{metric.name} is already a {known.kind} with the labels {known.label_names}", field="name"
            )
        return cast("Metric[Series]", known)


def _escape(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
