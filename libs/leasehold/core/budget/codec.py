"""Budget definitions as plain data: what Postgres's jsonb, etcd's copy and the YAML file of budgets hold.

Limits are numbers of units, durations are ``*_seconds``. Keys that are left out take the defaults of
`model.BudgetSpec`. Whatever is wrong raises `InvalidArgument` that names the place, as in
``budgets[2].dimensions.rpm_limit.limit``. In a file::

    budgets:
      - name: openai
        dimensions:
          rpm_limit: 800                          # short: one of the four standard names
          tpm_limit: {limit: 40000, window_seconds: 30}
          image_limit: {kind: rate, limit: 50}    # any other name says its kind
        policy: max_min
        holder_classes:
          - {pattern: "batch-*", weight: 0.5, safe_capacity: {rpm_limit: 10}}
"""

import difflib
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from leasehold.core import errors
from leasehold.core.budget import model, quantity

BUDGETS_IN_FILE_MAX = 10_000

_SECONDS_KEYS = (
    "activity_timeout_seconds",
    "ttl_seconds",
    "refresh_seconds",
    "window_seconds",
    "arrival_jitter_seconds",
    "max_call_seconds",
    "safe_ttl_seconds",
)
_BUDGET_KEYS = (
    "name",
    "dimensions",
    "policy",
    "holder_classes",
    "expected_workers",
    "scaling_enabled",
    *_SECONDS_KEYS,
    "orphan_seconds",
    "max_tokens_per_request",
    "charged_at",
)
_DIMENSION_KEYS = ("name", "kind", "limit", "window_seconds")
_HOLDER_CLASS_KEYS = ("pattern", "weight", "priority", "safe_capacity")

_Choice = TypeVar("_Choice", bound=enum.StrEnum)


def encode_budget(spec: model.BudgetSpec) -> dict[str, Any]:
    """The definition as JSON-able data, defaults included, so that it means the same when defaults change.

    `decode_budget` gives an equal spec back, but for `window_seconds` of a dimension that is no rate, which
    means nothing and is not kept.
    """
    encoded: dict[str, Any] = {
        "name": spec.name,
        "dimensions": [_encode_dimension(dimension) for dimension in spec.dimensions],
        "policy": spec.policy.value,
        "holder_classes": [_encode_holder_class(holder_class) for holder_class in spec.holder_classes],
        "expected_workers": spec.expected_workers,
        "scaling_enabled": spec.scaling_enabled,
        **{key: _plain(getattr(spec, key)) for key in _SECONDS_KEYS},
        "max_tokens_per_request": _units(spec.max_tokens_per_request),
        "charged_at": spec.charged_at.value,
    }
    if spec.orphan_seconds is not None:
        encoded["orphan_seconds"] = _plain(spec.orphan_seconds)
    return encoded


def decode_budget(mapping: object, path: str = "") -> model.BudgetSpec:
    """Inverse of `encode_budget`. `path` is where `mapping` stands, for the fields that errors name."""
    source = _mapping(mapping, path or "budget")
    _refuse_unknown_keys(source, _BUDGET_KEYS, path)
    given: dict[str, Any] = {}
    for key in ("name", "dimensions"):
        if key not in source:
            where = _at(path, key)
            raise errors.InvalidArgument(f"{where}: is missing", field=where)
    given["name"] = _text(source["name"], _at(path, "name"))
    for key in (*_SECONDS_KEYS, "orphan_seconds"):
        if key in source and not (key == "orphan_seconds" and source[key] is None):
            given[key] = _number(source[key], _at(path, key))
    if "policy" in source:
        given["policy"] = _choice(model.Policy, source["policy"], _at(path, "policy"))
    if "charged_at" in source:
        given["charged_at"] = _choice(model.ChargedAt, source["charged_at"], _at(path, "charged_at"))
    if "expected_workers" in source:
        given["expected_workers"] = _whole(source["expected_workers"], _at(path, "expected_workers"))
    if "scaling_enabled" in source:
        given["scaling_enabled"] = _boolean(source["scaling_enabled"], _at(path, "scaling_enabled"))
    if "max_tokens_per_request" in source:
        where = _at(path, "max_tokens_per_request")
        given["max_tokens_per_request"] = _micros(source["max_tokens_per_request"], where)
    window_seconds = given.get("window_seconds", 60.0)
    given["dimensions"] = _decode_dimensions(source["dimensions"], path, window_seconds)
    if "holder_classes" in source:
        given["holder_classes"] = _decode_holder_classes(source["holder_classes"], path)
    return _built(model.BudgetSpec, given, path)


def decode_budget_file(parsed_yaml: object) -> tuple[model.BudgetSpec, ...]:
    """The budgets of a file whose YAML has been parsed, in its order. ``budgets: []`` is none."""
    if parsed_yaml is None:
        raise errors.InvalidArgument("budgets: the file is empty; `budgets: []` means none", field="budgets")
    source = _mapping(parsed_yaml, "budgets")
    _refuse_unknown_keys(source, ("budgets",), "")
    if "budgets" not in source:
        raise errors.InvalidArgument("budgets: is missing", field="budgets")
    definitions = _list(source["budgets"], "budgets")
    if len(definitions) > BUDGETS_IN_FILE_MAX:
        raise errors.InvalidArgument(
            f"budgets: {len(definitions)} given, at most {BUDGETS_IN_FILE_MAX} are allowed", field="budgets"
        )
    index_by_name: dict[str, int] = {}
    specs = []
    for index, definition in enumerate(definitions):
        spec = decode_budget(definition, f"budgets[{index}]")
        first = index_by_name.setdefault(spec.name, index)
        if first != index:
            where = f"budgets[{index}].name"
            raise errors.InvalidArgument(f"{where}: {spec.name} is defined in budgets[{first}]", field=where)
        specs.append(spec)
    return tuple(specs)


def _encode_dimension(dimension: model.Dimension) -> dict[str, Any]:
    encoded = {
        "name": dimension.name,
        "kind": dimension.kind.value,
        "limit": _units(dimension.limit),
    }
    if dimension.is_rate:
        encoded["window_seconds"] = _plain(dimension.window_seconds)
    return encoded


def _encode_holder_class(holder_class: model.HolderClass) -> dict[str, Any]:
    return {
        "pattern": holder_class.pattern,
        "weight": _plain(holder_class.weight),
        "priority": holder_class.priority,
        "safe_capacity": {name: _units(micros) for name, micros in holder_class.safe_capacity.items()},
    }


def _decode_dimensions(value: object, path: str, window_seconds: float) -> tuple[model.Dimension, ...]:
    """From a mapping by name (short or long form), or a list of long forms, each with its name."""
    where = _at(path, "dimensions")
    if isinstance(value, Mapping):
        named = []
        for key, form in value.items():
            name = _text(key, where)
            place = f"{where}.{_shown(name)}"
            if isinstance(form, Mapping) and "name" in form:
                raise errors.InvalidArgument(
                    f"{place}.name: the key is the name already", field=f"{place}.name"
                )
            named.append((name, form, place))
    else:
        named = []
        for index, form in enumerate(_list(value, where)):
            long_form = _mapping(form, f"{where}[{index}]")
            if "name" not in long_form:
                raise errors.InvalidArgument(
                    f"{where}[{index}].name: is missing", field=f"{where}[{index}].name"
                )
            name = _text(long_form["name"], f"{where}[{index}].name")
            named.append((name, long_form, f"{where}[{index}]"))
    return tuple(_decode_dimension(name, form, place, path, window_seconds) for name, form, place in named)


def _decode_dimension(name: str, form: object, where: str, path: str, window_seconds: float) -> model.Dimension:
    source = form if isinstance(form, Mapping) else {"limit": form}
    _refuse_unknown_keys(source, _DIMENSION_KEYS, where)
    if "limit" not in source:
        raise errors.InvalidArgument(f"{where}.limit: is missing", field=f"{where}.limit")
    given: dict[str, Any] = {"name": name, "limit": _micros(source["limit"], f"{where}.limit")}
    if "kind" in source:
        given["kind"] = _choice(model.DimensionKind, source["kind"], f"{where}.kind")
    elif name in model.STANDARD_KINDS:
        given["kind"] = model.STANDARD_KINDS[name]
    else:
        raise errors.InvalidArgument(
            f"{where}.kind: is missing; only {', '.join(model.STANDARD_KINDS)} imply theirs"
            + _did_you_mean(_shown(name), model.STANDARD_KINDS),
            field=f"{where}.kind",
        )
    if given["kind"] is model.DimensionKind.RATE:
        given["window_seconds"] = window_seconds
        if "window_seconds" in source:
            given["window_seconds"] = _number(source["window_seconds"], f"{where}.window_seconds")
    elif "window_seconds" in source:
        raise errors.InvalidArgument(
            f"{where}.window_seconds: {name} is of kind {given['kind']}, only a rate has a window",
            field=f"{where}.window_seconds",
        )
    return _built(model.Dimension, given, path)


def _decode_holder_classes(value: object, path: str) -> tuple[model.HolderClass, ...]:
    holder_classes = []
    for index, item in enumerate(_list(value, _at(path, "holder_classes"))):
        where = _at(path, f"holder_classes[{index}]")
        source = _mapping(item, where)
        _refuse_unknown_keys(source, _HOLDER_CLASS_KEYS, where)
        if "pattern" not in source:
            raise errors.InvalidArgument(f"{where}.pattern: is missing", field=f"{where}.pattern")
        given: dict[str, Any] = {"pattern": _text(source["pattern"], f"{where}.pattern")}
        if "weight" in source:
            given["weight"] = _number(source["weight"], f"{where}.weight")
        if "priority" in source:
            given["priority"] = _whole(source["priority"], f"{where}.priority")
        if "safe_capacity" in source:
            capacities = _mapping(source["safe_capacity"], f"{where}.safe_capacity")
            given["safe_capacity"] = {
                _text(name, f"{where}.safe_capacity"): _micros(units, f"{where}.safe_capacity.{_shown(name)}")
                for name, units in capacities.items()
            }
        holder_classes.append(_built(model.HolderClass, given, path, holder_class_index=index))
    return tuple(holder_classes)


_Built = TypeVar("_Built", model.BudgetSpec, model.Dimension, model.HolderClass)


def _built(
    cls: type[_Built], given: Mapping[str, Any], path: str, *, holder_class_index: int | None = None
) -> _Built:
    """`cls(**given)`, whose complaints are about the place in the input rather than in the spec."""
    try:
        return cls(**given)
    except errors.InvalidArgument as error:
        field = error.field or ""
        message = error.message
        if holder_class_index is not None:
            message = message.replace("holder_classes.", f"holder_classes[{holder_class_index}].", 1)
            field = field.replace("holder_classes.", f"holder_classes[{holder_class_index}].", 1)
        if path:
            message = f"{path}.{message}"  # the model's messages begin with the field
        raise errors.InvalidArgument(message, field=_at(path, field)) from error


def _at(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(key: object) -> str:
    """A key of the input, as errors may repeat it: one line, not long."""
    text = str(key)[:60]
    return text if text.isprintable() else ascii(text)


def _plain(number: float) -> float:
    """Whole numbers without their ``.0``, as people write them."""
    return int(number) if number == int(number) else number


def _units(micros: int) -> float:
    return _plain(quantity.to_units(micros))


def _kind_of(value: object) -> str:
    if value is None:
        return "empty"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "a mapping" if isinstance(value, Mapping) else type(value).__name__)


def _wrong_type(value: object, wanted: str, where: str) -> errors.InvalidArgument:
    hint = ""
    if isinstance(value, str) and wanted.endswith("number") and _is_number(value):
        hint = " (written without quotes, and an exponent as in 1.0e+9)"
    return errors.InvalidArgument(f"{where}: is {_kind_of(value)}, not {wanted}{hint}", field=where)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mapping(value: object, where: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, "a mapping", where)
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong_type(value, "a list", where)
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(value, "text", where)
    return value


def _boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(value, "true or false", where)
    return value


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(value, "a whole number", where)
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(value, "a number", where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise errors.InvalidArgument(f"{where}: is not a finite number", field=where)
    return number


def _micros(value: object, where: str) -> int:
    return quantity.to_micros(_number(value, where), field=where)


def _choice(choices: type[_Choice], value: object, where: str) -> _Choice:
    text = _text(value, where)
    try:
        return choices(text)
    except ValueError:
        allowed = [choice.value for choice in choices]
        raise errors.InvalidArgument(
            f"{where}: {text[:60]!r} is not one of {', '.join(allowed)}{_did_you_mean(text, allowed)}",
            field=where,
        ) from None


def _refuse_unknown_keys(source: Mapping[object, object], known: Iterable[str], path: str) -> None:
    allowed = list(known)
    for key in source:
        if key in allowed:
            continue
        where = _at(path, _shown(key))
        raise errors.InvalidArgument(
            f"{where}: there is no such key{_did_you_mean(_shown(key), allowed)}", field=where
        )


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    allowed = list(known)
    # A name without its unit or its last word (`ttl`, `rpm`) is too short for difflib.
    begun = [word for word in allowed if text and word.startswith(f"{text}_")]
    close = begun or difflib.get_close_matches(text, allowed, n=1)
    return f"; did you mean {close[0]}?" if close else ""
