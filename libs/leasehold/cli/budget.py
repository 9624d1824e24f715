"""`leasehold budget`: define, read and rehearse budgets.

gRPC and the messages are imported by the commands that call, so that `plan`, help and completion stay quick.
"""

import contextlib
import itertools
import shutil
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from leasehold.cli import documents, options, output
from leasehold.core import errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

BUDGETS_PAGE_SIZE = 250
LEDGER_PAGE_SIZE = 1000

TABLE, JSON, YAML, NAME = output.Format.TABLE, output.Format.JSON, output.Format.YAML, output.Format.NAME


@app.command()
def apply(
    file: Annotated[str, typer.Option("-f", "--file", help="YAML file of budgets, - for standard input")],
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Create or change budgets, by a YAML file.

    The whole file is checked before anything is changed. Budgets that it does not name stay as they are.
    """
    specs = documents.read_budgets(file)
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.rpc import budget_codec

    applied: list[dict[str, Any]] = []
    with connection.connect(addr, timeout) as allocator:
        for spec in specs:
            request = wire.PutBudgetRequest(budget=budget_codec.encode_budget(spec), request_id=_request_id())
            try:
                stored = allocator.call("PutBudget", request).budget
            except errors.LeaseholdError:
                if applied:
                    done = ", ".join(item["name"] for item in applied)
                    output.say(f"leasehold: {spec.name} was not applied; before it were {done}")
                raise
            applied.append({"name": stored.name, "version": stored.version})
    if form is NAME:
        output.lines([item["name"] for item in applied])
    elif form is TABLE:
        output.lines([f"budget {item['name']} applied, version {item['version']}" for item in applied])
    else:
        output.data(applied, form)


@app.command(name="list")
def list_budgets(
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """List the budgets, by name."""
    from leasehold.cli import connection, tables

    with connection.connect(addr, timeout) as allocator:
        budgets = list(_budgets(allocator))
    if form is NAME:
        output.lines([budget.name for budget in budgets])
    elif form is not TABLE:
        output.data([documents.budget(budget) for budget in budgets], form)
    elif budgets:
        tables.budgets(budgets)
    else:
        output.say("there are no budgets; `leasehold budget apply -f FILE` makes some")


def _budgets(allocator: Any) -> Iterator[Any]:
    from leasehold.api.budget.v1 import budget_service_pb2 as wire

    token = ""
    while True:
        request = wire.ListBudgetsRequest(page_size=BUDGETS_PAGE_SIZE, page_token=token)
        page = allocator.call("ListBudgets", request)
        yield from page.budgets
        token = page.next_page_token
        if not token:
            return


@app.command()
def get(
    name: options.Budget,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print a budget's definition and its limits in force.

    With -o yaml it is the definition alone, as `apply` takes it.
    """
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection, tables

    _check_budget_name(name)
    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("GetBudget", wire.GetBudgetRequest(name=name))
    if form is NAME:
        output.lines([answer.budget.name])
    elif form is TABLE:
        tables.budget(answer)
    elif form is YAML:
        output.data({"budgets": [documents.budget(answer.budget)]}, form)
    else:
        in_force = {d.name: answer.limits_in_force.get(d.name) for d in answer.budget.dimensions}
        extra = {"version": answer.budget.version, "limits_in_force": in_force}
        output.data({**documents.budget(answer.budget), **extra}, form)


@app.command()
def delete(
    name: options.Budget, addr: options.Addr = None, timeout: options.Timeout = options.TIMEOUT_SECONDS
) -> None:
    """Delete a budget; every lease of it ends."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection

    _check_budget_name(name)
    with connection.connect(addr, timeout) as allocator:
        allocator.call("DeleteBudget", wire.DeleteBudgetRequest(name=name, request_id=_request_id()))
    output.lines([f"budget {name} deleted"])


@app.command()
def status(
    name: options.Budget,
    worker: Annotated[str, typer.Option("--worker", help="A worker's id; else the first active one")] = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print one worker's view of a budget: its base, what it has now, and the ratio."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection, tables
    from leasehold.rpc import budget_documents

    _check_budget_name(name)
    if worker:
        _check_holder_name(worker, "worker")
    with connection.connect(addr, timeout) as allocator:
        request = wire.GetBudgetStatusRequest(budget=name, worker_id=worker)
        document = budget_documents.status(allocator.call("GetBudgetStatus", request))
    if form is NAME:
        output.lines([document["worker_id"]] if document["worker_id"] else [])
    elif form is TABLE:
        tables.status(document)
    else:
        output.data(document, form)


@app.command()
def watch(
    name: options.Budget,
    count: Annotated[int, typer.Option(help="End after so many states; 0: never", min=0)] = 0,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Follow a budget: its holders and what each has, now and at each change, until Ctrl-C.

    With -o json each state is one line, with -o yaml one document.
    """
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection

    _check_budget_name(name)
    request = wire.WatchBudgetRequest(budget=name)
    with (
        connection.connect(addr, timeout) as allocator,
        contextlib.closing(allocator.follow("WatchBudget", request)) as following,
    ):
        states = itertools.islice(following, count or None)
        if form is TABLE and output.is_terminal():
            _repaint(states)
            return
        for state in states:
            _print_state(state, form)


def _repaint(states: Iterator[Any]) -> None:
    """Show the last state in place, on a terminal."""
    import rich.console
    import rich.live
    import rich.text
    from leasehold.cli import tables

    with rich.live.Live(console=rich.console.Console(highlight=False), auto_refresh=False) as screen:
        for state in states:
            text = tables.state(state, width=shutil.get_terminal_size().columns)
            screen.update(rich.text.Text(text, no_wrap=True, overflow="crop"), refresh=True)


def _print_state(state: Any, form: output.Format) -> None:
    from leasehold.cli import tables

    if form is NAME:
        output.lines([" ".join(view.holder for view in state.holders)])
    elif form is TABLE:
        output.lines([tables.state(state), ""])
    else:
        output.stream_item(documents.message(state), form)


@app.command()
def explain(
    name: options.Budget,
    holder: Annotated[str, typer.Argument(metavar="HOLDER", help="The holder's name, as `watch` shows it")],
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Say why a holder has what it has, with the numbers, and what happened to it last."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection, tables

    _check_budget_name(name)
    _check_holder_name(holder, "holder")
    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("ExplainLease", wire.ExplainLeaseRequest(budget=name, holder=holder))
    if form is NAME:
        output.lines([answer.holder.holder])
    elif form is TABLE:
        tables.explanation(holder, answer)
    else:
        output.data(documents.message(answer), form)


@app.command()
def plan(
    file: Annotated[str, typer.Option("-f", "--file", help="JSON document, - for standard input")] = "-",
    form: options.Output = JSON,
) -> None:
    """Rehearse a division: policy, limits and holders in, grants and reasons out. Needs no server.

    Only the limits are required: {"policy": "max_min", "limits": {"rpm_limit": 120}, "expected_workers": 4,
    "integer": ["num_workers"], "holders": [{"name": "a", "active": true, "weight": 1, "priority": 0,
    "demand": {"rpm_limit": 60}}]}. A demand left out is as much as the holder can get.
    """
    from leasehold.core.budget import plan as plans

    answer = plans.run(plans.parse(documents.read_plan(file)))
    if form is NAME:
        output.lines(list(answer["grants"]))
    elif form is TABLE:
        from leasehold.cli import tables

        tables.plan(answer)
    else:
        output.data(answer, form)


@app.command()
def ledger(
    name: options.AnyBudget = "",
    holder: Annotated[str, typer.Option("--holder", help="Only this holder")] = "",
    limit: Annotated[
        int, typer.Option("--limit", help="At most so many, newest first", min=1, max=100_000)
    ] = 50,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print the history of leases, newest first, as Postgres has it.

    The history of a budget stays when the budget is deleted.
    """
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection, tables

    if name:
        _check_budget_name(name)
    if holder:
        _check_holder_name(holder, "holder")
    with connection.connect(addr, timeout) as allocator:
        entries = _ledger_entries(allocator, name, holder, limit)
        if name and not entries:  # a mistyped name must not look like a quiet budget
            allocator.call("GetBudget", wire.GetBudgetRequest(name=name))
    if form is NAME:
        output.lines([str(entry.id) for entry in entries])
    elif form is not TABLE:
        output.data([documents.message(entry) for entry in entries], form)
    elif entries:
        tables.ledger(entries, has_budget=bool(name))
    else:
        output.say("nothing is in the ledger yet")


def _ledger_entries(allocator: Any, name: str, holder: str, limit: int) -> list[Any]:
    from leasehold.api.budget.v1 import budget_service_pb2 as wire

    entries: list[Any] = []
    token = ""
    while len(entries) < limit:
        size = min(LEDGER_PAGE_SIZE, limit - len(entries))
        request = wire.ListLedgerEntriesRequest(budget=name, holder=holder, page_size=size, page_token=token)
        page = allocator.call("ListLedgerEntries", request)
        entries.extend(page.entries)
        token = page.next_page_token
        if not token:
            break
    return entries


def _request_id() -> str:
    """A call may be sent twice, where an answer is lost; the second is then recognized."""
    return uuid.uuid4().hex


def _check_budget_name(name: str) -> None:
    from leasehold.core.budget import model

    model.checked_budget_name(name, field_name="budget")


def _check_holder_name(name: str, field: str) -> None:
    from leasehold.core.budget import model

    model.checked_holder_name(name, field_name=field)
