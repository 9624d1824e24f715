"""Budget definitions between proto and core.

Decoding applies what `budget.proto` says of fields that are left out, and raises `InvalidArgument` naming the
field, with the names that a YAML file of budgets uses.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from google.protobuf import duration_pb2, timestamp_pb2
from leasehold.api.budget.v1 import budget_pb2
from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.rpc import wire_values

_KINDS: Final[Mapping[int, model.DimensionKind]] = {
    budget_pb2.DIMENSION_KIND_RATE: model.DimensionKind.RATE,
    budget_pb2.DIMENSION_KIND_CONCURRENCY: model.DimensionKind.CONCURRENCY,
    budget_pb2.DIMENSION_KIND_SLOTS: model.DimensionKind.SLOTS,
}
_POLICIES: Final[Mapping[int, model.Policy]] = {
    budget_pb2.POLICY_UNSPECIFIED: model.Policy.ACTIVE_SHARE,
    budget_pb2.POLICY_ACTIVE_SHARE: model.Policy.ACTIVE_SHARE,
    budget_pb2.POLICY_MAX_MIN: model.Policy.MAX_MIN,
    budget_pb2.POLICY_PROPORTIONAL: model.Policy.PROPORTIONAL,
    budget_pb2.POLICY_STATIC: model.Policy.STATIC,
}
_CHARGED_AT: Final[Mapping[int, model.ChargedAt]] = {
    budget_pb2.CHARGED_AT_UNSPECIFIED: model.ChargedAt.ARRIVAL,
    budget_pb2.CHARGED_AT_ARRIVAL: model.ChargedAt.ARRIVAL,
    budget_pb2.CHARGED_AT_COMPLETION: model.ChargedAt.COMPLETION,
}
# The later of two keys wins, and none of the unspecified values is last.
_KIND_NUMBERS: Final = {kind: number for number, kind in _KINDS.items()}
_POLICY_NUMBERS: Final = {policy: number for number, policy in _POLICIES.items()}
_CHARGED_AT_NUMBERS: Final = {charged: number for number, charged in _CHARGED_AT.items()}

#: Duration fields of the message, and the names of the same in `BudgetSpec`.
_DURATIONS: Final = (
    ("activity_timeout", "activity_timeout_seconds"),
    ("ttl", "ttl_seconds"),
    ("refresh_interval", "refresh_seconds"),
    ("window", "window_seconds"),
    ("arrival_jitter", "arrival_jitter_seconds"),
    ("max_call", "max_call_seconds"),
    ("orphan_call", "orphan_seconds"),
    ("safe_ttl", "safe_ttl_seconds"),
)


def decode_budget(message: budget_pb2.Budget) -> model.BudgetSpec:
    """The definition; version and update time, which are output only, are passed over."""
    given: dict[str, Any] = {"name": message.name}
    for wire_name, name in _DURATIONS:
        if message.HasField(wire_name):  # type: ignore[arg-type]  # the stub wants literals
            given[name] = wire_values.decode_seconds(getattr(message, wire_name), name)
    if message.expected_workers:
        given["expected_workers"] = message.expected_workers
    if message.HasField("scaling_enabled"):
        given["scaling_enabled"] = message.scaling_enabled
    return model.BudgetSpec(
        dimensions=decode_dimensions(message.dimensions, given.get("window_seconds", 60.0)),
        policy=decode_policy(message.policy),
        holder_classes=tuple(_decode_holder_class(item) for item in message.holder_classes),
        max_tokens_per_request=wire_values.decode_units(
            message.max_tokens_per_request, "max_tokens_per_request"
        ),
        charged_at=decode_charged_at(message.charged_at),
        **given,
    )


def encode_budget(
    spec: model.BudgetSpec, *, version: int = 0, update_time: datetime | None = None
) -> budget_pb2.Budget:
    """The message, defaults written out. `update_time` has a time zone."""
    message = budget_pb2.Budget(
        name=spec.name,
        dimensions=[encode_dimension(dimension) for dimension in spec.dimensions],
        policy=encode_policy(spec.policy),
        holder_classes=[_encode_holder_class(item) for item in spec.holder_classes],
        expected_workers=spec.expected_workers,
        scaling_enabled=spec.scaling_enabled,
        max_tokens_per_request=spec.max_tokens_per_request / quantity.MICRO,
        charged_at=encode_charged_at(spec.charged_at),
        version=version,
    )
    for wire_name, name in _DURATIONS:
        seconds = getattr(spec, name)
        if seconds is not None:
            field: duration_pb2.Duration = getattr(message, wire_name)
            field.CopyFrom(wire_values.encode_seconds(seconds))
    if update_time is not None:
        stamp = timestamp_pb2.Timestamp()
        stamp.FromDatetime(update_time)
        message.update_time.CopyFrom(stamp)
    return message


def decode_dimensions(
    dimensions: Iterable[budget_pb2.Dimension], window_seconds: float
) -> tuple[model.Dimension, ...]:
    """Dimensions in their order; a rate that declares no window has `window_seconds`."""
    return tuple(_decode_dimension(item, window_seconds) for item in dimensions)


def _decode_dimension(message: budget_pb2.Dimension, window_seconds: float) -> model.Dimension:
    where = f"dimensions.{message.name[:63]}"
    kind = _KINDS.get(message.kind)
    if message.kind == budget_pb2.DIMENSION_KIND_UNSPECIFIED:
        kind = model.STANDARD_KINDS.get(message.name)
    if kind is None:
        known = ", ".join(model.STANDARD_KINDS)
        raise errors.InvalidArgument(
            f"{where}.kind: is missing or unknown; only {known} imply theirs", field=f"{where}.kind"
        )
    limit = wire_values.decode_units(message.limit, f"{where}.limit")
    if message.HasField("window"):
        if kind is not model.DimensionKind.RATE:
            raise errors.InvalidArgument(
                f"{where}.window_seconds: only a rate has a window", field=f"{where}.window_seconds"
            )
        window_seconds = wire_values.decode_seconds(message.window, f"{where}.window_seconds")
    if kind is not model.DimensionKind.RATE:
        return model.Dimension(name=message.name, kind=kind, limit=limit)
    return model.Dimension(name=message.name, kind=kind, limit=limit, window_seconds=window_seconds)


def encode_dimension(dimension: model.Dimension) -> budget_pb2.Dimension:
    """The message; the window is set for a rate only."""
    message = budget_pb2.Dimension(
        name=dimension.name,
        kind=_KIND_NUMBERS[dimension.kind],  # type: ignore[arg-type]  # the table's keys are these values
        limit=dimension.limit / quantity.MICRO,
    )
    if dimension.is_rate:
        message.window.CopyFrom(wire_values.encode_seconds(dimension.window_seconds))
    return message


def _decode_holder_class(message: budget_pb2.HolderClass) -> model.HolderClass:
    return model.HolderClass(
        pattern=message.pattern,
        weight=message.weight or 1.0,
        priority=message.priority,
        safe_capacity=wire_values.decode_amounts(message.safe_capacity, "holder_classes.safe_capacity"),
    )


def _encode_holder_class(holder_class: model.HolderClass) -> budget_pb2.HolderClass:
    return budget_pb2.HolderClass(
        pattern=holder_class.pattern,
        weight=holder_class.weight,
        priority=holder_class.priority,
        safe_capacity=wire_values.encode_amounts(holder_class.safe_capacity),
    )


def decode_policy(number: int) -> model.Policy:
    """The policy; unspecified is `active_share`. Raises `InvalidArgument` for a number that is none."""
    policy = _POLICIES.get(number)
    if policy is None:
        raise errors.InvalidArgument(f"policy: {number} is no known policy", field="policy")
    return policy


def encode_policy(policy: model.Policy) -> budget_pb2.Policy.ValueType:
    """The enum number of a policy."""
    return _POLICY_NUMBERS[policy]  # type: ignore[return-value]  # the table's keys are these values


def decode_charged_at(number: int) -> model.ChargedAt:
    """When cooling begins; unspecified is at arrival. Raises `InvalidArgument` for a number that is none."""
    charged_at = _CHARGED_AT.get(number)
    if charged_at is None:
        raise errors.InvalidArgument(f"charged_at: {number} is not known", field="charged_at")
    return charged_at


def encode_charged_at(charged_at: model.ChargedAt) -> budget_pb2.ChargedAt.ValueType:
    """The enum number of `charged_at`."""
    return _CHARGED_AT_NUMBERS[charged_at]  # type: ignore[return-value]  # the table's keys are these values
