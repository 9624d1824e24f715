"""NodeService on the wire: each method checks its input, asks the leader's nodes, and translates."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import json_format
from leasehold.allocator import calls, leadership, nodes, syncing
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import node_service_pb2_grpc as wire_grpc
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.observe import causes
from leasehold.postgres import port
from leasehold.rpc import access, common_codec, node_codec, refusals, wire_values

PAGE_SIZE = 100
PAGE_SIZE_MAX = 1_000
#: Of an answer's messages; gRPC takes 4 MiB.
ANSWER_BYTES_MAX = 3 * 2**20
#: A watcher is told at most so often.
WATCH_SECONDS = 0.2
ORDER_SECONDS = 5.0
ORDER_SECONDS_MAX = 30.0
#: Names every node that has a stream.
EVERY_NODE = "*"

TAIL_LINES_MAX = 10_000
#: An agent waits so long for something new in a log, and has so much longer to say so.
LOG_WAIT_SECONDS = 5.0
LOG_SLACK_SECONDS = 5.0
LOG_BYTES_MAX = 256 * 1024
LOG_PAUSE_SECONDS = 0.2

_Context = grpc.aio.ServicerContext[Any, Any]


class NodeServicer(wire_grpc.NodeServiceServicer):
    """The API of nodes. Every method raises core errors; an interceptor maps them to statuses."""

    def __init__(
        self, leader: leadership.Leadership, draining: asyncio.Event, guard: access.Guard | None = None
    ) -> None:
        self._leader = leader
        self._draining = draining
        self._guard = guard

    # Agents

    async def SyncNode(  # type: ignore[override]  # it writes to the context, and yields nothing
        self, request_iterator: AsyncIterator[wire.SyncNodeRequest], context: _Context
    ) -> None:
        """An agent's connection."""
        try:
            known = self._leader.require_nodes()
        except errors.NotLeader:
            await refusals.hear_out(request_iterator)
            raise
        await syncing.sync(
            known,
            request_iterator,
            context,
            peer=calls.actor(context),
            check_name=lambda name: self._check_name(name, context),
        )

    async def ReportNode(self, request: wire.ReportNodeRequest, context: _Context) -> wire.ReportNodeResponse:
        """A report by one call."""
        known = self._leader.require_nodes()
        self._check_name(request.registration.name, context)
        return known.report_once(request, calls.actor(context))

    def _check_name(self, name: str, context: _Context) -> None:
        if self._guard is not None:
            self._guard.check_node(name, context)

    # Reading

    async def ListNodes(self, request: wire.ListNodesRequest, context: _Context) -> wire.ListNodesResponse:
        """A page of nodes, by name."""
        size = calls.page_size(request.page_size, PAGE_SIZE_MAX, PAGE_SIZE)
        if request.page_token:
            model.checked_node_name(request.page_token, field_name="page_token")
        known = self._leader.require_nodes()
        names = sorted(name for name in known.registry.nodes if name > request.page_token)
        response = wire.ListNodesResponse(is_mass_loss=known.registry.is_mass_loss)
        used = 0
        for number, name in enumerate(names):
            node = known.view(name, is_brief=request.is_brief)
            used += node.ByteSize()
            if number and (number >= size or used > ANSWER_BYTES_MAX):
                response.next_page_token = names[number - 1]
                break
            response.nodes.append(node)
        return response

    async def GetNode(self, request: wire.GetNodeRequest, context: _Context) -> wire.GetNodeResponse:
        """One node."""
        known = self._leader.require_nodes()
        return wire.GetNodeResponse(node=known.view(_named(known, request.name, "name")))

    async def WatchNodes(
        self, request: wire.WatchNodesRequest, context: _Context
    ) -> AsyncIterator[wire.WatchNodesResponse]:
        """Nodes now and after each change."""
        known = self._leader.require_nodes()
        if request.name:
            known.registry.get(model.checked_node_name(request.name, field_name="name"))
        change, told, is_first = 0, set[str](), True
        while not self._draining.is_set():
            if self._leader.require_nodes() is not known:
                raise errors.NotLeader
            news = known.news
            change, changed = known.changed_since(change)
            names = [name for name in changed if request.name in ("", name)]
            deleted = sorted(name for name in told if name not in known.registry.nodes)
            told = (told | set(names)) - set(deleted)
            for response in _watched(known, names, deleted, is_first=is_first):
                yield response
            is_first = False
            await asyncio.sleep(WATCH_SECONDS)
            await calls.first_of(news.wait(), self._draining.wait())

    # Administration

    async def DeleteNode(self, request: wire.DeleteNodeRequest, context: _Context) -> wire.DeleteNodeResponse:
        """Forget a node that is lost or gone."""
        model.checked_node_name(request.name, field_name="name")
        await self._leader.require_nodes().delete(
            request.name, actor=calls.actor(context), cause=causes.current() or ""
        )
        return wire.DeleteNodeResponse()

    # Orders

    async def OrderNode(self, request: wire.OrderNodeRequest, context: _Context) -> wire.OrderNodeResponse:
        """Hand an order to agents."""
        seconds = _timeout(request)
        kind = node_codec.order_kind(request.order)
        node_codec.checked_order_id(request.order.order_id)
        known = self._leader.require_nodes()
        order = order_pb2.Order()
        order.CopyFrom(request.order)
        order.epoch.CopyFrom(common_codec.encode_epoch(known.reign.epoch))
        if request.node != EVERY_NODE:
            name = _named(known, request.node, "node")
            result = await self._ordered(known, name, order, seconds, context)
            if result.HasField("error"):
                raise node_codec.decode_error(result.error)
            return wire.OrderNodeResponse(answers=[wire.OrderNodeResponse.Answer(node=name, result=result)])
        if kind == "read_log":
            raise errors.InvalidArgument("node: a log is read from one node, which must be named", field="node")
        names = known.connected()
        results = await asyncio.gather(
            *(self._ordered_of_many(known, name, order, seconds, context) for name in names)
        )
        answers = [
            wire.OrderNodeResponse.Answer(node=name, result=result)
            for name, result in zip(names, results, strict=True)
        ]
        return wire.OrderNodeResponse(answers=_fitting(answers))

    async def _ordered(
        self, known: nodes.Nodes, name: str, order: order_pb2.Order, seconds: float, context: _Context
    ) -> order_pb2.OrderResult:
        """An order carried out or refused, and told in the audit log. Raises what keeps it from the agent."""
        try:
            result = await known.orders.ask(name, order, seconds)
        except errors.LeaseholdError as error:
            _note(known, name, order, error.reason, context)
            raise
        _note(known, name, order, result.error.reason if result.HasField("error") else "OK", context)
        return result

    async def _ordered_of_many(
        self, known: nodes.Nodes, name: str, order: order_pb2.Order, seconds: float, context: _Context
    ) -> order_pb2.OrderResult:
        try:
            return await self._ordered(known, name, order, seconds, context)
        except errors.NotLeader:
            raise
        except errors.LeaseholdError as error:
            # One that cannot be reached is told among the others' answers.
            return order_pb2.OrderResult(order_id=order.order_id, error=node_codec.encode_error(error))

    async def FollowWorkerLog(
        self, request: wire.FollowWorkerLogRequest, context: _Context
    ) -> AsyncIterator[wire.FollowWorkerLogResponse]:
        """A worker's log as it grows."""
        model.checked_worker_name(request.worker)
        if request.tail_lines > TAIL_LINES_MAX:
            raise errors.InvalidArgument(f"tail_lines: at most {TAIL_LINES_MAX}", field="tail_lines")
        known = self._leader.require_nodes()
        # A worker's name ends in its node's.
        name = _named(known, request.node or request.worker.rpartition("@")[2], "node")
        order = order_pb2.Order(
            epoch=common_codec.encode_epoch(known.reign.epoch),
            read_log=order_pb2.ReadLogOrder(
                worker=request.worker,
                tail_lines=request.tail_lines,
                wait=wire_values.encode_seconds(LOG_WAIT_SECONDS),
                bytes_max=LOG_BYTES_MAX,
            ),
        )
        while not self._draining.is_set():
            result = await known.orders.ask(name, order, LOG_WAIT_SECONDS + LOG_SLACK_SECONDS)
            if result.HasField("error"):
                raise node_codec.decode_error(result.error)
            chunk = result.log
            if chunk.data or chunk.lost_bytes or chunk.is_end:
                yield wire.FollowWorkerLogResponse(chunk=chunk)
            else:
                # An agent that does not wait must not keep the two of us busy.
                await asyncio.sleep(LOG_PAUSE_SECONDS)
            if chunk.is_end:
                return
            order.read_log.cursor = chunk.cursor


def _named(known: nodes.Nodes, name: str, field: str) -> str:
    """The name of a node that is known: the only one, if `name` is empty.

    A new leader does not say that there is none, or only one, before it has read Postgres.
    """
    checked = model.checked_node_name(name, field_name=field) if name else ""
    if not known.is_loaded and checked not in known.registry.nodes:
        raise errors.PostgresUnavailable(
            "the nodes in Postgres have not been read yet", retry_after_seconds=0.1
        )
    return known.registry.get(checked).record.name if checked else known.registry.only().record.name


def _timeout(request: wire.OrderNodeRequest) -> float:
    if not request.HasField("timeout"):
        return ORDER_SECONDS
    seconds = wire_values.decode_seconds(request.timeout, "timeout")
    if not 0.0 < seconds <= ORDER_SECONDS_MAX:
        raise errors.InvalidArgument(
            f"timeout: {seconds:g} s is not above 0 and at most {ORDER_SECONDS_MAX:g} s", field="timeout"
        )
    return seconds


def _note(known: nodes.Nodes, name: str, order: order_pb2.Order, outcome: str, context: _Context) -> None:
    """Tell the audit log who ordered what, and what came of it; not of orders that only read."""
    if node_codec.order_kind(order) in node_codec.READING_ORDERS:
        return
    told = json_format.MessageToDict(order, preserving_proto_field_name=True)
    told.pop("epoch", None)
    known.writer.note(
        port.AuditEntry(
            entry_id=secrets.token_hex(16),
            actor=calls.actor(context),
            method="OrderNode",
            target=f"node/{name}",
            cause=causes.current() or "",
            after={"order": told, "outcome": outcome},
        )
    )


def _watched(
    known: nodes.Nodes, names: list[str], deleted: list[str], *, is_first: bool
) -> list[wire.WatchNodesResponse]:
    """What a watcher is told, in messages that gRPC takes; the first is told even if there is no node."""
    responses: list[wire.WatchNodesResponse] = []
    page: list[node_pb2.Node] = []
    used = 0
    for name in names:
        if name not in known.registry.nodes:
            continue
        node = known.view(name)
        if page and used + node.ByteSize() > ANSWER_BYTES_MAX:
            responses.append(wire.WatchNodesResponse(nodes=page))
            page, used = [], 0
        page.append(node)
        used += node.ByteSize()
    if page or deleted or (is_first and not responses):
        responses.append(wire.WatchNodesResponse(nodes=page, deleted=deleted))
    return responses


def _fitting(answers: list[wire.OrderNodeResponse.Answer]) -> list[wire.OrderNodeResponse.Answer]:
    """Answers of many nodes, within what gRPC takes: beyond it they tell only whether it was done."""
    used = 0
    for answer in answers:
        used += answer.ByteSize()
        if used > ANSWER_BYTES_MAX:
            for field in ("pools", "workers", "log", "explanation"):
                answer.result.ClearField(field)
    return answers
