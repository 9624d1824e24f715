"""The settings that keep Celery's tasks safe on a host whose workers come and go, each with its reason.

One table serves three uses: `settings` writes it down, `lint` finds what an application lacks, and `configure`
sets just that. Whatever an application has set that is as safe stays as it is.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from celery.app import defaults

#: Seconds.
TASK_TIME_LIMIT: Final = 3_600.0
TASK_SOFT_TIME_LIMIT: Final = 3_300.0
#: A message is hidden for so many times the longest task, and for some seconds more at least: it is taken
#: before its task starts, and the clocks of hosts differ.
VISIBILITY_RATIO: Final = 1.25
VISIBILITY_MARGIN_SECONDS: Final = 5.0
VISIBILITY_TIMEOUT: Final = 4_500
MAX_TASKS_PER_CHILD: Final = 15
SOFT_SHUTDOWN_TIMEOUT: Final = 10.0
_SOFT_SHUTDOWN_MAX: Final = 60.0
_VISIBILITY: Final = "broker_transport_options.visibility_timeout"
#: What is stored there outlives the worker, and can be asked for by another.
_PASSING_BACKENDS: Final = ("", "rpc", "disabled", "cache+memory", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A setting that may lose a task, or run it twice."""

    #: As Celery names it; `task NAME: option` where one task has its own.
    setting: str
    present: Any
    #: What `configure` sets; None where it cannot, and `why` says what to do.
    wanted: Any
    why: str

    def __str__(self) -> str:
        wanted = f", wanted {self.wanted!r}" if self.wanted is not None else ""
        return f"{self.setting} is {self.present!r}{wanted}: {self.why}"


@dataclass(frozen=True, slots=True)
class _Rule:
    setting: str
    is_fine: Callable[[Any], bool]
    wanted: Any
    why: str
    does_apply: bool = True


def is_known(setting: str) -> bool:
    """Whether this version of Celery has a setting."""
    return setting in defaults.DEFAULTS


def scheme(url: Any) -> str:
    """Scheme of an address: ``redis``; empty where there is none."""
    return str(url or "").split(";")[0].partition("://")[0].lower() if "://" in str(url or "") else ""


def is_redis(url: Any) -> bool:
    """Whether an address is that of a Redis, Valkey or the like."""
    return scheme(url).startswith(("redis", "valkey", "sentinel"))


def longest_task_seconds(configuration: Any, tasks: Mapping[str, Any]) -> float:
    """The highest hard time limit of any task; that of `TASK_TIME_LIMIT` where there is none at all."""
    limits = [configuration.get("task_time_limit")]
    limits += [getattr(task, "time_limit", None) for task in tasks.values()]
    return max([float(limit) for limit in limits if limit], default=TASK_TIME_LIMIT)


def findings(configuration: Any, *, longest_seconds: float) -> Iterator[Finding]:
    """What an application's settings lack. `configuration` is its ``conf``, or any mapping like it."""
    for rule in _rules(configuration, longest_seconds):
        present = _present(configuration, rule.setting)
        if rule.does_apply and not rule.is_fine(present):
            yield Finding(setting=rule.setting, present=present, wanted=rule.wanted, why=rule.why)
    if os.environ.get("REMAP_SIGTERM"):
        yield Finding(
            setting="REMAP_SIGTERM (environment)",
            present=os.environ["REMAP_SIGTERM"],
            wanted=None,
            why="with it TERM interrupts the running task: unset it, the agent knows when to send QUIT",
        )


def merged(configuration: Any, finding: Finding) -> dict[str, Any]:
    """What to set in an application's ``conf``, so that a finding goes."""
    name, _, option = finding.setting.partition(".")
    if not option:
        return {name: finding.wanted}
    return {name: {**(configuration.get(name) or {}), option: finding.wanted}}


def _present(configuration: Any, setting: str) -> Any:
    name, _, option = setting.partition(".")
    if name == "broker_url":
        return configuration.broker_url
    value = configuration.get(name)
    return (value or {}).get(option) if option else value


def _rules(configuration: Any, longest: float) -> Iterator[_Rule]:
    on_redis = is_redis(getattr(configuration, "broker_read_url", None) or configuration.get("broker_url"))
    backend = getattr(configuration, "result_backend", None) or configuration.get("result_backend")
    limit = float(configuration.get("task_time_limit") or TASK_TIME_LIMIT)
    hidden_seconds = max(longest * VISIBILITY_RATIO, longest + VISIBILITY_MARGIN_SECONDS)
    yield _Rule(
        "task_acks_late", bool, True, "a task that is acknowledged before it runs is lost with its worker"
    )
    yield _Rule(
        "task_reject_on_worker_lost",
        bool,
        True,
        "a task whose process was killed, for its memory say, is marked as failed and does not run again",
    )
    yield _Rule(
        "worker_prefetch_multiplier",
        lambda value: value == 1,
        1,
        "a busy worker keeps tasks from idle ones, and a stop has more to give back",
    )
    yield _Rule(
        "worker_disable_prefetch",
        bool,
        True,
        "one task more waits at a busy worker while others are idle",
        does_apply=on_redis and is_known("worker_disable_prefetch"),
    )
    yield _Rule(
        "worker_max_tasks_per_child",
        lambda value: bool(value) and value > 0,
        MAX_TASKS_PER_CHILD,
        "what a task leaks stays until the worker ends",
    )
    yield from _time_rules(limit)
    yield _Rule(
        _VISIBILITY,
        lambda value: value is not None and float(value) >= hidden_seconds,
        max(VISIBILITY_TIMEOUT, math.ceil(hidden_seconds)),
        f"a task that takes longer is given to a second worker meanwhile: tasks may take {longest:g} s here, "
        "and without it 3600 s is the default",
        does_apply=on_redis,
    )
    yield _Rule(
        "worker_cancel_long_running_tasks_on_connection_loss",
        bool,
        True,
        "after a lost connection a task runs on, is delivered again, and completes twice",
        does_apply=is_known("worker_cancel_long_running_tasks_on_connection_loss"),
    )
    yield _Rule(
        "worker_deduplicate_successful_tasks",
        bool,
        True,
        "a task whose worker died between its success and the acknowledgement completes twice",
        does_apply=scheme(backend) not in _PASSING_BACKENDS and is_known("worker_deduplicate_successful_tasks"),
    )


def _time_rules(limit: float) -> Iterator[_Rule]:
    yield _Rule(
        "task_time_limit", bool, TASK_TIME_LIMIT, "a task that hangs holds its worker, and its stop, for ever"
    )
    yield _Rule(
        "task_soft_time_limit",
        lambda value: bool(value) and float(value) < limit,
        min(TASK_SOFT_TIME_LIMIT, limit * TASK_SOFT_TIME_LIMIT / TASK_TIME_LIMIT),
        "a task that takes too long is killed, without the time to end by itself",
    )
    yield _Rule(
        "worker_soft_shutdown_timeout",
        lambda value: bool(value) and 0 < float(value) <= _SOFT_SHUTDOWN_MAX,
        SOFT_SHUTDOWN_TIMEOUT,
        "a stop at once interrupts even a task that needs a second more",
        does_apply=is_known("worker_soft_shutdown_timeout"),
    )
