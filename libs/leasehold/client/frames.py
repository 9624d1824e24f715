"""What a forked child and its relay say to each other over a socket pair: length-prefixed frames."""

import asyncio
import enum
import json
import struct
from typing import Any, Final, NamedTuple

from leasehold.client import failures
from leasehold.core import errors

_HEADER: Final = struct.Struct("!IBI")
#: A little above the largest message that gRPC lets through.
PAYLOAD_BYTES_MAX: Final = 5 * 1024 * 1024


class FrameKind(enum.IntEnum):
    """What a frame says; the payload is told for each."""

    OPEN = 1  # to the relay: leave any other stream, open this one. JSON: address, and paths of TLS files
    SEND = 2  # to the relay: a HoldLeasesRequest
    HALF_CLOSE = 3  # to the relay: nothing more is sent. Empty
    CLOSE = 4  # to the relay: leave the stream. Empty
    RECEIVED = 5  # from the relay: a HoldLeasesResponse
    FAILED = 6  # from the relay: the stream is over. JSON: parts of the core error
    CLOSED = 7  # from the relay: the stream is left. Empty


class Frame(NamedTuple):
    """One frame. `stream` numbers the streams, so that a late word about an old one is told apart."""

    kind: FrameKind
    stream: int
    payload: bytes = b""


def encode(frame: Frame) -> bytes:
    """Header and payload."""
    return _HEADER.pack(len(frame.payload), frame.kind, frame.stream) + frame.payload


async def read(reader: asyncio.StreamReader) -> Frame:
    """The next frame. Raises `Unavailable` when the other side has gone or talks nonsense."""
    try:
        length, kind, stream = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if length > PAYLOAD_BYTES_MAX:
            raise errors.Unavailable("the other side of the relay sent a frame that is too long")
        return Frame(FrameKind(kind), stream, await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError, ValueError) as error:
        raise errors.Unavailable("the other side of the relay has gone") from error


def encode_error(error: errors.LeaseholdError) -> bytes:
    """The error as a payload of FAILED."""
    parts: dict[str, Any] = {
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "retry_after_seconds": error.retry_after_seconds,
        "metadata": error.metadata,
    }
    return json.dumps(parts).encode()


def decode_error(payload: bytes) -> errors.LeaseholdError:
    """Inverse of `encode_error`."""
    parts = json.loads(payload)
    return failures.build(
        parts["reason"],
        parts["message"],
        field=parts["field"],
        retry_after_seconds=parts["retry_after_seconds"],
        metadata=parts["metadata"],
    )
