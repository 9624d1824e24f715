"""Options and arguments that several commands share, and what completes them at a TAB."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from leasehold.cli import output
from leasehold.core import errors

TIMEOUT_SECONDS = 5.0
TIMEOUT_SECONDS_MAX = 3600.0
#: A TAB is not kept waiting for longer.
COMPLETION_SECONDS = 0.5


def _complete_budget(context: typer.Context, incomplete: str) -> list[str]:
    """Names of budgets; none, rather than a complaint, where no allocator answers."""
    from leasehold.api.budget.v1 import budget_service_pb2 as wire
    from leasehold.cli import connection

    try:
        with connection.connect(context.params.get("addr"), COMPLETION_SECONDS) as allocator:
            page = allocator.call("ListBudgets", wire.ListBudgetsRequest(page_size=250))
    except errors.LeaseholdError:
        return []
    return [budget.name for budget in page.budgets if budget.name.startswith(incomplete)]


def _complete_nodes(context: typer.Context, incomplete: str) -> list[str]:
    return [name for name in _of_nodes(context, lambda node: [node.name]) if name.startswith(incomplete)]


def _complete_pools(context: typer.Context, incomplete: str) -> list[str]:
    names = _of_nodes(context, lambda node: [pool.name for pool in node.status.pools])
    return [name for name in names if name.startswith(incomplete)]


def _complete_workers(context: typer.Context, incomplete: str) -> list[str]:
    def names(node: Any) -> list[str]:
        return [worker.name for pool in node.status.pools for worker in pool.workers]

    return [name for name in _of_nodes(context, names) if name.startswith(incomplete)]


def _of_nodes(context: typer.Context, names: Callable[[Any], list[str]]) -> list[str]:
    """Names that nodes have, of the node of --node if it is given; none where no allocator answers."""
    from leasehold.cli import connection
    from leasehold.cli import names as all_names

    try:
        with connection.connect(context.params.get("addr"), COMPLETION_SECONDS) as allocator:
            nodes, _ = all_names.nodes(allocator)
    except errors.LeaseholdError:
        return []
    wanted = context.params.get("node")
    found = [name for node in nodes if wanted in (None, "", node.name) for name in names(node)]
    return sorted(set(found))


Addr = Annotated[
    str | None,
    typer.Option("--addr", help="Allocators, host:port[,host:port]; else LEASEHOLD_ADDR, else 127.0.0.1:7400"),
]
Timeout = Annotated[
    float, typer.Option("--timeout", help="Seconds to wait for an answer", min=0.1, max=TIMEOUT_SECONDS_MAX)
]
Output = Annotated[output.Format, typer.Option("-o", "--output", help="For people, or for programs")]
Budget = Annotated[
    str, typer.Argument(metavar="BUDGET", help="The budget's name", autocompletion=_complete_budget)
]
AnyBudget = Annotated[
    str,
    typer.Argument(metavar="[BUDGET]", help="Left out: every budget", autocompletion=_complete_budget),
]
OnlyNode = Annotated[
    str,
    typer.Argument(
        metavar="NODE", help="The node's name; left out: the only one", autocompletion=_complete_nodes
    ),
]
AnyNode = Annotated[
    str, typer.Argument(metavar="NODE", help="Left out: every node", autocompletion=_complete_nodes)
]
Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's name", autocompletion=_complete_nodes)]
NodeOption = Annotated[
    str,
    typer.Option("--node", metavar="NODE", help="Left out: the only one", autocompletion=_complete_nodes),
]
NodeFilter = Annotated[
    str, typer.Option("--node", metavar="NODE", help="Of this node only", autocompletion=_complete_nodes)
]
PoolOption = Annotated[
    str,
    typer.Option("--pool", metavar="POOL", help="Left out: the only one", autocompletion=_complete_pools),
]
PoolFilter = Annotated[
    str, typer.Option("--pool", metavar="POOL", help="Of this pool only", autocompletion=_complete_pools)
]
Worker = Annotated[
    str,
    typer.Argument(
        metavar="WORKER",
        help="The worker's name, as transcription_1@r620-1; @NODE may be left out where one has it",
        autocompletion=_complete_workers,
    ),
]
AnyWorker = Annotated[
    str,
    typer.Argument(
        metavar="WORKER",
        help="One worker, which is then replaced; left out: the pools",
        autocompletion=_complete_workers,
    ),
]
