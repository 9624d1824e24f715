"""The nodes of one reign: the shell around the core registry, from takeover to the loss of the epoch."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from leasehold.allocator import node_orders, node_sessions, node_writer
from leasehold.allocator import reign as reigns
from leasehold.api.common.v1 import process_pb2
from leasehold.api.job.v1 import attempt_pb2
from leasehold.api.node.v1 import node_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors, processes
from leasehold.core.node import registry, registry_effects
from leasehold.observe import logs
from leasehold.postgres import port
from leasehold.rpc import common_codec, node_codec, wire_values

#: Certificates, and answers to orders, of one message.
PARTS_MAX = 1_000
STATUS_BYTES_MAX = 2**20
#: Processes whose leases are gone are looked for so often.
SWEEP_SECONDS = 30.0
FLUSH_SECONDS_MAX = 1.0

_log = logs.get_logger(__name__)


class JobSide(Protocol):
    """Who follows the nodes for what jobs need of them."""

    def node_changed(self, name: str) -> None:
        """A node, or its connection, may be another than before."""

    def node_deleted(self, name: str) -> None:
        """A node was forgotten."""

    def inventory(self, name: str, reports: Sequence[attempt_pb2.AttemptReport]) -> None:
        """Every attempt that the agent knows, on a new connection. Raises `InvalidArgument`."""

    def attempts(self, name: str, reports: Sequence[attempt_pb2.AttemptReport]) -> None:
        """Attempts that have changed. Raises `InvalidArgument`."""


class Nodes:
    """Feeds events to the registry and carries out its effects.

    Methods that take an event are called on the event loop; what they caused is done before they return. Only
    Postgres follows when it can.
    """

    def __init__(
        self, reign: reigns.Reign, store: port.Store, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.reign = reign
        self.registry = registry.NodeRegistry()
        self.writer = node_writer.NodeWriter(store, reign.epoch)
        self.orders = node_orders.OrderRouter(self.session_of)
        #: Set, and replaced by a new one, with everything that a watcher may want to see.
        self.news = asyncio.Event()
        #: Told of everything that concerns jobs; None: nobody is.
        self.jobs: JobSide | None = None
        #: Postgres's nodes are known.
        self.is_loaded = False
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[int, node_sessions.NodeSession] = {}
        self._statuses: dict[str, node_pb2.NodeStatus] = {}
        #: Number of the last change of each node, the newest last.
        self._changes: dict[str, int] = {}
        self._change = 0
        self._counter = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._deletions: set[asyncio.Task[None]] = set()
        self._is_closed = False
        reign.ask_elsewhere = self._watch_process

    # Agents

    def open_session(self, peer: str) -> node_sessions.NodeSession:
        """An agent's connection begins."""
        self._counter += 1
        session = node_sessions.NodeSession(self._counter, self.reign.epoch, peer)
        self._sessions[session.number] = session
        return session

    def close_session(self, session: node_sessions.NodeSession) -> None:
        """An agent's connection is gone."""
        self._sessions.pop(session.number, None)
        if not self._is_closed:
            name = self.registry.name_of(session.number)
            self.registry.session_closed(session.number, self.reign.now())
            self._follow_up()
            if name is not None and self.jobs is not None:
                self.jobs.node_changed(name)

    def take(self, request: wire.SyncNodeRequest, session: node_sessions.NodeSession) -> None:
        """A message on a connection. Raises what is wrong with it; the connection is to be ended then."""
        if request.sequence <= session.sequence:
            raise errors.InvalidArgument(
                f"sequence: {request.sequence} does not follow {session.sequence}", field="sequence"
            )
        _check_parts(request)
        now = self.reign.now()
        is_first = not session.sequence
        if is_first:
            self._register(request.registration, now, session)
        elif request.HasField("registration"):
            raise errors.InvalidArgument("registration: only in the first message", field="registration")
        is_draining = request.status.is_draining if request.HasField("status") else None
        name = self.registry.name_of(session.number)
        is_current = self.registry.report(
            session.number, now, is_draining=is_draining, is_leaving=request.is_leaving
        )
        if name is None or not is_current:
            # Another connection has taken its place; it has been told.
            return
        if request.HasField("status"):
            self._statuses[name] = request.status
            self._changed(name)
        for result in request.results:
            self.orders.answered(name, result)
        for death in request.deaths:
            self._certified(name, death.process, session)
        session.answer(request.sequence, self.registry.terms_due(session.number))
        self._follow_up()
        self._hear_of_jobs(name, request, is_first=is_first)

    def _hear_of_jobs(self, name: str, request: wire.SyncNodeRequest, *, is_first: bool) -> None:
        if self.jobs is None:
            return
        if is_first:
            self.jobs.node_changed(name)
        if request.HasField("inventory"):
            if not is_first:
                raise errors.InvalidArgument("inventory: only in the first message", field="inventory")
            self.jobs.inventory(name, request.inventory.attempts)
        if request.attempts:
            self.jobs.attempts(name, request.attempts)

    def _register(self, message: wire.NodeRegistration, now: float, session: node_sessions.NodeSession) -> None:
        registration = node_codec.decode_registration(message)
        self.registry.register(
            registration, now, wall_seconds=self._wall_seconds(), session=session.number, actor=session.peer
        )
        self._follow_up()
        self.orders.connected(registration.name, session)

    def report_once(self, request: wire.ReportNodeRequest, peer: str) -> wire.ReportNodeResponse:
        """The unary twin. Raises what the registry raises."""
        _check_parts(request)
        registration = node_codec.decode_registration(request.registration)
        name, now = registration.name, self.reign.now()
        deaths = [common_codec.decode_process(death.process) for death in request.deaths]
        self.registry.register(registration, now, wall_seconds=self._wall_seconds(), actor=peer)
        if request.HasField("status"):
            self.registry.report_once(name, now, is_draining=request.status.is_draining)
            self._statuses[name] = request.status
        self._follow_up()
        for process in deaths:
            if self.registry.certify(name, process):
                self.reign.process_certified(process)
        return wire.ReportNodeResponse(
            epoch=common_codec.shared_epoch(self.reign.epoch),
            terms=node_codec.encode_terms(self.registry.terms),
        )

    def _certified(
        self, name: str, message: process_pb2.ProcessIdentity, session: node_sessions.NodeSession
    ) -> None:
        """A death certificate. One that this agent cannot give is passed over, its reports are not."""
        try:
            process = common_codec.decode_process(message)
            is_needed = self.registry.certify(name, process)
        except errors.InvalidArgument as error:
            if not session.is_distrusted:
                _log.warning("certificate_refused", node=name, error=error.message)
            session.is_distrusted = True
            return
        if is_needed:
            self.reign.process_certified(process)

    def _wall_seconds(self) -> float:
        return round(self._wall_clock(), 6)

    def session_of(self, name: str) -> node_sessions.NodeSession | None:
        """A node's connection; None: it has none."""
        node = self.registry.nodes.get(name)
        return None if node is None or node.session is None else self._sessions.get(node.session)

    # Processes that hold leases

    def _watch_process(self, process: processes.ProcessKey) -> None:
        self.registry.watch(process)
        self._follow_up()

    def _sweep(self) -> None:
        living = self.reign.core.processes()
        for process in self.registry.watched.all():
            if process not in living:
                self.registry.unwatch(process)
        self._follow_up()

    # Administration

    async def delete(self, name: str, *, actor: str, cause: str) -> None:
        """Forget a node. Raises `NotFound`, `FailedPrecondition`, `PostgresUnavailable`, `NotLeader`."""
        if not self.is_loaded:
            raise errors.PostgresUnavailable(
                "no node can be deleted until the nodes in Postgres have been read", retry_after_seconds=1.0
            )
        # A task of its own: a caller who hangs up must not leave Postgres changed and the registry not.
        deletion = asyncio.create_task(self._delete(name, actor, cause), name=f"delete-node-{name}")
        self._deletions.add(deletion)
        deletion.add_done_callback(self._deletions.discard)
        await asyncio.shield(deletion)

    async def _delete(self, name: str, actor: str, cause: str) -> None:
        def check() -> None:
            self.registry.check_forget(name)

        try:
            await self.writer.delete(name, check=check, actor=actor, cause=cause)
        except errors.StaleEpoch as error:
            self.reign.fence(error.message)
            raise errors.NotLeader from error
        except errors.PostgresUnavailable:
            # It may have happened: what is known here is what counts.
            self.writer.put(registry_effects.PutNode(record=self.registry.get(name).record))
            raise
        node = self.registry.nodes.get(name)
        if node is not None and node.is_alive:
            # It came back meanwhile.
            self.writer.put(registry_effects.PutNode(record=node.record, actor=actor))
            return
        self.registry.forget(name)
        self._statuses.pop(name, None)
        self._changes.pop(name, None)
        self._follow_up()
        if self.jobs is not None:
            self.jobs.node_deleted(name)
        self._tell_watchers()

    # Reading

    def view(self, name: str, *, is_brief: bool = False) -> node_pb2.Node:
        """A node now. Raises `NotFound`."""
        node = self.registry.get(name)
        message = node_codec.encode_record(node.record)
        message.ttl.CopyFrom(wire_values.encode_seconds((node.told or self.registry.terms).ttl_seconds))
        if node.reported_at is not None:
            age = max(0.0, self.reign.now() - node.reported_at)
            message.last_report_age.CopyFrom(wire_values.encode_seconds(age))
        status = None if is_brief else self._statuses.get(name)
        if status is not None:
            message.status.CopyFrom(status)
        return message

    def connected(self) -> list[str]:
        """Names of nodes that have a stream, in order."""
        return sorted(name for name, node in self.registry.nodes.items() if node.session is not None)

    def changed_since(self, change: int) -> tuple[int, list[str]]:
        """Number of the last change, and the names of nodes that have changed after `change`."""
        names = []
        for name in reversed(self._changes):
            if self._changes[name] <= change:
                break
            names.append(name)
        return self._change, sorted(names)

    # Effects

    def _follow_up(self) -> None:
        """Do what an event has caused."""
        for effect in self.registry.take_effects():
            self._execute(effect)
        self._set_timer()

    def _execute(self, effect: registry_effects.Effect) -> None:
        if isinstance(effect, registry_effects.PutNode):
            self.writer.put(effect)
            self._changed(effect.record.name)
        elif isinstance(effect, registry_effects.EndSession):
            self._with_session(effect.session, lambda session: session.end(effect.error))
        elif isinstance(effect, registry_effects.AskWatch):
            self._with_session(effect.session, lambda session: session.watch(effect.processes))
        elif isinstance(effect, registry_effects.AskUnwatch):
            self._with_session(effect.session, lambda session: session.unwatch(effect.processes))
        elif isinstance(effect, registry_effects.NodeMoved):
            before = None if effect.before is None else effect.before.name
            _log.info(
                "node_moved", node=effect.name, before=before, after=effect.after.name, cause=effect.cause
            )
            self._changed(effect.name)
        else:
            told = _log.warning if effect.is_mass_loss else _log.info
            told("mass_loss" if effect.is_mass_loss else "mass_loss_over", lost=effect.lost, nodes=effect.nodes)
            self._tell_watchers()

    def _with_session(self, number: int, act: Callable[[node_sessions.NodeSession], None]) -> None:
        session = self._sessions.get(number)
        if session is not None:
            act(session)

    def _changed(self, name: str) -> None:
        self._change += 1
        self._changes.pop(name, None)
        self._changes[name] = self._change
        if self.jobs is not None:
            self.jobs.node_changed(name)
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        if not self.news.is_set():
            self.news.set()
            self.news = asyncio.Event()

    def _set_timer(self) -> None:
        due = self.registry.next_deadline()
        if self._timer is not None and due >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, float("inf")
        if due != float("inf") and not self._is_closed:
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - self.reign.now()), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        try:
            self.registry.tick(self.reign.now())
            self._follow_up()
        except Exception as error:  # noqa: BLE001 - a registry that failed in the midst of a change must not go on
            self.reign.give_up(error)

    # The reign

    async def run(self, is_synchronized: asyncio.Event) -> None:
        """Know Postgres's nodes once it is certain that this leader may, then write; until cancelled."""
        await is_synchronized.wait()
        try:
            self.registry.restore(await self.writer.load(), self.reign.now())
            self.is_loaded = True
            for name in self.registry.nodes:
                self._changed(name)
            self._follow_up()
            _log.info("nodes_known", nodes=len(self.registry.nodes))
            with self._sweeping():
                await self.writer.run()
        except errors.StaleEpoch as error:
            self.reign.fence(error.message)
            await asyncio.Event().wait()

    @contextlib.contextmanager
    def _sweeping(self) -> Iterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                self._sweep()

        task = asyncio.create_task(sweep(), name="sweep-watched-processes")
        try:
            yield
        finally:
            task.cancel()

    def close(self, why: errors.LeaseholdError) -> None:
        """The reign is over: every connection and call is told `why`."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.orders.close(why)
        for session in list(self._sessions.values()):
            session.end(why)
        self._tell_watchers()

    async def flush(self) -> None:
        """What was said to agents reaches Postgres before a successor begins, if it can be reached."""
        if self.is_loaded:
            await self.writer.flush(FLUSH_SECONDS_MAX)


def _check_parts(request: Any) -> None:
    """Raise `InvalidArgument` for a message that is too much."""
    for field in ("deaths", "results", "attempts"):
        if len(getattr(request, field, ())) > PARTS_MAX:
            raise errors.InvalidArgument(f"{field}: at most {PARTS_MAX} in one message", field=field)
    if request.HasField("status") and request.status.ByteSize() > STATUS_BYTES_MAX:
        raise errors.InvalidArgument("status: is larger than 1 MiB", field="status")
