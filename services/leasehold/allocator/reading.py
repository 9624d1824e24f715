"""Answers to those who read: from the core's views to the wire."""

import time
from collections.abc import Mapping

from google.protobuf import timestamp_pb2
from leasehold.allocator import reign as reigns
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.budget import machine, model, plan, quantity, views
from leasehold.core.budget.lease import Vector
from leasehold.postgres import port
from leasehold.rpc import budget_codec, common_codec, wire_values

_STATES = {
    "live": wire.HOLDER_STATE_LIVE,
    "suspect": wire.HOLDER_STATE_SUSPECT,
    "cooling": wire.HOLDER_STATE_COOLING,
}


def status(budget: machine.BudgetMachine, worker_id: str) -> wire.GetBudgetStatusResponse:
    """One worker's view."""
    view = views.status(budget, worker_id)

    def allocation(amounts: Mapping[str, float | None]) -> wire.WorkerAllocation:
        return wire.WorkerAllocation(amounts={n: a for n, a in amounts.items() if a is not None})

    response = wire.GetBudgetStatusResponse(
        total_workers=view.total_workers,
        active_workers=len(view.active_worker_ids),
        active_worker_ids=view.active_worker_ids,
        is_scaling_enabled=view.is_scaling_enabled,
        base_allocation=allocation(view.base),
        current_allocation=allocation(view.current),
        utilization_ratio=allocation(view.ratio),
    )
    if view.worker_id is not None:
        response.worker_id = view.worker_id
    return response


def snapshot(reign: reigns.Reign, name: str) -> wire.WatchBudgetResponse:
    """The whole budget now. Raises `NotFound`."""
    view = views.snapshot(reign.core.budget(name), reign.now())
    read_time = timestamp_pb2.Timestamp()
    read_time.FromNanoseconds(time.time_ns())
    return wire.WatchBudgetResponse(
        budget=name,
        epoch=common_codec.encode_epoch(reign.epoch),
        limits_in_force=_amounts(view.names, view.in_force),
        pool=_amounts(view.names, view.pool),
        holders=[_holder(view.names, holder) for holder in view.holders],
        read_time=read_time,
    )


def _amounts(names: tuple[str, ...], vector: Vector) -> dict[str, float]:
    return {name: amount / quantity.MICRO for name, amount in zip(names, vector, strict=False)}


def _holder(names: tuple[str, ...], view: views.HolderView) -> wire.HolderView:
    return wire.HolderView(
        holder=view.holder,
        state=_STATES[view.state],
        is_active=view.is_active,
        target=_amounts(names, view.target),
        amounts=_amounts(names, view.caps),
        bound=_amounts(names, view.bound),
        expires_in=wire_values.encode_seconds(view.expires_in_seconds),
        current_load=view.current_load,
        active_tasks=view.active_tasks,
        overdraft_total=_amounts(names, view.overdraft),
    )


def explanation(reign: reigns.Reign, name: str, holder: str) -> wire.ExplainLeaseResponse:
    """Why a holder has what it has. Raises `NotFound`."""
    budget = reign.core.budget(name)
    now = reign.now()
    explained = views.explain(budget, holder, now)
    told = [view for view in views.snapshot(budget, now).holders if view.holder == holder]
    # A name that lives again may also have a superseded life that still counts.
    found = min(told, key=lambda view: view.state == "cooling")
    return wire.ExplainLeaseResponse(
        holder=_holder(budget.book.names, found),
        dimensions=[
            wire.DimensionExplanation(
                dimension=item.dimension,
                amount=item.amount / quantity.MICRO,
                target=item.target / quantity.MICRO,
                bound=item.bound / quantity.MICRO,
                cooling=item.cooling / quantity.MICRO,
                reason=item.reason,
            )
            for item in explained
        ],
        story=views.story(budget, holder, now),
    )


def ledger_entry(stored: port.StoredLedgerEntry) -> wire.LedgerEntry:
    """A line of the ledger."""
    entry = stored.entry
    message = wire.LedgerEntry(
        id=stored.id,
        budget=entry.budget,
        holder=entry.holder,
        incarnation=entry.incarnation,
        lease_id=entry.lease_id,
        event=entry.event,
        amounts=dict(entry.amounts),
        cause=entry.cause,
        epoch=common_codec.encode_epoch(stored.epoch),
    )
    message.time.FromDatetime(entry.time)
    return message


def planned(request: wire.PlanSharesRequest, spec: model.BudgetSpec | None) -> wire.PlanSharesResponse:
    """The dry run. `spec` fills in what the request leaves out. Raises `InvalidArgument` naming the field."""
    document: dict[str, object] = {
        "policy": budget_codec.decode_policy(request.policy).value,
        "limits": dict(request.limits),
        "expected_workers": request.expected_workers or 4,
        "integer": list(request.integer),
        "scaling_enabled": request.scaling_enabled if request.HasField("scaling_enabled") else True,
        "holders": [_plan_holder(holder, spec) for holder in request.holders],
    }
    if spec is not None:
        _fill_in(document, request, spec)
    if not document["limits"]:
        raise errors.InvalidArgument("limits: give them, or name a budget", field="limits")
    answer = plan.run(plan.parse(document))
    return wire.PlanSharesResponse(
        shares=[
            wire.PlannedShare(holder=name, amounts=amounts, reasons=answer["reasons"][name])
            for name, amounts in answer["grants"].items()
        ]
    )


def _fill_in(document: dict[str, object], request: wire.PlanSharesRequest, spec: model.BudgetSpec) -> None:
    if not request.policy:
        document["policy"] = spec.policy.value
    if not request.limits:
        document["limits"] = {d.name: quantity.to_units(d.limit) for d in spec.dimensions}
    if not request.expected_workers:
        document["expected_workers"] = spec.expected_workers
    if not request.integer:
        document["integer"] = [d.name for d in spec.dimensions if not d.is_rate]
    if not request.HasField("scaling_enabled"):
        document["scaling_enabled"] = spec.scaling_enabled


def _plan_holder(holder: wire.PlanHolder, spec: model.BudgetSpec | None) -> dict[str, object]:
    known = spec.holder_class(holder.name) if spec is not None else model.DEFAULT_CLASS
    return {
        "name": holder.name,
        "active": holder.active if holder.HasField("active") else True,
        "weight": holder.weight if holder.HasField("weight") else known.weight,
        "priority": holder.priority or known.priority,
        "demand": dict(holder.demand),
    }
