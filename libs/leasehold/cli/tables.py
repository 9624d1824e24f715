"""What people see: budgets, shares and history as tables that fit a terminal of 80 columns where they can."""

from collections.abc import Mapping, Sequence
from typing import Any

from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.cli import output
from leasehold.core.budget import model
from leasehold.rpc import budget_codec, budget_documents

#: So many names are listed before the rest is counted.
NAMES_MAX = 5


def heading(dimension: str) -> str:
    """Such as RPM; the user's own dimensions keep their names."""
    short = budget_documents.SHORT_NAMES.get(dimension)
    return dimension if short is None else short.upper()


def budgets(messages: Sequence[budget_pb2.Budget]) -> None:
    """One line for each budget; dimensions of the users' own share a column."""
    specs = [(message, {d.name: d for d in message.dimensions}) for message in messages]
    standard = [name for name in budget_documents.SHORT_NAMES if any(name in dims for _, dims in specs)]
    has_others = any(set(dims).difference(budget_documents.SHORT_NAMES) for _, dims in specs)
    titles = [heading(name) for name in standard]
    rows = [
        [
            message.name,
            budget_codec.decode_policy(message.policy).value,
            str(message.expected_workers),
            str(message.version),
            *(_limit(dims.get(name)) for name in standard),
            *([_others(message)] if has_others else []),
        ]
        for message, dims in specs
    ]
    columns = ["NAME", "POLICY", "EXPECTED", "VERSION", *titles, *(["OTHERS"] if has_others else [])]
    output.table(columns, rows, right=["EXPECTED", "VERSION", *titles])


def _limit(dimension: budget_pb2.Dimension | None) -> str:
    if dimension is None:
        return "-"
    seconds = dimension.window.ToMilliseconds() / 1000
    is_usual = not dimension.HasField("window") or seconds == 60
    return output.number(dimension.limit) + ("" if is_usual else f"/{output.seconds(seconds)}")


def _others(message: budget_pb2.Budget) -> str:
    others = [d for d in message.dimensions if d.name not in budget_documents.SHORT_NAMES]
    return ", ".join(f"{d.name} {_limit(d)}" for d in others) or "-"


def budget(answer: wire.GetBudgetResponse) -> None:
    """A definition in words, its dimensions with the limits in force, and its classes of holders."""
    spec = budget_codec.decode_budget(answer.budget)
    tokens = spec.max_tokens_per_request / 1e6
    facts = {
        "policy": spec.policy.value,
        "expected workers": str(spec.expected_workers),
        "scaling": "on" if spec.scaling_enabled else "off: everyone stays at its base",
        "idle after": output.seconds(spec.activity_timeout_seconds),
        "lease": f"{output.seconds(spec.ttl_seconds)}, renewed every {output.seconds(spec.refresh_seconds)}",
        "a call": f"at most {output.seconds(spec.max_call_seconds)}, "
        f"orphaned {output.seconds(spec.orphan_call_seconds)}, "
        f"{output.number(tokens) if tokens else 'any number of'} tokens",
        "charged at": f"{spec.charged_at.value}, up to {output.seconds(spec.arrival_jitter_seconds)} later",
        "safe capacity": f"for {output.seconds(spec.safe_ttl_seconds)} after expiry",
    }
    output.lines([f"budget {answer.budget.name}, version {answer.budget.version}"])
    output.lines([f"  {name:<17} {value}" for name, value in facts.items()])
    rows = [
        [d.name, _kind(d), output.number(d.limit), output.number(answer.limits_in_force.get(d.name))]
        for d in answer.budget.dimensions
    ]
    output.lines([""])
    output.table(["DIMENSION", "KIND", "LIMIT", "IN FORCE"], rows, right=["LIMIT", "IN FORCE"])
    if spec.holder_classes:
        output.lines([""])
        _holder_classes(spec.holder_classes)


def _kind(dimension: budget_pb2.Dimension) -> str:
    """Such as `rate in 60 s`."""
    kind = budget_pb2.DimensionKind.Name(dimension.kind).removeprefix("DIMENSION_KIND_").lower()
    if dimension.HasField("window"):
        return f"{kind} in {output.seconds(dimension.window.ToMilliseconds() / 1000)}"
    return kind


def _holder_classes(classes: Sequence[model.HolderClass]) -> None:
    rows = [
        [
            each.pattern,
            output.number(each.weight),
            str(each.priority),
            amounts({name: micros / 1e6 for name, micros in each.safe_capacity.items()}) or "-",
        ]
        for each in classes
    ]
    columns = ["HOLDERS", "WEIGHT", "PRIORITY", "SAFE CAPACITY"]
    output.table(columns, rows, right=["WEIGHT", "PRIORITY"])


def amounts(units: Mapping[str, float]) -> str:
    """Such as `rpm 200, tpm 10000`."""
    return ", ".join(
        f"{budget_documents.SHORT_NAMES.get(name, name)} {output.number(units[name])}"
        for name in budget_documents.in_order(units)
    )


def status(document: Mapping[str, Any]) -> None:
    """One worker's view, from its document."""
    active = document["active_worker_ids"]
    names = ", ".join(active[:NAMES_MAX])
    if len(active) > NAMES_MAX:
        names += f" and {len(active) - NAMES_MAX} more"
    output.lines(
        [
            f"worker   {document['worker_id'] or 'none is active; what each would have is shown'}",
            f"workers  {document['total_workers']} registered, {len(active)} active"
            + (f": {names}" if names else ""),
            *([] if document["is_scaling_enabled"] else ["scaling  off: everyone stays at its base"]),
            "",
        ]
    )
    rows = [
        [
            name,
            output.number(base),
            output.number(document["current_allocation"][name]),
            output.number(document["utilization_ratio"][budget_documents.SHORT_NAMES.get(name, name)]),
        ]
        for name, base in document["base_allocation"].items()
        if base is not None
    ]
    columns = ["DIMENSION", "BASE", "NOW", "NOW/BASE"]
    output.table(columns, rows, right=columns[1:])


def state(answer: wire.WatchBudgetResponse, *, width: int | None = None) -> str:
    """A budget at one instant: holders, what nobody holds, and the limits; a column adds up to its limit."""
    names = budget_documents.in_order(answer.limits_in_force)
    titles = [heading(name) for name in names]
    rows = [
        [
            view.holder,
            holder_state(view),
            "yes" if view.is_active else "no",
            *(_has_and_counted(view.amounts[name], view.bound[name]) for name in names),
        ]
        for view in answer.holders
    ]
    rows.append(["(free)", "", "", *(output.number(answer.pool[name]) for name in names)])
    rows.append(["(limit)", "", "", *(output.number(answer.limits_in_force[name]) for name in names)])
    time = answer.read_time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
    overdrafts = [
        f"{view.holder} has used more than it reserved: {amounts(over)}"
        for view in answer.holders
        if (over := {name: units for name, units in view.overdraft_total.items() if units})
    ]
    text = output.grid(["HOLDER", "STATE", "ACTIVE", *titles], rows, right=titles, width=width)
    legend = "; a/b: has a, and b counts against the limit" if "/" in text else ""
    return "\n".join([f"{answer.budget}, {time} UTC{legend}", text, *overdrafts])


def _has_and_counted(has: float, counted: float) -> str:
    if has == counted:
        return output.number(has)
    return f"{output.number(has)}/{output.number(counted)}"


def holder_state(view: wire.HolderView) -> str:
    """Such as `live`."""
    return wire.HolderState.Name(view.state).removeprefix("HOLDER_STATE_").lower()


def explanation(holder: str, answer: wire.ExplainLeaseResponse) -> None:
    """What a holder has, why, and its last events."""
    activity = "active" if answer.holder.is_active else "idle"
    remaining = answer.holder.expires_in.ToMilliseconds() / 1000
    output.lines(
        [f"{holder}: {holder_state(answer.holder)}, {activity}, its lease runs {remaining:.1f} s more", ""]
    )
    rows = [[d.dimension, output.number(d.amount), d.reason] for d in answer.dimensions]
    output.table(["DIMENSION", "HAS", "WHY"], rows, right=["HAS"])
    if answer.story:
        output.lines(["", *answer.story])


def plan(answer: Mapping[str, Any]) -> None:
    """The dry run's grants, each with its reason."""
    rows = [
        [holder, dimension, output.number(amount), reason]
        for holder, granted in answer["grants"].items()
        for (dimension, amount), reason in zip(granted.items(), answer["reasons"][holder], strict=True)
    ]
    output.table(["HOLDER", "DIMENSION", "GETS", "WHY"], rows, right=["GETS"])


def ledger(entries: Sequence[wire.LedgerEntry], *, has_budget: bool) -> None:
    """The history, newest first; `has_budget` tells that all are of one budget, which is not repeated."""
    columns = ["TIME (UTC)", "BUDGET", "EVENT", "HOLDER", "CAUSE", "AMOUNTS"]
    rows = [
        [
            entry.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3],
            entry.budget or "-",
            entry.event,
            entry.holder or "-",
            entry.cause or "-",
            amounts(entry.amounts) or "-",
        ]
        for entry in entries
    ]
    if has_budget:
        columns, rows = _without(1, columns), [_without(1, row) for row in rows]
    output.table(columns, rows)


def _without(index: int, cells: Sequence[str]) -> list[str]:
    return [*cells[:index], *cells[index + 1 :]]
