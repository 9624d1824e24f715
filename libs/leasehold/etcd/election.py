"""Leader election: one key, put if absent under an etcd lease.

**The lease is a hint about liveness, never the proof of safety.** etcd's leases do not fence: a leader that was
frozen, or whose etcd restarted TTLs, may believe that it leads while another was elected. What makes a late
leader harmless is the epoch (`leasehold.core.epoch`), which contains `Won.revision`, grows with each election,
and is compared in every etcd transaction and every Postgres batch. Losing the lease only tells a leader to stop
early, and the others to start.

An etcd lease ends some time *after* its TTL: measured half a second later, and a whole TTL more where etcd's
leader dies too. `Election.resign` hands over within milliseconds.
"""

import asyncio
import random
from dataclasses import dataclass
from types import TracebackType

from leasehold.core import errors
from leasehold.etcd import clock as clocks
from leasehold.etcd import keeper as keepers
from leasehold.etcd import observer as observers
from leasehold.etcd import port
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_RETRY_SECONDS_MIN = 0.05
_RETRY_SECONDS_MAX = 1.0
_TRANSIENT = (errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted)


@dataclass(frozen=True, slots=True)
class Won:
    """An election won: the revision at which, and the id of the cluster in which it counts."""

    revision: int
    cluster_id: int


@dataclass(slots=True)
class _Reign:
    keeper: keepers.LeaseKeeper
    guard: asyncio.Task[None]


class Election:
    """A candidate for the leadership of ``prefix``; also knows who leads. An async context manager.

    ``address`` is what others are told to call while this candidate leads. ``ttl_seconds`` is how long, at
    least, the others wait after a crash or a freeze. Randomness only spreads retries after errors.

    ``lost`` is the event of the present reign (a new one with each `campaign` that wins): set when the lease
    could not be kept or the key is no longer this candidate's; ``lost_reason`` says which.
    """

    def __init__(
        self,
        etcd: port.EtcdPort,
        prefix: str,
        candidate_id: str,
        address: str,
        ttl_seconds: int,
        *,
        clock: clocks.Clock | None = None,
        randomness: random.Random | None = None,
    ) -> None:
        self._etcd = etcd
        self._key = observers.leader_key(prefix)
        self._candidate_id = candidate_id
        self._address = address
        self._ttl_seconds = ttl_seconds
        self._clock: clocks.Clock = clock or clocks.SystemClock()
        self._random = randomness or random.Random()  # noqa: S311 -- spreads retries, guards nothing
        self._reign: _Reign | None = None
        self.observer = observers.LeaderObserver(etcd, prefix)
        self.lost = asyncio.Event()
        self.lost_reason = ""

    def start(self) -> None:
        """Starts following who leads; at most once."""
        self.observer.start()

    async def close(self) -> None:
        """Resigns if leading, and stops following."""
        await self.resign()
        await self.observer.close()

    async def __aenter__(self) -> "Election":
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def leader(self) -> observers.Leader | None:
        """The leader known last, be it this candidate, or None. For news: ``observer.wait_until``."""
        return self.observer.leader

    async def campaign(self) -> Won:
        """Waits until there is no leader and this candidate becomes it. Ends an earlier reign of its own first.

        Goes on through etcd's absences. Raises only what waiting does not heal: `ForeignEtcdCluster`,
        `PermissionDenied`, `InvalidArgument`, `EtcdUnavailable` where the client was closed. Cancelling it
        withdraws the candidacy.
        """
        await self.resign()
        failures = 0
        while True:
            await self.observer.wait_until(lambda leader: leader is None)
            asked_at = self._clock.now()
            try:
                lease = await self._etcd.grant_lease(self._ttl_seconds)
            except _TRANSIENT as error:
                _log.warning("candidate_got_no_lease", candidate=self._candidate_id, error=error.message)
                await self._pause(failures)
                failures += 1
                continue
            failures = 0
            if won := await self._stand(lease, asked_at):
                return won

    async def resign(self) -> bool:
        """Gives up the leadership, if held; others are elected at once. Does not set ``lost``.

        Returns whether etcd confirmed it; otherwise the leadership ends with the lease's TTL.
        """
        reign, self._reign = self._reign, None
        if reign is None:
            return True
        reign.guard.cancel()
        await asyncio.wait([reign.guard])
        return await keepers.release(self._etcd, reign.keeper)

    async def _stand(self, lease: port.Lease, asked_at: float) -> Won | None:
        """One candidacy under one lease; the lease is given back unless it wins."""
        keeper = keepers.LeaseKeeper(self._etcd, lease, granted_at=asked_at, clock=self._clock)
        keeper.start()
        won = None
        try:
            won = await self._put_if_absent(keeper)
            if won:
                self._reign_with(keeper, won)
            return won
        finally:
            if won is None:
                await keepers.release(self._etcd, keeper)

    async def _put_if_absent(self, keeper: keepers.LeaseKeeper) -> Won | None:
        """Puts the key, if absent. None: another leads, or the lease ended.

        A reply may be lost while the put was, or will yet be, committed. So it is tried again under the *same*
        lease until there is an answer: a key found with that lease is ours, whichever attempt wrote it.
        """
        lease_id = keeper.lease.lease_id
        put = port.Put(self._key, observers.encode(self._candidate_id, self._address), lease_id)
        failures = 0
        while not keeper.lost.is_set():
            try:
                cluster_id = await self._etcd.cluster_id()
                result = await self._etcd.txn([port.Compare.missing(self._key)], [put], [port.Get(self._key)])
            except errors.NotFound:
                return None
            except _TRANSIENT as error:
                _log.warning("candidacy_unanswered", candidate=self._candidate_id, error=error.message)
                await self._pause(failures)
                failures += 1
                continue
            if result.succeeded:
                leader = observers.Leader(self._candidate_id, self._address, result.revision)
            elif record := result.found[0]:
                leader = observers.decode(record)
                if record.lease_id != lease_id:
                    self.observer.note(result.revision, leader)
                    return None
            self.observer.note(result.revision, leader)
            return Won(leader.revision, cluster_id)
        return None

    def _reign_with(self, keeper: keepers.LeaseKeeper, won: Won) -> None:
        self.lost, self.lost_reason = asyncio.Event(), ""
        self._reign = _Reign(keeper, asyncio.create_task(self._guard(keeper, won)))
        _log.info("leader_elected", candidate=self._candidate_id, revision=won.revision)

    async def _guard(self, keeper: keepers.LeaseKeeper, won: Won) -> None:
        """Sets ``lost`` as soon as the lease is lost or the key is seen gone or taken."""
        kept = asyncio.create_task(keeper.lost.wait())
        held = asyncio.create_task(
            self.observer.wait_until(lambda leader: leader is None or leader.revision != won.revision)
        )
        try:
            await asyncio.wait({kept, held}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            kept.cancel()
            held.cancel()
            await asyncio.wait({kept, held})
        self.lost_reason = keeper.reason or "the leader's key is gone or taken"
        if not held.cancelled() and (failure := held.exception()):
            self.lost_reason = str(failure)
        self.lost.set()
        _log.warning("leadership_lost", candidate=self._candidate_id, reason=self.lost_reason)

    async def _pause(self, failures: int) -> None:
        seconds = min(_RETRY_SECONDS_MAX, _RETRY_SECONDS_MIN * 2 ** min(failures, 10))
        await self._clock.sleep(seconds * self._random.uniform(0.5, 1.5))
