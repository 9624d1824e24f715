"""Records on disk, exits, activity and held memory, each by itself."""

import itertools
import json
import os
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.core.node.model import ExitCause, SignalScope, StopContract, StopStep
from leasehold.nodeagent import (
    activity,
    cgroup_folder,
    exits,
    held,
    kernel_counts,
    members,
    records,
    shim,
    state,
)
from leasehold.nodeagent.worker_folder import ExitRecord, Intent, WorkerFolder, decode_intent, encode_intent
from leasehold.nodeagent.worker_values import UNKNOWN_ACTIVITY, Activity, Held, HeldSource, LogSettings
from leasehold.runtime import identity as identities

WORKER = "6f1d9c1e-0000-4000-8000-000000000001"
OWN_TICKS = identities.current().start_time_ticks


def renamed(document: records.Document) -> records.Document:
    return {"memory_bytes": document["memory_mb"] * 2**20}


PRESENT = records.Format("sizes", 3, upgrade=renamed)


def test_a_record_of_the_version_before_is_read(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"version": 2, "memory_mb": 5}')

    assert PRESENT.read(tmp_path / "sizes.json") == {"memory_bytes": 5 * 2**20}


@pytest.mark.parametrize("version", [1, 4, "3", None])
def test_a_record_of_any_other_version_is_told(version: object) -> None:
    with pytest.raises(records.Damaged, match="this agent reads 2 or 3"):
        PRESENT.decode(json.dumps({"version": version}).encode())


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"5"])
def test_what_is_no_record_is_told(data: bytes) -> None:
    with pytest.raises(records.Damaged, match="sizes: no"):
        PRESENT.decode(data)


def test_room_that_nobody_has_written_to_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "exit").write_bytes(b"\0" * 4096)

    assert PRESENT.read(tmp_path / "exit") is None
    assert PRESENT.read(tmp_path / "missing") is None


def test_a_record_of_the_agent_that_cannot_be_read_is_moved_aside(tmp_path: Path) -> None:
    folder = state.StateFolder(tmp_path / "state")
    folder.open()
    folder.write("modes", {"pool": "manual"})
    assert folder.read("modes") == {"pool": "manual"}
    for damage in ("{", "}"):
        (folder.path / "modes.json").write_text(damage)
        assert folder.read("modes") is None
    folder.close()

    assert sorted(path.name for path in folder.quarantine.iterdir()) == ["modes.json.1", "modes.json.2"]
    assert not (folder.path / "modes.json").exists()


def test_an_intent_is_read_as_it_was_written() -> None:
    stop = StopContract(
        steps=(StopStep(signal="TERM", wait_seconds=1.5, scope=SignalScope.GROUP),),
        immediate_step=1,
        visibility_timeout_seconds=4500.0,
    )
    intent = Intent(
        worker_id=WORKER,
        name="p_1@host",
        pool="p",
        number=1,
        start_number=7,
        argv=("celery", "-A", "app"),
        limit_bytes=5,
        boot_id="boot",
        cgroup=Path("/sys/fs/cgroup/worker"),
        stop=stop,
        log=LogSettings(max_bytes=1, keep=2, is_reopened=True),
    )

    assert decode_intent(json.loads(json.dumps(encode_intent(intent)))) == intent


@pytest.mark.parametrize(
    "name", ["plain", 'quote " and \\', "line\nbreak", "ümläut", "emoji \N{PILE OF POO}", ""]
)
def test_the_shims_own_json_is_json(name: str) -> None:
    data = shim.document((("name", name), ("count", 5), ("seconds", 1.25), ("code", None)))

    assert len(data) == shim.RECORD_BYTES
    assert json.loads(data) == {"name": name, "count": 5, "seconds": 1.25, "code": None}


def exit_record(**changes: object) -> ExitRecord:
    plain: dict[str, object] = {
        "exit_code": None,
        "signal": 0,
        "end_time_seconds": 1e9,
        "oom_kills": None,
        "host_oom_kills_total": None,
        "failed_stage": "",
        "failed_text": "",
    }
    return ExitRecord(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "around", "cause"),
    [
        (exit_record(exit_code=0), exits.Circumstances(), ExitCause.CLEAN),
        (exit_record(exit_code=1), exits.Circumstances(), ExitCause.CRASHED),
        (exit_record(signal=15), exits.Circumstances(), ExitCause.CRASHED),
        (exit_record(signal=9, oom_kills=0), exits.Circumstances(), ExitCause.CRASHED),
        (exit_record(signal=9, oom_kills=1), exits.Circumstances(), ExitCause.OOM_KILLED),
        (exit_record(signal=15, oom_kills=1), exits.Circumstances(), ExitCause.CRASHED),
        (exit_record(signal=9, oom_kills=2), exits.Circumstances(oom_kills_told=2), ExitCause.CRASHED),
        (exit_record(signal=9, host_oom_kills_total=8), exits.Circumstances(), ExitCause.CRASHED),
        (
            exit_record(signal=9, host_oom_kills_total=8),
            exits.Circumstances(host_oom_kills_seen=7),
            ExitCause.OOM_KILLED,
        ),
        (
            exit_record(signal=9, host_oom_kills_total=8),
            exits.Circumstances(host_oom_kills_seen=7, is_killed_by_agent=True),
            ExitCause.CRASHED,
        ),
        (
            exit_record(failed_stage="program", failed_text="nowhere"),
            exits.Circumstances(),
            ExitCause.NOT_STARTED,
        ),
    ],
)
def test_the_cause_is_named_from_what_is_known(
    record: ExitRecord, around: exits.Circumstances, cause: ExitCause
) -> None:
    judged = exits.judged(record, around)

    assert judged.cause is cause
    assert judged.exit_code == record.exit_code
    assert judged.detail


def test_an_oom_kill_is_told_only_once_it_cannot_be_the_workers_own() -> None:
    counter = kernel_counts.SettledCounter(3)
    counter.observe(10.0, 4)
    assert counter.settled(11.9) == 3
    counter.observe(11.9, 6)
    assert counter.settled(12.0) == 4
    assert counter.settled(13.9) == 6


def tell(
    folder: Path, pid: int, *, ticks: int = OWN_TICKS, tasks: tuple[str, ...] = (), ready: object = True
) -> None:
    document = {
        "version": 1,
        "pid": pid,
        "start_time_ticks": ticks,
        "is_ready": ready,
        "tasks": [{"id": task, "name": "work", "queue": "q", "since": 5.0} for task in tasks],
    }
    draft = folder / "draft"
    draft.write_text(json.dumps(document))
    draft.rename(folder / f"activity.{pid}.json")


def test_a_worker_is_busy_if_a_living_process_of_it_has_a_task(tmp_path: Path) -> None:
    run = activity.RunFolder(tmp_path)
    assert run.activity() == UNKNOWN_ACTIVITY
    tell(tmp_path, os.getpid())
    assert run.activity() == Activity(False, is_ready=True)
    tell(tmp_path, os.getpid(), tasks=("a", "b"))
    assert run.activity() == Activity(True, "a", "work", True)


def test_what_a_dead_process_told_does_not_count(tmp_path: Path) -> None:
    """Its PID may be another's by now: the start time tells."""
    tell(tmp_path, os.getpid(), ticks=OWN_TICKS - 1, tasks=("stale",))

    assert activity.RunFolder(tmp_path).activity() == UNKNOWN_ACTIVITY


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "pid": "x"}', "5"])
def test_what_cannot_be_understood_is_as_good_as_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "activity.1.json").write_text(text)

    assert activity.RunFolder(tmp_path).activity() == UNKNOWN_ACTIVITY


def test_a_file_is_read_again_only_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    parse = activity._parsed

    def counted(path: Path) -> object:
        reads.append(path)
        return parse(path)

    monkeypatch.setattr(activity, "_parsed", counted)
    run = activity.RunFolder(tmp_path)
    tell(tmp_path, os.getpid())
    for _ in range(3):
        run.activity()
    assert len(reads) == 1
    tell(tmp_path, os.getpid(), tasks=("a",))
    run.activity()

    assert len(reads) == 2


def test_the_share_is_read_near_the_limit_only_and_at_most_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rss, now = [60], [0.0]
    reads: list[float] = []

    def pss_bytes(pid: int) -> int:
        reads.append(now[0])
        return 30

    monkeypatch.setattr(held, "rss_bytes", lambda pid: rss[0])
    monkeypatch.setattr(held, "pss_bytes", pss_bytes)
    scan = held.SessionScan(lambda: now[0])
    meter = held.HeldMeter(None, scan, lambda: now[0], limit_bytes=100)
    pid = 2**22 + 1  # no process has it, so its session is itself alone
    told = []
    for now[0], rss[0] in [(0.0, 69), (1.0, 80), (20.0, 90), (30.9, 70), (31.0, 80)]:
        told.append(meter.measure(pid))

    assert told == [
        Held(69, HeldSource.RSS),
        Held(30, HeldSource.PSS),
        Held(40, HeldSource.PSS),
        Held(30, HeldSource.PSS),
        Held(30, HeldSource.PSS),
    ]
    assert reads == [1.0, 31.0]


def test_one_scan_of_the_process_table_serves_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = itertools.count(1)
    now = [0.0]
    stats = [members.Stat(pid, "S", 1, 10, session, 5) for pid, session in ((10, 10), (11, 10), (20, 20))]
    seen = [0]

    def all_stats() -> list[members.Stat]:
        seen[0] = next(scans)
        return stats

    monkeypatch.setattr(members, "all_stats", all_stats)
    scan = held.SessionScan(lambda: now[0])

    assert [scan.pids(10), scan.pids(20), scan.pids(30)] == [[10, 11], [20], [30]]
    assert seen[0] == 1
    now[0] = held.SCAN_EVERY_SECONDS
    scan.pids(10)
    assert seen[0] == 2


def test_a_cgroup_tells_better_than_its_processes(tmp_path: Path) -> None:
    class Told(cgroup_folder.CgroupFolder):
        kind = cgroup_folder.CgroupKind.V2

        def set_cpus(self, cpus: int) -> bool:
            return False

        def held_bytes(self) -> int | None:
            return 77

        def set_limit(self, limit_bytes: int) -> None: ...

        def oom_kills(self) -> int:
            return 0

    scan = held.SessionScan(lambda: 0.0)
    meter = held.HeldMeter(Told(tmp_path), scan, lambda: 0.0, limit_bytes=1)

    assert meter.measure(os.getpid()) == Held(77, HeldSource.CGROUP_V2)


def test_a_folder_without_a_uuid_is_no_workers(tmp_path: Path) -> None:
    named = [WORKER, WORKER.upper(), "lost+found", "..", WORKER[:-1]]

    assert [WorkerFolder(tmp_path / name).is_named_by_uuid for name in named] == [True, *[False] * 4]


def test_a_process_that_only_reads_a_lock_does_not_hold_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert not members.holds(os.getpid(), lock)


def test_a_number_in_a_session_is_the_workers_only_while_that_is_certain() -> None:
    """The leader is gone: who is younger than its last sign of life may be a stranger's, by the same number."""
    gone = identities.ProcessIdentity("boot", 1, 2**22 + 1, 100)
    old = members.Stat(50, "S", 1, gone.pid, gone.pid, 150)
    young = members.Stat(51, "S", 1, gone.pid, gone.pid, 300)
    elsewhere = members.Stat(52, "S", 1, 9, 9, 150)

    stranger = members.Stat(gone.pid, "S", 1, gone.pid, gone.pid, 200)

    assert members.Session(gone, alive_at_ticks=200).members([old, young, elsewhere, stranger]) == [old]
    assert members.Session(gone).members([old, young]) == []


def test_a_full_disk_is_told_as_a_resource_that_is_exhausted() -> None:
    with pytest.raises(errors.ResourceExhausted, match="x: No space left"), records.told("x"):
        raise OSError(28, "No space left on device")


def test_stop_progress_of_another_boot_is_worth_nothing(tmp_path: Path) -> None:
    folder = WorkerFolder(tmp_path)
    folder.write_stop(contract=model.PLAIN_STOP, step=1, remaining_seconds=30.0, is_replaced=True)
    progress = folder.read_stop()
    assert progress is not None and (progress.step, progress.is_replaced) == (1, True)
    document = json.loads((tmp_path / "stop.json").read_text())
    (tmp_path / "stop.json").write_text(json.dumps({**document, "boot_id": "another"}))

    assert folder.read_stop() is None


def test_how_it_ended_is_kept_whole(tmp_path: Path) -> None:
    folder = WorkerFolder(tmp_path)
    ended = model.WorkerExit(
        cause=ExitCause.OOM_KILLED,
        signal=9,
        detail="x",
        end_time_seconds=1.5,
        task_id="t",
        in_doubt_until_seconds=9.0,
    )
    folder.write_ended(ended)

    assert folder.read_ended() == ended
