"""`leasehold up` and `leasehold down`: the whole system on one machine, for as long as the command runs."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass

from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.cli import connection, documents, output
from leasehold.core import errors
from leasehold.devstack import ports as devports
from leasehold.rpc import budget_codec
from leasehold.runtime import budgets_yaml

READY_SECONDS = 30.0
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.2
ALLOCATOR_GRACE_SECONDS = 5.0

EXAMPLE = pathlib.Path(__file__).with_name("example-budgets.yaml")


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens, on 127.0.0.1. Replicas of the allocator take the ports after the first."""

    allocator: int
    etcd: int
    etcd_peer: int
    postgres: int


class _Stopped(Exception):
    """SIGTERM or SIGINT arrived: no error, the user has asked to stop."""


def folder(given: str | None) -> pathlib.Path:
    """The data folder: the given one, else one of the user's own."""
    if given is not None:
        return pathlib.Path(given).absolute()
    state = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local" / "state"
    return pathlib.Path(state) / "leasehold" / "up"


def up(data_dir: pathlib.Path, *, ports: Ports, replicas: int, budgets_file: str | None) -> None:
    """Start everything, say where it is, and stop it on SIGINT or SIGTERM.

    Raises `FailedPrecondition` for a folder in use or a port taken, `Unavailable` if a part does not come up or
    ends by itself.
    """
    if budgets_file is not None:
        documents.read_budgets(budgets_file)
    owner = devstack.find_owner(data_dir)
    if owner is not None:
        raise errors.FailedPrecondition(f"already running, PID {owner.pid}, on {data_dir}")
    for number in range(replicas):
        devports.check_free(ports.allocator + number, "--port")
    stack = devstack.Stack(
        data_dir,
        announce=output.say,
        etcd_port=ports.etcd,
        etcd_peer_port=ports.etcd_peer,
        postgres_port=ports.postgres,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        with stack:
            children = _start_allocators(stack, ports, replicas, budgets_file)
            _define_example(ports, budgets_file)
            _tell(data_dir, ports, replicas, stack)
            _wait_for_an_end(children)
    except _Stopped:
        output.say("stopped; the data stay in " + str(data_dir))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: object) -> None:
    # A second signal must not interrupt the stopping.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    output.say("")
    output.say("stopping ...")
    raise _Stopped


def _start_allocators(
    stack: devstack.Stack, ports: Ports, replicas: int, budgets_file: str | None
) -> list[devstack.Child]:
    env = {
        **os.environ,
        "LEASEHOLD_ETCD_ENDPOINTS": ",".join(stack.etcd_endpoints),
        "LEASEHOLD_POSTGRES_DSN": stack.postgres_dsn,
    }
    if stack.etcd is not None:
        # The embedded etcd is started with this bound; one of the user's has etcd's own default.
        env["LEASEHOLD_ETCD_TXN_OPS_MAX"] = "4096"
    children: list[devstack.Child] = []
    for number in range(replicas):
        port = ports.allocator + number
        command = [sys.executable, "-m", "leasehold.allocator", "--listen", f"127.0.0.1:{port}"]
        if budgets_file is not None:
            command += ["--budgets-file", str(pathlib.Path(budgets_file).absolute())]
        child = stack.spawn(f"allocator-{port}", command, env=env)
        children.append(child)
        target = connection.Target([f"127.0.0.1:{port}"], timeout_seconds=1.0)
        child.wait_until(
            functools.partial(_answers, target), timeout_seconds=READY_SECONDS, cancel=threading.Event()
        )
    return children


def _answers(target: connection.Target) -> bool:
    try:
        target.call("ListBudgets", wire.ListBudgetsRequest(page_size=1))
    except errors.NotLeader as error:
        return bool(error.leader_address)
    except errors.LeaseholdError:
        return False
    return True


def _define_example(ports: Ports, budgets_file: str | None) -> None:
    """Something to look at, unless there are budgets; WORKER_COUNT is who the base is computed for."""
    target = connection.Target([f"127.0.0.1:{ports.allocator}"], timeout_seconds=10.0)
    if budgets_file is not None or target.call("ListBudgets", wire.ListBudgetsRequest(page_size=1)).budgets:
        return
    specs = budgets_yaml.parse(EXAMPLE.read_text(encoding="utf-8"))
    count = os.environ.get("WORKER_COUNT", "")
    if count:
        if not count.isdigit():
            raise errors.InvalidArgument(f"WORKER_COUNT: {count!r} is not a whole number", field="WORKER_COUNT")
        specs = tuple(dataclasses.replace(spec, expected_workers=int(count)) for spec in specs)
    for spec in specs:
        target.call("PutBudget", wire.PutBudgetRequest(budget=budget_codec.encode_budget(spec)))


def _tell(data_dir: pathlib.Path, ports: Ports, replicas: int, stack: devstack.Stack) -> None:
    addresses = ",".join(f"127.0.0.1:{ports.allocator + number}" for number in range(replicas))
    program = "leasehold" if shutil.which("leasehold") else f"{pathlib.Path(sys.executable).parent}/leasehold"
    addr = "" if addresses == connection.DEFAULT_ADDRESS else f" --addr {addresses}"
    print(f"allocator  grpc://{addresses}")
    print(f"etcd       {','.join(f'http://{endpoint}' for endpoint in stack.etcd_endpoints)}")
    print(f"Postgres   {_without_password(stack.postgres_dsn)}")
    print(f"data       {data_dir}")
    print("Not for production: one machine, no TLS. Ctrl-C stops everything. To try:")
    print(f"  {program} budget list{addr}")
    print(f"  {program} budget watch llm-api{addr}")
    print(f"  {program} budget status llm-api -o json{addr}", flush=True)


def _without_password(dsn: str) -> str:
    import psycopg.conninfo

    parts = {key: value or "" for key, value in psycopg.conninfo.conninfo_to_dict(dsn).items()}
    where = f"{parts.get('host', '')}:{parts.get('port', '')}"
    return f"postgresql://{parts.get('user', '')}@{where}/{parts.get('dbname', '')}"


def _wait_for_an_end(children: list[devstack.Child]) -> None:
    """Until a signal, or until an allocator ends by itself, which is an error."""
    while True:
        for child in children:
            if child.exit_code is not None:
                raise errors.Unavailable(
                    f"{child.name} ended by itself, exit code {child.exit_code}; see {child.log_path}"
                )
        time.sleep(WATCH_SECONDS)


def down(data_dir: pathlib.Path) -> None:
    """Stop the `up` that owns the folder; if there is none, end what a killed one left."""
    pid = devstack.stop_owner(data_dir, STOP_SECONDS)
    if pid is not None:
        print(f"stopped leasehold up, PID {pid}")
        return
    ended = devstack.end_leftovers(data_dir, announce=output.say)
    if ended:
        print(f"ended {len(ended)} processes that a killed leasehold up had left")
    else:
        print("nothing is running")
