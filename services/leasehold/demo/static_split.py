"""The other way to share a limit: each worker keeps to a fixed part by itself and asks nobody."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from leasehold.core import errors
from leasehold.demo import windows


class Permit:
    """One admitted request."""

    def __init__(self) -> None:
        self.actual_tokens: int | None = None

    def settle(self, *, tokens: int) -> None:
        """The tokens that were used in fact; without it, all that were asked for count."""
        self.actual_tokens = tokens


class StaticSplit:
    """An exact local limiter with the face of a leased budget, for the comparison."""

    def __init__(self, share: windows.Limits) -> None:
        self._quota = windows.Quota(share)
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def acquire(
        self, *, requests: int = 1, tokens: int, timeout_seconds: float | None = None
    ) -> AsyncIterator[Permit]:
        """Waits, in order, until the request fits.

        Raises `ResourceExhausted` if it never can, `DeadlineExceeded` after `timeout_seconds`, and
        `InvalidArgument` for anything but one request at a time.
        """
        if requests != 1:
            raise errors.InvalidArgument(f"requests: {requests} is not 1", field="requests")
        try:
            async with asyncio.timeout(timeout_seconds):
                admission = await self._admit(tokens)
        except TimeoutError as error:
            raise errors.DeadlineExceeded(f"no room within {timeout_seconds:g} s") from error
        permit = Permit()
        try:
            yield permit
        finally:
            self._quota.end(admission, tokens=permit.actual_tokens)
            self._freed.set()

    async def _admit(self, tokens: int) -> windows.Admission:
        async with self._turn:
            while True:
                decision = self._quota.try_admit(time.monotonic_ns(), tokens)
                if isinstance(decision, windows.Admission):
                    return decision
                if not decision.is_possible:
                    raise errors.ResourceExhausted(
                        f"{tokens} tokens are more than this worker's whole part, {self._quota.limits.tokens}"
                    )
                await self._wait(decision.retry_after_ns)

    async def _wait(self, nanos: int | None) -> None:
        """Until something is freed or `nanos` have passed."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if nanos is None else nanos / windows.NANOS_PER_SECOND):
                await self._freed.wait()

    def report_throttled(self, retry_after_seconds: float) -> None:
        """A 429 changes nothing: a fixed part stays what it is."""
