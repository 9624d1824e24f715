"""Calling the allocators' leader from a command."""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Self

from leasehold.rpc import addresses as rpc_addresses
from leasehold.rpc import leader, leader_stream, methods, tls

ADDRESSES_VARIABLE = "LEASEHOLD_ADDR"
DEFAULT_ADDRESS = "127.0.0.1:7400"


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

    def follow(self, method: str, request: Any, *, is_endless: bool = True) -> Generator[Any, None, None]:
        """The messages of a server stream, without an end: across leader changes, as `call` finds leaders.

        `request` may be a function that makes what is asked for at each begin. Unless it `is_endless`, the
        stream is over where the leader ends it. Raises `Unavailable` if there is no leader for
        `timeout_seconds`, and what the leader answers.
        """
        messages = self._messages(method, request, is_endless)

        async def following() -> Any:
            return await anext(messages)

        try:
            while True:
                try:
                    message = self._runner.run(following())
                except StopAsyncIteration:
                    return
                yield message
        finally:
            self._runner.run(messages.aclose())

    def _messages(self, method: str, request: Any, is_endless: bool) -> AsyncGenerator[Any, None]:
        return leader_stream.follow(
            self._addresses,
            method,
            request if callable(request) else lambda: request,
            patience_seconds=self._timeout_seconds,
            tls_files=self._tls_files,
            is_endless=is_endless,
        )
