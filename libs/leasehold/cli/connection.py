"""Calling the allocators' leader from a command."""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from leasehold.core import errors
from leasehold.rpc import addresses as rpc_addresses
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import leader, methods, tls

ADDRESSES_VARIABLE = "LEASEHOLD_ADDR"
DEFAULT_ADDRESS = "127.0.0.1:7400"
RETRY_SECONDS = 0.1


def connect(given: str | None, timeout_seconds: float) -> "Allocator":
    """The allocators of --addr, else of LEASEHOLD_ADDR, else the default; TLS by LEASEHOLD_TLS_*_FILE.

    Raises `InvalidArgument` for an address that is none.
    """
    setting = "--addr" if given is not None else ADDRESSES_VARIABLE
    text = given if given is not None else os.environ.get(ADDRESSES_VARIABLE, "").strip() or DEFAULT_ADDRESS
    return Allocator(rpc_addresses.parse_list(text, setting=setting), timeout_seconds=timeout_seconds)


class Allocator:
    """The services of whichever allocator leads, for blocking callers; a context manager.

    The type of a request tells which service a method is of. `timeout_seconds` bounds each call, and how long
    `follow` goes without a leader. TLS files are taken from the environment. Not for use inside an event loop.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_seconds: float) -> None:
        self._addresses = addresses
        self._timeout_seconds = timeout_seconds
        self._tls_files = tls.client_files()
        self._leader = leader.LeaderChannel(addresses, tls_files=self._tls_files)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._runner:
            self._runner.run(self._leader.close())

    def call(self, method: str, request: Any, *, timeout_seconds: float | None = None) -> Any:
        """Call a unary method, which must be idempotent; returns its response.

        Raises what the leader answers, as core errors: `PostgresUnavailable` where it needs a Postgres that is
        away. `Unavailable` if no leader answers in time, which is another than this object's if given.
        """
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        return self._runner.run(
            self._leader.ask(methods.unary(method, request), request, timeout_seconds=seconds)
        )

    def follow(self, method: str, request: Any) -> Generator[Any, None, None]:
        """The messages of a server stream, without an end: across leader changes, as `call` finds leaders.

        Raises `Unavailable` if there is no leader for `timeout_seconds`, and what the leader answers.
        """
        messages = self._messages(method, request)

        async def following() -> Any:
            return await anext(messages)

        try:
            while True:
                yield self._runner.run(following())
        finally:
            self._runner.run(messages.aclose())

    async def _messages(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        untried = list(self._addresses)
        deadline = loop.time() + self._timeout_seconds
        while True:
            address = untried.pop(0)
            failure: errors.LeaseholdError = errors.Unavailable(f"{address} ended the stream")
            is_answered = False
            try:
                async with channels.open_channel(address, tls_files=self._tls_files) as channel:
                    call = methods.stream(method, request)(channel)(request)
                    async with asyncio.timeout_at(deadline):
                        message = await call.read()
                    while message is not grpc.aio.EOF:
                        is_answered = True
                        yield message
                        message = await call.read()
            except TimeoutError:
                failure = errors.Unavailable(f"{address} did not answer within {self._timeout_seconds:g} s")
            except grpc.RpcError as error:
                failure = rpc_errors.from_rpc_error(error)
            if not isinstance(failure, errors.Unavailable):
                raise failure
            if is_answered:  # only now there is no leader
                deadline = loop.time() + self._timeout_seconds
            if loop.time() >= deadline:
                raise failure
            hint = failure.leader_address if isinstance(failure, errors.NotLeader) else ""
            others = untried or [each for each in self._addresses if each != hint]
            untried = [hint, *(each for each in others if each != hint)] if hint else others
            await asyncio.sleep(RETRY_SECONDS)
