"""The lease machine of one budget: events in, effects out.

Every public method but the readers is one event; `finish` ends an event, or a batch of them: it moves shares
and answers what was asked. Time is an input, seconds on the allocator's CLOCK_MONOTONIC. Units reach a holder
only out of the pool, and the pool only out of what a holder has acknowledged to have given up, or what the
provider can no longer count.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from leasehold.core import epoch as epochs
from leasehold.core import processes
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import book as books
from leasehold.core.budget import effects, messages, model, rebalance, scribe
from leasehold.core.budget import lease as leases
from leasehold.core.budget.lease import Lease, LeaseState, Vector

#: An acquire by the unary twin is answered at the latest after so long, with what there is.
ACQUIRE_WAIT_SECONDS = 1.0
#: Lease ids of one leader are its election's revision and a counter of so many bits.
_LEASE_COUNT_BITS = 24

UNKNOWN_PAST = "unknown-past"


@dataclass(slots=True)
class _Answer:
    held: Lease
    sequence: int
    session: int | None
    token: int | None
    #: A repeat: told the remaining TTL, never a new one.
    is_repeat: bool
    #: It did not name this lease: an earlier answer or push, with the terms, was void to it.
    needs_terms: bool = False


class BudgetMachine:
    """All leases of one budget."""

    def __init__(
        self,
        spec: model.BudgetSpec,
        version: int,
        *,
        epoch: epochs.Epoch,
        now: float,
        outbox: list[effects.Effect],
        aftermath: aftermaths.Aftermath = aftermaths.NOTHING,
    ) -> None:
        self.spec = spec
        self.version = version
        self.epoch = epoch
        self.is_retired = False
        self.book = books.Book(spec, now, aftermath=aftermath)
        self.rebalancer = rebalance.Rebalancer(rotation=int(now // rebalance.ROTATION_SECONDS))
        self._out = outbox
        self._scribe = scribe.Scribe(spec, epoch, self.book, self.rebalancer, outbox)
        self._lease_count = 0
        self._expiry_heap: list[tuple[float, int, Lease]] = []
        self._expiry_count = 0
        self._answers: list[_Answer] = []
        self._waiting_acquires: dict[int, tuple[Lease, float]] = {}

    # Definition

    def redefine(self, spec: model.BudgetSpec, version: int, now: float) -> None:
        """An administrator changed the budget. A limit that falls binds as units return."""
        self.spec, self.version, self.is_retired = spec, version, False
        self.book.redefine(spec, now)
        self._scribe.redefine(spec)
        self._put_definition(now)
        self._scribe.journal(
            "REDEFINED", amounts={d.name: d.limit for d in spec.dimensions}, cause=f"version {version}"
        )
        for held in self.book.leases.values():
            self._scribe.note(held, now, f"budget redefined, version {version}")
            held.set_caps(held.caps)
            held.unpaced_version = held.version
            if held.state is LeaseState.LIVE and held.session is not None:
                self._scribe.push(held)
        self.rebalancer.must_divide = True
        self.rebalancer.next_at = now

    def retire(self, now: float) -> None:
        """An administrator deleted the budget: every lease ends; used units still cool, and are remembered."""
        for held in self.book.all_leases():
            if held.session is not None:
                self._out.append(
                    effects.Send(held.session, self._scribe.grant(held, end=messages.LeaseEnd.BUDGET_DELETED))
                )
            # The holder may not hear of it before its lease runs out.
            self._lose(held, held.expires_at, now, messages.LeaseEnd.BUDGET_DELETED)
        for token, (held, _) in self._waiting_acquires.items():
            self._out.append(
                effects.Reply(token, self._scribe.grant(held, end=messages.LeaseEnd.BUDGET_DELETED))
            )
        self._waiting_acquires.clear()
        self.is_retired = True
        self._scribe.journal("BUDGET_DELETED")
        if not self.is_settled:
            self._put_definition(now)

    def _put_definition(self, now: float) -> None:
        left = self.book.aftermath.left_at(now)
        self._out.append(
            effects.PutDefinition(self.spec, self.version, is_retired=self.is_retired, aftermath=left)
        )

    @property
    def is_settled(self) -> bool:
        """Nothing is outstanding: a retired budget may be forgotten."""
        return self.book.is_settled

    # Takeover

    def restore(self, record: effects.Record, now: float) -> None:
        """A record of the leader before: its TTL, or its cooling, begins anew now."""
        book = self.book
        bound = tuple(record.amounts.get(name, 0) for name in book.names)
        held = Lease(
            holder=record.holder,
            incarnation=record.incarnation,
            lease_id=record.lease_id,
            expires_at=now + record.ttl_seconds * leases.TTL_FACTOR,
            last_report_at=now,
            caps=bound,
            bound=bound,
            state=LeaseState.SUSPECT,
            ttl_seconds=record.ttl_seconds,
            safe=self._most_safe(record.holder),
            is_tracked=record.is_tracked,
            is_recovered=True,
            held=bound,
            target=bound,
            is_active=any(bound),
            last_served=self.rebalancer.served_count,
        )
        if record.is_cooling:
            end = now + record.ttl_seconds * leases.TTL_FACTOR
            book.strand(leases.strand_unknown(held, book.rules, end), now, ttl_seconds=record.ttl_seconds)
        else:
            self._restore_lease(held, is_superseded=record.is_superseded)
        book.restored(record)
        self.rebalancer.must_divide = True

    def _most_safe(self, holder: str) -> Vector:
        """Safe capacity of a holder by the present definition, or by an earlier one that it may go by."""
        present = self._scribe.safe_of(holder)
        earlier = self.book.aftermath.safe_of(holder, self.book.names)
        return tuple(map(max, present, earlier)) if present and earlier else present or earlier

    def _restore_lease(self, held: Lease, *, is_superseded: bool) -> None:
        rival = self.book.leases.get(held.holder)
        if is_superseded or (rival is not None and rival.lease_id > held.lease_id):
            self.book.ghost(held)
        else:
            if rival is not None:
                self.book.ghost(rival)
            self.book.add(held)
        self._schedule_expiry(held)

    def quarantine_all(self, now: float) -> None:
        """Nothing is known of what was granted under an earlier etcd: every unit counts as just used."""
        everything = self.book.target_limits()
        lost = Lease(UNKNOWN_PAST, UNKNOWN_PAST, 0, now, now, everything, everything)
        end = now + self.spec.ttl_seconds * leases.TTL_FACTOR
        parts = leases.strand_unknown(lost, self.book.rules, end)
        self.book.strand(parts, now, ttl_seconds=self.spec.ttl_seconds)
        self._scribe.journal(
            "QUARANTINED", amounts=self.book.amounts(everything), cause="a new etcd cluster was accepted"
        )

    # Holders' events

    def report(
        self,
        report: messages.Report,
        now: float,
        *,
        session: int | None = None,
        token: int | None = None,
        age_seconds: float | None = None,
    ) -> None:
        """A holder reported; `age_seconds` is how long ago it did, None where that is not known.

        Raises `InvalidArgument` for a dimension that the budget does not have; nothing is changed then.
        """
        self._check_dimensions(report)
        held = self.book.leases.get(report.holder)
        if held is None or held.incarnation != report.incarnation:
            end, is_stale = self._is_over(held, report, session, now - (age_seconds or 0.0))
            if end is not None:
                self._scribe.answer_over(report, end, session, token)
            if end is not None or is_stale:
                return
            held = self._join(report, held, session, now)
        elif report.sequence <= held.sequence:
            if token is not None:
                self._answers.append(_Answer(held, report.sequence, session, token, is_repeat=True))
            return
        elif report.lease_id != held.lease_id:
            self._rejoin(held, report, session, now)
        self._take_report(held, report, age_seconds, now, session)
        # A unary answer may be lost: until its version is acknowledged the terms go with the next one too.
        needs_terms = report.lease_id != held.lease_id or (
            token is not None and report.grant_version < held.version
        )
        self._answers.append(
            _Answer(held, report.sequence, session, token, is_repeat=False, needs_terms=needs_terms)
        )

    def _check_dimensions(self, report: messages.Report) -> None:
        for field_name, amounts in (("demand", report.demand), ("waiting_cost", report.waiting_cost)):
            for name in amounts:
                if name not in self.book.index:
                    self.spec.dimension(name, field_name=field_name)
        for throttled in report.throttles:
            if throttled.dimension and throttled.dimension not in self.book.index:
                self.spec.dimension(throttled.dimension, field_name="throttles.dimension")

    def _is_over(
        self, held: Lease | None, report: messages.Report, session: int | None, made_at: float
    ) -> tuple[messages.LeaseEnd | None, bool]:
        """(the last word for an incarnation that cannot join, whether the report is passed over).

        `made_at`: when the report was made, as far as that is known.
        """
        key = (report.holder, report.incarnation)
        departed = self.book.departed.get(key)
        if key in self.book.ghosts:
            return messages.LeaseEnd.SUPERSEDED, False
        is_return = departed is not None or report.is_rejoin or report.lease_id != 0
        if held is not None and is_return and not leases.is_of_later_process(report, held):
            return messages.LeaseEnd.SUPERSEDED, False
        if held is not None and leases.is_of_earlier_process(report, held, made_at):
            return messages.LeaseEnd.SUPERSEDED, False
        if departed is None:
            return None, False
        match departed.end:
            case messages.LeaseEnd.SUPERSEDED | messages.LeaseEnd.RELEASED:
                return departed.end, False
            case messages.LeaseEnd.BUDGET_DELETED if session == departed.held.last_session:
                # It is about to hear so on this connection.
                return departed.end, False
            case None:
                # It is dead: this was sent before.
                return None, True
        return None, report.sequence <= departed.held.sequence

    def _join(self, report: messages.Report, old: Lease | None, session: int | None, now: float) -> Lease:
        book = self.book
        if old is not None:
            book.ghost(old)
            self._scribe.note(old, now, "superseded")
            self._scribe.journal("SUPERSEDED", old, cause=f"by incarnation {report.incarnation}")
            if old.session is not None:
                grant = self._scribe.grant(old, end=messages.LeaseEnd.SUPERSEDED)
                self._out.append(effects.Send(old.session, grant))
        held = Lease(
            holder=report.holder,
            incarnation=report.incarnation,
            lease_id=self._new_lease_id(),
            expires_at=now + self.spec.ttl_seconds * leases.TTL_FACTOR,
            last_report_at=now,
            caps=book.zero,
            bound=book.zero,
            held=book.zero,
            target=book.zero,
            joined_at=now,
            last_served=self.rebalancer.served_count,
        )
        departed = book.departed.pop((held.holder, held.incarnation), None)
        is_whole_truth = departed is None or departed.held.is_whole_truth(report, session)
        if report.holdings is not None and is_whole_truth:
            book.forget_stranded(held.holder, held.incarnation)
        book.add(held)
        self._schedule_expiry(held)
        self.rebalancer.must_divide = True
        self._scribe.note(held, now, "joined")
        self._scribe.journal("JOINED", held)
        return held

    def _rejoin(self, held: Lease, report: messages.Report, session: int | None, now: float) -> None:
        """The same incarnation without its lease.

        What it says it has is the whole truth, unless grants of the lease may still reach it: then the lease
        stays as it is, and all that was granted counts.
        """
        if not held.is_whole_truth(report, session):
            return
        held.lease_id = self._new_lease_id()
        if report.holdings is None:
            self.book.strand(leases.strand_unknown(held, self.book.rules, now), now)
            held.bound = self.book.zero
        else:
            self.book.forget_stranded(held.holder, held.incarnation)
        held.unacknowledged.clear()
        held.paces.clear()
        held.version, held.is_confirmed = 0, False
        held.caps = held.held = self.book.zero
        held.is_recovered = False
        self.book.count(held)
        self.book.touch(held)
        self.rebalancer.must_divide = True
        self._scribe.note(held, now, "joined again")
        self._scribe.journal("REJOINED", held)

    def _new_lease_id(self) -> int:
        self._lease_count += 1
        return (self.epoch.revision << _LEASE_COUNT_BITS) + self._lease_count

    def _take_report(
        self,
        held: Lease,
        report: messages.Report,
        age_seconds: float | None,
        now: float,
        session: int | None,
    ) -> None:
        held.sequence = report.sequence
        held.is_confirmed = held.is_confirmed or report.lease_id == held.lease_id
        held.last_session = session
        if held.session != session:
            held.session, held.terms_version = session, 0
        if held.state is LeaseState.SUSPECT:
            held.state = LeaseState.LIVE
            self.rebalancer.must_divide = True
        held.last_report_at, held.is_age_known = now - (age_seconds or 0.0), age_seconds is not None
        self._extend(held, now)
        if held.is_active != report.is_active:
            held.is_active = report.is_active
            self.rebalancer.must_divide = True
            self._scribe.note(held, now, "active" if report.is_active else "idle")
        if held.demand != report.demand or held.waiting_cost != report.waiting_cost:
            held.demand, held.waiting_cost = dict(report.demand), dict(report.waiting_cost)
            self.rebalancer.must_divide = True
        held.current_load, held.active_tasks = report.current_load, report.active_tasks
        if report.process is not None and report.process != held.process:
            held.process = report.process
            self._out.append(effects.WatchProcess(report.process))
        self._take_holdings(held, report, now)
        for throttled in report.throttles:
            self._throttled(held, throttled, now)

    def _extend(self, held: Lease, now: float) -> None:
        """A TTL from now; where the TTL was lowered, an earlier answer may last longer than that."""
        held.answer_ttl_seconds = self.spec.ttl_seconds
        expires_at = now + self.spec.ttl_seconds * leases.TTL_FACTOR
        if expires_at < held.expires_at:
            return
        held.expires_at = expires_at
        if held.ttl_seconds != self.spec.ttl_seconds:
            held.ttl_seconds = self.spec.ttl_seconds
            self.book.touch(held)

    def _take_holdings(self, held: Lease, report: messages.Report, now: float) -> None:
        book, holdings = self.book, report.holdings
        was_recovered, held.is_recovered = held.is_recovered, False
        if was_recovered:
            # Grants of the leader before are void: the holder had left its connection when it reported.
            held.unacknowledged.clear()
        # Versions of another lease acknowledge nothing of this one.
        acknowledged = report.grant_version if report.lease_id == held.lease_id else 0
        held.version = max(held.version, report.grant_version)
        if held.is_tracked != (holdings is not None):
            held.is_tracked = holdings is not None
            book.touch(held)
        if holdings is None:
            self._acknowledge_untracked(held, acknowledged, now)
            return
        owned = self._vector(holdings.held)
        if was_recovered:
            # Its caps are not known, so they are said again even if the target is the same.
            caps = tuple(0 if book.is_overcommitted(i) else amount for i, amount in enumerate(owned))
            held.caps = caps
            held.set_caps(caps)
            held.unpaced_version = held.version
        held.acknowledge(acknowledged, owned)
        book.count(held)
        held.cooling, held.cooling_since = holdings.cooling, now
        held.refundable = self._vector(holdings.refundable)
        held.respend_seconds = holdings.respend_seconds
        held.overdraft = self._vector(holdings.overdraft_total)
        held.largest_cost = tuple(holdings.largest_cost.get(name) for name in book.names)

    def _acknowledge_untracked(self, held: Lease, version: int, now: float) -> None:
        """A holder that does not tell its use has applied `version`: what it gave up counts as just used."""
        before = held.bound
        held.acknowledge(version, self.book.zero)
        held.held = held.bound
        given_up = tuple(max(0, old - new) for old, new in zip(before, held.bound, strict=True))
        self.book.count(held)
        if any(given_up):
            lost = Lease(held.holder, held.incarnation, held.lease_id, now, now, given_up, given_up)
            self.book.strand(leases.strand_unknown(lost, self.book.rules, now), now)

    def _vector(self, amounts: Mapping[str, int]) -> Vector:
        return tuple([amounts.get(name, 0) for name in self.book.names])

    def _throttled(self, held: Lease, throttled: messages.Throttle, now: float) -> None:
        self._scribe.note(held, now, f"provider answered 429, retry after {throttled.retry_after_seconds:g} s")
        for dimension in self.spec.dimensions:
            is_meant = throttled.dimension == dimension.name if throttled.dimension else dimension.is_rate
            if is_meant and self.book.throttles[dimension.name].cut(now, throttled.retry_after_seconds):
                self.rebalancer.must_divide = True
                limit = self.book.target_limits()[self.book.index[dimension.name]]
                self._scribe.journal(
                    "THROTTLED", held, amounts={dimension.name: limit}, cause="the provider answered 429"
                )

    def acquire(
        self,
        *,
        holder: str,
        incarnation: str,
        demand: Mapping[str, int],
        process: processes.ProcessKey | None,
        token: int,
        now: float,
    ) -> None:
        """The unary twin asks for a lease; answered when it has something, or after a second."""
        held = self.book.leases.get(holder)
        if held is not None and held.incarnation == incarnation:
            self._answers.append(_Answer(held, max(1, held.sequence), None, token, is_repeat=True))
            return
        report = messages.Report(
            budget=self.spec.name,
            holder=holder,
            incarnation=incarnation,
            sequence=1,
            is_active=True,
            demand=demand,
            process=process,
        )
        self._check_dimensions(report)
        end, is_stale = self._is_over(held, report, None, now)
        if end is None and is_stale:
            end = messages.LeaseEnd.EXPIRED
        if end is not None:
            self._scribe.answer_over(report, end, None, token)
            return
        held = self._join(report, held, None, now)
        self._take_report(held, report, None, now, None)
        self._waiting_acquires[token] = (held, now + ACQUIRE_WAIT_SECONDS)

    def release(self, release: messages.Release, now: float, *, token: int | None = None) -> None:
        """A holder gives its lease back. One that has ended already is no error."""
        book = self.book
        held = book.leases.get(release.holder)
        if held is None or held.incarnation != release.incarnation:
            held = book.ghosts.get((release.holder, release.incarnation))
        if held is not None and release.lease_id in (0, held.lease_id):
            parts = self._left_behind(held, release.holdings, now)
            self._drop(held, messages.LeaseEnd.RELEASED, parts, now)
            self.rebalancer.must_divide = True
            self._scribe.journal("RELEASED", held)
        if token is not None:
            self._out.append(effects.Reply(token, None))

    def _left_behind(
        self, held: Lease, holdings: messages.Holdings | None, now: float
    ) -> list[leases.Stranded]:
        if holdings is None:
            return leases.strand_unknown(held, self.book.rules, now)
        owned = self._vector(holdings.held)
        return leases.strand_released(held, self.book.rules, now, holdings.cooling, owned)

    def session_closed(self, holder: str, session: int, now: float) -> None:
        """A connection broke: its holder may be alive, and spending."""
        held = self.book.leases.get(holder)
        if held is not None and held.session == session:
            held.session = None
            held.state = LeaseState.SUSPECT
            self._scribe.note(held, now, "its connection broke")
            self._scribe.journal("SUSPECT", held)
        for ghost in self.book.ghosts.values():
            if ghost.session == session:
                ghost.session = None

    def process_exited(self, process: processes.ProcessKey, now: float) -> None:
        """A death certificate: that process is gone, and nobody else spends its leases."""
        for held in self.book.all_leases():
            if held.process == process:
                self._lose(held, now, now, None)
                self._scribe.journal("DIED", held, cause=f"process {process.pid} exited")

    def _lose(self, held: Lease, at: float, now: float, end: messages.LeaseEnd | None) -> None:
        """A lease ends at `at` without its holder's word; `end` None: it is certified dead."""
        parts = leases.strand_lost(held, self.book.rules, at, is_certified=end is None)
        self._drop(held, end, parts, now)
        self.rebalancer.must_divide = True

    def _drop(
        self, held: Lease, end: messages.LeaseEnd | None, parts: list[leases.Stranded], now: float
    ) -> None:
        forget_at = max((part.until for part in parts), default=now)
        self.book.drop(held, end, max(forget_at, now + self.spec.ttl_seconds * leases.TTL_FACTOR))
        # Who does not hear that the budget was deleted goes on until the lease expires.
        is_lasting = end is messages.LeaseEnd.BUDGET_DELETED
        self.book.strand(parts, now, ttl_seconds=max(0.0, held.expires_at - now) if is_lasting else 0.0)

    # Time

    def tick(self, now: float) -> None:
        """Let time pass: expiries, cooled units, recovery of limits, turns."""
        if self.book.forget_aftermath(now) and not (self.is_retired and self.is_settled):
            self._put_definition(now)
        self._expire(now)
        self.book.forget_departed(now)
        if self.book.next_return() <= now:
            self.book.release_stranded(now)
            self.rebalancer.must_divide = True
        for throttle in self.book.throttles.values():
            if throttle.recover(now):
                self.rebalancer.must_divide = True
        self.rebalancer.tick(now)
        for token, (held, until) in list(self._waiting_acquires.items()):
            if not self.book.is_outstanding(held):
                del self._waiting_acquires[token]
                self._out.append(effects.Reply(token, self._scribe.grant(held, end=messages.LeaseEnd.EXPIRED)))
            elif now >= until:
                del self._waiting_acquires[token]
                self._answers.append(_Answer(held, 1, None, token, is_repeat=True))

    def _expire(self, now: float) -> None:
        while self._expiry_heap and self._expiry_heap[0][0] <= now:
            _, _, held = heapq.heappop(self._expiry_heap)
            if not self.book.is_outstanding(held):
                continue
            if held.expires_at > now:
                self._schedule_expiry(held)
                continue
            is_ghost = held.state is LeaseState.GHOST
            end = messages.LeaseEnd.SUPERSEDED if is_ghost else messages.LeaseEnd.EXPIRED
            self._lose(held, held.expires_at, now, end)
            self._scribe.journal("EXPIRED", held)
            if held.session is not None:
                self._out.append(effects.Send(held.session, self._scribe.grant(held, end=end)))

    def _schedule_expiry(self, held: Lease) -> None:
        self._expiry_count += 1
        heapq.heappush(self._expiry_heap, (held.expires_at, self._expiry_count, held))

    def next_deadline(self) -> float:
        """Instant at which `tick` and `finish` have something to do."""
        due = min(self.rebalancer.due_at(self.book), self.book.next_return(), self.book.aftermath.next_end())
        if self._expiry_heap:
            due = min(due, self._expiry_heap[0][0])
        for throttle in self.book.throttles.values():
            due = min(due, throttle.next_recovery())
        for _, until in self._waiting_acquires.values():
            due = min(due, until)
        return due

    # The end of a batch of events

    def finish(self, now: float) -> None:
        """Move shares, answer, and bring etcd's records in line. Call it once after the events of a batch."""
        answering = {id(answer.held) for answer in self._answers}
        if self.rebalancer.is_due(self.book, now):
            for held in self.rebalancer.run(self.book, now):
                self._scribe.note_shares(held, now)
                if id(held) not in answering:
                    self._scribe.push(held)
        self._answer_acquires(now)
        answers, self._answers = self._answers, []
        for answer in answers:
            if not self.book.is_outstanding(answer.held):
                # Given back in the same batch: nobody but a unary caller still waits for a word.
                if answer.token is not None:
                    self._out.append(effects.Reply(answer.token, None))
                continue
            if not answer.is_repeat and self.rebalancer.settle(self.book, answer.held):
                self._scribe.note_shares(answer.held, now)
            self._answer(answer, now)
        self._out.extend(self.book.take_record_effects())
        if self.is_retired and self.is_settled:
            self._out.append(effects.DeleteDefinition(self.spec.name))

    def _answer_acquires(self, now: float) -> None:
        for token, (held, until) in list(self._waiting_acquires.items()):
            if self.rebalancer.settle(self.book, held):
                self._scribe.note_shares(held, now)
            if held.caps == held.target and any(held.caps):
                del self._waiting_acquires[token]
                self._answers.append(_Answer(held, 1, None, token, is_repeat=now > until))

    def _answer(self, answer: _Answer, now: float) -> None:
        held = answer.held
        if answer.needs_terms:
            held.terms_version = 0
        ttl_seconds = held.answer_ttl_seconds
        if answer.is_repeat:
            ttl_seconds = max(0.0, (held.expires_at - now) / leases.TTL_FACTOR)
        grant = self._scribe.grant(held, answered_sequence=answer.sequence, ttl_seconds=ttl_seconds)
        self._scribe.deliver(grant, answer.session, answer.token)
