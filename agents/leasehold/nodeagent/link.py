"""The stream to the leading allocator: reports, results and deaths up; orders, and processes to watch, down.

While there is no allocator the agent works on by its last orders; nothing here stops or restarts a worker. What
was not answered is said again on the next stream: results and death certificates are the same however often
they are told. An allocator of a lower epoch than one that was seen is not listened to.
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
from leasehold.api.node.v1 import node_pb2, node_service_pb2_grpc, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors, processes
from leasehold.core.placement import model as placement
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import job_wire, node_record, orders, status
from leasehold.observe import logs
from leasehold.rpc import attempt_codec, common_codec, node_codec, tls, wire_values
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.runtime import identity, process_watch, retry

BACKOFF: Final = retry.Backoff(initial_seconds=0.1, max_seconds=2.0)
#: Before the first answer has told one.
REPORT_SECONDS: Final = 2.0
#: Changes are told at most so often.
SPACING_SECONDS: Final = 0.2
#: An allocator that takes a message and does not answer it is given up.
SILENCE_SECONDS: Final = 5.0
#: After a refusal that only a person can mend.
REFUSED_SECONDS: Final = 5.0
LEAVE_SECONDS: Final = 1.0

_HINTS_MAX: Final = 3
_WORD_MAX: Final = 200
_ATTEMPTS_MAX: Final = 1000
#: And bytes of results in one: a log's chunk has 1 MiB, gRPC takes 4.
_RESULTS_BYTES_MAX: Final = 2 << 20
_REFUSALS: Final = (
    errors.AlreadyExists,
    errors.NodeSuperseded,
    errors.InvalidArgument,
    errors.PermissionDenied,
)

_log = logs.get_logger(__name__)

_Call = Any
#: What the registration tells of jobs.
_Declaration = tuple[placement.Resources, tuple[str, ...]]


class Link:
    """One agent's connection to its allocators. Use from the loop's own thread."""

    def __init__(
        self,
        host: agents.Agent,
        record: node_record.NodeRecord,
        executor: orders.Orders,
        addresses: Sequence[str],
        *,
        tls_files: tls.TlsFiles | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._host = host
        self._record = record
        self._orders = executor
        self._addresses = list(addresses)
        self._tls_files = tls_files
        self._rng = rng or random.Random()  # noqa: S311  jitter, not a secret
        self._watch = process_watch.ProcessWatch()
        self._cancels: dict[processes.ProcessKey, Callable[[], None]] = {}
        #: What the allocator has not answered yet: message number it went with (0: none yet), and the word.
        self._results: list[tuple[int, order_pb2.OrderResult]] = []
        self._deaths: dict[processes.ProcessKey, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._address = ""
        self._has_served = False
        self._answered_at: float | None = None
        self._report_seconds = REPORT_SECONDS
        self._ttl_seconds = 0.0
        self._told_revision = -1
        self._told_declaration: _Declaration | None = None
        self._is_leaving = False
        #: Number of the message that told so; 0: none yet.
        self._leaving_number = 0
        self._has_overtaken = False
        self._is_left = asyncio.Event()
        #: Why the allocator refuses this node; empty: it does not.
        self.problem = ""

    def status(self) -> node_pb2.LinkStatus:
        """How the agent stands with the allocator."""
        message = node_pb2.LinkStatus(is_connected=self._has_served, allocator_address=self._address)
        if self._record.epoch is not None:
            message.epoch.CopyFrom(common_codec.encode_epoch(self._record.epoch))
        if self._answered_at is not None:
            age = max(0.0, self._host.clock() - self._answered_at)
            message.last_answer_age.CopyFrom(wire_values.encode_seconds(age))
        return message

    def poke(self) -> None:
        """Something changed."""
        if self._host.revision != self._told_revision or self._host.jobs.machine.has_news:
            self._wake.set()

    async def leave(self) -> None:
        """Tell that the agent ends, if that can be told in a second."""
        self._is_leaving = True
        self._wake.set()
        if self._has_served:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self._is_left.wait()

    async def run(self) -> None:
        """Keep a stream until cancelled."""
        try:
            if self._addresses:
                await self._follow()
            await asyncio.Event().wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._watch.close()

    # Following the leader

    async def _follow(self) -> None:
        delays = BACKOFF.delays(self._rng)
        candidates: list[str] = list(self._addresses)
        hints = 0
        while True:
            if not candidates:
                await asyncio.sleep(next(delays))
                candidates, hints = list(self._addresses), 0
            address = candidates.pop(0)
            hint, had_served = "", False
            try:
                await self._serve(address)
            except errors.NotLeader as error:
                hint = error.leader_address
            except _REFUSALS as error:
                await self._refused(address, error)
            except errors.LeaseholdError as error:
                if self._has_served:
                    _log.warning("allocator_lost", address=address, message=error.message)
                else:
                    _log.debug("allocator_unreached", address=address, message=error.message)
            except Exception:  # noqa: BLE001  whatever it is, the next try may do
                _log.exception("link_failed", address=address)
            had_served, self._has_served = self._has_served, False
            self._host.changed()
            if had_served:
                candidates = [each for each in self._addresses if each != address] + [address]
                delays, hints = BACKOFF.delays(self._rng), 0
            if hint and hint != address and hints < _HINTS_MAX:
                hints += 1
                candidates = [hint, *(each for each in candidates if each != hint)]

    async def _refused(self, address: str, error: errors.LeaseholdError) -> None:
        if error.message != self.problem:
            _log.error("node_refused", address=address, reason=error.reason, message=error.message)
        self.problem = error.message
        known = error.metadata.get("incarnation", "")
        if isinstance(error, errors.NodeSuperseded) and known.isdecimal() and not self._has_overtaken:
            # The folder's lock is this process's, so the other one is rather an earlier life of this host's
            # agent, and the folder came back from a copy. Once: two hosts of one id must not fight for ever.
            self._has_overtaken = True
            self._record.supersede(int(known))
        await asyncio.sleep(REFUSED_SECONDS * self._rng.uniform(0.5, 1.0))

    async def _serve(self, address: str) -> None:
        """One stream, from its opening to its end, which is raised."""
        channel = channels.open_channel(address, tls_files=self._tls_files)
        try:
            call = node_service_pb2_grpc.NodeServiceStub(channel).SyncNode()
            stream = _Stream(call)
            self._address = address
            self._forget_stream()
            reader = asyncio.create_task(self._read(stream), name="link-read")
            writer = asyncio.create_task(self._write(stream), name="link-write")
            try:
                done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
                # The reader is told how the call ended; the writer only that it did.
                if reader not in done:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(SPACING_SECONDS):
                            await asyncio.wait((reader,))
                for task in (reader, writer):
                    if task.done():
                        task.result()
            finally:
                for task in (reader, writer):
                    task.cancel()
                await asyncio.gather(reader, writer, return_exceptions=True)
                call.cancel()
        finally:
            self._unwatch_all()
            await channel.close()

    def _forget_stream(self) -> None:
        self._results = [(0, result) for _, result in self._results]
        self._deaths = dict.fromkeys(self._deaths, 0)
        self._told_revision = -1

    # Up

    async def _write(self, stream: "_Stream") -> None:
        sequence = 0
        while True:
            sequence += 1
            message = self._message(sequence)
            stream.sent_at = stream.sent_at if stream.is_awaiting else self._host.clock()
            stream.is_awaiting = True
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await stream.send(message)
            except TimeoutError:
                told = f"{self._address} has taken no message for {SILENCE_SECONDS:g} s"
                raise errors.Unavailable(told) from None
            if message.is_leaving:
                self._leaving_number = sequence
                await stream.half_close()
                await asyncio.Event().wait()
            await asyncio.sleep(SPACING_SECONDS)
            await self._wait_for_news(stream)

    async def _wait_for_news(self, stream: "_Stream") -> None:
        """Until there is something to tell, or the next report is due. Raises `Unavailable` on silence."""
        due = self._host.clock() + max(0.05, self._report_seconds - SPACING_SECONDS)
        while not self._has_news():
            now = self._host.clock()
            silent_at = stream.sent_at + SILENCE_SECONDS if stream.is_awaiting else due
            if stream.is_awaiting and now >= silent_at:
                raise errors.Unavailable(f"{self._address} has not answered for {SILENCE_SECONDS:g} s")
            if now >= due:
                return
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due, silent_at) - now)):
                    await self._wake.wait()

    def _has_news(self) -> bool:
        return (
            self._is_leaving
            or self._host.revision != self._told_revision
            or self._host.jobs.machine.has_news
            or self._told_declaration != _declaration(self._host)
            or any(number == 0 for number, _ in self._results)
            or any(number == 0 for number in self._deaths.values())
        )

    def _message(self, sequence: int) -> wire.SyncNodeRequest:
        message = wire.SyncNodeRequest(sequence=sequence, is_leaving=self._is_leaving)
        jobs = self._host.jobs.machine
        if sequence == 1:
            message.registration.CopyFrom(registration(self._host, self._record))
            self._told_declaration = _declaration(self._host)
            message.inventory.attempts.extend(attempt_codec.encode_report(each) for each in jobs.inventory())
            message.inventory.SetInParent()
        elif self._told_declaration != _declaration(self._host):
            raise errors.Unavailable("what this host declares for jobs has changed: it registers anew")
        message.attempts.extend(attempt_codec.encode_report(each) for each in jobs.take_changed(_ATTEMPTS_MAX))
        self._told_revision = self._host.revision
        message.status.CopyFrom(status.node_status(self._host))
        room = _RESULTS_BYTES_MAX
        for place, (number, result) in enumerate(self._results):
            if number == 0 and len(message.results) < _WORD_MAX and result.ByteSize() <= room:
                room -= result.ByteSize()
                message.results.append(result)
                self._results[place] = (sequence, result)
        for process, number in self._deaths.items():
            if number == 0 and len(message.deaths) < _WORD_MAX:
                message.deaths.add(process=common_codec.encode_process(process))
                self._deaths[process] = sequence
        return message

    # Down

    async def _read(self, stream: "_Stream") -> None:
        while True:
            response = await stream.receive()
            self._record.check_epoch(common_codec.decode_epoch(response.epoch))
            stream.is_awaiting = False
            self._answered_at = self._host.clock()
            if not self._has_served:
                self._has_served, self.problem = True, ""
                _log.info("allocator_found", address=self._address, epoch=_epoch_text(response))
                self._host.changed()
            if response.HasField("terms"):
                terms = node_codec.decode_terms(response.terms)
                self._ttl_seconds = terms.ttl_seconds
                self._report_seconds = max(0.1, terms.report_interval_seconds)
            self._answered(response.answered_sequence)
            if 0 < self._leaving_number <= response.answered_sequence:
                self._is_left.set()
            for order in response.orders:
                if not order.HasField("epoch"):
                    order.epoch.CopyFrom(response.epoch)
                task = asyncio.create_task(self._carry_out(order), name=f"order-{order.order_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._hear_of_jobs(response)
            for message in response.unwatch:
                self._unwatch(common_codec.decode_process(message))
            for message in response.watch:
                self._watch_for(common_codec.decode_process(message))

    def _hear_of_jobs(self, response: wire.SyncNodeResponse) -> None:
        """In this order: one that is to be run and to be stopped is stopped."""
        jobs = self._host.jobs
        # One that is about to end begins nothing; its successor is told the same again.
        if response.assignments and not self._host.is_ending:
            assignments, refusals = job_wire.decode_assignments(response.assignments)
            jobs.assign(assignments)
            jobs.refuse(refusals)
        if response.stop:
            jobs.stop(job_wire.decode_refs(response.stop))
        if response.forget:
            jobs.forget(job_wire.decode_refs(response.forget))

    def _answered(self, sequence: int) -> None:
        self._results = [(number, result) for number, result in self._results if not 0 < number <= sequence]
        self._deaths = {
            process: number for process, number in self._deaths.items() if not 0 < number <= sequence
        }

    async def _carry_out(self, order: order_pb2.Order) -> None:
        result = await self._orders.answer(order)
        self._results.append((0, result))
        self._wake.set()

    # Death certificates

    def _watch_for(self, process: processes.ProcessKey) -> None:
        if process in self._cancels:
            return
        wanted = identity.ProcessIdentity(
            process.boot_id, process.pid_namespace, process.pid, process.start_time_ticks
        )
        try:
            self._cancels[process] = self._watch.watch(wanted, lambda _: self._died(process))
        except errors.LeaseholdError as error:
            # Nothing can be certified from here: its lease ends by its TTL.
            _log.warning("process_not_watched", pid=process.pid, message=error.message)

    def _died(self, process: processes.ProcessKey) -> None:
        self._cancels.pop(process, None)
        self._deaths.setdefault(process, 0)
        self._wake.set()

    def _unwatch(self, process: processes.ProcessKey) -> None:
        cancel = self._cancels.pop(process, None)
        if cancel is not None:
            cancel()

    def _unwatch_all(self) -> None:
        for process in list(self._cancels):
            self._unwatch(process)


class _Stream:
    """An open SyncNode call; everything that fails is a core error."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        #: When the first message was sent that nothing has come after.
        self.sent_at = time.monotonic()
        self.is_awaiting = False

    async def send(self, message: wire.SyncNodeRequest) -> None:
        async with _core_errors():
            await self._call.write(message)

    async def half_close(self) -> None:
        async with _core_errors():
            await self._call.done_writing()

    async def receive(self) -> wire.SyncNodeResponse:
        async with _core_errors():
            response = await self._call.read()
        if isinstance(response, wire.SyncNodeResponse):
            return response
        raise errors.Unavailable("the allocator ended the stream")


@contextlib.asynccontextmanager
async def _core_errors() -> Any:
    try:
        yield
    except grpc.RpcError as error:
        raise rpc_errors.from_rpc_error(error) from error
    except rpc_errors.STREAM_OVER as error:
        raise errors.Unavailable("the stream is over") from error
    except TimeoutError as error:
        raise errors.Unavailable("the allocator takes no message") from error


def registration(host: agents.Agent, record: node_record.NodeRecord) -> wire.NodeRegistration:
    """Who this node is."""
    total = host.sample.total_bytes if host.sample is not None else 0
    message = wire.NodeRegistration(
        name=host.config.node,
        node_id=record.node_id,
        incarnation=record.incarnation,
        boot_id=identity.boot_id(),
        pid_namespace=identity.pid_namespace(),
        resources=node_pb2.NodeResources(cpus=os.cpu_count() or 1, memory_bytes=total),
        labels=host.config.labels,
        job_templates=sorted(host.config.job_templates),
    )
    cpus, memory_bytes = host.config.jobs.total
    if host.config.jobs.is_running_jobs:
        message.job_resources.CopyFrom(node_pb2.NodeResources(cpus=cpus, memory_bytes=memory_bytes))
    return message


def _declaration(host: agents.Agent) -> "_Declaration":
    return host.config.jobs.total, tuple(sorted(host.config.job_templates))


def _epoch_text(response: wire.SyncNodeResponse) -> str:
    return common_codec.decode_epoch(response.epoch).encode()
