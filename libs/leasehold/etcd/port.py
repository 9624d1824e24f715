"""What Leasehold asks of etcd: the port, its value types, and what both adapters promise.

Two adapters fulfil it: `leasehold.etcd.adapter` (a real server over gRPC) and `leasehold.etcd.memory` (in this
process). One contract suite runs on both.

Errors, of every method:

- `EtcdUnavailable`: no server answered. ``metadata["outcome"]`` tells what became of a write: ``not_applied``
  (it never reached a server, or was refused) or ``unknown`` (it may have been, or may yet be, committed).
  Writes of unknown outcome are never repeated by an adapter, nor reported as `DeadlineExceeded`.
- `DeadlineExceeded`: a call that changes nothing was not answered in time.
- `ForeignEtcdCluster`: the server that answers is not of the cluster this client first spoke to (its data was
  wiped, or restored from a backup; other id, or revisions that went back): its revisions mean nothing here.
  The client is of no further use.
- `PermissionDenied`, `InvalidArgument`, `ResourceExhausted`: etcd refused the call and changed nothing.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from leasehold.core import errors

TXN_OPS_MAX_DEFAULT = 128
"""etcd's ``--max-txn-ops`` unless its operator chose another."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One record at one revision. ``lease_id`` is 0 where no etcd lease holds it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Every record under a prefix at one ``revision``, in byte order of the keys."""

    revision: int
    records: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Lease:
    """An etcd lease; ``ttl_seconds`` as granted, which etcd may round up to its own minimum."""

    lease_id: int
    ttl_seconds: int


@dataclass(frozen=True, slots=True)
class Status:
    """How the member that answered sees itself. ``leader_member_id`` is 0 where it knows no leader."""

    cluster_id: int
    member_id: int
    leader_member_id: int
    version: str
    revision: int
    db_size_bytes: int


class CompareTarget(enum.Enum):
    """Which property of a record a `Compare` looks at."""

    VALUE = "value"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: a property of one key equals ``expected``.

    A missing key has create revision, mod revision and version 0. It has no value: comparing one with it fails,
    even with ``b""``.
    """

    key: str
    target: CompareTarget
    expected: int | bytes

    @classmethod
    def value(cls, key: str, expected: bytes) -> "Compare":
        """The key is there with exactly this value."""
        return cls(key, CompareTarget.VALUE, expected)

    @classmethod
    def create_revision(cls, key: str, expected: int) -> "Compare":
        """The key was created at this revision, and not deleted since."""
        return cls(key, CompareTarget.CREATE_REVISION, expected)

    @classmethod
    def mod_revision(cls, key: str, expected: int) -> "Compare":
        """The key was last changed at this revision."""
        return cls(key, CompareTarget.MOD_REVISION, expected)

    @classmethod
    def version(cls, key: str, expected: int) -> "Compare":
        """The key was changed this many times since its creation, which counts as one."""
        return cls(key, CompareTarget.VERSION, expected)

    @classmethod
    def missing(cls, key: str) -> "Compare":
        """There is no such key."""
        return cls(key, CompareTarget.CREATE_REVISION, 0)


@dataclass(frozen=True, slots=True)
class Put:
    """Sets a key; with ``lease_id``, until that etcd lease ends."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes a key, or every key that begins with it."""

    key: str
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """Reads a key as the transaction sees it at this place of its list."""

    key: str


Op = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What a transaction did.

    ``succeeded`` tells which list ran: ``then`` (True) or ``otherwise``. ``revision`` is the store's revision
    after it; where it changed anything, the mod revision of all it put. ``found`` has one entry per `Get` of
    the list that ran, in order; ``deleted`` counts the keys that its `Delete`s removed.
    """

    succeeded: bool
    revision: int
    found: tuple[KeyValue | None, ...] = ()
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class KeyPut:
    """A key was created or changed."""

    record: KeyValue


@dataclass(frozen=True, slots=True)
class KeyDeleted:
    """A key was deleted, by a call or by the end of its lease, at ``revision``."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget what was seen of the prefix: this is all of it. Later events are newer than its revision."""

    listing: Listing


WatchEvent = KeyPut | KeyDeleted | Reset


class EtcdPort(ABC):
    """A client of one etcd cluster. Its methods may be called concurrently, from one event loop."""

    @property
    @abstractmethod
    def txn_ops_max(self) -> int:
        """The most compares, and the most operations in either list, of one transaction; see `chunks`."""

    @abstractmethod
    async def cluster_id(self) -> int:
        """The cluster's id, 1..2^64-1.

        It is made from the members' addresses and ``--initial-cluster-token``, and new where a backup is
        restored. Whoever wipes a cluster changes it only by choosing another token.
        """

    @abstractmethod
    async def get(self, key: str) -> KeyValue | None:
        """The newest committed record of a key (linearizable), or None."""

    @abstractmethod
    async def get_prefix(self, prefix: str, *, revision: int | None = None) -> Listing:
        """Every record whose key begins with ``prefix``, all at one revision: the newest, or the one asked for.

        Read page by page, so its size has no bound but memory. Raises `FailedPrecondition` where ``revision``
        is compacted already (``metadata["cause"]`` is ``compacted``) or not reached yet (``future_revision``).
        """

    @abstractmethod
    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        """Sets a key and returns the revision. Raises `NotFound` where the lease does not exist."""

    @abstractmethod
    async def delete(self, key: str, *, is_prefix: bool = False) -> int:
        """Deletes a key, or all that begin with it, and returns how many there were."""

    @abstractmethod
    async def txn(
        self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()
    ) -> TxnResult:
        """Runs ``then`` if every compare holds, else ``otherwise``; atomic, at one revision.

        A list may touch a key only once with `Put`; twice, or more than `txn_ops_max` operations, is
        `InvalidArgument`. Raises `NotFound` where a `Put` names a lease that does not exist.
        """

    @abstractmethod
    async def grant_lease(self, ttl_seconds: int) -> Lease:
        """A new etcd lease, which ends some time after ``ttl_seconds`` (1 or more) without renewal.

        With it go the keys put under it. The time is a minimum: a change of etcd's leader starts it again.
        """

    @abstractmethod
    async def keep_alive(self, lease_id: int) -> int:
        """Starts the lease's TTL again and returns it in seconds; `NotFound` where it has ended.

        `leasehold.etcd.keeper.LeaseKeeper` calls this at the right times.
        """

    @abstractmethod
    async def time_to_live(self, lease_id: int) -> int:
        """Whole seconds left on the lease; `NotFound` where it has ended."""

    @abstractmethod
    async def revoke_lease(self, lease_id: int) -> None:
        """Ends the lease and deletes its keys now. A lease that has ended already is no error."""

    @abstractmethod
    def watch_prefix(self, prefix: str, start_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Every change under ``prefix`` from ``start_revision`` on, in order, none left out and none twice.

        ``start_revision`` is at most one above the present revision, as after `get_prefix`; beyond that the
        cluster must have been wiped, and `ForeignEtcdCluster` says so. Without it the first event is a `Reset`
        with the present listing.

        The watch outlives disconnects. Where the changes it would need next have been compacted away, it lists
        anew and yields a `Reset`; changes in between are then not told one by one. It ends only by an error
        that waiting does not heal. Close it with `aclose()` (or `contextlib.aclosing`).
        """

    @abstractmethod
    async def compact(self, revision: int) -> None:
        """Forgets all history before ``revision``; `FailedPrecondition` as of `get_prefix`."""

    @abstractmethod
    async def status(self) -> Status:
        """What a member says of itself; needs no quorum."""

    @abstractmethod
    async def close(self) -> None:
        """Ends running calls and watches with `EtcdUnavailable` and gives back what the client held."""


def chunks(ops: Sequence[Op], ops_max: int, *, bytes_max: int = 1 << 20) -> Iterator[Sequence[Op]]:
    """Cuts ``ops`` into lists that each fit one transaction, in order.

    ``bytes_max`` bounds the sum of keys and values of one list (etcd refuses requests above its
    ``--max-request-bytes``, 1.5 MiB by default); an operation above it stands alone. Only each list is atomic:
    every one of them needs the caller's compares anew.
    """
    if ops_max < 1:
        raise errors.InvalidArgument("ops_max is at least 1", field="ops_max")
    start, size_bytes = 0, 0
    for index, op in enumerate(ops):
        key_bytes = len(op.key.encode("utf-8", "surrogateescape"))
        op_bytes = key_bytes + (len(op.value) if isinstance(op, Put) else 0)
        if index > start and (index - start >= ops_max or size_bytes + op_bytes > bytes_max):
            yield ops[start:index]
            start, size_bytes = index, 0
        size_bytes += op_bytes
    if start < len(ops):
        yield ops[start:]
