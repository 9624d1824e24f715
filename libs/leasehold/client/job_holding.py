"""An allocation that is held: renewed on the I/O thread, and given back at the end.

Its TTL is counted from before the call that is answered; so the holder stops before the allocator gives the
allocation to others, whatever the network did in between.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from leasehold.client import job_calls
from leasehold.core import errors
from leasehold.core.job import model
from leasehold.observe import logs

#: Of what is left of a TTL, when it is renewed, and the longest that one call is given.
RENEW_FRACTION: Final = 1 / 3
RETRY_SECONDS: Final = 0.2

_log = logs.get_logger(__name__)

#: Refusals after which nothing is held any more.
_LOST: Final = (errors.AllocationLapsed, errors.NotFound, errors.FailedPrecondition, errors.InvalidArgument)


class Holding:
    """One allocation; every method runs on the I/O thread's loop. `lost` is called there, at most once."""

    def __init__(
        self,
        calls: job_calls.JobCalls,
        spec: model.JobSpec,
        *,
        wait_seconds: float,
        lost: Callable[[], None],
    ) -> None:
        self._calls = calls
        self._spec = spec
        self._wait_seconds = wait_seconds
        self._lost = lost
        self._task: asyncio.Task[None] | None = None
        self.ref: model.AttemptRef | None = None
        self.node = ""
        #: Monotonic clock; the work must have stopped by then.
        self.held_until = 0.0
        #: Why the work must stop; None: it may go on.
        self.failure: errors.LeaseholdError | None = None

    async def begin(self) -> None:
        """Wait for the allocation, and renew it from now on. Raises `NotPlaced`, and what the leader says."""
        request_id = job_calls.new_request_id()
        self.ref, self.node, self.held_until = await self._calls.acquire(
            self._spec, request_id, self._wait_seconds
        )
        self._task = asyncio.create_task(self._renew(self.ref), name="leasehold-allocation")

    async def end(self, *, is_failed: bool, detail: str) -> None:
        """Renew no more, and give it back; if that does not reach the leader, its TTL does it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self.ref is None:
            return
        ref, self.ref = self.ref, None
        try:
            await self._calls.release(ref, is_failed=is_failed, detail=detail)
        except errors.LeaseholdError as error:
            _log.warning(
                "allocation_not_released", job_id=ref.job_id, reason=error.reason, message=error.message
            )

    async def _renew(self, ref: model.AttemptRef) -> None:
        pause_seconds = (self.held_until - time.monotonic()) * RENEW_FRACTION
        while True:
            await asyncio.sleep(max(min(pause_seconds, self.held_until - time.monotonic()), 0.0))
            left_seconds = self.held_until - time.monotonic()
            if left_seconds <= 0:
                self._lose(job_calls.lapsed(ref, "was not renewed in time"))
                return
            try:
                async with asyncio.timeout(left_seconds):
                    self.held_until, is_cancelled = await self._calls.renew(
                        ref, timeout_seconds=max(left_seconds * RENEW_FRACTION, RETRY_SECONDS)
                    )
            except _LOST as error:
                self._lose(job_calls.lapsed(ref, f"was given up: {error.message}"))
                return
            except (errors.LeaseholdError, TimeoutError) as error:
                _log.info(
                    "allocation_not_renewed", job_id=ref.job_id, left_seconds=left_seconds, error=str(error)
                )
                pause_seconds = RETRY_SECONDS
                continue
            if is_cancelled:
                self._lose(job_calls.lapsed(ref, "is to be given back: its job was cancelled"))
                return
            pause_seconds = (self.held_until - time.monotonic()) * RENEW_FRACTION

    def _lose(self, failure: errors.LeaseholdError) -> None:
        self.failure = failure
        _log.warning("allocation_lost", job_id=self.ref.job_id if self.ref else "", message=failure.message)
        self._lost()
