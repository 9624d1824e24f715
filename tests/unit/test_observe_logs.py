import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.observe import causes, logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logs.reset()
    logging.getLogger().setLevel(level)


@pytest.fixture
def lines() -> Callable[[], list[dict[str, Any]]]:
    stream = io.StringIO()
    logs.configure("json", "info", stream=stream, service="allocator")
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_of_json_begins_with_time_level_and_event(lines: Callable[[], list[dict[str, Any]]]) -> None:
    logs.get_logger("leasehold.test").info("lease_granted", holder="w1", rpm=20)
    (line,) = lines()
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line["timestamp"].endswith("Z")
    assert {key: line[key] for key in line if key != "timestamp"} == {
        "level": "info",
        "event": "lease_granted",
        "holder": "w1",
        "rpm": 20,
        "service": "allocator",
        "logger": "leasehold.test",
    }


def test_lines_below_the_level_are_left_out(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = logs.get_logger("a")
    log.debug("not_told")
    log.warning("told")
    assert [line["event"] for line in lines()] == ["told"]


def test_loggers_made_before_configure_follow_it_and_so_do_bound_ones() -> None:
    bound = logs.get_logger("early").bind(budget="openai")
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    bound.info("late")
    assert json.loads(stream.getvalue())["budget"] == "openai"


def test_colours_appear_on_a_terminal_only() -> None:
    for stream, has_colours in ((Terminal(), True), (io.StringIO(), False)):
        logs.configure("console", stream=stream)
        logs.get_logger("a").info("hello", rpm=20)
        assert ("\x1b[" in stream.getvalue()) is has_colours


def test_auto_means_console_on_a_terminal_and_json_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    logs.configure("auto", stream=terminal)
    logs.get_logger("a").info("hello")
    logs.configure("auto", stream=pipe)
    logs.get_logger("a").info("hello")
    assert "[" in terminal.getvalue()
    assert json.loads(pipe.getvalue())["event"] == "hello"


def test_a_value_cannot_forge_a_line_or_drive_the_terminal() -> None:
    stream = io.StringIO()
    logs.configure("console", stream=stream)
    logs.get_logger("a").info("joined\nforged", holder="w1\n2026-01-01 [error] forged\x1b[2J\x9b")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    assert "\x9b" not in stream.getvalue()


def test_the_standard_library_is_routed_through(lines: Callable[[], list[dict[str, Any]]]) -> None:
    access = logging.getLogger("uvicorn.access")
    access.info("GET %s", "/metrics?token=canary-1")
    logging.getLogger("grpc").log(25, "between the levels")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old call", stacklevel=1)
    access_line, odd_line, warning_line = lines()
    assert (access_line["logger"], access_line["event"]) == ("uvicorn.access", "GET /metrics?token=[redacted]")
    assert odd_line["level"] == "info"
    assert "old call" in warning_line["event"]


def test_a_bad_format_string_in_a_library_breaks_nothing(
    lines: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger("grpc").warning("%d", "no number")
    logging.getLogger("grpc").warning("still here")
    assert [line["event"] for line in lines()] == ["still here"]


def test_an_exception_is_told_with_its_traceback(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        raise ValueError("dsn postgres://u:canary-2@db/x")
    except ValueError:
        logs.get_logger("a").exception("failed")
    (line,) = lines()
    assert "ValueError: dsn postgres://u:[redacted]@db/x" in line["exception"]
    assert "canary-2" not in json.dumps(line)


async def test_the_cause_is_on_every_line_and_follows_tasks(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = logs.get_logger("a")

    async def child() -> None:
        log.info("child")

    with causes.bound("rpc-1"):
        log.info("parent")
        await asyncio.create_task(child())
    log.info("after")
    assert [line.get("cause") for line in lines()] == ["rpc-1", "rpc-1", None]


def test_causes_are_new_each_time_and_bad_ones_are_not_taken_over() -> None:
    made = {causes.new("rpc") for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(causes.is_valid(cause) for cause in made)
    assert not any(causes.is_valid(text) for text in ("", "a b", "a\nb", "a" * 65, "ü", "a\n"))


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    logs.configure("json", stream=Full())
    logs.get_logger("a").info("lost")
    closed = io.StringIO()
    logs.configure("json", stream=closed)
    closed.close()
    logs.get_logger("a").info("lost too")


def test_before_configure_events_go_to_the_standard_library_as_of_any_library(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "leasehold.client"):
        logs.get_logger("leasehold.client").info("joined", budget="openai", token="canary-3")
        logs.get_logger("leasehold.client").debug("not_told")
    assert [(record.name, record.message) for record in caplog.records] == [
        ("leasehold.client", "joined budget='openai' token='[redacted]'")
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("log_format", "level", "field"), [("xml", "info", "log_format"), ("json", "loud", "log_level")]
)
def test_a_wrong_setting_is_refused_by_name(log_format: Any, level: str, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        logs.configure(log_format, level)
    assert refusal.value.field == field


def test_importing_it_brings_nothing_heavy() -> None:
    check = (
        "import sys, leasehold.observe.logs, leasehold.observe.metrics\n"
        "heavy = {'rich', 'pydantic', 'typer', 'prometheus_client', 'grpc', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import rich\n"  # hidden from structlog only, and only for that instant
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
