"""What a worker's end means, from what its shim noted and the kernel counted."""

import dataclasses
import signal
from dataclasses import dataclass

from leasehold.core.node import model
from leasehold.core.node.model import ExitCause
from leasehold.nodeagent.worker_folder import ExitRecord

_STAGES = {
    "program": "the program cannot be executed",
    "folder": "its working folder cannot be entered",
    "cgroup": "its cgroup cannot be joined",
    "log": "its log cannot be opened",
    "session": "it got no session",
    "start": "its process or its log could not be made",
}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known beside the record."""

    limit_bytes: int = 0
    #: OOM kills in its cgroup that were told while it ran, also by an earlier agent.
    oom_kills_told: int = 0
    #: OOM kills on the host when it was sampled last; None: it was not, or there is a cgroup that tells better.
    host_oom_kills_seen: int | None = None
    #: An agent killed it.
    is_killed_by_agent: bool = False


def judged(record: ExitRecord, around: Circumstances) -> model.WorkerExit:
    """How it ended, as far as shim and kernel tell, with the OOM kills in its cgroup not told yet."""
    judgement = _judged(record, around)
    untold = 0 if record.oom_kills is None else record.oom_kills - around.oom_kills_told
    if judgement.cause is ExitCause.OOM_KILLED:
        untold -= 1  # its own, which its cause tells
    return dataclasses.replace(judgement, oom_kills=max(0, untold))


def _judged(record: ExitRecord, around: Circumstances) -> model.WorkerExit:
    if record.failed_stage:
        what = _STAGES.get(record.failed_stage, record.failed_stage)
        return _exit(record, ExitCause.NOT_STARTED, f"{what}: {record.failed_text}")
    if record.signal == 0:
        code = record.exit_code
        cause = ExitCause.CLEAN if code == 0 else ExitCause.CRASHED
        return _exit(record, cause, f"exit code {code}")
    name = signal_name(record.signal)
    if record.signal == signal.SIGKILL and (told := _oom_told(record, around)):
        return _exit(record, ExitCause.OOM_KILLED, told)
    return _exit(record, ExitCause.CRASHED, f"ended by {name}")


def unknown(detail: str, end_time_seconds: float, *, oom_kills: int = 0) -> model.WorkerExit:
    """Nobody saw how it ended."""
    return model.WorkerExit(
        cause=ExitCause.UNKNOWN, detail=detail, end_time_seconds=end_time_seconds, oom_kills=oom_kills
    )


def signal_name(number: int) -> str:
    """As SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_told(record: ExitRecord, around: Circumstances) -> str:
    if around.is_killed_by_agent:
        return ""
    if record.oom_kills is not None:
        count = record.oom_kills - around.oom_kills_told
        limit = (
            f"its limit is {around.limit_bytes / model.MIB:.0f} MiB"
            if around.limit_bytes
            else "it has no limit"
        )
        return f"out of memory: {limit}, the kernel killed it" if count > 0 else ""
    seen, now = around.host_oom_kills_seen, record.host_oom_kills_total
    if seen is None or now is None:
        return ""
    return "out of memory on the host: the kernel killed it" if now > seen else ""


def _exit(record: ExitRecord, cause: ExitCause, detail: str) -> model.WorkerExit:
    return model.WorkerExit(
        cause=cause,
        exit_code=record.exit_code,
        signal=record.signal,
        detail=detail,
        end_time_seconds=record.end_time_seconds,
        is_timed_out=record.is_timed_out,
    )
