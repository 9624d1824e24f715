"""What the benchmarks share: a real control plane in child processes, rounds, ratios."""

import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import lines
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc as wire_grpc
from leasehold.core.budget import model, quantity
from leasehold.devstack import ports
from leasehold.rpc import budget_codec

HERE = pathlib.Path(__file__).parent
READY_SECONDS = 30.0
#: A folder: allocators run under cProfile and leave their profiles there. Figures are not to be compared then.
PROFILE_VARIABLE = "LEASEHOLD_BENCH_PROFILE"
QUICK_VARIABLE = "LEASEHOLD_BENCH_QUICK"


@dataclass(slots=True)
class Result:
    """One line of the table. `value` is judged against `target` (None: told, not judged)."""

    name: str
    value: float
    unit: str
    target: str = ""
    is_met: bool | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Plane:
    """A running control plane."""

    stack: devstack.Stack
    addresses: list[str]
    children: list[devstack.Child]


@contextlib.contextmanager
def control_plane(replicas: int = 1) -> Iterator[Plane]:
    """etcd, Postgres and allocators, for the time of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="leasehold-bench-") as folder,
        devstack.Stack(pathlib.Path(folder), announce=lambda _: None) as stack,
    ):
        addresses: list[str] = []
        children: list[devstack.Child] = []
        env = {
            **os.environ,
            "LEASEHOLD_ETCD_ENDPOINTS": ",".join(stack.etcd_endpoints),
            "LEASEHOLD_POSTGRES_DSN": stack.postgres_dsn,
            "LEASEHOLD_ETCD_TXN_OPS_MAX": "4096",
        }
        for number in range(replicas):
            address = f"127.0.0.1:{ports.free_port()}"
            profile = _profiled(f"allocator-{number}")
            command = [sys.executable, *profile, "-m", "leasehold.allocator", "--listen", address]
            child = stack.spawn(f"allocator-{number}", command, env=env)
            children.append(child)
            addresses.append(address)
        for child, address in zip(children, addresses, strict=True):
            child.wait_until(
                functools.partial(is_up, address), timeout_seconds=READY_SECONDS, cancel=threading.Event()
            )
        yield Plane(stack, addresses, children)


def _profiled(name: str) -> list[str]:
    """What puts cProfile before a module, if a folder for profiles is named in the environment."""
    folder = os.environ.get(PROFILE_VARIABLE)
    return ["-m", "cProfile", "-o", str(pathlib.Path(folder).absolute() / f"{name}.prof")] if folder else []


def is_up(address: str) -> bool:
    """Whether an allocator leads at `address`, or knows who does."""
    with grpc.insecure_channel(address) as channel:
        try:
            wire_grpc.BudgetServiceStub(channel).ListBudgets(wire.ListBudgetsRequest(), timeout=1.0)
        except grpc.RpcError as error:
            return "the leader is at" in (error.details() or "")
        return True


def put_budget(addresses: Sequence[str], name: str, limits: dict[str, float], **settings: Any) -> None:
    """Define a budget; `settings` are fields of `BudgetSpec`."""
    spec = model.BudgetSpec(
        name=name,
        dimensions=tuple(
            model.Dimension(
                name=dimension,
                kind=model.STANDARD_KINDS[dimension],
                limit=int(limit * quantity.MICRO),
                window_seconds=settings.get("window_seconds", 60.0),
            )
            for dimension, limit in limits.items()
        ),
        **settings,
    )
    request = wire.PutBudgetRequest(budget=budget_codec.encode_budget(spec))
    deadline = time.monotonic() + READY_SECONDS
    while True:
        for address in addresses:
            with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
                wire_grpc.BudgetServiceStub(channel).PutBudget(request, timeout=5.0)
                return
        if time.monotonic() > deadline:
            raise TimeoutError("no allocator took the budget")


@contextlib.contextmanager
def child_program(module: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python program beside this one; the first line that it prints is given too."""
    command = [sys.executable, str(HERE / f"{module}.py"), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(10)


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Give a child program a line of standard input."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON that a child program prints. Raises `RuntimeError` if it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} has ended with code {process.wait(10)}")
    return json.loads(line)


def is_quick() -> bool:
    """Whether short runs are wanted: figures then only show that the benchmarks work."""
    return bool(os.environ.get(QUICK_VARIABLE))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rss_peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` (0..1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def report(results: Sequence[Result]) -> None:
    """Print the results of one benchmark, with their details."""
    width = max(len(result.name) for result in results)
    for result in results:
        verdict = {None: "", True: "ok", False: "MISSED"}[result.is_met]
        lines.out(
            f"{result.name:<{width}}  {result.value:>12.3f} {result.unit:<10} {result.target:<12} {verdict}"
        )
        if result.detail:
            lines.out(f"{'':<{width}}  {json.dumps(result.detail)}")
