"""Options and arguments that several commands share, and what completes them at a TAB."""

from typing import Annotated

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
