"""What the lease machine of one budget says: grants and last words to holders, lines to ledger and story."""

import dataclasses
from collections.abc import Mapping

from leasehold.core import epoch as epochs
from leasehold.core.budget import book as books
from leasehold.core.budget import effects, messages, model, rebalance, stock
from leasehold.core.budget.lease import Lease, Vector


class Scribe:
    """Writes a machine's words into its outbox; moves no unit."""

    def __init__(
        self,
        spec: model.BudgetSpec,
        epoch: epochs.Epoch,
        book: books.Book,
        rebalancer: rebalance.Rebalancer,
        outbox: list[effects.Effect],
    ) -> None:
        self._spec = spec
        self._epoch = epoch
        self._book = book
        self._rebalancer = rebalancer
        self._out = outbox
        self._terms = _terms_of(spec)
        self._terms_version = 1
        #: (active holders, what each is paced by), as told last.
        self._pace: tuple[int, Vector] = (-1, ())

    def redefine(self, spec: model.BudgetSpec) -> None:
        """The budget changed: every holder is told the new terms with its next grant."""
        self._spec = spec
        self._terms = _terms_of(spec)
        self._terms_version += 1
        self._pace = (-1, ())

    def safe_of(self, holder: str) -> Vector:
        """Safe capacity of a holder as it is defined now; empty where there is none."""
        safe = self._spec.holder_class(holder).safe_capacity
        return tuple(safe.get(name, 0) for name in self._book.names) if safe else ()

    # To holders

    def grant(
        self,
        held: Lease,
        *,
        answered_sequence: int = 0,
        ttl_seconds: float = 0.0,
        end: messages.LeaseEnd | None = None,
    ) -> messages.Grant:
        """What is to be said of a lease now; with the terms, if this connection has not heard these."""
        terms = None
        if end is None and held.terms_version != self._terms_version:
            held.terms_version = self._terms_version
            terms = self._terms_for(held.holder)
            safe = self.safe_of(held.holder)
            held.safe = tuple(map(max, held.safe, safe)) if held.safe and safe else held.safe or safe
        active_workers = self._rebalancer.active_count
        if end is None:
            held.tell_pace(self._pace_of(active_workers))
        return messages.Grant(
            budget=self._spec.name,
            holder=held.holder,
            incarnation=held.incarnation,
            lease_id=held.lease_id,
            epoch=self._epoch,
            version=held.version,
            answered_sequence=answered_sequence,
            ttl_seconds=ttl_seconds,
            refresh_seconds=self._spec.refresh_seconds,
            amounts=dict(zip(self._book.names, held.caps, strict=True)),
            terms=terms,
            end=end,
            total_workers=len(self._book.leases),
            active_workers=active_workers,
        )

    def _pace_of(self, active_workers: int) -> Vector:
        if self._pace[0] != active_workers:
            shares = tuple(stock.pace_share(d.limit, active_workers) for d in self._spec.dimensions)
            self._pace = (active_workers, shares)
        return self._pace[1]

    def _terms_for(self, holder: str) -> messages.Terms:
        safe = self._spec.holder_class(holder).safe_capacity
        return dataclasses.replace(self._terms, safe_capacity=safe) if safe else self._terms

    def push(self, held: Lease) -> None:
        """Say it on the holder's connection, if it has one."""
        if held.session is not None:
            self._out.append(effects.Send(held.session, self.grant(held)))

    def deliver(self, grant: messages.Grant, session: int | None, token: int | None) -> None:
        """Say it to whoever asked: a unary call, or a connection."""
        if token is not None:
            self._out.append(effects.Reply(token, grant))
        elif session is not None:
            self._out.append(effects.Send(session, grant))

    def answer_over(
        self, report: messages.Report, end: messages.LeaseEnd, session: int | None, token: int | None
    ) -> None:
        """The last word to an incarnation that has no lease any more."""
        reason = "a newer incarnation of this holder has joined" if end is messages.LeaseEnd.SUPERSEDED else ""
        grant = messages.Grant(
            budget=self._spec.name,
            holder=report.holder,
            incarnation=report.incarnation,
            lease_id=report.lease_id,
            epoch=self._epoch,
            version=report.grant_version,
            answered_sequence=report.sequence,
            end=end,
            reason=reason,
        )
        self.deliver(grant, session, token)

    # To be remembered

    def note(self, held: Lease, now: float, line: str) -> None:
        """A line of the holder's story."""
        held.story.append((now, line))

    def note_shares(self, held: Lease, now: float) -> None:
        """The holder has new caps."""
        held.story.append((now, held.caps))
        self.journal("GRANTED", held, amounts=self._book.amounts(held.caps))

    def journal(
        self,
        event: str,
        held: Lease | None = None,
        *,
        amounts: Mapping[str, int] | None = None,
        cause: str = "",
    ) -> None:
        """A line of the ledger: of a lease, or of the budget as a whole."""
        if held is None:
            self._out.append(
                effects.Journal(budget=self._spec.name, event=event, amounts=amounts or {}, cause=cause)
            )
            return
        self._out.append(
            effects.Journal(
                budget=self._spec.name,
                event=event,
                holder=held.holder,
                incarnation=held.incarnation,
                lease_id=held.lease_id,
                amounts=self._book.amounts(held.caps) if amounts is None else amounts,
                cause=cause,
            )
        )


def _terms_of(spec: model.BudgetSpec) -> messages.Terms:
    return messages.Terms(
        dimensions=spec.dimensions,
        arrival_jitter_seconds=spec.arrival_jitter_seconds,
        max_call_seconds=spec.max_call_seconds,
        activity_timeout_seconds=spec.activity_timeout_seconds,
        safe_ttl_seconds=spec.safe_ttl_seconds,
        max_tokens_per_request=spec.max_tokens_per_request,
        charged_at=spec.charged_at,
    )
