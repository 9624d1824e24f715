"""Nodes' records and audit entries on their way to Postgres: put off while it is away, caught up later."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn, TypeVar

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.node import registry_effects, registry_model
from leasehold.observe import logs
from leasehold.postgres import port

RETRY_SECONDS = 0.5
#: After a failure that waiting may not heal.
FAILED_SECONDS = 5.0
NODES_MAX = 200
AUDIT_MAX = 200
#: Audit entries that wait; the oldest make room.
AUDIT_WAITING_MAX = 10_000

_log = logs.get_logger(__name__)

Value = TypeVar("Value")


class NodeWriter:
    """Writes for one reign. `put` and `note` never wait and never fail; `run` does the writing."""

    def __init__(self, store: port.Store, epoch: epochs.Epoch) -> None:
        self.is_postgres_away = False
        self._store = store
        self._epoch = epoch
        self._nodes: dict[str, port.NodeWrite] = {}
        self._audit: deque[port.AuditEntry] = deque()
        self._lost_entries = 0
        self._wake = asyncio.Event()
        # A deletion must not be overtaken by a record that is on its way.
        self._lock = asyncio.Lock()

    @property
    def waiting(self) -> int:
        """Records and entries that are not in Postgres yet."""
        return len(self._nodes) + len(self._audit)

    def put(self, effect: registry_effects.PutNode) -> None:
        """Have a record written; of one node only the newest is."""
        waiting = self._nodes.get(effect.record.name)
        actor = effect.actor or (waiting.actor if waiting is not None else "")
        self._nodes[effect.record.name] = port.NodeWrite(record=effect.record, actor=actor)
        self._wake.set()

    def note(self, entry: port.AuditEntry) -> None:
        """Have an audit entry written."""
        self._audit.append(entry)
        if len(self._audit) > AUDIT_WAITING_MAX:
            self._audit.popleft()
            self._lost_entries += 1
        self._wake.set()

    async def load(self) -> tuple[registry_model.NodeRecord, ...]:
        """Every record that Postgres has, however long that takes. Raises `StaleEpoch`."""
        return await self._patiently(self._store.all_nodes)

    async def delete(self, name: str, *, check: Callable[[], None], actor: str, cause: str) -> None:
        """Remove a record, if `check` does not raise. Raises `PostgresUnavailable`, `StaleEpoch`."""
        async with self._lock:
            check()
            waiting = self._nodes.pop(name, None)
            try:
                await self._store.delete_node(self._epoch, name, actor=actor, cause=cause)
            except errors.NotFound:
                # It never came to be written.
                return
            except BaseException:
                if waiting is not None:
                    self._nodes.setdefault(name, waiting)
                raise

    async def run(self) -> NoReturn:
        """Write until cancelled. Raises `StaleEpoch` once a later leader writes."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.waiting or self._lost_entries:
                await self._patiently(self._write_some)

    async def flush(self, timeout_seconds: float) -> None:
        """Write what waits, if that is done in time; to be called when `run` has ended."""
        if self.is_postgres_away:
            return
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.waiting:
                    await self._write_some()
        except (errors.LeaseholdError, TimeoutError) as error:
            _log.warning("nodes_not_flushed", waiting=self.waiting, error=str(error))

    async def _write_some(self) -> None:
        async with self._lock:
            await self._write_nodes(list(self._nodes.values())[:NODES_MAX])
            await self._write_audit([self._audit[i] for i in range(min(AUDIT_MAX, len(self._audit)))])
        if self._lost_entries:
            _log.error("audit_entries_lost", entries=self._lost_entries, why="Postgres was away for too long")
            self._lost_entries = 0

    async def _write_nodes(self, batch: Sequence[port.NodeWrite]) -> None:
        if not batch:
            return
        await self._each_if_refused(batch, lambda nodes: self._store.put_nodes(self._epoch, nodes))
        for write in batch:
            # A newer one may have come meanwhile.
            if self._nodes.get(write.record.name) is write:
                del self._nodes[write.record.name]

    async def _write_audit(self, batch: Sequence[port.AuditEntry]) -> None:
        if not batch:
            return
        await self._each_if_refused(batch, lambda entries: self._store.append_audit(self._epoch, entries))
        written = {entry.entry_id for entry in batch}
        while self._audit and self._audit[0].entry_id in written:
            self._audit.popleft()

    async def _each_if_refused(
        self, batch: Sequence[Value], write: Callable[[Sequence[Value]], Awaitable[None]]
    ) -> None:
        """Write a batch; where it is refused each alone, so that a bad one holds up no other."""
        try:
            await write(batch)
        except (errors.PostgresUnavailable, errors.StaleEpoch):
            raise
        except errors.LeaseholdError:
            for each in batch:
                try:
                    await write([each])
                except (errors.PostgresUnavailable, errors.StaleEpoch):
                    raise
                except errors.LeaseholdError as error:
                    _log.error("record_refused", record=repr(each)[:500], error=error.message)

    async def _patiently(self, step: Callable[[], Awaitable[Value]]) -> Value:
        while True:
            try:
                value = await step()
            except errors.PostgresUnavailable as error:
                if not self.is_postgres_away:
                    _log.warning("nodes_without_postgres", error=error.message, waiting=self.waiting)
                self.is_postgres_away = True
                await asyncio.sleep(RETRY_SECONDS)
            except errors.StaleEpoch:
                raise
            except errors.LeaseholdError as error:
                _log.error("nodes_not_in_postgres", error=error.message, waiting=self.waiting)
                await asyncio.sleep(FAILED_SECONDS)
            else:
                if self.is_postgres_away:
                    _log.info("nodes_in_postgres_again", waiting=self.waiting)
                self.is_postgres_away = False
                return value
