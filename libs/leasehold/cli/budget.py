"""`leasehold budget`: define, read and rehearse budgets."""

import json
import pathlib
import sys
from typing import Annotated, Any

import typer
from leasehold.cli import output
from leasehold.core import errors
from leasehold.core.budget import plan as plans

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Addr = Annotated[
    str | None,
    typer.Option("--addr", help="Allocators, host:port[,host:port] (LEASEHOLD_ADDR; 127.0.0.1:7400)"),
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer", min=0.1)]
Output = Annotated[output.Format, typer.Option("-o", "--output", help="table, json, yaml or name")]
Name = Annotated[str, typer.Argument(help="The budget's name")]

TIMEOUT_SECONDS = 5.0
TABLE = output.Format.TABLE

#: Dimension -> its name within utilization_ratio.
RATIO_NAMES = {
    "max_concurrent_requests": "concurrent",
    "rpm_limit": "rpm",
    "tpm_limit": "tpm",
    "num_workers": "workers",
}


def _target(addr: str | None, timeout_seconds: float) -> Any:
    # gRPC is imported only by the commands that call: `plan` and completion stay quick.
    from leasehold.cli import connection

    return connection.Target.of(addr, timeout_seconds)


@app.command()
def apply(
    file: Annotated[str, typer.Option("-f", "--file", help="YAML file of budgets, - for standard input")],
    addr: Addr = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    form: Output = TABLE,
) -> None:
    """Create or change the budgets of a file. The whole file is checked before anything is changed."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents
    from leasehold.rpc import budget_codec

    specs = documents.read_budgets(file)
    target = _target(addr, timeout)
    applied: list[dict[str, Any]] = []
    for spec in specs:
        request = wire.PutBudgetRequest(budget=budget_codec.encode_budget(spec))
        stored = target.call("PutBudget", request).budget
        applied.append({"name": stored.name, "version": stored.version})
    if form is output.Format.NAME:
        print("\n".join(item["name"] for item in applied))
    elif form is TABLE:
        for item in applied:
            print(f"budget {item['name']} applied, version {item['version']}")
    else:
        output.data(applied, form)


@app.command(name="list")
def list_budgets(addr: Addr = None, timeout: Timeout = TIMEOUT_SECONDS, form: Output = TABLE) -> None:
    """List the budgets."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents

    target = _target(addr, timeout)
    budgets: list[Any] = []
    token = ""
    while True:
        page = target.call("ListBudgets", wire.ListBudgetsRequest(page_token=token))
        budgets.extend(page.budgets)
        token = page.next_page_token
        if not token:
            break
    if form is output.Format.NAME:
        print("\n".join(budget.name for budget in budgets))
    elif form is TABLE:
        rows = [
            [
                budget.name,
                documents.policy_name(budget),
                " ".join(f"{d.name}={output.number(d.limit)}" for d in budget.dimensions),
                str(budget.expected_workers),
                str(budget.version),
            ]
            for budget in budgets
        ]
        output.table(["NAME", "POLICY", "LIMITS", "EXPECTED WORKERS", "VERSION"], rows)
    else:
        output.data([documents.budget_document(budget) for budget in budgets], form)


@app.command()
def get(name: Name, addr: Addr = None, timeout: Timeout = TIMEOUT_SECONDS, form: Output = TABLE) -> None:
    """Print a budget's definition, as `apply` takes it (yaml), and its limits in force."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents

    answer = _target(addr, timeout).call("GetBudget", wire.GetBudgetRequest(name=name))
    if form is output.Format.NAME:
        print(answer.budget.name)
    elif form is TABLE:
        rows = [
            [
                d.name,
                documents.kind_name(d),
                output.number(d.limit),
                output.number(answer.limits_in_force.get(d.name)),
            ]
            for d in answer.budget.dimensions
        ]
        print(f"budget {name}, policy {documents.policy_name(answer.budget)}, version {answer.budget.version}")
        output.table(["DIMENSION", "KIND", "LIMIT", "IN FORCE"], rows, right=["LIMIT", "IN FORCE"])
    elif form is output.Format.YAML:
        output.data({"budgets": [documents.budget_document(answer.budget)]}, form)
    else:
        document = documents.budget_document(answer.budget)
        output.data({**document, "limits_in_force": dict(answer.limits_in_force)}, form)


@app.command()
def delete(name: Name, addr: Addr = None, timeout: Timeout = TIMEOUT_SECONDS) -> None:
    """Delete a budget: every lease of it ends."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire

    _target(addr, timeout).call("DeleteBudget", wire.DeleteBudgetRequest(name=name))
    print(f"budget {name} deleted")


@app.command()
def status(
    name: Name,
    worker: Annotated[str, typer.Option("--worker", help="A worker's id; default: the first active")] = "",
    addr: Addr = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    form: Output = TABLE,
) -> None:
    """Print one worker's view of a budget: its base, what it has now, and the ratio."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire

    request = wire.GetBudgetStatusRequest(budget=name, worker_id=worker)
    document = status_document(_target(addr, timeout).call("GetBudgetStatus", request))
    if form is output.Format.NAME:
        print(document["worker_id"] or "")
    elif form is not TABLE:
        output.data(document, form)
    else:
        shown = document["worker_id"] or "nobody is active; the base is shown"
        active = ", ".join(document["active_worker_ids"]) or "none"
        print(f"worker: {shown}")
        print(
            f"workers: {document['total_workers']} registered, {document['active_workers']} active ({active})"
        )
        if not document["is_scaling_enabled"]:
            print("scaling is off: everyone stays at its base")
        rows = [
            [
                dimension,
                output.number(base),
                output.number(document["current_allocation"][dimension]),
                output.number(document["utilization_ratio"][RATIO_NAMES.get(dimension, dimension)]),
            ]
            for dimension, base in document["base_allocation"].items()
            if base is not None
        ]
        output.table(["DIMENSION", "BASE", "NOW", "NOW/BASE"], rows, right=["BASE", "NOW", "NOW/BASE"])


def status_document(answer: Any) -> dict[str, Any]:
    """The status as programs know it, with exactly these keys."""
    names = [*RATIO_NAMES, *sorted(n for n in answer.base_allocation.amounts if n not in RATIO_NAMES)]

    def amounts(allocation: Any) -> dict[str, float | None]:
        return {name: allocation.amounts.get(name) if name in allocation.amounts else None for name in names}

    ratio = amounts(answer.utilization_ratio)
    return {
        "worker_id": answer.worker_id if answer.HasField("worker_id") else None,
        "total_workers": answer.total_workers,
        "active_workers": answer.active_workers,
        "active_worker_ids": list(answer.active_worker_ids),
        "is_scaling_enabled": answer.is_scaling_enabled,
        "base_allocation": amounts(answer.base_allocation),
        "current_allocation": amounts(answer.current_allocation),
        "utilization_ratio": {RATIO_NAMES.get(name, name): value for name, value in ratio.items()},
    }


@app.command()
def watch(
    name: Name,
    count: Annotated[int, typer.Option(help="Stop after so many states; 0: never", min=0)] = 0,
    addr: Addr = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    form: Output = TABLE,
) -> None:
    """Follow a budget: its holders and what each has, now and at each change, until Ctrl-C."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents

    seen = 0

    def take(state: Any) -> None:
        nonlocal seen
        seen += 1
        documents.print_state(state, form)
        if count and seen >= count:
            raise typer.Exit

    _target(addr, timeout).follow("WatchBudget", wire.WatchBudgetRequest(budget=name), take)


@app.command()
def explain(
    name: Name,
    holder: Annotated[str, typer.Argument(help="The holder's name")],
    addr: Addr = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    form: Output = TABLE,
) -> None:
    """Say why a holder has what it has, with the numbers, and what happened to it last."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents

    request = wire.ExplainLeaseRequest(budget=name, holder=holder)
    answer = _target(addr, timeout).call("ExplainLease", request)
    if form is not TABLE:
        output.data(documents.message_document(answer), form)
        return
    activity = "active" if answer.holder.is_active else "idle"
    print(
        f"{holder}: {documents.state_name(answer.holder)}, {activity}, "
        f"lease for {answer.holder.expires_in.ToMilliseconds() / 1000:.1f} s more"
    )
    output.table(
        ["DIMENSION", "HAS", "WHY"],
        [[d.dimension, output.number(d.amount), d.reason] for d in answer.dimensions],
        right=["HAS"],
    )
    for event in answer.story:
        print(f"  {event}")


@app.command()
def plan(
    file: Annotated[str, typer.Option("-f", "--file", help="JSON document, - for standard input")] = "-",
    form: Output = output.Format.JSON,
) -> None:
    """Rehearse a division: policy, limits and holders in, grants and reasons out. Needs no server."""
    try:
        text = sys.stdin.read() if file == "-" else pathlib.Path(file).read_text("utf-8")
        document = json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise errors.InvalidArgument(f"{file}: {error.strerror}", field="file") from error
    except ValueError as error:
        raise errors.InvalidArgument(f"the document is not JSON: {error}", field="document") from error
    answer = plans.run(plans.parse(document))
    if form is TABLE:
        rows = [
            [holder, dimension, output.number(amount), reason]
            for holder, amounts in answer["grants"].items()
            for (dimension, amount), reason in zip(amounts.items(), answer["reasons"][holder], strict=True)
        ]
        output.table(["HOLDER", "DIMENSION", "GETS", "WHY"], rows, right=["GETS"])
    elif form is output.Format.NAME:
        print("\n".join(answer["grants"]))
    else:
        output.data(answer, form)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key given twice is a mistake that must not pass in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
        raise errors.InvalidArgument(f"the key {twice!r} is given twice in one object", field=twice)
    return found


@app.command()
def ledger(
    name: Annotated[str, typer.Argument(help="A budget; left out: every budget")] = "",
    holder: Annotated[str, typer.Option("--holder", help="Only this holder")] = "",
    limit: Annotated[
        int, typer.Option("--limit", help="At most so many, newest first", min=1, max=100_000)
    ] = 50,
    addr: Addr = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    form: Output = TABLE,
) -> None:
    """Print the history of leases, newest first, as Postgres has it."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import documents

    target = _target(addr, timeout)
    entries: list[Any] = []
    token = ""
    while len(entries) < limit:
        size = min(1000, limit - len(entries))
        request = wire.ListLedgerEntriesRequest(budget=name, holder=holder, page_size=size, page_token=token)
        page = target.call("ListLedgerEntries", request)
        entries.extend(page.entries)
        token = page.next_page_token
        if not token:
            break
    if form is TABLE:
        rows = [documents.ledger_row(entry) for entry in entries]
        output.table(["TIME", "BUDGET", "EVENT", "HOLDER", "AMOUNTS", "CAUSE"], rows)
    elif form is output.Format.NAME:
        print("\n".join(str(entry.id) for entry in entries))
    else:
        output.data([documents.message_document(entry) for entry in entries], form)
