"""A worker: replays its part of a trace against a provider, within a leased budget or a static part of it.

Its log (JSON lines with `mono_ns` and `event`):

- `join` (before it asks for the budget), `connected`, `leave`; `idle` and `resume` around a planned pause
- `allocation`: `amounts` by dimension, `total_workers`, `active_workers`, `reason`; from the budget's callback
- `admitted`: `request`, `tokens` asked for, `waited_seconds`; then of that request `done` with its `tokens`,
  `throttled` (a 429) or `failed` with the `error`.
"""

import argparse
import asyncio
import contextlib
import itertools
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from leasehold.core import errors
from leasehold.demo import chat_client, children, journal, plan, static_split, windows
from leasehold.sim import traces

#: Requests that wait for room at one time; while so many wait, no further one arrives.
BACKLOG_MAX = 8
ACQUIRE_SECONDS_MAX = 60.0
STREAM_EVERY = 4


class Permit(Protocol):
    """An admitted request."""

    def settle(self, *, tokens: int) -> None:
        """Tells what was used in fact."""


class Budget(Protocol):
    """What a worker needs of a budget, leased or static."""

    def acquire(
        self, *, requests: int = 1, tokens: int, timeout_seconds: float | None = None
    ) -> AbstractAsyncContextManager[Permit]:
        """Waits until a request of up to `tokens` may be sent."""

    def report_throttled(self, retry_after_seconds: float) -> None:
        """The provider answered 429."""


class Replay:
    """Sends requests as they arrive in the trace, as far as the budget lets them.

    Closed loop: while `BACKLOG_MAX` requests wait for the budget the arrivals stand still, and go on at the
    trace's pace afterwards. So nothing is dropped, and nothing piles up.
    """

    def __init__(
        self,
        requests: Iterable[traces.Request],
        budget: Budget,
        client: chat_client.ChatClient,
        log: journal.Journal,
        *,
        call_seconds_max: float,
    ) -> None:
        self._requests = requests
        self._budget = budget
        self._client = client
        self._log = log
        self._call_seconds_max = call_seconds_max
        self._backlog = asyncio.Semaphore(BACKLOG_MAX)
        self._may_arrive = asyncio.Event()
        self._may_arrive.set()

    async def run(self) -> None:
        """Replays until it is cancelled; calls in flight are then broken off."""
        clock = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as calls:
            due_seconds = clock()
            previous_seconds = 0.0
            for number, request in enumerate(self._requests, start=1):
                due_seconds += max(0.0, request.offset_seconds - previous_seconds)
                previous_seconds = request.offset_seconds
                await asyncio.sleep(due_seconds - clock())
                await self._backlog.acquire()
                await self._may_arrive.wait()
                # Time that was stood still is not made up for.
                due_seconds = max(due_seconds, clock())
                calls.create_task(self._call(number, request))

    async def pause(self, from_seconds: float, until_seconds: float) -> None:
        """No arrivals between two instants of CLOCK_MONOTONIC."""
        await asyncio.sleep(from_seconds - time.monotonic())
        self._may_arrive.clear()
        self._log.write("idle")
        await asyncio.sleep(until_seconds - time.monotonic())
        self._may_arrive.set()
        self._log.write("resume")

    async def _call(self, number: int, request: traces.Request) -> None:
        bound = plan.answer_bound(request.generated_tokens)
        tokens = request.context_tokens + bound
        arrived_seconds = time.monotonic()
        is_waiting = True
        try:
            async with self._budget.acquire(
                requests=1, tokens=tokens, timeout_seconds=ACQUIRE_SECONDS_MAX
            ) as permit:
                self._backlog.release()
                is_waiting = False
                waited_seconds = round(time.monotonic() - arrived_seconds, 6)
                self._log.write("admitted", request=number, tokens=tokens, waited_seconds=waited_seconds)
                await self._send(permit, number, request, bound)
        except errors.LeaseholdError as error:
            self._log.write("failed", request=number, error=f"{error.reason}: {error.message}")
        finally:
            if is_waiting:
                self._backlog.release()

    async def _send(self, permit: Permit, number: int, request: traces.Request, bound: int) -> None:
        try:
            async with asyncio.timeout(self._call_seconds_max):
                used_tokens = await self._client.complete(
                    prompt_tokens=request.context_tokens,
                    completion_tokens=request.generated_tokens,
                    max_tokens=bound,
                    is_stream=number % STREAM_EVERY == 0,
                    request_id=str(number),
                )
        except errors.ResourceExhausted as error:
            retry_after_seconds = error.retry_after_seconds or 1.0
            self._budget.report_throttled(retry_after_seconds)
            self._log.write("throttled", request=number, retry_after_seconds=retry_after_seconds)
        except TimeoutError:
            self._log.write("failed", request=number, error=f"took longer than {self._call_seconds_max:g} s")
        else:
            permit.settle(tokens=used_tokens)
            self._log.write("done", request=number, tokens=used_tokens)


def _budget(options: argparse.Namespace, log: journal.Journal) -> AbstractAsyncContextManager[Budget]:
    if options.mode == "shared":
        # Only here: a worker of a static split does without gRPC.
        from leasehold.demo import leased

        return leased.budget(options.budget, allocator=options.allocator, worker_id=options.worker_id, log=log)
    share = windows.Limits(
        requests=options.requests,
        tokens=options.tokens,
        concurrency=options.concurrency,
        window_seconds=options.window_seconds,
    )
    return contextlib.nullcontext(static_split.StaticSplit(share))


def _endless(options: argparse.Namespace) -> Iterator[traces.Request]:
    """This worker's part of the trace at the replay's pace, over and over."""
    start_seconds = 0.0
    for _ in itertools.count():
        is_empty, last_seconds = True, 0.0
        part = traces.part(traces.read(options.trace), index=options.part, count=options.parts)
        for request in traces.faster(part, factor=options.replay_factor):
            last_seconds = request.offset_seconds
            is_empty = False
            yield traces.Request(start_seconds + last_seconds, request.context_tokens, request.generated_tokens)
        if is_empty:
            raise errors.InvalidArgument(f"part {options.part} of the trace is empty", field="part")
        start_seconds += last_seconds


async def _work(options: argparse.Namespace) -> None:
    with journal.Journal(options.log) as log:
        leasing = _budget(options, log)
        async with chat_client.ChatClient(options.provider, worker_id=options.worker_id) as client:
            log.write("join")
            try:
                async with leasing as budget, asyncio.TaskGroup() as tasks:
                    log.write("connected")
                    replay = Replay(
                        _endless(options), budget, client, log, call_seconds_max=options.call_seconds_max
                    )
                    tasks.create_task(replay.pause(options.idle_from, options.idle_until))
                    tasks.create_task(replay.run())
            finally:
                log.write("leave")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m leasehold.demo.worker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--mode", choices=["shared", "static"], default="shared")
    parser.add_argument("--worker-id", required=True)
    parser.add_argument("--provider", required=True, help="base URL, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--trace", type=pathlib.Path, required=True)
    parser.add_argument("--part", type=int, default=0, help="which part of the trace, from 0")
    parser.add_argument("--parts", type=int, default=1, help="how many parts there are")
    parser.add_argument("--replay-factor", type=float, default=1.0)
    parser.add_argument("--idle-from", type=float, default=1e12, help="CLOCK_MONOTONIC, seconds")
    parser.add_argument("--idle-until", type=float, default=1e12)
    parser.add_argument("--call-seconds-max", type=float, default=60.0)
    shared = parser.add_argument_group("shared")
    shared.add_argument("--allocator", help="host:port")
    shared.add_argument("--budget", default="llm-api")
    static = parser.add_argument_group("static: this worker's own part")
    static.add_argument("--requests", type=int, default=200)
    static.add_argument("--tokens", type=int, default=10_000)
    static.add_argument("--concurrency", type=int, default=10)
    static.add_argument("--window-seconds", type=float, default=61.0)
    parser.add_argument("--lifeline-fd", type=int, help="stop when this descriptor reaches end of file")
    options = parser.parse_args(arguments)
    if options.mode == "shared" and not options.allocator:
        parser.error("--mode shared needs --allocator")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Works until SIGTERM or SIGINT. Exit code 0, or 1 with one line on standard error."""
    options = _options(arguments)
    exit_code = 0
    try:
        asyncio.run(children.run_until_stopped(_work(options), options.lifeline_fd))
    except* (errors.LeaseholdError, OSError) as group:
        sys.stderr.write("".join(f"{error}\n" for error in _leaves(group)))
        exit_code = 1
    return exit_code


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


if __name__ == "__main__":
    sys.exit(main())
