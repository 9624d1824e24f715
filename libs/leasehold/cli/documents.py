"""Between the wire and what commands read and print."""

import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from google.protobuf import json_format
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.cli import output
from leasehold.core import errors
from leasehold.core.budget import codec, model
from leasehold.rpc import budget_codec
from leasehold.runtime import budgets_yaml


def read_budgets(file: str) -> tuple[model.BudgetSpec, ...]:
    """The budgets of a YAML file, or of standard input (`-`). Raises `InvalidArgument`, naming the field."""
    try:
        text = sys.stdin.read() if file == "-" else pathlib.Path(file).read_text("utf-8")
    except OSError as error:
        raise errors.InvalidArgument(f"{file}: {error.strerror}", field="file") from error
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{file}: is not UTF-8", field="file") from error
    return budgets_yaml.parse(text)


def budget_document(message: budget_pb2.Budget) -> dict[str, Any]:
    """A definition with the keys of the budgets file, its version beside it."""
    return codec.encode_budget(budget_codec.decode_budget(message))


def policy_name(message: budget_pb2.Budget) -> str:
    """Such as `active_share`."""
    return budget_codec.decode_policy(message.policy).value


def kind_name(dimension: budget_pb2.Dimension) -> str:
    """Such as `rate / 60 s`."""
    kind = budget_pb2.DimensionKind.Name(dimension.kind).removeprefix("DIMENSION_KIND_").lower()
    if dimension.HasField("window"):
        return f"{kind} / {output.number(dimension.window.ToMilliseconds() / 1000)} s"
    return kind


def state_name(view: wire.HolderView) -> str:
    """Such as `live`."""
    return wire.HolderState.Name(view.state).removeprefix("HOLDER_STATE_").lower()


def message_document(message: Any) -> dict[str, Any]:
    """A message with the names of its .proto, as JSON-able data."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Dimensions as people expect them: the standard four first, the user's own by name."""
    present = set(names)
    standard = [name for name in model.STANDARD_KINDS if name in present]
    return [*standard, *sorted(present.difference(standard))]


def print_state(state: wire.WatchBudgetResponse, form: output.Format) -> None:
    """One state of a watched budget."""
    if form is output.Format.NAME:
        print(" ".join(view.holder for view in state.holders), flush=True)
        return
    if form is not output.Format.TABLE:
        output.line(message_document(state))
        return
    names = in_order(state.limits_in_force)
    rows = [
        [
            view.holder,
            state_name(view),
            "yes" if view.is_active else "no",
            *(f"{output.number(view.amounts.get(n))}/{output.number(view.bound.get(n))}" for n in names),
        ]
        for view in state.holders
    ]
    rows.append(["(pool)", "", "", *(output.number(state.pool[n]) for n in names)])
    rows.append(["(limit)", "", "", *(output.number(state.limits_in_force[n]) for n in names)])
    print(state.read_time.ToDatetime().strftime("%H:%M:%S.%f")[:-3], "UTC: has/counted")
    output.table(["HOLDER", "STATE", "ACTIVE", *names], rows, right=names)
    sys.stdout.flush()


def ledger_row(entry: wire.LedgerEntry) -> list[str]:
    """One line of the ledger's table."""
    amounts = " ".join(f"{name}={output.number(entry.amounts[name])}" for name in in_order(entry.amounts))
    time = entry.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return [time, entry.budget, entry.event, entry.holder, amounts, entry.cause]
