"""Every budget of one leader's reign: routes events to the budgets' machines, gathers their effects.

Driver contract, in this order: (1) feed events with the present time; (2) `finish` takes the effects;
(3) write the records in one transaction that compares the epoch; (4) only then send the messages;
(5) feed what came of it.

A machine exists for one epoch: a leader that loses its epoch throws it away.
"""

from collections.abc import Iterable, Mapping

from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import effects, machine, messages, model


class Allocator:
    """The budgets of one epoch."""

    def __init__(self, epoch: epochs.Epoch) -> None:
        self.epoch = epoch
        self.budgets: dict[str, machine.BudgetMachine] = {}
        self._out: list[effects.Effect] = []
        #: In the order of the events, so that a run can be repeated.
        self._touched: dict[str, None] = {}
        #: (budget, holder) of each connection, so that its break finds them.
        self._sessions: dict[int, dict[tuple[str, str], None]] = {}

    # Definitions

    def restore_definition(
        self,
        spec: model.BudgetSpec,
        version: int,
        now: float,
        *,
        is_retired: bool = False,
        aftermath: aftermaths.Aftermath = aftermaths.NOTHING,
    ) -> None:
        """A definition of the leader before, from etcd; `aftermath` as in `effects.PutDefinition`."""
        budget = machine.BudgetMachine(
            spec, version, epoch=self.epoch, now=now, outbox=self._out, aftermath=aftermath.begun_at(now)
        )
        budget.is_retired = is_retired
        self.budgets[spec.name] = budget

    def restore_record(self, record: effects.Record, now: float) -> bool:
        """A record of the leader before; False if its budget is not known."""
        budget = self.budgets.get(record.budget)
        if budget is None:
            return False
        budget.restore(record, now)
        self._touched[record.budget] = None
        return True

    def has_record(self, budget: str, holder: str, incarnation: str) -> bool:
        """Whether etcd has, or is about to have, a record that this reign vouches for."""
        known = self.budgets.get(budget)
        return known is not None and known.book.has_record((holder, incarnation))

    def define(self, spec: model.BudgetSpec, version: int, now: float) -> None:
        """An administrator's definition, durable already. Check it with `check_definition` before it is."""
        budget = self.budgets.get(spec.name)
        if budget is None:
            self.budgets[spec.name] = machine.BudgetMachine(
                spec, version, epoch=self.epoch, now=now, outbox=self._out
            )
            self._out.append(effects.PutDefinition(spec, version))
        elif budget.version != version or budget.spec != spec or budget.is_retired:
            budget.redefine(spec, version, now)
        self._touched[spec.name] = None

    def check_definition(self, spec: model.BudgetSpec) -> None:
        """Refuse a change that the units in use could not follow: a dimension of another kind."""
        budget = self.budgets.get(spec.name)
        if budget is None:
            return
        for old in budget.spec.dimensions:
            for new in spec.dimensions:
                if new.name == old.name and new.kind is not old.kind:
                    where = f"dimensions.{new.name}.kind"
                    raise errors.InvalidArgument(
                        f"{where}: {old.name} is a {old.kind} dimension and cannot become {new.kind}; "
                        "give the new dimension another name",
                        field=where,
                    )

    def delete(self, name: str, now: float) -> None:
        """An administrator deleted a budget, durably already."""
        self.budget(name).retire(now)
        self._touched[name] = None

    def quarantine(self, name: str, now: float) -> None:
        """What an earlier etcd had granted of this budget is not known: everything counts as just used."""
        self.budget(name).quarantine_all(now)
        self._touched[name] = None

    def budget(self, name: str) -> machine.BudgetMachine:
        """The budget of that name; raises `NotFound`."""
        budget = self.budgets.get(name)
        if budget is None or budget.is_retired:
            raise errors.NotFound(f"there is no budget named {name!r}", field="budget")
        return budget

    # Holders

    def report(
        self,
        report: messages.Report,
        now: float,
        *,
        session: int | None = None,
        token: int | None = None,
        age_seconds: float | None = None,
    ) -> None:
        """A holder reported on a connection (`session`) or by a unary call (`token`).

        Raises `NotFound` or `InvalidArgument`; nothing is changed then.
        """
        model.checked_holder_name(report.holder)
        model.checked_incarnation(report.incarnation)
        budget = self.budget(report.budget)
        budget.report(report, now, session=session, token=token, age_seconds=age_seconds)
        if session is not None:
            self._sessions.setdefault(session, {})[(report.budget, report.holder)] = None
        self._touched[report.budget] = None

    def acquire(
        self,
        *,
        budget: str,
        holder: str,
        incarnation: str,
        demand: Mapping[str, int],
        process: processes.ProcessKey | None,
        token: int,
        now: float,
    ) -> None:
        """The unary twin asks for a lease. Raises as `report` does."""
        model.checked_holder_name(holder)
        model.checked_incarnation(incarnation, field_name="request_id")
        self.budget(budget).acquire(
            holder=holder, incarnation=incarnation, demand=demand, process=process, token=token, now=now
        )
        self._touched[budget] = None

    def release(self, release: messages.Release, now: float, *, token: int | None = None) -> None:
        """A holder gives its lease back. Raises `NotFound` for an unknown budget."""
        self.budget(release.budget).release(release, now, token=token)
        self._touched[release.budget] = None

    def session_closed(self, session: int, now: float) -> None:
        """A connection broke."""
        for budget, holder in self._sessions.pop(session, ()):
            if budget in self.budgets:
                self.budgets[budget].session_closed(holder, session, now)
                self._touched[budget] = None

    def process_exited(self, process: processes.ProcessKey, now: float) -> None:
        """A process is certified dead."""
        for name, budget in self.budgets.items():
            budget.process_exited(process, now)
            self._touched[name] = None

    def processes(self) -> set[processes.ProcessKey]:
        """Processes that hold leases."""
        leases = (held for budget in self.budgets.values() for held in budget.book.all_leases())
        return {held.process for held in leases if held.process is not None}

    # Time

    def next_deadline(self) -> float:
        """Instant at which `tick` has something to do; infinity if never."""
        return min((budget.next_deadline() for budget in self.budgets.values()), default=float("inf"))

    def tick(self, now: float) -> None:
        """Let time pass for every budget that has something due."""
        for name, budget in self.budgets.items():
            if budget.next_deadline() <= now:
                budget.tick(now)
                self._touched[name] = None

    def finish(self, now: float) -> list[effects.Effect]:
        """End a batch of events; what is to be done, in order."""
        for name in self._touched:
            budget = self.budgets[name]
            budget.finish(now)
            if budget.is_retired and budget.is_settled:
                del self.budgets[name]
        self._touched.clear()
        out = list(self._out)
        self._out.clear()
        return out

    def audit(self) -> None:
        """Assert the invariants of every budget."""
        for budget in self.budgets.values():
            budget.book.audit()

    def names(self) -> Iterable[str]:
        """Budgets in force."""
        return [name for name, budget in self.budgets.items() if not budget.is_retired]
