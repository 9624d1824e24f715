"""Server streams of whichever of several servers is the leader: begun anew when one ends before its time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

import grpc
from leasehold.core import errors
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import methods, tls

RETRY_SECONDS: Final = 0.1


class Candidates:
    """Whom to ask next: where the last one pointed to, else each in turn."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)
        self._untried = list(addresses)

    def next(self) -> str:
        """The next address to ask."""
        return self._untried.pop(0)

    def failed(self, failure: errors.LeaseholdError) -> None:
        """The one that was asked does not lead, or is away."""
        hint = failure.leader_address if isinstance(failure, errors.NotLeader) else ""
        others = self._untried or [each for each in self._addresses if each != hint]
        self._untried = [hint, *(each for each in others if each != hint)] if hint else others


async def follow(
    addresses: Sequence[str],
    method: str,
    request: Callable[[], Any],
    *,
    patience_seconds: float,
    tls_files: tls.TlsFiles | None = None,
    is_endless: bool = True,
) -> AsyncGenerator[Any, None]:
    """The messages of a server stream, across changes of leaders; `request` makes what each begin asks for.

    Where the server ends it, it is begun anew, or over if it is not `is_endless`. Raises what the leader
    answers, as core errors; `Unavailable` if there is no leader for `patience_seconds`.
    """
    loop = asyncio.get_running_loop()
    candidates = Candidates(addresses)
    deadline = loop.time() + patience_seconds
    while True:
        address = candidates.next()
        failure: errors.LeaseholdError = errors.Unavailable(f"{address} ended the stream")
        is_answered = False
        try:
            async with channels.open_channel(address, tls_files=tls_files) as channel:
                asked = request()
                call = methods.stream(method, asked)(channel)(asked)
                async with asyncio.timeout_at(deadline):
                    message = await call.read()
                while message is not grpc.aio.EOF:
                    is_answered = True
                    yield message
                    message = await call.read()
                if not is_endless:
                    return
        except TimeoutError:
            failure = errors.Unavailable(f"{address} did not answer within {patience_seconds:g} s")
        except grpc.RpcError as error:
            failure = rpc_errors.from_rpc_error(error)
        if not isinstance(failure, errors.Unavailable):
            raise failure
        if is_answered:  # only now there is no leader
            deadline = loop.time() + patience_seconds
        if loop.time() >= deadline:
            raise failure
        candidates.failed(failure)
        await asyncio.sleep(RETRY_SECONDS)
