"""Keeps an etcd lease alive, and tells when it may no longer be.

Being kept is a hint that this process is alive and reaches etcd; it proves nothing to others. Not being kept
is reported on this process's own clock, without asking etcd: a client that is cut off learns of its loss when
the TTL it was last promised has passed, counted from before the renewal was *sent*, so not after etcd ends it.
"""

import asyncio
import contextlib
from types import TracebackType

from leasehold.core import errors
from leasehold.etcd import clock as clocks
from leasehold.etcd import port
from leasehold.observe import logs

_log = logs.get_logger(__name__)

_RETRIES_PER_PERIOD = 5
"""After a failed renewal the next is tried after this part of the renewal period."""


class LeaseKeeper:
    """Renews one lease every third of its TTL, from `start` to `close`.

    ``lost`` is set, once and for good, when the lease has ended or can no longer be relied on; ``reason`` then
    says why. ``granted_at`` is the clock's time from before the grant was asked for. An async context manager.
    """

    def __init__(
        self, etcd: port.EtcdPort, lease: port.Lease, *, granted_at: float, clock: clocks.Clock | None = None
    ) -> None:
        self._etcd = etcd
        self._clock: clocks.Clock = clock or clocks.SystemClock()
        self._ttl_seconds = lease.ttl_seconds
        self._expires_at = granted_at + lease.ttl_seconds
        self._tasks: list[asyncio.Task[None]] = []
        self.lease = lease
        self.lost = asyncio.Event()
        self.reason = ""

    @property
    def remaining_seconds(self) -> float:
        """How long the lease lasts for certain if no further renewal succeeds; 0 once it is lost."""
        return 0.0 if self.lost.is_set() else max(0.0, self._expires_at - self._clock.now())

    def start(self) -> None:
        """Starts renewing; at most once."""
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._watch_expiry())]

    async def close(self) -> None:
        """Stops renewing. Neither revokes the lease nor sets ``lost``."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> "LeaseKeeper":
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _renew(self) -> None:
        sent_at = self._expires_at - self._ttl_seconds
        failed = False
        while not self.lost.is_set():
            period = self._ttl_seconds / 3
            due_at = self._clock.now() + period / _RETRIES_PER_PERIOD if failed else sent_at + period
            await self._clock.sleep(due_at - self._clock.now())
            sent_at = self._clock.now()
            try:
                self._ttl_seconds = await self._etcd.keep_alive(self.lease.lease_id)
            except (errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted) as error:
                failed = True
                _log.warning("etcd_lease_not_renewed", lease=f"{self.lease.lease_id:x}", error=error.message)
            except errors.LeaseholdError as error:
                self._lose(error.message)
            else:
                failed = False
                self._expires_at = sent_at + self._ttl_seconds

    async def _watch_expiry(self) -> None:
        """A task of its own: a renewal that hangs must not put off the report."""
        while (remaining := self.remaining_seconds) > 0:
            await self._clock.sleep(remaining)
        self._lose("no renewal succeeded within the TTL")

    def _lose(self, reason: str) -> None:
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()


async def release(etcd: port.EtcdPort, keeper: LeaseKeeper) -> bool:
    """Stops renewing and revokes the lease; tells whether etcd confirmed it. Otherwise it ends with its TTL."""
    await keeper.close()
    with contextlib.suppress(errors.LeaseholdError):
        await etcd.revoke_lease(keeper.lease.lease_id)
        return True
    return False
