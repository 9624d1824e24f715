"""Budgets as plain JSON values, the same for the command line and over HTTP. Light: it needs no gRPC."""

from collections.abc import Iterable
from typing import Any, Final

from typing_extensions import TypedDict

#: Dimension -> its short name: in utilization_ratio, and in headings.
SHORT_NAMES: Final = {
    "max_concurrent_requests": "concurrent",
    "rpm_limit": "rpm",
    "tpm_limit": "tpm",
    "num_workers": "workers",
}


class BudgetStatus(TypedDict):
    """One worker's view of a budget. The four standard dimensions are always there, null where it has none."""

    worker_id: str | None
    total_workers: int
    active_workers: int
    active_worker_ids: list[str]
    is_scaling_enabled: bool
    base_allocation: dict[str, float | None]
    current_allocation: dict[str, float | None]
    utilization_ratio: dict[str, float | None]


def status(answer: Any) -> BudgetStatus:
    """The document of a ``GetBudgetStatusResponse``, with exactly the keys that programs know.

    The four standard dimensions are always there, null where the budget has no such one; the user's own follow.
    """
    own = sorted(name for name in answer.base_allocation.amounts if name not in SHORT_NAMES)
    names = [*SHORT_NAMES, *own]

    def amounts(allocation: Any) -> dict[str, float | None]:
        return {name: allocation.amounts.get(name) for name in names}

    ratio = amounts(answer.utilization_ratio)
    return {
        "worker_id": answer.worker_id if answer.HasField("worker_id") else None,
        "total_workers": answer.total_workers,
        "active_workers": answer.active_workers,
        "active_worker_ids": list(answer.active_worker_ids),
        "is_scaling_enabled": answer.is_scaling_enabled,
        "base_allocation": amounts(answer.base_allocation),
        "current_allocation": amounts(answer.current_allocation),
        "utilization_ratio": {SHORT_NAMES.get(name, name): value for name, value in ratio.items()},
    }


def in_order(names: Iterable[str]) -> list[str]:
    """Dimensions as people expect them: the standard four first, the user's own by name."""
    present = set(names)
    standard = [name for name in SHORT_NAMES if name in present]
    return [*standard, *sorted(present.difference(standard))]
