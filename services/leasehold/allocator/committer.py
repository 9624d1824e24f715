"""Group commit: what the machines want written and said, in the order that makes it safe.

Events gather while a transaction is on its way. Then, over and over: (1) collect what all of them caused;
(2) write its records in transactions that compare the epoch, and that start now, after every event behind those
effects; (3) only when all are committed, send its messages. A batch whose outcome is unknown is written again,
which its absolute values make harmless; meanwhile nothing is said.

A transaction that went unanswered may still be under way (a proposal that a cut-off member forwards late), and
would bring back records that later batches have raised or replaced. So every transaction compares the revision
of the epoch's key too, and before anything is repeated that key is written anew: whatever was under way fails.
"""

import asyncio
from collections.abc import Callable, Sequence

from leasehold.allocator import records
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import effects
from leasehold.etcd import port as etcd_port
from leasehold.observe import logs

RETRY_SECONDS = 0.1
#: Beyond so many undelivered messages, while etcd is away, connections are given up: holders ask again.
MESSAGES_MAX = 50_000
#: After a commit with n messages the next begins n times so long after it, at the earliest, up to the maximum:
#: the work of etcd, and much of that of the connections and of this process, is per commit.
GATHER_SECONDS_PER_MESSAGE = 0.001
GATHER_SECONDS_MAX = 0.004

_log = logs.get_logger(__name__)

Message = effects.Send | effects.Reply


class Committer:
    """Writes one reign's records and releases its messages."""

    def __init__(
        self,
        etcd: etcd_port.EtcdPort,
        keys: records.Keys,
        epoch: epochs.Epoch,
        *,
        deliver: Callable[[Sequence[Message]], None],
        on_overflow: Callable[[], None],
        collect: Callable[[], None],
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._epoch_value = epoch.encode().encode()
        #: What every transaction compares; None: to be raised first, something unanswered may be under way.
        self._fence: tuple[etcd_port.Compare, ...] | None = None
        self._deliver = deliver
        self._on_overflow = on_overflow
        #: Adds, by `add`, what was caused since it was last called.
        self._collect = collect
        self._writes: dict[str, etcd_port.Op] = {}
        self._messages: list[Message] = []
        self._barriers: list[asyncio.Future[None]] = []
        self._filled = asyncio.Event()
        self._is_over = False
        self.is_etcd_away = False
        self.commits = 0
        self._began_at = float("-inf")
        self._committed_messages = 0

    def add(self, batch: Sequence[effects.Effect]) -> None:
        """Take effects; journal lines and process watches are not the committer's."""
        for effect in batch:
            match effect:
                case effects.Send() | effects.Reply():
                    self._messages.append(effect)
                case effects.PutRecord(record):
                    key = self._keys.lease(record.key)
                    self._writes[key] = etcd_port.Put(key, records.encode_record(record))
                case effects.DeleteRecord(key=record_key):
                    key = self._keys.lease(record_key)
                    self._writes[key] = etcd_port.Delete(key)
                case effects.PutDefinition():
                    key = self._keys.budget(effect.spec.name)
                    self._writes[key] = etcd_port.Put(key, records.encode_definition(effect))
                case effects.DeleteDefinition(budget):
                    key = self._keys.budget(budget)
                    self._writes[key] = etcd_port.Delete(key)
                case _:
                    continue
        if len(self._messages) > MESSAGES_MAX:
            # Never a part of what a connection was to hear: later messages build on earlier ones.
            self._messages = [message for message in self._messages if isinstance(message, effects.Reply)]
            self._on_overflow()
        if self._messages or self._writes:
            self._filled.set()

    def wake(self) -> None:
        """There is something to collect: begin a batch as soon as the last one is done."""
        self._filled.set()

    def delete(self, keys: Sequence[str]) -> None:
        """Remove keys that the core knows nothing of."""
        for key in keys:
            self._writes[key] = etcd_port.Delete(key)

    async def barrier(self) -> None:
        """Return once all that was added before is committed; raises `StaleEpoch` if the reign ends first."""
        if self._is_over:
            raise _reign_is_over()
        barrier: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append(barrier)
        self._filled.set()
        await barrier

    async def run(self) -> None:
        """Commit until the epoch is not the one in force any more: then raises `StaleEpoch`."""
        try:
            while True:
                await self._filled.wait()
                await self._gather()
                self._filled.clear()
                self._collect()
                writes, self._writes = self._writes, {}
                messages, self._messages = self._messages, []
                barriers, self._barriers = self._barriers, []
                if not (writes or messages or barriers):
                    continue
                self._committed_messages = len(messages)
                try:
                    await self._commit(list(writes.values()))
                except BaseException as error:
                    self._fail(barriers, error)
                    raise
                self.commits += 1
                if messages:
                    self._deliver(messages)
                for barrier in barriers:
                    if not barrier.done():
                        barrier.set_result(None)
        except BaseException as error:
            self._fail(self._barriers, error)
            raise
        finally:
            self._is_over = True

    async def _gather(self) -> None:
        """Under load, let more messages share the next commit."""
        loop = asyncio.get_running_loop()
        gather_seconds = min(GATHER_SECONDS_MAX, GATHER_SECONDS_PER_MESSAGE * self._committed_messages)
        pause_seconds = self._began_at + gather_seconds - loop.time()
        if pause_seconds > 0:
            await asyncio.sleep(pause_seconds)
        self._began_at = loop.time()

    @staticmethod
    def _fail(barriers: Sequence[asyncio.Future[None]], error: BaseException) -> None:
        told = error if isinstance(error, errors.LeaseholdError) else _reign_is_over()
        for barrier in barriers:
            if not barrier.done():
                barrier.set_exception(told)

    async def _commit(self, ops: list[etcd_port.Op]) -> None:
        if not ops:
            # Without operations etcd answers from a member's own, perhaps stale, state: read something.
            ops = [etcd_port.Get(self._keys.epoch)]
        for chunk in etcd_port.chunks(ops, self._etcd.txn_ops_max):
            await self._commit_chunk(chunk)

    async def _commit_chunk(self, ops: Sequence[etcd_port.Op]) -> None:
        while True:
            try:
                fence = self._fence or await self._raise_fence()
                result = await self._etcd.txn(fence, ops, [etcd_port.Get(self._keys.epoch)])
            except (errors.EtcdUnavailable, errors.DeadlineExceeded, errors.ResourceExhausted) as error:
                if not self.is_etcd_away:
                    _log.warning("etcd_away", error=str(error))
                self.is_etcd_away = True
                self._fence = None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if self.is_etcd_away:
                _log.info("etcd_answers_again")
            self.is_etcd_away = False
            if result.succeeded:
                return
            self._fence = None
            present = result.found[0]
            if present is None or present.value != self._epoch_value:
                raise _is_deposed()
            # An unanswered raise of the fence came late, after its repeat: once more.

    async def _raise_fence(self) -> tuple[etcd_port.Compare, ...]:
        """Write the epoch anew: no earlier transaction of this reign is applied after that."""
        is_in_force = etcd_port.Compare.value(self._keys.epoch, self._epoch_value)
        result = await self._etcd.txn([is_in_force], [etcd_port.Put(self._keys.epoch, self._epoch_value)])
        if not result.succeeded:
            raise _is_deposed()
        self._fence = (is_in_force, etcd_port.Compare.mod_revision(self._keys.epoch, result.revision))
        return self._fence


def _is_deposed() -> errors.StaleEpoch:
    return errors.StaleEpoch("another leader has written its epoch")


def _reign_is_over() -> errors.StaleEpoch:
    return errors.StaleEpoch("the reign has ended")
