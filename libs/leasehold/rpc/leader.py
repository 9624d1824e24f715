"""Unary calls to whichever of several servers is the leader: for the command line, and for scripts."""

import asyncio
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeGuard, TypeVar

import grpc
from leasehold.core import errors
from leasehold.observe import causes, logs
from leasehold.rpc import addresses, options, tls
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.runtime import clock as clocks
from leasehold.runtime import retry

_log = logs.get_logger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")
Unary = Callable[[grpc.aio.Channel], grpc.aio.UnaryUnaryMultiCallable[Request, Response]]

# Two servers that each name the other, during an election, must not be asked in a tight circle.
_HINTS_MAX: Final = 3


class LeaderChannel:
    """Finds the leader among addresses and keeps to it until it says that another one leads.

    A server that is away, and one that is not the leader, are passed over; after each round without success it
    waits with jittered backoff. A call may so be sent more than once: methods that write must be idempotent,
    by their request id.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        tls_files: tls.TlsFiles | None = None,
        transport: options.Transport = options.DEFAULT,
        backoff: retry.Backoff | None = None,
        rng: random.Random | None = None,
        clock: clocks.Clock | None = None,
    ) -> None:
        if not servers:
            raise errors.InvalidArgument("no address of a server is given", field="address")
        self._addresses = list(dict.fromkeys(servers))
        self._tls_files = tls_files
        self._transport = transport
        self._backoff = backoff or retry.Backoff()
        self._rng = rng or random.Random()  # noqa: S311  jitter, not a secret
        self._clock = clock or clocks.MonotonicClock()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._leader = self._addresses[0]

    @property
    def leader_address(self) -> str:
        """Who answered last, or is asked first."""
        return self._leader

    async def call(
        self, method: Unary[Request, Response], request: Request, *, timeout_seconds: float = 10.0
    ) -> Response:
        """Call a unary method on the leader: ``call(lambda ch: BudgetServiceStub(ch).GetBudget, request)``.

        Raises what the leader answers, as core errors, `NodeUnreachable` too; `Unavailable` (or `NotLeader`) if
        none answered as a leader within the time, `DeadlineExceeded` if the first that was asked did not
        answer.
        """
        deadline = self._clock.now() + timeout_seconds
        failure: errors.Unavailable | None = None
        for delay in self._backoff.delays(self._rng):
            try:
                return await self._ask_each(method, request, deadline)
            except errors.NodeUnreachable:
                raise  # the leader's own answer: no other allocator knows better
            except errors.Unavailable as error:
                failure = error
            except errors.DeadlineExceeded as error:
                if failure is None or _is_told(error):
                    raise
                break  # why the time ran out tells more than that it did
            pause = max(delay, failure.retry_after_seconds or 0.0)
            if self._clock.now() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        assert failure is not None  # each way out of the loop has seen one
        raise self._gave_up(failure, timeout_seconds) from failure

    async def ask(
        self, method: Unary[Request, Response], request: Request, *, timeout_seconds: float = 10.0
    ) -> Response:
        """As `call`, for people and programs that only ask whether an answer can be had.

        Raises what the leader answers, as core errors: `PostgresUnavailable` where it needs a Postgres that is
        away. `Unavailable` if no leader answers in time, whatever the reason.
        """
        try:
            return await self.call(method, request, timeout_seconds=timeout_seconds)
        except errors.DeadlineExceeded as error:
            if _is_told(error):
                raise
            raise errors.Unavailable(
                f"{self.leader_address} did not answer within {timeout_seconds:g} s"
            ) from error
        except errors.Unavailable as error:
            # The leader did answer; that a part of it is away tells more.
            if _is_leaders_own(error.__cause__):
                raise error.__cause__ from error
            raise

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        open_channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(each.close() for each in open_channels))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask_each(self, method: Unary[Request, Response], request: Request, deadline: float) -> Response:
        """Ask every server once, beginning with the likely leader and going where they point.

        Raises the last `Unavailable` if none leads.
        """
        failure: errors.Unavailable | None = None
        hints = _HINTS_MAX
        untried = [self._leader, *(each for each in self._addresses if each != self._leader)]
        while untried:
            address = untried.pop(0)
            try:
                response = await self._attempt(address, method, request, deadline)
            except errors.NodeUnreachable:
                self._leader = address
                raise
            except errors.Unavailable as error:
                failure = error
                hint = _hint(error)
                if hint and hint != address and hints > 0:
                    hints -= 1
                    untried = [hint, *(each for each in untried if each != hint)]
            except errors.DeadlineExceeded as error:
                if failure is None or _is_told(error):
                    raise
                break
            else:
                self._leader = address
                return response
        assert failure is not None  # at least one was asked, and no answer was returned
        raise failure

    async def _attempt(
        self, address: str, method: Unary[Request, Response], request: Request, deadline: float
    ) -> Response:
        remaining = deadline - self._clock.now()
        if remaining <= 0:
            raise errors.DeadlineExceeded(f"there was no time left to ask {address}")
        cause = causes.current()
        try:
            return await method(self._channel(address))(
                request, timeout=remaining, metadata=((causes.METADATA_KEY, cause),) if cause else None
            )
        except grpc.RpcError as error:
            failure = rpc_errors.from_rpc_error(error)
            _log.debug("attempt_failed", address=address, reason=failure.reason, message=failure.message)
            raise failure from error

    def _channel(self, address: str) -> grpc.aio.Channel:
        known = self._channels.get(address)
        if known is None:
            known = channels.open_channel(address, tls_files=self._tls_files, transport=self._transport)
            self._channels[address] = known
        return known

    def _gave_up(self, failure: errors.Unavailable, timeout_seconds: float) -> errors.Unavailable:
        if isinstance(failure, errors.NotLeader):
            return errors.NotLeader(failure.leader_address)
        asked = ", ".join(self._addresses)
        return errors.Unavailable(
            f"no leader answered at {asked} within {timeout_seconds:g} s: {failure.message}",
            retry_after_seconds=failure.retry_after_seconds,
            metadata={"addresses": asked},
        )


def _is_leaders_own(error: BaseException | None) -> TypeGuard[errors.Unavailable]:
    """Whether a leader said this of a part that it needs."""
    return isinstance(error, errors.Unavailable) and type(error) not in (errors.Unavailable, errors.NotLeader)


def _is_told(error: errors.DeadlineExceeded) -> bool:
    """Whether a server told of a deadline of its own, rather than that this call's has passed."""
    return bool(error.metadata)


def _hint(error: errors.Unavailable) -> str:
    """The address that a server named as the leader's, if it is one."""
    if not isinstance(error, errors.NotLeader):
        return ""
    try:
        addresses.parse(error.leader_address)
    except errors.InvalidArgument:
        return ""
    return error.leader_address
