"""What people and programs read of a budget: status, snapshot, explanation. Nothing here changes anything."""

from dataclasses import dataclass

from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.core.budget.lease import Lease, LeaseState, Vector
from leasehold.core.budget.machine import BudgetMachine

STANDARD = tuple(model.STANDARD_KINDS)


@dataclass(frozen=True, slots=True)
class Status:
    """One worker's view of a budget. Amounts are units by dimension; None where the budget has no such one."""

    worker_id: str | None
    total_workers: int
    active_worker_ids: tuple[str, ...]
    is_scaling_enabled: bool
    base: dict[str, float | None]
    current: dict[str, float | None]
    ratio: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class HolderView:
    """One holder of a snapshot; amounts are micro-units in the order of the dimensions."""

    holder: str
    state: str
    is_active: bool
    target: Vector
    caps: Vector
    bound: Vector
    expires_in_seconds: float
    current_load: float
    active_tasks: int
    overdraft: Vector


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A budget at one instant; amounts are micro-units in the order of `names`."""

    names: tuple[str, ...]
    in_force: Vector
    pool: Vector
    holders: tuple[HolderView, ...]


@dataclass(frozen=True, slots=True)
class DimensionExplanation:
    """Why a holder has what it has of one dimension; micro-units."""

    dimension: str
    amount: int
    target: int
    bound: int
    cooling: int
    reason: str


def base_of(machine: BudgetMachine) -> Vector:
    """Everyone's share while nobody is active: limit / expected_workers, beyond that limit / registered."""
    seats = max(machine.spec.expected_workers, len(machine.book.leases))
    return tuple(
        limit // dimension.quantum // seats * dimension.quantum
        for limit, dimension in zip(machine.book.target_limits(), machine.spec.dimensions, strict=True)
    )


def status(machine: BudgetMachine, worker_id: str = "") -> Status:
    """One worker's view: `worker_id`, else the first active one by name, else the base.

    Raises `NotFound` if that worker holds no lease.
    """
    present = machine.book.leases
    active = tuple(sorted(name for name, held in present.items() if held.is_active))
    chosen: str | None = worker_id or (active[0] if active else None)
    if worker_id and worker_id not in present:
        raise errors.NotFound(f"budget {machine.spec.name} has no worker {worker_id!r}", field="worker_id")
    base = base_of(machine)
    current = present[chosen].caps if chosen is not None else base
    names = [*STANDARD, *(name for name in machine.book.names if name not in STANDARD)]

    def by_name(vector: tuple[float, ...]) -> dict[str, float | None]:
        known = dict(zip(machine.book.names, vector, strict=True))
        return {name: known.get(name) for name in names}

    ratio = tuple(c / b if b else 0.0 for c, b in zip(current, base, strict=True))
    return Status(
        worker_id=chosen,
        total_workers=len(present),
        active_worker_ids=active,
        is_scaling_enabled=machine.spec.scaling_enabled,
        base=by_name(tuple(map(quantity.to_units, base))),
        current=by_name(tuple(map(quantity.to_units, current))),
        ratio=by_name(ratio),
    )


def snapshot(machine: BudgetMachine, now: float) -> Snapshot:
    """The whole budget at `now`: present holders, ghosts, and what cools of those who are gone."""
    book = machine.book
    views = [_view(held, now) for held in book.all_leases()]
    for holder in book.stranded:
        if holder not in book.leases:
            until = max(part.until for part in book.stranded[holder])
            views.append(
                HolderView(
                    holder,
                    "cooling",
                    False,
                    book.zero,
                    book.zero,
                    book.stranded_of(holder),
                    max(0.0, until - now),
                    0.0,
                    0,
                    book.zero,
                )
            )
    views.sort(key=lambda view: (view.holder, view.state))
    return Snapshot(book.names, tuple(book.in_force), tuple(book.pool()), tuple(views))


def _view(held: Lease, now: float) -> HolderView:
    state = "cooling" if held.state is LeaseState.GHOST else held.state.value
    return HolderView(
        held.holder,
        state,
        held.is_active,
        held.target,
        held.caps,
        held.bound,
        max(0.0, held.expires_at - now),
        held.current_load,
        held.active_tasks,
        held.overdraft,
    )


def explain(machine: BudgetMachine, holder: str, now: float) -> list[DimensionExplanation]:
    """Why `holder` has what it has, dimension by dimension; of one that is gone, what still counts for it.

    Raises `NotFound` if it holds no lease and nothing of it counts.
    """
    held = machine.book.leases.get(holder)
    if held is None and holder in machine.book.stranded:
        return _explained_gone(machine, holder, now)
    if held is None:
        raise errors.NotFound(f"budget {machine.spec.name} has no holder {holder!r}", field="holder")
    stranded = machine.book.stranded_of(holder)
    return [
        _explained(machine, held, index, dimension, stranded[index], now)
        for index, dimension in enumerate(machine.spec.dimensions)
    ]


def _explained_gone(machine: BudgetMachine, holder: str, now: float) -> list[DimensionExplanation]:
    explained: list[DimensionExplanation] = []
    counted = machine.book.stranded_of(holder)
    for index, dimension in enumerate(machine.spec.dimensions):
        reason = "0: its lease has ended"
        if counted[index]:
            last = max(part.until for part in machine.book.stranded[holder] if part.index == index)
            reason += (
                f"; {quantity.text(counted[index])} still count, the last for {max(0.0, last - now):.0f} s"
            )
        explained.append(DimensionExplanation(dimension.name, 0, 0, counted[index], counted[index], reason))
    return explained


def _counted_elsewhere(machine: BudgetMachine, holder: str, index: int) -> str:
    """What of the limit nobody present can be given, and for whom it counts; empty if there is nothing."""
    book = machine.book
    gone = {name: book.stranded_of(name)[index] for name in book.stranded if name != holder}
    gone = {name: amount for name, amount in gone.items() if amount}
    if not gone:
        return ""
    total = quantity.text(sum(gone.values()))
    whom = " and ".join(sorted(gone)) if len(gone) <= 2 else f"{len(gone)} holders"
    return f"{total} of {quantity.text(book.target_limits()[index])} still count for {whom}, who ended"


def _explained(
    machine: BudgetMachine, held: Lease, index: int, dimension: model.Dimension, stranded: int, now: float
) -> DimensionExplanation:
    cooling = sum(amount for _, amount in held.cooling_after(dimension.name, now))
    cap, target, bound = held.caps[index], held.target[index], held.bound[index]
    division = machine.rebalancer.division
    parts: list[str] = []
    if division is not None and held.holder in division.targets:
        parts.append(division.reason(held.holder, dimension.name))
    detail = f"held {quantity.text(bound)}"
    if cooling:
        detail += f", cooling {quantity.text(cooling)}"
    parts.append(detail)
    if elsewhere := _counted_elsewhere(machine, held.holder, index):
        parts.append(elsewhere)
    if stranded:
        parts.append(
            f"{quantity.text(stranded)} of an earlier life of this holder still count against its share"
        )
    if cap < target:
        short = quantity.text(target - cap)
        free = machine.book.pool()[index]
        how = "the next renewal brings them" if free >= target - cap else "they come as others give up theirs"
        parts.append(f"waits for {short} more: {quantity.text(free)} are free, {how}")
    if cap > target:
        parts.append(f"is giving up {quantity.text(cap - target)}")
    if held.state is LeaseState.SUSPECT:
        parts.append("its connection is broken: counted in full, not grown")
    return DimensionExplanation(dimension.name, cap, target, bound, cooling, "; ".join(parts))


def story(machine: BudgetMachine, holder: str, now: float) -> list[str]:
    """The last events of a holder, oldest first."""
    held = machine.book.leases.get(holder)
    if held is None:
        return []
    lines: list[str] = []
    for at, event in held.story:
        if isinstance(event, str):
            what = event
        else:
            what = "granted " + ", ".join(
                f"{name} {quantity.text(amount)}"
                for name, amount in zip(machine.book.names, event, strict=False)
            )
        lines.append(f"{now - at:.1f} s ago: {what}")
    return lines
