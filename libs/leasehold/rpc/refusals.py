"""How a stream of requests is refused so that its caller learns why."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

#: A stream that is to be refused has so long for its first message.
FIRST_MESSAGE_SECONDS_MAX: Final = 1.0


async def hear_out(requests: AsyncIterator[Any]) -> None:
    """Wait for the first message of a stream that is about to be refused.

    A client whose write fails since the call is over is told by gRPC that the write failed, and not why it was
    refused, nor who leads.
    """
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS_MAX):
            await anext(requests)
