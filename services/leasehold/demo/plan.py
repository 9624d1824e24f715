"""What the demo plays: limits that bind, the speed of the replay, and the times of the scenes."""

import collections
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from leasehold.core import errors
from leasehold.demo import service_time, windows
from leasehold.sim import traces

WORKERS = ("worker-a", "worker-b", "worker-c", "worker-d")
IDLE_WORKER = "worker-c"
KILLED_WORKER = "worker-d"

CONCURRENCY = 40
REQUESTS_PER_MINUTE = 800
FIRST_TOKEN_SECONDS = 0.2
ARRIVAL_JITTER_SECONDS = 1.0
#: Each worker offers this part of the whole budget, so that one alone can use all of it.
OFFERED_RATIO = 1.15
SECONDS_MAX = 3600.0
WINDOW_SECONDS_MIN = 5.0
#: No answer takes longer: a worker that pauses is idle soon, whatever it had in flight.
ANSWER_SECONDS_MAX = 10.0
ACTIVITY_TIMEOUT_SECONDS = 8.0
#: What waits when a worker pauses is still admitted; it is gone after so long.
BACKLOG_SECONDS = 8.0

_ANSWER_BOUND_MIN = 64
# Parts of the play: when each scene ends, the time between two joins, and how long before the kill the idle
# worker comes back.
_SCENE_ENDS = (0.17, 0.45, 0.78, 1.0)
_JOIN_STEP = 0.05
_RETURN_LEAD = 0.04


def answer_bound(generated_tokens: int) -> int:
    """`max_tokens` of a replayed request: callers ask for 64, 128, 256, … whichever is enough."""
    return max(_ANSWER_BOUND_MIN, 1 << max(0, generated_tokens - 1).bit_length())


class SceneName(enum.StrEnum):
    """The four scenes."""

    ALONE = "one worker alone"
    SEVERAL = "several workers"
    IDLE = "one goes idle past its timeout"
    KILLED = "one is killed with SIGKILL"


@dataclass(frozen=True, slots=True)
class Scene:
    """A part of the play, in seconds after its beginning."""

    name: SceneName
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """When everything happens, in seconds after the beginning."""

    scenes: tuple[Scene, ...]
    #: When each worker is started.
    starts_seconds: dict[str, float]
    idle_from_seconds: float
    idle_until_seconds: float
    kill_seconds: float

    @property
    def end_seconds(self) -> float:
        """When everyone stops."""
        return self.scenes[-1].end_seconds

    def scene_at(self, seconds: float) -> Scene:
        """The scene being played; before the first and after the last, that one."""
        begun = [scene for scene in self.scenes if scene.start_seconds <= seconds]
        return begun[-1] if begun else self.scenes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that both fleets are given alike."""

    limits: windows.Limits
    speed: service_time.ServiceTime
    script: Script
    #: The trace is replayed so many times as fast as it was recorded.
    replay_factor: float
    trace_rows: int
    activity_timeout_seconds: float = ACTIVITY_TIMEOUT_SECONDS
    arrival_jitter_seconds: float = ARRIVAL_JITTER_SECONDS
    max_call_seconds: float = 60.0

    @property
    def static_share(self) -> windows.Limits:
        """A worker's part of a static split: a quarter of each limit.

        Its window is longer by the jitter, for the same reason as a lease's: what it lets in now may reach the
        provider later than what it lets in next.
        """
        count = len(WORKERS)
        return windows.Limits(
            requests=self.limits.requests // count,
            tokens=self.limits.tokens // count,
            concurrency=self.limits.concurrency // count,
            window_seconds=self.limits.window_seconds + self.arrival_jitter_seconds,
        )


def script(seconds: float) -> Script:
    """The scenes spread over `seconds`."""
    ends = [seconds * part for part in _SCENE_ENDS]
    starts = [0.0, *ends[:-1]]
    _, several, idle, killed = starts
    scenes = zip(SceneName, starts, ends, strict=True)
    joins = (several + seconds * _JOIN_STEP * number for number in range(len(WORKERS) - 1))
    return Script(
        scenes=tuple(Scene(name, start, end) for name, start, end in scenes),
        starts_seconds=dict(zip(WORKERS, (0.0, *joins), strict=True)),
        idle_from_seconds=idle,
        idle_until_seconds=killed - seconds * _RETURN_LEAD,
        kill_seconds=killed,
    )


def make(requests: Iterable[traces.Request], *, seconds: float, window_seconds: float) -> Plan:
    """The plan for a trace.

    Concurrency and requests are fixed; tokens and the model's speed are set from the trace's means so that all
    three limits allow about the same number of requests. As the mix of lengths varies, each of them binds at
    times. Raises `InvalidArgument` if `seconds` or `window_seconds` is out of range.
    """
    if not WINDOW_SECONDS_MIN <= window_seconds <= SECONDS_MAX:
        raise errors.InvalidArgument(
            f"window_seconds: {window_seconds:g} is not in {WINDOW_SECONDS_MIN:g} to {SECONDS_MAX:g}",
            field="window_seconds",
        )
    seconds_min = _seconds_min(window_seconds + ARRIVAL_JITTER_SECONDS)
    if not seconds_min <= seconds <= SECONDS_MAX:
        raise errors.InvalidArgument(
            f"seconds: {seconds:g} is not in {seconds_min:g} to {SECONDS_MAX:g} (for a window of "
            f"{window_seconds:g} s)",
            field="seconds",
        )
    totals = _Totals.of(requests)
    count = len(WORKERS)
    per_window = int(REQUESTS_PER_MINUTE * window_seconds / 60) // count * count
    reachable_per_second = per_window / (window_seconds + ARRIVAL_JITTER_SECONDS)
    answer_seconds = CONCURRENCY / reachable_per_second
    # Calls in flight count with their whole reservation.
    tokens = per_window * totals.mean_tokens + CONCURRENCY * totals.mean_unused
    tokens = max(tokens, count * totals.largest_reservation)
    return Plan(
        limits=windows.Limits(
            requests=per_window,
            tokens=math.ceil(tokens / 1000) * 1000,
            concurrency=CONCURRENCY,
            window_seconds=window_seconds,
        ),
        speed=service_time.ServiceTime(
            first_token_seconds=FIRST_TOKEN_SECONDS,
            seconds_per_token=_seconds_per_token(totals.answers, answer_seconds),
            answer_seconds_max=ANSWER_SECONDS_MAX,
        ),
        script=script(seconds),
        replay_factor=OFFERED_RATIO * reachable_per_second * count / totals.requests_per_second,
        trace_rows=totals.rows,
    )


def _seconds_min(settling_seconds: float) -> float:
    """The shortest play in which each share has settled before the next change, by the parts of `script`."""
    all_joined = _SCENE_ENDS[0] + (len(WORKERS) - 2) * _JOIN_STEP
    several_part = _SCENE_ENDS[1] - all_joined
    idle_part = _SCENE_ENDS[2] - _SCENE_ENDS[1] - _RETURN_LEAD
    idle_seconds = BACKLOG_SECONDS + max(ANSWER_SECONDS_MAX, ACTIVITY_TIMEOUT_SECONDS) + settling_seconds
    return math.ceil(max(1.3 * settling_seconds / several_part, idle_seconds / idle_part))


def _seconds_per_token(answers: Mapping[int, int], mean_seconds: float) -> float:
    """The speed at which answers take `mean_seconds` on average, by bisection (the bound is not linear)."""
    low, high = 0.0, ANSWER_SECONDS_MAX
    for _ in range(50):
        middle = (low + high) / 2
        speed = service_time.ServiceTime(
            first_token_seconds=FIRST_TOKEN_SECONDS,
            seconds_per_token=middle,
            answer_seconds_max=ANSWER_SECONDS_MAX,
        )
        total_seconds = sum(count * speed.seconds(tokens) for tokens, count in answers.items())
        if total_seconds < mean_seconds * sum(answers.values()):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class _Totals:
    rows: int
    requests_per_second: float
    mean_tokens: float
    #: How often each length of an answer occurs.
    answers: collections.Counter[int]
    #: Reserved and not used, per request.
    mean_unused: float
    largest_reservation: int

    @classmethod
    def of(cls, requests: Iterable[traces.Request]) -> "_Totals":
        answers: collections.Counter[int] = collections.Counter()
        rows = tokens = unused = largest = 0
        last_seconds = 0.0
        for request in requests:
            bound = answer_bound(request.generated_tokens)
            rows += 1
            tokens += request.total_tokens
            answers[request.generated_tokens] += 1
            unused += bound - request.generated_tokens
            largest = max(largest, request.context_tokens + bound)
            last_seconds = request.offset_seconds
        if rows < len(WORKERS):
            raise errors.InvalidArgument(
                f"trace: {rows} requests, at least {len(WORKERS)} are needed", field="trace"
            )
        rate = rows / last_seconds if last_seconds > 0 else float(rows)
        return cls(rows, rate, tokens / rows, answers, unused / rows, largest)
