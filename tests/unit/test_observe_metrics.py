import math
import threading

import pytest
from leasehold.core import errors
from leasehold.observe import metrics


def test_the_text_is_what_prometheus_reads() -> None:
    registry = metrics.Registry()
    registry.counter("leasehold_grants_total", "Grants made.", ["budget"]).labels("openai").add(3)
    registry.gauge("leasehold_holders", "Holders now.").labels().set(2.5)
    waited = registry.histogram("leasehold_wait_seconds", "Time waited.", ["budget"], bounds=[0.1, 1])
    for value in (0.1, 0.5, 0.6, 7.0):
        waited.labels("a").observe(value)
    assert registry.expose() == (
        "# HELP leasehold_grants_total Grants made.\n"
        "# TYPE leasehold_grants_total counter\n"
        'leasehold_grants_total{budget="openai"} 3\n'
        "# HELP leasehold_holders Holders now.\n"
        "# TYPE leasehold_holders gauge\n"
        "leasehold_holders 2.5\n"
        "# HELP leasehold_wait_seconds Time waited.\n"
        "# TYPE leasehold_wait_seconds histogram\n"
        'leasehold_wait_seconds_bucket{budget="a",le="0.1"} 1\n'
        'leasehold_wait_seconds_bucket{budget="a",le="1"} 3\n'
        'leasehold_wait_seconds_bucket{budget="a",le="+Inf"} 4\n'
        'leasehold_wait_seconds_sum{budget="a"} 8.2\n'
        'leasehold_wait_seconds_count{budget="a"} 4\n'
    )


def test_values_from_users_cannot_break_the_text() -> None:
    registry = metrics.Registry()
    registry.counter("a_total", "One\nline \\ only.", ["name"]).labels('x"} 9\n\\').add()
    assert registry.expose().splitlines() == [
        "# HELP a_total One\\nline \\\\ only.",
        "# TYPE a_total counter",
        'a_total{name="x\\"} 9\\n\\\\"} 1',
    ]


def test_asking_again_gives_the_same_metric_and_another_kind_is_refused() -> None:
    registry = metrics.Registry()
    first = registry.counter("a_total", "A.", ["x"])
    assert registry.counter("a_total", "A.", ["x"]) is first
    with pytest.raises(errors.InvalidArgument):
        registry.gauge("a_total", "A.", ["x"])
    with pytest.raises(errors.InvalidArgument):
        registry.counter("a_total", "A.", ["y"])


def test_increments_of_many_threads_are_all_counted() -> None:
    registry = metrics.Registry()
    counter, histogram = registry.counter("a_total", "A.").labels(), registry.histogram("b", "B.").labels()

    def work() -> None:
        for _ in range(5_000):
            counter.add()
            histogram.observe(0.01)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == histogram.count == 40_000


def test_too_many_label_values_share_one_series() -> None:
    counter = metrics.Registry().counter("a_total", "A.", ["holder"])
    for number in range(5_000):
        counter.labels(f"holder-{number}").add()
    lines = [line for line in counter.expose() if not line.startswith("#")]
    assert len(lines) == 2_001
    assert lines[-1] == 'a_total{holder="_other"} 3000'


def test_numbers_are_written_as_prometheus_writes_them() -> None:
    registry = metrics.Registry()
    gauge = registry.gauge("a", "A.", ["n"])
    for value in (1e20, 0.1, -math.inf, 12_345_678_901.0):
        gauge.labels(str(value)).set(value)
    values = [line.rpartition(" ")[2] for line in gauge.expose()][2:]
    assert values == ["1e+20", "0.1", "-Inf", "12345678901"]


@pytest.mark.parametrize("name", ["", "a-b", "1a", "a b", "a\n"])
def test_a_name_that_prometheus_refuses_is_refused_here(name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        metrics.Registry().counter(name, "A.")


def test_misuse_is_refused() -> None:
    registry = metrics.Registry()
    with pytest.raises(errors.InvalidArgument):
        registry.counter("a_total", "A.").labels().add(-1)
    with pytest.raises(errors.InvalidArgument):
        registry.counter("b_total", "B.", ["x"]).labels()
    for bounds in ([], [1, 1], [2, 1], [math.nan]):
        with pytest.raises(errors.InvalidArgument):
            registry.histogram("c", "C.", bounds=bounds)
