"""Runs the benchmarks and prints one table: name, value, unit, target, verdict. `make bench` calls it.

The table is kept as JSON in bench-results/<UTC time>.json and bench-results/latest.json. The exit code is 0
even where a target was missed, for figures of a busy machine are no test: `--strict` makes it 1. A benchmark
that fails is told, and makes it 1 always.
"""

import argparse
import datetime
import importlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import harness
import lines
from leasehold.core import errors
from leasehold.devstack import etcd_binary, postgres_binary

#: In the order in which they run: what compares rates first, while the machine is as it was found.
BENCHMARKS = (
    "admission",
    "renewals",
    "join",
    "failover",
    "fleet",
    "nodes",
    "saturation",
    "agent",
    "jobs",
    "jobs_rpc",
    "jobs_line",
    "jobs_history",
)
RESULTS: pathlib.Path = harness.HERE.parent.parent / "bench-results"
BENCHMARK_SECONDS_MAX = 300.0

Row = dict[str, Any]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        etcd = etcd_binary.find(announce=lambda line: None, cancel=threading.Event())
        found["etcd"] = ".".join(map(str, etcd_binary.version_of(etcd)))
    except errors.LeaseholdError as error:
        found["etcd"] = str(error)
    try:
        postgres = postgres_binary.find() / "postgres"
        told = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True).stdout
        found["postgres"] = told.strip().rpartition(" ")[2]
    except (errors.LeaseholdError, OSError, subprocess.SubprocessError) as error:
        found["postgres"] = str(error)
    return found


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was before."""
    cpu = platform.processor() or "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "grpcio": metadata.version("grpcio"),
        **_versions(),
    }


def _commit() -> str:
    """The commit of this tree, with a mark if files differ from it; empty outside of git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(harness.HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_one(name: str, path: pathlib.Path) -> None:
    """Run one benchmark in this process; its rows go to `path`."""
    began = time.monotonic()
    load = os.getloadavg()[0]
    results = importlib.import_module(f"bench_{name}").run()
    rows = [
        {
            "name": result.name,
            "value": result.value,
            "unit": result.unit,
            "target": result.target,
            "is_met": result.is_met,
            "detail": result.detail,
        }
        for result in results
    ]
    document = {
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
        "load_average_before": round(load, 2),
    }
    path.write_text(json.dumps(document))


def _run_apart(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Run one benchmark in a process of its own, so that none finds what another left behind."""
    path = folder / f"{name}.json"
    command = [sys.executable, str(harness.HERE / "run.py"), "--one", name, str(path)]
    began = time.monotonic()
    try:
        # Warnings of what is measured are not for the table; the end of them is told if it fails.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=BENCHMARK_SECONDS_MAX,
            check=False,
        )
        failure = done.stderr.decode(errors="replace").strip()[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"took longer than {BENCHMARK_SECONDS_MAX:g} s"
    if failure or not path.exists():
        return {"rows": [], "seconds": round(time.monotonic() - began, 1), "failure": failure or "no result"}
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _verdict(row: Row) -> str:
    return {None: "", True: "ok", False: "MISSED"}[row["is_met"]]


def _print_rows(rows: Sequence[Row], *, width: int) -> None:
    for row in rows:
        told = f"{row['value']:>12,.3f} {row['unit']:<10} {row['target']:<10} {_verdict(row)}"
        lines.out(f"{row['name']:<{width}} {told}".rstrip())


def _keep(document: dict[str, Any]) -> pathlib.Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{document['time'].replace(':', '')}.json"
    text = json.dumps(document, indent=2) + "\n"
    for each in (path, RESULTS / "latest.json"):
        each.write_text(text)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="tell the names and end")
    parser.add_argument("--quick", action="store_true", help="short runs: they work, their figures are rough")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    return parser


def _chosen(parser: argparse.ArgumentParser, names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is no benchmark; there are {', '.join(BENCHMARKS)}")
    return names or BENCHMARKS


def _run_all(names: Sequence[str], *, is_quick: bool) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    document: dict[str, Any] = {
        "time": now.isoformat().replace("+00:00", "Z"),
        "commit": _commit(),
        "is_quick": is_quick,
        "machine": machine(),
        "benchmarks": {},
    }
    with tempfile.TemporaryDirectory(prefix="leasehold-bench-") as folder:
        for number, name in enumerate(names, start=1):
            lines.out(f"[{number}/{len(names)}] {name} ...")
            document["benchmarks"][name] = _run_apart(name, pathlib.Path(folder))
    return document


def _print(document: dict[str, Any]) -> None:
    benchmarks = document["benchmarks"]
    rows = [row for each in benchmarks.values() for row in each["rows"]]
    lines.out("")
    _print_rows(rows, width=max((len(row["name"]) for row in rows), default=0))
    for name, each in benchmarks.items():
        if "failure" in each:
            lines.out(f"{name} FAILED after {each['seconds']} s:\n{each['failure']}")
    lines.out("")
    lines.out("  ".join(f"{key} {value}" for key, value in document["machine"].items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.one:
        run_one(chosen.one[0], pathlib.Path(chosen.one[1]))
        return 0
    if chosen.list:
        lines.out("\n".join(BENCHMARKS))
        return 0
    if chosen.quick:
        os.environ[harness.QUICK_VARIABLE] = "1"
    document = _run_all(_chosen(parser, chosen.names), is_quick=chosen.quick)
    _print(document)
    lines.out(f"kept in {_keep(document).relative_to(RESULTS.parent)} and bench-results/latest.json")
    has_failed = any("failure" in each for each in document["benchmarks"].values())
    is_missed = any(row["is_met"] is False for each in document["benchmarks"].values() for row in each["rows"])
    return int(has_failed or (chosen.strict and is_missed))


if __name__ == "__main__":
    sys.exit(main())
