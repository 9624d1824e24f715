"""One leader's reign: the thin shell around the core allocator, from takeover to the loss of the epoch."""

import asyncio
import contextlib
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from leasehold.allocator import committer as committers
from leasehold.allocator import records, sessions
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import allocator as allocators
from leasehold.core.budget import effects, messages, quantity
from leasehold.etcd import port as etcd_port
from leasehold.observe import logs
from leasehold.postgres import ledger, port
from leasehold.runtime import clock as clocks
from leasehold.runtime import identity, process_watch

_log = logs.get_logger(__name__)

#: A unary call is answered, or refused, within so long.
ANSWER_SECONDS_MAX = 10.0

Answer = messages.Grant | messages.Refusal | None


class Reign:
    """Feeds events to the core, hands its effects to etcd, the holders, the ledger and the process watch.

    Methods that take an event are called on the event loop; what they caused is finished once for each batch of
    the committer, so that a burst of reports costs one transaction.
    """

    def __init__(
        self,
        epoch: epochs.Epoch,
        etcd: etcd_port.EtcdPort,
        keys: records.Keys,
        store: port.Store,
        *,
        clock: clocks.Clock,
        boot_clock: clocks.Clock,
    ) -> None:
        self.epoch = epoch
        self.core = allocators.Allocator(epoch)
        self.committer = committers.Committer(
            etcd,
            keys,
            epoch,
            deliver=self._deliver,
            on_overflow=self._give_up_connections,
            collect=self._finish,
        )
        self._keys = keys
        self.ledger = ledger.LedgerWriter(store, epoch, on_fenced=lambda error: self.fence(error.message))
        #: Set, and replaced by a new one, with everything that a watcher may want to see.
        self.news = asyncio.Event()
        #: Holds, once the reign cannot go on, the reason.
        self.ending: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        #: Has somebody else watch a process that cannot be seen from here; told through `process_certified`.
        self.ask_elsewhere: Callable[[processes.ProcessKey], None] = lambda _: None
        self._clock = clock
        self._boot_clock = boot_clock
        self._loop = asyncio.get_running_loop()
        self._watch = process_watch.ProcessWatch()
        self._watched: set[processes.ProcessKey] = set()
        self._sessions: dict[int, sessions.Session] = {}
        self._tokens: dict[int, asyncio.Future[Answer]] = {}
        self._counter = 0
        self._finish_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._is_over = False

    def now(self) -> float:
        """Seconds on the allocator's CLOCK_MONOTONIC."""
        return self._clock.now()

    # Holders

    def open_session(self) -> sessions.Session:
        """A holders' connection begins."""
        self._counter += 1
        session = sessions.Session(self._counter)
        self._sessions[session.number] = session
        return session

    def close_session(self, session: sessions.Session) -> None:
        """A holders' connection is gone."""
        self._sessions.pop(session.number, None)
        if not self._is_over:
            self._feed(lambda: self.core.session_closed(session.number, self.now()))

    def report(self, report: messages.Report, session: sessions.Session) -> None:
        """A report on a connection; what is wrong with it is answered on the connection."""
        if report.process is not None and identity.is_local(_identity(report.process)):
            session.is_local = True
        age_seconds: float | None = None
        if session.is_local and report.boottime_nanos:
            age_seconds = max(0.0, self._boot_clock.now() - report.boottime_nanos / 1e9)
        try:
            self.core.report(report, self.now(), session=session.number, age_seconds=age_seconds)
        except errors.LeaseholdError as error:
            session.say(refusal(report, error))
        except Exception as error:
            self._fail(error)
            raise
        self.kick()

    async def report_once(self, report: messages.Report) -> messages.Grant:
        """The unary twin of a report. Raises what the core raises."""
        return _granted(await self._asked(lambda token: self.core.report(report, self.now(), token=token)))

    async def acquire(
        self,
        *,
        budget: str,
        holder: str,
        incarnation: str,
        demand: Mapping[str, int],
        process: processes.ProcessKey | None,
    ) -> messages.Grant:
        """The unary twin of a join."""

        def ask(token: int) -> None:
            self.core.acquire(
                budget=budget,
                holder=holder,
                incarnation=incarnation,
                demand=demand,
                process=process,
                token=token,
                now=self.now(),
            )

        return _granted(await self._asked(ask))

    def release(self, release: messages.Release) -> None:
        """A release on a connection; one that means nothing is passed over."""
        with contextlib.suppress(errors.NotFound):
            self._feed(lambda: self.core.release(release, self.now()))

    async def release_once(self, release: messages.Release) -> None:
        """The unary twin of a release."""
        await self._asked(lambda token: self.core.release(release, self.now(), token=token))

    async def _asked(self, ask: Callable[[int], None]) -> Answer:
        self._counter += 1
        token = self._counter
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._tokens[token] = answer
        try:
            self._feed(lambda: ask(token))
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await answer
        except TimeoutError:
            raise errors.EtcdUnavailable(
                "etcd has not confirmed it in time; it may yet, and asking again is safe",
                retry_after_seconds=0.5,
            ) from None
        finally:
            self._tokens.pop(token, None)

    def _feed(self, event: Callable[[], None]) -> None:
        """One event of the core; raises what it raises."""
        try:
            event()
        except errors.LeaseholdError:
            raise
        except Exception as error:
            self._fail(error)
            raise
        self.kick()

    # Effects

    def kick(self) -> None:
        """Something was fed: it is finished when the next batch begins; while etcd is away, now."""
        if self._is_over:
            return
        if not self.committer.is_etcd_away:
            self.committer.wake()
        elif self._finish_handle is None:
            self._finish_handle = self._loop.call_soon(self._finish)

    def clear_away(self, keys: Sequence[str]) -> None:
        """Remove keys of earlier leaders that stand for nobody knows what; `flush` says when it is done.

        A holder of such a record may have joined again meanwhile: its key has a new record then, and stays.
        """
        parts = {key: self._keys.lease_parts(key) for key in keys}
        self.committer.delete(
            [key for key, lease in parts.items() if not (lease and self.core.has_record(*lease))]
        )

    async def flush(self) -> None:
        """Return once everything fed so far is in etcd. Raises `StaleEpoch` if the reign ends first."""
        await self.committer.barrier()

    def _finish(self) -> None:
        if self._finish_handle is not None:
            self._finish_handle.cancel()
            self._finish_handle = None
        if self._is_over:
            return
        try:
            batch = self._take_effects()
        except Exception as error:  # noqa: BLE001 - a core that failed in the midst of a change must not go on
            self._fail(error)
            return
        self.committer.add(batch)
        for effect in batch:
            if isinstance(effect, effects.Journal):
                self.ledger.append(_entry(effect))
            elif isinstance(effect, effects.WatchProcess):
                self._watch_process(effect.process)
        if batch:
            self._tell_watchers()
        self._set_timer()

    def _take_effects(self) -> list[effects.Effect]:
        now = self.now()
        if now >= self.core.next_deadline():
            self.core.tick(now)
        return self.core.finish(now)

    def _set_timer(self) -> None:
        due = self.core.next_deadline()
        if due >= self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, float("inf")
        if due != float("inf"):
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - self.now()), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self.kick()

    def _tell_watchers(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def _deliver(self, batch: Sequence[committers.Message]) -> None:
        for effect in batch:
            if isinstance(effect, effects.Send):
                session = self._sessions.get(effect.session)
                if session is not None:
                    session.say(effect.message)
            else:
                answer = self._tokens.get(effect.token)
                if answer is not None and not answer.done():
                    answer.set_result(effect.message)

    def _watch_process(self, process: processes.ProcessKey) -> None:
        if process in self._watched:
            return
        try:
            self._watch.watch(_identity(process), lambda _: self._process_exited(process))
        except errors.LeaseholdError as error:
            # Another host or namespace: an agent there may see it, else its death will show as expiry.
            _log.debug("process_not_watched", pid=process.pid, why=error.message)
            self.ask_elsewhere(process)
            return
        self._watched.add(process)

    def _process_exited(self, process: processes.ProcessKey) -> None:
        self._watched.discard(process)
        if not self._is_over:
            self._feed(lambda: self.core.process_exited(process, self.now()))

    def process_certified(self, process: processes.ProcessKey) -> None:
        """An agent that can know says that a process is dead."""
        self._process_exited(process)

    def _give_up_connections(self) -> None:
        for session in list(self._sessions.values()):
            session.end(errors.EtcdUnavailable("etcd has not answered for long", retry_after_seconds=0.5))

    # The end

    def fence(self, why: str) -> None:
        """A later leader was seen: the reign ends."""
        self._end(errors.StaleEpoch(why))

    def give_up(self, error: Exception) -> None:
        """Another part of the reign is not to be trusted any more: whoever leads next begins anew."""
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The core is not to be trusted any more; what etcd has is, and whoever leads next begins there."""
        self._is_over = True
        self._end(error)

    def _end(self, error: Exception) -> None:
        if not self.ending.done():
            self.ending.set_exception(error)

    async def run(self) -> None:
        """Commit until the epoch is lost; raises `StaleEpoch` then."""
        self.ledger.start()
        self.kick()
        await self.committer.run()

    async def close(self, why: errors.LeaseholdError) -> None:
        """The reign is over: every connection and call is told `why`."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._watch.close()
        for session in list(self._sessions.values()):
            session.end(why)
        for answer in self._tokens.values():
            if not answer.done():
                answer.set_exception(why)
        self._tell_watchers()
        if self.ending.done():
            # Where something else ended the reign first nobody else asks for it.
            self.ending.exception()
        # A successor waits for this one to be done.
        await self.ledger.close(timeout_seconds=0.0 if self.ledger.is_postgres_away else 1.0)

    @property
    def is_over(self) -> bool:
        """Whether another reign may have begun."""
        return self._is_over


def refusal(report: messages.Report, error: errors.LeaseholdError) -> messages.Refusal:
    """The answer to a report that was refused."""
    return messages.Refusal(
        budget=report.budget,
        holder=report.holder,
        incarnation=report.incarnation,
        sequence=report.sequence,
        reason=error.reason,
        message=error.message,
        field=error.field or "",
    )


def _granted(answer: Answer) -> messages.Grant:
    if isinstance(answer, messages.Grant):
        return answer
    raise errors.Unavailable("the lease ended before it was answered", retry_after_seconds=0.1)


def _identity(process: processes.ProcessKey) -> identity.ProcessIdentity:
    return identity.ProcessIdentity(
        boot_id=process.boot_id,
        pid_namespace=process.pid_namespace,
        pid=process.pid,
        start_time_ticks=process.start_time_ticks,
    )


def _entry(line: effects.Journal) -> port.LedgerEntry:
    return port.LedgerEntry(
        time=datetime.datetime.now(datetime.UTC),
        event=line.event,
        budget=line.budget,
        holder=line.holder,
        incarnation=line.incarnation,
        lease_id=line.lease_id,
        amounts={name: quantity.to_units(amount) for name, amount in line.amounts.items()},
        cause=line.cause,
    )
