"""Who leads, as told by a watch on the leader's key."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from leasehold.core import errors
from leasehold.etcd import port
from leasehold.observe import logs

_log = logs.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Leader:
    """A leader: who, where it is reached, and the etcd revision at which it was elected."""

    candidate_id: str
    address: str
    revision: int


def leader_key(prefix: str) -> str:
    """The key that the leader of this prefix holds."""
    return f"{prefix.rstrip('/')}/leader"


def encode(candidate_id: str, address: str) -> bytes:
    """The value of the leader's key."""
    return json.dumps({"id": candidate_id, "address": address}).encode()


def decode(record: port.KeyValue) -> Leader:
    """The leader that a record tells of; id and address are empty where the value cannot be read."""
    try:
        value = json.loads(record.value)
        return Leader(str(value["id"]), str(value["address"]), record.create_revision)
    except (ValueError, TypeError, KeyError):
        _log.warning("leader_record_unreadable", key=record.key, revision=record.mod_revision)
        return Leader("", "", record.create_revision)


class LeaderObserver:
    """Follows the leader of a prefix, from `start` to `close`. An async context manager.

    For candidates and for those who only want to know. What it tells may be late, never out of order.
    """

    def __init__(self, etcd: port.EtcdPort, prefix: str) -> None:
        self._etcd = etcd
        self._key = leader_key(prefix)
        self._revision = -1  # of the newest news; -1: none yet
        self._leader: Leader | None = None
        self._changed = asyncio.Event()
        self._failure: errors.LeaseholdError | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def leader(self) -> Leader | None:
        """The leader known last, or None: there is none, or nothing is known yet."""
        return self._leader

    async def wait_until(self, condition: Callable[[Leader | None], bool]) -> Leader | None:
        """Returns the leader (or None) as soon as something is known that fulfils the condition.

        Raises what ended the watch, if it ended: `ForeignEtcdCluster`, `PermissionDenied`, or `EtcdUnavailable`
        where the client was closed.
        """
        while True:
            changed = self._changed
            if self._failure:
                raise self._failure
            if self._revision >= 0 and condition(self._leader):
                return self._leader
            await changed.wait()

    def note(self, revision: int, leader: Leader | None) -> None:
        """Takes in what was true at a revision, whoever tells; ignored if older than what is known."""
        if revision < self._revision:
            return
        self._revision, self._leader = revision, leader
        self._announce()

    def start(self) -> None:
        """Starts following; at most once."""
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stops following."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def __aenter__(self) -> "LeaderObserver":
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _announce(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def _follow(self) -> None:
        try:
            async with contextlib.aclosing(self._etcd.watch_prefix(self._key)) as events:
                async for event in events:
                    self._take_in(event)
        except errors.LeaseholdError as error:
            self._failure = error
            self._announce()

    def _take_in(self, event: port.WatchEvent) -> None:
        match event:
            case port.Reset(listing):
                holder = next((record for record in listing.records if record.key == self._key), None)
                self.note(listing.revision, decode(holder) if holder else None)
            case port.KeyPut(record) if record.key == self._key:
                self.note(record.mod_revision, decode(record))
            case port.KeyDeleted(key, revision) if key == self._key:
                self.note(revision, None)
            case _:  # a longer key with the same beginning
                pass
