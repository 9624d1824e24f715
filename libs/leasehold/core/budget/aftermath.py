"""What earlier definitions of a budget still bind after an administrator changed it.

A holder goes by the terms that it heard last, until it hears the new ones or its lease has run out; a call that
began under them, or a safe capacity that is in use, goes on by their durations. Units of a dimension that was
taken out are still counted by the provider, and must be if the dimension comes back. All of that outlives a
change of leaders: it is written with the definition, as seconds that are left.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from leasehold.core.budget import lease as leases
from leasehold.core.budget import model
from leasehold.core.budget.lease import Vector

#: Holder and incarnation that units of a dimension stand under which has come back.
EARLIER_DEFINITION = "earlier-definition"
#: Sets of classes that are told apart; older ones are taken together, with the most that any of them allowed.
SAFE_CLASSES_MAX = 8

Classes = tuple[model.HolderClass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierTerms:
    """The longest durations, and the safe capacities, that somebody may still go by."""

    #: Instant from which nobody does.
    until: float
    max_call_seconds: float
    orphan_seconds: float
    safe_ttl_seconds: float
    #: Holder classes of earlier definitions, the latest first; only such that give safe capacity.
    safe_classes: tuple[Classes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A dimension that was taken out while units of it were outstanding."""

    name: str
    #: Micro-units.
    amount: int
    #: Instant from which the provider counts none of them.
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Aftermath:
    """Of one budget. Instants are of the leader's clock; in an effect, seconds that were left at its making."""

    terms: EarlierTerms | None = None
    removed: tuple[Removed, ...] = ()

    # What it means

    def rules(self, spec: model.BudgetSpec) -> leases.StrandRules:
        """How long lost units count: by `spec`, or by earlier durations where these are longer."""
        earlier = self.terms
        if earlier is None:
            return leases.StrandRules.of(spec)
        return leases.StrandRules.of(
            dataclasses.replace(
                spec,
                max_call_seconds=max(spec.max_call_seconds, earlier.max_call_seconds),
                orphan_seconds=max(spec.orphan_call_seconds, earlier.orphan_seconds),
                safe_ttl_seconds=max(spec.safe_ttl_seconds, earlier.safe_ttl_seconds),
            )
        )

    def safe_of(self, holder: str, names: Sequence[str]) -> Vector:
        """The most safe capacity that an earlier definition gave a holder; empty where none did."""
        given = [
            model.class_of(classes, holder).safe_capacity
            for classes in (self.terms.safe_classes if self.terms else ())
        ]
        most = tuple(max((safe.get(name, 0) for safe in given), default=0) for name in names)
        return most if any(most) else ()

    def next_end(self) -> float:
        """Instant at which something of it is over."""
        return min(self._ends(), default=float("inf"))

    def _ends(self) -> Iterator[float]:
        if self.terms is not None:
            yield self.terms.until
        for each in self.removed:
            yield each.until

    # Its life

    def after(
        self, spec: model.BudgetSpec, following: model.BudgetSpec, outstanding: Sequence[int], now: float
    ) -> "Aftermath":
        """The same once `following` takes the place of `spec`, of which `outstanding` micro-units are."""
        rules = self.rules(spec)
        # A lease outlives the news by a TTL at most, a call or a safe capacity that began then by its own time.
        unheard_seconds = spec.ttl_seconds * leases.TTL_FACTOR
        lasting_seconds = max(rules.max_call_seconds, rules.orphan_seconds, rules.safe_ttl_seconds)
        earlier = self.terms
        terms = EarlierTerms(
            until=max(now + unheard_seconds + lasting_seconds, earlier.until if earlier else now),
            max_call_seconds=max(spec.max_call_seconds, earlier.max_call_seconds if earlier else 0.0),
            orphan_seconds=max(spec.orphan_call_seconds, earlier.orphan_seconds if earlier else 0.0),
            safe_ttl_seconds=max(spec.safe_ttl_seconds, earlier.safe_ttl_seconds if earlier else 0.0),
            safe_classes=_with_classes(spec.holder_classes, earlier.safe_classes if earlier else ()),
        )
        present = {dimension.name for dimension in following.dimensions}
        removed = [each for each in self.removed if each.name not in present]
        for index, dimension in enumerate(spec.dimensions):
            if dimension.name not in present and outstanding[index] > 0:
                # Who does not hear of it spends on for a TTL, and its safe capacity after that.
                lost_at = now + unheard_seconds + rules.safe_ttl_seconds
                until = lost_at + rules.lost_seconds(index)
                removed.append(Removed(name=dimension.name, amount=outstanding[index], until=until))
        return Aftermath(terms=terms, removed=tuple(removed))

    def returning(self, following: model.BudgetSpec) -> list[Removed]:
        """Dimensions that were taken out, and that `following` has again."""
        present = {dimension.name for dimension in following.dimensions}
        return [each for each in self.removed if each.name in present]

    def at(self, now: float) -> "Aftermath":
        """What of it is not over yet."""
        if self.next_end() > now:
            return self
        return Aftermath(
            terms=self.terms if self.terms is not None and self.terms.until > now else None,
            removed=tuple(each for each in self.removed if each.until > now),
        )

    def left_at(self, now: float) -> "Aftermath":
        """With seconds that are left in place of instants."""
        return self._moved(lambda until: max(0.0, until - now))

    def begun_at(self, now: float) -> "Aftermath":
        """The inverse, at a successor whose clock is another: all that was left begins anew."""
        return self._moved(lambda seconds: now + seconds * leases.TTL_FACTOR)

    def _moved(self, move: Callable[[float], float]) -> "Aftermath":
        terms = self.terms
        return Aftermath(
            terms=None if terms is None else dataclasses.replace(terms, until=move(terms.until)),
            removed=tuple(dataclasses.replace(each, until=move(each.until)) for each in self.removed),
        )


NOTHING = Aftermath()


def _with_classes(present: Classes, earlier: tuple[Classes, ...]) -> tuple[Classes, ...]:
    """`earlier`, and before them `present` if it gives safe capacity; each set once."""
    plain = tuple(
        model.HolderClass(pattern=each.pattern, safe_capacity=dict(each.safe_capacity)) for each in present
    )
    if any(each.safe_capacity for each in plain) and plain not in earlier:
        earlier = (plain, *earlier)
    if len(earlier) <= SAFE_CLASSES_MAX:
        return earlier
    kept, old = earlier[: SAFE_CLASSES_MAX - 1], earlier[SAFE_CLASSES_MAX - 1 :]
    most: dict[str, int] = {}
    for each in (each for classes in old for each in classes):
        for name, amount in each.safe_capacity.items():
            most[name] = max(most.get(name, 0), amount)
    return (*kept, (model.HolderClass(pattern="*", safe_capacity=most),))
