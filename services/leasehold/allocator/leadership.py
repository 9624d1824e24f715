"""Becoming the leader, reigning, and losing it.

A takeover, in this order: win the election; learn the generation; write the epoch, while still the elected
one; read every definition and record at one revision; serve leases. Postgres may be away for all of that but
the very first start. Then raise the epoch in Postgres before the first read, and bring the definitions in line
with it.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from leasehold.allocator import records
from leasehold.allocator import reign as reigns
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.etcd import election as elections
from leasehold.etcd import port as etcd_port
from leasehold.observe import logs
from leasehold.postgres import port
from leasehold.runtime import clock as clocks

POSTGRES_RETRY_SECONDS = 0.5

_log = logs.get_logger(__name__)


class Leadership:
    """Campaigns for ever; `reign` is the present one, or None while another leads."""

    def __init__(
        self,
        etcd: etcd_port.EtcdPort,
        store: port.Store,
        keys: records.Keys,
        *,
        candidate_id: str,
        accept_new_etcd: bool = False,
    ) -> None:
        self.reign: reigns.Reign | None = None
        #: Set while Postgres's definitions are those in force: admin calls may begin.
        self.is_synchronized = asyncio.Event()
        self._etcd = etcd
        self._store = store
        self._candidacy: elections.Election | None = None
        self._keys = keys
        self._candidate_id = candidate_id
        self._accept_new_etcd = accept_new_etcd
        self._fenced = asyncio.Event()
        self._admin_lock = asyncio.Lock()

    def _successor_address(self) -> str:
        leader = self._candidacy.leader() if self._candidacy is not None else None
        is_other = leader is not None and leader.candidate_id != self._candidate_id
        return leader.address if leader is not None and is_other else ""

    def require(self) -> reigns.Reign:
        """The present reign; raises `NotLeader`."""
        reign = self.reign
        if reign is None or reign.is_over:
            raise errors.NotLeader(self._successor_address())
        return reign

    @property
    def _election(self) -> elections.Election:
        assert self._candidacy is not None, "there is no reign without an election"
        return self._candidacy

    async def run(self, candidacy: elections.Election) -> None:
        """Campaign and reign, over and over. Raises only what waiting does not heal."""
        self._candidacy = candidacy
        while True:
            won = await candidacy.campaign()
            try:
                await self._reign(won)
            except errors.StaleEpoch as error:
                _log.warning("reign_ended", why=error.message)
            finally:
                await self._step_down()

    async def step_down(self) -> None:
        """Give the leadership up at once: another replica is elected without waiting for a TTL."""
        await self._step_down()
        if self._candidacy is not None:
            await self._candidacy.resign()

    async def _step_down(self) -> None:
        reign, self.reign = self.reign, None
        self.is_synchronized.clear()
        if reign is not None:
            await reign.close(errors.NotLeader(self._successor_address()))

    async def _reign(self, won: elections.Won) -> None:
        self._fenced = asyncio.Event()
        held = await self._etcd.get(self._keys.epoch)
        generation, is_new = await self._generation(won, held)
        epoch = epochs.Epoch(generation, won.revision, won.cluster_id)
        await self._write_epoch(won, epoch)
        reign = reigns.Reign(
            epoch,
            self._etcd,
            self._keys,
            self._store,
            clock=clocks.MonotonicClock(),
            boot_clock=clocks.BootClock(),
            on_fenced=lambda _: self._fenced.set(),
        )
        await self._take_over(reign)
        self.reign = reign
        _log.info("leading", epoch=epoch.encode(), budgets=len(reign.core.budgets))
        await self._run_until_lost(reign, must_quarantine=is_new)

    async def _run_until_lost(self, reign: reigns.Reign, *, must_quarantine: bool) -> None:
        tasks = [
            asyncio.create_task(reign.run(), name="committer"),
            asyncio.create_task(self._synchronize(reign, must_quarantine), name="postgres-sync"),
            asyncio.create_task(self._election.lost.wait(), name="election-lost"),
            asyncio.create_task(self._fenced.wait(), name="fenced"),
        ]
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if tasks[2].done() or tasks[3].done():
                    raise errors.StaleEpoch(self._election.lost_reason or "Postgres knows a later leader")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Takeover

    async def _generation(self, won: elections.Won, held: etcd_port.KeyValue | None) -> tuple[int, bool]:
        """(generation, whether it was just opened because the etcd is a new one)."""
        if held is not None:
            epoch = epochs.Epoch.decode(held.value.decode())
            if epoch.etcd_cluster_id == won.cluster_id:
                return epoch.generation, False
        while True:
            try:
                await self._store.migrate()
                generation = await self._store.claim_generation(
                    won.cluster_id, accept_foreign=self._accept_new_etcd
                )
                return generation, generation > 1
            except errors.PostgresUnavailable as error:
                if self._election.lost.is_set():
                    raise errors.StaleEpoch(self._election.lost_reason) from error
                _log.warning("first_start_waits_for_postgres", error=error.message)
                await asyncio.sleep(POSTGRES_RETRY_SECONDS)

    async def _write_epoch(self, won: elections.Won, epoch: epochs.Epoch) -> None:
        """From here on no earlier leader can write; fails if a later one was elected."""
        still_elected = etcd_port.Compare.create_revision(self._keys.leader, won.revision)
        put = etcd_port.Put(self._keys.epoch, epoch.encode().encode())
        while True:
            try:
                result = await self._etcd.txn([still_elected], [put])
            except (errors.EtcdUnavailable, errors.DeadlineExceeded) as error:
                if self._election.lost.is_set():
                    raise errors.StaleEpoch(self._election.lost_reason) from error
                await asyncio.sleep(0.1)
                continue
            if not result.succeeded:
                raise errors.StaleEpoch("another leader was elected during the takeover")
            return

    async def _take_over(self, reign: reigns.Reign) -> None:
        while True:
            try:
                definitions = await self._etcd.get_prefix(self._keys.budgets)
                listing = await self._etcd.get_prefix(self._keys.leases, revision=definitions.revision)
                break
            except (errors.EtcdUnavailable, errors.DeadlineExceeded) as error:
                if self._election.lost.is_set():
                    raise errors.StaleEpoch(self._election.lost_reason) from error
                await asyncio.sleep(0.1)
        now = reign.now()
        for record in definitions.records:
            try:
                spec, version, is_retired = records.decode_definition(record.value)
            except errors.InvalidArgument as error:
                _log.error("definition_unreadable", key=record.key, error=error.message)
                continue
            reign.core.restore_definition(spec, version, now, is_retired=is_retired)
        self._restore_records(reign, listing.records, now)

    def _restore_records(self, reign: reigns.Reign, found: Sequence[etcd_port.KeyValue], now: float) -> None:
        for record in found:
            try:
                lease = records.decode_record(self._keys, record.key, record.value)
            except errors.InvalidArgument as error:
                # A bad record is set aside alone; its budget cannot know what it stood for.
                _log.error("record_unreadable", key=record.key, error=error.message)
                continue
            if not reign.core.restore_record(lease, now):
                _log.error("record_without_budget", key=record.key)

    # Postgres

    async def _synchronize(self, reign: reigns.Reign, must_quarantine: bool) -> None:
        """Bring the definitions in line with Postgres, however long it is away."""
        while True:
            try:
                await self._store.migrate()
                await self._store.raise_epoch(reign.epoch)
                stored = await self._store.all_budgets()
                break
            except errors.PostgresUnavailable as error:
                _log.warning("serving_without_postgres", error=error.message)
                await asyncio.sleep(POSTGRES_RETRY_SECONDS)
        now = reign.now()
        for budget in stored:
            is_unknown = budget.spec.name not in reign.core.budgets
            reign.core.define(budget.spec, budget.version, now)
            if must_quarantine and is_unknown:
                reign.core.quarantine(budget.spec.name, now)
        present = {budget.spec.name for budget in stored}
        for name in reign.core.names():
            if name not in present:
                reign.core.delete(name, now)
        await reign.flush()
        self.is_synchronized.set()
        _log.info("definitions_in_force", budgets=len(stored))
        # Runs for the length of the reign, so that its end is never taken for a failure.
        await asyncio.Event().wait()

    # Administration

    async def put_budget(
        self,
        spec: model.BudgetSpec,
        *,
        request_id: str = "",
        expected_version: int = 0,
        actor: str = "",
        cause: str = "",
    ) -> port.StoredBudget:
        """Postgres first, then etcd, then the answer. Raises `PostgresUnavailable` while that is away."""
        async with self._admin_lock:
            reign = self._admin()
            reign.core.check_definition(spec)
            with self._fencing():
                stored = await self._store.put_budget(
                    reign.epoch,
                    spec,
                    request_id=request_id,
                    expected_version=expected_version,
                    actor=actor,
                    cause=cause,
                )
                self._require_same(reign)
                reign.core.define(stored.spec, stored.version, reign.now())
                await reign.flush()
        return stored

    async def delete_budget(self, name: str, *, request_id: str = "", actor: str = "", cause: str = "") -> None:
        """Postgres first, then the leases end. Raises `NotFound`."""
        async with self._admin_lock:
            reign = self._admin()
            with self._fencing():
                await self._store.delete_budget(
                    reign.epoch, name, request_id=request_id, actor=actor, cause=cause
                )
                self._require_same(reign)
                if name in reign.core.names():
                    reign.core.delete(name, reign.now())
                await reign.flush()

    def _admin(self) -> reigns.Reign:
        reign = self.require()
        if not self.is_synchronized.is_set():
            raise errors.PostgresUnavailable(
                "budgets cannot be changed: the definitions in Postgres have not been read yet",
                retry_after_seconds=1.0,
            )
        return reign

    @contextlib.contextmanager
    def _fencing(self) -> Iterator[None]:
        try:
            yield
        except errors.StaleEpoch as error:
            self._fenced.set()
            raise errors.NotLeader(self._successor_address()) from error

    def _require_same(self, reign: reigns.Reign) -> None:
        if self.reign is not reign or reign.is_over:
            raise errors.NotLeader(self._successor_address())
