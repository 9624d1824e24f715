"""The holders' connections of one reign: what is to be said on each."""

import asyncio
from typing import Any

from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.core import errors
from leasehold.core.budget import messages
from leasehold.rpc import lease_codec

#: A connection that does not take what is said to it is broken once so much has gathered.
UNSENT_MAX = 20_000
#: Grants of one message on the wire.
GRANTS_MAX = 500


class Session:
    """One HoldLeases stream, as its writer sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        #: Its holders' processes are of this host and PID namespace.
        self.is_local = False
        self._grants: list[messages.Grant] = []
        self._refusals: list[messages.Refusal] = []
        self._changed = asyncio.Event()
        self._is_closed = False
        #: Why the stream ends; None: in peace.
        self.error: errors.LeaseholdError | None = None
        #: The task that is stuck in a write to this connection; cancelled where the connection is given up.
        self.writing: asyncio.Task[Any] | None = None

    def say(self, message: messages.Grant | messages.Refusal) -> None:
        """Put a message in line."""
        if isinstance(message, messages.Grant):
            self._grants.append(message)
        else:
            self._refusals.append(message)
        if len(self._grants) + len(self._refusals) > UNSENT_MAX:
            self._grants.clear()
            self._refusals.clear()
            self.end(errors.ResourceExhausted("this connection does not take what is said to it"))
        self._changed.set()

    def end(self, error: errors.LeaseholdError | None) -> None:
        """End the stream: at once with an error, or (None) after what is in line. The first call counts."""
        if not self._is_closed:
            self.error, self._is_closed = error, True
            if error is not None and self.writing is not None:
                self.writing.cancel()
        self._changed.set()

    async def next_response(self) -> wire.HoldLeasesResponse | None:
        """What is to be written next; None when the stream is over. Raises the error that `end` was given."""
        while not (self._grants or self._refusals or self._is_closed):
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        if not (self._grants or self._refusals):
            return None
        grants, self._grants = self._grants[:GRANTS_MAX], self._grants[GRANTS_MAX:]
        refusals, self._refusals = self._refusals[:GRANTS_MAX], self._refusals[GRANTS_MAX:]
        return wire.HoldLeasesResponse(
            grants=[lease_codec.encode_grant(grant) for grant in grants],
            refusals=[lease_codec.encode_refusal(refusal) for refusal in refusals],
        )
