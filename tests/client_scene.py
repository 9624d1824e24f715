"""A scene for unit tests of the client: a real engine, a clock that moves when told, grants by hand."""

from collections.abc import Mapping
from typing import Any

from fake_allocator import LIMITS, terms_of
from leasehold.client import budgets, engine, permits
from leasehold.core import epoch as epochs
from leasehold.core.budget import messages
from leasehold.core.budget.quantity import MICRO
from leasehold.runtime import clock as clocks


class Scene:
    """One worker on one budget."""

    def __init__(self, now_seconds: float = 1000.0, *, start: Any = None) -> None:
        self.clock = clocks.ManualClock(now_seconds)
        self.pokes = 0
        self.engine = engine.Engine(budget="llm-api", name="w", now=self.clock.now, start=start)
        self.engine.poke = self._poke
        self.budget = budgets.Budget(self.engine)
        self.async_budget = budgets.AsyncBudget(self.engine)
        self.session = 1
        self.version = 0
        self.lease_id = 7
        self.reports: list[messages.Report] = []

    def _poke(self) -> None:
        self.pokes += 1

    @property
    def now(self) -> float:
        """The clock's reading."""
        return self.clock.now()

    @property
    def limiter(self) -> Any:
        """The limiter under the engine."""
        return self.engine.limiter

    def report(self) -> messages.Report | None:
        """Let the I/O thread's turn come; what it would send."""
        report, _ = self.engine.turn()
        if report is not None:
            self.reports.append(report)
        return report

    def grant(self, amounts: Mapping[str, float] = LIMITS, **changes: Any) -> None:
        """An answer to the last report (or, with ``answered_sequence=0``, a push) of these amounts."""
        self.version += 1
        given: dict[str, Any] = {
            "budget": "llm-api",
            "holder": self.engine.name,
            "incarnation": self.engine.holder.incarnation,
            "lease_id": self.lease_id,
            "epoch": epochs.Epoch(1, 1),
            "version": self.version,
            "answered_sequence": self.reports[-1].sequence if self.reports else 0,
            "ttl_seconds": 10.0,
            "refresh_seconds": 2.0,
            "amounts": {name: round(units * MICRO) for name, units in amounts.items()},
            "total_workers": 2,
            "active_workers": 1,
        }
        self.engine.granted(self.session, messages.Grant(**(given | changes)))

    def join(self, limits: Mapping[str, float] = LIMITS, **changes: Any) -> None:
        """Connect, and be granted all of `limits`, as a worker known as active."""
        self.engine.connected(self.session)
        self.engine.update_activity(is_active=True, current_load=0.0, active_tasks=0)
        self.report()
        self.grant(limits, terms=terms_of(limits, **changes))

    def renew(self) -> None:
        """A report, and the answer that leaves the amounts as they are."""
        self.engine.holder.ask_again()
        self.engine.report_throttled(messages.Throttle())
        self.report()
        self.version -= 1
        self.grant({name: units / MICRO for name, units in self.limiter.amounts().items()})

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.clock.advance(seconds)


def is_short(permit: permits.BasePermit) -> bool:
    """Whether a permit came through the short path, and is still in the opening that it came through."""
    return permit._window >= 0
