"""The dry run: what each holder would get, from a document of plain JSON values. Nothing is changed.

::

    {"policy": "max_min", "limits": {"rpm_limit": 120}, "expected_workers": 4, "integer": ["num_workers"],
     "scaling_enabled": true,
     "holders": [{"name": "a", "active": true, "weight": 1, "priority": 0, "demand": {"rpm_limit": 60}}]}

Only `limits` and each holder's `name` are required. Left out: policy `active_share`, 4 expected workers,
scaling on, nothing dealt in whole units; a holder is active, of weight 1 and priority 0, and takes as much as
it can get. `integer` may name dimensions that the limits lack.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypedDict

from leasehold.core import errors
from leasehold.core.budget import model, quantity, share_claims, shares

HOLDERS_MAX = 100_000
EXPECTED_WORKERS_MAX = 100_000
PRIORITY_MAX = 1000

_KEYS = ("policy", "limits", "expected_workers", "integer", "scaling_enabled", "holders")
_HOLDER_KEYS = ("name", "active", "weight", "priority", "demand")
# Beyond any amount that is allowed, and small enough to be a float.
_NUMBER_MAX = 10**18


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A division to rehearse. Holders keep the order of the document."""

    rules: shares.Rules
    claims: tuple[shares.Claim, ...]


class Plan(TypedDict):
    """The answer: plain values, ready for JSON."""

    #: Units by dimension, by holder.
    grants: dict[str, dict[str, float]]
    #: A sentence per dimension, in the order of the limits, by holder.
    reasons: dict[str, list[str]]


def parse(document: object) -> PlanRequest:
    """The request that `document` describes.

    Raises `InvalidArgument` whose message and `field` name the path, such as `holders[1].demand.rpm_limit`.
    """
    body = _mapping(document, "document")
    _check_keys(body, _KEYS, "")
    if "limits" not in body:
        raise _wrong("limits", "is missing: name at least one dimension and its limit")
    limits = _limits(body["limits"])
    whole = {_string(name, f"integer[{index}]") for index, name in enumerate(_list(body, "integer"))}
    rules = shares.Rules(
        policy=_policy(body.get("policy", model.Policy.ACTIVE_SHARE.value)),
        limits=limits,
        quanta={name: quantity.MICRO if name in whole else 1 for name in limits},
        expected_workers=_whole_number(
            body.get("expected_workers", 4), "expected_workers", 1, EXPECTED_WORKERS_MAX
        ),
        scaling_enabled=_boolean(body.get("scaling_enabled", True), "scaling_enabled"),
    )
    entries = _list(body, "holders")
    if len(entries) > HOLDERS_MAX:
        raise _wrong("holders", f"{len(entries)} given, at most {HOLDERS_MAX} are allowed")
    claims = tuple(_claim(entry, f"holders[{index}]", limits) for index, entry in enumerate(entries))
    first_by_name: dict[str, int] = {}
    for index, claim in enumerate(claims):
        first = first_by_name.setdefault(claim.name, index)
        if first != index:
            raise _wrong(f"holders[{index}].name", f"{claim.name} is the name of holders[{first}] too")
    return PlanRequest(rules, claims)


def run(request: PlanRequest) -> Plan:
    """Divide as the allocator would, and say why."""
    division = shares.divide(request.rules, request.claims)
    dimensions = list(request.rules.limits)
    names = [claim.name for claim in request.claims]
    return {
        "grants": {
            name: {
                dimension: quantity.to_units(amount)
                for dimension, amount in zip(dimensions, division.targets[name], strict=True)
            }
            for name in names
        },
        "reasons": {name: [division.reason(name, dimension) for dimension in dimensions] for name in names},
    }


def _claim(entry: object, path: str, limits: Mapping[str, int]) -> shares.Claim:
    body = _mapping(entry, path)
    _check_keys(body, _HOLDER_KEYS, f"{path}.")
    if "name" not in body:
        raise _wrong(f"{path}.name", "is missing")
    demand = _mapping(body.get("demand", {}), f"{path}.demand")
    for dimension in demand:
        if dimension not in limits:
            known = f"; limits has {', '.join(limits)}"
            hint = _did_you_mean(dimension, limits)
            raise _wrong(f"{path}.demand.{_shown(dimension)}", f"no such dimension{hint or known}")
    return shares.Claim(
        name=model.checked_holder_name(_string(body["name"], f"{path}.name"), field_name=f"{path}.name"),
        is_active=_boolean(body.get("active", True), f"{path}.active"),
        weight=_weight(body.get("weight", 1), f"{path}.weight"),
        priority=_whole_number(body.get("priority", 0), f"{path}.priority", -PRIORITY_MAX, PRIORITY_MAX),
        demand={name: _micros(units, f"{path}.demand.{name}") for name, units in demand.items()},
    )


def _limits(value: object) -> dict[str, int]:
    body = _mapping(value, "limits")
    if not 1 <= len(body) <= model.DIMENSIONS_MAX:
        raise _wrong("limits", f"{len(body)} dimensions given, 1 to {model.DIMENSIONS_MAX} are allowed")
    limits = {}
    for name, units in body.items():
        path = f"limits.{_shown(name)}"
        limits[name] = _micros(units, path)
        try:
            model.Dimension(name=name, kind=model.DimensionKind.RATE, limit=limits[name])
        except errors.InvalidArgument as error:
            raise _wrong(path, f"not a dimension that a budget can have ({error.message})") from error
    return limits


def _policy(value: object) -> model.Policy:
    name = _string(value, "policy")
    known = [policy.value for policy in model.Policy]
    if name not in known:
        raise _wrong("policy", f"{_shown(name)!r} is not one of {', '.join(known)}{_did_you_mean(name, known)}")
    return model.Policy(name)


def _check_keys(body: Mapping[str, object], known: Collection[str], prefix: str) -> None:
    for key in body:
        if key not in known:
            hint = _did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise _wrong(f"{prefix}{_shown(key)}", f"unknown key{hint}")


def _mapping(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _wrong(path, f"{_type(value)}, where an object is expected")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(path, f"the key {key!r} is not text")
    return value


def _list(body: Mapping[str, object], key: str) -> list[object]:
    value = body.get(key, [])
    if not isinstance(value, list):
        raise _wrong(key, f"{_type(value)}, where a list is expected")
    return value


def _string(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, f"{_type(value)}, where text is expected")
    return value


def _boolean(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(path, f"{_type(value)}, where true or false is expected")
    return value


def _number(value: object, path: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(path, f"{_type(value)}, where a number is expected")
    if isinstance(value, int) and abs(value) > _NUMBER_MAX:
        raise _wrong(path, "a number beyond 1e18")
    if not math.isfinite(value):
        raise _wrong(path, f"{value} is not a finite number")
    return value


def _whole_number(value: object, path: str, least: int, most: int) -> int:
    number = _number(value, path)
    if number != int(number):
        raise _wrong(path, f"{number:g} is not a whole number")
    if not least <= number <= most:
        raise _wrong(path, f"{number:g} is not in {least} to {most}")
    return int(number)


def _weight(value: object, path: str) -> float:
    weight = _number(value, path)
    if not share_claims.WEIGHT_MIN <= weight <= share_claims.WEIGHT_MAX:
        raise _wrong(path, f"{weight:g} is not in 0.001 to 1e6")
    return float(weight)


def _micros(value: object, path: str) -> int:
    return quantity.to_micros(_number(value, path), field=path)


def _wrong(path: str, problem: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"{path}: {problem}", field=path)


def _did_you_mean(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word[:64], known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(text: str) -> str:
    """A key from outside, fit for one line of an error."""
    line = text.encode("unicode_escape").decode("ascii") or '""'
    return line if len(line) <= 60 else line[:57] + "..."


def _type(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
