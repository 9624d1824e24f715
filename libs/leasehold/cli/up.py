"""`leasehold up` and `leasehold down`: the whole system on one machine, for as long as the command runs."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
import shutil
import sys
import threading
from dataclasses import dataclass

import typer
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.cli import connection, documents, output, up_parts
from leasehold.client import environment
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.devstack import ports as devports
from leasehold.rpc import budget_codec
from leasehold.runtime import budgets_yaml, interrupts

READY_SECONDS = 30.0
READY_CALL_SECONDS = 1.0
DEFINE_SECONDS = 10.0
STOP_SECONDS = 90.0
LOOK_SECONDS = 0.2

EXIT_INTERRUPTED = 130
NOTHING_MORE = up_parts.Wanted()
EXAMPLE = pathlib.Path(__file__).with_name("example-budgets.yaml")
#: The embedded etcd is started with this bound; one of the user's has etcd's own default.
ETCD_TXN_OPS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens, on 127.0.0.1. Replicas of the allocator take the ports after the first."""

    allocator: int
    etcd: int
    etcd_peer: int
    postgres: int

    def check(self, replicas: int, http: int | None = None) -> None:
        """Raise `FailedPrecondition`, naming port, holder and flag, if an allocator's (or `http`) is taken.

        `InvalidArgument` if another flag gives the same. The servers' ports are the stack's to check.
        """
        others = {
            self.etcd: "--etcd-port",
            self.etcd_peer: "--etcd-peer-port",
            self.postgres: "--postgres-port",
        }
        if http is not None:
            if http in others:
                raise errors.InvalidArgument(f"--http-port: {http} is {others[http]} too", field="--http-port")
            others[http] = "--http-port"
            devports.check_free(http, "--http-port")
        for port in range(self.allocator, self.allocator + replicas):
            if port in others:
                raise errors.InvalidArgument(
                    f"--port: an allocator's would be {port}, which is {others[port]} too", field="--port"
                )
            devports.check_free(port, "--port")

    def addresses(self, replicas: int) -> list[str]:
        """The allocators' gRPC addresses."""
        return [f"{devports.HOST}:{self.allocator + number}" for number in range(replicas)]


def folder(given: str | None) -> pathlib.Path:
    """The data folder: the given one, else one of the user's own. Raises `InvalidArgument` if there is none."""
    if given is not None:
        return pathlib.Path(given).absolute()
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # as the XDG specification has it
        try:
            state = str(pathlib.Path.home() / ".local" / "state")
        except RuntimeError as error:
            raise errors.InvalidArgument(
                "--data-dir: needed, you have no home folder", field="--data-dir"
            ) from error
    return pathlib.Path(state) / "leasehold" / "up"


def up(
    data_dir: pathlib.Path,
    *,
    ports: Ports,
    replicas: int,
    budgets_file: str | None,
    wanted: up_parts.Wanted = NOTHING_MORE,
) -> None:
    """Start everything, say where it is, and stop it on SIGINT, SIGTERM or SIGHUP.

    Raises `InvalidArgument` for a wrong setting, `FailedPrecondition` for a folder in use or a port taken,
    `Unavailable` if a part does not come up or ends by itself. Stopped before all is up, it exits with 130.
    """
    examples = _budgets_to_define(budgets_file)
    owner = devstack.find_owner(data_dir)
    if owner is not None:
        raise errors.FailedPrecondition(f"already running, PID {owner.pid}, on {data_dir}")
    ports.check(replicas, wanted.http_port)
    stack = devstack.Stack(
        data_dir,
        announce=output.say,
        etcd_port=ports.etcd,
        etcd_peer_port=ports.etcd_peer,
        postgres_port=ports.postgres,
    )
    addresses = ports.addresses(replicas)
    is_up = False
    with interrupts.Interrupts(lambda: output.say("\nstopping ...")) as stop:
        try:
            with stack, contextlib.ExitStack() as parts:
                try:
                    children = _start_allocators(stack, addresses, budgets_file)
                    _define(examples, addresses)
                    others = _start_parts(stack, wanted, addresses, parts)
                    _tell(data_dir, addresses, stack, wanted)
                    is_up = True
                    _wait_for_an_end(stop, stack, children, others)
                finally:
                    stop.ignore_more()
        except interrupts.Stopped:
            output.say(f"stopped; the data stay in {data_dir}")
            if not is_up:
                raise typer.Exit(EXIT_INTERRUPTED) from None


def _start_parts(
    stack: devstack.Stack, wanted: up_parts.Wanted, addresses: list[str], parts: contextlib.ExitStack
) -> list[devstack.Child]:
    """The gateway and the agent; `parts` stops the agent, whose workers need longer than a server to end."""
    started: list[devstack.Child] = []
    if wanted.http_port is not None:
        started.append(up_parts.start_gateway(stack, wanted.http_port, addresses))
    if wanted.agent_config is not None:
        parts.callback(up_parts.end_leftovers, stack.data_dir)
        agent = up_parts.spawn_agent(stack, wanted.agent_config, addresses)
        parts.callback(agent.stop, up_parts.AGENT_STOP_SECONDS)
        up_parts.wait_for_agent(agent, stack.data_dir)
        started.append(agent)
    return started


def _budgets_to_define(budgets_file: str | None) -> tuple[model.BudgetSpec, ...]:
    """What an empty folder begins with: the example, for WORKER_COUNT workers; nothing where a file is given.

    Raises `InvalidArgument` if the file or WORKER_COUNT is wrong.
    """
    worker_count = environment.worker_count()
    if budgets_file is not None:
        if budgets_file == "-":
            raise errors.InvalidArgument("--budgets: a file is followed, which - is not", field="--budgets")
        documents.read_budgets(budgets_file)
        return ()
    examples = budgets_yaml.parse(EXAMPLE.read_text(encoding="utf-8"))
    if worker_count is None:
        return examples
    return tuple(dataclasses.replace(spec, expected_workers=worker_count) for spec in examples)


def _start_allocators(
    stack: devstack.Stack, addresses: list[str], budgets_file: str | None
) -> list[devstack.Child]:
    env = {**os.environ, **stack.variables}
    if stack.etcd is not None:
        env["LEASEHOLD_ETCD_TXN_OPS_MAX"] = str(ETCD_TXN_OPS_MAX)
    children: list[devstack.Child] = []
    for address in addresses:
        command = [sys.executable, "-m", "leasehold.allocator", "--listen", address]
        if budgets_file is not None:
            command += ["--budgets-file", str(pathlib.Path(budgets_file).absolute())]
        child = stack.spawn(f"allocator-{address.rpartition(':')[2]}", command, env=env)
        children.append(child)
        with connection.Allocator([address], timeout_seconds=READY_CALL_SECONDS) as allocator:
            child.wait_until(
                functools.partial(_is_ready, allocator),
                timeout_seconds=READY_SECONDS,
                cancel=threading.Event(),
                port=int(address.rpartition(":")[2]),
            )
    return children


def _is_ready(allocator: connection.Allocator) -> bool:
    try:
        allocator.call("ListBudgets", wire.ListBudgetsRequest(page_size=1))
    except errors.NotLeader as error:
        return bool(error.leader_address)
    except errors.LeaseholdError:
        return False
    return True


def _define(specs: tuple[model.BudgetSpec, ...], addresses: list[str]) -> None:
    """Something to look at, unless there is."""
    with connection.Allocator(addresses, timeout_seconds=DEFINE_SECONDS) as allocator:
        if allocator.call("ListBudgets", wire.ListBudgetsRequest(page_size=1)).budgets:
            return
        for spec in specs:
            allocator.call("PutBudget", wire.PutBudgetRequest(budget=budget_codec.encode_budget(spec)))


def _tell(data_dir: pathlib.Path, addresses: list[str], stack: devstack.Stack, wanted: up_parts.Wanted) -> None:
    etcd = " ".join(f"http://{endpoint}" for endpoint in stack.etcd_endpoints)
    command, addr = _program(), _addr_option(addresses)
    parts, more = [], []
    if wanted.http_port is not None:
        parts.append(f"gateway    http://{devports.HOST}:{wanted.http_port}")
        more.append(f"  curl http://{devports.HOST}:{wanted.http_port}/monitoring/status")
    if wanted.agent_config is not None:
        parts.append(f"agent      unix:{up_parts.agent_socket(data_dir)}")
        more.append(f"  {command} workers list{addr}")
        if up_parts.is_example(wanted.agent_config):
            more.append(f"  {command} job submit pause --cpus 1 --memory 32MB -p seconds=5{addr}")
    output.lines(
        [
            f"allocator  {' '.join(f'grpc://{address}' for address in addresses)}",
            *parts,
            f"etcd       {etcd}",
            f"Postgres   {_without_password(stack.postgres_dsn)}",
            f"data       {data_dir}",
            "Not for production: one machine, no TLS. Ctrl-C stops everything. To try:",
            f"  {command} budget list{addr}",
            f"  {command} budget watch llm-api{addr}",
            f"  {command} budget status llm-api -o json{addr}",
            *more,
        ]
    )


def _program() -> str:
    """How this program is called from a shell: by its name where that finds this one and no other."""
    beside = pathlib.Path(sys.executable).with_name("leasehold")
    found = shutil.which("leasehold")
    if found is not None and pathlib.Path(found) == beside:
        return "leasehold"
    if beside.exists():
        return shlex.quote(str(beside))
    return f"{shlex.quote(sys.executable)} -m leasehold.cli"


def _addr_option(addresses: list[str]) -> str:
    """--addr, unless a command without it asks here anyway."""
    default = os.environ.get(connection.ADDRESSES_VARIABLE, "").strip() or connection.DEFAULT_ADDRESS
    return "" if default.split(",") == addresses else f" --addr {','.join(addresses)}"


def _without_password(dsn: str) -> str:
    import psycopg.conninfo

    parts = {key: str(value or "") for key, value in psycopg.conninfo.conninfo_to_dict(dsn).items()}
    where = ":".join(part for part in (parts.get("host", ""), parts.get("port", "")) if part)
    user = f"{parts['user']}@" if "user" in parts else ""
    return f"postgresql://{user}{where}/{parts.get('dbname', '')}"


def _wait_for_an_end(
    stop: interrupts.Interrupts,
    stack: devstack.Stack,
    children: list[devstack.Child],
    others: list[devstack.Child],
) -> None:
    """Until a signal, or until a part or the last allocator ends by itself, which is an error."""
    running = list(children)
    while not stop.is_stopping.wait(LOOK_SECONDS):
        if stack.etcd is not None and not stack.etcd.is_running:
            raise errors.Unavailable(f"etcd ended by itself; its log is in {stack.data_dir / 'etcd'}")
        if stack.postgres is not None and not stack.postgres.is_running:
            raise errors.Unavailable(f"Postgres ended by itself; its log is in {stack.data_dir / 'postgres'}")
        for child in others:
            if not child.is_running:
                raise errors.Unavailable(_told_end(child))
        for child in [child for child in running if not child.is_running]:
            running.remove(child)
            ended = _told_end(child)
            if not running:
                raise errors.Unavailable(ended)
            output.say(f"{ended}; {len(running)} of {len(children)} allocators go on")
    raise interrupts.Stopped  # the exception of the signal itself was lost, inside a callback of a library


def _told_end(child: devstack.Child) -> str:
    return f"{child.name} ended by itself, exit code {child.exit_code}; its log is {child.log_path}"


def down(data_dir: pathlib.Path) -> None:
    """Stop the `up` that owns the folder; if there is none, end what a killed one left.

    Raises `DeadlineExceeded` if it does not end in time, `PermissionDenied` if it is another user's.
    """
    pid = devstack.stop_owner(data_dir, STOP_SECONDS)
    if pid is not None:
        output.lines([f"stopped leasehold up, PID {pid}"])
        return
    ended = devstack.end_leftovers(data_dir, announce=output.say)
    has_ended_workers = up_parts.end_leftovers(data_dir)
    if ended:
        names = ", ".join(record.name for record in ended)
        output.lines([f"ended what a killed leasehold up had left: {names}"])
    elif has_ended_workers:
        output.lines(["ended the workers that a killed leasehold up had left"])
    else:
        output.lines(["nothing is running"])
