"""Plays the four scenes with two fleets at once: one that leases its limits, one with a static split."""

import asyncio
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from leasehold.core import errors
from leasehold.demo import board, children, journal, plan, view

TICK_SECONDS = 0.2
START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Played:
    """Instants of the play, CLOCK_MONOTONIC nanoseconds."""

    begin_ns: int
    kill_ns: int
    end_ns: int


class Fleet:
    """A provider and the workers that share it."""

    def __init__(
        self,
        name: str,
        wanted: plan.Plan,
        kids: children.Children,
        folder: pathlib.Path,
        trace: pathlib.Path,
        worker_arguments: list[str],
    ) -> None:
        self.name = name
        self.logs = board.Logs(folder, name)
        self._plan = wanted
        self._kids = kids
        self._trace = trace
        self._worker_arguments = worker_arguments
        self._address = ""
        self._running: list[str] = []

    async def start_provider(self) -> None:
        """Starts the provider; returns when it listens. Raises `Unavailable` if it does not."""
        limits, speed = self._plan.limits, self._plan.speed
        self._kids.start_module(
            self._provider,
            "leasehold.demo.provider",
            [
                *("--log", str(self.logs.provider)),
                *_limit_arguments(limits.requests, limits.tokens, limits.concurrency, limits.window_seconds),
                *("--first-token-seconds", str(speed.first_token_seconds)),
                *("--seconds-per-token", str(speed.seconds_per_token)),
                *("--answer-seconds-max", str(speed.answer_seconds_max)),
            ],
        )
        log = journal.Tail(self.logs.provider)
        deadline_seconds = time.monotonic() + START_SECONDS
        while not self._address:
            self._kids.check_running()
            if time.monotonic() > deadline_seconds:
                raise errors.Unavailable(f"{self._provider} did not start within {START_SECONDS:g} s")
            for event in log.new_events():
                self._address = event["address"]
            await asyncio.sleep(0.05)

    @property
    def _provider(self) -> str:
        return f"{self.name}-provider"

    def start_worker(self, name: str, begin_seconds: float) -> None:
        """Starts one worker; `begin_seconds` is the play's beginning on CLOCK_MONOTONIC."""
        script = self._plan.script
        arguments = [
            *self._worker_arguments,
            *("--worker-id", name),
            *("--provider", f"{self._address}/v1"),
            *("--log", str(self.logs.worker(name))),
            *("--trace", str(self._trace)),
            *("--part", str(plan.WORKERS.index(name)), "--parts", str(len(plan.WORKERS))),
            *("--replay-factor", str(self._plan.replay_factor)),
            *("--call-seconds-max", str(self._plan.max_call_seconds)),
        ]
        if name == plan.IDLE_WORKER:
            arguments += ["--idle-from", str(begin_seconds + script.idle_from_seconds)]
            arguments += ["--idle-until", str(begin_seconds + script.idle_until_seconds)]
        self._kids.start_module(self._child(name), "leasehold.demo.worker", arguments)
        self._running.append(name)

    def _child(self, worker: str) -> str:
        return f"{self.name}-{worker}"

    def kill_worker(self, name: str) -> int:
        """SIGKILL; returns the instant, CLOCK_MONOTONIC nanoseconds."""
        self._running.remove(name)
        return self._kids.kill(self._child(name))

    def worker_children(self) -> list[str]:
        """The children that are workers and still run."""
        return [self._child(name) for name in self._running]

    def provider_child(self) -> str:
        """The child that is the provider."""
        return self._provider


def leased_arguments(allocator: str, budget: str) -> list[str]:
    """A worker's arguments in the fleet that leases."""
    return ["--mode", "shared", "--allocator", allocator, "--budget", budget]


def static_arguments(wanted: plan.Plan) -> list[str]:
    """A worker's arguments in the fleet of the static split."""
    share = wanted.static_share
    return [
        *("--mode", "static"),
        *_limit_arguments(share.requests, share.tokens, share.concurrency, share.window_seconds),
    ]


def _limit_arguments(requests: int, tokens: int, concurrency: int, window_seconds: float) -> list[str]:
    return [
        *("--requests", str(requests)),
        *("--tokens", str(tokens)),
        *("--concurrency", str(concurrency)),
        *("--window-seconds", str(window_seconds)),
    ]


async def play(
    wanted: plan.Plan,
    leased: Fleet,
    static: Fleet,
    kids: children.Children,
    state: board.Board,
    shown: view.View,
) -> Played:
    """Plays all scenes to the end; then every worker and both providers have ended.

    Raises `Unavailable` if a process ends that should not.
    """
    await asyncio.gather(leased.start_provider(), static.start_provider())
    begin_ns = time.monotonic_ns()
    kill_ns = 0

    def kill() -> None:
        nonlocal kill_ns
        kill_ns = leased.kill_worker(plan.KILLED_WORKER)
        static.kill_worker(plan.KILLED_WORKER)
        for fleet in (state.leased, state.static):
            fleet.killed(plan.KILLED_WORKER)

    due = [(wanted.script.kill_seconds, kill)]
    for name, start_seconds in wanted.script.starts_seconds.items():
        due += [(start_seconds, _starting(fleet, name, begin_ns / 1e9)) for fleet in (leased, static)]
    due.sort(key=lambda action: action[0])
    while (elapsed_seconds := (time.monotonic_ns() - begin_ns) / 1e9) < wanted.script.end_seconds:
        while due and due[0][0] <= elapsed_seconds:
            due.pop(0)[1]()
        kids.check_running()
        shown.show(state, state.update(elapsed_seconds))
        await asyncio.sleep(TICK_SECONDS)
    end_ns = time.monotonic_ns()
    kids.stop([*leased.worker_children(), *static.worker_children()])
    kids.stop([leased.provider_child(), static.provider_child()])
    shown.show(state, state.update(elapsed_seconds))
    return Played(begin_ns, kill_ns, end_ns)


def _starting(fleet: Fleet, name: str, begin_seconds: float) -> Callable[[], None]:
    return lambda: fleet.start_worker(name, begin_seconds)
