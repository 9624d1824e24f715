"""What people see of jobs, queues and utilization, from the documents that programs get."""

from collections.abc import Sequence
from typing import Any

from leasehold.cli import node_tables, output
from leasehold.core.job import model
from leasehold.rpc import job_documents

GIB = 2**30


def memory(size: int) -> str:
    """Bytes for people."""
    if size >= GIB:
        return f"{output.number(size / GIB)} GB"
    return f"{output.number(size / 2**20)} MB" if size >= 2**20 else f"{size} B"


def _clock(time: str | None) -> str:
    return "-" if time is None else time[:19].replace("T", " ")


def jobs(documents: Sequence[job_documents.Document]) -> None:
    """One line for each job."""
    rows = [
        [
            each["job_id"],
            each["spec"]["name"] or each["spec"]["template"] or "-",
            each["state"],
            str(each["spec"]["cpus"]),
            memory(each["spec"]["memory_bytes"]),
            _clock(each["submit_time"]),
            where(each),
        ]
        for each in documents
    ]
    columns = ["JOB", "NAME", "STATE", "CPUS", "MEMORY", "SUBMITTED (UTC)", "WHERE, HOW"]
    output.table(columns, rows, right=["CPUS", "MEMORY"])


def where(job: job_documents.Document) -> str:
    """Its node while it runs; how it ended."""
    allocation = job["allocation"]
    node = f"on {allocation['node']}" if allocation is not None else ""
    parts = [node] if job["state"] in ("running", "completed", "failed", "cancelled") else []
    if job["state"] == "running" and allocation is not None and allocation["phase"] == "unknown":
        parts.append("its node is silent")
    if job["is_cancel_requested"] and job["state"] == "running":
        parts.append("cancel requested")
    if job["outcome"] is not None and job["state"] not in ("completed", "running"):
        parts.append(ending(job["outcome"]))
    return "; ".join(part for part in parts if part) or "-"


def ending(outcome: job_documents.Document) -> str:
    """How an attempt ended, in one line."""
    how: str = outcome["cause"].replace("_", " ")
    if outcome["signal"]:
        how += f" by signal {outcome['signal']}"
    elif outcome["exit_code"] is not None:
        how += f" with {outcome['exit_code']}"
    return how + (f": {outcome['detail']}" if outcome["detail"] else "")


def status(job: job_documents.Document) -> None:
    """One job in words."""
    spec, allocation = job["spec"], job["allocation"]
    longest = spec["max_run_seconds"]
    asks = f"{spec['cpus']} CPUs, {memory(spec['memory_bytes'])}"
    asks += "" if longest is None else f", at most {node_tables.duration(longest)}"
    facts = {
        "state": job["state"] + (", cancel requested" if job["is_cancel_requested"] else ""),
        "name": spec["name"],
        "template": " ".join(
            [
                spec["template"] or "none: it runs elsewhere",
                *(f"{k}={v}" for k, v in spec["parameters"].items()),
            ]
        ),
        "asks": asks,
        "selector": " ".join(f"{key}={value}" for key, value in sorted(spec["node_selector"].items())),
        "queue": f"{spec['queue']}, priority {spec['priority']}",
        "attempt": f"{job['attempt']} (at most {spec['max_attempts']} by its own fault)",
        "submitted": _clock(job["submit_time"]) + (f" by {job['principal']}" if job["principal"] else ""),
        "started": _clock(job["start_time"]),
        "ended": _clock(job["end_time"]),
        "node": "" if allocation is None else f"{allocation['node']}, {allocation['phase']}",
        "outcome": "" if job["outcome"] is None else ending(job["outcome"]),
    }
    output.lines([f"job {job['job_id']}", *(f"  {key:<10}{value}" for key, value in facts.items() if value)])


def explanation(document: job_documents.Document) -> None:
    """Why a job waits, or what would become of one."""
    output.lines([summary(document)])
    rows = [[str(each["nodes"]), each["reason"], each["detail"]] for each in document["blocked"]]
    if rows:
        output.table(["NODES", "REASON", "DETAIL"], rows, right=["NODES"])
    if document["estimated_start_time"] is not None:
        time = _clock(document["estimated_start_time"])
        output.lines([f"starts by {time} UTC, if no node is lost and no total changes"])
    elif document["state"] == "pending" and not document["node"]:
        output.lines(["when it starts cannot be told"])


def summary(document: job_documents.Document) -> str:
    """A line on why a job waits."""
    place = ""
    if document["place_in_line"]:
        place = f" ({document['place_in_line']} of {document['line_length']} in line)"
    parts = [document["summary"], document["held_back_detail"] or document["held_back_reason"]]
    return f"{document['state']}{place}: " + ("; ".join(part for part in parts if part) or "nothing blocks it")


def utilization(document: job_documents.Utilization) -> None:
    """One line for each node, and one for all."""
    whole = document["total"]
    rows = [_utilization(each, each["node"]) for each in document["nodes"]]
    columns = ["NODE", "CPUS", "CPUS %", "MEMORY", "MEMORY %", "JOBS", "TAKES JOBS"]
    output.table(columns, [*rows, _utilization(whole, "all")], right=columns[1:6])
    output.lines([f"{document['pending_jobs']} pending"])
    if document["held_back_cause"]:
        cause = output.printable(document["held_back_cause"])
        output.say(
            f"leasehold: nothing is given up for silence: {cause}; "
            "`leasehold job acknowledge-silence` if they are dead indeed"
        )


def _utilization(node: job_documents.NodeUtilization, name: str) -> list[str]:
    takes = "-" if not node["node"] else "no" if node["is_closed"] else "yes"
    return [
        name,
        f"{node['allocated_cpus']}/{node['total_cpus']}",
        f"{node['cpus_percent']:.1f}",
        f"{memory(node['allocated_memory_bytes'])}/{memory(node['total_memory_bytes'])}",
        f"{node['memory_percent']:.1f}",
        str(node["running_jobs"]),
        takes,
    ]


def queues(documents: Sequence[job_documents.Document]) -> None:
    """One line for each queue."""
    rows = [
        [
            each["name"],
            f"{each['allocated_cpus']}/{'-' if each['nominal_cpus'] is None else each['nominal_cpus']}",
            f"{memory(each['allocated_memory_bytes'])}/{_quota(each['nominal_memory_bytes'])}",
            str(each["running_jobs"]),
            str(each["pending_jobs"]),
        ]
        for each in documents
    ]
    columns = ["QUEUE", "CPUS", "MEMORY", "RUNNING", "PENDING"]
    output.table(columns, rows, right=columns[1:])


def _quota(size: int | None) -> str:
    return "-" if size is None else memory(size)


def audit(document: job_documents.Document) -> None:
    """What an audit found, and what it looked at."""
    findings: list[Any] = document["findings"]
    if findings:
        rows = [[each["verdict"], each["rule"], each["subject"], each["detail"]] for each in findings]
        output.table(["VERDICT", "RULE", "SUBJECT", "DETAIL"], rows)
    definite = sum(each["verdict"] == "DEFINITE" for each in findings)
    looked = (
        f"{len(document['rules'])} rules, {document['live_allocations']} live allocations on "
        f"{document['nodes']} nodes, at flush {document['flush_sequence']}"
    )
    output.lines([f"{definite} definite, {len(findings) - definite} in flight or unknown; checked: {looked}"])


def is_terminal(job: job_documents.Document) -> bool:
    """Whether it has ended."""
    return job["state"] in {state.value.lower() for state in model.TERMINAL_STATES}
