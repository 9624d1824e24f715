"""Jobs as lines of JSON, for `leasehold job batch`."""

import json
from collections.abc import Iterator
from typing import Any

from leasehold.cli import documents
from leasehold.client import job_specs
from leasehold.core import errors
from leasehold.core.job import model

_TEXTS = ("name", "queue", "template", "on_lost", "spreading")
_MAPS = ("node_selector", "parameters")
_DURATIONS = {
    "max_run": "max_run_seconds",
    "initial_backoff": "initial_backoff_seconds",
    "max_backoff": "max_backoff_seconds",
}
_NUMBERS = ("priority", "max_attempts")
KEYS = ("cpus", "memory", *_TEXTS, *_MAPS, *_DURATIONS, *_NUMBERS, "wait_for_capacity")


def parsed(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, model.JobSpec | errors.LeaseholdError]]:
    """Each line's number with its job, or with what is wrong with it; empty lines are passed over."""
    for number, line in lines:
        if line.strip():
            try:
                yield number, job(_decoded(line))
            except errors.LeaseholdError as error:
                yield number, error


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument("line: is not UTF-8", field="line") from error


def job(line: str) -> model.JobSpec:
    """The job of one line. Raises `InvalidArgument`, naming the field."""
    given = documents.parse_json(line, what="line")
    if not isinstance(given, dict):
        raise errors.InvalidArgument(
            'line: is no JSON object, such as {"template": "encode", "cpus": 2, "memory": "4GB"}', field="line"
        )
    for name in given:
        if name not in KEYS:
            raise errors.InvalidArgument(
                f"{name[:60]}: is no key of a job; there are {', '.join(KEYS)}", field=name[:60]
            )
    for name in ("cpus", "memory"):
        if name not in given:
            raise errors.InvalidArgument(f"{name}: is missing", field=name)
    wanted: dict[str, Any] = {"cpus": _whole(given["cpus"], "cpus"), "memory": _memory(given["memory"])}
    wanted |= {name: _text(given[name], name) for name in _TEXTS if name in given}
    wanted |= {name: _map(given[name], name) for name in _MAPS if name in given}
    wanted |= {name: _whole(given[name], name) for name in _NUMBERS if name in given}
    wanted |= {argument: _duration(given[name], name) for name, argument in _DURATIONS.items() if name in given}
    if "wait_for_capacity" in given:
        wanted["wait_for_capacity"] = _truth(given["wait_for_capacity"], "wait_for_capacity")
    return job_specs.job_spec(**wanted)


def _wrong(name: str, kind: str, value: object) -> errors.InvalidArgument:
    shown = json.dumps(value, ensure_ascii=False)
    return errors.InvalidArgument(f"{name}: {shown:.60} is no {kind}", field=name)


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "whole number", value)
    return value


def _truth(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    return value


def _memory(value: object) -> int:
    return job_specs.memory_bytes(value) if isinstance(value, str) else _whole(value, "memory")


def _duration(value: object, name: str) -> float:
    if isinstance(value, str):
        return job_specs.duration_seconds(value, field=name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "duration, such as 90 or 10m", value)
    return float(value)


def _map(value: object, name: str) -> dict[str, str]:
    """An object of texts; whole numbers are written out, since nobody means another thing by them."""
    if not isinstance(value, dict):
        raise _wrong(name, "object", value)
    found = {}
    for key, item in value.items():
        is_number = isinstance(item, int) and not isinstance(item, bool)
        found[key] = str(item) if is_number else _text(item, f"{name}.{key[:60]}")
    return found
