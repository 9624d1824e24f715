"""Traces: what is read, what is refused and where, cutting and scaling, and the trace that the demo ships."""

import io
import itertools
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator

import leasehold.demo
import pytest
from leasehold.core import errors
from leasehold.sim import traces

SHIPPED = pathlib.Path(leasehold.demo.__file__).parent / "data" / "conversation.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def parsed(*lines: str) -> list[traces.Request]:
    return list(traces.parse([HEADER, *lines], source="t.csv"))


def test_offsets_count_from_the_first_request_with_all_seven_digits() -> None:
    requests = parsed("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")

    assert requests[0] == traces.Request(0.0, 374, 44)
    assert requests[1].offset_seconds == pytest.approx(4.3145790, abs=1e-9)
    assert requests[1].total_tokens == 505


@pytest.mark.parametrize(
    "stamp",
    [
        "2024-05-10 00:00:01",
        "2024-05-10T00:00:01.0Z",
        "2024-05-10 02:00:01.000000+02:00",
        "2024-05-09 23:30:01-00:30",
    ],
)
def test_offset_from_utc_and_missing_fraction_are_read(stamp: str) -> None:
    first, second = parsed("2024-05-10 00:00:00.009930+00:00,1,2", f"{stamp},3,4")

    assert (first.context_tokens, second.generated_tokens) == (1, 4)
    assert second.offset_seconds == pytest.approx(0.99007, abs=1e-9)


def test_file_may_lack_its_last_newline_and_may_have_windows_line_ends(
    tmp_path: pathlib.Path,
) -> None:
    text = f"{HEADER}\n2024-01-01 00:00:00.0,1,2\n2024-01-01 00:00:01.5,3,4"
    expected = [traces.Request(0.0, 1, 2), traces.Request(1.5, 3, 4)]

    for name, content in [
        ("a", text),
        ("b", text + "\n"),
        ("c", text.replace("\n", "\r\n")),
        ("d", "\ufeff" + text),
    ]:
        path = tmp_path / f"{name}.csv"
        path.write_text(content, encoding="utf-8", newline="")
        assert list(traces.read(path)) == expected, name


def test_reading_is_lazy() -> None:
    def lines() -> Iterator[str]:
        yield HEADER
        yield "2024-01-01 00:00:00.0,1,2"
        raise AssertionError("read ahead")

    assert next(traces.parse(lines(), source="t.csv")) == traces.Request(0.0, 1, 2)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("2024-01-01 00:00:02,5", "2 columns, not 3"),
        ("2024-01-01 00:00:02,5,6,7", "4 columns, not 3"),
        ("yesterday,5,6", "TIMESTAMP: 'yesterday' is not a time"),
        ("2024-13-01 00:00:02,5,6", "TIMESTAMP: '2024-13-01 00:00:02' is not a time"),
        ("2024-01-01 00:00:02,-5,6", "ContextTokens: '-5' is not a whole number of tokens"),
        ("2024-01-01 00:00:02,5,6.5", "GeneratedTokens: '6.5' is not a whole number of tokens"),
        ("2024-01-01 00:00:02,5,", "GeneratedTokens: '' is not a whole number of tokens"),
        ("2024-01-01 00:00:02,5,²", "GeneratedTokens: '²' is not a whole number of tokens"),
        ("2024-01-01 00:00:02,10000001,6", "ContextTokens: 10000001 is above 10000000"),
        ("2024-01-01 00:00:02," + "9" * 5000 + ",6", "ContextTokens: 999"),
        ("2023-12-31 23:59:59,5,6", "TIMESTAMP: is before that of the line above"),
    ],
)
def test_wrong_line_is_refused_by_its_number(line: str, told: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        parsed("2024-01-01 00:00:00,1,2", "", line)

    assert refused.value.message.startswith(f"t.csv, line 4: {told}")
    assert len(refused.value.message) < 200
    assert refused.value.field == "trace"


@pytest.mark.parametrize("header", ["", "time,in,out", "2024-01-01 00:00:00,1,2"])
def test_wrong_header_is_refused_at_line_one(header: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"t\.csv, line 1: the header is"):
        list(traces.parse([header], source="t.csv"))


def test_trace_without_a_request_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="holds no request"):
        parsed()


def test_missing_unreadable_and_binary_files_are_told_apart(tmp_path: pathlib.Path) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(errors.NotFound, match=r"there is no file .*none\.csv"):
        list(traces.read(tmp_path / "none.csv"))
    with pytest.raises(errors.InvalidArgument, match="is not UTF-8"):
        list(traces.read(binary))
    with pytest.raises(errors.InvalidArgument, match="cannot be read: Is a directory"):
        list(traces.read(tmp_path))


def test_window_holds_its_start_and_not_its_end() -> None:
    requests = [traces.Request(float(second), second, 0) for second in range(6)]

    cut = list(traces.window(requests, start_seconds=2.0, seconds=2.0))

    assert cut == [traces.Request(0.0, 2, 0), traces.Request(1.0, 3, 0)]


def test_faster_divides_offsets_only() -> None:
    assert list(traces.faster([traces.Request(3.0, 7, 8)], factor=1.5)) == [traces.Request(2.0, 7, 8)]


def test_parts_are_disjoint_and_make_the_whole() -> None:
    requests = traces.generate(rows=10, seed=1)

    parts = [list(traces.part(requests, index=index, count=3)) for index in range(3)]

    assert [len(part) for part in parts] == [4, 3, 3]
    assert sorted(itertools.chain(*parts), key=lambda request: request.offset_seconds) == requests


def test_wrong_cuts_are_refused_by_field() -> None:
    requests = [traces.Request(0.0, 1, 1)]
    attempts: dict[str, Callable[[], Iterable[traces.Request]]] = {
        "start_seconds": lambda: traces.window(requests, start_seconds=-1.0, seconds=1.0),
        "seconds": lambda: traces.window(requests, start_seconds=0.0, seconds=float("nan")),
        "factor": lambda: traces.faster(requests, factor=0.0),
        "index": lambda: traces.part(requests, index=2, count=2),
        "rows": lambda: traces.generate(rows=0, seed=1),
    }
    for field, attempt in attempts.items():
        with pytest.raises(errors.InvalidArgument) as refused:
            list(attempt())
        assert refused.value.field == field


def test_written_trace_reads_back_the_same() -> None:
    requests = traces.generate(rows=200, seed=3)
    stream = io.StringIO()

    traces.write(requests, stream)

    read = list(traces.parse(stream.getvalue().splitlines(), source="t.csv"))
    assert [(r.context_tokens, r.generated_tokens) for r in read] == [
        (r.context_tokens, r.generated_tokens) for r in requests
    ]
    assert [r.offset_seconds for r in read] == pytest.approx([r.offset_seconds for r in requests], abs=1e-7)


def test_shipped_trace_is_what_the_generator_writes(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "again.csv"

    assert traces.main(["--output", str(output)]) == 0

    assert output.read_bytes() == SHIPPED.read_bytes()


def test_shipped_trace_is_near_the_public_conversation_trace_and_its_thirds_differ() -> None:
    requests = list(traces.read(SHIPPED))

    assert len(requests) == 600
    assert 900 < statistics.mean(r.context_tokens for r in requests) < 1400
    assert 170 < statistics.mean(r.generated_tokens for r in requests) < 250
    thirds = [requests[index * 200 : (index + 1) * 200] for index in range(3)]
    totals = [statistics.mean(r.total_tokens for r in third) for third in thirds]
    answers = [statistics.mean(r.generated_tokens for r in third) for third in thirds]
    assert totals[1] > 1.4 * max(totals[0], totals[2])
    assert answers[2] > 1.5 * max(answers[0], answers[1])


def test_generating_nothing_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert traces.main(["--rows", "0"]) == 2
    assert "rows: 0 is below 1" in capsys.readouterr().err
