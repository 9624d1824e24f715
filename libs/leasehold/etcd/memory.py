"""etcd in this process: the same port and the same semantics, with faults at will. Ships with the product.

`MemoryCluster` is the server: revisions, history, leases on an injected clock, and faults that hit everyone.
`MemoryEtcd` is one client of it, with faults that hit only that client; `MemoryCluster.connect` makes as many
as wanted. `connect` makes a cluster with one client.

Every call lets other tasks run once before it takes effect, so that calls interleave as they do over a network.
"""

import asyncio
import collections
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from leasehold.core import errors
from leasehold.etcd import clock as clocks
from leasehold.etcd import memory_store, port

T = TypeVar("T")


class MemoryCluster:
    """The server side, shared by its clients. Faults here hit all of them."""

    def __init__(
        self,
        clock: clocks.Clock | None = None,
        *,
        txn_ops_max: int = port.TXN_OPS_MAX_DEFAULT,
        history_revisions_max: int = 100_000,
    ) -> None:
        self._clock: clocks.Clock = clock or clocks.SystemClock()
        self._txn_ops_max = txn_ops_max
        self._history_revisions_max = history_revisions_max
        self._cluster_ids = itertools.count(0x1EA5E401)
        self._away = False
        self._changed = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None
        self._expiry_due = 0.0
        self._clients: set[MemoryEtcd] = set()
        self._cluster_id, self._store = self._fresh()

    def _fresh(self) -> tuple[int, memory_store.Store]:
        store = memory_store.Store(self._txn_ops_max, self._history_revisions_max)
        return next(self._cluster_ids), store

    @property
    def txn_ops_max(self) -> int:
        """The bound on compares and operations of a transaction."""
        return self._txn_ops_max

    @property
    def id(self) -> int:
        """The cluster's id now; `wipe` changes it."""
        return self._cluster_id

    def connect(self) -> "MemoryEtcd":
        """One more client. It pins this cluster's id at its first call, as the real adapter does."""
        client = MemoryEtcd(self)
        self._clients.add(client)
        return client

    def go_away(self) -> None:
        """The server stops: calls fail at once, watches fall silent, no lease ends meanwhile."""
        self._away = True

    def come_back(self) -> None:
        """The server starts with all that it had; every lease begins its TTL anew, as in etcd."""
        if self._away:
            self._away = False
            self._store.restart_leases(self._clock.now())
        self.announce()

    def wipe(self) -> None:
        """The data is lost: another cluster id, revisions from 1 again, no record, no lease."""
        self._cluster_id, self._store = self._fresh()
        self.announce()

    def compact(self, revision: int) -> None:
        """Forgets history before ``revision``, as `EtcdPort.compact`, but also while the server is away."""
        self._store.compact(revision)

    def is_away(self) -> bool:
        """Whether `go_away` was called last."""
        return self._away

    def store(self) -> memory_store.Store:
        """The records as of now; leases that are due have ended."""
        if not self._away:
            self._store.expire(self._clock.now())
        return self._store

    def now(self) -> float:
        """Seconds on the cluster's clock."""
        return self._clock.now()

    def next_change(self) -> asyncio.Event:
        """Set by the next change of the records, or of a fault."""
        return self._changed

    def announce(self) -> None:
        """Delivers changes to watches and sets `next_change`."""
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()
        for client in self._clients:
            client.pull()
        self._arm_expiry()

    def _arm_expiry(self) -> None:
        """Lets a task end the next lease when it is due, so that watches hear of it though nobody calls."""
        due = self._store.next_expiry()
        if due is None or self._away or not self._clients:
            return
        if self._expiry is not None:
            if self._expiry_due <= due:
                return
            self._expiry.cancel()
        self._expiry_due = due
        self._expiry = asyncio.create_task(self._expire_at(due))

    async def _expire_at(self, due: float) -> None:
        await self._clock.sleep(due - self._clock.now())
        self._expiry = None
        self.store()
        self.announce()

    async def leave(self, client: "MemoryEtcd") -> None:
        """Forgets a client; the last one takes along the task that ends leases."""
        self._clients.discard(client)
        if not self._clients and self._expiry is not None:
            expiry, self._expiry = self._expiry, None
            expiry.cancel()
            await asyncio.wait([expiry])


class _Watcher:
    """One watch: where it stands, and the events that were delivered but not taken yet."""

    def __init__(self, prefix: str, start_revision: int | None) -> None:
        self.pending: collections.deque[port.WatchEvent] = collections.deque()
        self._prefix = prefix
        self._next_revision = start_revision  # None: list first

    def check(self, store: memory_store.Store) -> None:
        """Raises `ForeignEtcdCluster` where the watch has seen more than the store ever held."""
        if self._next_revision is not None and self._next_revision > store.revision + 1:
            raise errors.ForeignEtcdCluster(
                f"etcd's revision went back from {self._next_revision - 1} to {store.revision}"
            )

    def pull(self, store: memory_store.Store) -> None:
        """Takes over all that is new."""
        if self._next_revision is None or self._next_revision <= store.compacted_revision:
            listing = store.listing(self._prefix, None)
            self.pending.append(port.Reset(listing))
        else:
            self.pending.extend(store.events(self._prefix, self._next_revision))
        self._next_revision = max(self._next_revision or 0, store.revision + 1)


class MemoryEtcd(port.EtcdPort):
    """One client of a `MemoryCluster`. Faults here hit this client alone."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self.cluster = cluster
        self._pinned_id: int | None = None
        self._away = False
        self._closed = False
        self._lost_replies: list[bool] = []
        self._watchers: set[_Watcher] = set()

    def go_away(self) -> None:
        """Cuts this client off: its calls fail at once, its watches fall silent; others are not touched."""
        self._away = True

    def come_back(self) -> None:
        """Ends `go_away`; watches go on where they were."""
        self._away = False
        self.cluster.announce()

    def lose_next_reply(self, *, is_committed: bool = True) -> None:
        """The next write of this client ends with outcome ``unknown``, committed or not. May be queued."""
        self._lost_replies.append(is_committed)

    @property
    def txn_ops_max(self) -> int:
        """See `EtcdPort`."""
        return self.cluster.txn_ops_max

    def _require_open(self) -> None:
        if self._closed:
            raise errors.EtcdUnavailable("this etcd client is closed", metadata={"outcome": "not_applied"})

    def _is_reachable(self) -> bool:
        return not (self._away or self.cluster.is_away())

    def _pin(self) -> None:
        if self._pinned_id is None:
            self._pinned_id = self.cluster.id
        elif self._pinned_id != self.cluster.id:
            raise errors.ForeignEtcdCluster(
                f"etcd's cluster id was {self._pinned_id:016x} and is {self.cluster.id:016x}",
                metadata={"expected": f"{self._pinned_id:016x}", "found": f"{self.cluster.id:016x}"},
            )

    async def _read(self, action: Callable[[memory_store.Store], T]) -> T:
        await asyncio.sleep(0)
        self._require_open()
        if not self._is_reachable():
            raise errors.EtcdUnavailable(metadata={"outcome": "not_applied"})
        result = action(self.cluster.store())
        self._pin()
        return result

    async def _write(self, action: Callable[[memory_store.Store], T]) -> T:
        def announced(store: memory_store.Store) -> T:
            result = action(store)
            self.cluster.announce()
            return result

        if not self._lost_replies or not self._is_reachable():
            return await self._read(announced)
        if self._lost_replies.pop(0):
            await self._read(announced)
        raise errors.EtcdUnavailable("the reply was lost", metadata={"outcome": "unknown"})

    async def cluster_id(self) -> int:
        """See `EtcdPort`."""
        return await self._read(lambda store: self.cluster.id)

    async def get(self, key: str) -> port.KeyValue | None:
        """See `EtcdPort`."""
        return await self._read(lambda store: store.get(key))

    async def get_prefix(self, prefix: str, *, revision: int | None = None) -> port.Listing:
        """See `EtcdPort`."""
        return await self._read(lambda store: store.listing(prefix, revision))

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        """See `EtcdPort`."""
        result = await self._write(lambda store: store.txn((), (port.Put(key, value, lease_id),), ()))
        return result.revision

    async def delete(self, key: str, *, is_prefix: bool = False) -> int:
        """See `EtcdPort`."""
        result = await self._write(lambda store: store.txn((), (port.Delete(key, is_prefix),), ()))
        return result.deleted

    async def txn(
        self, compares: Sequence[port.Compare], then: Sequence[port.Op], otherwise: Sequence[port.Op] = ()
    ) -> port.TxnResult:
        """See `EtcdPort`."""
        return await self._write(lambda store: store.txn(compares, then, otherwise))

    async def grant_lease(self, ttl_seconds: int) -> port.Lease:
        """See `EtcdPort`."""
        now = self.cluster.now()
        return await self._write(lambda store: store.grant(ttl_seconds, now))

    async def keep_alive(self, lease_id: int) -> int:
        """See `EtcdPort`."""
        return await self._read(lambda store: store.renew(lease_id, self.cluster.now()))

    async def time_to_live(self, lease_id: int) -> int:
        """See `EtcdPort`."""
        return await self._read(lambda store: store.remaining_seconds(lease_id, self.cluster.now()))

    async def revoke_lease(self, lease_id: int) -> None:
        """See `EtcdPort`."""
        await self._write(lambda store: store.revoke(lease_id))

    async def compact(self, revision: int) -> None:
        """See `EtcdPort`."""
        await self._read(lambda store: store.compact(revision))

    async def status(self) -> port.Status:
        """See `EtcdPort`; the version is that of no etcd."""
        return await self._read(
            lambda store: port.Status(self.cluster.id, 1, 1, "in-memory", store.revision, store.size_bytes())
        )

    async def close(self) -> None:
        """See `EtcdPort`."""
        self._closed = True
        self.cluster.announce()
        await self.cluster.leave(self)

    async def watch_prefix(
        self, prefix: str, start_revision: int | None = None
    ) -> AsyncGenerator[port.WatchEvent, None]:
        """See `EtcdPort`."""
        watcher = _Watcher(prefix, start_revision)
        self._watchers.add(watcher)
        try:
            while True:
                changed = self.cluster.next_change()  # taken first: what happens from here on sets it
                self._require_open()
                if self._is_reachable():
                    self._pin()
                    watcher.check(self.cluster.store())
                    watcher.pull(self.cluster.store())
                while watcher.pending:
                    yield watcher.pending.popleft()
                await changed.wait()
        finally:
            self._watchers.discard(watcher)

    def pull(self) -> None:
        """Delivers what is new to the watches of this client, as a server would push it."""
        if self._is_reachable() and self._pinned_id == self.cluster.id:
            for watcher in self._watchers:
                watcher.pull(self.cluster.store())


def connect(clock: clocks.Clock | None = None) -> MemoryEtcd:
    """A client of a cluster of its own, which it offers as ``.cluster``."""
    return MemoryCluster(clock).connect()
