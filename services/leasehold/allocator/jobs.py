"""The jobs of one reign: the shell around the core's machine, from takeover to the loss of the epoch."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from leasehold.allocator import job_dispatch, job_flusher, job_gauges, nodes
from leasehold.allocator import reign as reigns
from leasehold.core import errors
from leasehold.core.job import effects, machine, model
from leasehold.observe import logs
from leasehold.postgres import job_port
from leasehold.runtime import garbage

#: A caller who waits for a commit is told that Postgres is away after so long.
ANSWER_SECONDS_MAX = 5.0
#: Allocations that outlived their job are looked for so often.
SWEEP_SECONDS = 5.0
#: The ledger has room for a week: that this fails for a while does no harm.
HOUSEKEEPING_SECONDS = 600.0
#: After a failure that is this program's own.
FAILED_SECONDS = 5.0

_NEVER = float("inf")

_log = logs.get_logger(__name__)

#: A request to the machine: it is given the monotonic and the wall clock, and gives a ticket.
Request = Callable[[machine.JobMachine, float, float], int]


def new_job_id() -> str:
    """A UUID of version 7: those that come later sort later, so an index of them grows at its end."""
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    number = number & ~(0xF << 76) | (0x7 << 76)
    number = number & ~(0x3 << 62) | (0x2 << 62)
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Jobs:
    """Feeds events to the machine and carries out its effects.

    Methods that take an event are called on the event loop; what they caused is done before they return. What
    is to be durable is answered after its commit.
    """

    def __init__(
        self,
        reign: reigns.Reign,
        store: job_port.JobStore,
        known: nodes.Nodes,
        *,
        metrics: job_gauges.FlushMetrics,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.reign = reign
        #: None: Postgres has not been read yet.
        self.machine: machine.JobMachine | None = None
        self.store = store
        self._known = known
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        self._dispatch = job_dispatch.JobDispatch(known, self._feed_node)
        self._flusher = job_flusher.JobFlusher(
            store,
            reign.epoch,
            now=reign.now,
            wall=wall_clock,
            follow_up=self._carry_out,
            metrics=metrics,
        )
        self._tickets: dict[int, asyncio.Future[Any]] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = _NEVER
        self._broken: asyncio.Future[NoReturn] = self._loop.create_future()
        self._is_closed = False
        known.jobs = self._dispatch

    @property
    def is_postgres_away(self) -> bool:
        """Whether jobs cannot be changed now."""
        return self._flusher.is_postgres_away or self.machine is None

    def now(self) -> float:
        """The machine's clock, in seconds."""
        return self.reign.now()

    def wall(self) -> float:
        """The wall clock, in seconds since 1970."""
        return self._wall_clock()

    def wall_offset_seconds(self) -> float:
        """The wall clock less the machine's."""
        return self._wall_clock() - self.reign.now()

    # Requests

    def require_machine(self) -> machine.JobMachine:
        """The machine, for reading. Raises `PostgresUnavailable` until Postgres has been read."""
        if self.machine is None:
            raise errors.PostgresUnavailable(
                "the jobs in Postgres have not been read yet", retry_after_seconds=1.0
            )
        return self.machine

    async def ask(self, request: Request, *, seconds: float = ANSWER_SECONDS_MAX) -> Any:
        """What the machine answers to a request, after the commit. Raises what it raises.

        A caller who goes away leaves what was asked to its course, but for an allocation that nobody would
        have: see `machine.JobMachine.give_up`.
        """
        jobs = self.require_machine()
        if self._flusher.is_postgres_away:
            raise errors.PostgresUnavailable(
                "Postgres does not answer; what runs goes on, and nothing new is taken meanwhile",
                retry_after_seconds=1.0,
            )
        with self._unbroken():
            ticket = request(jobs, self.now(), self._wall_clock())
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._tickets[ticket] = answer
        try:
            self._follow_up()
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            self._give_up(jobs, ticket)
            raise errors.PostgresUnavailable(
                "Postgres has not confirmed it in time; it may yet, and asking again with the same request_id "
                "is safe",
                retry_after_seconds=1.0,
            ) from None
        except asyncio.CancelledError:
            self._give_up(jobs, ticket)
            raise
        finally:
            self._tickets.pop(ticket, None)

    def call(self, event: Callable[[machine.JobMachine, float], Any]) -> Any:
        """An event that is answered at once, as a renewal. Raises what the machine raises."""
        jobs = self.require_machine()
        with self._unbroken():
            value = event(jobs, self.now())
        self._follow_up()
        return value

    def _give_up(self, jobs: machine.JobMachine, ticket: int) -> None:
        if self.machine is jobs and not self._is_closed:
            with self._unbroken():
                jobs.give_up(self.now(), ticket)
            self._follow_up()

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """A machine that fails in the midst of a change is not to be trusted any more."""
        try:
            yield
        except errors.LeaseholdError as error:
            if type(error) is errors.LeaseholdError:
                self._break(error)
            raise
        except Exception as error:
            self._break(error)
            raise

    def _break(self, error: BaseException) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    def _feed_node(self, event: job_dispatch.Event) -> None:
        if self.machine is None or self._is_closed:
            return
        with self._unbroken():
            event(self.machine, self.now())
        self._follow_up()

    # Reading

    async def job(self, job_id: str) -> model.JobRecord:
        """A job as it is committed. Raises `NotFound`, `PostgresUnavailable`."""
        live = self.machine.job(job_id) if self.machine is not None else None
        return live if live is not None else await self.store.get_job(job_id)

    def phase(self, job: model.JobRecord) -> model.AttemptPhase | None:
        """How far its present attempt is; None: nobody here knows."""
        if self.machine is None or job.allocation is None:
            return None
        return self.machine.phase(job.allocation.ref)

    def agents_word(self) -> Mapping[str, job_dispatch.NodeWord]:
        """What agents that are connected have said of attempts, by node."""
        return self._dispatch.word

    def settled_seconds(self) -> float:
        """How long two reports of a node take: what it has not changed for so long is settled."""
        return 2.0 * self._known.registry.terms.report_interval_seconds

    @contextlib.contextmanager
    def watching(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set with each change of a job, and when the reign is over."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(changed)
        try:
            yield changed
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(job_id) is watchers:
                del self._watchers[job_id]

    # Effects

    def _follow_up(self) -> None:
        """Do what an event has caused; the next batch may have more."""
        self._carry_out()
        self._flusher.wake()

    def _carry_out(self) -> None:
        """Do what the machine wants done. The flusher's own: it goes on until there is no batch."""
        jobs = self.machine
        if jobs is None or self._is_closed:
            return
        for effect in jobs.take_effects():
            self._execute(effect)
        self._set_timer()

    def _execute(self, effect: effects.Effect) -> None:
        if isinstance(effect, effects.Answer):
            answer = self._tickets.get(effect.ticket)
            if answer is None or answer.done():
                return
            if effect.error is not None:
                answer.set_exception(effect.error)
            else:
                answer.set_result(effect.value)
        elif isinstance(effect, effects.Assign | effects.Stop | effects.Forget):
            self._dispatch.send(effect)
        elif isinstance(effect, effects.Changed):
            self._tell(effect.job_id)
        elif isinstance(effect, effects.SaveBreaker):
            _log.warning("job_breaker", is_open=effect.is_open, cause=effect.cause, actor=effect.actor)
            self._flusher.save_breaker(effect)
        elif isinstance(effect, effects.Reload):
            _log.error("jobs_read_anew", cause=effect.cause)
            self._flusher.read_anew()
        else:
            _log.info(effect.event, **effect.fields)

    def _tell(self, job_id: str) -> None:
        for changed in self._watchers.get(job_id, ()):
            changed.set()

    def _set_timer(self) -> None:
        assert self.machine is not None
        due = self.machine.next_deadline()
        if self._timer is not None and due >= self._timer_at:
            return
        self._stop_timer()
        if due != _NEVER:
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - self.now()), self._timer_fired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, _NEVER

    def _timer_fired(self) -> None:
        self._timer, self._timer_at = None, _NEVER
        if self.machine is not None and not self._is_closed:
            with contextlib.suppress(Exception), self._unbroken():
                self.machine.tick(self.now(), self._wall_clock())
                self._follow_up()

    # The reign

    async def run(self, is_synchronized: asyncio.Event) -> NoReturn:
        """Serve once it is certain that this leader may write to Postgres; until cancelled.

        A failure of this part's own begins it anew from Postgres, and leaves budgets and nodes alone.
        """
        await is_synchronized.wait()
        while True:
            try:
                await self._serve()
            except errors.StaleEpoch as error:
                self.reign.fence(error.message)
                await asyncio.Event().wait()
            except Exception as error:  # noqa: BLE001 - told, and begun anew
                _log.error("jobs_failed", exc_info=error)
                self._reset(errors.Unavailable("jobs begin anew", retry_after_seconds=FAILED_SECONDS))
                await asyncio.sleep(FAILED_SECONDS)

    async def _serve(self) -> NoReturn:
        jobs = machine.JobMachine(new_id=new_job_id)
        begun_at = self.now()
        snapshot = await self._flusher.take_over()
        read_at = self.now()
        with garbage.put_off():
            # In another thread, for those who need the loop meanwhile, as the election's lease does.
            await asyncio.to_thread(jobs.restore, self.now(), self._wall_clock(), snapshot)
        self._broken = self._loop.create_future()
        self.machine = jobs
        _log.info(
            "jobs_known",
            jobs=len(snapshot.jobs),
            nodes=len(snapshot.capacities),
            read_seconds=round(read_at - begun_at, 3),
            restore_seconds=round(self.now() - read_at, 3),
        )
        self._dispatch.begin(frozenset(capacity.node for capacity in snapshot.capacities))
        # Else its jobs would stay as long as the reign does.
        del snapshot
        self._follow_up()
        tasks = [
            asyncio.create_task(self._flusher.run(jobs), name="job-flusher"),
            asyncio.create_task(self._sweep(), name="job-sweep"),
            asyncio.create_task(self._keep_house(), name="job-housekeeping"),
        ]
        try:
            await asyncio.wait([*tasks, self._broken], return_when=asyncio.FIRST_COMPLETED)
            for each in (*tasks, self._broken):
                if each.done():
                    each.result()
            raise errors.LeaseholdError("a part of the jobs ended by itself")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._broken.done() and not self._broken.cancelled():
                self._broken.exception()

    async def _sweep(self) -> NoReturn:
        """Give back what jobs that have ended still have: somebody has written rows by hand."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                released = await self.store.release_ended(self.reign.epoch)
            except errors.PostgresUnavailable:
                continue
            if released:
                self._metrics.mended(released)
                _log.error("ended_jobs_were_not_released", allocations=released)
                self._flusher.read_anew()

    async def _keep_house(self) -> NoReturn:
        """Retention of jobs and released rows, and room for days to come."""
        while True:
            try:
                for trouble in await self.store.keep_house(self.reign.epoch):
                    _log.warning("jobs_housekeeping", trouble=trouble)
            except errors.PostgresUnavailable as error:
                _log.warning("jobs_housekeeping_put_off", error=error.message)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    def _reset(self, why: errors.LeaseholdError) -> None:
        self.machine = None
        self._stop_timer()
        self._refuse_all(why)
        self._dispatch.end(why)

    def _refuse_all(self, why: errors.LeaseholdError) -> None:
        for answer in list(self._tickets.values()):
            if not answer.done():
                answer.set_exception(why)
        self._tickets.clear()
        for job_id in list(self._watchers):
            self._tell(job_id)

    def close(self, why: errors.LeaseholdError) -> None:
        """The reign is over: every call is told `why`."""
        self._is_closed = True
        self._stop_timer()
        self._refuse_all(why)
