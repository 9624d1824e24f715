"""One stream to the leader, carrying all leases of this process: finding it, feeding it, noticing its silence.

Runs on the I/O loop. `Session` follows the leader: it connects to any known address, goes where NOT_LEADER
points, and after a break tries the others at once. Between two tries of all it waits with jittered backoff.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.client import engine as engines
from leasehold.client import link as links
from leasehold.core import errors
from leasehold.core.budget import messages
from leasehold.observe import logs
from leasehold.rpc import lease_codec
from leasehold.runtime import retry

_log = logs.get_logger(__name__)

BACKOFF: Final = retry.Backoff(initial_seconds=0.1, max_seconds=1.0)
#: Two allocators that each name the other, during an election, must not be asked in a tight circle.
_HINTS_MAX: Final = 3
#: Reports and releases in one message, which the allocator bounds at 1000.
_BATCH_MAX: Final = 500
_SEND_SECONDS: Final = 2.0
#: The longest sleep of the pump: a clock that stood still while the host slept is noticed within it.
_SLEEP_SECONDS_MAX: Final = 5.0


class Session:
    """The engines of one set of addresses, and their stream. Not thread safe: used on the I/O loop only."""

    def __init__(
        self,
        addresses: Sequence[str],
        link: links.Link,
        *,
        now: Callable[[], float] = engines.boot_seconds,
        rng: random.Random | None = None,
    ) -> None:
        self._addresses = list(addresses)
        self._link = link
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311  jitter, not a secret
        self._engines: dict[tuple[str, str], engines.Engine] = {}
        self._stream: links.Stream | None = None
        self._number = 0
        self._reader: asyncio.Task[None] | None = None
        self._is_dropped = False
        self._has_served = False
        self._is_closing = False
        #: When the first report was sent that nothing has come after; None: nothing is awaited.
        self._awaiting_since: float | None = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, engine: engines.Engine) -> None:
        """Carry this engine's lease from now on."""
        self._engines[engine.budget, engine.name] = engine
        if self._stream is not None:
            engine.connected(self._number)
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(_for_ever(self._follow), name="leasehold-session"),
                asyncio.create_task(_for_ever(self._pump), name="leasehold-pump"),
            ]
        self._wake.set()

    def poke(self) -> None:
        """Something is due sooner than it was planned."""
        self._wake.set()

    async def remove(self, engine: engines.Engine, *, timeout_seconds: float) -> None:
        """Give the lease back, as far as that can be done in the time."""
        self._engines.pop((engine.budget, engine.name), None)
        release = engine.close()
        if release is not None and self._stream is not None:
            request = budget_service_pb2.HoldLeasesRequest(releases=[lease_codec.encode_release(release)])
            with contextlib.suppress(errors.LeaseholdError, TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._stream.send(request)

    async def close(self, *, timeout_seconds: float) -> None:
        """Leave the stream, after the allocator has read what was sent, if that is within the time."""
        self._is_closing = True
        reader, stream = self._reader, self._stream
        if stream is not None and reader is not None:
            with contextlib.suppress(errors.LeaseholdError, TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await stream.half_close()
                    await asyncio.wait([reader])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._link.close()

    # Following the leader

    async def _follow(self) -> None:
        delays = BACKOFF.delays(self._rng)
        candidates = list(self._addresses)
        hints = 0
        while True:
            if not candidates:
                await asyncio.sleep(next(delays))
                candidates, hints = list(self._addresses), 0
            address = candidates.pop(0)
            hint = ""
            try:
                await self._serve(address)
            except errors.NotLeader as error:
                hint = error.leader_address
                _log.debug("not_leader", address=address, leader_address=hint)
            except errors.LeaseholdError as error:
                if not self._is_closing:
                    _log.info("stream_lost", address=address, reason=error.reason, message=error.message)
            if self._has_served:
                # It did lead: the next one is found among all, itself last, and the backoff begins anew.
                candidates = [each for each in self._addresses if each != address] + [address]
                delays, hints = BACKOFF.delays(self._rng), 0
            if hint and hint != address and hints < _HINTS_MAX:
                hints += 1
                candidates = [hint, *(each for each in candidates if each != hint)]

    async def _serve(self, address: str) -> None:
        """One stream, from opening to its end, which is raised."""
        self._has_served = self._is_dropped = False
        self._awaiting_since = None
        stream = await self._link.open(address)
        self._number += 1
        number = self._number
        try:
            for engine in self._engines.values():
                engine.connected(number)
            self._stream = stream
            self._wake.set()
            self._reader = asyncio.create_task(self._read(stream, number, address), name="leasehold-read")
            try:
                await self._reader
            except asyncio.CancelledError:
                if not self._is_dropped:
                    raise
                raise errors.Unavailable(f"{address} does not answer") from None
        finally:
            self._stream = None
            for engine in self._engines.values():
                engine.disconnected(number)
            if self._reader is not None:
                self._reader.cancel()
            # Only after this may the next stream say anything: what is under way here is void then.
            await stream.close()

    async def _read(self, stream: links.Stream, number: int, address: str) -> None:
        while True:
            response = await stream.receive()
            self._awaiting_since = None
            if not self._has_served:
                self._has_served = True
                _log.debug("stream_opened", address=address)
            for grant_message in response.grants:
                try:
                    grant = lease_codec.decode_grant(grant_message)
                except errors.InvalidArgument as error:
                    _log.error("grant_unreadable", address=address, message=error.message)
                    continue
                engine = self._engines.get((grant.budget, grant.holder))
                if engine is not None:
                    engine.granted(number, grant)
            for refusal_message in response.refusals:
                refusal = lease_codec.decode_refusal(refusal_message)
                engine = self._engines.get((refusal.budget, refusal.holder))
                if engine is not None:
                    engine.refused(number, refusal)
            self._wake.set()

    # Feeding the stream, and everything that time brings

    async def _pump(self) -> None:
        while True:
            self._wake.clear()
            due = float("inf")
            reports: list[messages.Report] = []
            number = self._number
            for engine in list(self._engines.values()):
                report, engine_due = engine.turn()
                due = min(due, engine_due)
                if report is not None:
                    reports.append(report)
            if reports and self._stream is not None and number == self._number:
                await self._send(self._stream, reports)
            due = min(due, self._check_silence())
            # CLOCK_BOOTTIME may run ahead of the loop's clock while the host sleeps, never behind it.
            sleep_seconds = min(max(0.0, due - self._now()), _SLEEP_SECONDS_MAX)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(sleep_seconds):
                    await self._wake.wait()

    async def _send(self, stream: links.Stream, reports: Iterable[messages.Report]) -> None:
        if self._awaiting_since is None:
            self._awaiting_since = self._now()
        encoded = [lease_codec.encode_report(report) for report in reports]
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                for start in range(0, len(encoded), _BATCH_MAX):
                    await stream.send(
                        budget_service_pb2.HoldLeasesRequest(reports=encoded[start : start + _BATCH_MAX])
                    )
        except TimeoutError:
            self._drop(stream)
        except errors.LeaseholdError:
            pass  # whoever reads the stream is told, and tells

    def _check_silence(self) -> float:
        """Drop a stream on which reports are not answered; the instant at which to look again."""
        stream, since = self._stream, self._awaiting_since
        if stream is None or since is None or not self._engines:
            return float("inf")
        limit_at = since + min(engine.holder.answer_timeout_seconds for engine in self._engines.values())
        if self._now() < limit_at:
            return limit_at
        self._drop(stream)
        return float("inf")

    def _drop(self, stream: links.Stream) -> None:
        if stream is self._stream and self._reader is not None:
            self._is_dropped = True
            self._reader.cancel()


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Leases must be renewed whatever happens: what fails unforeseen is logged, and begun anew."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001  anything else than cancellation
            _log.exception("background_task_failed", task=work.__qualname__)
            await asyncio.sleep(BACKOFF.initial_seconds)
