"""A worker's parent: starts it, notes how it ended, and ends what it left. It outlives the agent.

Run as a program, by path: ``python -I -S shim.py FOLDER LOG CWD CGROUP PROGRAM [ARGUMENT ...]``. It uses
nothing but the standard library's smallest parts, all imported here at the top: the agent's installation may be
replaced while it runs, and there is one of it for each worker. Its environment is the worker's.

- FOLDER is the worker's own folder. ``shim.json`` and ``exit`` are there already, with their room on disk, so
  that a full disk cannot lose what is written into them.
- LOG is opened for appending, for the worker's output. CWD is where the worker runs.
- CGROUP is the folder of the worker's cgroup; empty: none. The shim stays outside.
- Descriptor 3 is the locked file ``lock``: the worker inherits it, so it is locked while one of them lives.
- Descriptor 4 is a pipe to the agent: a line is written once it is known whether the program runs. An agent
  that is gone is no error.

Where LEASEHOLD_MAX_RUN_SECONDS is in the environment, the worker's main process gets SIGTERM after so long, and
SIGKILL after LEASEHOLD_KILL_GRACE_SECONDS more, whether an agent runs or not.

In order: the worker's process waits at a gate; ``shim.json`` tells who it is; the gate opens and it executes
the program. If the shim is killed before, the gate breaks and nothing was started. When the worker's main
process has ended, its exit is written; then the rest of its session, of its cgroup and of its descendants is
killed, while the main process is a zombie still and its PID cannot be another's; then the shim ends. Format 1.
"""

import _signal  # type: ignore[import-not-found]  # `signal` imports enum, 0.7 MB more for each worker
import os
import sys
import time

#: What a record holds, in order.
Fields = tuple[tuple[str, int | float | str | None], ...]
#: Why a worker was not executed: where, errno and its text.
Failure = tuple[str, int, str]

LOCK = 3
READY = 4
#: Bytes that `shim.json` and `exit` have each.
RECORD_BYTES = 4096
FORMAT = 1

_NOT_EXECUTED = 127
_SWEEP_ROUNDS = 80
_SWEEP_PAUSE_SECONDS = 0.025
#: A record that the disk refuses (it may be broken, or never write in place) is tried again, 1 s apart.
_RECORD_TRIES = 3600

_LAST_SIGNAL = 64
_IGNORED = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)


def read_small(path: str) -> bytes:
    """A small file's bytes; none if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def stat_fields(pid: int | str) -> list[bytes]:
    """The fields of /proc/PID/stat from the third (state) on; none if there is no such process."""
    return read_small(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def start_ticks(pid: int | str) -> int:
    """Field 22: when the process started. 0 if there is none."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else 0


def text(value: str) -> str:
    """A JSON string."""
    shown = []
    for character in value:
        code = ord(character)
        if character in '"\\':
            shown.append("\\" + character)
        elif 32 <= code < 127:
            shown.append(character)
        elif code < 0x10000:
            shown.append(f"\\u{code:04x}")
        else:
            code -= 0x10000
            shown.append(f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}")
    return '"' + "".join(shown) + '"'


def document(pairs: Fields) -> bytes:
    """A JSON object of numbers, strings and None, padded to the size of a record."""
    told = []
    for name, value in pairs:
        shown = "null" if value is None else text(value) if isinstance(value, str) else repr(value)
        told.append(f"{text(name)}: {shown}")
    return ("{" + ", ".join(told) + "}").encode().ljust(RECORD_BYTES)


def write_record(descriptor: int, folder: str, data: bytes) -> None:
    """Write over the record in place, and again if that fails, for as long as somebody may want it."""
    for _ in range(_RECORD_TRIES):
        try:
            if os.pwrite(descriptor, data, 0) == len(data):
                os.fdatasync(descriptor)
                return
        except OSError:
            pass
        if not os.path.isdir(folder):
            return
        time.sleep(1.0)


def oom_kills(cgroup: str) -> int | None:
    """How many of the cgroup's processes the OOM killer ended; None where that cannot be read."""
    for name in ("memory.events", "memory.oom_control"):
        count = counter(read_small(f"{cgroup}/{name}"), b"oom_kill")
        if count is not None:
            return count
    return None


def counter(table: bytes, name: bytes) -> int | None:
    """The number beside `name` in lines of names and numbers; None if it is not there."""
    for line in table.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name:
            return int(words[1])
    return None


def given_environment() -> dict[bytes, bytes]:
    """The environment as the agent gave it: Python adds LC_CTYPE to its own where the locale is C."""
    found = {}
    for pair in read_small("/proc/self/environ").split(b"\0"):
        name, is_one, value = pair.partition(b"=")
        if is_one:
            found[name] = value
    return found


def close_others() -> None:
    """Close what the agent let through: only the standard streams, the lock and the pipe stay."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > READY:
            try:
                os.close(descriptor)
            except OSError:
                pass


def become_worker(gate: int, failures: int, log: int, cwd: str, cgroup: str, argv: list[str]) -> None:
    """In the forked child: join the cgroup, wait at the gate, execute the program. Does not return."""
    stage = "session"
    try:
        os.setsid()
        if cgroup:
            stage = "cgroup"
            joining = os.open(f"{cgroup}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            os.write(joining, b"0")
            os.close(joining)
        stage = "oom_score_adj"
        try:
            score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            os.write(score, b"0")
            os.close(score)
        except OSError:
            pass
        stage = "folder"
        os.chdir(cwd)
        stage = "log"
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not os.read(gate, 1):
            os._exit(_NOT_EXECUTED)
        stage = "program"
        for number in range(1, _LAST_SIGNAL + 1):
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.execvpe(argv[0], argv, given_environment())
    except BaseException as error:
        number = getattr(error, "errno", None) or 0
        os.write(failures, f"{stage}\0{number}\0{getattr(error, 'strerror', None) or error}".encode()[:1024])
    finally:
        os._exit(_NOT_EXECUTED)


def spawn(
    folder: str, log_path: str, cwd: str, cgroup: str, argv: list[str], shim_record: int
) -> tuple[int, Failure | None]:
    """Start the worker. Its PID, and None or why it was not executed: stage, errno and text."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    gate_out, gate_in = os.pipe()
    failures_out, failures_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(gate_in)
        become_worker(gate_out, failures_in, log, cwd, cgroup, argv)
    for descriptor in (log, gate_out, failures_in):
        os.close(descriptor)
    identity = (
        ("version", FORMAT),
        ("worker_id", os.environ.get("LEASEHOLD_WORKER_ID", "")),
        ("name", os.environ.get("LEASEHOLD_WORKER_NAME", "")),
        ("pool", os.environ.get("LEASEHOLD_POOL", "")),
        ("boot_id", read_small("/proc/sys/kernel/random/boot_id").decode().strip()),
        ("pid_namespace", os.stat("/proc/self/ns/pid").st_ino),
        ("shim_pid", os.getpid()),
        ("shim_start_time_ticks", start_ticks("self")),
        ("pid", pid),
        ("start_time_ticks", start_ticks(pid)),
        ("cgroup", cgroup),
        ("log_path", log_path),
    )
    write_record(shim_record, folder, document(identity))
    try:
        os.write(gate_in, b"1")
    except OSError:
        pass
    os.close(gate_in)
    failure = b""
    while part := os.read(failures_out, 1024):
        failure += part
    os.close(failures_out)
    if not failure:
        return pid, None
    stage, number, told = failure.decode(errors="replace").split("\0", 2)
    return pid, (stage, int(number), told)


def is_of_worker(pid: int, session: int, token: bytes, cgroup_pids: set[int]) -> bool:
    """Whether a process belongs to the worker: by its session, its cgroup, or the id in its environment."""
    fields = stat_fields(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return False
    return int(fields[3]) == session or pid in cgroup_pids or token in read_small(f"/proc/{pid}/environ")


def cgroup_members(cgroup: str) -> set[int]:
    """PIDs in the worker's cgroup."""
    return {int(line) for line in read_small(f"{cgroup}/cgroup.procs").split()} if cgroup else set()


def sweep(main_pid: int, cgroup: str) -> None:
    """Kill what is left of the worker. Its main process is an unreaped zombie, so its session is no other's."""
    token = b"LEASEHOLD_WORKER_ID=" + os.environb.get(b"LEASEHOLD_WORKER_ID", b"?") + b"\0"
    own = os.getpid()
    for _ in range(_SWEEP_ROUNDS):
        is_clear = True
        members = cgroup_members(cgroup)
        for name in os.listdir("/proc"):
            pid = int(name) if name.isdigit() else 0
            if pid in (0, own, main_pid) or not is_of_worker(pid, main_pid, token, members):
                continue
            is_clear = False
            try:
                handle = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                # Looked at again now that the handle pins it: the PID may have become another's in between.
                if is_of_worker(pid, main_pid, token, cgroup_members(cgroup)):
                    _signal.pidfd_send_signal(handle, _signal.SIGKILL)
            except OSError:
                pass
            finally:
                os.close(handle)
        if is_clear:
            return
        time.sleep(_SWEEP_PAUSE_SECONDS)


def limit_run(pid: int) -> list[int]:
    """End the unreaped child `pid` when its time is over. What is returned is empty until that has begun."""
    sent: list[int] = []
    seconds = os.environ.get("LEASEHOLD_MAX_RUN_SECONDS", "")
    grace = float(os.environ.get("LEASEHOLD_KILL_GRACE_SECONDS") or 10.0)

    def is_due(*_: object) -> None:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return  # it ended in time, and that is about to be seen
        number = _signal.SIGKILL if sent else _signal.SIGTERM
        sent.append(number)
        os.kill(pid, number)
        _signal.setitimer(_signal.ITIMER_REAL, grace)

    if seconds:
        _signal.signal(_signal.SIGALRM, is_due)
        _signal.setitimer(_signal.ITIMER_REAL, max(0.001, float(seconds)))
    return sent


def tell_agent() -> None:
    """One line into the pipe, which is closed then."""
    try:
        os.write(READY, b"told\n")
    except OSError:
        pass
    os.close(READY)


def exit_document(
    code: int | None,
    number: int,
    cgroup: str,
    host_before: int | None,
    failure: Failure | None,
    *,
    is_timed_out: bool = False,
) -> bytes:
    """What the record `exit` holds."""
    host_after = counter(read_small("/proc/vmstat"), b"oom_kill")
    host = None if host_before is None or host_after is None else host_after - host_before
    stage, error_number, error_text = failure or ("", 0, "")
    return document(
        (
            ("version", FORMAT),
            ("exit_code", code),
            ("signal", number),
            ("end_time_seconds", time.time()),
            ("oom_kills", oom_kills(cgroup) if cgroup else None),
            ("host_oom_kills", host),
            ("host_oom_kills_total", host_after),
            ("failed_stage", stage),
            ("failed_errno", error_number),
            ("failed_text", error_text),
            ("timed_out", int(is_timed_out)),
        )
    )


def main(arguments: list[str]) -> None:
    """Run one worker from its start to its end."""
    for number in _IGNORED:
        _signal.signal(number, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    os.set_inheritable(READY, False)
    close_others()
    folder, log_path, cwd, cgroup, *argv = arguments
    os.umask(0o027)
    shim_record = os.open(f"{folder}/shim.json", os.O_WRONLY | os.O_CLOEXEC)
    exit_record = os.open(f"{folder}/exit", os.O_WRONLY | os.O_CLOEXEC)
    host_before = counter(read_small("/proc/vmstat"), b"oom_kill")
    try:
        pid, failure = spawn(folder, log_path, cwd, cgroup, argv, shim_record)
    except OSError as error:
        failure = ("start", error.errno or 0, error.strerror or "")
        write_record(exit_record, folder, exit_document(None, 0, cgroup, host_before, failure))
        tell_agent()
        return
    os.close(shim_record)
    if failure:
        os.waitpid(pid, 0)
        write_record(exit_record, folder, exit_document(None, 0, cgroup, host_before, failure))
        tell_agent()
        return
    tell_agent()
    timed_out = limit_run(pid)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    _signal.setitimer(_signal.ITIMER_REAL, 0.0)
    is_by_itself = ended.si_code == os.CLD_EXITED
    code = ended.si_status if is_by_itself else None
    number = 0 if is_by_itself else ended.si_status
    told = exit_document(code, number, cgroup, host_before, None, is_timed_out=bool(timed_out))
    write_record(exit_record, folder, told)
    sweep(pid, cgroup)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
