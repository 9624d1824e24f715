"""The definitions of budgets: Postgres first, then etcd's copy, then the answer.

Whoever asked may be gone, or Postgres away, in the midst of a change. A change that has begun goes on to its
end; one whose outcome is not known makes the definitions doubtful, and they are read again before the next.
"""

import asyncio
import datetime
from collections.abc import Awaitable, Callable
from typing import TypeVar

from leasehold.allocator import reign as reigns
from leasehold.allocator import takeover
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.observe import logs
from leasehold.postgres import port

POSTGRES_RETRY_SECONDS = 0.5

#: The store refused the change: nothing was done.
_REFUSALS = (errors.InvalidArgument, errors.NotFound, errors.VersionConflict)

_log = logs.get_logger(__name__)

Answer = TypeVar("Answer")


class Administration:
    """Changes definitions, and keeps those in force in line with Postgres while this replica leads.

    `require` gives the present reign or raises `NotLeader`.
    """

    def __init__(self, store: port.Store, require: Callable[[], reigns.Reign]) -> None:
        #: Set while Postgres's definitions are those in force: changes may begin.
        self.is_synchronized = asyncio.Event()
        #: When Postgres says that each budget was changed last; empty until it was read.
        self.update_times: dict[str, datetime.datetime] = {}
        self._store = store
        self._require = require
        self._doubtful = asyncio.Event()
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()

    # Changes

    async def put_budget(
        self,
        spec: model.BudgetSpec,
        *,
        request_id: str = "",
        expected_version: int = 0,
        actor: str = "",
        cause: str = "",
    ) -> port.StoredBudget:
        """Create or replace a budget, as `port.Store.put_budget`. Raises `PostgresUnavailable`, `NotLeader`."""

        async def write(reign: reigns.Reign) -> port.StoredBudget:
            reign.core.check_definition(spec)
            return await self._store.put_budget(
                reign.epoch,
                spec,
                request_id=request_id,
                expected_version=expected_version,
                actor=actor,
                cause=cause,
            )

        return await self._change(spec.name, write)

    async def delete_budget(self, name: str, *, request_id: str = "", actor: str = "", cause: str = "") -> None:
        """Remove a budget and end its leases. Raises `NotFound`, `PostgresUnavailable`, `NotLeader`."""

        async def write(reign: reigns.Reign) -> None:
            await self._store.delete_budget(reign.epoch, name, request_id=request_id, actor=actor, cause=cause)

        await self._change(name, write)

    async def _change(self, name: str, write: Callable[[reigns.Reign], Awaitable[Answer]]) -> Answer:
        self._writable_reign()
        await self._lock.acquire()
        # A task of its own: a caller who hangs up must not leave Postgres changed and the copy in force not.
        change = asyncio.create_task(self._locked_change(name, write), name=f"change-{name}")
        self._changes.add(change)
        change.add_done_callback(self._changed)
        return await asyncio.shield(change)

    def _changed(self, change: asyncio.Task[object]) -> None:
        self._lock.release()
        self._changes.discard(change)
        if not change.cancelled():
            # Where the caller is gone nobody else asks for it.
            change.exception()

    async def _locked_change(self, name: str, write: Callable[[reigns.Reign], Awaitable[Answer]]) -> Answer:
        reign = self._writable_reign()
        try:
            answer = await write(reign)
        except _REFUSALS:
            raise
        except errors.StaleEpoch as error:
            reign.fence(error.message)
            raise errors.NotLeader from error
        except BaseException:
            self._doubt()
            raise
        try:
            await self._bring_in_force(reign, name)
        except errors.StaleEpoch as error:
            raise errors.NotLeader from error
        except BaseException:
            self._doubt()
            raise
        return answer

    def _writable_reign(self) -> reigns.Reign:
        reign = self._require()
        if not self.is_synchronized.is_set():
            raise errors.PostgresUnavailable(
                "budgets cannot be changed until the definitions in Postgres have been read",
                retry_after_seconds=1.0,
            )
        return reign

    async def _bring_in_force(self, reign: reigns.Reign, name: str) -> None:
        # What Postgres has now, not what was answered: the repeat of an old request is answered as at first.
        stored = await self._stored(name)
        if self._require() is not reign:
            raise errors.NotLeader
        if stored is not None:
            self.update_times[name] = stored.update_time
            reign.core.define(stored.spec, stored.version, reign.now())
        elif name in reign.core.names():
            reign.core.delete(name, reign.now())
        await reign.flush()

    async def _stored(self, name: str) -> port.StoredBudget | None:
        try:
            return await self._store.get_budget(name)
        except errors.NotFound:
            return None

    def _doubt(self) -> None:
        self.is_synchronized.clear()
        self._doubtful.set()

    # Keeping in line

    async def follow(self, reign: reigns.Reign, past: takeover.Past) -> None:
        """Bring the definitions of a reign in line with Postgres, now and whenever they are in doubt.

        Runs until it is cancelled, however long Postgres is away. Raises `StaleEpoch` if Postgres knows a later
        leader.
        """
        try:
            await self._patiently(lambda: self._raise_epoch(reign))
            await self._patiently(lambda: self._align(reign, past))
            while True:
                self.is_synchronized.set()
                await self._doubtful.wait()
                self._doubtful.clear()
                await self._patiently(lambda: self._align(reign, takeover.KNOWN))
        finally:
            self.is_synchronized.clear()

    async def _patiently(self, step: Callable[[], Awaitable[None]]) -> None:
        is_told = False
        while True:
            try:
                return await step()
            except errors.PostgresUnavailable as error:
                if not is_told:
                    _log.warning("serving_without_postgres", error=error.message)
                is_told = True
                await asyncio.sleep(POSTGRES_RETRY_SECONDS)

    async def _raise_epoch(self, reign: reigns.Reign) -> None:
        await self._store.migrate()
        await self._store.raise_epoch(reign.epoch)

    async def _align(self, reign: reigns.Reign, past: takeover.Past) -> None:
        # Locked for one attempt: between two, changes that wait are told that Postgres is away.
        async with self._lock:
            await self._align_alone(reign, past)

    async def _align_alone(self, reign: reigns.Reign, past: takeover.Past) -> None:
        stored = await self._store.all_budgets()
        present = {budget.spec.name for budget in stored}
        gone = [name for name in reign.core.names() if name not in present and await self._is_gone(name)]
        now = reign.now()
        self.update_times = {budget.spec.name: budget.update_time for budget in stored}
        for budget in stored:
            reign.core.define(budget.spec, budget.version, now)
            if past.must_quarantine(budget.spec.name):
                reign.core.quarantine(budget.spec.name, now)
        for name in gone:
            reign.core.delete(name, now)
        await reign.flush()
        if past.keys:
            # Only now: whoever took over before this instant must quarantine again.
            reign.clear_away(past.keys)
            await reign.flush()
        _log.info("definitions_in_force", budgets=len(stored))

    async def _is_gone(self, name: str) -> bool:
        """Whether Postgres has no such budget; one that this version cannot read stays in force as it is."""
        try:
            return await self._stored(name) is None
        except errors.PostgresUnavailable:
            raise
        except errors.LeaseholdError:
            return False
