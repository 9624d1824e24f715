"""The agents' connections of one reign: what is to be said on each."""

import asyncio
from typing import Any

from leasehold.api.job.v1 import attempt_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.api.node.v1 import order_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.job import model as job_model
from leasehold.core.node import registry_model
from leasehold.rpc import common_codec, job_codec, node_codec

#: Orders that wait for an agent which does not read; one more breaks the connection.
UNSENT_ORDERS_MAX = 1_000
#: Of one message on the wire.
ORDERS_MAX = 100
PROCESSES_MAX = 2_000
ATTEMPTS_MAX = 1_000
#: Assignments of one message: gRPC takes 4 MiB of everything.
ASSIGNMENT_BYTES_MAX = 2 * 2**20
#: Attempts that wait for an agent which does not read; one more breaks the connection.
UNSENT_ATTEMPTS_MAX = 100_000


class NodeSession:
    """One SyncNode stream, as its writer sees it."""

    def __init__(self, number: int, epoch: epochs.Epoch, peer: str) -> None:
        self.number = number
        self.peer = peer
        #: Sequence of the newest message that was taken; 0: it has not registered.
        self.sequence = 0
        #: Why the stream ends; None: in peace.
        self.error: errors.LeaseholdError | None = None
        #: The task that is stuck in a write to this connection; cancelled where the connection is given up.
        self.writing: asyncio.Task[Any] | None = None
        #: A certificate that the agent could not give has been logged.
        self.is_distrusted = False
        self._epoch = epoch
        self._is_answer_due = False
        self._terms: registry_model.Terms | None = None
        self._orders: list[order_pb2.Order] = []
        self._watch: dict[processes.ProcessKey, None] = {}
        self._unwatch: dict[processes.ProcessKey, None] = {}
        self._assignments: dict[job_model.AttemptRef, attempt_pb2.JobAssignment] = {}
        self._stops: dict[job_model.AttemptRef, None] = {}
        self._forgets: dict[job_model.AttemptRef, None] = {}
        self._changed = asyncio.Event()
        self._is_closed = False

    def answer(self, sequence: int, terms: registry_model.Terms | None) -> None:
        """A message was taken; `terms` if they are news to the agent."""
        self.sequence = sequence
        self._is_answer_due = True
        self._terms = terms or self._terms
        self._changed.set()

    def order(self, order: order_pb2.Order) -> None:
        """Put an order in line."""
        self._orders.append(order)
        if len(self._orders) > UNSENT_ORDERS_MAX:
            self.end(errors.ResourceExhausted("this connection does not take its orders"))
        self._changed.set()

    def watch(self, asked: tuple[processes.ProcessKey, ...]) -> None:
        """Ask for certificates of deaths."""
        for process in asked:
            self._unwatch.pop(process, None)
            self._watch[process] = None
        self._changed.set()

    def unwatch(self, asked: tuple[processes.ProcessKey, ...]) -> None:
        """Ask no more for these."""
        for process in asked:
            if self._watch.pop(process, process) is process:
                self._unwatch[process] = None
        self._changed.set()

    def assign(self, ref: job_model.AttemptRef, assignment: attempt_pb2.JobAssignment) -> None:
        """Have an attempt run."""
        self._assignments[ref] = assignment
        self._said_of_attempts()

    def stop(self, ref: job_model.AttemptRef) -> None:
        """Have an attempt end, or never start."""
        self._stops[ref] = None
        self._said_of_attempts()

    def forget(self, ref: job_model.AttemptRef) -> None:
        """The end of an attempt is committed: it need not be told again."""
        self._forgets[ref] = None
        self._said_of_attempts()

    def _said_of_attempts(self) -> None:
        unsent = len(self._assignments) + len(self._stops) + len(self._forgets)
        if unsent > UNSENT_ATTEMPTS_MAX:
            self.end(errors.ResourceExhausted("this connection does not take its attempts"))
        self._changed.set()

    def end(self, error: errors.LeaseholdError | None) -> None:
        """End the stream: at once with an error, or (None) after what is in line. The first call counts."""
        if not self._is_closed:
            self.error, self._is_closed = error, True
            if error is not None and self.writing is not None:
                self.writing.cancel()
        self._changed.set()

    @property
    def _has_more(self) -> bool:
        parts = (self._orders, self._watch, self._unwatch, self._assignments, self._stops, self._forgets)
        return self._is_answer_due or any(parts)

    async def next_response(self) -> wire.SyncNodeResponse | None:
        """What is to be written next; None when the stream is over. Raises the error that `end` was given."""
        while not (self._has_more or self._is_closed):
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        if not self._has_more:
            return None
        response = wire.SyncNodeResponse(
            epoch=common_codec.shared_epoch(self._epoch), answered_sequence=self.sequence
        )
        self._is_answer_due = False
        if self._terms is not None:
            response.terms.CopyFrom(node_codec.encode_terms(self._terms))
            self._terms = None
        if self._orders:
            response.orders.extend(self._orders[:ORDERS_MAX])
            del self._orders[:ORDERS_MAX]
        if self._watch:
            response.watch.extend(_taken(self._watch))
        if self._unwatch:
            response.unwatch.extend(_taken(self._unwatch))
        self._add_attempts(response)
        return response

    def _add_attempts(self, response: wire.SyncNodeResponse) -> None:
        if self._assignments:
            response.assignments.extend(_fitting(self._assignments))
        # A stop never overtakes its assignment: both are in line, and the agent takes assignments first.
        if self._stops and not self._assignments:
            response.stop.extend(_taken_attempts(self._stops))
        if self._forgets:
            response.forget.extend(_taken_attempts(self._forgets))


def _taken(asked: dict[processes.ProcessKey, None]) -> list[Any]:
    taken = list(asked)[:PROCESSES_MAX]
    for process in taken:
        del asked[process]
    return [common_codec.encode_process(process) for process in taken]


def _fitting(assignments: dict[job_model.AttemptRef, attempt_pb2.JobAssignment]) -> list[Any]:
    """The next assignments that one message can carry, taken out."""
    taken: list[attempt_pb2.JobAssignment] = []
    used = 0
    for assignment in list(assignments.values())[:ATTEMPTS_MAX]:
        used += assignment.ByteSize()
        if taken and used > ASSIGNMENT_BYTES_MAX:
            break
        taken.append(assignment)
    for ref in list(assignments)[: len(taken)]:
        del assignments[ref]
    return taken


def _taken_attempts(refs: dict[job_model.AttemptRef, None]) -> list[attempt_pb2.AttemptRef]:
    taken = list(refs)[:ATTEMPTS_MAX]
    for ref in taken:
        del refs[ref]
    return [job_codec.encode_ref(ref) for ref in taken]
