"""Orders: the same, by the allocator's stream and by the host's own socket.

An order with an id is applied once. Its answer is kept on disk and given again, so that whoever heard no answer
may ask again, also of the next agent. What was refused is not kept: nothing was changed, and it may be allowed
later. Another order under the id of an earlier one is refused.

That an order was begun is on disk before it is applied, and which life of a worker it is about: an agent may
die before it has kept the answer, and the next is asked again. What sets a mode does the same a second time;
what ends a worker does not, so then it is applied to that life alone.
"""

import base64
import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from google.protobuf import message as protobuf_message
from leasehold.api.node.v1 import order_pb2
from leasehold.core import errors
from leasehold.core.job import model as job_model
from leasehold.core.node import model, worker_records
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import logs as worker_logs
from leasehold.nodeagent import node_record, pools, status
from leasehold.observe import logs
from leasehold.rpc import common_codec, node_codec, wire_values

#: Answers that are kept, the newest.
KEPT_MAX: Final = 64
DECISIONS_DEFAULT: Final = 20
DECISIONS_MAX: Final = 200
HOLD_SECONDS_MAX: Final = 30 * 86_400.0

_NAME: Final = "orders"
_log = logs.get_logger(__name__)


@dataclasses.dataclass(slots=True)
class _Kept:
    """An order that was begun."""

    #: Of what was ordered; empty: an earlier version did not keep it.
    digest: str
    #: The life of the worker that it is about; empty: of none.
    worker_id: str
    #: None: not applied yet, or its agent died before it could tell.
    result: order_pb2.OrderResult | None = None


class Orders:
    """Executes orders on one host."""

    def __init__(self, host: agents.Agent, record: node_record.NodeRecord) -> None:
        self._host = host
        self._record = record
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        #: Why answers are not on disk; empty: they are.
        self.problem = ""
        self._read()

    async def execute(self, order: order_pb2.Order) -> order_pb2.OrderResult:
        """Apply an order; its answer. Raises what it is refused with, core errors; nothing is changed then."""
        node_codec.checked_order_id(order.order_id)
        kind = node_codec.order_kind(order)
        if order.HasField("epoch"):
            self._record.check_epoch(common_codec.decode_epoch(order.epoch))
        if not order.order_id or kind in node_codec.READING_ORDERS:
            return await self._apply(kind, order)
        known = self._kept.get(order.order_id)
        if known is not None and known.digest not in ("", _digest(order)):
            raise errors.InvalidArgument(
                f"order_id: {order.order_id} was another order's", field="order.order_id"
            )
        if known is not None and known.result is not None:
            return known.result
        if known is None:
            known = self._begin(order)
        # Nothing is awaited on the way to an order that changes something, so two of one id cannot overlap.
        try:
            known.result = await self._apply(kind, order, known.worker_id)
        except errors.LeaseholdError:
            self._kept.pop(order.order_id, None)
            raise
        finally:
            self._write()
        return known.result

    async def answer(self, order: order_pb2.Order) -> order_pb2.OrderResult:
        """As `execute`, a refusal being an answer too. Raises nothing but cancellation."""
        try:
            return await self.execute(order)
        except errors.LeaseholdError as error:
            return order_pb2.OrderResult(order_id=order.order_id, error=node_codec.encode_error(error))
        except Exception:  # noqa: BLE001  whoever ordered must hear something
            _log.exception("order_failed", order_id=order.order_id)
            failure = errors.LeaseholdError("the agent failed to carry the order out; its log tells why")
            return order_pb2.OrderResult(order_id=order.order_id, error=node_codec.encode_error(failure))

    async def _apply(self, kind: str, order: order_pb2.Order, worker_id: str = "") -> order_pb2.OrderResult:
        if kind == "read_log":
            return order_pb2.OrderResult(order_id=order.order_id, log=await self.read_log(order.read_log))
        if kind == "explain":
            return self._explain(order.order_id, order.explain)
        _log.info("order", order_id=order.order_id, kind=kind, order=_shown(order))
        concerned: Sequence[pools.Pool]
        stopped: set[str] = set()
        if worker_id and not self._lives(worker_id):
            # It was applied: the life that it is about has ended since.
            name = order.stop_workers.worker.rpartition("@")[0].rpartition("_")[0]
            concerned = [pool for pool in self._host.pools.values() if pool.name == name]
        else:
            concerned, stopped = _APPLY[kind](self, order)
        self._host.settle(self._host.clock())
        now = self._host.clock()
        return order_pb2.OrderResult(
            order_id=order.order_id,
            pools=[status.pool_status(self._host, pool) for pool in concerned],
            workers=[
                status.worker_status(self._host, pool, view)
                for pool in concerned
                for view in pool.machine.workers(now)
                if view.name in stopped and view.state in model.ALIVE_STATES
            ],
        )

    # Each kind

    def _scale(self, order: order_pb2.Order) -> "_Applied":
        scale = order.scale
        pool = self._one_pool(scale.pool)
        now = self._host.clock()
        which = scale.WhichOneof("target")
        if which is None:
            raise errors.InvalidArgument("scale: neither workers nor auto is set", field="target_workers")
        self._require_not_ending()
        if which == "auto":
            if not scale.auto:
                raise errors.InvalidArgument("scale.auto: false means nothing", field="auto")
            return [pool], self._stopped_by(pool, lambda: self._host.governor.set_auto(now, pool.name))
        hold = None
        if scale.HasField("hold"):
            hold = scale.hold.seconds + scale.hold.nanos / 1e9
            if not 0 < hold <= HOLD_SECONDS_MAX:
                raise errors.InvalidArgument(
                    f"hold: {hold:g} s is not in 0 to {HOLD_SECONDS_MAX:g} s", field="hold_seconds"
                )
        return [pool], self._stopped_by(
            pool,
            lambda: self._host.governor.set_target(now, pool.name, scale.workers, hold_seconds=hold),
        )

    def _stopped_by(self, pool: pools.Pool, act: Callable[[], None]) -> set[str]:
        """Do it; names of the pool's workers that go by it."""
        now = self._host.clock()
        living = {view.worker_id for view in pool.machine.workers(now) if view.state in model.LIVE_STATES}
        act()
        self._host.settle(now)
        return {
            view.name
            for view in pool.machine.workers(now)
            if view.worker_id in living and view.state not in model.LIVE_STATES
        }

    def _monitoring(self, order: order_pb2.Order) -> "_Applied":
        chosen = self._pools(order.monitoring.pool)
        name = order.monitoring.pool or None
        self._host.governor.set_monitoring(self._host.clock(), name, order.monitoring.is_running)
        return chosen, set()

    def _start_workers(self, order: order_pb2.Order) -> "_Applied":
        chosen = self._pools(order.start_workers.pool)
        self._require_not_ending()
        now = self._host.clock()
        self._host.governor.set_stopped(now, order.start_workers.pool or None, False)
        for pool in chosen:
            if not pool.held_back:
                pool.machine.unblock(now)
        return chosen, set()

    def _stop_workers(self, order: order_pb2.Order) -> "_Applied":
        stop = order.stop_workers
        now = self._host.clock()
        if stop.worker:
            pool = self._pool_of(stop.worker, stop.pool)
            pool.machine.stop_worker(now, stop.worker, is_immediate=stop.is_immediate)
            return [pool], {stop.worker}
        chosen = self._pools(stop.pool)
        names = {view.name for pool in chosen for view in pool.machine.workers(now)}
        self._host.governor.set_stopped(now, stop.pool or None, True)
        for pool in chosen:
            pool.machine.stop_all(now, is_immediate=stop.is_immediate, why="stopped by an order")
        return chosen, names

    def _drain(self, order: order_pb2.Order) -> "_Applied":
        self._require_not_ending()
        now = self._host.clock()
        is_draining = order.drain.is_draining
        names: set[str] = set()
        self._host.set_draining(is_draining)
        if is_draining:
            names = {view.name for pool in self._host.pools.values() for view in pool.machine.workers(now)}
        return list(self._host.pools.values()), names

    def _explain(self, order_id: str, explain: order_pb2.ExplainOrder) -> order_pb2.OrderResult:
        if explain.decisions_max > DECISIONS_MAX:
            raise errors.InvalidArgument(
                f"decisions_max: {explain.decisions_max} is above {DECISIONS_MAX}", field="decisions_max"
            )
        pool = self._one_pool(explain.pool)
        told = status.explanation(self._host, pool, explain.decisions_max or DECISIONS_DEFAULT)
        return order_pb2.OrderResult(order_id=order_id, explanation=told)

    async def read_log(self, order: order_pb2.ReadLogOrder) -> order_pb2.LogChunk:
        """A piece of a worker's log. Raises `InvalidArgument`, `NotFound`."""
        name = model.checked_worker_name(order.worker)
        wait = wire_values.decode_seconds(order.wait, "wait") if order.HasField("wait") else 0.0
        is_of_job = job_model.AttemptRef.of_log_name(name) is not None
        processes = self._host.jobs.processes if is_of_job else self._host.processes
        chunk = await processes.logs.read(
            name,
            cursor=order.cursor,
            tail_lines=order.tail_lines,
            wait_seconds=wait,
            bytes_max=order.bytes_max,
            is_ended=lambda: not self.is_alive(name),
        )
        return encode_chunk(chunk)

    def is_alive(self, worker: str) -> bool:
        """Whether a worker of this name lives, or may."""
        return self._host.jobs.is_alive(worker) or bool(self._life_of(worker))

    # Whom it concerns

    def _one_pool(self, name: str) -> pools.Pool:
        """The pool named, or the only one. Raises `NotFound`, or `InvalidArgument` if there are several."""
        declared = [pool for pool in self._host.pools.values() if pool.declared is not None]
        if not name and len(declared) == 1:
            return declared[0]
        if not name:
            told = ", ".join(sorted(pool.name for pool in declared)) or "none"
            raise errors.InvalidArgument(f"pool: must be named; this host has {told}", field="pool")
        return self._named(name)

    def _pools(self, name: str) -> list[pools.Pool]:
        """The pool named, or all."""
        if name:
            return [self._named(name)]
        return [self._host.pools[each] for each in sorted(self._host.pools)]

    def _named(self, name: str) -> pools.Pool:
        model.checked_pool_name(name)
        pool = self._host.pools.get(name)
        if pool is None or pool.declared is None:
            known = sorted(pool.name for pool in self._host.pools.values() if pool.declared is not None)
            raise errors.NotFound(
                f"there is no pool {name!r} on {self._host.config.node}; it has {', '.join(known) or 'none'}",
                field="pool",
            )
        return pool

    def _pool_of(self, worker: str, pool_name: str) -> pools.Pool:
        model.checked_worker_name(worker)
        for pool in self._host.pools.values():
            if pool_name and pool.name != pool_name:
                continue
            if any(
                view.name == worker and view.state in model.ALIVE_STATES
                for view in pool.machine.workers(self._host.clock())
            ):
                return pool
        raise errors.NotFound(f"there is no worker {worker} on {self._host.config.node}", field="worker")

    def _require_not_ending(self) -> None:
        if self._host.is_ending:
            raise errors.FailedPrecondition("this agent is about to end: it starts no more workers")

    # Keeping answers

    def retry(self) -> None:
        """Write what could not be written."""
        if self.problem:
            self._write()

    def _begin(self, order: order_pb2.Order) -> _Kept:
        kept = self._kept[order.order_id] = _Kept(_digest(order), self._life_of(order.stop_workers.worker))
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        self._write()
        return kept

    def _life_of(self, worker: str) -> str:
        """The id of the living worker of that name; empty: there is none."""
        return next((view.worker_id for view in self._living() if view.name == worker), "")

    def _lives(self, worker_id: str) -> bool:
        return any(view.worker_id == worker_id for view in self._living())

    def _living(self) -> Iterator[worker_records.WorkerView]:
        now = self._host.clock()
        for pool in self._host.pools.values():
            yield from (view for view in pool.machine.workers(now) if view.state in model.ALIVE_STATES)

    def _write(self) -> None:
        answers = {
            order_id: base64.b64encode(kept.result.SerializeToString()).decode()
            for order_id, kept in self._kept.items()
            if kept.result is not None
        }
        begun = {
            order_id: {"digest": kept.digest, "worker_id": kept.worker_id}
            for order_id, kept in self._kept.items()
        }
        try:
            self._host.folder.write(_NAME, {"answers": answers, "begun": begun})
        except errors.LeaseholdError as error:
            if not self.problem:
                _log.error("answers_not_written", message=error.message)
            self.problem = error.message
        else:
            self.problem = ""

    def _read(self) -> None:
        record = self._host.folder.read(_NAME) or {}
        try:
            for order_id, begun in dict(record.get("begun", {})).items():
                self._kept[order_id] = _Kept(str(begun["digest"]), str(begun["worker_id"]))
            for order_id, text in dict(record.get("answers", {})).items():
                result = order_pb2.OrderResult.FromString(base64.b64decode(text))
                self._kept.setdefault(order_id, _Kept("", "")).result = result
        except (ValueError, TypeError, KeyError, protobuf_message.DecodeError) as error:
            _log.error("answers_unreadable", error=str(error))


_Applied = tuple[Sequence[pools.Pool], set[str]]

_APPLY: Final[dict[str, Callable[[Orders, order_pb2.Order], _Applied]]] = {
    "scale": Orders._scale,
    "monitoring": Orders._monitoring,
    "start_workers": Orders._start_workers,
    "stop_workers": Orders._stop_workers,
    "drain": Orders._drain,
}


def _digest(order: order_pb2.Order) -> str:
    """Of what is ordered, whoever orders it."""
    copy = order_pb2.Order()
    copy.CopyFrom(order)
    copy.ClearField("epoch")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def encode_chunk(chunk: worker_logs.Chunk) -> order_pb2.LogChunk:
    """The message."""
    return order_pb2.LogChunk(
        data=chunk.data, cursor=chunk.cursor, lost_bytes=chunk.lost_bytes, is_end=chunk.is_end
    )


def _shown(order: order_pb2.Order) -> str:
    copy = order_pb2.Order()
    copy.CopyFrom(order)
    copy.ClearField("epoch")
    copy.order_id = ""
    return " ".join(str(copy).split())
