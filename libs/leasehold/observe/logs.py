"""Logging: one line an event, key-values, UTC times, to standard error.

Modules take their logger from `get_logger`; a process of ours calls `configure` once, at its start. In a
user's program, which imports `leasehold.client` and never calls it, events go to the standard library's
``logging``, as those of any library do. After `configure`, lines of ``logging`` (grpc, uvicorn, psycopg,
warnings) pass through the same processors as ours. Imported by every process, so it must stay light.
"""

import logging
import sys
import threading
from typing import Any, Final, Literal, TextIO

from leasehold.core import errors
from leasehold.observe import causes, redaction

# structlog.dev imports rich where it is installed, 40 ms and 5 MiB for each process, to draw tracebacks that
# are not used here. None in sys.modules is Python's own way to say "not importable".
_hides_rich = "rich" not in sys.modules
if _hides_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    if _hides_rich:
        del sys.modules["rich"]

LogFormat = Literal["auto", "json", "console"]
Logger = structlog.typing.FilteringBoundLogger
EventDict = structlog.typing.EventDict

LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_FOREIGN_LOGGERS: Final = ("uvicorn", "uvicorn.access", "uvicorn.error")
# A newline or an escape sequence in a value could forge a line, or drive the reader's terminal.
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\t")}
_FIRST_KEYS: Final = ("timestamp", "level", "event")


def get_logger(name: str) -> Logger:
    """A logger whose lines carry ``logger=name``. May be made before `configure`, at module level."""
    # Not structlog.get_logger: its set-up is the whole process's, and a user's program may have its own.
    logger: Logger = structlog.wrap_logger(
        _sink,
        processors=_processors,
        wrapper_class=_BoundLogger,
        cache_logger_on_first_use=False,
        logger_name=name,
    )
    return logger


def configure(
    log_format: LogFormat = "auto",
    level: str = "info",
    *,
    stream: TextIO | None = None,
    service: str | None = None,
) -> None:
    """Set up logging for this process; a later call replaces an earlier one.

    ``auto`` is ``console`` on a terminal and ``json`` elsewhere; colours appear on a terminal only. ``stream``
    defaults to standard error, since standard output is for data. ``service`` is put on every line.

    Raises `InvalidArgument` naming ``log_format`` or ``log_level``.
    """
    if log_format not in ("auto", "json", "console"):
        raise errors.InvalidArgument(f"no log format {log_format!r}: auto, json or console", field="log_format")
    if level.lower() not in LEVELS:
        raise errors.InvalidArgument(f"no log level {level!r}: one of {', '.join(LEVELS)}", field="log_level")
    output = stream if stream is not None else sys.stderr
    is_terminal = output.isatty()
    is_json = log_format == "json" or (log_format == "auto" and not is_terminal)
    number = logging.getLevelNamesMapping()[level.upper()]

    def drop_below_level(_: Any, method: str, event: EventDict) -> EventDict:
        if structlog.processors.NAME_TO_LEVEL[method] < number:
            raise structlog.DropEvent
        if service is not None:
            event.setdefault("service", service)
        return event

    _sink.stream = output
    _processors[:] = [
        drop_below_level,
        _add_logger_and_cause,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _redact,
        *_rendering(is_json=is_json, is_terminal=is_terminal),
    ]
    _take_over_standard_logging(number)


def reset() -> None:
    """Back to the state before `configure`: events go to the standard library's ``logging``."""
    _processors[:] = _library_processors()
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _ThroughStructlog):
            root.removeHandler(handler)
    logging.captureWarnings(False)


def _rendering(*, is_json: bool, is_terminal: bool) -> list[structlog.typing.Processor]:
    if is_json:
        return [_first_keys_first, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)]
    return [
        _escape_control_characters,
        structlog.dev.ConsoleRenderer(
            colors=is_terminal,
            exception_formatter=structlog.dev.plain_traceback,
            pad_event_to=28,
            sort_keys=False,
        ),
    ]


def _add_logger_and_cause(_: Any, __: str, event: EventDict) -> EventDict:
    # structlog keeps the name `logger` to itself while values are bound.
    if "logger_name" in event:
        event["logger"] = event.pop("logger_name")
    cause = causes.current()
    if cause is not None:
        event.setdefault("cause", cause)
    return event


def _redact(_: Any, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if redaction.is_secret_key(key) and value:
            event[key] = redaction.REDACTED
        else:
            event[key] = redaction.redact(value)
    return event


def _escape_control_characters(
    _: Any, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and key not in ("exception", "stack"):
            event[key] = value.translate(_CONTROL)
    return event


def _first_keys_first(_: Any, __: str, event: EventDict) -> EventDict:
    return {**{key: event.pop(key) for key in _FIRST_KEYS if key in event}, **event}


def _library_processors() -> list[structlog.typing.Processor]:
    return [
        _drop_unless_enabled,
        _add_logger_and_cause,
        structlog.processors.format_exc_info,
        _redact,
        _to_standard_logging,
    ]


def _drop_unless_enabled(_: Any, method: str, event: EventDict) -> EventDict:
    if not logging.getLogger(event["logger_name"]).isEnabledFor(structlog.processors.NAME_TO_LEVEL[method]):
        raise structlog.DropEvent
    return event


def _to_standard_logging(_: Any, method: str, event: EventDict) -> EventDict:
    logger = logging.getLogger(event.pop("logger"))
    exception = event.pop("exception", None)
    text = " ".join([str(event.pop("event", "")), *(f"{key}={value!r}" for key, value in event.items())])
    logger.log(structlog.processors.NAME_TO_LEVEL[method], "%s", f"{text}\n{exception}" if exception else text)
    raise structlog.DropEvent


class _Sink:
    """Writes whole lines. A log that cannot be written (disk full, reader gone) must not stop the service."""

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                stream = self.stream or sys.stderr
                stream.write(line + "\n")
                stream.flush()
        except (OSError, ValueError):
            return

    log = debug = info = warning = warn = error = exception = critical = fatal = msg


_sink: Final = _Sink()
# Emptied and filled by `configure` and `reset`; loggers hold the list itself, so that they follow.
_processors: Final[list[structlog.typing.Processor]] = _library_processors()
# Levels are told apart by a processor, since loggers made before `configure` must follow it too.
_BoundLogger: Final = structlog.make_filtering_bound_logger(logging.NOTSET)


class _ThroughStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            # structlog knows the five standard levels only.
            level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
            get_logger(record.name).log(level, record.getMessage(), exc_info=record.exc_info or None)
        except Exception:  # noqa: BLE001  a bad format string in a library must not break its caller
            self.handleError(record)


def _take_over_standard_logging(level: int) -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _ThroughStructlog) for handler in root.handlers):
        root.addHandler(_ThroughStructlog())
    root.setLevel(level)
    for name in _FOREIGN_LOGGERS:
        foreign = logging.getLogger(name)
        foreign.handlers.clear()
        foreign.propagate = True
    logging.captureWarnings(True)
