"""One worker's folder, and the records in it.

::

    workers/UUID/intent.json   what was to be started; on disk before its process is spawned
                 shim.json     who its processes are, written by the shim into room that is there before
                 exit          how it ended, likewise
                 lock          locked while its shim or a process of it lives, which inherit it
                 stop.json     the step of the stop contract that is in force
                 oom-kills.json  how many of its processes' OOM kills were told
                 ended.json    how it ended, as it was judged and counted
                 run/          what the worker tells of itself
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from leasehold.core import errors
from leasehold.core.node import model, worker_records
from leasehold.nodeagent import records, shim, worker_values
from leasehold.runtime import identity as identities
from leasehold.runtime.identity import ProcessIdentity

T = TypeVar("T")

INTENT = records.Format("intent", 1)
SHIM = records.Format("shim", 1)
EXIT = records.Format("exit", 1)
STOP = records.Format("stop", 1)
ENDED = records.Format("ended", 1)
OOM_KILLS = records.Format("oom-kills", 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What was to be started."""

    worker_id: str
    name: str
    pool: str
    number: int
    start_number: int
    argv: tuple[str, ...]
    limit_bytes: int
    boot_id: str
    #: None: no cgroup.
    cgroup: Path | None
    stop: model.StopContract
    log: worker_values.LogSettings
    #: 0: not limited.
    cpus: int = 0
    #: None: without end.
    max_run_seconds: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShimRecord:
    """Who a worker's processes are."""

    process: ProcessIdentity
    shim: ProcessIdentity
    name: str
    pool: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """How a worker ended, as its shim saw it."""

    exit_code: int | None
    signal: int
    end_time_seconds: float
    #: Of the worker's cgroup; None: there is none.
    oom_kills: int | None
    #: Of the whole host since its boot; None: the kernel does not tell.
    host_oom_kills_total: int | None
    #: Empty, or where the start failed.
    failed_stage: str
    failed_text: str
    #: Its shim ended it, for it ran longer than it may.
    is_timed_out: bool = False


class WorkerFolder:
    """The folder of one worker. Methods that read raise `records.Damaged`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def worker_id(self) -> str:
        """The id of the worker's life."""
        return self.path.name

    @property
    def run(self) -> Path:
        """Where the worker tells of itself."""
        return self.path / "run"

    @property
    def lock(self) -> Path:
        """The file that the worker's processes hold locked."""
        return self.path / "lock"

    @property
    def is_named_by_uuid(self) -> bool:
        """Whether this can be a worker's folder at all."""
        try:
            return str(uuid.UUID(self.path.name)) == self.path.name
        except ValueError:
            return False

    def create(self, intent: Intent) -> int:
        """Write the intent and make room for the shim's records; all of it is on disk when this returns.

        Returns the descriptor of the lock, which the caller closes once the shim has it. Raises as
        `records.told` does; nothing stays then.
        """
        with records.told(f"worker {intent.name} cannot be recorded"), contextlib.ExitStack() as on_failure:
            self.path.mkdir(mode=0o700)
            on_failure.callback(self.remove)
            self.run.mkdir(mode=0o700)
            room = b"\0" * shim.RECORD_BYTES
            records.write_synced(self.path / "shim.json", room)
            records.write_synced(self.path / "exit", room)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            on_failure.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            records.write_synced(self.path / "intent.json", INTENT.encode(encode_intent(intent)))
            records.sync_folder(self.path)
            records.sync_folder(self.path.parent)
            on_failure.pop_all()
            return descriptor

    def rewrite_intent(self, intent: Intent) -> None:
        """Write the intent anew, where it was lost."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.run.mkdir(mode=0o700, exist_ok=True)
        INTENT.write(self.path / "intent.json", encode_intent(intent))

    def is_locked(self) -> bool:
        """Whether the shim or a process of the worker lives and holds the lock."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def read_intent(self) -> Intent | None:
        """None: there is none."""
        document = INTENT.read(self.path / "intent.json")
        return None if document is None else _decoded(decode_intent, document)

    def read_shim(self) -> ShimRecord | None:
        """None: the shim has not written it."""
        document = SHIM.read(self.path / "shim.json")
        return None if document is None else _decoded(_decode_shim, document)

    def read_exit(self) -> ExitRecord | None:
        """None: the shim has not written it."""
        document = EXIT.read(self.path / "exit")
        return None if document is None else _decoded(_decode_exit, document)

    def write_stop(
        self,
        *,
        contract: model.StopContract,
        step: int,
        remaining_seconds: float,
        is_replaced: bool,
        is_sent: bool = True,
        why: str = "",
    ) -> None:
        """Note the stop contract, and the step of it, that is in force. Survives the agent, not a power cut.

        `is_sent`: whether its signal is sent already. `why`: as `StopProgress` has it.
        """
        record = {
            "contract": _encode_contract(contract),
            "step": step,
            "until_monotonic": time.monotonic() + remaining_seconds,
            "boot_id": identities.boot_id(),
            "is_replaced": is_replaced,
            "is_sent": is_sent,
            "why": why,
        }
        self._write_unsynced("stop.json", STOP.encode(record))

    def read_stop(self) -> worker_records.StopProgress | None:
        """None: it was not being stopped, or the host was started anew since."""
        document = STOP.read(self.path / "stop.json")
        return None if document is None else _decoded(_decode_stop, document)

    def write_oom_kills_told(self, count: int) -> None:
        """Note how many OOM kills in its cgroup were told. Survives the agent, not a power cut."""
        self._write_unsynced("oom-kills.json", OOM_KILLS.encode({"told": count}))

    def read_oom_kills_told(self) -> int | None:
        """None: none was told."""
        document = OOM_KILLS.read(self.path / "oom-kills.json")
        return None if document is None else _decoded(lambda found: _number(found["told"]), document)

    def write_ended(self, worker_exit: model.WorkerExit) -> None:
        """Keep how it ended, as it was counted."""
        record = {**dataclasses.asdict(worker_exit), "cause": worker_exit.cause.value}
        ENDED.write(self.path / "ended.json", record)

    def read_ended(self) -> model.WorkerExit | None:
        """None: its end was not counted."""
        document = ENDED.read(self.path / "ended.json")
        return None if document is None else _decoded(_decode_ended, document)

    def _write_unsynced(self, name: str, data: bytes) -> None:
        draft = self.path / f"{name}.tmp"
        with records.told(f"{draft} cannot be written"):
            draft.write_bytes(data)
            draft.replace(self.path / name)

    def remove(self) -> None:
        """Remove the folder, as far as possible."""
        shutil.rmtree(self.path, ignore_errors=True)


def encode_intent(intent: Intent) -> dict[str, Any]:
    """As it is on disk."""
    return {
        **dataclasses.asdict(dataclasses.replace(intent, stop=model.PLAIN_STOP)),
        "argv": list(intent.argv),
        "cgroup": None if intent.cgroup is None else str(intent.cgroup),
        "stop": _encode_contract(intent.stop),
    }


def _encode_contract(contract: model.StopContract) -> dict[str, Any]:
    steps = [{**dataclasses.asdict(step), "scope": step.scope.value} for step in contract.steps]
    return {**dataclasses.asdict(contract), "steps": steps}


def _decode_contract(document: dict[str, Any]) -> model.StopContract:
    rest = dict(document)
    steps = tuple(
        model.StopStep(
            signal=str(step["signal"]),
            wait_seconds=float(step["wait_seconds"]),
            scope=model.SignalScope(step["scope"]),
        )
        for step in rest.pop("steps")
    )
    return model.StopContract(steps=steps, **rest)


def decode_intent(document: dict[str, Any]) -> Intent:
    """The opposite of `encode_intent`."""
    cgroup = document["cgroup"]
    return Intent(
        worker_id=str(document["worker_id"]),
        name=model.checked_worker_name(document["name"]),
        pool=model.checked_pool_name(document["pool"]),
        number=int(document["number"]),
        start_number=int(document["start_number"]),
        argv=tuple(document["argv"]),
        limit_bytes=int(document["limit_bytes"]),
        boot_id=str(document["boot_id"]),
        cgroup=None if cgroup is None else Path(cgroup),
        stop=_decode_contract(document["stop"]),
        log=worker_values.LogSettings(**document["log"]),
        cpus=int(document.get("cpus", 0)),
        max_run_seconds=_seconds(document.get("max_run_seconds")),
    )


def _decode_shim(document: dict[str, Any]) -> ShimRecord:
    boot_id, namespace = str(document["boot_id"]), int(document["pid_namespace"])
    return ShimRecord(
        process=ProcessIdentity(boot_id, namespace, int(document["pid"]), int(document["start_time_ticks"])),
        shim=ProcessIdentity(
            boot_id, namespace, int(document["shim_pid"]), int(document["shim_start_time_ticks"])
        ),
        name=str(document["name"]),
        pool=str(document["pool"]),
    )


def _decode_exit(document: dict[str, Any]) -> ExitRecord:
    return ExitRecord(
        exit_code=_number(document["exit_code"]),
        signal=int(document["signal"]),
        end_time_seconds=float(document["end_time_seconds"]),
        oom_kills=_number(document["oom_kills"]),
        host_oom_kills_total=_number(document["host_oom_kills_total"]),
        failed_stage=str(document["failed_stage"]),
        failed_text=str(document["failed_text"]),
        is_timed_out=bool(document.get("timed_out", 0)),
    )


def _decode_stop(document: dict[str, Any]) -> worker_records.StopProgress | None:
    if document["boot_id"] != identities.boot_id():
        return None
    return worker_records.StopProgress(
        contract=_decode_contract(document["contract"]),
        step=int(document["step"]),
        remaining_seconds=float(document["until_monotonic"]) - time.monotonic(),
        is_replaced=bool(document["is_replaced"]),
        is_sent=bool(document.get("is_sent", True)),
        why=str(document.get("why", "")),
    )


def _decode_ended(document: dict[str, Any]) -> model.WorkerExit:
    return model.WorkerExit(
        cause=model.ExitCause(document["cause"]),
        exit_code=_number(document["exit_code"]),
        signal=int(document["signal"]),
        detail=str(document["detail"]),
        end_time_seconds=float(document["end_time_seconds"]),
        task_id=str(document["task_id"]),
        in_doubt_until_seconds=float(document["in_doubt_until_seconds"]),
        oom_kills=_number(document.get("oom_kills")) or 0,
    )


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _number(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _decoded(decode: Callable[[dict[str, Any]], T], document: dict[str, Any]) -> T:
    try:
        return decode(document)
    except (KeyError, TypeError, ValueError, OverflowError, errors.InvalidArgument) as error:
        raise records.Damaged(f"{error!r} in {sorted(document)}") from error
