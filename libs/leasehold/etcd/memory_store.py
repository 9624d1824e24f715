"""The records of the in-memory twin: a multi-version map with etcd's rules. Knows no tasks and no clock."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from leasehold.core import errors
from leasehold.etcd import port

Change = port.KeyPut | port.KeyDeleted


@dataclass(slots=True)
class _Lease:
    ttl_seconds: int
    expires_at: float
    keys: set[str] = field(default_factory=set)


def _revision_of(change: Change) -> int:
    return change.record.mod_revision if isinstance(change, port.KeyPut) else change.revision


def _key_of(change: Change) -> str:
    return change.record.key if isinstance(change, port.KeyPut) else change.key


def _no_lease(lease_id: int) -> errors.NotFound:
    return errors.NotFound("etcd lease not found", metadata={"lease_id": f"{lease_id:x}"})


class Store:
    """Records, their history back to ``compacted_revision``, and leases.

    ``revision`` is 1 when empty and grows by one with each transaction that changes something. History longer
    than ``history_revisions_max`` changes is compacted to half of it, so that a long run stays within bounds.
    """

    def __init__(self, txn_ops_max: int, history_revisions_max: int) -> None:
        self.revision = 1
        self.compacted_revision = 0
        self._txn_ops_max = txn_ops_max
        self._history_max = history_revisions_max
        self._records: dict[str, port.KeyValue] = {}
        self._base: dict[str, port.KeyValue] = {}  # as of compacted_revision
        self._log: list[Change] = []  # after compacted_revision, in order
        self._leases: dict[int, _Lease] = {}
        self._lease_count = 0

    # -- reading

    def get(self, key: str) -> port.KeyValue | None:
        """The newest record of the key."""
        _require_key(key)
        return self._records.get(key)

    def listing(self, prefix: str, revision: int | None) -> port.Listing:
        """The records under the prefix as of ``revision``, or of now."""
        if revision is None or revision == self.revision:
            return port.Listing(self.revision, _under(prefix, self._records))
        self._require_history(revision)
        records = dict(self._base)
        for change in self._log[: self._position_after(revision)]:
            if isinstance(change, port.KeyPut):
                records[change.record.key] = change.record
            else:
                records.pop(change.key, None)
        return port.Listing(revision, _under(prefix, records))

    def events(self, prefix: str, start_revision: int) -> list[Change]:
        """The changes under the prefix at ``start_revision`` and later, in order."""
        changes = self._log[self._position_after(start_revision - 1) :]
        return [change for change in changes if _key_of(change).startswith(prefix)]

    def size_bytes(self) -> int:
        """Bytes of the newest keys and values."""
        return sum(len(record.key.encode()) + len(record.value) for record in self._records.values())

    def _position_after(self, revision: int) -> int:
        return bisect.bisect_right(self._log, revision, key=_revision_of)

    def _require_history(self, revision: int) -> None:
        cause = None
        if revision < self.compacted_revision:
            cause = "compacted"
        elif revision > self.revision:
            cause = "future_revision"
        if cause:
            raise errors.FailedPrecondition(
                f"revision {revision} is not to be had: {cause}", metadata={"cause": cause}
            )

    # -- changing

    def txn(
        self, compares: Sequence[port.Compare], then: Sequence[port.Op], otherwise: Sequence[port.Op]
    ) -> port.TxnResult:
        """See `EtcdPort.txn`. Checks everything before it changes anything."""
        if max(len(compares), len(then), len(otherwise)) > self._txn_ops_max:
            raise errors.InvalidArgument(
                f"a transaction has at most {self._txn_ops_max} compares or operations", field="then"
            )
        for compare in compares:
            _check_compare(compare)
        _check_ops(then)
        _check_ops(otherwise)
        succeeded = all(self._holds(compare) for compare in compares)
        ops = then if succeeded else otherwise
        for op in ops:
            if isinstance(op, port.Put) and op.lease_id and op.lease_id not in self._leases:
                raise _no_lease(op.lease_id)
        return self._apply(succeeded, ops)

    def _apply(self, succeeded: bool, ops: Sequence[port.Op]) -> port.TxnResult:
        revision, log_length = self.revision + 1, len(self._log)
        found: list[port.KeyValue | None] = []
        deleted = 0
        for op in ops:
            match op:
                case port.Put():
                    self._put(op, revision)
                case port.Delete():
                    deleted += self._delete(self._matching(op), revision)
                case port.Get():
                    found.append(self._records.get(op.key))
        if len(self._log) > log_length:
            self.revision = revision
            self._bound_history()
        return port.TxnResult(succeeded, self.revision, tuple(found), deleted)

    def _holds(self, compare: port.Compare) -> bool:
        record = self._records.get(compare.key)
        match compare.target:
            case port.CompareTarget.VALUE:
                return record is not None and record.value == compare.expected
            case port.CompareTarget.CREATE_REVISION:
                actual = record.create_revision if record else 0
            case port.CompareTarget.MOD_REVISION:
                actual = record.mod_revision if record else 0
            case port.CompareTarget.VERSION:
                actual = record.version if record else 0
        return actual == compare.expected

    def _put(self, op: port.Put, revision: int) -> None:
        before = self._records.get(op.key)
        created, version = (before.create_revision, before.version + 1) if before else (revision, 1)
        record = port.KeyValue(op.key, bytes(op.value), created, revision, version, op.lease_id)
        if before:
            self._detach(before)
        if op.lease_id:
            self._leases[op.lease_id].keys.add(op.key)
        self._records[op.key] = record
        self._log.append(port.KeyPut(record))

    def _matching(self, op: port.Delete) -> list[str]:
        if op.is_prefix:
            return sorted(key for key in self._records if key.startswith(op.key))
        return [op.key] if op.key in self._records else []

    def _delete(self, keys: Sequence[str], revision: int) -> int:
        for key in keys:
            self._detach(self._records.pop(key))
            self._log.append(port.KeyDeleted(key, revision))
        return len(keys)

    def _detach(self, record: port.KeyValue) -> None:
        if lease := self._leases.get(record.lease_id):
            lease.keys.discard(record.key)

    def compact(self, revision: int) -> None:
        """See `EtcdPort.compact`."""
        if revision == self.compacted_revision:
            raise errors.FailedPrecondition(
                f"revision {revision} is compacted already", metadata={"cause": "compacted"}
            )
        self._require_history(revision)
        self._base = {record.key: record for record in self.listing("", revision).records}
        del self._log[: self._position_after(revision)]
        self.compacted_revision = revision

    def _bound_history(self) -> None:
        if len(self._log) > self._history_max:
            self.compact(_revision_of(self._log[len(self._log) // 2]))

    # -- leases

    def grant(self, ttl_seconds: int, now: float) -> port.Lease:
        """A new lease that ends at ``now + ttl_seconds``."""
        if ttl_seconds < 1:
            raise errors.InvalidArgument("a lease's TTL is at least 1 second", field="ttl_seconds")
        self._lease_count += 1
        self._leases[self._lease_count] = _Lease(ttl_seconds, now + ttl_seconds)
        return port.Lease(self._lease_count, ttl_seconds)

    def renew(self, lease_id: int, now: float) -> int:
        """Starts the TTL anew and returns it."""
        lease = self._lease(lease_id)
        lease.expires_at = now + lease.ttl_seconds
        return lease.ttl_seconds

    def remaining_seconds(self, lease_id: int, now: float) -> int:
        """Seconds left, rounded down as etcd does."""
        return math.floor(self._lease(lease_id).expires_at - now)

    def revoke(self, lease_id: int) -> None:
        """Ends a lease, if there is one, and deletes its keys at one revision."""
        if lease := self._leases.get(lease_id):
            keys = sorted(lease.keys)
            if keys:
                self.revision += 1
                self._delete(keys, self.revision)
            del self._leases[lease_id]

    def expire(self, now: float) -> bool:
        """Ends every lease that is due; tells whether there was one."""
        due = [lease_id for lease_id, lease in self._leases.items() if lease.expires_at <= now]
        for lease_id in due:
            self.revoke(lease_id)
        return bool(due)

    def restart_leases(self, now: float) -> None:
        """Starts every TTL anew, as etcd does where its leader changes."""
        for lease in self._leases.values():
            lease.expires_at = now + lease.ttl_seconds

    def next_expiry(self) -> float | None:
        """When the next lease ends, or None where there is none."""
        return min((lease.expires_at for lease in self._leases.values()), default=None)

    def _lease(self, lease_id: int) -> _Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise _no_lease(lease_id)
        return lease


def _under(prefix: str, records: dict[str, port.KeyValue]) -> tuple[port.KeyValue, ...]:
    return tuple(records[key] for key in sorted(records) if key.startswith(prefix))


def _require_key(key: str) -> None:
    if not key:
        raise errors.InvalidArgument("a key has at least one character", field="key")


def _check_compare(compare: port.Compare) -> None:
    _require_key(compare.key)
    if isinstance(compare.expected, bytes) is not (compare.target is port.CompareTarget.VALUE):
        raise errors.InvalidArgument(f"a value is bytes, all else a number: {compare}", field="compares")


def _check_ops(ops: Iterable[port.Op]) -> None:
    """Refuses what etcd refuses: a key put twice in one list, or put and deleted."""
    put: set[str] = set()
    deletes: list[port.Delete] = []
    for op in ops:
        if isinstance(op, port.Put):
            if op.key in put:
                raise errors.InvalidArgument(f"{op.key!r} is put twice in one transaction", field="then")
            put.add(op.key)
        if isinstance(op, port.Delete):
            deletes.append(op)
        if not (isinstance(op, port.Delete) and op.is_prefix):
            _require_key(op.key)
    for delete in deletes:
        if any(key.startswith(delete.key) if delete.is_prefix else key == delete.key for key in put):
            raise errors.InvalidArgument(f"{delete.key!r} is put and deleted in one transaction", field="then")
