"""What a newly elected leader does before it serves: its generation, its epoch, what is outstanding.

In this order: learn the generation; write the epoch, while still the elected one, so that no earlier leader can
write any more; read every definition and record at one revision. Postgres may be away for all of it but the
very first start on an etcd.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from leasehold.allocator import records
from leasehold.allocator import reign as reigns
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.etcd import election as elections
from leasehold.etcd import failures
from leasehold.etcd import port as etcd_port
from leasehold.observe import logs
from leasehold.postgres import port

ETCD_RETRY_SECONDS = 0.1
POSTGRES_RETRY_SECONDS = 0.5

#: etcd is away or overwhelmed: waiting heals it.
TRANSIENT = (errors.EtcdUnavailable, errors.DeadlineExceeded, errors.ResourceExhausted)

_log = logs.get_logger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Past:
    """What etcd does not tell of what was granted before."""

    #: Nothing is known: this etcd has lost, or never had, the records of earlier leaders.
    is_unknown: bool
    #: Budgets of records that could not be placed.
    unknown_budgets: frozenset[str] = frozenset()
    #: Keys in etcd that tell of all that; they go once it is quarantined.
    keys: tuple[str, ...] = ()

    def must_quarantine(self, budget: str) -> bool:
        """Whether every unit of `budget` counts as just used."""
        return self.is_unknown or budget in self.unknown_budgets


KNOWN = Past(is_unknown=False)


class Takeover:
    """One election's takeover. Its methods raise `StaleEpoch` once the election is lost."""

    def __init__(
        self,
        etcd: etcd_port.EtcdPort,
        store: port.Store,
        keys: records.Keys,
        election: elections.Election,
        won: elections.Won,
    ) -> None:
        self._etcd = etcd
        self._store = store
        self._keys = keys
        self._election = election
        self._won = won

    # The epoch

    async def begin(self, *, accept_new_etcd: bool, is_set_back: bool) -> epochs.Epoch:
        """Write this reign's epoch; from then on no earlier leader can write.

        `is_set_back`: Postgres is known to have seen a later epoch of this etcd. Raises `ForeignEtcdCluster`
        where etcd is not, or not any more, the one whose epochs Postgres knows.
        """
        held = await self._persist(lambda: self._etcd.get(self._keys.epoch))
        generation = self._generation_held(held) if held is not None and not is_set_back else None
        is_blank = generation is None
        if generation is None:
            generation = await self._claim(accept_new_etcd=accept_new_etcd)
        epoch = epochs.Epoch(generation, self._won.revision, self._won.cluster_id)
        await self._write_epoch(epoch, is_blank=is_blank)
        return epoch

    def _generation_held(self, held: etcd_port.KeyValue) -> int | None:
        epoch = epochs.Epoch.decode(held.value.decode("utf-8", "replace"))
        return epoch.generation if epoch.etcd_cluster_id == self._won.cluster_id else None

    async def _claim(self, *, accept_new_etcd: bool) -> int:
        while True:
            try:
                await self._store.migrate()
                return await self._store.claim_generation(
                    self._won.cluster_id, accept_foreign=accept_new_etcd, is_blank=True
                )
            except errors.PostgresUnavailable as error:
                self._require_elected(error)
                _log.warning("first_start_waits_for_postgres", error=error.message)
                await asyncio.sleep(POSTGRES_RETRY_SECONDS)

    async def _write_epoch(self, epoch: epochs.Epoch, *, is_blank: bool) -> None:
        still_elected = etcd_port.Compare.create_revision(self._keys.leader, self._won.revision)
        ops: list[etcd_port.Op] = [etcd_port.Put(self._keys.epoch, epoch.encode().encode())]
        if is_blank:
            # Stays until all budgets are quarantined, whoever leads by then.
            ops.append(etcd_port.Put(self._keys.unknown_past, b""))
        result = await self._persist(lambda: self._etcd.txn([still_elected], ops))
        if not result.succeeded:
            raise errors.StaleEpoch("another leader was elected during the takeover")

    # What is outstanding

    async def restore(self, reign: reigns.Reign) -> Past:
        """Tell the reign's core every definition and record that etcd has. Their TTLs begin anew now."""
        marker = await self._persist(lambda: self._etcd.get(self._keys.unknown_past))
        definitions, leases = await self._persist(self._read)
        now = reign.now()
        for record in definitions.records:
            try:
                found = records.decode_definition(record.value)
            except errors.InvalidArgument as error:
                _log.error("definition_unreadable", key=record.key, error=error.message)
                continue
            reign.core.restore_definition(
                found.spec, found.version, now, is_retired=found.is_retired, aftermath=found.aftermath
            )
        unplaced = self._restore_records(reign, leases.records, now)
        keys = [*unplaced, self._keys.unknown_past] if marker is not None else [*unplaced]
        return Past(marker is not None, frozenset(unplaced.values()), tuple(keys))

    async def _read(self) -> tuple[etcd_port.Listing, etcd_port.Listing]:
        while True:
            definitions = await self._etcd.get_prefix(self._keys.budgets)
            try:
                leases = await self._etcd.get_prefix(self._keys.leases, revision=definitions.revision)
            except errors.FailedPrecondition as error:
                if not failures.is_compacted(error):
                    raise
                continue
            return definitions, leases

    def _restore_records(
        self, reign: reigns.Reign, found: Sequence[etcd_port.KeyValue], now: float
    ) -> dict[str, str]:
        """Keys of records that stand for nobody knows what, and their budgets, whose units are quarantined."""
        unplaced: dict[str, str] = {}
        for record in found:
            try:
                is_placed = reign.core.restore_record(
                    records.decode_record(self._keys, record.key, record.value), now
                )
            except errors.InvalidArgument as error:
                _log.error("record_unreadable", key=record.key, error=error.message)
                is_placed = False
            if is_placed:
                continue
            budget = record.key.removeprefix(self._keys.leases).split("/")[0]
            _log.error("record_not_placed", key=record.key, budget=budget)
            unplaced[record.key] = budget
        for budget in set(unplaced.values()) & set(reign.core.names()):
            reign.core.quarantine(budget, now)
        return unplaced

    # Patience

    async def _persist(self, call: Callable[[], Awaitable[Value]]) -> Value:
        """Repeat a call, which must allow that, until etcd answers."""
        while True:
            try:
                return await call()
            except TRANSIENT as error:
                self._require_elected(error)
                await asyncio.sleep(ETCD_RETRY_SECONDS)

    def _require_elected(self, cause: errors.LeaseholdError) -> None:
        if self._election.lost.is_set():
            raise errors.StaleEpoch(self._election.lost_reason) from cause
