"""What people see of nodes, pools and workers, from the documents that programs get."""

from collections.abc import Sequence

from leasehold.cli import output
from leasehold.core.node import model
from leasehold.rpc import node_documents

#: Failures that are told one by one.
FAILURES_MAX = 5

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def nodes(documents: Sequence[node_documents.Node]) -> None:
    """One line for each node."""
    rows = [
        [
            each["name"],
            each["state"] or "?",
            _running_of_desired(each),
            *_memory_cells(each["status"]),
            "-" if each["status"] is None else output.number(each["status"]["load_per_core"]),
            _age(each["last_report_age_seconds"]),
        ]
        for each in documents
    ]
    columns = ["NAME", "STATE", "WORKERS", "MEMORY", "USED", "AVAILABLE", "LOAD/CORE", "REPORTED"]
    output.table(columns, rows, right=columns[2:7])


def _running_of_desired(node: node_documents.Node) -> str:
    if node["status"] is None:
        return "-"
    pools = node["status"]["pools"]
    return f"{sum(each['running'] for each in pools)}/{sum(each['desired'] for each in pools)}"


def _memory_cells(status: node_documents.Status | None) -> list[str]:
    memory = None if status is None else status["memory"]
    if memory is None:
        return ["-", "-", "-"]
    return [
        f"{memory['total_gb']:.1f} GB",
        f"{memory['used_percent']:.1f}%",
        f"{memory['available_gb']:.1f} GB",
    ]


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """A duration for people, in its largest unit: ``12 s``, ``3 min``, ``2 h``, ``5 d``."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def glance(documents: Sequence[node_documents.Node]) -> None:
    """Each node at a glance: memory, load, who is healthy, pending and failed, and why each has so many."""
    for number, node in enumerate(documents):
        if number:
            output.lines([""])
        _glance(node)


def _glance(node: node_documents.Node) -> None:
    status = node["status"]
    if status is None:
        output.lines([f"{node['name']}: {node['state'] or '?'}; it has not reported to this leader yet"])
        return
    reported = _age(node["last_report_age_seconds"])
    agent = f"agent {status['agent_version'] or '?'}, up {duration(status['agent_uptime_seconds'])}"
    pools = status["pools"]
    workers = [each for pool in pools for each in pool["workers"]]
    output.lines(
        [
            f"{node['name']}: {node['state'] or '?'}, reported {reported}; {agent}",
            *([f"memory    {_memory(status['memory'])}"] if status["memory"] is not None else []),
            f"load      {output.number(status['load_per_core'])} a core "
            f"({' '.join(f'{each:.2f}' for each in status['load_average'])} on {node['cpus']})",
            f"healthy   {_healthy(workers)}",
            f"pending   {_pending(pools)}",
            f"failures  {_failures(pools, workers)}",
            "",
        ]
    )
    columns = ["POOL", "MODE", "RUNNING", "WANTED", "OPTIMAL", "MIN..MAX", "QUEUE", "WHY"]
    rows = [
        [
            each["name"],
            each["mode"] or "?",
            str(each["running"]),
            str(each["desired"]),
            str(each["optimal"]),
            f"{each['min_workers']}..{each['max_workers']}",
            _queue(each["depth"]),
            _why(each),
        ]
        for each in pools
    ]
    output.table(columns, rows, right=columns[2:7])


def _memory(memory: node_documents.Memory) -> str:
    return (
        f"{memory['used_gb']:.1f}/{memory['total_gb']:.1f} GB ({memory['used_percent']:.1f}%), "
        f"available {memory['available_gb']:.1f} GB by {memory['bound_by'] or '?'}, "
        f"reserve {memory['reserve_gb']:.1f} GB"
    )


def _healthy(workers: Sequence[node_documents.Worker]) -> str:
    running = [each for each in workers if each["state"] is model.WorkerState.RUNNING]
    busy = sum(each["is_busy"] is True for each in running)
    idle = sum(each["is_busy"] is False for each in running)
    silent = len(running) - busy - idle
    parts = [f"{busy} busy", f"{idle} idle", *([f"{silent} do not tell"] if silent else [])]
    return f"{_count(len(running), 'worker')}: {', '.join(parts)}" if running else "0 workers"


def _pending(pools: Sequence[node_documents.PoolWithWorkers]) -> str:
    starting, stopping = sum(each["starting"] for each in pools), sum(each["stopping"] for each in pools)
    waits = [
        f"{each['name']} waits {each['backoff_remaining_seconds']:.0f} s after crashes"
        for each in pools
        if each["backoff_remaining_seconds"] is not None
    ]
    return "; ".join([f"{starting} starting, {stopping} stopping", *waits])


def _failures(pools: Sequence[node_documents.PoolWithWorkers], workers: Sequence[node_documents.Worker]) -> str:
    crashes, kills = (
        sum(each["crashes_total"] for each in pools),
        sum(each["oom_kills_total"] for each in pools),
    )
    text = f"{_count(crashes, 'crash', 'crashes')}, {_count(kills, 'OOM kill')} since the agent began"
    good = (model.ExitCause.CLEAN, model.ExitCause.STOPPED)
    ended = sorted(
        (
            (end["end_time"] or "", f"\n          {each['name']}: {ending(end)}")
            for each in workers
            if (end := each["exit"]) is not None and end["cause"] not in good
        ),
        reverse=True,
    )
    lines = [line for _, line in ended[:FAILURES_MAX]]
    return text + "".join(lines)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _queue(depth: node_documents.QueueDepth | None) -> str:
    """What waits and what workers have: ``7+2``; a question mark where nobody knows."""
    if depth is None or depth["ready"] is None:
        return "?"
    bound = ">=" if depth["is_lower_bound"] else ""
    unacknowledged = "" if not depth["unacknowledged"] else f"+{depth['unacknowledged']}"
    return f"{bound}{depth['ready']}{unacknowledged}"


def _why(pool: node_documents.Pool) -> str:
    parts = [pool["summary"]]
    if pool["is_overcommitted"] and "overcommitted" not in pool["summary"]:
        parts.append("overcommitted: MIN is more than memory allows")
    if pool["blocked_reason"]:
        parts.append(f"no worker is started: {pool['blocked_reason']}")
    return "; ".join(part for part in parts if part)


def warn(documents: Sequence[node_documents.Node], *, is_mass_loss: bool = False) -> None:
    """On standard error: memory above 80%, lost nodes, and what agents warn of."""
    if is_mass_loss:
        output.say("warning: most nodes were lost at once: rather the allocator's network than so many deaths")
    for each in documents:
        for text in node_documents.warnings(each):
            output.say(f"warning: {each['name']}: {text}")


def workers(documents: Sequence[node_documents.Worker]) -> None:
    """One line for each worker; what it does, or how it ended."""
    rows = [
        [
            each["name"],
            each["state"] or "?",
            "-" if each["pid"] is None else str(each["pid"]),
            f"{each['held_gb']:.2f}/{each['limit_gb']:g} GB",
            "-" if each["state"] is model.WorkerState.EXITED else duration(each["uptime_seconds"]),
            doing(each),
        ]
        for each in documents
    ]
    output.table(["NAME", "STATE", "PID", "MEMORY", "UP", "DOES"], rows, right=["PID", "MEMORY", "UP"])


def doing(worker: node_documents.Worker) -> str:
    """What a worker does now, or how it ended."""
    if worker["exit"] is not None:
        return ending(worker["exit"])
    parts = []
    if worker["stop_step"]:
        remaining = worker["stop_step_remaining_seconds"]
        parts.append(
            f"{worker['stop_step']} sent" + ("" if remaining is None else f", {duration(remaining)} left")
        )
    if worker["is_busy"]:
        task = " ".join(text for text in (worker["task_name"], worker["task_id"]) if text)
        parts.append(task or "busy")
    elif worker["is_busy"] is False:
        parts.append("idle")
    if worker["is_adopted"]:
        parts.append("adopted")
    return "; ".join(parts) or "-"


def ending(end: node_documents.WorkerExit) -> str:
    """How a worker ended, in one line."""
    how = ""
    if end["signal"] is not None:
        how = f" by signal {end['signal']}"
    elif end["exit_code"] is not None:
        how = f" with {end['exit_code']}"
    at = "" if end["end_time"] is None else f" at {end['end_time'][11:19]}"
    doubt = (
        "" if end["in_doubt_until"] is None else f"; its task is in doubt until {end['in_doubt_until'][11:16]}"
    )
    detail = f": {end['detail']}" if end["detail"] else ""
    return f"{end['cause'].value.replace('_', ' ')}{how}{at}{detail}{doubt}"


def pools(documents: Sequence[node_documents.Pool]) -> None:
    """A line for each pool that an order concerned, as it is after it."""
    output.lines(
        [f"{each['name']} on {each['node']}: {each['running']} running, {_wanted(each)}" for each in documents]
    )


def _wanted(pool: node_documents.Pool) -> str:
    why = _why(pool)
    return f"{pool['desired']} wanted" + (f" ({why})" if why else "")


def explanations(documents: Sequence[node_documents.Explanation]) -> None:
    """Why each pool has so many, and its last decisions."""
    for number, each in enumerate(documents):
        if number:
            output.lines([""])
        pool = each["pool"]
        output.lines([f"{pool['name']} on {each['node']}: {pool['running']} running, {_wanted(pool)}"])
        output.lines([f"  {reason}" for reason in each["reasons"]])
        if each["decisions"]:
            output.lines([""])
            rows = [
                [
                    "-" if of["time"] is None else of["time"][:19].replace("T", " "),
                    of["trigger"],
                    f"{of['before']} -> {of['after']}",
                    "; ".join(of["reasons"]) or "-",
                ]
                for of in each["decisions"]
            ]
            output.table(["TIME (UTC)", "TRIGGER", "CHANGE", "WHY"], rows)
